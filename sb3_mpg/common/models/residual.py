"""A prior model that is corrected by recorded transitions."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.utils import update_learning_rate
from torch.nn import functional as F

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.ensemble import NetworkEnsemble, is_architecture, values_of_rows
from sb3_mpg.common.models.fingerprint import Fingerprint
from sb3_mpg.common.models.hidden_states import HiddenStates, clipped_rollout_error
from sb3_mpg.common.models.least_squares import LeastSquares, QuadraticReward
from sb3_mpg.common.models.scaling import Standardizer
from sb3_mpg.common.models.state_range import StateRange
from sb3_mpg.common.models.trainable import CorrectedModel, StateDescription, copy_to_cpu
from sb3_mpg.common.models.windows import Transitions, Windows

# Targets that are this many times their scale need new scales: networks whose steps are bounded take too long to get there
LARGEST_TARGET = 10.0
# A dimension whose prediction error is a smaller share of its change needs no finer correction
SMALLEST_TARGET_SCALE = 1e-3


class ResidualModel(CorrectedModel):
    r"""
    A prior model plus a correction of its next state and of its reward, fitted to recorded transitions:

    .. math:: s' = f(s, a) + \Delta_s(s, a), \quad r = r(s, a, s') + \Delta_r(s, a, s').

    Each correction has two parts. The first is solved for by least squares, as soon as there are enough data: a part of
    :math:`\Delta_s` that is linear in :math:`(s, a)` (wrong gains and signs, constant offsets), and a part of
    :math:`\Delta_r` that is a weighted sum of the squares of :math:`s, a, s'` (wrong weights of a quadratic cost). Near an
    optimum the gradient of a reward is small compared with the reward, and the error of a network, roughly proportional to
    its target, would exceed that gradient. A reward or penalty for the end of an episode is solved for separately.

    The second part is a small ensemble of networks, which is fitted to what least squares leave over (see
    ``NetworkEnsemble``). Inputs and targets are scaled by the statistics of the data. Differences between states are those
    of the prior model (``state_difference``, ``state_add``).

    Predicted states are kept within the range of the data and a margin (see ``StateRange``). Hidden dimensions of the state
    are predicted by the prior model, but those that make rollouts worse are re-encoded (see ``HiddenStates``).

    :param prior: the prior model
    :param n_states: number of dimensions of its state
    :param n_actions: number of dimensions of the actions
    :param n_members: number of networks; the difference of two shows where the data do not determine the correction
    :param net_arch: sizes of the hidden layers of each network, with ELU
    :param learning_rate: learning rate of Adam
    """

    target_scale: th.Tensor
    n_rows: th.Tensor
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
        super().__init__(prior)
        if n_members < 2:
            raise ValueError(
                f"The correction is judged by comparing networks, so `n_members` must be 2 or more, got {n_members}."
            )
        if not is_architecture(net_arch):
            raise ValueError(
                f"`net_arch` of the correction lists the sizes of its hidden layers, as in (64, 64), got {net_arch!r}."
            )
        self.n_states, self.n_members = n_states, n_members
        n_inputs = n_states + n_actions
        self.standardizer = Standardizer(n_inputs)
        self.networks = NetworkEnsemble(n_members, n_inputs, n_states + 1, net_arch, learning_rate)
        self.linear = LeastSquares(n_inputs, n_states)
        self.quadratic_reward = QuadraticReward(n_inputs + n_states)
        self.range = StateRange(n_states)
        self.hidden = HiddenStates(n_states)
        self.fingerprint = Fingerprint(n_states, n_actions)
        for name, buffer in {
            "target_scale": th.ones(n_states + 1),
            # Number of transitions that scales and least squares are from
            "n_rows": th.zeros((), dtype=th.int64),
            # Factor of each member's correction: 0 is the prior model as it is
            "gains": th.ones(n_members, 1, 1),
        }.items():
            self.register_buffer(name, buffer)

    def refresh(self) -> None:
        self.hidden.refresh()

    def use_correction(self, is_used: bool) -> None:
        super().use_correction(is_used)
        self.gains.fill_(float(is_used))

    @contextmanager
    def _with_gains(self, first: float, others: float) -> Iterator[None]:
        """
        :param first: factor of the first member's correction within this context
        :param others: factor of the corrections of all others
        """
        gains = self.gains.clone()
        self.gains.fill_(others)
        self.gains[0] = first
        try:
            yield
        finally:
            self.gains.copy_(gains)

    @contextmanager
    def compared_with_prior(self) -> Iterator[None]:
        with self.using_members("dealt"), self._with_gains(0.0, 1.0):
            yield

    def describe_states(self) -> StateDescription:
        return StateDescription(*((~mask).cpu().numpy() for mask in (self.hidden.is_observed, self.hidden.is_kept)))

    def _scaled(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :return: both, standardised by the statistics of the data, ``(B, S + A)``
        """
        return self.standardizer(th.cat([states, actions], dim=1))

    def _reward_inputs(self, scaled: th.Tensor, next_states: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        """
        :param scaled: of :meth:`_scaled`, ``(B, S + A)``
        :param next_states: ``(B, S)``
        :return: inputs of ``QuadraticReward``: scaled states, actions and next states, ``(B, S + A + S)``; and whether the
            next states are terminal, bool ``(B, 1)``
        """
        mean, std = self.standardizer.mean[: self.n_states], self.standardizer.std[: self.n_states]
        next_scaled = (self.range.clip(self.prior, next_states) - mean) / std
        return th.cat([scaled, next_scaled], dim=1), self.terminal(next_states) if self.may_terminate else None

    def _network_outputs(self, scaled: th.Tensor) -> th.Tensor:
        """
        :param scaled: of :meth:`_scaled`, ``(B, S + A)``
        :return: the networks' corrections of next states and rewards, in the units of the environment, ``(B, S + 1)``
        """
        return self.networks(scaled, self.members) * self.target_scale

    def _corrected_reward(
        self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor, scaled: th.Tensor, learned: th.Tensor
    ) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :param next_states: ``(B, S)``
        :param scaled: of :meth:`_scaled`, ``(B, S + A)``
        :param learned: of :meth:`_network_outputs`, ``(B, S + 1)``
        :return: ``(B, 1)``
        """
        correction = learned[:, self.n_states :] + self.quadratic_reward(*self._reward_inputs(scaled, next_states))
        gains = values_of_rows(self.gains, states.shape[0], self.members)
        return self.prior.reward(states, actions, next_states) + gains * correction

    def step(self, states: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        scaled = self._scaled(states, actions)
        gains = values_of_rows(self.gains, states.shape[0], self.members)
        learned = self._network_outputs(scaled)
        correction = gains * (learned[:, : self.n_states] + self.linear(scaled))
        predicted = self.prior.transition(states, actions)
        # Clip the prediction as for the targets of the fit
        corrected = self.range.clip(self.prior, self.state_add(self.range.clip_prior(predicted), correction))
        corrected = self.hidden.re_encode(self.prior, corrected)
        # Without correction, the prior model is neither clipped nor re-encoded
        next_states = th.where(gains > 0, corrected, predicted)
        return next_states, self._corrected_reward(states, actions, next_states, scaled, learned)

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return self.step(states, actions)[0]

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        scaled = self._scaled(states, actions)
        return self._corrected_reward(states, actions, next_states, scaled, self._network_outputs(scaled))

    def _missed_by_prior(self, transitions: Transitions) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param transitions: recorded transitions
        :return: scaled states and actions, ``(B, S + A)``; next states, ``(B, S)``; the differences of recorded next states
            and rewards to the predictions of the prior model, ``(B, S + 1)``
        """
        states = self.prior.state_from_observation(transitions.observations)
        next_states = self.prior.state_from_observation(transitions.next_observations)
        predicted = self.range.clip_prior(self.prior.transition(states, transitions.actions))
        missed = th.where(self.hidden.is_observed, self.state_difference(next_states, predicted), 0.0)
        # The reward is corrected at the recorded next state
        missed_reward = transitions.rewards - self.prior.reward(states, transitions.actions, next_states)
        return self._scaled(states, transitions.actions), next_states, th.cat([missed, missed_reward], dim=1)

    def _missed_by_least_squares(self, scaled: th.Tensor, next_states: th.Tensor, missed: th.Tensor) -> th.Tensor:
        """
        :param scaled: of :meth:`_missed_by_prior`, ``(B, S + A)``
        :param next_states: of :meth:`_missed_by_prior`, ``(B, S)``
        :param missed: of :meth:`_missed_by_prior`, ``(B, S + 1)``
        :return: residuals of least squares, ``(B, S + 1)``
        """
        solved = [self.linear(scaled), self.quadratic_reward(*self._reward_inputs(scaled, next_states))]
        return missed - th.cat(solved, dim=1)

    @th.no_grad()
    def _inputs_and_targets(self, transitions: Transitions) -> tuple[th.Tensor, th.Tensor]:
        """
        :param transitions: recorded transitions
        :return: inputs of the networks, ``(B, S + A)``, and their scaled targets, ``(B, S + 1)``
        """
        scaled, next_states, missed = self._missed_by_prior(transitions)
        return scaled, self._missed_by_least_squares(scaled, next_states, missed) / self.target_scale

    @th.no_grad()
    def rescale(self, transitions: Transitions) -> None:
        # A single value that is not finite would make the scales useless for good
        is_finite = th.stack([th.isfinite(tensor.flatten(1)).all(dim=1) for tensor in transitions]).all(dim=0)
        if is_finite.any():
            transitions = Transitions(*(tensor[is_finite] for tensor in transitions))
        states = self.prior.state_from_observation(transitions.observations)
        self.fingerprint.take(self.prior, states, transitions.actions)
        self.hidden.find(self.prior, states, transitions.actions)
        self.range.extend(self.prior, transitions, self.hidden.is_observed)
        self.standardizer.fit(th.cat([states, transitions.actions], dim=1))
        # Hidden dimensions are only guessed: they are no inputs of the correction
        self.standardizer.std[: self.n_states][~self.hidden.is_observed] = float("inf")

        scaled, next_states, missed = self._missed_by_prior(transitions)
        # The prior model may overflow in some states
        finite = th.isfinite(missed).all(dim=1)
        scaled, next_states, missed, states = (tensor[finite] for tensor in (scaled, next_states, missed, states))
        self.n_rows.fill_(len(missed))
        self.linear.solve(scaled, missed[:, : self.n_states])
        values, is_terminal = self._reward_inputs(scaled, next_states)
        self.quadratic_reward.solve(values, missed[:, self.n_states :], is_terminal)
        if len(missed) > 0:
            targets = self._missed_by_least_squares(scaled, next_states, missed)
            changes = th.cat([self.state_difference(next_states, states), transitions.rewards[finite]], dim=1)
            smallest = SMALLEST_TARGET_SCALE * changes.square().mean(dim=0).sqrt() + 1e-8
            self.target_scale.copy_(th.maximum(targets.square().mean(dim=0).sqrt(), smallest))
        # The targets of the networks have other units and other least squares now
        self.networks.reset_outputs()

    @th.no_grad()
    def needs_rescaling(self, transitions: Transitions) -> bool:
        _, targets = self._inputs_and_targets(transitions)
        targets = targets[th.isfinite(targets).all(dim=1)]
        n_before, n_now = int(self.n_rows), len(targets)
        could_solve_more = any(
            solved.can_be_solved(n_now) and not solved.can_be_solved(n_before)
            for solved in (self.linear, self.quadratic_reward.quadratic)
        )
        return could_solve_more or (n_now > 0 and bool((targets.square().mean(dim=0).sqrt() > LARGEST_TARGET).any()))

    @th.no_grad()
    def tune_on_rollouts(self, windows: Windows) -> None:
        scales = self.standardizer.std[: self.n_states]
        # Also where the correction is only compared with the prior model
        with self.using_members("mean"), self._with_gains(1.0, 1.0):
            self.hidden.choose(lambda: clipped_rollout_error(self, windows, self.hidden.is_observed, scales))

    def fit(self, transitions: Transitions) -> float:
        self.range.extend(self.prior, transitions, self.hidden.is_observed)
        scaled, targets = self._inputs_and_targets(transitions)
        predictions = self.networks(scaled.nan_to_num(posinf=0.0, neginf=0.0), "dealt", is_fitting=True)
        # Values that are not finite have no loss
        is_finite = th.isfinite(scaled).all(dim=1, keepdim=True) & th.isfinite(targets)
        loss = huber_loss(predictions, th.where(is_finite, targets, predictions.detach()))
        value = loss.item()
        if math.isfinite(value):
            self.networks.descend(loss)
        return value

    @th.no_grad()
    def validation_error(self, transitions: Transitions) -> float:
        scaled, targets = self._inputs_and_targets(transitions)
        return huber_loss(self.networks(scaled, "dealt"), targets).item()

    @th.no_grad()
    def improves_on_prior(self, transitions: Transitions) -> bool:
        _, _, missed = self._missed_by_prior(transitions)
        missed = missed / self.target_scale
        return self.validation_error(transitions) < huber_loss(th.zeros_like(missed), missed).item()

    def _own_state(self) -> dict[str, th.Tensor]:
        """
        :return: the state dictionary without the prior model, which is the user's, and without how the correction is used
        """
        state = self.state_dict()
        return {name: value for name, value in state.items() if not name.startswith("prior.") and name != "gains"}

    def learned_state(self) -> dict[str, Any]:
        return copy_to_cpu({"model": self._own_state(), "optimizer": self.networks.optimizer.state_dict()})

    @th.no_grad()
    def load_learned_state(self, state: dict[str, Any]) -> bool:
        own, saved = self._own_state(), state["model"]
        if own.keys() != saved.keys() or any(own[name].shape != tensor.shape for name, tensor in saved.items()):
            return False
        prefix = "fingerprint."
        fingerprint = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
        if int(saved["n_rows"]) > 0 and not Fingerprint.matches(self.prior, fingerprint, self.gains.device):
            return False
        self.load_state_dict(saved, strict=False)
        self.refresh()
        # torch would share the tensors of the optimizer with the state
        self.networks.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        # The saved learning rate may have been replaced
        update_learning_rate(self.networks.optimizer, self.networks.learning_rate)
        return True


def huber_loss(outputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """
    The Huber loss, so that a jump of the environment or of a prior model does not dominate the fit.

    :param outputs: ``(B, n_outputs)``
    :param targets: ``(B, n_outputs)``
    :return: the mean over the rows whose targets are finite, a scalar; NaN if there is none
    """
    loss = F.smooth_l1_loss(outputs, targets)
    if th.isfinite(loss):
        return loss
    finite = th.isfinite(targets).all(dim=1)
    return F.smooth_l1_loss(outputs[finite], targets[finite])
