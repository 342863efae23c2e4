"""The common part of the prior models of the tasks."""

from abc import abstractmethod

import torch as th

from sb3_mpg.common.models.base import PriorModel


class EarlyResetModel(PriorModel):
    """
    A prior model that knows the early-reset region of its task.

    Subclasses implement :meth:`transition`, :meth:`_step_reward` and :meth:`_is_outside`.

    :param terminates: the early-reset region is terminal (for environments with ``early_reset_terminates=True``)
    :param early_reset_penalty: subtracted from the reward of a step into the terminal region; only used with ``terminates``
    """

    def __init__(self, terminates: bool, early_reset_penalty: float):
        super().__init__()
        self.terminates = terminates
        self.early_reset_penalty = early_reset_penalty

    @abstractmethod
    def _step_reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        """
        :param states: states before the step, ``(B, S)``
        :param actions: actions, ``(B, A)``
        :param next_states: states after the step, ``(B, S)``
        :return: rewards without the penalty of an early reset, ``(B,)``
        """

    @abstractmethod
    def _is_outside(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: states, ``(B, S)``
        :return: whether they are in the early-reset region, ``(B,)``
        """

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        rewards = self._step_reward(states, actions, next_states).unsqueeze(-1)
        if self.terminates and self.early_reset_penalty > 0:
            rewards = rewards - self.early_reset_penalty * self.terminal(next_states)
        return rewards

    @property
    def may_terminate(self) -> bool:
        return self.terminates

    def terminal(self, states: th.Tensor) -> th.Tensor:
        if not self.terminates:
            return super().terminal(states)
        return self._is_outside(states).unsqueeze(-1)
