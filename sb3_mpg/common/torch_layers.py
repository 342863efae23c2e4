"""Layers and features of networks."""

from collections.abc import Sequence

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_mpg.common.spaces import FlatObservations

# Frequencies of the Fourier features, for inputs that are scaled to about one unit
FREQUENCIES = (1.0, 2.0, 3.0)
# Scale of the Fourier features while no model is trusted
UNTRUSTED_FOURIER_SCALE = 0.3
# Number of updates in which the scale would rise from 0 to 1
N_FADING_UPDATES = 500


def n_fourier_features(n_inputs: int, frequencies: Sequence[float] = FREQUENCIES) -> int:
    """
    :param n_inputs: number of inputs
    :param frequencies: see :func:`fourier_features`
    :return: number of outputs of :func:`fourier_features`
    """
    return n_inputs * (1 + 2 * len(frequencies))


def fourier_features(
    inputs: th.Tensor, frequencies: Sequence[float] = FREQUENCIES, scale: th.Tensor | None = None
) -> th.Tensor:
    """
    :param inputs: ``(B, n)``
    :param frequencies: :math:`K` frequencies
    :param scale: factor of the sines and cosines, a scalar; 1 by default
    :return: the inputs, with the sine and the cosine of each input at each frequency, ``(B, n (1 + 2 K))``, in column-major
        memory
    """
    if not frequencies:
        return inputs
    # Column-major, because the compiler vectorises long runs of contiguous elements, and rows are short
    columns = inputs.t()
    features = [function(frequency * columns) for frequency in frequencies for function in (th.sin, th.cos)]
    if scale is not None:
        features = [scale * feature for feature in features]
    return th.cat([columns, *features]).t()


class ELU(nn.ELU):
    """An ELU that overwrites its input. Its derivative is then computed from its output, without another exponential."""

    def __init__(self) -> None:
        super().__init__(inplace=True)


class ObservationScaler(BaseFeaturesExtractor):
    """
    Flattens observations and scales each of their elements: ``scale * (observation - shift)``.

    With ``scale="auto"`` the algorithm fits shift and scale to the replay buffer once, just before its first update:
    elements with a standard deviation of more than one are standardised, the others do not change (stretching a narrow start
    distribution would blow up all observations outside of it). From then on shift and scale are fixed. They are part of the
    policy's parameters, so that copying the parameters also copies the scales.

    The scaled elements are extended by Fourier features, because networks of smooth units are slow to learn functions that
    change several times over the range of an element, such as the bends along a road. With Fourier features, critics
    extrapolate freely at the border of the data, unless they learn from rollouts of a trusted model. Without one, the
    algorithm reduces their scale (``fourier_scale``).

    :param observation_space: a ``Box``, or a ``Dict`` of boxes
    :param scale: factors, as many as an observation has elements (in the order of ``FlatObservations``); or ``"auto"``
    :param frequencies: frequencies of the Fourier features, an empty sequence for none; by default ``FREQUENCIES`` if the
        scale is ``"auto"``, and none if it is given
    """

    shift: th.Tensor
    scale: th.Tensor
    is_fixed: th.Tensor
    fourier_scale: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        scale: "str | list[float] | np.ndarray" = "auto",
        frequencies: Sequence[float] | None = None,
    ):
        is_auto = isinstance(scale, str)
        if frequencies is None:
            frequencies = FREQUENCIES if is_auto else ()
        self.frequencies = tuple(frequencies)
        flat = FlatObservations(observation_space)
        n_elements = flat.n_elements
        super().__init__(observation_space, n_fourier_features(n_elements, self.frequencies))
        self.flat = flat
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
        # Zero until shift and scale are known. A float, because tools that average or perturb state dictionaries expect floats
        self.register_buffer("is_fixed", th.tensor(float(not is_auto)))
        self.register_buffer("fourier_scale", th.ones(()))

    def fit(self, observations: th.Tensor) -> None:
        """
        Compute shift and scale. Does nothing if they are given or computed already.

        :param observations: observations as the networks see them, ``(N, O)``
        """
        if self.is_fixed:
            return
        self.is_fixed.fill_(1.0)
        std, mean = th.std_mean(observations.double(), dim=0, correction=0)
        wide = std > 1.0
        self.shift.copy_(th.where(wide, mean, 0.0))
        self.scale.copy_(th.where(wide, 1.0 / std.clamp(min=1.0), 1.0))

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: of the space, ``(B, *obs_shape)``, by key for a ``Dict``; or flat, ``(B, O)``
        :return: features, ``(B, features_dim)``
        """
        scaled = (self.flat.flatten(observations) - self.shift) * self.scale
        return fourier_features(scaled, self.frequencies, self.fourier_scale)

    def fade(self, is_model_trusted: bool) -> None:
        """
        Adapt the scale of the Fourier features, once in each update. With these features, critics extrapolate freely at the
        border of the visited region. If critics learn from recorded steps only, a policy exploits that. Rollouts of a trusted
        model prevent it, and without such a model the scale is reduced.

        :param is_model_trusted: whether the scale rises towards 1 or falls towards ``UNTRUSTED_FOURIER_SCALE``
        """
        if self.frequencies:
            step = (1 if is_model_trusted else -1) / N_FADING_UPDATES
            self.fourier_scale.add_(step).clamp_(UNTRUSTED_FOURIER_SCALE, 1.0)
