"""Checks of arguments: what they refuse or warn of, and what they let pass."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from lq import LinearEnv
from stable_baselines3.common.vec_env import DummyVecEnv

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


def test_records_that_are_not_finite_are_reported():
    # Warnings are errors in tests
    assert not warn_of_record(3, np.zeros((2, 3)), np.ones(2))
    for recorded in ((np.array([[0.0, np.nan]]), np.ones(1)), (np.zeros((1, 2)), np.array([np.inf]))):
        with pytest.warns(UserWarning, match=r"not finite \(step 3\)"):
            assert warn_of_record(3, *recorded)


def test_wrappers_are_reported_to_those_who_do_not_know_them():
    wrapped = DummyVecEnv([lambda: gym.wrappers.TransformReward(LinearEnv(), lambda reward: 2 * reward)])
    with pytest.warns(UserWarning, match="but prior_model='auto' and SimulatorTarget speaks the units"):
        warn_of_wrappers(wrapped, ["prior_model='auto'", "SimulatorTarget"])
    # Nobody is concerned, or no wrapper changes units
    warn_of_wrappers(wrapped, [])
    warn_of_wrappers(DummyVecEnv([lambda: gym.wrappers.TimeLimit(LinearEnv(), 5)]), ["prior_model='auto'"])


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
