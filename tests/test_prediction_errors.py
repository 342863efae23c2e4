"""Prediction errors that the checker measures, and its verdicts on their causes."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from cart import TIME_STEP, Cart, CartModel, ChangedCart, TurntableEnv
from models import KnowsNothing, Turntable
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mpg import PriorModel, check_prior_model
from sb3_mpg.common.models.checking.verdicts import scale_factor


def measure(**changes):
    return check_prior_model(ChangedCart(**changes), Cart(), n_samples=400, verbose=False)


def test_angles_are_compared_the_short_way_around():
    report = check_prior_model(Turntable(), TurntableEnv(), n_samples=200, verbose=False)
    assert report.verdicts[0].startswith("good")
    assert report.rms_errors.max() < 1e-4
    assert report.action_gains[0, 0] == pytest.approx(1.0, abs=1e-3)


def test_biased_dimension_is_named():
    report = measure(bias=0.2)
    assert report.verdicts[0].startswith("good") and report.verdicts[1].startswith("biased")
    np.testing.assert_allclose(report.biases[0], [0.0, 0.2], atol=1e-5)
    np.testing.assert_allclose(report.biases[4], [0.2 * TIME_STEP * 10, 1.0], atol=1e-4)
    np.testing.assert_allclose(report.rms_errors[0], [0.0, 0.2], atol=1e-5)
    assert any("the model predicts observation[1] too high by 0.2 on average" in hint for hint in report.hints)
    assert "biased" in str(report)


def test_flipped_action_is_recognised():
    report = measure(gain=-1.0)
    assert report.verdicts[1] == "wrong sign of action 0"
    assert any("action 0 seems to act with the opposite sign on observation[1]" in hint for hint in report.hints)
    np.testing.assert_allclose(report.action_gains[0, 1], -1.0, atol=1e-3)


def test_flipped_action_is_recognised_beside_a_bias():
    assert measure(gain=-1.0, bias=1.0).verdicts[1] == "wrong sign of action 0"


def test_flipped_change_is_recognised():
    report = measure(velocity_sign=-1.0)
    assert report.verdicts[0] == "wrong sign"
    assert any("the model seems to change observation[0] in the opposite direction" in hint for hint in report.hints)


def test_wrong_scales_are_recognised():
    report = measure(gain=0.5, reward_scale=100.0)
    np.testing.assert_allclose(report.action_gains[0, 1], 2.0, atol=1e-3)
    assert any("action 0 acts 2 times as strongly on observation[1]" in hint for hint in report.hints)
    assert any("the change of observation[0] is 2 times" in hint for hint in measure(velocity_sign=0.5).hints)
    assert report.reward_verdict == "wrong scale"
    assert any("the reward is 0.01 times" in hint for hint in report.hints)
    assert measure(reward_scale=-1.0).reward_verdict == "wrong sign"


class Scaled(CartModel):
    """An action that is not what the environment gets, and a velocity that is right otherwise: it also falls."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def transition(self, states, actions):
        return super().transition(states, self.function(actions)) + th.tensor([0.0, 0.1], dtype=states.dtype)


class Falls(Cart):
    def step(self, action):
        _, reward, terminated, truncated, info = super().step(action)
        self.state[1] += 0.1 + self.noise * self.np_random.standard_normal()
        return self.state.astype(np.float32), reward, terminated, truncated, info

    noise = 0.0


@pytest.mark.parametrize(
    ("function", "verdict", "hint"),
    [
        (lambda a: a, "good", None),
        (lambda a: 3 * a, "wrong gain of action 0", "acts only 0.33 times as strongly on observation[1]"),
        (lambda a: a / 2, "wrong gain of action 0", "acts 2 times as strongly on observation[1]"),
        (lambda a: 0 * a, "misses action 0", "the effect of action 0 on observation[1] is missing in the model"),
    ],
)
def test_actions_of_the_wrong_strength_are_recognised(function, verdict, hint):
    report = check_prior_model(Scaled(function), Falls(), n_samples=400, verbose=False)
    assert report.verdicts[1].split(",")[0] == verdict
    assert [hint in text for text in report.hints[:1]] == ([] if hint is None else [True])


def test_an_action_without_effect_is_recognised():
    class Ignores(Falls):
        def step(self, action):
            return super().step(0 * action)

    report = check_prior_model(Scaled(lambda a: a), Ignores(), n_samples=400, verbose=False)
    assert report.verdicts[1].split(",")[0] == "wrong gain of action 0"
    assert "action 0 moves observation[1] in the model, and not in the environment" in report.hints[0]


def test_noise_is_no_mistake_of_the_model():
    env = Falls()
    env.noise = 0.05
    (hint,) = check_prior_model(Scaled(lambda a: a), env, n_samples=400, verbose=False).hints
    assert "It may be noise" in hint
    # As before: nothing that the model could know is missing above, and is here
    report = check_prior_model(Scaled(lambda a: a + 0.5 * a**2), env, n_samples=400, verbose=False)
    assert not any("It may be noise" in hint for hint in report.hints) and len(report.hints) > 0


def test_rms_error_of_no_change():
    """The relative error of the model that predicts no change is one, by definition."""
    report = check_prior_model(KnowsNothing(), Cart(), n_samples=400, verbose=False)
    np.testing.assert_allclose(report.relative_errors, 1.0)
    # Which is no worse than no change
    assert report.verdicts == ("not moved", "misses action 0")


def test_missing_terminal():
    class NeverTerminal(CartModel):
        def terminal(self, states):
            return PriorModel.terminal(self, states)

    n_missed, n_false = check_prior_model(NeverTerminal(), Cart(), n_samples=400, verbose=False).terminal_errors
    assert n_missed > 0 and n_false == 0


def test_vec_env_below_vec_normalize():
    env = VecNormalize(DummyVecEnv([Cart, Cart]))
    env.reset()
    mean = env.obs_rms.mean.copy()
    report = check_prior_model(CartModel(), env, n_samples=200, verbose=False)
    assert report.n_windows[0] == 200 and report.relative_errors.max() < 1e-4
    assert (env.obs_rms.mean == mean).all()


def test_windows_stay_within_episodes():
    """Episodes of five steps: no longer predictions, and no window crosses a reset (the model would seem wrong)."""
    env = gym.wrappers.TimeLimit(Cart(), 5)
    report = check_prior_model(CartModel(), env, n_samples=200, verbose=False)
    assert len(report.n_windows) == 5 and (np.diff(report.n_windows) < 0).all()
    assert report.relative_errors.max() < 1e-4
    assert "too short for more" in str(report)


def test_same_seed_same_report():
    reports = [check_prior_model(ChangedCart(bias=0.1), Cart(), n_samples=100, seed=3, verbose=False) for _ in range(2)]
    np.testing.assert_array_equal(reports[0].rms_errors, reports[1].rms_errors)


def test_large_errors_do_not_hide_the_effect_of_an_action():
    """What observations explain is no noise of the regression."""

    class Sticks(ChangedCart):
        def transition(self, states, actions):
            return super().transition(states, actions) - th.cat([0 * actions, 5 * states[:, :1] ** 2], dim=1)

    gains = check_prior_model(Sticks(gain=0.5), Cart(), n_samples=400, verbose=False).action_gains
    assert gains[0, 1] == pytest.approx(2.0, abs=0.05)


def test_a_factor_is_none_if_a_constant_is_off_too():
    predicted = np.linspace(-1, 1, 50)
    assert scale_factor(1.3 * predicted, predicted) == pytest.approx(1.3)
    assert scale_factor(1.3 * predicted + 5, predicted) is None
    assert scale_factor(1.3 * predicted + 5, predicted + 5 / 1.3) == pytest.approx(1.3)
