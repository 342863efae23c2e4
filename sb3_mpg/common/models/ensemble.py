"""Ensembles of networks, and how the rows of a batch are dealt to their members."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch as th
from torch import nn

from sb3_mpg.common.checks import is_whole
from sb3_mpg.common.torch_layers import FREQUENCIES, fourier_features, n_fourier_features

#: Which members predict: ``"dealt"`` deals the rows of a batch to the members in equal parts, the first rows to the first
#: member; ``"sampled"`` deals them at random, anew in each call, and draws the noise of models that learn it; ``"mean"``
#: predicts the mean of all members.
Members = Literal["dealt", "sampled", "mean"]

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
    :return: the number of each row's member, or the mean of all where rows have none of their own, ``(B, 1)``
    """
    if members != "dealt":
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

    def keep_first(self, n_members: int) -> None:
        """
        :param n_members: number of layers to keep; the others are removed
        """
        self.weight, self.bias = (
            nn.Parameter(parameter[:n_members].detach().clone(), requires_grad=parameter.requires_grad)
            for parameter in (self.weight, self.bias)
        )


class NetworkEnsemble(nn.Module):
    """
    Networks of the same architecture, with an optimizer. Their inputs are extended by Fourier features, without which small
    networks are slow to learn what changes several times over the range of an input. Their outputs are zero at first.

    Predictions come from a running average of the parameters, which removes most of the noise of the optimizer. More networks
    may be fitted than predict: those with the lowest held-out errors do, which are called elites.

    :param n_members: number of networks that predict :math:`E`
    :param n_inputs: number of inputs, which should be scaled to about one unit
    :param n_outputs: number of outputs
    :param net_arch: sizes of the hidden layers of each network
    :param learning_rate: learning rate of Adam
    :param activation_fn: activation function
    :param frequencies: frequencies of the Fourier features, none for the inputs alone
    :param n_spares: number of networks that are fitted and do not predict
    :param weight_decay: factor of the squares of the weights, halved and added to the loss of each network
    """

    n_fits: th.Tensor
    elites: th.Tensor

    def __init__(
        self,
        n_members: int,
        n_inputs: int,
        n_outputs: int,
        net_arch: tuple[int, ...],
        learning_rate: float,
        activation_fn: type[nn.Module] = nn.ELU,
        frequencies: Sequence[float] = FREQUENCIES,
        n_spares: int = 0,
        weight_decay: float = 0.0,
    ):
        super().__init__()
        self.n_members, self.n_fitted, self.learning_rate = n_members, n_members + n_spares, learning_rate
        self.frequencies = tuple(frequencies)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([n_fourier_features(n_inputs, self.frequencies), *net_arch]):
            layers += [EnsembleLinear(self.n_fitted, n_in, n_out), activation_fn()]
        head = EnsembleLinear(self.n_fitted, net_arch[-1], n_outputs)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        #: What is fitted
        self.fitted = nn.Sequential(*layers, head)
        #: The running average of the elites, which predicts
        self.average = copy.deepcopy(self.fitted).requires_grad_(False)
        for layer in self.average:
            if n_spares > 0 and isinstance(layer, EnsembleLinear):
                layer.keep_first(n_members)
        # Number of steps of the optimizer since the last reset
        self.register_buffer("n_fits", th.zeros((), dtype=th.int64))
        # Which of the fitted networks predict
        self.register_buffer("elites", th.arange(n_members))
        weights = [parameter for name, parameter in self.fitted.named_parameters() if name.endswith("weight")]
        biases = [parameter for name, parameter in self.fitted.named_parameters() if name.endswith("bias")]
        groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": weight_decay}, {"params": biases}]
        self.optimizer = th.optim.Adam(groups, lr=learning_rate, fused=True)
        # Lowest held-out error of each fitted network and its parameters then, while they are fitted until convergence
        self._best: tuple[th.Tensor, list[th.Tensor]] | None = None

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
        :param is_fitting: whether to use the networks that are fitted, spares included, instead of their running average
        :return: ``(B, n_outputs)``
        """
        networks, n_members = (self.fitted, self.n_fitted) if is_fitting else (self.average, self.n_members)
        features = fourier_features(inputs, self.frequencies)
        n_rows = features.shape[0]
        if members == "mean":
            return networks(features.expand(n_members, *features.shape)).mean(dim=0)
        order = th.randperm(n_rows, device=features.device) if members == "sampled" else None
        if order is not None:
            features = features[order]
        outputs = networks(even_rows(features, n_members).reshape(n_members, -1, features.shape[1]))
        outputs = outputs.reshape(-1, outputs.shape[2])[:n_rows]
        return outputs if order is None else th.empty_like(outputs).index_copy(0, order, outputs)

    def of_all(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: scaled inputs, ``(B, n_inputs)``
        :return: outputs of each network that is fitted, spares included, ``(n_fitted, B, n_outputs)``
        """
        features = fourier_features(inputs, self.frequencies)
        return self.fitted(features.expand(self.n_fitted, *features.shape))

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
            th._foreach_lerp_(list(self.average.parameters()), self._of_elites(), rate)

    def _of_elites(self) -> list[th.Tensor]:
        parameters: list[th.Tensor] = list(self.fitted.parameters())
        return parameters if self.n_fitted == self.n_members else [parameter[self.elites] for parameter in parameters]

    @th.no_grad()
    def keep_best(self, errors: th.Tensor) -> None:
        """
        Remember the parameters of each fitted network whose held-out error is the lowest since :meth:`restore_best`.

        :param errors: held-out errors of the fitted networks, ``(n_fitted,)``
        """
        parameters = list(self.fitted.parameters())
        if self._best is None:
            self._best = errors.clone(), [parameter.detach().clone() for parameter in parameters]
            return
        best_errors, best_parameters = self._best
        is_better = errors < best_errors
        best_errors.copy_(th.where(is_better, errors, best_errors))
        for best, parameter in zip(best_parameters, parameters, strict=True):
            best[is_better] = parameter[is_better]

    @th.no_grad()
    def restore_best(self) -> None:
        """Return to the remembered parameters. The networks with the lowest errors are the elites from now on."""
        if self._best is None:
            return
        (errors, best_parameters), self._best = self._best, None
        for parameter, best in zip(self.fitted.parameters(), best_parameters, strict=True):
            parameter.copy_(best)
        self.elites.copy_(errors.argsort()[: self.n_members].sort().values)
        for average, elite in zip(self.average.parameters(), self._of_elites(), strict=True):
            average.copy_(elite)

    @th.no_grad()
    def reset_outputs(self) -> None:
        """Make all outputs zero again. The optimizer and the running average start again."""
        for networks in (self.fitted, self.average):
            for parameter in networks[-1].parameters():
                parameter.zero_()
        self.optimizer.state.clear()
        self.n_fits.zero_()
