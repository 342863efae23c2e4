"""Interface and settings of learners, which compute the gradients that the optimizers apply."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger

from sb3_mpg.common.checks import check_count, check_keywords, check_number
from sb3_mpg.common.processes import check_start_method
from sb3_mpg.common.type_aliases import GradientResult
from sb3_mpg.common.units import Units
from sb3_mpg.common.update import UpdateSettings


@dataclass(frozen=True)
class PoolSettings:
    """
    Rarely needed settings of a pool of learner processes.

    :param timeout: seconds that a gradient may take, including compilation, before its learner is replaced
    :param max_restarts: how many learners may be replaced within one call of ``learn()``
    :param start_method: start method of the processes, ``"forkserver"`` or ``"spawn"``; ``None`` for the first that the system
        has
    """

    timeout: float = 300.0
    max_restarts: int = 10
    start_method: str | None = None


@dataclass
class LearnerSettings:
    """
    Settings of the learners.

    :param n_learners: number of learner processes; 0 computes the gradients in the main process
    :param max_staleness: largest number of updates between the parameters that a gradient was computed at and those that it is
        applied to. 0 computes one gradient at a time, when it is needed; ``None`` is twice the number of learners
    :param learner_kwargs: arguments of :class:`PoolSettings`
    """

    n_learners: int = 0
    max_staleness: int | None = None
    learner_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """
        :raises ValueError: for impossible values
        """
        check_count("n_learners", self.n_learners, 0)
        if self.max_staleness is not None:
            check_count("max_staleness", self.max_staleness, 0)
        check_keywords("learner_kwargs", self.learner_kwargs, PoolSettings)
        check_count("max_restarts", self.pool.max_restarts, 0)
        check_number("timeout", self.pool.timeout, 0.0, includes_low=False)
        check_start_method(self.pool.start_method)

    @property
    def pool(self) -> PoolSettings:
        """``learner_kwargs`` with defaults."""
        return PoolSettings(**(self.learner_kwargs or {}))

    @property
    def staleness_bound(self) -> int:
        """``max_staleness``, as a number."""
        return 2 * self.n_learners if self.max_staleness is None else self.max_staleness


class TrainingInputs(NamedTuple):
    """
    The present inputs of a gradient, other than the tensors of the update.

    :param replay_buffer: what transitions are sampled from
    :param batch_size: number of transitions of a batch
    :param units: conversions between environment and networks
    :param settings_of: maps the number of an update to its settings
    """

    replay_buffer: ReplayBuffer
    batch_size: int
    units: Units
    settings_of: Callable[[int], UpdateSettings]


class Learners(ABC):
    """Compute the gradients that ``train()`` applies."""

    @abstractmethod
    def next_result(self, n_updates: int, inputs: TrainingInputs) -> GradientResult:
        """
        :param n_updates: number of the update
        :param inputs: present inputs of gradients
        :return: gradients to apply now. Their memory may be overwritten after :meth:`applied`.
        """

    def applied(self, n_updates: int, inputs: TrainingInputs) -> None:  # noqa: B027  # nothing to do without processes
        """
        Called after the result was applied or skipped, with the new parameters.

        :param n_updates: number of updates so far
        :param inputs: present inputs of gradients
        """

    def writing(self, replay_buffer: ReplayBuffer) -> AbstractContextManager[None]:
        """
        :param replay_buffer: the replay buffer
        :return: context in which a transition is added to the buffer
        """
        return nullcontext()

    def record(self, logger: Logger) -> None:  # noqa: B027  # nothing to log without processes
        """
        Log staleness, throughput and failures.

        :param logger: the logger
        """

    def close(self) -> None:  # noqa: B027  # nothing to do without processes
        """End all processes. Calling it again does nothing."""
