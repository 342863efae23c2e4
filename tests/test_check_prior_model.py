"""The checker: what it accepts, what it rejects, and what it leaves as it was."""

import random

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from cart import ACTION_SPACE, MASS, OBSERVATION_SPACE, TIME_STEP, Cart, CartModel
from goals import GoalEnv
from gymnasium import spaces
from models import KnowsNothing
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, PriorModel, check_prior_model
from sb3_mpg.common.models.checking.checker import validate_prior_model


class NoisyModel(CartModel):
    """Noise while training only, and a layer whose mode must come back."""

    def __init__(self):
        super().__init__()
        self.dropout = th.nn.Dropout(0.5)
        self.layer = th.nn.Linear(1, 1)

    def transition(self, states, actions):
        noise = 0.1 * th.randn_like(states) if self.training else 0.0
        return super().transition(states, actions) + self.dropout(th.zeros_like(states)) + noise


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


class TakesKeys(CartModel):
    def transition(self, states, actions):
        return super().transition(th.cat([states["position"], states["velocity"]], dim=1), actions)


class ReturnsKeys(CartModel):
    def transition(self, states, actions):
        position, velocity = super().transition(states, actions).split(1, dim=1)
        return {"position": position, "velocity": velocity}


INTERFACE_ERRORS = [
    (FlatReward, ValueError, r"FlatReward\.reward returned shape \(64,\), expected \(64, 1\).*keepdim=True"),
    (ScalarReward, ValueError, r"returned shape \(\), expected \(64, 1\)"),
    (DoubleReward, ValueError, "returned torch.float64 for torch.float32 arguments.*`.double"),
    (OtherDevice, ValueError, "on device meta for arguments on cpu"),
    (DetachedTransition, ValueError, "not differentiable with respect to states.*detach"),
    (DetachedActions, ValueError, "not differentiable with respect to actions.*detach"),
    (NumpyTransition, ValueError, "transition failed.*numpy.*stay in torch"),
    (NumpyReward, TypeError, "returned ndarray, expected a torch.Tensor.*NumPy"),
    (NotFinite, ValueError, r"not finite in next_state\[1\].*divisions"),
    (RootAtZero, ValueError, "gradients with respect to actions that are not finite"),
    (OneStateTooMany, ValueError, r"transition returned shape \(64, 3\), expected \(64, 2\)"),
    (WrongObservation, ValueError, "observation returned shape.*inverse"),
    (FlatState, ValueError, r"state_from_observation returned shape \(64,\).*\(B, S\)"),
    (NumberTerminal, ValueError, "terminal returned torch.float32.*expected torch.bool.*comparison"),
    (InPlace, ValueError, "modifies its argument states in place"),
    (Failing, ValueError, r"transition failed for states \(64, 2\), actions \(64, 1\)"),
    (TakesKeys, ValueError, r"transition failed.*also that of a Dict: one key after the other"),
    (ReturnsKeys, TypeError, r"returned dict, expected a torch.Tensor: put the parts into one tensor"),
    (DetachedStep, ValueError, r"DetachedStep\.step is not differentiable: its next states carry no gradient"),
    (FlatStep, ValueError, r"FlatStep\.step returned rewards \(64,\) .*expected \(64, 1\)"),
    (OtherStep, ValueError, "OtherStep.step returned other next states than expected"),
    (LonelyStep, TypeError, "LonelyStep.step returned Tensor, expected two tensors"),
    (DeniesTheEnd, ValueError, "terminal while `may_terminate` is False"),
    (FlatDifference, ValueError, r"state_difference returned shape \(64,\), expected \(64, 2\)"),
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


@pytest.mark.parametrize(
    "model_class, message",
    [
        (Single, "returned torch.float32 for torch.float64 arguments"),
        (RowsSeeEachOther, "rows must not see each other"),
        (HiddenState, "hidden state"),
        (AlwaysRandom, "random in evaluation mode.*if self.training"),
        (PartlyDetached, r"wrong gradient: d next_state\[1\] / d action\[0\] is 0.025 by.*expected 0.05 from"),
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
    for env_id, message in (
        ("FrozenLake-v1", "observations, which must be a Box"),
        ("CartPole-v1", "actions, which must be a Box"),
    ):
        with pytest.raises(ValueError, match=message):
            check_prior_model(CartModel(), env_id)
    with pytest.raises(TypeError, match="Expected a Gymnasium environment, its id or a VecEnv"):
        check_prior_model(CartModel(), 3)


def test_kinks_and_jumps_are_allowed():
    class Kinks(CartModel):
        def reward(self, states, actions, next_states):
            return -(actions - actions).abs() - states[:, :1].abs() + th.floor(actions)

    report = check_prior_model(Kinks(), Cart(), n_samples=50, verbose=False)
    assert report.verdicts == ("good", "good")


class PenalisesTheEnd(CartModel):
    def reward(self, states, actions, next_states):
        return super().reward(states, actions, next_states) - 10.0 * self.terminal(next_states)


class DetachedAndPenalisesTheEnd(PenalisesTheEnd):
    def reward(self, states, actions, next_states):
        return super().reward(states, actions, next_states) - next_states[:, 1:].detach() ** 2


def test_terminal_states_may_be_penalised():
    validate_prior_model(PenalisesTheEnd(), OBSERVATION_SPACE, ACTION_SPACE, "cpu")
    report = check_prior_model(PenalisesTheEnd(), Cart(), n_samples=50, verbose=False)
    assert report.terminal_errors == (0, 0)
    with pytest.raises(ValueError, match="not differentiable with respect to next_states"):
        validate_prior_model(DetachedAndPenalisesTheEnd(), OBSERVATION_SPACE, ACTION_SPACE, "cpu")


@pytest.mark.parametrize("env_id", ["PathTracking-v0", "InvertedPendulumConti-v0"])
def test_the_models_of_environments_that_terminate_can_be_learned_with(env_id):
    env = gym.make(env_id, early_reset_terminates=True)
    report = check_prior_model(env.unwrapped.prior_model(), env, n_samples=200, verbose=False)
    assert report.reward_verdict == "good" and report.terminal_errors == (0, 0)
    MPG("MlpPolicy", env)


def test_some_impossible_observations_are_allowed():
    """The cheap check invents observations, and some may be outside of the model's domain."""

    class Tank(CartModel):
        def transition(self, states, actions):
            return super().transition(states, actions) - th.sqrt(states[:, :1])

    validate_prior_model(Tank(), OBSERVATION_SPACE, ACTION_SPACE, "cpu")


def test_in_place_changes_are_named():
    class InPlace(CartModel):
        def transition(self, states, actions):
            factor = states.exp()
            factor += 1
            return super().transition(states, actions) + 0 * factor

    with pytest.raises(ValueError, match=r"InPlace.transition cannot be differentiated.*write `x = x \+ 1`"):
        check_prior_model(InPlace(), Cart(), n_samples=200, verbose=False)


NAMES = {
    "goal": ("achieved_goal[0]", "desired_goal[0]", "observation[0]", "observation[1]"),
    "tuple": ("0[0]", "1[0]", "2[0]", "2[1]"),
    "table": ("observation[0, 0]", "observation[0, 1]", "observation[1, 0]", "observation[1, 1]"),
    "flat": ("observation[0]", "observation[1]", "observation[2]", "observation[3]"),
}


class TestSpaces:
    """Models take flat observations and actions, and the report names their elements."""

    @pytest.mark.parametrize("kind", NAMES)
    def test_the_space_changes_nothing_but_names(self, kind):
        model = GoalEnv().prior_model()
        flat, report = (check_prior_model(model, GoalEnv(each), n_samples=200, verbose=False) for each in ("flat", kind))
        assert report.dimensions == NAMES[kind]
        assert report.verdicts == ("good",) * 4 and report.reward_verdict == "good"
        np.testing.assert_array_equal(report.rms_errors, flat.rms_errors)

    def test_hints_name_keys(self):
        class Fixed(PriorModel):
            def transition(self, states, actions):
                return states

            def reward(self, states, actions, next_states):
                return -(next_states[:, :1] - next_states[:, 1:2]).abs()

        report = check_prior_model(Fixed(), GoalEnv(), n_samples=200, verbose=False)
        assert "the effect of action 0 on observation[1] is missing" in report.hints[0]
        assert "the model does not move achieved_goal[0] and observation[0]" in report.hints[1]
        assert "achieved_goal[0]" in str(report)

    def test_vectorized_environments(self):
        for kind in ("goal", "tuple"):
            env = DummyVecEnv([lambda kind=kind: GoalEnv(kind)] * 3)
            report = check_prior_model(GoalEnv().prior_model(), env, n_samples=200, verbose=False)
            assert report.dimensions == NAMES[kind] and report.n_windows[0] == 201

    def test_actions_of_more_dimensions(self):
        env = GoalEnv(action_space=spaces.Box(np.float32([[0.5, -2.0]]), np.float32([[0.5, 1.0]])))
        report = check_prior_model(GoalEnv().prior_model(), env, n_samples=200, verbose=False)
        assert report.verdicts == ("good",) * 4
        assert report.action_gains.shape == (2, 4) and report.action_gains[1, 3] == pytest.approx(1.0, abs=1e-3)

    def test_integers(self):
        """The position in whole centimetres: what rounding takes is no mistake of the model."""

        class Centimetres(gym.ObservationWrapper):
            observation_space = spaces.Box(-1000, 1000, (2,), np.int32)

            def observation(self, observation):
                return np.round(100 * observation).astype(np.int32)

        class Model(CartModel):
            def transition(self, states, actions):
                return 100 * super().transition(states / 100, actions)

            def reward(self, states, actions, next_states):
                return super().reward(states / 100, actions, next_states)

            def terminal(self, states):
                return super().terminal(states / 100)

        report = check_prior_model(Model(), Centimetres(Cart()), n_samples=400, verbose=False)
        assert report.rms_errors[0].max() < 1 and report.supported_horizon == 25 and report.reward_verdict == "good"

    @pytest.mark.parametrize(
        ("space", "message"),
        [
            ({"observation_space": spaces.Box(0, 255, (8, 8, 3), np.uint8)}, "images are not supported"),
            ({"observation_space": spaces.Dict({"a": spaces.Discrete(3)})}, r"Box of numbers.*Discrete\(3\) at 'a'"),
            ({"action_space": spaces.Box(-np.inf, np.inf, (1,))}, "must be finite"),
        ],
    )
    def test_what_is_refused(self, space, message):
        env = Cart()
        for name, value in space.items():
            setattr(env, name, value)
        with pytest.raises(ValueError, match=message):
            check_prior_model(CartModel(), env)
