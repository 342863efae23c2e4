"""Network pieces."""

import math
from collections.abc import Sequence

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

# Factors of what is scaled to about one unit, in sines and cosines of it
FREQUENCIES = (1.0, 2.0, 3.0)
LOG2_E = math.log2(math.e)


def n_with_waves(n_inputs: int, frequencies: Sequence[float] = FREQUENCIES) -> int:
    """
    :param n_inputs: number of inputs
    :param frequencies: see :func:`with_waves`
    :return: how many :func:`with_waves` makes of them
    """
    return n_inputs * (1 + 2 * len(frequencies))


def with_waves(inputs: th.Tensor, frequencies: Sequence[float] = FREQUENCIES, amplitude: th.Tensor | None = None) -> th.Tensor:
    """
    :param inputs: ``(B, n)``
    :param frequencies: :math:`K` factors
    :param amplitude: of the sines and cosines; 1 by default
    :return: the inputs, and the sine and cosine of each times each factor, ``(B, n (1 + 2 K))``, in memory by columns
    """
    if not frequencies:
        return inputs
    # One element of all rows behind the other: many at once are compiled to instructions that take many, few in a row are not
    columns = inputs.t()
    waves = [wave(factor * columns) for factor in frequencies for wave in (th.sin, th.cos)]
    if amplitude is not None:
        waves = [amplitude * wave for wave in waves]
    return th.cat([columns, *waves]).t()


class ELU(nn.ELU):
    """
    An ELU that overwrites its input: its derivative then comes from its output, without another exponential.

    Where no derivative is asked for, as in value targets, a CPU computes it from a power of two, which is up to four times as
    fast as ``expm1`` and, on some processors, more than twice as fast as ``exp``: the same to the rounding error of 1.
    """

    def __init__(self) -> None:
        super().__init__(inplace=True)

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: any shape; overwritten
        :return: the same tensor
        """
        if th.is_grad_enabled() or th.compiler.is_compiling() or inputs.device.type != "cpu":
            return super().forward(inputs)
        below = inputs.clamp(max=0.0).mul_(LOG2_E).exp2_().sub_(1.0)
        return th.maximum(inputs, below, out=inputs)


class ObservationScaler(BaseFeaturesExtractor):
    """
    Flattens observations and scales each of their elements: ``scale * (observation - shift)``.

    With ``scale="auto"`` the algorithm fits shift and scale to the replay buffer once, just before its first update:
    elements that spread over more than one unit are centred and divided by their standard deviation, the others are left
    as they are (stretching a narrow start distribution would blow up all that lies outside it). From then on they stay
    fixed, and are part of the policy's parameters: who takes those over takes over their scales.

    Sines and cosines of the scaled elements (Fourier features) come along: networks of smooth units are slow to learn what
    changes several times over the range of an element, such as the bends along a road. At the border of what is recorded
    they are free to bend, which a model's rollouts keep them from and nothing else does: the algorithm makes them small
    (``amplitude``) while no model is trusted.

    :param observation_space: float Box
    :param scale: factors, of the shape of an observation; or ``"auto"``
    :param frequencies: factors of the scaled elements in the sines and cosines, an empty sequence for none;
        by default ``FREQUENCIES`` if the scale is ``"auto"``, and none if it is given
    """

    shift: th.Tensor
    scale: th.Tensor
    is_fixed: th.Tensor
    amplitude: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        scale: "str | list[float] | np.ndarray" = "auto",
        frequencies: Sequence[float] | None = None,
    ):
        assert isinstance(observation_space, spaces.Box), f"ObservationScaler takes a Box, got {observation_space}"
        is_auto = isinstance(scale, str)
        if frequencies is None:
            frequencies = FREQUENCIES if is_auto else ()
        self.frequencies = tuple(frequencies)
        n_elements = int(np.prod(observation_space.shape))
        super().__init__(observation_space, n_with_waves(n_elements, self.frequencies))
        if isinstance(scale, str):
            if scale != "auto":
                raise ValueError(f"`scale` of the observations must be 'auto' or one factor for each element, got {scale!r}.")
            factors = np.ones(n_elements)
        else:
            factors = np.asarray(scale, dtype=np.float64)
            if factors.size != n_elements:
                raise ValueError(
                    f"`scale` must give one factor for each of the {n_elements} elements of an observation, "
                    f"got {factors.size}."
                )
        self.register_buffer("shift", th.zeros(n_elements))
        self.register_buffer("scale", th.as_tensor(factors.reshape(-1), dtype=th.float32))
        self.register_buffer("is_fixed", th.tensor(not is_auto))
        self.register_buffer("amplitude", th.ones(()))

    def fit(self, observations: th.Tensor) -> None:
        """
        Choose shift and scale; does nothing where they are given or chosen already.

        :param observations: what the networks take, ``(N, *obs_shape)``
        """
        if self.is_fixed:
            return
        self.is_fixed.fill_(True)
        std, mean = th.std_mean(observations.flatten(1).double(), dim=0, correction=0)
        wide = std > 1.0
        self.shift.copy_(th.where(wide, mean, 0.0))
        self.scale.copy_(th.where(wide, 1.0 / std.clamp(min=1.0), 1.0))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: ``(B, *obs_shape)``
        :return: features, ``(B, features_dim)``
        """
        scaled = (observations.flatten(1) - self.shift) * self.scale
        return with_waves(scaled, self.frequencies, self.amplitude)
