"""Reward, limits and start distribution of the inverted pendulum task. Its equations are tested in test_env_models.py."""

import numpy as np
import pytest

from sb3_mpg_envs.inverted_pendulum import InvertedPendulumContiEnv, InvertedPendulumSimulator


def test_reward_by_hand():
    env = InvertedPendulumContiEnv()
    env.reset(options={"state": np.array([0.5, 0.1, -0.2, 0.3])})
    x, theta, velocity, angular_velocity = (float(value) for value in env.step(np.array([1 / 3]))[0])
    # The reward is that of the state after the step
    expected = -(0.01 * x**2 + theta**2 + 0.1 * velocity**2 + 0.1 * angular_velocity**2)
    env.reset(options={"state": np.array([0.5, 0.1, -0.2, 0.3])})
    assert env.step(np.array([1 / 3]))[1] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("index, value, is_outside", [(0, 1.99, False), (0, -2.0, True), (1, -0.19, False), (1, 0.21, True)])
def test_pendulum_early_reset_limits(index, value, is_outside):
    state = np.zeros((4, 1))
    state[index] = value
    assert InvertedPendulumSimulator(1)._is_outside(state).tolist() == [is_outside]


def test_pendulum_start_distribution():
    simulator = InvertedPendulumSimulator(4000)
    simulator.seed(0)
    observations = simulator.reset()
    assert np.all(np.abs(observations) <= 0.01)
    assert np.allclose(observations.std(axis=0), 0.01 / np.sqrt(3), rtol=0.05)
