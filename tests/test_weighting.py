import math

import numpy as np
import pytest

from sb3_mpg.common.trust.weighting import ConstantWeighting, GeometricWeighting, RuleBasedWeighting, make_weighting_rule


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
    # Not even where all that there is to compare is infinite
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
