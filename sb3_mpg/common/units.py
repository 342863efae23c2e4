"""
Conversions between the units of the environment, which models and replay buffers use, and those of the networks.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mpg.common.spaces import FlatObservations


@dataclass(frozen=True)
class Units:
    """
    Differentiable conversions between the environment and the networks.

    The networks take observations that are normalised if the environment is a ``VecNormalize``, and actions in [-1, 1].
    The value functions sum rewards that are divided by the standard deviation of ``VecNormalize`` and multiplied by
    ``reward_scale``. The statistics of ``VecNormalize`` are those at the creation of the object.

    :param action_centre: centre of the action range of the environment, ``(A,)``; ``None`` if the range is [-1, 1] already
    :param action_half_range: half of the width of that range, ``(A,)``
    :param reward_scale: factor of all rewards
    :param observation_mean: mean of the observations, ``(O,)``, or ``None`` without normalisation
    :param observation_std: standard deviation of the observations, ``(O,)``
    :param is_normalized: which elements of the observations are normalised, bool ``(O,)``; ``None`` for all
    :param clip_observation: largest absolute value of a normalised observation
    :param reward_std: divisor of the rewards, a scalar tensor, or ``None`` without normalisation
    :param clip_reward: largest absolute value of a normalised reward
    """

    action_centre: th.Tensor | None = None
    action_half_range: th.Tensor | None = None
    reward_scale: float = 1.0
    observation_mean: th.Tensor | None = None
    observation_std: th.Tensor | None = None
    is_normalized: th.Tensor | None = None
    clip_observation: float = float("inf")
    reward_std: th.Tensor | None = None
    clip_reward: float = float("inf")

    @classmethod
    def of(
        cls, action_space: spaces.Box, device: th.device | str, reward_scale: float = 1.0, env: VecNormalize | None = None
    ) -> "Units":
        """
        :param action_space: the action space of the environment, of any shape
        :param device: device of the networks
        :param reward_scale: factor of all rewards
        :param env: the ``VecNormalize`` around the environment, if any
        :return: the conversions, with the current statistics of ``env``
        """

        def to_tensor(array: np.ndarray) -> th.Tensor:
            return th.as_tensor(array, dtype=th.float32, device=device)

        units = cls(reward_scale=reward_scale)
        low, high = (bound.astype(np.float64).reshape(-1) for bound in (action_space.low, action_space.high))
        if (low != -1).any() or (high != 1).any():
            units = replace(
                units, action_centre=to_tensor(0.5 * (low + high)), action_half_range=to_tensor(0.5 * (high - low))
            )
        if env is not None and env.norm_obs:
            flat = FlatObservations(env.observation_space)
            mean, std, is_normalized = flat.normalization(env)
            units = replace(
                units,
                observation_mean=to_tensor(mean),
                observation_std=to_tensor(std),
                is_normalized=None if is_normalized.all() else th.as_tensor(is_normalized, device=device),
                clip_observation=float(env.clip_obs),
            )
        if env is not None and env.norm_reward:
            reward_std = to_tensor(np.sqrt(env.ret_rms.var + env.epsilon))
            units = replace(units, reward_std=reward_std, clip_reward=float(env.clip_reward))
        return units

    def statistics(self) -> list[th.Tensor]:
        """
        :return: the tensors that change during training: the statistics of ``VecNormalize`` that are used
        """
        statistics = (self.observation_mean, self.observation_std, self.reward_std)
        return [tensor for tensor in statistics if tensor is not None]

    def scalars(self) -> dict[str, float]:
        """
        :return: the settings that are numbers; a callback may change them
        """
        return {name: getattr(self, name) for name in ("reward_scale", "clip_observation", "clip_reward")}

    def with_scalars(self, scalars: dict[str, float]) -> "Units":
        """
        :param scalars: what :meth:`scalars` returned
        :return: the same conversions with these settings; the tensors are shared
        """
        return replace(self, **scalars)  # type: ignore[arg-type]  # floats by name

    def normalize_observations(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: raw observations, ``(B, O)``
        :return: normalised and clipped observations, the inputs of the networks, ``(B, O)``
        """
        if self.observation_mean is None or self.observation_std is None:
            return observations
        normalised = (observations - self.observation_mean) / self.observation_std
        normalised = normalised.clamp(-self.clip_observation, self.clip_observation)
        return normalised if self.is_normalized is None else th.where(self.is_normalized, normalised, observations)

    def scale_rewards(self, rewards: th.Tensor, clip: bool = True) -> th.Tensor:
        """
        :param rewards: raw rewards (or sums of them), ``(B, 1)``
        :param clip: whether the clipping of ``VecNormalize`` applies; it is meant for single rewards, not for sums
        :return: rewards in the units of the value functions, ``(B, 1)``
        """
        if self.reward_std is not None:
            rewards = rewards / self.reward_std
            if clip:
                rewards = rewards.clamp(-self.clip_reward, self.clip_reward)
        return rewards if self.reward_scale == 1.0 else self.reward_scale * rewards

    def unscale_actions(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: in [-1, 1], ``(B, A)``
        :return: actions in the units of the environment, ``(B, A)``
        """
        if self.action_centre is None or self.action_half_range is None:
            return actions
        return self.action_centre + self.action_half_range * actions
