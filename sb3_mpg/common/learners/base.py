"""Where the optimizer gets its gradients from: the interface, and the form without processes."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger

from sb3_mpg.common.processes import check_start_method
from sb3_mpg.common.type_aliases import GradientResult
from sb3_mpg.common.units import Units
from sb3_mpg.common.checks import check_count, check_keywords, check_number


@dataclass(frozen=True)
class LearnerSettings:
    """
    :param n_learners: number of learner processes; 0 computes the gradients in the main process
    :param max_staleness: largest number of updates between the parameters that a gradient was computed at and those that it is
        applied to. 0 computes one gradient at a time, and only when it is asked for; ``None`` is twice the number of learners
    :param timeout: seconds that a gradient may take, compiling included, before its learner is replaced
    :param max_restarts: how many learners may be replaced within one call of ``learn()``
    :param start_method: of the processes, ``"forkserver"`` or ``"spawn"``; ``None`` for the first that the system has
    :raises ValueError: for values that make no sense
    """

    n_learners: int = 0
    max_staleness: int | None = None
    timeout: float = 300.0
    max_restarts: int = 10
    start_method: str | None = None

    @classmethod
    def of(cls, n_learners: int, max_staleness: int | None, learner_kwargs: dict[str, Any] | None) -> "LearnerSettings":
        """
        :param n_learners: as above
        :param max_staleness: as above
        :param learner_kwargs: the other settings, by name
        :return: the settings
        :raises ValueError: for values that make no sense
        """
        kwargs = check_keywords("learner_kwargs", learner_kwargs, cls, "n_learners", "max_staleness")
        return cls(n_learners, max_staleness, **kwargs)

    def __post_init__(self) -> None:
        for name in ("n_learners", "max_staleness", "max_restarts"):
            if name != "max_staleness" or self.max_staleness is not None:
                check_count(name, getattr(self, name), 0)
        check_number("timeout", self.timeout, 0.0, includes_low=False)
        check_start_method(self.start_method)

    @property
    def staleness_bound(self) -> int:
        """``max_staleness``, as a number."""
        return 2 * self.n_learners if self.max_staleness is None else self.max_staleness


class Learnable(Protocol):
    """What learners need of an algorithm."""

    device: th.device
    replay_buffer: ReplayBuffer | None
    batch_size: int

    def gradients_of_update(self, n_updates: int, batch_size: int, units: Units) -> GradientResult:
        """
        Sample a batch and compute the gradients; the outcome is a function of the arguments, of the parameters and of the
        replay buffer.

        :param n_updates: number of the update
        :param batch_size: number of transitions
        :param units: conversions between environment and networks
        :return: the gradients
        """

    def make_replica(self) -> "Learnable":
        """
        :return: what a learner runs: the algorithm without environment, replay buffer and all else that stays behind
        """

    def setup_replica(self) -> None:
        """Called in the learner, on the replica."""

    def published_tensors(self) -> list[th.Tensor]:
        """
        :return: tensors that change while training, in the same order in the algorithm and in its replicas
        """

    def published_attributes(self) -> dict[str, Any]:
        """
        :return: small attributes that change while training
        """

    def take_published(self, attributes: dict[str, Any]) -> None:
        """
        Called in the learner, on the replica, when its tensors have the published values.

        :param attributes: those published
        """

    def gradient_template(self) -> GradientResult:
        """
        :return: tensors of the shapes and types of the gradients
        """


class Learners(ABC):
    """Where ``train()`` gets its gradients from."""

    @abstractmethod
    def next_result(self, n_updates: int, batch_size: int, units: Units) -> GradientResult:
        """
        :param n_updates: number of the update
        :param batch_size: number of transitions
        :param units: conversions between environment and networks, with the statistics of now
        :return: gradients to apply now; they may be overwritten after :meth:`applied`
        """

    def applied(self, n_updates: int, batch_size: int, units: Units) -> None:  # noqa: B027  # nothing to do without processes
        """
        The result was applied, or skipped: the parameters are those of now.

        :param n_updates: number of updates so far
        :param batch_size: number of transitions of further batches
        :param units: conversions between environment and networks
        """

    def writing(self) -> AbstractContextManager[None]:
        """
        :return: the context that the replay buffer is written to in
        """
        return nullcontext()

    def record(self, logger: Logger) -> None:  # noqa: B027  # nothing to say without processes
        """
        :param logger: what is known of the learners goes there
        """

    def close(self) -> None:  # noqa: B027  # nothing to do without processes
        """End all processes. Calling it again does nothing."""


class InProcessLearner(Learners):
    """
    Computes the gradients in the main process.

    :param algorithm: whose gradients
    """

    def __init__(self, algorithm: Learnable):
        self.algorithm = algorithm

    def next_result(self, n_updates: int, batch_size: int, units: Units) -> GradientResult:
        return self.algorithm.gradients_of_update(n_updates, batch_size, units)
