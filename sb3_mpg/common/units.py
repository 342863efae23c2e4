"""
Conversions between the units of the environment, where models and replay buffers live, and those of the networks.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize


@dataclass(frozen=True)
class Units:
    """
    What lies between the environment and the networks, as differentiable functions.

    The networks take normalised observations when the environment is a ``VecNormalize``, and speak actions in [-1, 1].
    The value functions count rewards that were divided by the standard deviation of ``VecNormalize`` and multiplied by
    ``reward_scale``. The statistics are those of the moment when the object was built.

    :param action_centre: middle of the environment's range of actions, ``(A,)``, or ``None`` when that is [-1, 1] already
    :param action_half_range: half of its width, ``(A,)``
    :param reward_scale: factor of all rewards
    :param observation_mean: mean of the observations, ``obs_shape``, or ``None`` without normalisation
    :param observation_std: standard deviation of the observations, ``obs_shape``
    :param clip_observation: largest absolute value of a normalised observation
    :param reward_std: what rewards are divided by, a scalar tensor, or ``None`` without normalisation
    :param clip_reward: largest absolute value of a normalised reward
    """

    action_centre: th.Tensor | None = None
    action_half_range: th.Tensor | None = None
    reward_scale: float = 1.0
    observation_mean: th.Tensor | None = None
    observation_std: th.Tensor | None = None
    clip_observation: float = float("inf")
    reward_std: th.Tensor | None = None
    clip_reward: float = float("inf")

    @classmethod
    def of(
        cls, action_space: spaces.Box, device: th.device | str, reward_scale: float = 1.0, env: VecNormalize | None = None
    ) -> "Units":
        """
        :param action_space: the action space of the environment
        :param device: where the networks are
        :param reward_scale: factor of all rewards
        :param env: the ``VecNormalize`` around the environment, if any
        :return: the conversions, with the present statistics of ``env``
        """

        def to_tensor(array: np.ndarray) -> th.Tensor:
            return th.as_tensor(array, dtype=th.float32, device=device)

        units = cls(reward_scale=reward_scale)
        low, high = action_space.low.astype(np.float64), action_space.high.astype(np.float64)
        if (low != -1).any() or (high != 1).any():
            units = replace(
                units, action_centre=to_tensor(0.5 * (low + high)), action_half_range=to_tensor(0.5 * (high - low))
            )
        if env is not None and env.norm_obs:
            assert isinstance(env.obs_rms, RunningMeanStd), "VecNormalize of dictionary observations is not supported"
            units = replace(
                units,
                observation_mean=to_tensor(env.obs_rms.mean),
                observation_std=to_tensor(np.sqrt(env.obs_rms.var + env.epsilon)),
                clip_observation=float(env.clip_obs),
            )
        if env is not None and env.norm_reward:
            reward_std = to_tensor(np.sqrt(env.ret_rms.var + env.epsilon))
            units = replace(units, reward_std=reward_std, clip_reward=float(env.clip_reward))
        return units

    def statistics(self) -> list[th.Tensor]:
        """
        :return: the tensors that change while training: the statistics of ``VecNormalize``, as far as they are used
        """
        statistics = (self.observation_mean, self.observation_std, self.reward_std)
        return [tensor for tensor in statistics if tensor is not None]

    def scalars(self) -> dict[str, float]:
        """
        :return: the settings that are no tensors, which a callback may change
        """
        return {name: getattr(self, name) for name in ("reward_scale", "clip_observation", "clip_reward")}

    def with_scalars(self, scalars: dict[str, float]) -> "Units":
        """
        :param scalars: of :meth:`scalars`
        :return: the same conversions with these settings; tensors are shared
        """
        return replace(self, **scalars)  # type: ignore[arg-type]  # floats by name

    def normalize_observations(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: raw observations, ``(B, *obs_shape)``
        :return: what the networks take, ``(B, *obs_shape)``
        """
        if self.observation_mean is None or self.observation_std is None:
            return observations
        normalised = (observations - self.observation_mean) / self.observation_std
        return normalised.clamp(-self.clip_observation, self.clip_observation)

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
