"""Checks of arguments: what they refuse or warn of, and what they let pass."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from lq import LinearEnv
from settings import SMALL
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_mpg import MPG
from sb3_mpg.common import checks
from sb3_mpg.common.checks import (
    check_count,
    check_keywords,
    check_number,
    check_share,
    is_whole,
    warn_of_record,
    warn_of_tiny_rewards,
    warn_of_wrappers,
)


@pytest.mark.parametrize("count", [True, 2.0, 1.5, -1, 1, "2", None, float("nan")])
def test_counts_are_whole_numbers(count):
    with pytest.raises(ValueError, match="`n` must be a whole number, 2 or more, got"):
        check_count("n", count, 2)


def test_counts_of_numpy_are_counts():
    check_count("n", 2, 2)
    check_count("n", np.int64(3), 2)


@pytest.mark.parametrize(
    ("number", "expected"), [(2, True), (2.0, True), (np.float32(2), True), (2.5, False), (True, False), ("2", False)]
)
def test_whole_numbers(number, expected):
    assert is_whole(number) == expected


@pytest.mark.parametrize("number", [True, "2", None, float("nan"), float("inf"), 0.5])
def test_numbers_are_finite_and_not_too_small(number):
    with pytest.raises(ValueError, match=r"`n` must be a number, 1.0 or more, got"):
        check_number("n", number, 1.0)


def test_the_lowest_number_may_be_excluded():
    check_number("n", 1, 1.0)
    with pytest.raises(ValueError, match=r"`n` must be a number, more than 1.0, got 1"):
        check_number("n", 1, 1.0, includes_low=False)
    check_number("n", np.float32(1.5), 1.0, includes_low=False)


def test_shares_lie_between_0_and_1():
    for share in (0, 0.5, 1.0):
        check_share("s", share)
    with pytest.raises(ValueError, match=r"`s` must lie between 0 and 1, got 1.5"):
        check_share("s", 1.5)
    with pytest.raises(ValueError, match=r"`s` must be a number, 0.0 or more, got -0.5"):
        check_share("s", -0.5)


def test_keywords_are_those_of_a_function():
    def function(taken, first, second=2):
        pass

    assert check_keywords("kwargs", None, function, "taken") == {}
    assert check_keywords("kwargs", {"second": 3}, function, "taken") == {"second": 3}
    with pytest.raises(ValueError, match=r"`kwargs` got \['third', 'taken'\], expected some of \['first', 'second'\]"):
        check_keywords("kwargs", {"third": 3, "second": 2, "taken": 1}, function, "taken")


FINITE, NAN, INF = np.zeros((1, 2)), np.array([[0.0, np.nan]]), np.array([[np.inf, 0.0]])


@pytest.mark.parametrize(
    ("infos", "given"),
    [
        ([{}], (NAN, np.ones(1))),
        ([{}], (FINITE, np.array([np.inf]))),
        ([{}], ({"a": FINITE, "b": INF}, np.ones(1))),
        ([{}, {"terminal_observation": NAN[0]}], (FINITE, np.ones(1))),
        ([{"terminal_observation": {"a": FINITE[0], "b": INF[0]}}], ({"a": FINITE, "b": FINITE}, np.ones(1))),
    ],
)
def test_records_that_are_not_finite_are_reported(infos, given):
    with pytest.warns(UserWarning, match=r"not finite \(step 3\)"):
        assert warn_of_record(3, infos, None, *given)


def test_finite_records_are_not_reported():
    # Warnings are errors in tests
    assert not warn_of_record(3, [{}], None, FINITE, np.ones(2))
    infos = [{"terminal_observation": {"a": FINITE[0]}}, {"terminal_observation": None}]
    assert not warn_of_record(3, infos, None, {"a": FINITE, "b": np.array([[1, 2]], np.uint8)}, np.ones(1))


class EndsInNaN(LinearEnv):
    """Episodes of five steps: the last observation of the second one is not a number, or so is the first of all."""

    def __init__(self, value=np.nan, is_first=False):
        super().__init__()
        self.value, self.is_first = value, is_first
        self.n_resets = self.n_steps = 0

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        self.n_resets, self.n_steps = self.n_resets + 1, 0
        is_odd = self.is_first and self.n_resets == 1
        return np.full_like(observation, self.value) if is_odd else observation, info

    def step(self, action):
        observation, reward, *_ = super().step(action)
        self.n_steps += 1
        is_odd = not self.is_first and self.n_resets == 2 and self.n_steps == 5
        return np.full_like(observation, self.value) if is_odd else observation, reward, False, self.n_steps == 5, {}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("is_first", [False, True])
def test_the_first_and_the_last_observation_of_an_episode_count(value, is_first):
    model = MPG("MlpPolicy", EndsInNaN(value, is_first), **{**SMALL, "learning_starts": 100})
    with pytest.warns(UserWarning, match=r"gave an observation or a reward that is not finite \(step"):
        model.learn(12)
    assert model.training_state.has_warned_of_records


def test_what_vec_normalize_clips_counts():
    """It hides infinite values from the networks, but not from what is recorded."""
    env = VecNormalize(DummyVecEnv([lambda: EndsInNaN(np.inf, is_first=True)]), training=False)
    model = MPG("MlpPolicy", env, **{**SMALL, "learning_starts": 100})
    assert np.isfinite(env.reset()).all() and np.isinf(env.get_original_obs()).all()
    env.envs[0].n_resets = 0
    with pytest.warns(UserWarning, match="not finite"):
        model.learn(2)


def test_wrappers_are_reported_to_those_who_do_not_know_them():
    wrapped = DummyVecEnv([lambda: gym.wrappers.TransformReward(LinearEnv(), lambda reward: 2 * reward)])
    with pytest.warns(UserWarning, match="but prior_model='auto' and SimulatorTarget speaks the units"):
        warn_of_wrappers(wrapped, ["prior_model='auto'", "SimulatorTarget"])
    # Nobody is concerned, or no wrapper changes units
    warn_of_wrappers(wrapped, [])
    warn_of_wrappers(DummyVecEnv([lambda: gym.wrappers.TimeLimit(LinearEnv(), 5)]), ["prior_model='auto'"])


class Halves(VecEnvWrapper):
    """Changes rewards."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, rewards / 2, dones, infos


class Named(VecMonitor):
    """Changes nothing."""

    name = "mine"


class Doubles(VecMonitor):
    """Changes actions."""

    def step_async(self, actions):
        super().step_async(2 * actions)


def test_wrappers_of_vectorized_environments_are_reported_unless_they_are_known():
    def env():
        return DummyVecEnv([LinearEnv])

    for wrapped in (VecCheckNan(VecNormalize(Named(env()))), VecMonitor(env()), env()):
        warn_of_wrappers(wrapped, ["prior_model='auto'"])
    for wrapped in (Halves(env()), VecNormalize(Halves(VecMonitor(env()))), Doubles(env()), VecFrameStack(env(), 2)):
        with pytest.warns(UserWarning, match=r"(Halves|Doubles|VecFrameStack) may change the actions.*but prior_model='auto'"):
            warn_of_wrappers(wrapped, ["prior_model='auto'"])
        warn_of_wrappers(wrapped, [])
    with pytest.warns(UserWarning, match="Halves may change"):
        MPG("MlpPolicy", Halves(env()), **SMALL)
    MPG("MlpPolicy", Halves(env()), prior_model=LinearEnv().prior_model(), **SMALL)


@pytest.mark.parametrize(("size", "warns"), [(0.0, False), (1e-6, True), (1.0, False)])
def test_tiny_rewards_are_reported_with_a_better_scale(size, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_tiny_rewards(th.tensor([[size], [-size]]), reward_scale=0.5)
    assert len(caught) == warns
    assert all("`reward_scale` to about 5e+05" in str(warning.message) for warning in caught)


def test_masked_states_are_told(recwarn):
    assert not checks.warn_of_masked_states(0.0, "Car")
    assert not recwarn.list
    assert checks.warn_of_masked_states(0.1, "Car")
    (warning,) = recwarn.list
    assert "Rollouts of Car overflow" in str(warning.message)
