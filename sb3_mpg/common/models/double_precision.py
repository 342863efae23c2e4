"""Models that keep their states in double precision."""

import torch as th

from sb3_mpg.common.models.base import PriorModel


class InDoublePrecision(PriorModel):
    """
    A model that steps states in double precision. Actions, rewards and observations are in single precision, as those of
    simulators.

    :param model: the model; its parameters and buffers are converted to double precision
    """

    def __init__(self, model: PriorModel):
        super().__init__()
        self.model = model.double()

    def step(self, states: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param states: states, float64, ``(B, S)``
        :param actions: actions in the units of the environment, float32, ``(B, A)``
        :return: next states, float64, ``(B, S)``, and rewards, float32, ``(B, 1)``
        """
        next_states, rewards = self.model.step(states, actions.double())
        return next_states, rewards.float()

    def terminal(self, states: th.Tensor) -> th.Tensor:
        return self.model.terminal(states)

    def termination_probability(self, states: th.Tensor) -> th.Tensor:
        return self.model.termination_probability(states).float()

    @property
    def may_terminate(self) -> bool:
        return self.model.may_terminate

    def observation(self, states: th.Tensor) -> th.Tensor:
        return self.model.observation(states).float()

    def state_from_observation(self, observations: th.Tensor) -> th.Tensor:
        return self.model.state_from_observation(observations.double())
