"""A prior model that is corrected by recorded transitions."""

import math

import torch as th
from torch.nn import functional as F

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.corrected_ensemble import CorrectedEnsemble
from sb3_mpg.common.models.ensemble import NetworkEnsemble, is_architecture
from sb3_mpg.common.models.fingerprint import Fingerprint
from sb3_mpg.common.models.hidden_states import HiddenStates, clipped_rollout_error
from sb3_mpg.common.models.least_squares import LeastSquares, QuadraticReward
from sb3_mpg.common.models.trainable import StateDescription
from sb3_mpg.common.models.windows import Transitions, Windows

# Targets that are this many times their scale need new scales: networks whose steps are bounded take too long to get there
LARGEST_TARGET = 10.0
# A dimension whose prediction error is a smaller share of its change needs no finer correction
SMALLEST_TARGET_SCALE = 1e-3


class ResidualModel(CorrectedEnsemble):
    r"""
    A prior model plus a correction of its next state and of its reward, fitted to recorded transitions:

    .. math:: s' = f(s, a) + \Delta_s(s, a), \quad r = r(s, a, s') + \Delta_r(s, a, s').

    Each correction has two parts. The first is solved for by least squares, as soon as there are enough data: a part of
    :math:`\Delta_s` that is linear in :math:`(s, a)` (wrong gains and signs, constant offsets), and a part of
    :math:`\Delta_r` that is a weighted sum of the squares of :math:`s, a, s'` (wrong weights of a quadratic cost). Near an
    optimum the gradient of a reward is small compared with the reward, and the error of a network, roughly proportional to
    its target, would exceed that gradient.

    The second part is a small ensemble of networks, which is fitted to what least squares leave over (see
    ``NetworkEnsemble``). Inputs and targets are scaled by the statistics of the data. Differences between states are those
    of the prior model (``state_difference``, ``state_add``). Parts that predict recorded steps no better than the prior model
    are not used.

    Once enough terminations are recorded, the probability of a termination is learned from them (see ``LearnedEnds``). A bonus
    or penalty for it is solved for separately (see ``EndRewards``).

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
    output_scale: th.Tensor
    n_rows: th.Tensor

    def __init__(
        self,
        prior: PriorModel,
        n_states: int,
        n_actions: int,
        n_members: int = 2,
        net_arch: tuple[int, ...] = (64, 64),
        learning_rate: float = 1e-3,
    ):
        if n_members < 2:
            raise ValueError(
                f"The correction is judged by comparing networks, so `n_members` must be 2 or more, got {n_members}."
            )
        if not is_architecture(net_arch):
            raise ValueError(
                f"`net_arch` of the correction lists the sizes of its hidden layers, as in (64, 64), got {net_arch!r}."
            )
        n_inputs = n_states + n_actions
        networks = NetworkEnsemble(n_members, n_inputs, n_states + 1, net_arch, learning_rate)
        super().__init__(prior, networks, n_states, n_actions)
        self.linear = LeastSquares(n_inputs, n_states)
        self.quadratic_reward = QuadraticReward(n_inputs + n_states)
        self.hidden = HiddenStates(n_states)
        self.fingerprint = Fingerprint(n_states, n_actions)
        for name, buffer in {
            "target_scale": th.ones(n_states + 1),
            # The same, and 0 for outputs of the networks that are not used
            "output_scale": th.ones(n_states + 1),
            # Number of transitions that scales and least squares are from
            "n_rows": th.zeros((), dtype=th.int64),
        }.items():
            self.register_buffer(name, buffer)

    def refresh(self) -> None:
        super().refresh()
        self.hidden.refresh()

    def describe_states(self) -> StateDescription:
        return StateDescription(*((~mask).cpu().numpy() for mask in (self.hidden.is_observed, self.hidden.is_kept)))

    def _quadratic(self, scaled: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        """
        :param scaled: scaled states and actions, ``(B, S + A)``
        :param next_states: ``(B, S)``
        :return: the quadratic part of the reward's correction, ``(B, 1)``
        """
        return self.quadratic_reward(th.cat([scaled, self.scaled_states(next_states)], dim=1))

    def _network_outputs(self, scaled: th.Tensor) -> th.Tensor:
        """
        :param scaled: scaled states and actions, ``(B, S + A)``
        :return: the networks' corrections of next states and rewards, in the units of the environment, ``(B, S + 1)``
        """
        return self.networks(scaled, self.members) * self.output_scale

    def _corrected_reward(
        self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor, scaled: th.Tensor, learned: th.Tensor
    ) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :param next_states: ``(B, S)``
        :param scaled: scaled states and actions, ``(B, S + A)``
        :param learned: of :meth:`_network_outputs`, ``(B, S + 1)``
        :return: ``(B, 1)``
        """
        correction = learned[:, self.n_states :] + self._quadratic(scaled, next_states)
        gains = self.gains_of_rows(states)
        rewards = self.prior.reward(states, actions, next_states)
        if self.ends.is_used:
            # Replace the jump in the rewards of the prior model by a smooth one
            rewards = th.where(gains > 0, self.reward_before_end(states, actions, next_states), rewards)
            correction = correction + self.learned_ends(next_states) * self.end_rewards.jump
        elif self.may_terminate:
            correction = correction + th.where(self.prior.terminal(next_states), self.end_rewards.found, 0.0)
        return rewards + gains * correction

    def _next_states(self, states: th.Tensor, actions: th.Tensor, scaled: th.Tensor, learned: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :param scaled: scaled states and actions, ``(B, S + A)``
        :param learned: of :meth:`_network_outputs`, ``(B, S + 1)``
        :return: ``(B, S)``
        """
        gains = self.gains_of_rows(states)
        correction = gains * (learned[:, : self.n_states] + self.linear(scaled))
        predicted = self.prior.transition(states, actions)
        # Clip the prediction as for the targets of the fit
        corrected = self.state_add(self.range.clip_prior(predicted), correction)
        corrected = self.range.clip(self.prior, corrected, self.is_extrapolating)
        corrected = self.hidden.re_encode(self.prior, corrected)
        # Without correction, the prior model is neither clipped nor re-encoded
        return th.where(gains > 0, corrected, predicted)

    def step(self, states: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        scaled = self.scaled_inputs(states, actions)
        learned = self._network_outputs(scaled)
        next_states = self._next_states(states, actions, scaled, learned)
        return next_states, self._corrected_reward(states, actions, next_states, scaled, learned)

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        scaled = self.scaled_inputs(states, actions)
        return self._next_states(states, actions, scaled, self._network_outputs(scaled))

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        scaled = self.scaled_inputs(states, actions)
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
        return self.scaled_inputs(states, transitions.actions), next_states, th.cat([missed, missed_reward], dim=1)

    @th.no_grad()
    def _inputs_and_targets(self, transitions: Transitions) -> tuple[th.Tensor, th.Tensor]:
        """
        :param transitions: recorded transitions
        :return: inputs of the networks, ``(B, S + A)``, and their targets, ``(B, S + 1)``: the scaled residuals of least
            squares. That of the reward is 0 at the end of an episode, recorded or claimed, where rewards jump.
        """
        scaled, next_states, missed = self._missed_by_prior(transitions)
        missed = missed - th.cat([self.linear(scaled), self._quadratic(scaled, next_states)], dim=1)
        ordinary = th.where(self.may_jump(transitions, next_states), 0.0, missed[:, self.n_states :])
        return scaled, th.cat([missed[:, : self.n_states], ordinary], dim=1) / self.target_scale

    @th.no_grad()
    def rescale(self, transitions: Transitions) -> None:
        # A single value that is not finite would make the scales useless for good
        is_finite = th.stack([th.isfinite(tensor).all(dim=1) for tensor in transitions[:4]]).all(dim=0)
        if is_finite.any():
            transitions = transitions.select(is_finite)
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
        transitions = transitions.select(finite)
        scaled, next_states, missed, states = (tensor[finite] for tensor in (scaled, next_states, missed, states))
        self.n_rows.fill_(len(missed))
        self.linear.solve(scaled, missed[:, : self.n_states])
        # Rewards jump where an episode ends; as extreme targets of least squares they would spoil all others
        is_ordinary = ~self.may_jump(transitions, next_states).squeeze(1)
        values = th.cat([scaled, self.scaled_states(next_states)], dim=1)
        self.quadratic_reward.solve(values[is_ordinary], missed[is_ordinary, self.n_states :])
        if len(missed) > 0:
            self.target_scale.fill_(1.0)
            _, targets = self._inputs_and_targets(transitions)
            changes = th.cat([self.state_difference(next_states, states), transitions.rewards], dim=1)
            smallest = SMALLEST_TARGET_SCALE * changes.square().mean(dim=0).sqrt() + 1e-8
            self.target_scale.copy_(th.maximum(targets.square().mean(dim=0).sqrt(), smallest))
        self.output_scale.copy_(self.target_scale)
        # The targets of the networks have other units and other least squares now
        self.networks.reset_outputs()
        self.ends.reset()
        self.solve_end_rewards(transitions)

    @th.no_grad()
    def solve_end_rewards(self, transitions: Transitions) -> None:
        states, actions = self.prior.state_from_observation(transitions.observations), transitions.actions
        scaled, next_states, missed = self._missed_by_prior(transitions)
        is_end, is_claimed = self.ends_of(transitions, next_states)
        with self.using_members("mean"):
            correction = self._network_outputs(scaled)[:, self.n_states :] + self._quadratic(scaled, next_states)
        solve, solved = self.end_rewards.solve, self.end_rewards
        solve(solved.found, missed[:, self.n_states :] - correction, is_claimed)
        own_jumps = self.prior.reward(states, actions, next_states) - self.prior.reward(states, actions, states)
        solve(solved.own_jump, own_jumps, is_claimed & ~self.prior.terminal(states))
        before_end = self.reward_before_end(states, actions, next_states)
        solve(solved.jump, transitions.rewards - before_end - correction, is_end)

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
    def choose_outputs(self, transitions: Transitions) -> None:
        scaled, targets = self._inputs_and_targets(transitions)
        finite = th.isfinite(targets).all(dim=1) & th.isfinite(scaled).all(dim=1)
        if not finite.any():
            return
        with self.using_members("mean"):
            errors = (targets[finite] - self.networks(scaled[finite], "mean")).abs().mean(dim=0)
        errors_of_zero = targets[finite].abs().mean(dim=0)
        self.output_scale.copy_(th.where(errors <= errors_of_zero, self.target_scale, 0.0))

    @th.no_grad()
    def tune_on_rollouts(self, windows: Windows) -> None:
        scales = self.standardizer.std[: self.n_states]
        # Also where the correction is only compared with the prior model
        with self.using_members("mean"), self.with_gains(1.0, 1.0):
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
        _, next_states, missed = self._missed_by_prior(transitions)
        missed[:, self.n_states :].masked_fill_(self.may_jump(transitions, next_states), 0.0)
        missed = missed / self.target_scale
        return self.validation_error(transitions) < huber_loss(th.zeros_like(missed), missed).item()

    def own_state(self) -> dict[str, th.Tensor]:
        # Without the prior model, and without how the correction is used
        return {
            name: value for name, value in super().own_state().items() if not name.startswith("prior.") and name != "gains"
        }

    def is_of_this_model(self, state: dict[str, th.Tensor]) -> bool:
        if not super().is_of_this_model(state):
            return False
        prefix = "fingerprint."
        fingerprint = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        return int(state["n_rows"]) == 0 or Fingerprint.matches(self.prior, fingerprint, self.gains.device)


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
