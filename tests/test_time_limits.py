"""Time limits that environments report as terminations."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from cart import Cart, CartModel
from gymnasium import spaces

from sb3_mpg import PriorModel, check_prior_model
from sb3_mpg.common.models.terminations import looks_like_time_limit, steps_of_episodes


@pytest.mark.parametrize(
    "lengths, limit",
    [
        ([59] * 3, 59),
        # Real terminations among them
        ([12, 59, 59, 31, 59, 4], 59),
        # One that ends just before the limit is possible
        ([59] * 10 + [57], 59),
        ([500] * 2, 500),
        ([5] * 7, 5),
        # Too few to tell, the fewer the shorter they are
        ([], None),
        ([59], None),
        ([59, 59], None),
        ([5] * 4, None),
        # A falling pole: few lengths, many of them equal
        ([3, 4] * 20, None),
        ([3, 4, 4, 4, 4, 4, 5, 4, 4], None),
        ([41, 59, 59, 59, 52, 48], None),
    ],
)
def test_looks_like_time_limit(lengths, limit):
    assert looks_like_time_limit(lengths) == limit
    assert looks_like_time_limit(np.array(lengths, dtype=np.int32)) == limit


def test_random_walks_to_a_border_have_no_time_limit():
    """Lengths of episodes that end where a random walk leaves an interval."""
    rng = np.random.default_rng(0)
    for border in (2.0, 5.0, 10.0):
        paths = np.abs(rng.normal(size=(50, 40, 1000)).cumsum(axis=2)) > border
        lengths = paths.argmax(axis=2) + 1
        found = [looks_like_time_limit(group) for group in lengths]
        assert sum(limit is not None for limit in found) <= 1


def test_steps_of_episodes():
    ends = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], dtype=bool).T
    np.testing.assert_array_equal(steps_of_episodes(ends).T, [[1, 2, 1, 2, 3, 1], [1, 2, 3, 4, 5, 6]])


class Limited(gym.Wrapper):
    """The cart that does not terminate far away, but after a number of steps."""

    def __init__(self, limit, far_away=np.inf):
        super().__init__(Cart())
        self.limit, self.far_away = limit, far_away

    def step(self, action):
        observation, reward, *_ = super().step(action)
        is_over = self.unwrapped.n_steps >= self.limit or abs(observation[0]) > self.far_away
        return observation, reward, is_over, False, {}


class Endless(CartModel):
    def terminal(self, states):
        return PriorModel.terminal(self, states)


def hint_on_ends(env, model, **kwargs):
    hints = check_prior_model(model, env, n_samples=400, verbose=False, **kwargs).hints
    return next((hint for hint in hints if "`terminal`" in hint), None)


class TestChecker:
    """Kinds of ends, for a model that predicts none of them."""

    def test_a_time_limit_is_named(self):
        hint = hint_on_ends(Limited(20), Endless())
        assert "20 of 20 recorded terminations come after 20 steps" in hint
        assert "must return terminated=False and truncated=True" in hint and "gymnasium.wrappers.TimeLimit" in hint
        assert "must be true in the states" not in hint

    def test_beside_real_ends_that_the_model_knows(self):
        hint = hint_on_ends(Limited(15, far_away=1.5), CartModel())
        n_limits, n_ends = (int(word) for word in hint.split()[:3:2])
        assert 5 < n_limits < n_ends and "come after 15 steps of an episode" in hint

    def test_ends_that_depend_on_the_state(self):
        hint = hint_on_ends(Limited(1000, far_away=1.5), Endless())
        assert "it must be true in the states" in hint and "truncated" not in hint

    def test_too_few_to_tell(self):
        hint = hint_on_ends(Limited(30), Endless(), horizon=100)
        assert "come after 30 steps" in hint
        env = Limited(90)
        hints = check_prior_model(Endless(), env, n_samples=100, horizon=100, verbose=False).hints
        assert any("If this is a time limit" in hint for hint in hints)

    def test_a_clock_in_the_observation_is_a_state(self):
        class Clock(gym.ObservationWrapper):
            observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

            def observation(self, observation):
                return np.append(observation, self.unwrapped.n_steps).astype(np.float32)

        class KnowsTheTime(CartModel):
            def transition(self, states, actions):
                return th.cat([super().transition(states[:, :2], actions), states[:, 2:] + 1], dim=1)

            def terminal(self, states):
                return states[:, 2:] > 19.5

        assert hint_on_ends(Clock(Limited(20)), KnowsTheTime()) is None
