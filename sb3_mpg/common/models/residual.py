"""A prior model that is corrected by what was recorded."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.trainable import TrainableModel, Transitions

# A dimension that the prior model predicts to less than this share of its change needs no finer correction
SMALLEST_TARGET_SCALE = 1e-3
# How far predictions may leave the range of the data, in units of its width
RANGE_MARGIN = 0.5


class EnsembleLinear(nn.Module):
    """
    Linear layers side by side, ``(E, B, n_inputs) -> (E, B, n_outputs)``, initialised as ``nn.Linear``.

    :param n_members: number of layers :math:`E`
    :param n_inputs: number of inputs of each
    :param n_outputs: number of outputs of each
    """

    def __init__(self, n_members: int, n_inputs: int, n_outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(n_inputs)
        self.weight = nn.Parameter(th.empty(n_members, n_inputs, n_outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(th.empty(n_members, 1, n_outputs).uniform_(-bound, bound))

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        return th.baddbmm(self.bias, inputs, self.weight)


class ResidualModel(TrainableModel):
    r"""
    A prior model plus a correction of its next state and of its reward, learned from recorded transitions:

    .. math:: s' = f(s, a) + \Delta_s(s, a), \quad r = r(s, a, s') + \Delta_r(s, a).

    The correction is a small ensemble of networks whose output is zero at first, so that everything begins with the prior
    model. Its inputs and targets are scaled by the statistics of the data. Differences between states are the prior model's
    (``state_difference``, ``state_add``). Predicted states are kept within the range of the data and a margin: a rollout that
    runs further is a guess, and one that explodes would take the gradient with it.

    A random prior model is taken at its mean: what it draws at random is an allowance for its own errors, and those are
    what is learned here.

    :param prior: what is corrected
    :param n_states: number of dimensions of its state
    :param n_actions: number of dimensions of the actions
    :param n_members: number of networks; two are enough to see where the data leave the correction open
    :param net_arch: hidden layers of each network, with ELU
    :param learning_rate: of Adam
    """

    input_mean: th.Tensor
    input_std: th.Tensor
    target_scale: th.Tensor
    seen_low: th.Tensor
    seen_high: th.Tensor
    low: th.Tensor
    high: th.Tensor
    gains: th.Tensor

    def __init__(
        self,
        prior: PriorModel,
        n_states: int,
        n_actions: int,
        n_members: int = 2,
        net_arch: tuple[int, ...] = (64, 64),
        learning_rate: float = 1e-3,
    ):
        super().__init__()
        if n_members < 2:
            raise ValueError(
                f"The correction is judged by comparing networks, so `n_members` must be 2 or more, got {n_members}."
            )
        self.prior = prior
        self.n_states, self.n_members = n_states, n_members
        sizes = [n_states + n_actions, *net_arch]
        layers: list[nn.Module] = []
        for n_inputs, n_outputs in pairwise(sizes):
            layers += [EnsembleLinear(n_members, n_inputs, n_outputs), nn.ELU()]
        head = EnsembleLinear(n_members, sizes[-1], n_states + 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.correction = nn.Sequential(*layers, head)
        for name, buffer in {
            "input_mean": th.zeros(sizes[0]),
            "input_std": th.ones(sizes[0]),
            "target_scale": th.ones(n_states + 1),
            "seen_low": th.full((n_states,), float("inf")),
            "seen_high": th.full((n_states,), -float("inf")),
            "low": th.full((n_states,), -float("inf")),
            "high": th.full((n_states,), float("inf")),
            # What each member's correction is multiplied by: 0 leaves the prior model as it is
            "gains": th.ones(n_members, 1, 1),
        }.items():
            self.register_buffer(name, buffer)
        self.learning_rate = learning_rate
        self.train()
        self.optimizer = th.optim.Adam(self.correction.parameters(), lr=learning_rate, fused=True)

    def train(self, mode: bool = True) -> "ResidualModel":
        super().train(mode)
        self.prior.eval()
        return self

    @property
    def may_terminate(self) -> bool:
        return self.prior.may_terminate

    def terminal(self, states: th.Tensor) -> th.Tensor:
        return self.prior.terminal(states)

    def observation(self, states: th.Tensor) -> th.Tensor:
        return self.prior.observation(states)

    def state_from_observation(self, observations: th.Tensor) -> th.Tensor:
        return self.prior.state_from_observation(observations)

    def state_difference(self, states: th.Tensor, others: th.Tensor) -> th.Tensor:
        return self.prior.state_difference(states, others)

    def state_add(self, states: th.Tensor, differences: th.Tensor) -> th.Tensor:
        return self.prior.state_add(states, differences)

    @contextmanager
    def compared_with_prior(self) -> Iterator[None]:
        """Within this context the first member is the prior model as it is, and all others are corrected."""
        gains = self.gains.clone()
        self.gains.fill_(1.0)
        self.gains[0] = 0.0
        try:
            yield
        finally:
            self.gains.copy_(gains)

    def _corrections(self, states: th.Tensor, actions: th.Tensor, gains: th.Tensor | float = 1.0) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :param gains: factor of each member, ``(E, 1, 1)``
        :return: corrections of state and reward in the units of :meth:`fit`, ``(B, S + 1)``
        """
        inputs = (th.cat([states, actions], dim=1) - self.input_mean) / self.input_std
        n_rows = inputs.shape[0]
        if not self.training:
            members = self.correction(inputs.expand(self.n_members, *inputs.shape))
            return (gains * members).mean(dim=0)
        n_missing = -n_rows % self.n_members
        if n_missing > 0:
            inputs = th.cat([inputs, inputs[-n_missing:]])
        parts = inputs.reshape(self.n_members, -1, inputs.shape[1])
        corrections = gains * self.correction(parts)
        return corrections.reshape(-1, corrections.shape[2])[:n_rows]

    def _is_corrected(self, n_rows: int) -> th.Tensor:
        """
        :param n_rows: number of rows
        :return: which rows the correction changes at all, ``(B, 1)``
        """
        if not self.training:
            return (self.gains > 0).any().expand(n_rows, 1)
        n_rows_each = -(-n_rows // self.n_members)
        return (self.gains > 0).expand(self.n_members, n_rows_each, 1).reshape(-1, 1)[:n_rows]

    def _bounded(self, states: th.Tensor) -> th.Tensor:
        return th.minimum(th.maximum(states, self.low), self.high)

    def step(self, states: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        corrections = self._corrections(states, actions, self.gains) * self.target_scale
        next_states = self.state_add(self.prior.transition(states, actions), corrections[:, : self.n_states])
        next_states = th.where(self._is_corrected(states.shape[0]), self._bounded(next_states), next_states)
        return next_states, self.prior.reward(states, actions, next_states) + corrections[:, self.n_states :]

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return self.step(states, actions)[0]

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        corrections = self._corrections(states, actions, self.gains) * self.target_scale
        return self.prior.reward(states, actions, next_states) + corrections[:, self.n_states :]

    @th.no_grad()
    def _inputs_and_targets(self, transitions: Transitions) -> tuple[th.Tensor, th.Tensor]:
        """
        :param transitions: recorded steps
        :return: states, ``(B, S)``, and what the prior model misses in state and reward, ``(B, S + 1)``
        """
        states = self.prior.state_from_observation(transitions.observations)
        next_states = self.prior.state_from_observation(transitions.next_observations)
        # What the prior model predicts beyond the range cannot be told from the range's border
        predicted = self._bounded(self.prior.transition(states, transitions.actions))
        missed = self.state_difference(next_states, predicted)
        # The reward is corrected at the state that was reached
        missed_reward = transitions.rewards - self.prior.reward(states, transitions.actions, next_states)
        return states, th.cat([missed, missed_reward], dim=1)

    @th.no_grad()
    def adapt_to(self, transitions: Transitions) -> None:
        self._extend_range(self.prior.state_from_observation(transitions.observations))
        states, targets = self._inputs_and_targets(transitions)
        inputs = th.cat([states, transitions.actions], dim=1)
        self.input_mean.copy_(inputs.mean(dim=0))
        # A dimension that never changes says nothing, and must not be blown up when it does
        std = inputs.std(dim=0)
        self.input_std.copy_(th.where(std > 1e-6 * (1 + inputs.abs().mean(dim=0)), std, 1.0))
        next_states = self.prior.state_from_observation(transitions.next_observations)
        changes = th.cat([self.state_difference(next_states, states), transitions.rewards], dim=1)
        smallest = SMALLEST_TARGET_SCALE * changes.square().mean(dim=0).sqrt() + 1e-8
        self.target_scale.copy_(th.maximum(targets.square().mean(dim=0).sqrt(), smallest))

    @th.no_grad()
    def _extend_range(self, states: th.Tensor) -> None:
        """
        :param states: where the data have been, ``(B, S)``
        """
        self.seen_low.copy_(th.minimum(self.seen_low, states.min(dim=0).values))
        self.seen_high.copy_(th.maximum(self.seen_high, states.max(dim=0).values))
        margin = RANGE_MARGIN * (self.seen_high - self.seen_low)
        self.low.copy_(self.seen_low - margin)
        self.high.copy_(self.seen_high + margin)

    def _loss(self, states: th.Tensor, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        # Huber: a jump of the environment, or of a prior model, must not be all that is fitted
        return F.smooth_l1_loss(self._corrections(states, actions), targets / self.target_scale)

    def fit(self, transitions: Transitions) -> float:
        states, targets = self._inputs_and_targets(transitions)
        self._extend_range(states)
        loss = self._loss(states, transitions.actions, targets)
        value = loss.item()
        # A prior model that overflows is not to be learned from
        if math.isfinite(value):
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return value

    @th.no_grad()
    def validation_error(self, transitions: Transitions) -> float:
        states, targets = self._inputs_and_targets(transitions)
        return self._loss(states, transitions.actions, targets).item()

    def learned_state(self) -> dict[str, Any]:
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("prior.") and name != "gains"}
        return copy.deepcopy(_to_cpu({"model": state, "optimizer": self.optimizer.state_dict()}))

    def load_learned_state(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])


def _to_cpu(value: Any) -> Any:
    """
    :param value: tensors in dictionaries and lists
    :return: the same on the CPU
    """
    if isinstance(value, th.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    return [_to_cpu(item) for item in value] if isinstance(value, list) else value
