"""Rewards and actions without a gradient: told from detached ones, measured over the records, and said as what they are."""

import re

import numpy as np
import pytest
import torch as th
from cart import ACTION_SPACE, OBSERVATION_SPACE, Cart, CartModel
from goals import GoalEnv, GoalModel
from gymnasium import spaces
from settings import SMALL

from sb3_mpg import MPG, check_prior_model
from sb3_mpg.common.models.checking.checker import validate_prior_model


class Paid(Cart):
    """The cart with another reward, of position, velocity and action."""

    def __init__(self, reward, terminates=True):
        self.function, self.terminates = reward, terminates

    def step(self, action):
        before = np.float32(self.state)
        observation, _, terminated, truncated, info = super().step(action)
        reward = self.function(th.as_tensor(before)[None, :1], th.as_tensor(before)[None, 1:], th.as_tensor(action)[None])
        return observation, float(reward), terminated and self.terminates, truncated, info


class PaidModel(CartModel):
    def __init__(self, reward, terminates=True):
        super().__init__()
        self.function, self.terminates = reward, terminates

    def reward(self, states, actions, next_states):
        return self.function(*states.split(1, dim=1), actions)

    def terminal(self, states):
        return super().terminal(states) & self.terminates


def check(reward, of_model=None, terminates=False):
    model, env = PaidModel(of_model or reward, terminates), Paid(reward, terminates)
    return check_prior_model(model, env, n_samples=400, verbose=False)


def is_near(x, v, a):
    return (x.abs() < 0.5).to(x.dtype)


def sparse(x, v, a):
    return is_near(x, v, a) - 1


def quadratic(x, v, a):
    return -(x**2) - 0.1 * v**2 - 0.01 * a**2


class TestSilentRewards:
    @pytest.mark.parametrize(
        ("reward", "verdict", "hint"),
        [
            (
                is_near,
                "piecewise constant",
                r"piecewise constant: its gradient is zero almost everywhere \(at all 1600 checked",
            ),
            (sparse, "piecewise constant", "so the rewards of the model add nothing to the policy gradient"),
            (lambda x, v, a: th.round(4 * x), "piecewise constant", "the reward is piecewise constant"),
            (lambda x, v, a: 0 * x - 1, "constant", "the reward is -1 at all 1600 checked steps, so"),
            (lambda x, v, a: sparse(x, v, a) - 0.1 * a**2, "flat in states", "piecewise constant in the states.*are cheap"),
            (lambda x, v, a: -0.1 * a**2, "flat in states", "depends on actions alone at all 1600.*do not reach"),
            (
                lambda x, v, a: is_near(x, v, a) - 1e-3 * x**2,
                "jumps",
                "(9.|100)% of the variation of the reward .* is in jumps",
            ),
            (
                lambda x, v, a: x.clamp(max=0.5) - 0.1 * a**2,
                r"flat at \d+%",
                "teach the policy nothing there but which actions are cheap",
            ),
            (lambda x, v, a: x * (a > 0.8), "flat at [67].%", "vanishes at [67].% of the checked steps"),
            (lambda x, v, a: (-((x / 0.02) ** 2)).exp(), "flat at 9.%", "vanishes at 9.% of the checked steps"),
        ],
    )
    def test_are_named(self, reward, verdict, hint):
        report = check(reward)
        assert re.fullmatch(f"good, {verdict}", report.reward_verdict)
        (text,) = report.hints
        assert re.search(hint, text) and "Reward something smooth" in text and "in the environment too" in text

    @pytest.mark.parametrize(
        "reward",
        [
            quadratic,
            lambda x, v, a: -x.abs() - v.abs(),
            lambda x, v, a: -th.tanh(3 * x),
            lambda x, v, a: (-((x / 0.3) ** 2)).exp() + 0.1 * th.sin(5 * v),
            lambda x, v, a: -(x**2 + v**2 + a**2).sqrt(),
            lambda x, v, a: quadratic(x, v, a) - 0.01 * is_near(x, v, a),
        ],
    )
    def test_smooth_ones_are_not(self, reward):
        assert check(reward).reward_verdict == "good" and not check(reward).hints

    def test_returns_that_differ_by_their_ends(self):
        """As of a pole that falls: the reward is 1 until then."""
        for reward in (lambda x, v, a: 0 * x + 1, is_near):
            assert "Returns differ by when episodes terminate" in check(reward, terminates=True).hints[0]
            assert "Returns differ by when" not in check(reward).hints[0]

    def test_a_penalty_for_the_end_is_no_jump(self):
        """It is learned apart, and a smooth reward stays smooth."""

        class Penalises(PaidModel):
            def reward(self, states, actions, next_states):
                return super().reward(states, actions, next_states) - 10.0 * self.terminal(next_states)

        class Penalised(Paid):
            def step(self, action):
                observation, reward, terminated, truncated, info = super().step(action)
                return observation, reward - 10.0 * terminated, terminated, truncated, info

        report = check_prior_model(Penalises(quadratic), Penalised(quadratic), n_samples=400, verbose=False)
        assert report.reward_verdict == "good" and not report.hints

    def test_a_wrong_reward_comes_before_its_gradient(self):
        """The correction changes it, and so its gradient."""
        report = check(sparse, of_model=lambda x, v, a: 5 * sparse(x, v, a))
        assert report.reward_verdict == "wrong scale, piecewise constant"
        assert "the reward is 0.2 times what the model predicts" in report.hints[0]
        assert "piecewise constant" in report.hints[1]

    @pytest.mark.parametrize("of_env", [sparse, quadratic])
    def test_a_missing_reward_is_said_once(self, of_env):
        (hint,) = check(of_env, of_model=lambda x, v, a: 0 * x).hints
        assert hint == "the predicted reward is 0 everywhere, the actual one is not: write it in `reward`."

    def test_a_constant_that_is_another_one(self):
        report = check(lambda x, v, a: 0 * x + 1, of_model=lambda x, v, a: 0 * x)
        assert report.reward_verdict == "biased, constant"


class TestNotDecidedByChance:
    """The cheap check invents observations: which of them get a reward is chance, and says nothing."""

    @pytest.mark.parametrize("width", [1e-3, 0.1, 0.5, 1.0, 3.0, 100.0])
    def test_goals_of_any_width_are_accepted(self, width):
        def reward(x, v, a):
            return (x.abs() < width).to(x.dtype)

        validate_prior_model(PaidModel(reward), OBSERVATION_SPACE, ACTION_SPACE, "cpu")

    @pytest.mark.parametrize(
        "function", [th.sin, th.abs, lambda x: 1e-2 * x, lambda x: 1 / (1 + x**2), lambda x: x**2 + 10 * (x > 0), th.relu]
    )
    @pytest.mark.parametrize("name", ["state", "action"])
    def test_detached_ones_are_not(self, function, name):
        def reward(x, v, a):
            return function(x if name == "state" else a).detach() + (a if name == "state" else x)

        with pytest.raises(ValueError, match=rf"reward is not differentiable with respect to {name}s.*detach"):
            validate_prior_model(PaidModel(reward), OBSERVATION_SPACE, ACTION_SPACE, "cpu")

    @pytest.mark.parametrize("residual", [True, False])
    def test_training_takes_sparse_rewards(self, residual):
        env, model = Paid(sparse), PaidModel(sparse)
        MPG("MlpPolicy", env, prior_model=model, horizons=(0, 2), residual=residual, compile=False, **SMALL).learn(60)

    def test_domains_of_unbounded_observations_are_found(self):
        """A temperature in kelvin, which no standard normal number is."""

        class Boiler(CartModel):
            def transition(self, states, actions):
                return super().transition(states, actions) + 0 * (states[:, :1] - 273).sqrt()

        validate_prior_model(Boiler(), OBSERVATION_SPACE, ACTION_SPACE, "cpu")

    def test_narrow_domains_are_found(self):
        """A tenth of the space."""

        class Corner(CartModel):
            def transition(self, states, actions):
                return super().transition(states, actions) + 0 * (states[:, :1] - 0.8).sqrt()

        validate_prior_model(Corner(), spaces.Box(-1, 1, (2,)), ACTION_SPACE, "cpu")


class Acts(CartModel):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def transition(self, states, actions):
        return super().transition(states, self.function(actions))


class TestSilentActions:
    @pytest.mark.parametrize(
        ("function", "where"),
        [
            (th.sign, "everywhere"),
            (lambda a: th.where(a > 0, 1.0, -1.0).to(a.dtype), "everywhere"),
            (lambda a: a.clamp(-1, 1), "at [45].% of the recorded steps"),
        ],
        ids=["sign", "comparison", "clamp"],
    )
    def test_are_named(self, function, where):
        report = check_prior_model(Acts(function), Cart(), n_samples=400, verbose=False)
        said = [hint for hint in report.hints if "action 0 moves states in the model, but the gradient" in hint]
        assert len(said) == 1 and re.search(f"is zero {where}, and", said[0])
        assert where != "everywhere" or said[0] == report.hints[0]

    def test_training_takes_them(self):
        model = Acts(lambda a: th.where(a > 0, 1.0, -1.0))
        MPG("MlpPolicy", Cart(), prior_model=model, horizons=(0, 2), residual=False, compile=False, **SMALL).learn(60)

    @pytest.mark.parametrize("function", [lambda a: a, lambda a: 0 * a, lambda a: a**3])
    def test_others_are_not(self, function):
        report = check_prior_model(Acts(function), Cart(), n_samples=400, verbose=False)
        assert not any("moves states in the model, but" in hint for hint in report.hints)

    def test_opposite_effects_do_not_cancel(self):
        class Sways(CartModel):
            def transition(self, states, actions):
                return super().transition(states, actions) + th.cat([-0.05 * actions, 0 * actions], dim=1)

        report = check_prior_model(Sways(), Cart(), n_samples=400, verbose=False)
        assert not any("but the gradient" in hint for hint in report.hints)


class TestNotFinite:
    def test_predictions_at_some_states(self):
        """Training masks these states, so it is a finding."""

        class Tank(CartModel):
            def transition(self, states, actions):
                return super().transition(states, actions) + 0 * states[:, :1].sqrt()

        report = check_prior_model(Tank(), Cart(), n_samples=400, verbose=False)
        assert report.verdicts == ("not finite", "not finite") and np.isinf(report.rms_errors[0]).all()
        assert re.match(
            r"predictions of observation\[0\] and observation\[1\] are not finite one step after [3-7]", report.hints[0]
        )

    def test_rewards_at_some_states(self):
        report = check(quadratic, of_model=lambda x, v, a: quadratic(x, v, a) + 0 * (x + 1).log())
        assert report.reward_verdict == "not finite"
        assert report.hints[0].startswith("the reward is not finite at ")

    @pytest.mark.parametrize("method", ["reward", "transition"])
    def test_gradients_at_some_states(self, method):
        """The root of a square at zero, where episodes start."""

        class Starts(Paid):
            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                self.state[1] = 0.0
                return self.state.astype(np.float32), {}

        class Roots(PaidModel):
            def transition(self, states, actions):
                roots = (states[:, 1:] ** 2).sqrt() if method == "transition" else 0.0
                return super().transition(states, actions) + 0 * roots

        def reward(x, v, a):
            return -(v**2).sqrt() if method == "reward" else quadratic(x, v, a)

        report = check_prior_model(Roots(reward), Starts(reward), n_samples=400, verbose=False)
        (hint,) = report.hints
        assert re.match(rf"the gradient of `{method}` is not finite at [2-5]\S*% of the checked steps", hint)
        assert report.reward_verdict == ("good, gradient not finite" if method == "reward" else "good")

    @pytest.mark.parametrize(("every", "is_too_often"), [(50, False), (2, True)])
    def test_the_environment(self, every, is_too_often):
        """Training records such steps; a check leaves them out."""

        class Fails(Cart):
            n_total = 0

            def step(self, action):
                observation, *rest = super().step(action)
                self.n_total += 1
                return (observation * np.float32(np.nan) if self.n_total % every == 0 else observation), *rest

        if is_too_often:
            with pytest.raises(
                ValueError, match=r"Too few steps were recorded.*400 of 400 recorded windows are left out.*check_env"
            ):
                check_prior_model(CartModel(), Fails(), n_samples=400)
        else:
            report = check_prior_model(CartModel(), Fails(), n_samples=400, horizon=2, verbose=False)
            assert report.verdicts == ("good", "good")
            assert re.search(r"2[0-4] of 400 recorded windows are left out", report.hints[0])


def test_goals_that_are_reached_or_not():
    """A reward of 0 at the goal and -1 elsewhere, along a dictionary of observations."""

    class Sparse(GoalModel):
        def reward(self, states, actions, next_states):
            return -((next_states[:, :1] - next_states[:, 1:2]).abs() > 0.1).to(states.dtype)

    report = check_prior_model(Sparse(), GoalEnv(is_sparse=True), n_samples=400, verbose=False)
    assert report.dimensions == ("achieved_goal[0]", "desired_goal[0]", "observation[0]", "observation[1]")
    assert report.verdicts == ("good",) * 4 and report.reward_verdict == "good, piecewise constant"
