"""What the policies of all algorithms have in common."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_mpg.common.spaces import FlatObservations, tuple_keys
from sb3_mpg.common.torch_layers import ObservationScaler


class FlatInputs(BaseModel):
    """
    For actors and critics, in front of the class of SB3: they take observations of the space, as in ``predict``, and flat
    observations, ``(B, O)``, as in rollouts. A features extractor always gets observations of the space, except
    ``ObservationScaler``, which takes both.

    :param observation_space: Observation space
    """

    def __init__(self, observation_space: spaces.Space, *args: Any, **kwargs: Any):
        super().__init__(observation_space, *args, **kwargs)
        self.flat = FlatObservations(observation_space)

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        if isinstance(features_extractor, ObservationScaler):
            return features_extractor(obs)
        return super().extract_features(self.flat.unflatten(obs) if isinstance(obs, th.Tensor) else obs, features_extractor)


class ModelBasePolicy(BasePolicy):
    """
    In front of the policy class of SB3: takes tuples of observations, and actions of a fixed value (``low == high``). Its
    actions lie in the action space, also after rounding.
    """

    action_space: spaces.Box

    def obs_to_tensor(self, observation: Any) -> tuple[PyTorchObs, bool]:
        if isinstance(self.observation_space, spaces.Dict):
            keys = list(self.observation_space.spaces)
            if isinstance(observation, tuple) and keys == tuple_keys(len(observation)):
                observation = dict(zip(keys, observation, strict=True))
            if not isinstance(observation, Mapping) or observation.keys() != set(keys):
                got = list(observation) if isinstance(observation, Mapping) else type(observation).__name__
                raise ValueError(f"Expected an observation with the keys {keys}, got {got}; pass what the environment shows.")
        return super().obs_to_tensor(observation)

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = super().scale_action(action)
        # A dimension of no width has one value only, which every scaled action stands for
        return np.where(self.action_space.low < self.action_space.high, scaled, np.zeros_like(scaled))

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        unscaled = super().unscale_action(scaled_action)
        return np.clip(unscaled, self.action_space.low, self.action_space.high).astype(self.action_space.dtype, copy=False)
