"""Layers and features of networks."""

from collections.abc import Sequence

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_mpg.common.spaces import FlatObservations

# Recorded values that a fitted scale leaves, in absolute value
LARGEST_INPUT = 10.0
# A recorded value beyond it is a reason to fit the scales again
REFIT_INPUT = 2 * LARGEST_INPUT
# So is a number of recorded observations that has grown by this factor
REFIT_GROWTH = 2.0
# Standard deviation of an element that changes, as a share of its mean: single precision resolves 1e-7
SMALLEST_CHANGE = 1e-6
# State of torch's optimizers by kind: running means of gradients, of their squares, and numbers
FIRST_MOMENTS = {"exp_avg", "momentum_buffer"}
SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg"}
COUNTERS = {"step"}
# Frequencies of the Fourier features, for inputs that are scaled to about one unit
FREQUENCIES = (1.0, 2.0, 3.0)
# Number of updates in which what only a trusted model bears rises from 0 to 1
N_FADING_UPDATES = 500


def n_fourier_features(n_inputs: int, frequencies: Sequence[float] = FREQUENCIES) -> int:
    """
    :param n_inputs: number of inputs
    :param frequencies: see :func:`fourier_features`
    :return: number of outputs of :func:`fourier_features`
    """
    return n_inputs * (1 + 2 * len(frequencies))


def fourier_features(
    inputs: th.Tensor,
    frequencies: Sequence[float] = FREQUENCIES,
    scale: th.Tensor | None = None,
    angles: th.Tensor | None = None,
) -> th.Tensor:
    """
    :param inputs: ``(B, n)``
    :param frequencies: :math:`K` frequencies
    :param scale: factor of the sines and cosines, a scalar; 1 by default
    :param angles: what sines and cosines are taken of, ``(B, n)``; the inputs by default
    :return: the inputs, with the sine and the cosine of each angle at each frequency, ``(B, n (1 + 2 K))``, in column-major
        memory
    """
    if not frequencies:
        return inputs
    # Column-major, because the compiler vectorises long runs of contiguous elements, and rows are short
    columns = (inputs if angles is None else angles).t()
    multiples = columns.new_tensor(frequencies).reshape(-1, 1, 1) * columns
    # One operation for all of them, because small tensors cost as much time as their number
    features = th.stack([multiples.sin(), multiples.cos()], dim=1).flatten(0, 2)
    if scale is not None:
        features = scale * features
    return th.cat([inputs.t(), features]).t()


class ELU(nn.ELU):
    """An ELU that overwrites its input. Its derivative is then computed from its output, without another exponential."""

    def __init__(self) -> None:
        super().__init__(inplace=True)


def first_layer(network: nn.Module) -> nn.Module:
    """
    :param network: a network
    :return: its first layer; the network itself if it is not a sequence of layers
    """
    return network[0] if isinstance(network, nn.Sequential) and len(network) > 0 else network


@th.no_grad()
def fade(share: th.Tensor, is_model_trusted: bool, at_once: bool = False) -> None:
    """
    Fade something that helps where a model is trusted and harms elsewhere, once in each update.

    :param share: its present share, from 0 to 1, which is changed in place
    :param is_model_trusted: whether the share rises towards 1 or falls towards 0
    :param at_once: whether it gets there in this update
    """
    step = 1.0 if at_once else 1 / N_FADING_UPDATES
    share.add_(step if is_model_trusted else -step).clamp_(0.0, 1.0)


class FadingLayerNorm(nn.LayerNorm):
    r"""
    A share of layer normalisation, :math:`x + \beta (\mathrm{LN}(x) - x)`.

    Normalised critics stay bounded where nothing is recorded, so that targets that follow fast stay steady. But they learn
    less from recorded steps alone. Without a trusted model, the algorithm takes the normalisation out.

    :param n_features: number of features
    """

    share: th.Tensor

    def __init__(self, n_features: int):
        super().__init__(n_features)
        self.register_buffer("share", th.ones(()))

    def forward(self, input: th.Tensor) -> th.Tensor:
        return th.lerp(input, super().forward(input), self.share)

    def fade(self, is_model_trusted: bool, at_once: bool = False) -> None:
        """See :func:`fade`."""
        fade(self.share, is_model_trusted, at_once)


def with_layer_norm(network: nn.Module) -> nn.Sequential:
    """
    :param network: linear layers, each but the last followed by an activation function
    :return: the same layers, with a :class:`FadingLayerNorm` behind each linear layer but the last
    """
    layers = list(network.children())
    normalised: list[nn.Module] = []
    for layer in layers:
        normalised.append(layer)
        if isinstance(layer, nn.Linear) and layer is not layers[-1]:
            normalised.append(FadingLayerNorm(layer.out_features))
    return nn.Sequential(*normalised)


@th.no_grad()
def convert_inputs(
    layer: nn.Linear, factors: th.Tensor, offsets: th.Tensor, optimizer: th.optim.Optimizer | None = None
) -> None:
    r"""
    Convert a layer to other units of its first inputs, :math:`x_i = c_i x_i' + d_i`, without a change of its outputs:
    :math:`w_i' = c_i w_i` and :math:`b' = b + \sum_i d_i w_i`.

    The gradient with respect to a converted weight is :math:`(g_{w_i} - d_i g_b) / c_i`. Running means of gradients are
    converted in the same way, those of their squares as if :math:`g_{w_i}` and :math:`g_b` were uncorrelated. If the optimizer
    has another kind of state, what it knows of the layer is forgotten.

    :param layer: the layer, with a bias
    :param factors: :math:`c`, float64, ``(n,)``
    :param offsets: :math:`d`, float64, ``(n,)``
    :param optimizer: the optimizer of the layer, if it has one
    """
    n_converted = len(factors)
    weights = layer.weight[:, :n_converted]
    old_weights = weights.to(th.float64, copy=True)
    weights.copy_(old_weights * factors)
    layer.bias.add_(old_weights @ offsets)

    state = {} if optimizer is None else optimizer.state
    of_weight, of_bias = state.get(layer.weight, {}), state.get(layer.bias, {})
    is_known = of_weight.keys() <= {*FIRST_MOMENTS, *SECOND_MOMENTS, *COUNTERS} and of_weight.keys() == of_bias.keys()
    if not is_known:
        for parameter in (layer.weight, layer.bias):
            state.pop(parameter, None)
        return
    for name in of_weight.keys() - COUNTERS:
        moments, of_offsets = of_weight[name][:, :n_converted], of_bias[name].double().unsqueeze(1)
        if name in FIRST_MOMENTS:
            moments.copy_((moments.double() - offsets * of_offsets) / factors)
        else:
            moments.copy_((moments.double() + offsets.square() * of_offsets) / factors.square())


class ObservationScaler(BaseFeaturesExtractor):
    """
    Flattens observations and scales each of their elements: ``scale * (observation - shift)``.

    With ``scale="auto"`` the algorithm fits shift and scale to the replay buffer just before its first update: each element is
    standardised, whatever its unit and however narrow its range is. It is scaled less where that would leave recorded values
    beyond ``LARGEST_INPUT``. An element that never changed is only shifted.

    The first random steps do not show the range of later ones. So shift and scale are fitted again whenever the number of
    recorded observations has doubled, or when a recorded observation is far outside of the range of the last fit. The weights
    of the next layer are then converted, so that the outputs of the network do not change (see :func:`convert_inputs`). Shift
    and scale are part of the policy's parameters, so that copying the parameters also copies them.

    The scaled elements are extended by Fourier features, because networks of smooth units are slow to learn functions that
    change several times over the range of an element, such as the bends along a road. With Fourier features, critics
    extrapolate freely at the border of the data, unless they learn from rollouts of a trusted model. Without one, the
    algorithm takes them out (``fourier_scale``). No weights could make up for other units of the Fourier features, so
    they keep the shift and scale of the first fit while their own scale is not zero.

    :param observation_space: a ``Box``, or a ``Dict`` of boxes
    :param scale: factors, as many as an observation has elements (in the order of ``FlatObservations``); or ``"auto"``
    :param frequencies: frequencies of the Fourier features, an empty sequence for none; by default ``FREQUENCIES`` if the
        scale is ``"auto"``, and none if it is given
    """

    shift: th.Tensor
    scale: th.Tensor
    n_fitted: th.Tensor
    fourier_shift: th.Tensor
    fourier_unit: th.Tensor
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
        given = th.as_tensor(factors.reshape(-1), dtype=th.float32)
        self.register_buffer("shift", th.zeros(n_elements))
        self.register_buffer("scale", given)
        # Number of observations of the last fit: 0 before the first, negative if there is none to come. A float, because tools
        # that average or perturb state dictionaries expect floats
        self.register_buffer("n_fitted", th.tensor(0.0 if is_auto else -1.0))
        self.register_buffer("fourier_shift", th.zeros(n_elements))
        self.register_buffer("fourier_unit", given.clone())
        self.register_buffer("fourier_scale", th.ones(()))

    @property
    def is_fitted(self) -> bool:
        """Whether shift and scale come from observations."""
        return bool(self.n_fitted > 0)

    def keep_fit(self) -> None:
        """Keep shift and scale from now on."""
        self.n_fitted.fill_(-1.0)

    def needs_fit(self, n_observations: int, latest: th.Tensor) -> bool:
        """
        :param n_observations: number of recorded observations
        :param latest: the latest of them, as the networks see them, ``(N, O)``
        :return: whether shift and scale should be fitted to all of them
        """
        n_fitted = self.n_fitted.item()
        if n_fitted <= 0:
            return n_fitted == 0
        if n_observations >= REFIT_GROWTH * n_fitted:
            return True
        scaled = (latest - self.shift) * self.scale
        return bool((scaled[th.isfinite(scaled)].abs() > REFIT_INPUT).any())

    @th.no_grad()
    def fit(self, observations: th.Tensor) -> None:
        """
        Compute shift and scale, unless they are given.

        :param observations: all recorded observations, as the networks see them, ``(N, O)``
        """
        if self.n_fitted < 0:
            return
        is_first = not self.is_fitted
        self.n_fitted.fill_(len(observations))
        finite = observations[th.isfinite(observations).all(dim=1)].double()
        if len(finite) == 0:
            return
        std, mean = th.std_mean(finite, dim=0, correction=0)
        spread = th.maximum(std, (finite - mean).abs().amax(dim=0) / LARGEST_INPUT)
        # What differs only by rounding has never changed
        has_changed = std > SMALLEST_CHANGE * mean.abs() + th.finfo(th.float32).tiny
        self.shift.copy_(mean)
        self.scale.copy_(th.where(has_changed, 1.0 / spread, 1.0))
        if is_first or self.fourier_scale == 0:
            self.fourier_shift.copy_(self.shift)
            self.fourier_unit.copy_(self.scale)

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: of the space, ``(B, *obs_shape)``, by key for a ``Dict``; or flat, ``(B, O)``
        :return: features, ``(B, features_dim)``
        """
        flat = self.flat.flatten(observations)
        scaled = (flat - self.shift) * self.scale
        if not self.frequencies:
            return scaled
        angles = (flat - self.fourier_shift) * self.fourier_unit
        return fourier_features(scaled, self.frequencies, self.fourier_scale, angles)

    def fade(self, is_model_trusted: bool, at_once: bool = False) -> None:
        """
        Fade the scale of the Fourier features, see :func:`fade`. With these features, critics extrapolate freely at the border
        of the visited region. If critics learn from recorded steps only, a policy exploits that. Rollouts of a trusted model
        prevent it.
        """
        if self.frequencies:
            fade(self.fourier_scale, is_model_trusted, at_once)
