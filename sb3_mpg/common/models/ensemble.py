"""Ensembles of networks, and how the rows of a batch are dealt to their members."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch as th
from torch import nn

from sb3_mpg.common.checks import is_whole
from sb3_mpg.common.torch_layers import fourier_features, n_fourier_features

#: Which members predict: ``"dealt"`` deals the rows of a batch to the members in equal parts, the first rows to the first
#: member; ``"mean"`` predicts the mean of all members.
Members = Literal["dealt", "mean"]

# Of the running average of the networks' parameters
AVERAGING_RATE = 0.02


def even_rows(tensor: th.Tensor, n_members: int) -> th.Tensor:
    """
    :param tensor: ``(B, ...)``
    :param n_members: number of members :math:`E`
    :return: the same with the last row repeated, so that the number of rows is a multiple of :math:`E`, ``(B', ...)``
    """
    n_missing = -len(tensor) % n_members
    return th.cat([tensor, tensor[-1:].expand(n_missing, *tensor.shape[1:])]) if n_missing > 0 else tensor


def values_of_rows(values: th.Tensor, n_rows: int, members: Members) -> th.Tensor:
    """
    :param values: one number for each member, ``(E, 1, 1)``
    :param n_rows: number of rows :math:`B` of a batch
    :param members: which members predict
    :return: the number of each row's member, or the mean of all, ``(B, 1)``
    """
    if members == "mean":
        return values.mean().expand(n_rows, 1)
    n_members = len(values)
    n_rows_each = -(-n_rows // n_members)
    return values.expand(n_members, n_rows_each, 1).reshape(-1, 1)[:n_rows]


def is_architecture(net_arch: Any) -> bool:
    """
    :param net_arch: sizes of hidden layers
    :return: whether it is a list of one or more of them
    """
    return isinstance(net_arch, (tuple, list)) and len(net_arch) > 0 and all(is_whole(size) and size > 0 for size in net_arch)


class EnsembleLinear(nn.Module):
    """
    Linear layers side by side, ``(E, B, n_inputs) -> (E, B, n_outputs)``, initialised as ``nn.Linear``.

    :param n_members: number of layers :math:`E`
    :param n_inputs: number of inputs of each layer
    :param n_outputs: number of outputs of each layer
    """

    def __init__(self, n_members: int, n_inputs: int, n_outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(n_inputs)
        self.weight = nn.Parameter(th.empty(n_members, n_inputs, n_outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(th.empty(n_members, 1, n_outputs).uniform_(-bound, bound))

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        return th.baddbmm(self.bias, inputs, self.weight)


class NetworkEnsemble(nn.Module):
    """
    Networks of the same architecture, with an optimizer. Their inputs are extended by Fourier features, without which small
    networks are slow to learn what changes several times over the range of an input. Their outputs are zero at first.

    Predictions come from a running average of the parameters, which removes most of the noise of the optimizer.

    :param n_members: number of networks :math:`E`
    :param n_inputs: number of inputs, which should be scaled to about one unit
    :param n_outputs: number of outputs
    :param net_arch: sizes of the hidden layers of each network, with ELU
    :param learning_rate: learning rate of Adam
    """

    n_fits: th.Tensor

    def __init__(self, n_members: int, n_inputs: int, n_outputs: int, net_arch: tuple[int, ...], learning_rate: float):
        super().__init__()
        self.n_members, self.learning_rate = n_members, learning_rate
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([n_fourier_features(n_inputs), *net_arch]):
            layers += [EnsembleLinear(n_members, n_in, n_out), nn.ELU()]
        head = EnsembleLinear(n_members, net_arch[-1], n_outputs)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        #: What is fitted
        self.fitted = nn.Sequential(*layers, head)
        #: Its running average, which predicts
        self.average = copy.deepcopy(self.fitted).requires_grad_(False)
        # Number of steps of the optimizer since the last reset
        self.register_buffer("n_fits", th.zeros((), dtype=th.int64))
        self.optimizer = th.optim.Adam(self.fitted.parameters(), lr=learning_rate, fused=True)

    def _apply(self, fn: Callable[[th.Tensor], th.Tensor], recurse: bool = True) -> "NetworkEnsemble":
        # The state of the optimizer goes where the parameters go, so that a copy on the CPU is a whole one
        super()._apply(fn, recurse)
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                # The counter of fused optimizers is of single precision whatever the parameters are
                state[name] = value.to(parameter.device) if name == "step" else fn(value)
        return self

    def forward(self, inputs: th.Tensor, members: Members, is_fitting: bool = False) -> th.Tensor:
        """
        :param inputs: scaled inputs, ``(B, n_inputs)``
        :param members: which members predict
        :param is_fitting: whether to use the networks that are fitted instead of their running average
        :return: ``(B, n_outputs)``
        """
        networks = self.fitted if is_fitting else self.average
        features = fourier_features(inputs)
        n_rows = features.shape[0]
        if members == "mean":
            return networks(features.expand(self.n_members, *features.shape)).mean(dim=0)
        outputs = networks(even_rows(features, self.n_members).reshape(self.n_members, -1, features.shape[1]))
        return outputs.reshape(-1, outputs.shape[2])[:n_rows]

    def descend(self, loss: th.Tensor) -> None:
        """
        One step of the optimizer, followed by the running average.

        :param loss: a scalar, computed with ``is_fitting=True``
        """
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.n_fits += 1
        with th.no_grad():
            # A plain mean at first, so that the average forgets the initial parameters
            rate = max(AVERAGING_RATE, 1 / int(self.n_fits))
            th._foreach_lerp_(list(self.average.parameters()), list(self.fitted.parameters()), rate)

    @th.no_grad()
    def reset_outputs(self) -> None:
        """Make all outputs zero again. The optimizer and the running average start again."""
        for networks in (self.fitted, self.average):
            for parameter in networks[-1].parameters():
                parameter.zero_()
        self.optimizer.state.clear()
        self.n_fits.zero_()
