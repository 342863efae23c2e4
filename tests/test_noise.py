"""Exploration noise: the algorithm's own, and the user's."""

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise

from sb3_mpg.common.noise import choose_action_noise

ACTIONS = spaces.Box(-3, 3, (2,), np.float32)


def test_gaussian_noise_of_the_given_size():
    noise, own_std = choose_action_noise(None, None, 0.5, ACTIONS)
    assert isinstance(noise, NormalActionNoise) and own_std == 0.5
    samples = np.stack([noise() for _ in range(2000)])
    assert samples.shape == (2000, 2)
    np.testing.assert_allclose(samples.mean(axis=0), 0, atol=0.05)
    np.testing.assert_allclose(samples.std(axis=0), 0.5, rtol=0.05)


def test_no_noise():
    assert choose_action_noise(None, None, 0.0, ACTIONS) == (None, None)


def test_a_noise_of_the_user_stays():
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2))
    assert choose_action_noise(noise, None, 0.5, ACTIONS) == (noise, None)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_after_loading(n_envs):
    """An own noise follows the standard deviation that ``load`` is given; SB3 repeats it for each environment."""
    own, own_std = choose_action_noise(None, None, 0.5, ACTIONS)
    saved = own if n_envs == 1 else VectorizedActionNoise(own, n_envs)
    # The same standard deviation: nothing changes
    assert choose_action_noise(saved, own_std, 0.5, ACTIONS) == (saved, 0.5)
    changed, changed_std = choose_action_noise(saved, own_std, 0.7, ACTIONS)
    assert isinstance(changed, NormalActionNoise) and changed_std == 0.7
    np.testing.assert_allclose(changed._sigma, 0.7)
    assert choose_action_noise(saved, own_std, 0.0, ACTIONS) == (None, None)
    # A noise that ``load`` is given, too, is the user's from then on
    correlated = OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2))
    assert choose_action_noise(correlated, own_std, 0.7, ACTIONS) == (correlated, None)
