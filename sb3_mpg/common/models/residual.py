"""A prior model that is corrected by what was recorded."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import torch as th
from stable_baselines3.common.utils import update_learning_rate
from torch import nn
from torch.nn import functional as F

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.double_precision import InDoublePrecision
from sb3_mpg.common.models.checking.prediction_errors import Windows
from sb3_mpg.common.models.trainable import TrainableModel, Transitions
from sb3_mpg.common.torch_layers import n_with_waves, with_waves
from sb3_mpg.common.checks import is_whole

# Least squares with fewer rows for each factor than this fit the noise
MIN_ROWS_PER_FACTOR = 5
# Targets of this size, in units of their scale, have outgrown it: networks whose steps are bounded take too long to get there
OUTGROWN = 10.0
# A dimension that the prior model predicts to less than this share of its change needs no finer correction
SMALLEST_TARGET_SCALE = 1e-3
# How far predictions may leave the range of the data, in units of its width; and those of the prior model, which are corrected
RANGE_MARGIN = 0.5
PRIOR_MARGIN = 10.0
# Of the running average of the networks' parameters
AVERAGING_RATE = 0.02
# At so many recorded steps it is looked up whether what was learned was learned of the same prior model
N_PROBES = 16
# Of the least squares, relative to the squares of each regressor: enough for regressors that depend on each other
RIDGE = 1e-8


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

    .. math:: s' = f(s, a) + \Delta_s(s, a), \quad r = r(s, a, s') + \Delta_r(s, a, s').

    What is simple is solved for by least squares, as soon as there are data enough: a part of :math:`\Delta_s` that is linear
    in :math:`(s, a)` (wrong gains and signs, constant offsets), and one of :math:`\Delta_r` that is a weighted sum of the
    squares of :math:`s, a, s'` (wrong weights of a quadratic cost). Near an optimum the gradient of a reward is small beside
    the rewards themselves, and a network alone, whose error is a fixed share of what it is fitted to, would bury it.

    A small ensemble of networks then learns what is left; their output is zero at first. Their inputs are the scaled states
    and actions with sines and cosines of them, without which small networks are slow to learn what changes along a road or
    through a turn. Predictions come from a running average of the networks' parameters, which the noise of the optimizer
    does not reach.

    Inputs and targets are scaled by the statistics of the data. Differences between states are the prior model's
    (``state_difference``, ``state_add``). Predicted states are kept within the range of the data and a margin: a rollout that
    runs further is a guess, and one that explodes would take the gradient with it. Dimensions of the state that cannot be
    seen in observations are left to the prior model, but those without which recorded rollouts are predicted better: these
    are read anew from what would be observed in each step, as they are when the correction is fitted. What the prior model
    misses where it says that an episode terminates, such as a penalty, is learned apart.

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
    reached_low: th.Tensor
    reached_high: th.Tensor
    low: th.Tensor
    high: th.Tensor
    middle: th.Tensor
    is_observed: th.Tensor
    is_carried: th.Tensor
    linear: th.Tensor
    quadratic: th.Tensor
    end_reward: th.Tensor
    probes: th.Tensor
    probed: th.Tensor
    n_rows: th.Tensor
    n_fits: th.Tensor
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
        if not is_architecture(net_arch):
            raise ValueError(
                f"`net_arch` of the correction lists the sizes of its hidden layers, as in (64, 64), got {net_arch!r}."
            )
        self.prior = prior
        self.n_states, self.n_members = n_states, n_members
        n_inputs = n_states + n_actions
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([n_with_waves(n_inputs), *net_arch]):
            layers += [EnsembleLinear(n_members, n_in, n_out), nn.ELU()]
        head = EnsembleLinear(n_members, net_arch[-1], n_states + 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        # The one that is fitted, and its running average, which predicts
        self.fitted = nn.Sequential(*layers, head)
        self.correction = copy.deepcopy(self.fitted).requires_grad_(False)
        for name, buffer in {
            "input_mean": th.zeros(n_inputs),
            "input_std": th.ones(n_inputs),
            "target_scale": th.ones(n_states + 1),
            "seen_low": th.full((n_states,), float("inf")),
            "seen_high": th.full((n_states,), -float("inf")),
            "reached_low": th.full((n_states,), float("inf")),
            "reached_high": th.full((n_states,), -float("inf")),
            "low": th.full((n_states,), -float("inf")),
            "high": th.full((n_states,), float("inf")),
            "middle": th.zeros(n_states),
            "is_observed": th.ones(n_states, dtype=th.bool),
            # The others are not observed, and read anew in each step
            "is_carried": th.ones(n_states, dtype=th.bool),
            "linear": th.zeros(1 + n_inputs, n_states),
            "quadratic": th.zeros(1 + 2 * (n_inputs + n_states), 1),
            # What the prior model misses of the reward where it terminates
            "end_reward": th.zeros(1),
            # Recorded states and actions, and what the prior model said of them
            "probes": th.zeros(N_PROBES, n_inputs),
            "probed": th.zeros(N_PROBES, n_states + 1),
            # Of what scales and least squares are from
            "n_rows": th.zeros((), dtype=th.int64),
            "n_fits": th.zeros((), dtype=th.int64),
            # What each member's correction is multiplied by: 0 leaves the prior model as it is
            "gains": th.ones(n_members, 1, 1),
        }.items():
            self.register_buffer(name, buffer)
        # Whether anything is read anew: a plain attribute, so that nothing is read, and compiled, for no purpose
        self.reads_anew = False
        self.learning_rate = learning_rate
        self.train()
        self.optimizer = th.optim.Adam(self.fitted.parameters(), lr=learning_rate, fused=True)

    def follow(self) -> None:
        self.reads_anew = not bool(self.is_carried.all())

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
    def _with_gains(self, first: float, others: float) -> Iterator[None]:
        """
        :param first: what the correction of the first member is multiplied by within this context
        :param others: the same of all others
        """
        gains = self.gains.clone()
        self.gains.fill_(others)
        self.gains[0] = first
        try:
            yield
        finally:
            self.gains.copy_(gains)

    def compared_with_prior(self) -> AbstractContextManager[None]:
        """
        :return: within this context the first member is the prior model as it is, and all others are corrected
        """
        return self._with_gains(0.0, 1.0)

    def _scaled(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :return: both in units of their spread in the data, ``(B, S + A)``
        """
        return (th.cat([states, actions], dim=1) - self.input_mean) / self.input_std

    def _ensemble(self, networks: nn.Module, scaled: th.Tensor) -> th.Tensor:
        """
        :param networks: ``fitted`` or ``correction``
        :param scaled: of :meth:`_scaled`, ``(B, S + A)``
        :return: what they say of state and reward: of each row its member, in evaluation mode the mean, ``(B, S + 1)``
        """
        inputs = with_waves(scaled)
        n_rows = inputs.shape[0]
        if not self.training:
            return networks(inputs.expand(self.n_members, *inputs.shape)).mean(dim=0)
        outputs = networks(self.even_rows(inputs).reshape(self.n_members, -1, inputs.shape[1]))
        return outputs.reshape(-1, outputs.shape[2])[:n_rows]

    def _gains_of_rows(self, n_rows: int) -> th.Tensor:
        """
        :param n_rows: number of rows
        :return: what the correction of each row is multiplied by, ``(B, 1)``
        """
        if not self.training:
            return self.gains.mean().expand(n_rows, 1)
        n_rows_each = -(-n_rows // self.n_members)
        return self.gains.expand(self.n_members, n_rows_each, 1).reshape(-1, 1)[:n_rows]

    def _bounded(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :return: the same, within the range of the data and a margin, ``(B, S)``
        """
        if type(self.prior).state_difference is not PriorModel.state_difference:
            # A state that wraps may be within the range, some turns away
            middle = self.middle.expand_as(states)
            wrapped = self.state_add(middle, self.state_difference(states, middle))
            states = th.where((states < self.low) | (states > self.high), wrapped, states)
        return th.minimum(th.maximum(states, self.low), self.high)

    def _roughly_bounded(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: that the prior model predicts, ``(B, S)``
        :return: the same, but those so far from the data that they would be all that is fitted, ``(B, S)``
        """
        more = (PRIOR_MARGIN - RANGE_MARGIN) / (1 + 2 * RANGE_MARGIN) * (self.high - self.low)
        return th.minimum(th.maximum(states, self.low - more), self.high + more)

    def _remembered(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :return: the same, but what is not carried along is read from what would be observed, ``(B, S)``
        """
        if not self.reads_anew:
            return states
        return th.where(self.is_carried, states, self.state_from_observation(self.observation(states)))

    def _squares(self, scaled: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        """
        :param scaled: of :meth:`_scaled`, ``(B, S + A)``
        :param next_states: ``(B, S)``
        :return: states, actions, next states and their squares, ``(B, 2 (S + A + S))``
        """
        next_scaled = (self._bounded(next_states) - self.input_mean[: self.n_states]) / self.input_std[: self.n_states]
        values = th.cat([scaled, next_scaled], dim=1)
        return th.cat([values, values.square()], dim=1)

    def _corrected_reward(
        self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor, scaled: th.Tensor, learned: th.Tensor
    ) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :param next_states: ``(B, S)``
        :param scaled: of :meth:`_scaled`, ``(B, S + A)``
        :param learned: what the networks say, in the units of the environment, ``(B, S + 1)``
        :return: ``(B, 1)``
        """
        changes = learned[:, self.n_states :] + self._solved_reward(scaled, next_states)
        return self.prior.reward(states, actions, next_states) + self._gains_of_rows(states.shape[0]) * changes

    def _solved_reward(self, scaled: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        """
        :param scaled: of :meth:`_scaled`, ``(B, S + A)``
        :param next_states: ``(B, S)``
        :return: what was solved for of what the prior model misses in the reward, ``(B, 1)``
        """
        solved = _affine(self.quadratic, self._squares(scaled, next_states))
        if self.may_terminate:
            solved = solved + th.where(self.terminal(next_states), self.end_reward, 0.0)
        return solved

    def step(self, states: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        scaled = self._scaled(states, actions)
        gains = self._gains_of_rows(states.shape[0])
        learned = self._ensemble(self.correction, scaled) * self.target_scale
        changes = gains * (learned[:, : self.n_states] + _affine(self.linear, scaled))
        predicted = self.prior.transition(states, actions)
        # As it is fitted
        corrected = self._remembered(self._bounded(self.state_add(self._roughly_bounded(predicted), changes)))
        next_states = th.where(gains > 0, corrected, predicted)
        return next_states, self._corrected_reward(states, actions, next_states, scaled, learned)

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return self.step(states, actions)[0]

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        scaled = self._scaled(states, actions)
        learned = self._ensemble(self.correction, scaled) * self.target_scale
        return self._corrected_reward(states, actions, next_states, scaled, learned)

    def _missed_by_prior(self, transitions: Transitions) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param transitions: recorded steps
        :return: scaled states and actions, ``(B, S + A)``, next states, ``(B, S)``, and what the prior model misses in state
            and reward, ``(B, S + 1)``
        """
        states = self.prior.state_from_observation(transitions.observations)
        next_states = self.prior.state_from_observation(transitions.next_observations)
        predicted = self._roughly_bounded(self.prior.transition(states, transitions.actions))
        missed = th.where(self.is_observed, self.state_difference(next_states, predicted), 0.0)
        # The reward is corrected at the state that was reached
        missed_reward = transitions.rewards - self.prior.reward(states, transitions.actions, next_states)
        return self._scaled(states, transitions.actions), next_states, th.cat([missed, missed_reward], dim=1)

    @th.no_grad()
    def _inputs_and_targets(self, transitions: Transitions) -> tuple[th.Tensor, th.Tensor]:
        """
        :param transitions: recorded steps
        :return: what the networks see, ``(B, S + A)``, and what is left for them, in units of its scale, ``(B, S + 1)``
        """
        scaled, next_states, missed = self._missed_by_prior(transitions)
        return scaled, self._left(scaled, next_states, missed) / self.target_scale

    def _left(self, scaled: th.Tensor, next_states: th.Tensor, missed: th.Tensor) -> th.Tensor:
        """
        See :meth:`_missed_by_prior` for the parameters.

        :return: what is missed by the prior model and by what was solved for, ``(B, S + 1)``
        """
        solved = [_affine(self.linear, scaled), self._solved_reward(scaled, next_states)]
        return missed - th.cat(solved, dim=1)

    @th.no_grad()
    def adapt_to(self, transitions: Transitions) -> None:
        # One that is not finite would make the scales so, for good
        is_finite = th.stack([th.isfinite(tensor.flatten(1)).all(dim=1) for tensor in transitions]).all(dim=0)
        if is_finite.any():
            transitions = Transitions(*(tensor[is_finite] for tensor in transitions))
        states = self.prior.state_from_observation(transitions.observations)
        inputs = th.cat([states, transitions.actions], dim=1)
        self.probes.copy_(inputs[th.arange(N_PROBES, device=inputs.device) % len(inputs)])
        self.probed.copy_(self._prior_answers(self.probes))
        self.is_observed.copy_(self._are_observed(states, transitions.actions))
        self._carry()
        self._extend_range(transitions)
        self.input_mean.copy_(inputs.mean(dim=0))
        # A dimension that never changes says nothing, and must not be blown up when it does
        std = inputs.std(dim=0) if len(inputs) > 1 else th.zeros_like(self.input_std)
        self.input_std.copy_(th.where(std > 1e-6 * (1 + inputs.abs().mean(dim=0)), std, 1.0))
        # Nor does one that is only guessed
        self.input_std[: self.n_states][~self.is_observed] = float("inf")

        self.linear.zero_()
        self.quadratic.zero_()
        self.end_reward.zero_()
        scaled, next_states, missed = self._missed_by_prior(transitions)
        # A prior model may overflow in some states
        finite = th.isfinite(missed).all(dim=1)
        scaled, next_states, missed, states = (tensor[finite] for tensor in (scaled, next_states, missed, states))
        self.n_rows.fill_(len(missed))
        # A penalty is none of the factors
        ends = self.terminal(next_states).squeeze(1) if self.may_terminate else th.zeros_like(missed[:, 0], dtype=th.bool)
        squares = self._squares(scaled, next_states)
        if self._is_enough_for(self.linear, len(missed)):
            self.linear.copy_(_least_squares(scaled, missed[:, : self.n_states]))
        if self._is_enough_for(self.quadratic, int((~ends).sum())):
            self.quadratic.copy_(_least_squares(squares[~ends], missed[~ends, self.n_states :]))
        if ends.any():
            self.end_reward.copy_((missed[ends, self.n_states :] - _affine(self.quadratic, squares[ends])).mean(dim=0))
        if len(missed) > 0:
            left = self._left(scaled, next_states, missed)
            changes = th.cat([self.state_difference(next_states, states), transitions.rewards[finite]], dim=1)
            smallest = SMALLEST_TARGET_SCALE * changes.square().mean(dim=0).sqrt() + 1e-8
            self.target_scale.copy_(th.maximum(left.square().mean(dim=0).sqrt(), smallest))

        # What the networks have learned was in other units, and of what other factors left
        for networks in (self.fitted, self.correction):
            for parameter in networks[-1].parameters():
                parameter.zero_()
        self.optimizer.state.clear()
        self.n_fits.zero_()

    @th.no_grad()
    def adapt_to_rollouts(self, windows: Windows) -> None:
        self._carry()
        hidden = th.nonzero(~self.is_observed).flatten().tolist()
        if len(hidden) in (0, self.n_states):
            return  # there is nothing to read, or nothing to judge by
        was_training = self.training
        self.eval()
        try:
            # Where the correction only judges the prior model, too
            with self._with_gains(1.0, 1.0):
                self._carry(self._left_behind(hidden, windows))
        finally:
            self.train(was_training)

    def _carry(self, left_behind: Sequence[int] = ()) -> None:
        """
        :param left_behind: the dimensions that are read anew in each step; all others are carried along
        """
        self.is_carried.fill_(True)
        self.is_carried[list(left_behind)] = False
        self.follow()

    def _left_behind(self, hidden: list[int], windows: Windows) -> list[int]:
        """
        :param hidden: the dimensions that are not observed
        :param windows: recorded steps, and what followed them
        :return: those without which rollouts come closer to what happened: what helps most alone is left behind first, and
            all of them together are tried, too
        """

        errors: dict[frozenset[int], float] = {}

        def error_without(dimensions: list[int]) -> float:
            chosen = frozenset(dimensions)
            if chosen not in errors:
                self._carry(dimensions)
                errors[chosen] = self._rollout_error(windows)
            return errors[chosen]

        left_behind: list[int] = []
        least = error_without(left_behind)
        errors_alone = {dimension: error_without([dimension]) for dimension in hidden}
        for dimension in sorted(hidden, key=lambda dimension: errors_alone[dimension]):
            error = error_without([*left_behind, dimension])
            if error < least:
                left_behind, least = [*left_behind, dimension], error
        return hidden if error_without(hidden) < least else left_behind

    def _rollout_error(self, windows: Windows) -> float:
        """
        :param windows: recorded steps, and what followed them
        :return: mean squared error of the observed dimensions in rollouts along the recorded actions, in units of their
            variance in the data, of which each error is at most 1: a few that explode must not decide
        """
        states = self.state_from_observation(windows.observations)
        total = 0.0
        for step, actions in enumerate(windows.actions):
            states = self.transition(states, actions)
            actual = self.state_from_observation(windows.next_observations[step])
            missed = self.state_difference(actual, states) / self.input_std[: self.n_states]
            errors = missed[:, self.is_observed].square().nan_to_num(nan=1.0).clamp(max=1.0).mean(dim=1)
            total += float(errors[windows.lengths > step].sum())
        return total / float(windows.lengths.sum())

    def _are_observed(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :return: of which dimensions observations tell, bool ``(S,)``: the others are not what was predicted when they are read
            from what would be observed
        """
        predicted = self.prior.transition(states, actions)
        gaps = self.state_difference(self.state_from_observation(self.observation(predicted)), predicted).abs()
        is_same = gaps <= 1e-3 * (1 + predicted.abs())
        is_finite = th.isfinite(gaps)
        return 2 * (is_same & is_finite).sum(dim=0) >= is_finite.sum(dim=0)

    def _prior_answers(self, probes: th.Tensor) -> th.Tensor:
        """
        :param probes: states and actions, ``(N, S + A)``
        :return: the next states and rewards of the prior model, ``(N, S + 1)``
        """
        states, actions = probes[:, : self.n_states], probes[:, self.n_states :]
        next_states = self.prior.transition(states, actions)
        return th.cat([next_states, self.prior.reward(states, actions, next_states)], dim=1)

    @staticmethod
    def _is_enough_for(factors: th.Tensor, n_rows: int) -> bool:
        """
        :param factors: of least squares, ``(n_factors, n_outputs)``
        :param n_rows: number of recorded steps
        :return: whether they can be solved for
        """
        return n_rows >= MIN_ROWS_PER_FACTOR * len(factors)

    @th.no_grad()
    def is_outgrown(self, transitions: Transitions) -> bool:
        _, targets = self._inputs_and_targets(transitions)
        targets = targets[th.isfinite(targets).all(dim=1)]
        n_before, n_now = int(self.n_rows), len(targets)
        could_solve_more = any(
            self._is_enough_for(factors, n_now) and not self._is_enough_for(factors, n_before)
            for factors in (self.linear, self.quadratic)
        )
        return could_solve_more or (n_now > 0 and bool((targets.square().mean(dim=0).sqrt() > OUTGROWN).any()))

    @th.no_grad()
    def _extend_range(self, transitions: Transitions) -> None:
        """
        :param transitions: where the data have been
        """
        for observations, low, high in (
            (transitions.observations, self.seen_low, self.seen_high),
            (transitions.next_observations, self.reached_low, self.reached_high),
        ):
            states = self.prior.state_from_observation(observations)
            is_finite = th.isfinite(states)
            low.copy_(th.minimum(low, th.where(is_finite, states, th.inf).amin(dim=0)))
            high.copy_(th.maximum(high, th.where(is_finite, states, -th.inf).amax(dim=0)))
        # Where an episode ended something was reached from which nobody went on: there is no margin around it
        margin = RANGE_MARGIN * (self.seen_high - self.seen_low)
        low = th.minimum(self.seen_low - margin, self.reached_low)
        high = th.maximum(self.seen_high + margin, self.reached_high)
        self.low.copy_(th.where(self.is_observed, low, -float("inf")))
        self.high.copy_(th.where(self.is_observed, high, float("inf")))
        self.middle.copy_(0.5 * (self.seen_low + self.seen_high))

    def fit(self, transitions: Transitions) -> float:
        self._extend_range(transitions)
        scaled, targets = self._inputs_and_targets(transitions)
        predictions = self._ensemble(self.fitted, scaled.nan_to_num(posinf=0.0, neginf=0.0))
        # Nothing is to be learned from what is not finite
        is_finite = th.isfinite(scaled).all(dim=1, keepdim=True) & th.isfinite(targets)
        loss = _huber_loss(predictions, th.where(is_finite, targets, predictions.detach()))
        value = loss.item()
        if math.isfinite(value):
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.n_fits += 1
            with th.no_grad():
                # At first the mean of all, so that the average does not remember the start
                rate = max(AVERAGING_RATE, 1 / int(self.n_fits))
                th._foreach_lerp_(list(self.correction.parameters()), list(self.fitted.parameters()), rate)
        return value

    @th.no_grad()
    def validation_error(self, transitions: Transitions) -> float:
        scaled, targets = self._inputs_and_targets(transitions)
        return _huber_loss(self._ensemble(self.correction, scaled), targets).item()

    @th.no_grad()
    def improves_on_prior(self, transitions: Transitions) -> bool:
        """
        :param transitions: recorded steps that were not fitted
        :return: whether they are predicted better with the correction than without it
        """
        _, _, missed = self._missed_by_prior(transitions)
        missed = missed / self.target_scale
        return self.validation_error(transitions) < _huber_loss(th.zeros_like(missed), missed).item()

    def learned_state(self) -> dict[str, Any]:
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("prior.") and name != "gains"}
        return copy.deepcopy(_to_cpu({"model": state, "optimizer": self.optimizer.state_dict()}))

    @th.no_grad()
    def load_learned_state(self, state: dict[str, Any]) -> bool:
        own, saved = self.state_dict(), state["model"]
        if any(name not in own or own[name].shape != tensor.shape for name, tensor in saved.items()):
            return False
        answers = self._prior_answers(saved["probes"].to(self.probes.device)).cpu()
        if int(saved["n_rows"]) > 0 and not th.allclose(answers, saved["probed"].cpu(), rtol=1e-3, atol=1e-5, equal_nan=True):
            return False
        self.load_state_dict(saved, strict=False)
        self.follow()
        self.optimizer.load_state_dict(state["optimizer"])
        # Which may have been set anew
        update_learning_rate(self.optimizer, self.learning_rate)
        return True


def is_architecture(net_arch: Any) -> bool:
    """
    :param net_arch: sizes of hidden layers
    :return: whether it is a list of one or more of them
    """
    return isinstance(net_arch, (tuple, list)) and len(net_arch) > 0 and all(is_whole(size) and size > 0 for size in net_arch)


def _affine(factors: th.Tensor, inputs: th.Tensor) -> th.Tensor:
    """
    :param factors: of :func:`_least_squares`, ``(1 + n_inputs, n_outputs)``
    :param inputs: ``(B, n_inputs)``
    :return: ``(B, n_outputs)``
    """
    return factors[0] + inputs @ factors[1:]


def _least_squares(inputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """
    :param inputs: ``(B, n_inputs)``
    :param targets: ``(B, n_outputs)``
    :return: the constants, and the factors of the inputs, ``(1 + n_inputs, n_outputs)``
    """
    regressors = th.cat([th.ones_like(inputs[:, :1]), inputs], dim=1).double()
    gram = regressors.T @ regressors
    gram.diagonal().mul_(1 + RIDGE).add_(1e-12)
    return th.linalg.solve(gram, regressors.T @ targets.double()).to(inputs.dtype)


def _huber_loss(outputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """
    A jump of the environment, or of a prior model, must not be all that is fitted; and where a prior model overflows, nothing
    can be.

    :param outputs: ``(B, n_outputs)``
    :param targets: ``(B, n_outputs)``
    :return: the mean over the rows whose targets are finite, NaN if there is none
    """
    loss = F.smooth_l1_loss(outputs, targets)
    if th.isfinite(loss):
        return loss
    finite = th.isfinite(targets).all(dim=1)
    return F.smooth_l1_loss(outputs[finite], targets[finite])


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


def name_of(model: PriorModel) -> str:
    """
    :param model: a model, or what the library made of it
    :return: what the user calls it
    """
    if isinstance(model, ResidualModel):
        model = model.prior
    return type(model.model if isinstance(model, InDoublePrecision) else model).__name__
