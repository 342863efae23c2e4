from typing import Any

from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_mpg.common.torch_layers import ObservationScaler
from sb3_mpg.mpg.policies import MPGPolicy


class DVPGPolicy(MPGPolicy):
    """
    Policy class (with both actor and critic) for DVPG: that of MPG with the paper's networks, two hidden layers of 64 ReLU
    units and one critic, without Fourier features and without normalised layers.

    See ``MPGPolicy`` for the parameters.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = ObservationScaler,
        features_extractor_kwargs: dict[str, Any] | None = None,
        n_critics: int = 1,
        layer_norm: bool = False,
        **kwargs: Any,
    ):
        if features_extractor_kwargs is None and features_extractor_class is ObservationScaler:
            features_extractor_kwargs = {"frequencies": []}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            [64, 64] if net_arch is None else net_arch,
            activation_fn,
            features_extractor_class,
            features_extractor_kwargs,
            n_critics=n_critics,
            layer_norm=layer_norm,
            **kwargs,
        )


MlpPolicy = DVPGPolicy
MultiInputPolicy = DVPGPolicy
