"""Exploration noise on actions."""

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, VectorizedActionNoise


def choose_action_noise(
    action_noise: ActionNoise | None, own_std: float | None, std: float, action_space: spaces.Box
) -> tuple[ActionNoise | None, float | None]:
    """
    Create the Gaussian noise of ``exploration_noise``, unless the user passed an action noise.

    :param action_noise: noise of the algorithm; after loading it may be one that this function created
    :param own_std: standard deviation of the noise that this function created, ``None`` if there is none
    :param std: requested standard deviation, in [-1, 1] units
    :param action_space: action space of the algorithm
    :return: the noise, and its standard deviation if this function created it
    """

    def gaussian(std: float) -> NormalActionNoise:
        return NormalActionNoise(np.zeros(action_space.shape), std * np.ones(action_space.shape))

    if own_std is not None and own_std != std:
        # `load` got another standard deviation, and perhaps a noise as well
        base = action_noise.base_noise if isinstance(action_noise, VectorizedActionNoise) else action_noise
        if repr(base) == repr(gaussian(own_std)):
            action_noise = None
        own_std = None
    if action_noise is None and std > 0:
        return gaussian(std), std
    return action_noise, own_std


def for_n_envs(action_noise: ActionNoise | None, n_envs: int) -> ActionNoise | None:
    """
    :param action_noise: noise of an algorithm, which may have been loaded with another number of environments
    :param n_envs: number of environments
    :return: the noise for so many environments
    """
    if isinstance(action_noise, VectorizedActionNoise) and action_noise.n_envs != n_envs:
        return VectorizedActionNoise(action_noise.base_noise, n_envs)
    return action_noise
