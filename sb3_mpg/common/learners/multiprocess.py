"""Learners in processes on the same machine."""

import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

import cloudpickle
import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger

from sb3_mpg.common.learners.base import Learners, LearnerSettings, TrainingInputs
from sb3_mpg.common.learners.in_process import InProcessLearner
from sb3_mpg.common.learners.learner_process import Outcome, Slot, Task, run_learner
from sb3_mpg.common.learners.replay import replay_for_learners
from sb3_mpg.common.learners.scheduler import Assignment, Scheduler
from sb3_mpg.common.learners.shared_memory import SharedParameters
from sb3_mpg.common.precision import get_matmul_precision
from sb3_mpg.common.processes import (
    GRACE_SECONDS,
    NO_MAIN_GUARD,
    NO_MAIN_GUARD_MESSAGE,
    OUT_OF_MEMORY,
    Failure,
    Ready,
    SharedBytes,
    Worker,
    exit_without_main_guard,
    process_context,
)
from sb3_mpg.common.type_aliases import GradientResult
from sb3_mpg.common.update import Update

# Two, so that one gradient is computed while another waits to be applied
SLOTS_PER_LEARNER = 2
# Seconds that a learner may always take to start, even if the timeout is shorter
START_SECONDS = 120.0
# Seconds between two checks for results and dead learners
LOOK_EVERY = 0.5
# Number of updates over which the throughput is measured
THROUGHPUT_WINDOW = 100


class _Learner:
    """
    A learner, as the main process sees it.

    :param worker: its process
    :param slots: slots for its gradients
    """

    def __init__(self, worker: Worker, slots: list[Slot]):
        self.worker = worker
        self.slots = slots
        self.views = [slot.views() for slot in slots]
        # Time of its last message, or of its first open task since then
        self.since = time.monotonic()


class _Pool:
    """
    Learner processes and their shared memory.

    :param update: computes gradients
    :param inputs: present inputs of gradients
    :param settings: settings of the learners
    :param first_update: number of the first update
    """

    def __init__(self, update: Update, inputs: TrainingInputs, settings: LearnerSettings, first_update: int):
        self.scheduler = Scheduler(settings.n_learners, SLOTS_PER_LEARNER, settings.staleness_bound, first_update)
        self.context = process_context(settings.pool.start_method)
        # Collected once, because searching the modules at each update is slow
        self.networks = update.tensors()
        self.layout = _layout(update, inputs)
        self.parameters = SharedParameters(self.networks + inputs.units.statistics())
        self.replay = replay_for_learners(inputs.replay_buffer)
        self.learners: list[_Learner] = []
        try:
            content = (update.for_learner(), inputs.units, self.replay.reader(), get_matmul_precision())
            self.payload = SharedBytes(pickled(content))
            for index in range(settings.n_learners):
                slots = [Slot(update.parameters()) for _ in range(SLOTS_PER_LEARNER)]
                self.learners.append(_Learner(self._start(index, slots), slots))
        except BaseException:
            # Nobody else can end what was started, and give the replay buffer its memory back
            self.close()
            raise

    def _start(self, index: int, slots: list[Slot]) -> Worker:
        arguments = (self.payload, self.replay.shared_parts(), self.parameters, slots)
        return Worker(self.context, run_learner, arguments, f"learner-{index}")

    def restart(self, index: int) -> None:
        """
        Replace the process of a learner.

        :param index: index of the learner
        """
        learner = self.learners[index]
        learner.worker.close()
        self.scheduler.restart(index)
        learner.worker = self._start(index, learner.slots)
        learner.since = time.monotonic()

    def publish(self, version: int, inputs: TrainingInputs) -> None:
        """
        Make the present tensors and transitions visible to the learners.

        :param version: number of updates that were applied to the parameters
        :param inputs: present inputs of gradients
        """
        self.parameters.publish(self.networks + inputs.units.statistics(), version)
        self.replay.publish()

    def close(self) -> None:
        """End the processes, and move the replay buffer back to private memory."""
        workers = [learner.worker for learner in self.learners]
        for worker in workers:
            try:
                worker.connection.send(None)
            except OSError:
                pass  # it has ended
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.close(max(deadline - time.monotonic(), 0.0))
        self.replay.close()


def _layout(update: Update, inputs: TrainingInputs) -> tuple[Any, ...]:
    """
    :param update: computes gradients
    :param inputs: present inputs of gradients
    :return: properties that running learners cannot change; when they change, the learners are started again
    """
    n_agents = None if update.simulator is None else update.simulator.num_agents
    # Replay buffers are compared by identity
    return id(inputs.replay_buffer), n_agents, update.seed, [tensor.shape for tensor in inputs.units.statistics()]


def pickled(content: Any) -> bytes:
    """
    :param content: objects for learners
    :return: their pickle
    :raises ValueError: when they cannot be pickled
    """
    try:
        return cloudpickle.dumps(content)
    except Exception as error:
        raise ValueError(
            f"The model, the policy, the simulator or a setting of the algorithm cannot be sent to learner processes "
            f"({type(error).__name__}: {error}). Make it picklable, or compute in process with n_learners=0."
        ) from error


class MultiprocessLearners(Learners):
    """
    A pool of learner processes, each with its own copy of the networks and of the model.

    Parameters, transitions and gradients are in shared memory. Only tasks, settings, scalars and exceptions are sent.
    Learners compute at the newest parameters, while the main process steps the environment. A
    :class:`~sb3_mpg.common.learners.scheduler.Scheduler` assigns updates to learners.

    The first update starts the processes. A learner that dies or hangs is replaced, and its updates are assigned again.

    Copies and pickles compute in process: processes and their shared memory belong to one training.

    :param update: computes gradients
    :param inputs: present inputs of gradients
    :param settings: number and staleness of the learners, and settings of the pool
    :raises ValueError: when something cannot be sent to processes, or learners would compute other gradients than in process
    """

    def __init__(self, update: Update, inputs: TrainingInputs, settings: LearnerSettings):
        exit_without_main_guard()
        if any(isinstance(module, th.nn.modules.batchnorm._NormBase) for module in update.policy.modules()):
            raise ValueError("Batch normalisation gathers statistics with each gradient, which needs n_learners=0.")
        # Fail before the first step
        pickled((update.for_learner(), inputs.settings_of(1)))
        self.update = update
        # They stay what they are while the learners run
        self.settings = replace(settings)
        self.n_dropped = 0
        self.n_restarts = 0
        self._pool: _Pool | None = None
        self._outcomes: dict[int, Outcome] = {}
        self._in_use: Assignment | None = None
        self._last_look = 0.0
        self._apply_times: deque[float] = deque(maxlen=THROUGHPUT_WINDOW)
        self._values: dict[str, list[float]] = {}

    def __reduce__(self) -> tuple[type[InProcessLearner], tuple[Update]]:
        return InProcessLearner, (self.update,)

    def next_result(self, n_updates: int, inputs: TrainingInputs) -> GradientResult:
        if self._pool is not None and self._pool.layout != _layout(self.update, inputs):
            # A callback changed the replay buffer, or another property that running learners cannot change
            self.close()
        is_first = self._pool is None
        pool = self._pool = self._pool or _Pool(self.update, inputs, self.settings, n_updates)
        version = n_updates - 1
        if is_first or pool.scheduler.max_staleness == 0:
            pool.publish(version, inputs)
        start = time.perf_counter()
        self._receive(pool, 0.0)
        while True:
            self._hand_out(pool, inputs)
            while pool.scheduler.has_arrived:
                # Drop results that are too old
                arrival = pool.scheduler.take(version)
                if arrival is None:
                    self.n_dropped += 1
                    self._hand_out(pool, inputs)
                    continue
                self._in_use = arrival.assignment
                outcome = self._outcomes.pop(arrival.assignment.n_updates)
                self._note(version - arrival.version, time.perf_counter() - start, outcome)
                return self._result(pool, arrival.assignment, outcome)
            self._receive(pool, min(LOOK_EVERY, self.settings.pool.timeout))

    def _result(self, pool: _Pool, assignment: Assignment, outcome: Outcome) -> GradientResult:
        views = pool.learners[assignment.learner].views[assignment.slot]
        gradients = {name: [tensor.to(self.update.device) for tensor in views[name]] for name in outcome.networks}
        return GradientResult(gradients, outcome.logs, outcome.share_masked)

    def applied(self, n_updates: int, inputs: TrainingInputs) -> None:
        pool, in_use = self._pool, self._in_use
        assert pool is not None and in_use is not None, "No result was taken"
        pool.scheduler.release(in_use)
        self._in_use = None
        self._apply_times.append(time.perf_counter())
        if pool.scheduler.max_staleness > 0:
            pool.publish(n_updates, inputs)
            self._hand_out(pool, inputs)

    def _hand_out(self, pool: _Pool, inputs: TrainingInputs) -> None:
        """
        Send all tasks that the scheduler allows.

        :param pool: the learners
        :param inputs: present inputs of gradients
        """
        while True:
            # Computed before the assignment, which makes its learner busy
            idle = [not pool.scheduler.owes_answer(index) for index in range(len(pool.learners))]
            assignment = pool.scheduler.assign()
            if assignment is None:
                return
            settings = pickled(inputs.settings_of(assignment.n_updates))
            drawn = pool.replay.draw(self.update, assignment.n_updates, inputs.batch_size)
            task = Task(assignment.n_updates, inputs.batch_size, assignment.slot, settings, inputs.units.scalars(), drawn)
            learner = pool.learners[assignment.learner]
            if idle[assignment.learner]:
                learner.since = time.monotonic()
            try:
                learner.worker.connection.send(task)
            except (BrokenPipeError, ConnectionResetError):
                self._replace(pool, assignment.learner)

    def _receive(self, pool: _Pool, timeout: float) -> None:
        """
        Receive messages, and replace learners that died or hang.

        :param pool: the learners
        :param timeout: how long to wait for a message, in seconds
        """
        # Wait for messages and for the end of processes
        self._last_look = time.monotonic()
        by_handle: dict[Any, int] = {}
        for index, learner in enumerate(pool.learners):
            by_handle[learner.worker.connection] = by_handle[learner.worker.process.sentinel] = index
        for index in dict.fromkeys(by_handle[handle] for handle in wait(list(by_handle), timeout)):
            worker = pool.learners[index].worker
            try:
                while worker.connection.poll():
                    self._take(pool, index, worker.connection.recv())
                died = not worker.is_alive()
            except (EOFError, OSError):
                died = True
            if died:
                self._replace(pool, index)
        # Replace learners that hang
        now = time.monotonic()
        for index, learner in enumerate(pool.learners):
            seconds = self.settings.pool.timeout
            limit = seconds if pool.scheduler.is_ready(index) else max(seconds, START_SECONDS)
            if pool.scheduler.owes_answer(index) and now - learner.since > limit:
                self._replace(pool, index, "did not answer in time")

    def _take(self, pool: _Pool, index: int, message: Ready | Outcome | Failure) -> None:
        """
        :param pool: the learners
        :param index: index of the learner that sent the message
        :param message: the message
        :raises Exception: the exception of the learner, if it failed
        """
        pool.learners[index].since = time.monotonic()
        if isinstance(message, Failure):
            message.reraise()
        elif isinstance(message, Ready):
            pool.scheduler.set_ready(index)
        else:
            pool.scheduler.arrive(index, message.n_updates, message.version)
            self._outcomes[message.n_updates] = message

    def _replace(self, pool: _Pool, index: int, reason: str | None = None) -> None:
        """
        :param pool: the learners
        :param index: index of the learner that is replaced
        :param reason: why it is ended; ``None`` if its process died
        :raises RuntimeError: when it could not start, or when too many learners were replaced
        """
        if reason is None:
            code = pool.learners[index].worker.exit_code()
            if code == NO_MAIN_GUARD:
                raise RuntimeError(NO_MAIN_GUARD_MESSAGE)
            reason = "ran out of memory" if code == OUT_OF_MEMORY else f"died with exit code {code}"
            if not pool.scheduler.is_ready(index) and code is not None and code > 0:
                raise RuntimeError(f"A learner {reason} while it was starting; see its output above.")
        if self.n_restarts >= self.settings.pool.max_restarts:
            raise RuntimeError(
                f"A learner {reason}, after {self.n_restarts} others were replaced: training stops. The model is intact and "
                "can be saved. Learners are often killed because memory is short; `max_restarts` in `learner_kwargs` allows "
                "more."
            )
        self.n_restarts += 1
        warnings.warn(f"A learner {reason} and is replaced; `learners/restarts` counts them.")
        pool.restart(index)

    @contextmanager
    def writing(self, replay_buffer: ReplayBuffer) -> Iterator[None]:
        pool = self._pool
        if pool is None or pool.replay.buffer is not replay_buffer:
            yield
            return
        with pool.replay.writing():
            yield
        if time.monotonic() - self._last_look > LOOK_EVERY:
            self._receive(pool, 0.0)

    def _note(self, staleness: int, waited: float, outcome: Outcome) -> None:
        for name, value in {
            "staleness": staleness,
            "optimizer_wait_ms": 1e3 * waited,
            "learner_wait_ms": 1e3 * outcome.idle_seconds,
            "gradient_ms": 1e3 * outcome.busy_seconds,
        }.items():
            self._values.setdefault(name, []).append(value)

    def record(self, logger: Logger) -> None:
        for name, values in self._values.items():
            if name == "staleness":
                largest = f"learners/{name}_max"
                # The maximum since the last dump of the logger
                logger.record(largest, max(logger.name_to_value[largest], *values))
                name = f"{name}_mean"
            for value in values:
                logger.record_mean(f"learners/{name}", value)
        self._values = {}
        if len(self._apply_times) > 1:
            seconds = self._apply_times[-1] - self._apply_times[0]
            logger.record("learners/throughput", (len(self._apply_times) - 1) / max(seconds, np.finfo(float).eps))
        logger.record("learners/dropped", self.n_dropped)
        logger.record("learners/restarts", self.n_restarts)

    def pids(self) -> list[int]:
        """
        :return: ids of the processes that are running
        """
        learners = [] if self._pool is None else self._pool.learners
        return [learner.worker.process.pid for learner in learners if learner.worker.process.pid is not None]

    def close(self) -> None:
        pool, self._pool = self._pool, None
        self._in_use = None
        self._outcomes = {}
        if pool is not None:
            pool.close()
