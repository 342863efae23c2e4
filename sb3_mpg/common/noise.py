"""Exploration noise on actions."""

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, VectorizedActionNoise


def choose_action_noise(
    action_noise: ActionNoise | None, own_std: float | None, std: float, action_space: spaces.Box
) -> tuple[ActionNoise | None, float | None]:
    """
    Make the Gaussian noise of ``exploration_noise``, unless the user gave another noise.

    :param action_noise: of the algorithm; after loading it may be one that was made here
    :param own_std: standard deviation of the noise that was made here, ``None`` if there is none
    :param std: standard deviation that is asked for, in [-1, 1] units
    :param action_space: of the algorithm
    :return: the noise, and its standard deviation if it was made here
    """

    def gaussian(std: float) -> NormalActionNoise:
        n_actions = action_space.shape[0]
        return NormalActionNoise(np.zeros(n_actions), std * np.ones(n_actions))

    if own_std is not None and own_std != std:
        # Another standard deviation was given to `load`, perhaps together with a noise
        base = action_noise.base_noise if isinstance(action_noise, VectorizedActionNoise) else action_noise
        if repr(base) == repr(gaussian(own_std)):
            action_noise = None
        own_std = None
    if action_noise is None and std > 0:
        return gaussian(std), std
    return action_noise, own_std
