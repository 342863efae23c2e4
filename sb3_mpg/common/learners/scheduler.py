"""
Assigns updates to learners. The scheduler knows no processes, so every backend of learners can use it.

Updates are assigned in advance, as far as the bound on staleness allows. Results are applied in the order of their arrival.
A result that is too old is dropped, and its update is assigned again.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple


class Assignment(NamedTuple):
    """
    A task for a learner.

    :param learner: index of the learner
    :param n_updates: number of the update that it computes
    :param slot: index of the learner's slot that the gradients are written to
    """

    learner: int
    n_updates: int
    slot: int


class Arrival(NamedTuple):
    """
    A result that waits to be applied.

    :param assignment: the task
    :param version: number of updates that were applied to the parameters that the gradients were computed at
    """

    assignment: Assignment
    version: int


@dataclass
class _Workload:
    """
    Slots and tasks of a learner.

    :param free_slots: slots without a task or a result
    :param tasks: maps the number of each update that is being computed to its slot
    :param is_ready: whether the learner has started
    """

    free_slots: list[int]
    tasks: dict[int, int] = field(default_factory=dict)
    is_ready: bool = False


class Scheduler:
    """
    Assigns updates to learners, and orders their results.

    :param n_learners: number of learners
    :param n_slots: number of slots of each learner; each holds a task or a result that waits
    :param max_staleness: largest number of updates between the parameters that a gradient was computed at and those that it is
        applied to
    :param first_update: number of the first update
    """

    def __init__(self, n_learners: int, n_slots: int, max_staleness: int, first_update: int):
        self.max_staleness = max_staleness
        self.n_dropped = 0
        self._loads = [_Workload(list(range(n_slots))) for _ in range(n_learners)]
        self._next_update = first_update
        # Updates that must be computed again
        self._returned: deque[int] = deque()
        self._arrived: deque[Arrival] = deque()

    def set_ready(self, learner: int) -> None:
        """
        :param learner: index of a learner that has started
        """
        self._loads[learner].is_ready = True

    def is_ready(self, learner: int) -> bool:
        """
        :param learner: index of a learner
        :return: whether it has started
        """
        return self._loads[learner].is_ready

    def owes_answer(self, learner: int) -> bool:
        """
        :param learner: index of a learner
        :return: whether it is starting or computing
        """
        return not self._loads[learner].is_ready or bool(self._loads[learner].tasks)

    def assign(self) -> Assignment | None:
        """
        :return: the next task to send; ``None`` when no learner has a free slot, or when the result would be too old after all
            earlier ones have been applied
        """
        n_outstanding = len(self._arrived) + sum(len(load.tasks) for load in self._loads)
        # Learners that are still starting get no tasks
        able = [index for index, load in enumerate(self._loads) if load.is_ready and load.free_slots]
        if n_outstanding > self.max_staleness or not able:
            return None
        learner = min(able, key=lambda index: len(self._loads[index].tasks))
        load = self._loads[learner]
        n_updates = self._returned.popleft() if self._returned else self._next_update
        self._next_update = max(self._next_update, n_updates + 1)
        load.tasks[n_updates] = load.free_slots.pop()
        return Assignment(learner, n_updates, load.tasks[n_updates])

    def arrive(self, learner: int, n_updates: int, version: int) -> None:
        """
        A result has arrived.

        :param learner: index of the learner
        :param n_updates: number of the update
        :param version: number of updates that were applied to the parameters that the gradients were computed at
        """
        slot = self._loads[learner].tasks.pop(n_updates)
        self._arrived.append(Arrival(Assignment(learner, n_updates, slot), version))

    @property
    def has_arrived(self) -> bool:
        """Whether a result waits to be applied."""
        return bool(self._arrived)

    def take(self, version: int) -> Arrival | None:
        """
        :param version: number of updates that were applied to the present parameters
        :return: the result that arrived first; ``None`` if it was too old and was dropped. The caller must :meth:`release` its
            slot.
        """
        arrival = self._arrived.popleft()
        if version - arrival.version <= self.max_staleness:
            return arrival
        self.n_dropped += 1
        self.release(arrival.assignment)
        self._returned.append(arrival.assignment.n_updates)
        return None

    def release(self, assignment: Assignment) -> None:
        """
        :param assignment: task whose gradients are no longer needed
        """
        self._loads[assignment.learner].free_slots.append(assignment.slot)

    def restart(self, learner: int) -> None:
        """
        A learner died: its tasks are assigned again, in the order of the updates.

        :param learner: index of the learner
        """
        load = self._loads[learner]
        load.free_slots.extend(load.tasks.values())
        self._returned.extend(sorted(load.tasks))
        load.tasks = {}
        load.is_ready = False
