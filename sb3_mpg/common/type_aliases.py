"""Common aliases, batches and protocols."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

#: Which actions of a model rollout carry the gradient: eq. 6 of the papers, or eq. 5 of the first version.
Differentiate = Literal["first_action", "all_actions"]


class TrainingBatch(NamedTuple):
    """
    A batch of transitions with value targets.

    :param observations: raw observations, in the units of the environment, float32, ``(B, O)``
    :param actions: recorded actions, scaled to [-1, 1], ``(B, A)``
    :param target_q_values: what the critics regress on, ``(B, 1)``
    """

    observations: th.Tensor
    actions: th.Tensor
    target_q_values: th.Tensor


class GradientResult(NamedTuple):
    """
    The gradients of one update, which the learners return to the optimizers.

    :param gradients: for each network that is updated, by its name in ``Update.networks()``, one tensor for each trainable
        parameter. A network whose update is delayed is missing.
    :param logs: scalars about this update, by their keys in the logger
    :param share_masked: share of the states that were masked because their rollouts overflow
    """

    gradients: dict[str, list[th.Tensor]]
    logs: dict[str, float]
    share_masked: float = 0.0


#: normalised observations (B, O) -> actions in [-1, 1] (B, A)
Policy = Callable[[th.Tensor], th.Tensor]


class ReplaySampler(Protocol):
    """What updates sample transitions from: a replay buffer, or a learner's view of it."""

    def sample(self, batch_size: int) -> ReplayBufferSamples:
        """
        :param batch_size: number of transitions
        :return: raw observations and rewards, actions in [-1, 1]
        """


class Simulator(Protocol):
    """
    A batch of environments whose states can be set from observations.
    An environment provides it by a method ``make_simulator(num_agents) -> Simulator``.

    It may have a method ``exact_model()``, which returns a new ``PriorModel`` or ``None``. In double precision, that model
    gives the same results up to rounding errors.
    """

    num_agents: int

    def set_state(self, observations: np.ndarray) -> np.ndarray:
        """
        :param observations: ``(num_agents, O)``
        :return: the observations of the new states, ``(num_agents, O)``
        """

    def step(self, actions: np.ndarray, indices: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """
        :param actions: in the units of the environment, ``(n, A)``
        :param indices: which agents to step, ``(n,)``; the states of the others do not change; ``None`` steps all of them
        :return: of the agents that were stepped: observations ``(n, O)``, rewards, terminated and truncated flags ``(n,)``;
            nothing is reset
        """
