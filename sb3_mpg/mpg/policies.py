from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import nn

from sb3_mpg.common.checks import check_count
from sb3_mpg.common.policies import FlatInputs, ModelBasePolicy
from sb3_mpg.common.torch_layers import ELU, ObservationScaler, first_layer, with_layer_norm


class MPGActor(FlatInputs, Actor):
    """The actor of TD3, which takes flat observations, too. See ``Actor`` for the parameters."""

    def input_layers(self) -> list[nn.Module]:
        return [first_layer(self.mu)]


class MPGCritic(FlatInputs, ContinuousCritic):
    """
    The critics of TD3, which take flat observations, too. See ``ContinuousCritic`` for the other parameters.

    :param layer_norm: whether each hidden layer is normalised before its activation function, see ``FadingLayerNorm``
    """

    def __init__(self, *args: Any, layer_norm: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if layer_norm:
            for index, q_network in enumerate(self.q_networks):
                self.q_networks[index] = with_layer_norm(q_network)
                self.add_module(f"qf{index}", self.q_networks[index])

    def input_layers(self) -> list[nn.Module]:
        return [first_layer(q_network) for q_network in self.q_networks]


class MPGPolicy(ModelBasePolicy, TD3Policy):
    """
    Policy class (with both actor and critic) for MPG: that of TD3 with the papers' networks, two hidden layers of
    256 ELU units. The rollout needs dQ/ds and dπ/ds, which are continuous with ELU and not with ReLU.

    While a model is trusted, the hidden layers of the critics are normalised, which the papers' are not. Their values then do
    not grow without bound where nothing is recorded, so that target networks that follow fast stay steady.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the policy and value networks.
    :param activation_fn: Activation function
    :param features_extractor_class: Features extractor to use; ``ObservationScaler`` by default
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor.
    :param normalize_images: Ignored: MPG takes no images
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer;
        by default Adam is ``fused``
    :param n_critics: Number of critic networks to create.
    :param layer_norm: Whether the hidden layers of the critics are normalised while a model is trusted
    :param share_features_extractor: Must be False: a shared extractor hides dQ/ds from the rollout
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = ELU,
        features_extractor_class: type[BaseFeaturesExtractor] = ObservationScaler,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        layer_norm: bool = True,
        share_features_extractor: bool = False,
    ):
        if share_features_extractor:
            raise ValueError(
                "`share_features_extractor=True` cuts the gradient of the critic with respect to the state, "
                "which the model rollout needs; leave it at False."
            )
        check_count("n_critics", n_critics, 1)
        if optimizer_kwargs is None and optimizer_class is th.optim.Adam:
            # The same arithmetic in one call for all parameters
            optimizer_kwargs = {"fused": True}
        # The critics are made in the constructor of the base class
        self.layer_norm = layer_norm
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            [256, 256] if net_arch is None else net_arch,
            activation_fn,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
            n_critics,
            share_features_extractor,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "layer_norm": self.layer_norm}

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> MPGActor:
        return MPGActor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> MPGCritic:
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return MPGCritic(**kwargs, layer_norm=self.layer_norm).to(self.device)


MlpPolicy = MPGPolicy
MultiInputPolicy = MPGPolicy
