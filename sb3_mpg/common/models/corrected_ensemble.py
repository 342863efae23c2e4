"""Ensembles that correct a prior model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.ensemble import NetworkEnsemble, values_of_rows
from sb3_mpg.common.models.fitting_schedule import EveryUpdate
from sb3_mpg.common.models.trainable import CorrectedModel
from sb3_mpg.common.models.trainable_ensemble import TrainableEnsemble


class CorrectedEnsemble(TrainableEnsemble, CorrectedModel):
    """
    A corrected model whose members may each be corrected or not, and which learns where episodes terminate.

    :param prior: the prior model
    :param networks: networks of the correction
    :param n_states: number of dimensions of its state
    :param n_actions: number of dimensions of an action
    """

    gains: th.Tensor
    # What a model lacks is soon known, and a step takes as long as a third of an update of the critics
    fitting_schedule = EveryUpdate(later_every=2)

    def __init__(self, prior: PriorModel, networks: NetworkEnsemble, n_states: int, n_actions: int):
        super().__init__(networks, n_states, n_actions, prior=prior)
        # Factor of each member's correction: 0 is the prior model as it is
        self.register_buffer("gains", th.ones(self.n_members, 1, 1))

    @property
    def state_model(self) -> PriorModel:
        return self.prior

    def claims_end(self, states: th.Tensor) -> th.Tensor:
        return self.prior.terminal(states)

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
