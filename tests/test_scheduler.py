"""Which learner computes which update: the rules hold whatever happens in whatever order."""

import numpy as np
import pytest

from sb3_mpg.common.learners.scheduler import Arrival, Assignment, Scheduler


def ready(n_learners=1, n_slots=2, max_staleness=2, first_update=1):
    scheduler = Scheduler(n_learners, n_slots, max_staleness, first_update)
    for learner in range(n_learners):
        scheduler.set_ready(learner)
    return scheduler


def assign_all(scheduler):
    return list(iter(scheduler.assign, None))


def test_updates_are_handed_out_in_order():
    assignments = assign_all(ready(2, max_staleness=3, first_update=5))
    assert [assignment.n_updates for assignment in assignments] == [5, 6, 7, 8]


def test_no_more_is_handed_out_than_may_be_stale():
    for max_staleness in (0, 1, 4):
        assert len(assign_all(ready(3, max_staleness=max_staleness))) == max_staleness + 1
    # ... nor than there is room for
    assert len(assign_all(ready(2, n_slots=2, max_staleness=100))) == 4


def test_work_goes_to_who_has_least():
    learners = [assignment.learner for assignment in assign_all(ready(3, max_staleness=5))]
    assert sorted(learners[:3]) == sorted(learners[3:]) == [0, 1, 2]


def test_no_work_waits_for_a_learner_that_starts():
    scheduler = Scheduler(2, 2, 10, 1)
    assert scheduler.assign() is None
    assert scheduler.owes_answer(0) and not scheduler.is_ready(0)
    scheduler.set_ready(1)
    assert {assignment.learner for assignment in assign_all(scheduler)} == {1}


def test_a_result_is_taken_with_its_version_and_its_slot_freed():
    scheduler = ready(max_staleness=1)
    first, second = assign_all(scheduler)
    assert scheduler.assign() is None
    scheduler.arrive(0, second.n_updates, version=0)
    assert scheduler.has_arrived
    # In the order in which they arrive
    assert scheduler.take(0) == Arrival(second, 0)
    assert not scheduler.has_arrived
    assert scheduler.owes_answer(0)
    scheduler.release(second)
    third = scheduler.assign()
    assert third == Assignment(0, 3, second.slot)
    assert first.slot != third.slot


def test_what_is_too_old_is_dropped_and_handed_out_again():
    scheduler = ready(max_staleness=1)
    first, second = assign_all(scheduler)
    scheduler.arrive(0, first.n_updates, version=0)
    assert scheduler.take(2) is None
    assert scheduler.n_dropped == 1
    assert scheduler.assign().n_updates == first.n_updates
    scheduler.arrive(0, second.n_updates, version=1)
    assert scheduler.take(2) is not None


def test_the_work_of_a_learner_that_dies_is_handed_out_again():
    scheduler = ready(2, max_staleness=3)
    assignments = assign_all(scheduler)
    lost = sorted(assignment.n_updates for assignment in assignments if assignment.learner == 0)
    scheduler.restart(0)
    assert not scheduler.is_ready(0)
    # The other has no slot left
    assert scheduler.assign() is None
    scheduler.set_ready(0)
    again = assign_all(scheduler)
    assert [assignment.n_updates for assignment in again] == lost
    assert {assignment.learner for assignment in again} == {0}


def test_what_arrived_before_a_learner_died_counts():
    scheduler = ready(max_staleness=1)
    first, second = assign_all(scheduler)
    scheduler.arrive(0, first.n_updates, version=0)
    scheduler.restart(0)
    assert scheduler.take(0).assignment == first
    scheduler.set_ready(0)
    scheduler.release(first)
    assert sorted(assignment.n_updates for assignment in assign_all(scheduler)) == [second.n_updates, 3]


class Simulation:
    """
    Learners without processes: events happen in random order, and what must always be true is checked after each.

    :param seed: of the events
    """

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.n_learners = int(self.rng.integers(1, 5))
        self.n_slots = int(self.rng.integers(1, 4))
        self.bound = int(self.rng.integers(0, 7))
        self.first = int(self.rng.integers(1, 100))
        self.scheduler = Scheduler(self.n_learners, self.n_slots, self.bound, self.first)
        self.version = self.first - 1
        self.tasks = []  # with the version of the parameters when they were handed out
        self.waiting = []
        self.applied, self.handed_out, self.n_dropped, self.n_restarts = [], set(), 0, 0
        self.staleness = []

    def start(self):
        self.scheduler.set_ready(int(self.rng.integers(self.n_learners)))

    def hand_out(self):
        for assignment in assign_all(self.scheduler):
            assert self.scheduler.is_ready(assignment.learner)
            taken = [task for task, _ in self.tasks] + self.waiting
            # A slot holds one result, and an update is under way once
            assert all((assignment.learner, assignment.slot) != (other.learner, other.slot) for other in taken)
            assert all(assignment.n_updates != other.n_updates for other in taken)
            assert assignment.n_updates not in self.applied
            self.tasks.append((assignment, self.version))
            self.handed_out.add(assignment.n_updates)
            assert len(self.tasks) + len(self.waiting) <= self.bound + 1

    def compute(self):
        if self.tasks:
            task, version = self.tasks.pop(int(self.rng.integers(len(self.tasks))))
            # The learner read the parameters some time after it was told
            self.scheduler.arrive(task.learner, task.n_updates, int(self.rng.integers(version, self.version + 1)))
            self.waiting.append(task)

    def apply(self):
        if not self.waiting:
            assert not self.scheduler.has_arrived
            return
        assignment = self.waiting.pop(0)
        arrival = self.scheduler.take(self.version)
        if arrival is None:
            self.n_dropped += 1
        else:
            assert arrival.assignment == assignment
            self.staleness.append(self.version - arrival.version)
            assert 0 <= self.staleness[-1] <= self.bound
            self.applied.append(assignment.n_updates)
            self.version += 1
            self.scheduler.release(assignment)
        assert self.scheduler.n_dropped == self.n_dropped

    def die(self):
        learner = int(self.rng.integers(self.n_learners))
        self.scheduler.restart(learner)
        self.tasks = [(task, version) for task, version in self.tasks if task.learner != learner]
        self.n_restarts += 1

    def run(self, n_events):
        events = [self.start, self.hand_out, self.compute, self.apply, self.die]
        for _ in range(n_events):
            self.rng.choice(events, p=[0.15, 0.3, 0.3, 0.22, 0.03])()

    def finish(self):
        """No more deaths: everything that was handed out is applied."""
        for learner in range(self.n_learners):
            self.scheduler.set_ready(learner)
        target = max(self.handed_out, default=self.first)
        for _ in range(10_000):
            if {*range(self.first, target + 1)} <= {*self.applied}:
                return
            self.hand_out()
            self.compute()
            self.apply()
        raise AssertionError(f"updates are lost: {sorted(self.handed_out - {*self.applied})}")


@pytest.mark.parametrize("seed", range(40))
def test_every_update_is_applied_once_and_none_is_too_stale(seed):
    simulation = Simulation(seed)
    simulation.run(600)
    simulation.finish()
    applied = simulation.applied
    assert len(set(applied)) == len(applied) > 10
    # They may overtake one another, within what is handed out
    assert max(applied) - simulation.first < len(applied) + simulation.bound + 1
    if simulation.bound == 0:
        assert applied == sorted(applied) and max(simulation.staleness) == 0 == simulation.n_dropped


def test_the_simulation_sees_all_that_can_happen():
    runs = [Simulation(seed) for seed in range(40)]
    for run in runs:
        run.run(600)
    assert sum(run.n_dropped for run in runs) > 10
    assert sum(run.n_restarts for run in runs) > 100
    assert any(run.applied != sorted(run.applied) for run in runs)
    assert any(max(run.staleness) == run.bound > 2 for run in runs)
