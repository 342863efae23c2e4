"""Trust in the model: fixed, or by measured errors of its gradients."""

import warnings

import numpy as np
import pytest
import settings
import torch as th
from gymnasium.wrappers import TimeLimit
from lq import LIMIT, LinearEnv
from models import LearnedDynamics, Wrong
from stable_baselines3.common.logger import configure

from sb3_mpg import MPG, PriorModel
from sb3_mpg.common import off_policy_model_algorithm
from sb3_mpg.common.compilation.step_compiler import StepCompiler
from sb3_mpg.common.trust import measured
from sb3_mpg.common.trust.gradient_errors import GradientErrors
from sb3_mpg.common.trust.measured import FixedTrust, MeasuredTrust, make_trust, renew_trust
from sb3_mpg.common.trust.report import Measurement
from sb3_mpg.common.trust.weighting import ConstantWeighting, MeasuredWeighting, RuleBasedWeighting

SMALL = {**settings.SMALL, "learning_starts": 100, "batch_size": 64, "buffer_size": 5000}


def measured_rule(*errors, horizons=(0, 5)):
    rule = MeasuredWeighting(horizons)
    rule.observe(np.array(errors))
    return rule


def measurement_of(horizons, n_updates=1):
    ones = np.ones(len(horizons))
    return Measurement(n_updates, GradientErrors(horizons, ones, ones, 1.0, ones > 1), ones / len(ones), 0.1)


@pytest.mark.parametrize("is_corrected", [False, True])
@pytest.mark.parametrize("is_learned", [False, True])
def test_fixed_trust_is_in_models_that_are_learned_as_a_whole(is_corrected, is_learned):
    trust = make_trust(ConstantWeighting((0, 2, 5), (1, 2, 1)), is_corrected, is_learned)
    assert type(trust) is FixedTrust
    assert trust.weights(7) == {0: 0.25, 2: 0.5, 5: 0.25} and trust.longest_horizon == 5
    assert trust.model_weight(7) == 0.75
    assert trust.learns == is_learned
    assert trust.in_model(7) == (0.75 if is_learned else 0.0)
    assert trust.prefers_model(7)
    # Nothing is measured, whatever the critics
    assert trust.measure(1, None, [], None, None) == {} and not trust.measurements
    trust.check_comparison(1, 1)


def test_no_horizon_of_a_model():
    trust = make_trust(ConstantWeighting((0,)), is_corrected=True)
    assert trust.longest_horizon == 0 and not trust.prefers_model(1)
    assert trust.model_weight(1) == trust.in_model(1) == 0.0


def test_fixed_trust_follows_the_weights():
    rule = RuleBasedWeighting((0, 25), total_updates=100)
    trust = make_trust(rule, is_corrected=False, is_learned=True)
    assert [trust.in_model(n_updates) for n_updates in (0, 50, 100)] == [1 - rule(n)[0] for n in (0, 50, 100)]
    assert trust.in_model(0) > 0.99 > 0.01 > trust.in_model(100)


@pytest.mark.parametrize("is_corrected", [False, True])
@pytest.mark.parametrize("is_learned", [False, True])
def test_measured_trust_is_in_models_that_follow_the_data(is_corrected, is_learned):
    trust = make_trust(measured_rule(3.0, 1.0), is_corrected, is_learned)
    assert type(trust) is MeasuredTrust
    assert trust.model_weight(1) == pytest.approx(0.75)
    assert trust.learns == (is_corrected or is_learned)
    assert trust.in_model(1) == pytest.approx(0.75 if trust.learns else 0.0)


def test_measured_trust_prefers_the_model_with_half_of_the_weight():
    assert make_trust(measured_rule(1.0, 1.0), True).prefers_model(1)
    assert make_trust(measured_rule(1.1, 1.0), True).prefers_model(1)
    assert not make_trust(measured_rule(1.0, 1.1), True).prefers_model(1)
    # All horizons of a model count together
    assert make_trust(measured_rule(1.0, 1.9, 1.9, horizons=(0, 2, 5)), True).prefers_model(1)


def test_measurements_of_the_same_horizons_are_kept():
    trust = make_trust(measured_rule(1.0, 2.0), True)
    trust.measurements = measurements = [measurement_of((0, 5), n_updates) for n_updates in (1, 21)]
    assert renew_trust(trust, measured_rule(2.0, 1.0), True, False).measurements == measurements
    assert renew_trust(trust, ConstantWeighting((0, 5)), True, False).measurements == measurements
    assert not renew_trust(trust, measured_rule(1.0, 2.0, horizons=(0, 3)), True, False).measurements


def test_settings_stay_with_a_rule_of_the_same_kind():
    trust = make_trust(measured_rule(1.0, 2.0), True)
    trust.every = 5
    rule = measured_rule(2.0, 1.0)
    renewed = renew_trust(trust, rule, is_corrected=False, is_learned=True)
    assert renewed.every == 5 and renewed.rule is rule
    assert not renewed.is_corrected and renewed.is_learned
    assert type(renew_trust(trust, ConstantWeighting((0, 5)), True, False)) is FixedTrust


def test_one_member_is_not_compared_with_itself():
    trust = make_trust(measured_rule(1.0, 2.0), True)
    trust.check_comparison(n_critics=2, n_members=2)
    with pytest.raises(ValueError, match="compare the members of the model with each other, of which there is one"):
        trust.check_comparison(n_critics=2, n_members=1)
    with pytest.raises(ValueError, match="compare the critics with each other, of which there is one"):
        trust.check_comparison(n_critics=1, n_members=2)


def test_what_was_measured_of_another_model_is_forgotten():
    trust = make_trust(measured_rule(1.0, 2.0), True)
    trust.measurements = [measurement_of((0, 5))]
    trust.forget()
    assert not trust.measurements and trust.weights(1) == {0: 0.5, 5: 0.5}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weighting", ["geometric", "measured"])
def test_a_trainable_model_of_the_user_is_trusted_as_far_as_it_is_weighted(weighting, residual):
    """Whatever ``residual`` is: there is no prior model that it could correct."""
    kwargs = {"prior_model": LearnedDynamics(2, 1), "weighting": weighting, "residual": residual, "horizons": (0, 3)}
    model = MPG("MlpPolicy", LinearEnv(), policy_delay=1, **kwargs, **SMALL).learn(110)
    assert isinstance(model.rollout_model, LearnedDynamics)
    assert len(model.trust.measurements) == (weighting == "measured")
    weights = model.weighting_rule(10)
    assert 0 < weights[3] < 1
    assert model.trust.in_model(10) == model.update_settings(10).trust == 1 - weights[0]
    # So that the critics learn from its rollouts
    assert model.logger.name_to_value["train/rollout_value_loss"] > 0


class Silent(PriorModel):
    """Nothing changes, and nothing is rewarded."""

    def transition(self, states, actions):
        return states + 0.0 * actions

    def reward(self, states, actions, next_states):
        return 0.0 * actions


def weight_of_model(**kwargs):
    """Mean over the second half of the measurements, as a single one is noisy."""
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 10), **SMALL, **kwargs).learn(300)
    measurements = model.trust.measurements
    return np.mean([measurement.weights[1] for measurement in measurements[len(measurements) // 2 :]])


def test_a_right_model_is_trusted():
    assert weight_of_model(residual=False) > 0.9
    assert weight_of_model() > 0.9


@pytest.mark.parametrize("prior_model", [Wrong, Silent])
def test_a_model_that_is_of_no_use_is_trusted_once_it_is_corrected(prior_model):
    with pytest.warns(UserWarning, match=f"{prior_model.__name__} is excluded"):
        assert weight_of_model(prior_model=prior_model, residual=False) < 1e-6
    assert weight_of_model(prior_model=prior_model) > 0.9


def test_the_model_of_another_environment_is_measured_at_once():
    model = MPG("MlpPolicy", LinearEnv(), residual=False, horizons=(0, 10), **SMALL).learn(123)
    assert model._n_updates == 23
    model.prior_model = Wrong()
    with pytest.warns(UserWarning, match="learned of another model is forgotten"):
        model.set_env(LinearEnv())
    assert not model.trust.measurements
    model.learn(5, reset_num_timesteps=False)
    (measurement,) = model.trust.measurements
    assert measurement.n_updates == 24 and measurement.weights[1] < 0.1


class Ends(PriorModel):
    """The model of ``LinearEnv``, with terminations beyond a limit."""

    def __init__(self, limit: float):
        super().__init__()
        self.right = LinearEnv().prior_model()
        self.limit = limit

    def transition(self, states, actions):
        return self.right.transition(states, actions)

    def reward(self, states, actions, next_states):
        return self.right.reward(states, actions, next_states)

    def terminal(self, states):
        return states[:, :1].abs() > self.limit


@pytest.mark.parametrize(
    ("ends", "prior_model", "least", "most"),
    [
        # It misses all, but many rollouts reach none
        ("terminated", LinearEnv().prior_model(), 0.5, 0.8),
        ("terminated", Ends(LIMIT), 1, 1),
        ("terminated", Ends(1e-3), 0, 0),
        ("truncated", LinearEnv().prior_model(), 1, 1),
        (None, Ends(1e-3), 0, 0),
        (None, Ends(1e3), 1, 1),
    ],
)
def test_a_model_is_trusted_as_far_as_it_knows_where_episodes_terminate(ends, prior_model, least, most):
    # No member of the ensemble knows, so that their comparison does not tell
    env = TimeLimit(LinearEnv(ends=ends), 20)
    model = MPG("MlpPolicy", env, prior_model=prior_model, horizons=(0, 10), **SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(160)
    messages = [str(warning.message) for warning in caught]
    assert any("does not know where episodes terminate" in message for message in messages) == (most < 0.5)
    latest = model.trust.measurements[-1].gradients
    assert least <= latest.trust_in_ends <= most and latest.misjudges_ends == (most < 0.5)
    assert latest.is_excluded.tolist() == [False, most == 0] and (model.weighting_rule(60)[10] < 1e-20) == (most == 0)
    (row,) = [line for line in str(model.trust_report()).splitlines() if "10 model steps" in line]
    assert ("excluded: wrong terminations" in row) == (most == 0)


@pytest.mark.parametrize("compiles", [True, False])
def test_one_warning_in_a_training(compiles, monkeypatch):
    # Compiling resets what Python remembers of warnings
    monkeypatch.setattr(off_policy_model_algorithm, "make_steps", lambda *args: StepCompiler("eager"))
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Ends(1e-3), horizons=(0, 10), compile=compiles, **SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(160)
    assert sum(measurement.gradients.misjudges_ends for measurement in model.trust.measurements) > 1
    assert sum("does not know where episodes terminate" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("n_members", [2, 3, 4])
def test_members_that_are_compared_have_different_critics(n_members, monkeypatch):
    seen, inputs = [], (th.ones(1, 2), th.ones(1, 1))
    kwargs = {"residual_kwargs": {"n_members": n_members}, "horizons": (0, 3)}
    model = MPG("MlpPolicy", LinearEnv(), **kwargs, **SMALL)
    measure = model.trust.measure

    def record(n_updates, context, q_functions, *args):
        seen.append([q_function(*inputs).sum().item() for q_function in q_functions])
        return measure(n_updates, context, q_functions, *args)

    monkeypatch.setattr(model.trust, "measure", record)
    model.learn(105)
    assert len(model.trust.measurements) == 1
    assert len(seen[0]) == n_members and seen[0][0] != seen[0][-1]


class Overflows(Wrong):
    def transition(self, states, actions):
        return 1e30 * states + actions


def test_a_model_that_overflows_gets_no_weight_and_training_goes_on():
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Overflows(), residual=False, horizons=(0, 10), **SMALL)
    with pytest.warns(UserWarning, match="gradient of Overflows over 10 steps is not finite at most states"):
        model.learn(160)
    assert model.weighting_rule(60)[10] < 1e-20
    assert model.n_skipped_updates == 0


class NoNumberButAGradient(Wrong):
    """The logarithm of a negative number is not a number, but its derivative is."""

    def reward(self, states, actions, next_states):
        return super().reward(states, actions, next_states) + 0.01 * (-1 - states[:, :1]).log()


def test_a_model_of_which_only_the_values_are_not_finite_gets_no_weight():
    model = MPG("MlpPolicy", LinearEnv(), prior_model=NoNumberButAGradient(), horizons=(0, 5), **SMALL)
    with pytest.warns(UserWarning, match="over 5 steps is not finite at most states"):
        model.learn(160)
    assert model.weighting_rule(60)[5] < 1e-20
    assert model.n_skipped_updates == 0


class OverflowsBeyond(Wrong):
    """Not a number where the first element of the state is more than 0.3, as in a quarter of the states."""

    def transition(self, states, actions):
        return super().transition(states, actions) + (0.3 - states[:, :1]).sqrt() * 0


@pytest.mark.parametrize("kwargs", [{}, {"residual": False, "weighting": "constant"}])
def test_states_at_which_a_model_overflows_are_masked_with_one_warning(kwargs):
    kwargs = {**SMALL, **kwargs, "horizons": (0, 5), "policy_delay": 1}
    model = MPG("MlpPolicy", LinearEnv(), prior_model=OverflowsBeyond(), **kwargs)
    logger = configure(None, [])
    model.set_logger(logger)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(160)
    assert sum("overflow at some states" in str(warning.message) for warning in caught) == 1
    assert model.n_skipped_updates == 0
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    assert 0 < logger.name_to_value["train/masked_states"] < 0.5
    assert model.weighting_rule(model._n_updates)[5] > 0.1


class Stutters(LinearEnv):
    """Once before learning starts, an observation is not a number, and so is a reward."""

    n = 0

    def step(self, action):
        observation, reward, *rest = super().step(action)
        self.n += 1
        return np.full_like(observation, np.nan) if self.n == 50 else observation, np.nan if self.n == 70 else reward, *rest


def test_a_record_that_is_not_finite_is_reported_and_does_no_harm():
    model = MPG("MlpPolicy", Stutters(), horizons=(0, 10), max_skipped_updates=300, **SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(400)
    assert sum("observation or a reward that is not finite" in str(warning.message) for warning in caught) == 1
    assert 0 < model.n_skipped_updates < 250
    learned = model.rollout_model.state_dict()
    assert all(th.isfinite(tensor).all() for tensor in learned.values())
    assert all(th.isfinite(parameter).all() for parameter in model.rollout_model.parameters())
    assert model.weighting_rule(model._n_updates)[10] > 0.5
    report = model.trust_report()
    assert np.isfinite(report.prior.relative).all() and np.isfinite(report.prior.returns).all()
    assert report.corrected.relative.max() < 0.2


@pytest.mark.usefixtures("models_are_fitted_once")
def test_measurements_become_rarer(monkeypatch):
    monkeypatch.setattr(measured, "N_FAST_UPDATES", 41)
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL).learn(230)
    assert [measurement.n_updates for measurement in model.trust.measurements] == [1, 21, 41, 61, 121]
