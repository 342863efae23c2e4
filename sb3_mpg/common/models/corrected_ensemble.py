"""Ensembles that correct a prior model."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.ensemble import values_of_rows
from sb3_mpg.common.models.fitting_schedule import EveryUpdate
from sb3_mpg.common.models.learned_ends import LearnedEnds, blurred
from sb3_mpg.common.models.least_squares import EndRewards
from sb3_mpg.common.models.trainable import CorrectedModel
from sb3_mpg.common.models.windows import Transitions


class CorrectedEnsemble(CorrectedModel):
    """
    A corrected model whose members may each be corrected or not, and which learns where episodes terminate.

    :param prior: the prior model
    :param n_states: number of dimensions of its state
    :param n_members: number of members
    :param learning_rate: learning rate of what learns where episodes terminate
    """

    gains: th.Tensor
    # What a model lacks is soon known, and a step takes as long as a third of an update of the critics
    fitting_schedule = EveryUpdate(later_every=2)

    def __init__(self, prior: PriorModel, n_states: int, n_members: int, learning_rate: float):
        super().__init__(prior)
        self.n_members = n_members
        # Models that do not need it draw the same random numbers as without
        with th.random.fork_rng(devices=[]):
            self.ends = LearnedEnds(n_states, n_members, learning_rate)
        self.end_rewards = EndRewards()
        # Factor of each member's correction: 0 is the prior model as it is
        self.register_buffer("gains", th.ones(n_members, 1, 1))

    def refresh(self) -> None:
        self.ends.refresh()

    @abstractmethod
    def scaled_states(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :return: the states within the range of the data, standardised by their statistics, ``(B, S)``
        """

    def gains_of_rows(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :return: the factor of each row's correction, ``(B, 1)``
        """
        return values_of_rows(self.gains, states.shape[0], self.members)

    @property
    def may_terminate(self) -> bool:
        return self.prior.may_terminate or self.ends.is_used

    def termination_probability(self, states: th.Tensor) -> th.Tensor:
        known = self.prior.termination_probability(states)
        if not self.ends.is_used:
            return known
        gains = self.gains_of_rows(states)
        return th.where(gains > 0, self.learned_ends(states), known)

    def terminal(self, states: th.Tensor) -> th.Tensor:
        return self.termination_probability(states) > 0.5 if self.ends.is_used else self.prior.terminal(states)

    def learned_ends(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :return: learned probabilities that an episode terminates there, ``(B, 1)``
        """
        return self.ends(self.scaled_states(states), self.members)

    def use_correction(self, is_used: bool) -> None:
        super().use_correction(is_used)
        self.gains.fill_(float(is_used))

    @contextmanager
    def with_gains(self, first: float, others: float) -> Iterator[None]:
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
        with self.using_members("dealt"), self.with_gains(0.0, 1.0):
            yield

    def reward_before_end(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :param next_states: ``(B, S)``
        :return: rewards of the prior model without what it pays for the end of an episode, ``(B, 1)``
        """
        was_claimed, is_claimed = self.prior.terminal(states), self.prior.terminal(next_states)
        # Step to a state that is not claimed to be terminal, if there is one
        rewards = self.prior.reward(states, actions, th.where(is_claimed & ~was_claimed, states, next_states))
        return rewards - th.where(is_claimed & was_claimed, self.end_rewards.own_jump, 0.0)

    def ends_of(self, transitions: Transitions, next_states: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param transitions: recorded transitions
        :param next_states: their next states, ``(B, S)``
        :return: whether the episode terminated, and whether the prior model claims that, bool ``(B, 1)`` each; a model is
            believed where it is unknown
        """
        is_claimed = self.prior.terminal(next_states)
        return th.where(th.isnan(transitions.terminated), is_claimed, transitions.terminated > 0), is_claimed

    def may_jump(self, transitions: Transitions, next_states: th.Tensor) -> th.Tensor:
        """
        :param transitions: recorded transitions
        :param next_states: their next states, ``(B, S)``
        :return: whether the reward may jump because an episode ends, recorded or claimed, bool ``(B, 1)``
        """
        is_end, is_claimed = self.ends_of(transitions, next_states)
        return is_end | is_claimed

    def fit_ends(self, steps: Transitions, ends: Transitions, rate: float) -> None:
        others, terminal = (
            self._blurred(transitions, is_end)
            for transitions, is_end in ((steps.select((steps.terminated == 0)[:, 0]), False), (ends, True))
        )
        if len(others) > 0 and len(terminal) > 0:
            self.ends.fit(others, terminal, rate)

    @th.no_grad()
    def _blurred(self, transitions: Transitions, is_end: bool) -> th.Tensor:
        """
        :param transitions: recorded transitions
        :param is_end: whether they terminated
        :return: their blurred next states, scaled; without those that are not finite, ``(B', S)``
        """
        states = self.prior.state_from_observation(transitions.observations)
        next_states = self.prior.state_from_observation(transitions.next_observations)
        scaled = self.scaled_states(blurred(self.prior, states, next_states, is_end))
        return scaled[th.isfinite(scaled).all(dim=1)]

    @property
    def learns_ends(self) -> bool:
        return self.ends.is_used

    def use_learned_ends(self, is_used: bool) -> None:
        self.ends.use(is_used)
