"""Tells one prior model from another."""

import torch as th
from torch import nn

from sb3_mpg.common.models.base import PriorModel

# Number of recorded states and actions at which prior models are compared
N_PROBES = 16


class Fingerprint(nn.Module):
    """
    What a prior model predicts at some recorded states and actions, terminations included. What was learned of one prior model
    is useless for another; and it is the predictions that count, not the object or its class.

    :param n_states: number of dimensions of a state
    :param n_actions: number of dimensions of an action
    """

    states: th.Tensor
    actions: th.Tensor
    answers: th.Tensor

    def __init__(self, n_states: int, n_actions: int):
        super().__init__()
        self.register_buffer("states", th.zeros(N_PROBES, n_states))
        self.register_buffer("actions", th.zeros(N_PROBES, n_actions))
        # Next states, rewards and terminations
        self.register_buffer("answers", th.zeros(N_PROBES, n_states + 2))

    def take(self, prior: PriorModel, states: th.Tensor, actions: th.Tensor) -> None:
        """
        :param prior: the prior model
        :param states: recorded states, ``(B, S)``
        :param actions: recorded actions, ``(B, A)``
        """
        rows = th.arange(N_PROBES, device=states.device) % len(states)
        self.states.copy_(states[rows])
        self.actions.copy_(actions[rows])
        self.answers.copy_(_answers(prior, self.states, self.actions))

    @staticmethod
    def matches(prior: PriorModel, saved: dict[str, th.Tensor], device: th.device) -> bool:
        """
        :param prior: the prior model
        :param saved: state dictionary of the fingerprint of a prior model
        :param device: device of the prior model
        :return: whether the two predict the same
        """
        answers = _answers(prior, saved["states"].to(device), saved["actions"].to(device)).cpu()
        return th.allclose(answers, saved["answers"].cpu(), rtol=1e-3, atol=1e-5, equal_nan=True)


def _answers(prior: PriorModel, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """
    :param prior: the prior model
    :param states: ``(N, S)``
    :param actions: ``(N, A)``
    :return: next states, rewards and probabilities of termination, ``(N, S + 2)``
    """
    next_states = prior.transition(states, actions)
    ends = prior.termination_probability(next_states)
    return th.cat([next_states, prior.reward(states, actions, next_states), ends], dim=1)
