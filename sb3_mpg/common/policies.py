"""What the policies of all algorithms have in common."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_mpg.common.spaces import FlatObservations, tuple_keys
from sb3_mpg.common.torch_layers import ObservationScaler, convert_inputs


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

    def input_layers(self) -> list[nn.Module]:
        """
        :return: the layers behind the features extractor. The features are the first elements of their inputs
        """
        raise NotImplementedError

    @th.no_grad()
    def fit_scales(self, observations: th.Tensor) -> None:
        """
        Fit the scales of the observations, see ``ObservationScaler``. From the second fit on, the outputs of the network do
        not change.

        :param observations: all recorded observations, as the networks see them, ``(N, O)``
        """
        scaler = self.features_extractor
        layers = [layer for layer in self.input_layers() if isinstance(layer, nn.Linear) and layer.bias is not None]
        # Subclasses of the scaler may compute anything from scaled observations, and so may other layers
        if type(scaler) is not ObservationScaler or len(layers) < len(self.input_layers()):
            for module in self.modules():
                if isinstance(module, ObservationScaler):
                    module.fit(observations)
                    module.keep_fit()
            return
        was_fitted = scaler.is_fitted
        shift, scale = (part.to(th.float64, copy=True) for part in (scaler.shift, scaler.scale))
        scaler.fit(observations)
        if was_fitted:
            factors, offsets = scale / scaler.scale, scale * (scaler.shift - shift)
            for layer in layers:
                # Target networks have no optimizer
                convert_inputs(layer, factors, offsets, getattr(self, "optimizer", None))

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

    def fit_scales(self, observations: th.Tensor) -> None:
        """
        Fit the scales of the observations in all networks. Gradients that learner processes are computing meanwhile have the
        units of the earlier scales. They are as few as the staleness allows, and Adam bounds the step that one of them makes.

        :param observations: all recorded observations, as the networks see them, ``(N, O)``
        """
        for network in self.children():
            if isinstance(network, FlatInputs):
                network.fit_scales(observations)
