import random

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.checker import check_prior_model, validate_prior_model

TIME_STEP = 0.1
MASS = 2.0
OBSERVATION_SPACE = spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACTION_SPACE = spaces.Box(-2.0, 2.0, (1,), np.float32)


class Cart(gym.Env):
    """Position and velocity of a cart that is pushed; terminates far away."""

    observation_space = OBSERVATION_SPACE
    action_space = ACTION_SPACE

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1.0, 1.0, size=2)
        self.n_steps = 0
        return self.state.astype(np.float32), {}

    def step(self, action):
        position, velocity = self.state
        reward = float(-(position**2) - 0.1 * action[0] ** 2)
        self.state = np.array([position + TIME_STEP * velocity, velocity + TIME_STEP / MASS * float(action[0])])
        self.n_steps += 1
        terminated = bool(abs(self.state[0]) > 1.5)
        return self.state.astype(np.float32), reward, terminated, self.n_steps >= 40, {}


class CartModel(PriorModel):
    def transition(self, states, actions):
        position, velocity = states.split(1, dim=1)
        return th.cat([position + TIME_STEP * velocity, velocity + TIME_STEP / MASS * actions], dim=1)

    def reward(self, states, actions, next_states):
        return -(states[:, :1] ** 2) - 0.1 * (actions**2).sum(dim=1, keepdim=True)

    def terminal(self, states):
        return states[:, :1].abs() > 1.5


class NoisyModel(CartModel):
    """Noise while training only, and a layer whose mode must come back."""

    def __init__(self):
        super().__init__()
        self.dropout = th.nn.Dropout(0.5)
        self.layer = th.nn.Linear(1, 1)

    def transition(self, states, actions):
        noise = 0.1 * th.randn_like(states) if self.training else 0.0
        return super().transition(states, actions) + self.dropout(th.zeros_like(states)) + noise


class KnowsNothing(PriorModel):
    """Nothing changes and nothing is rewarded: allowed."""

    def transition(self, states, actions):
        return states

    def reward(self, states, actions, next_states):
        return th.zeros(len(states), 1, dtype=states.dtype)


def test_correct_model(capsys):
    report = check_prior_model(CartModel(), Cart(), n_samples=400)
    assert report.relative_errors.shape == (25, 2)
    assert report.relative_errors.max() < 1e-4
    assert report.verdicts == ("good", "good") and report.reward_verdict == "good"
    assert report.supported_horizon == 25 and report.terminal_errors == (0, 0) and not report.hints
    # The position does not feel the action within one step
    np.testing.assert_allclose(report.action_gains, [[np.nan, 1.0]], atol=1e-3)
    printed = capsys.readouterr().out
    assert "observation[0]" in printed and "25-step error" in printed and "How to fix" not in printed


@pytest.mark.parametrize("model_class", [NoisyModel, KnowsNothing])
def test_accepted(model_class, capsys):
    report = check_prior_model(model_class(), Cart(), n_samples=200, verbose=False)
    assert (report.supported_horizon == 0) == (model_class is KnowsNothing)
    assert capsys.readouterr().out == ""


def test_leaves_no_trace():
    model = NoisyModel()
    model.layer.eval()
    states = random.getstate(), np.random.get_state()[1].copy(), th.get_rng_state()
    check_prior_model(model, Cart(), n_samples=200, verbose=False)
    validate_prior_model(model, OBSERVATION_SPACE, ACTION_SPACE, "cpu")
    assert model.training and model.dropout.training and not model.layer.training
    assert model.layer.weight.dtype == th.float32 and model.layer.weight.grad is None
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert th.equal(th.get_rng_state(), states[2])


class FlatReward(CartModel):
    def reward(self, states, actions, next_states):
        return -(states**2).sum(dim=1)


class ScalarReward(CartModel):
    def reward(self, states, actions, next_states):
        return -(states**2).mean()


class DoubleReward(CartModel):
    def reward(self, states, actions, next_states):
        return super().reward(states, actions, next_states).double()


class OtherDevice(CartModel):
    def transition(self, states, actions):
        return super().transition(states, actions).to("meta")


class DetachedTransition(CartModel):
    def transition(self, states, actions):
        return super().transition(states, actions).detach()


class DetachedActions(CartModel):
    def transition(self, states, actions):
        return super().transition(states, actions.detach())


class NumpyTransition(CartModel):
    def transition(self, states, actions):
        return th.as_tensor(0.9 * states.numpy())


class NumpyReward(CartModel):
    def reward(self, states, actions, next_states):
        return np.zeros((len(states), 1), dtype=np.float32)


class NotFinite(CartModel):
    def transition(self, states, actions):
        position, velocity = super().transition(states, actions).split(1, dim=1)
        return th.cat([position, velocity / 0.0], dim=1)


class RootAtZero(CartModel):
    def reward(self, states, actions, next_states):
        return -(0.0 * states).norm(dim=1, keepdim=True) + th.sqrt(0.0 * actions)


class OneStateTooMany(CartModel):
    def transition(self, states, actions):
        return th.cat([states, actions], dim=1)


class WrongObservation(CartModel):
    def observation(self, states):
        return states[:, :1]


class FlatState(CartModel):
    def state_from_observation(self, observations):
        return observations[:, 0]


class NumberTerminal(CartModel):
    def terminal(self, states):
        return (states[:, :1].abs() > 1.5).float()


class InPlace(CartModel):
    def transition(self, states, actions):
        states[:, 1:] += TIME_STEP / MASS * actions
        return states


class DetachedStep(CartModel):
    def step(self, states, actions):
        next_states = self.transition(states, actions).detach()
        return next_states, self.reward(states, actions, next_states)


class FlatStep(CartModel):
    def step(self, states, actions):
        next_states = self.transition(states, actions)
        return next_states, self.reward(states, actions, next_states).squeeze(1)


class OtherStep(CartModel):
    def step(self, states, actions):
        next_states = self.transition(states, 2.0 * actions)
        return next_states, self.reward(states, actions, next_states)


class LonelyStep(CartModel):
    def step(self, states, actions):
        return self.transition(states, actions)


class DeniesTheEnd(CartModel):
    may_terminate = False

    def terminal(self, states):
        return states[:, :1] < 1e9


class FlatDifference(CartModel):
    def state_difference(self, states, others):
        return (states - others)[:, 0]


class NoInverse(CartModel):
    def state_difference(self, states, others):
        return others - states


class Failing(CartModel):
    def transition(self, states, actions):
        return states @ th.ones(3, 3)


INTERFACE_ERRORS = [
    (FlatReward, ValueError, r"FlatReward\.reward returned shape \(8,\), expected \(8, 1\).*keepdim=True"),
    (ScalarReward, ValueError, r"returned shape \(\), expected \(8, 1\)"),
    (DoubleReward, ValueError, "returned torch.float64 for torch.float32 arguments.*`.double"),
    (OtherDevice, ValueError, "on device meta for arguments on cpu"),
    (DetachedTransition, ValueError, "not differentiable with respect to states.*detach"),
    (DetachedActions, ValueError, "not differentiable with respect to actions.*detach"),
    (NumpyTransition, ValueError, "transition failed.*numpy.*stay in torch"),
    (NumpyReward, TypeError, "returned ndarray, expected a torch.Tensor"),
    (NotFinite, ValueError, r"not finite in next_state\[1\].*divisions"),
    (RootAtZero, ValueError, "gradients with respect to actions that are not finite"),
    (OneStateTooMany, ValueError, r"transition returned shape \(8, 3\), expected \(8, 2\)"),
    (WrongObservation, ValueError, "observation returned shape.*inverse"),
    (FlatState, ValueError, r"state_from_observation returned shape \(8,\).*\(B, S\)"),
    (NumberTerminal, ValueError, "terminal returned torch.float32.*expected torch.bool.*comparison"),
    (InPlace, ValueError, "modifies its argument states in place"),
    (Failing, ValueError, r"transition failed for states \(8, 2\), actions \(8, 1\)"),
    (DetachedStep, ValueError, r"DetachedStep\.step is not differentiable: its next states carry no gradient"),
    (FlatStep, ValueError, r"FlatStep\.step returned rewards \(8,\) .*expected \(8, 1\)"),
    (OtherStep, ValueError, "OtherStep.step returned other next states than expected"),
    (LonelyStep, TypeError, "LonelyStep.step returned Tensor, expected two tensors"),
    (DeniesTheEnd, ValueError, "terminal while `may_terminate` is False"),
    (FlatDifference, ValueError, r"state_difference returned shape \(8,\), expected \(8, 2\)"),
    (NoInverse, ValueError, r"state_add\(y, state_difference\(x, y\)\)` is .* away from x in state\[\d\]"),
    (PriorModel, NotImplementedError, r"must implement transition\(states, actions\)"),
    (th.nn.Identity, TypeError, "Expected an instance of a subclass of PriorModel, got Identity"),
]


@pytest.mark.parametrize("model_class, error, message", INTERFACE_ERRORS)
def test_interface_errors(model_class, error, message):
    """The cheap check, which the algorithms call, sees them already."""
    with pytest.raises(error, match=message):
        validate_prior_model(model_class(), OBSERVATION_SPACE, ACTION_SPACE, "cpu")
    with pytest.raises(error, match=message):
        check_prior_model(model_class(), Cart(), n_samples=50)


class Single(CartModel):
    def transition(self, states, actions):
        if states.dtype == th.float64:
            return super().transition(states.float(), actions.float())
        return super().transition(states, actions)


class RowsSeeEachOther(CartModel):
    def reward(self, states, actions, next_states):
        return super().reward(states, actions, next_states) - states.mean()


class HiddenState(CartModel):
    n_calls = 0

    def transition(self, states, actions):
        self.n_calls += 1
        return super().transition(states, actions) + 0.01 * self.n_calls


class AlwaysRandom(CartModel):
    def transition(self, states, actions):
        return super().transition(states, actions) + 0.1 * th.randn_like(states)


class PartlyDetached(CartModel):
    def transition(self, states, actions):
        position, velocity = states.split(1, dim=1)
        velocity = velocity + TIME_STEP / MASS * (0.5 * actions + 0.5 * actions.detach())
        return th.cat([position + TIME_STEP * states[:, 1:], velocity], dim=1)


class NotInverse(CartModel):
    def observation(self, states):
        return states * th.tensor([1.0, 1.1], dtype=states.dtype)


@pytest.mark.parametrize(
    "model_class, message",
    [
        (Single, "returned torch.float32 for torch.float64 arguments"),
        (RowsSeeEachOther, "rows must not see each other"),
        (HiddenState, "hidden state"),
        (AlwaysRandom, "random in evaluation mode.*if self.training"),
        (PartlyDetached, r"wrong gradient: d next_state\[1\] / d action\[0\] is 0.025 by.*expected 0.05 from"),
        (NotInverse, r"differs from x by.*observation\[1\]"),
    ],
)
def test_thorough_errors(model_class, message):
    validate_prior_model(model_class(), OBSERVATION_SPACE, ACTION_SPACE, "cpu")
    with pytest.raises(ValueError, match=message):
        check_prior_model(model_class(), Cart(), n_samples=50)


def test_model_class_instead_of_model():
    with pytest.raises(TypeError, match=r"pass an instance, `CartModel\(\)`"):
        validate_prior_model(CartModel, OBSERVATION_SPACE, ACTION_SPACE, "cpu")


def test_wrong_spaces_and_environments():
    with pytest.raises(TypeError, match="need observation spaces that are a Box of floats"):
        validate_prior_model(CartModel(), spaces.Discrete(3), ACTION_SPACE, "cpu")
    with pytest.raises(TypeError, match="need action spaces that are a Box of floats"):
        validate_prior_model(CartModel(), OBSERVATION_SPACE, spaces.Discrete(3), "cpu")
    with pytest.raises(TypeError, match="Expected a Gymnasium environment, its id or a VecEnv"):
        check_prior_model(CartModel(), 3)


def test_kinks_and_jumps_are_allowed():
    class Kinks(CartModel):
        def reward(self, states, actions, next_states):
            return -(actions - actions).abs() - states[:, :1].abs() + th.floor(actions)

    check_prior_model(Kinks(), Cart(), n_samples=50, verbose=False)


class PenalisesTheEnd(CartModel):
    def reward(self, states, actions, next_states):
        return super().reward(states, actions, next_states) - 10.0 * self.terminal(next_states)


class DetachedAndPenalisesTheEnd(PenalisesTheEnd):
    def reward(self, states, actions, next_states):
        return super().reward(states, actions, next_states) - next_states[:, 1:].detach() ** 2


class PenalisesOtherSteps(PenalisesTheEnd):
    def reward(self, states, actions, next_states):
        return super().reward(states, actions, next_states) - 1.0 * (next_states[:, 1:] > 0)


def test_terminal_states_may_be_penalised():
    validate_prior_model(PenalisesTheEnd(), OBSERVATION_SPACE, ACTION_SPACE, "cpu")
    check_prior_model(PenalisesTheEnd(), Cart(), n_samples=50, verbose=False)
    for model in (DetachedAndPenalisesTheEnd(), PenalisesOtherSteps()):
        with pytest.raises(ValueError, match="not differentiable with respect to next_states"):
            validate_prior_model(model, OBSERVATION_SPACE, ACTION_SPACE, "cpu")


@pytest.mark.parametrize("env_id", ["PathTracking-v0", "InvertedPendulumConti-v0"])
def test_the_models_of_environments_that_terminate_can_be_learned_with(env_id):
    env = gym.make(env_id, early_reset_terminates=True)
    check_prior_model(env.unwrapped.prior_model(), env, n_samples=200, verbose=False)
    MPG("MlpPolicy", env)


def test_some_impossible_observations_are_allowed():
    """The cheap check invents observations, and some may be outside of the model's domain."""

    class Tank(CartModel):
        def transition(self, states, actions):
            return super().transition(states, actions) - th.sqrt(states[:, :1])

    validate_prior_model(Tank(), OBSERVATION_SPACE, ACTION_SPACE, "cpu")
    with pytest.raises(ValueError, match="not finite"):
        check_prior_model(Tank(), Cart(), n_samples=50)


class ChangedCart(CartModel):
    """The right model with one thing changed."""

    def __init__(self, bias=0.0, gain=1.0, velocity_sign=1.0, reward_scale=1.0):
        super().__init__()
        self.bias, self.gain, self.velocity_sign, self.reward_scale = bias, gain, velocity_sign, reward_scale

    def transition(self, states, actions):
        position, velocity = states.split(1, dim=1)
        position = position + self.velocity_sign * TIME_STEP * velocity
        return th.cat([position, velocity + self.gain * TIME_STEP / MASS * actions + self.bias], dim=1)

    def reward(self, states, actions, next_states):
        return self.reward_scale * super().reward(states, actions, next_states)


def measure(**changes):
    return check_prior_model(ChangedCart(**changes), Cart(), n_samples=400, verbose=False)


class Turntable(gym.Env):
    """An angle that wraps."""

    observation_space = spaces.Box(-np.pi, np.pi, (1,), np.float32)
    action_space = ACTION_SPACE

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.angle = self.np_random.uniform(-np.pi, np.pi, 1)
        return self.angle.astype(np.float32), {}

    def step(self, action):
        reward = -float(action[0] ** 2)
        self.angle = np.remainder(self.angle + 1.0 + 0.1 * action + np.pi, 2 * np.pi) - np.pi
        return self.angle.astype(np.float32), reward, False, False, {}


class TurntableModel(PriorModel):
    def transition(self, states, actions):
        return states + 1.0 + 0.1 * actions

    def reward(self, states, actions, next_states):
        return -(actions**2)

    def state_difference(self, states, others):
        return th.remainder(states - others + np.pi, 2 * np.pi) - np.pi


def test_angles_are_compared_the_short_way_around():
    report = check_prior_model(TurntableModel(), Turntable(), n_samples=200, verbose=False)
    assert report.verdicts[0].startswith("good")
    assert report.rms_errors.max() < 1e-4
    assert report.action_gains[0, 0] == pytest.approx(1.0, abs=1e-3)


def test_biased_dimension_is_named():
    report = measure(bias=0.2)
    assert report.verdicts[0].startswith("good") and report.verdicts[1].startswith("biased")
    np.testing.assert_allclose(report.biases[0], [0.0, 0.2], atol=1e-5)
    np.testing.assert_allclose(report.biases[4], [0.2 * TIME_STEP * 10, 1.0], atol=1e-4)
    np.testing.assert_allclose(report.rms_errors[0], [0.0, 0.2], atol=1e-5)
    assert any("observation[1] is predicted too high by 0.2" in hint for hint in report.hints)
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
    assert any("observation[0] seems to change in the opposite direction" in hint for hint in report.hints)


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
        (lambda a: 3 * a, "wrong gain of action 0", "acts 0.33 times as strongly on observation[1]"),
        (lambda a: a / 2, "wrong gain of action 0", "acts 2 times as strongly on observation[1]"),
        (lambda a: 0 * a, "misses action 0", "action 0 moves observation[1], but not in the model"),
        (lambda a: a.sign(), "rough", "action 0 moves states in the model, but the gradient"),
    ],
)
def test_actions_of_the_wrong_strength_are_recognised(function, verdict, hint):
    report = check_prior_model(Scaled(function), Falls(), n_samples=400, verbose=False)
    assert report.verdicts[1].split(",")[0] == verdict
    assert [hint in text for text in report.hints[:1]] == ([] if hint is None else [True])


def test_noise_is_no_mistake_of_the_model():
    env = Falls()
    env.noise = 0.05
    (hint,) = check_prior_model(Scaled(lambda a: a), env, n_samples=400, verbose=False).hints
    assert "rough" in hint and "It may be noise" in hint
    # As before: nothing that the model could know is missing above, and is here
    report = check_prior_model(Scaled(lambda a: a + 0.5 * a**2), env, n_samples=400, verbose=False)
    assert not any("It may be noise" in hint for hint in report.hints) and len(report.hints) > 0


def test_a_reward_that_never_changes():
    report = check_prior_model(KnowsNothing(), Cart(), n_samples=200, verbose=False)
    assert report.reward_verdict == "constant"
    assert "the predicted reward is 0 everywhere, the actual one is not." in report.hints


def test_in_place_changes_are_named():
    class InPlace(CartModel):
        def transition(self, states, actions):
            factor = states.exp()
            factor += 1
            return super().transition(states, actions) + 0 * factor

    with pytest.raises(ValueError, match=r"InPlace.transition cannot be differentiated.*write `x = x \+ 1`"):
        check_prior_model(InPlace(), Cart(), n_samples=200, verbose=False)


def test_rms_error_of_no_change():
    """The relative error of the model that predicts no change is one, by definition."""
    report = check_prior_model(KnowsNothing(), Cart(), n_samples=400, verbose=False)
    np.testing.assert_allclose(report.relative_errors, 1.0)
    assert all("worse than no change" in verdict for verdict in report.verdicts)


def test_missing_terminal():
    class NeverTerminal(CartModel):
        def terminal(self, states):
            return PriorModel.terminal(self, states)

    n_missed, n_false = check_prior_model(NeverTerminal(), Cart(), n_samples=400, verbose=False).terminal_errors
    assert n_missed > 0 and n_false == 0


class ImageCart(gym.ObservationWrapper):
    """The same cart, with observations of another shape."""

    observation_space = spaces.Box(-np.inf, np.inf, (2, 1), np.float64)

    def observation(self, observation):
        return observation.reshape(2, 1).astype(np.float64)


class ImageCartModel(CartModel):
    def observation(self, states):
        return states.unsqueeze(2)

    def state_from_observation(self, observations):
        return observations.flatten(1)


def test_observations_of_more_dimensions():
    env = ImageCart(Cart())
    with pytest.raises(ValueError, match=r"flatten\(1\)"):
        check_prior_model(CartModel(), env)
    assert check_prior_model(ImageCartModel(), env, n_samples=200, verbose=False).supported_horizon == 25


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
