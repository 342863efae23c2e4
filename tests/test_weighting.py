"""Weighting rules: a contract for all of them, and each against its formula."""

import math
import pickle

import numpy as np
import pytest
from lq import LinearEnv
from settings import SMALL

from sb3_mpg import MPG
from sb3_mpg.common.trust.weighting import (
    WEIGHTING_RULES,
    ConstantWeighting,
    GeometricWeighting,
    MeasuredWeighting,
    RuleBasedWeighting,
    make_weighting_rule,
)


def softmax(values):
    """Of a few numbers, by the definition."""
    total = sum(math.exp(value - max(values)) for value in values)
    return [math.exp(value - max(values)) / total for value in values]


def test_rule_for_two_horizons_at_its_landmarks():
    rule = RuleBasedWeighting((0, 25), eta=0.1, total_updates=9000)
    at_start = softmax([1.0, 1 / 0.9**25])
    for n_updates, expected in {
        0: at_start,
        2250: softmax([1.0, 1 / 0.95**25]),
        4500: [0.5, 0.5],
        6750: softmax([1 / 0.95**25, 1.0]),
        9000: at_start[::-1],
        50_000: at_start[::-1],
    }.items():
        weights = rule(n_updates)
        assert list(weights) == [0, 25]
        np.testing.assert_allclose(list(weights.values()), expected, rtol=1e-9)
    # The revision writes lambda on the second half as 2 - lambda: falling from 1 to 1 - eta
    np.testing.assert_allclose(list(rule(8000).values()), softmax([1 / (1 - 2 * 3500 * 0.1 / 9000) ** 25, 1.0]), rtol=1e-9)


def test_rule_for_many_horizons():
    """Appendix C-A: the error falls with the horizon in the first half, and grows with it in the second."""
    rule = RuleBasedWeighting((10, 0, 25, 3), eta=0.2, total_updates=100)
    early, late = rule(25), rule(75)
    assert list(early) == [0, 3, 10, 25]
    np.testing.assert_allclose(list(early.values()), softmax([1 / 0.9**i for i in (0, 3, 10, 25)]), rtol=1e-9)
    np.testing.assert_allclose(list(late.values()), softmax([1 / 0.9 ** (25 - i) for i in (0, 3, 10, 25)]), rtol=1e-9)
    np.testing.assert_allclose(list(rule(50).values()), [0.25] * 4)


def test_rule_does_not_overflow():
    weights = RuleBasedWeighting((0, 200), eta=0.9, total_updates=10)(0)
    assert weights == {0: 0.0, 200: 1.0}
    # Not even where all scores are infinite
    assert RuleBasedWeighting((0, 200), eta=0.99)(1) == {0: 0.0, 200: 1.0}


def test_constant_weights_are_divided_by_their_sum():
    assert ConstantWeighting((25,))(7) == {25: 1.0}
    assert ConstantWeighting((25, 0), (3, 1))(123) == {0: 0.25, 25: 0.75}


def test_geometric_weights():
    horizons, lambda_ = (0, 1, 2, 5), 0.8
    weights = GeometricWeighting(horizons, lambda_)(1)
    raw = [(1 - lambda_) * lambda_**k for k in horizons]
    np.testing.assert_allclose(list(weights.values()), np.array(raw) / sum(raw))
    many = GeometricWeighting(range(200), lambda_)(1)
    np.testing.assert_allclose([many[k] for k in range(5)], [(1 - lambda_) * lambda_**k for k in range(5)], rtol=1e-9)


def test_measured_weights():
    rule = MeasuredWeighting((0, 5, 25), window=2)
    assert rule.needs_errors
    np.testing.assert_allclose(rule.weights(1), [1 / 3] * 3)
    rule.observe(np.array([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(rule.weights(2), np.array([4, 2, 1]) / 7)
    rule.observe(np.array([3.0, 2.0, np.inf]))
    np.testing.assert_allclose(rule.weights(3), [0.5, 0.5, 0.0], atol=1e-20)
    for _ in range(2):
        rule.observe(np.array([1.0, 0.0, np.nan]))
    np.testing.assert_allclose(rule.weights(4), [0.0, 1.0, 0.0], atol=1e-20)
    with pytest.raises(ValueError, match="at least 1"):
        MeasuredWeighting((0, 5), window=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rule_based", ()), "non-empty sequence"),
        (("rule_based", 25), "non-empty sequence"),
        (("rule_based", (0, -1)), "0 or more"),
        (("rule_based", (0, 2.5)), "whole number"),
        (("rule_based", (0, 5, 5)), "once"),
        (("rule_based", (5, 25)), "needs horizon 0"),
        (("rule_based", (0, 25), {"eta": 1.5}), "between 0 and 1"),
        (("rule_based", (0, 25), {"total_updates": 0}), "must be positive"),
        (("geometric", (0, 25), {"lambda_": 1.0}), "between 0 and 1"),
        (("constant", (0, 25), {"values": [1.0]}), "one weight"),
        (("magic", (0, 25)), "Unknown weighting 'magic'"),
        ((ConstantWeighting((0, 5)), (0, 25)), r"horizons \(0, 5\)"),
    ],
)
def test_bad_rules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_weighting_rule(*arguments)


@pytest.mark.parametrize("name", WEIGHTING_RULES)
class TestContract:
    """What holds for every weighting rule."""

    UPDATES = (1, 2, 40, 5000, 20_000)

    @staticmethod
    def observed_rule(name):
        """Rules that need no errors may be told of some, too."""
        rule = make_weighting_rule(name, (5, 0, 25))
        for errors in ([1.0, 2.0, 4.0], [3.0, np.inf, 0.0], [np.nan, 1.0, 1e-40]):
            rule.observe(np.array(errors))
        return rule

    def test_weights_are_shares(self, name):
        for rule in (make_weighting_rule(name, (5, 0, 25)), self.observed_rule(name)):
            for n_updates in self.UPDATES:
                weights = rule.weights(n_updates)
                assert weights.shape == (3,) and weights.sum() == pytest.approx(1.0) and (weights >= 0).all()

    def test_horizons_are_in_ascending_order(self, name):
        rule = self.observed_rule(name)
        assert rule.horizons == (0, 5, 25)
        for n_updates in self.UPDATES:
            weights = rule(n_updates)
            assert list(weights) == [0, 5, 25]
            assert list(weights.values()) == rule.weights(n_updates).tolist()

    def test_asking_changes_nothing(self, name):
        rule = self.observed_rule(name)
        first = [rule(n_updates) for n_updates in self.UPDATES]
        assert [rule(n_updates) for n_updates in self.UPDATES] == first

    def test_what_is_forgotten_was_never_observed(self, name):
        rule, new = self.observed_rule(name), make_weighting_rule(name, (5, 0, 25))
        assert (rule(40) == new(40)) != rule.needs_errors
        rule.forget()
        assert [rule(n_updates) for n_updates in self.UPDATES] == [new(n_updates) for n_updates in self.UPDATES]

    def test_pickles_have_the_same_weights(self, name):
        rule = self.observed_rule(name)
        loaded = pickle.loads(pickle.dumps(rule))
        assert [loaded(n_updates) for n_updates in self.UPDATES] == [rule(n_updates) for n_updates in self.UPDATES]

    def test_it_is_saved_with_the_algorithm(self, name, tmp_path):
        rule = self.observed_rule(name)
        MPG("MlpPolicy", LinearEnv(), horizons=(0, 5, 25), weighting=rule, **SMALL).save(tmp_path / "model.zip")
        loaded = MPG.load(tmp_path / "model.zip").weighting_rule
        assert type(loaded) is type(rule)
        assert [loaded(n_updates) for n_updates in self.UPDATES] == [rule(n_updates) for n_updates in self.UPDATES]

    def test_unknown_arguments_are_refused(self, name):
        with pytest.raises(ValueError, match=r"`weighting_kwargs` got \['etta'\]"):
            make_weighting_rule(name, (0, 5), {"etta": 0.1})

    def test_arguments_do_not_go_with_a_rule_that_is_made(self, name):
        rule = make_weighting_rule(name, (0, 5))
        assert make_weighting_rule(rule, (5, 0)) is rule
        with pytest.raises(ValueError, match="goes with the name of a rule"):
            make_weighting_rule(rule, (0, 5), {"eta": 0.1})
