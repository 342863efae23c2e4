"""Learners that are processes on the same machine."""

import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger

from sb3_mpg.common.learners.base import Learners, LearnerSettings, TrainingInputs
from sb3_mpg.common.learners.scheduler import Assignment, Scheduler
from sb3_mpg.common.learners.shared_memory import (
    SharedParameters,
    SharedReplayBuffer,
    SharedReplayReader,
    SharedTensors,
    check_shareable,
)
from sb3_mpg.common.models.trainable import TrainableModel
from sb3_mpg.common.precision import get_matmul_precision, set_matmul_precision
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
from sb3_mpg.common.utils import keep_freed_memory

# One gradient is computed while another waits to be applied
SLOTS_PER_LEARNER = 2
# How long a learner may take to start, at least
START_SECONDS = 120.0
# How often learners are looked after while the environment is stepped, in seconds
LOOK_EVERY = 0.5
# The throughput is measured over that many updates
THROUGHPUT_WINDOW = 100


class Task(NamedTuple):
    """
    :param n_updates: number of the update that is to be computed
    :param batch_size: number of transitions
    :param slot: where the gradients go
    :param settings: of the update, pickled: they may hold objects of classes that only cloudpickle can send
    :param scalars: of the units
    """

    n_updates: int
    batch_size: int
    slot: int
    settings: bytes
    scalars: dict[str, float]


class Outcome(NamedTuple):
    """
    :param n_updates: number of the update that was computed
    :param version: number of updates that the parameters had seen
    :param networks: names of the networks whose gradients are in the slot
    :param logs: scalars about the update
    :param share_masked: as in ``GradientResult``
    :param idle_seconds: how long the learner had waited for the task
    :param busy_seconds: how long it took
    """

    n_updates: int
    version: int
    networks: list[str]
    logs: dict[str, float]
    share_masked: float
    idle_seconds: float
    busy_seconds: float


def _avoid_semaphores() -> None:
    """
    torch's compiler shows its progress by tqdm, whose lock is a semaphore of the operating system unless it is given
    another lock. If this process were killed, nobody would remove the semaphore.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return  # torch does without it, too
    tqdm.set_lock(threading.RLock())


class Slot:
    """
    Shared memory for the gradients of one update.

    :param templates: tensors of the shapes of the gradients, by the name of the network
    """

    def __init__(self, templates: dict[str, list[th.Tensor]]):
        self.sizes = {name: len(tensors) for name, tensors in templates.items()}
        self.tensors = SharedTensors([*chain.from_iterable(templates.values())])

    def views(self) -> dict[str, list[th.Tensor]]:
        """
        :return: the tensors, by the name of the network
        """
        views = iter(self.tensors.views())
        return {name: [next(views) for _ in range(size)] for name, size in self.sizes.items()}


def run_learner(
    connection: Connection, payload: SharedBytes, replay: tuple, parameters: SharedParameters, slots: list[Slot]
) -> None:
    """
    What a learner does: read the newest parameters, compute, write the gradients; until it is told to end.

    :param connection: to the main process
    :param payload: the update, its units, the replay buffer without its arrays and the precision of products, pickled
    :param replay: of ``SharedReplayBuffer.shared_parts``
    :param parameters: what the main process publishes
    :param slots: where the gradients go
    """
    _avoid_semaphores()
    keep_freed_memory()
    update, units, buffer, precision = payload.load()
    set_matmul_precision(precision)
    reader = SharedReplayReader(buffer, *replay)
    update.policy.set_training_mode(True)
    update.model.train()
    tensors = update.tensors() + units.statistics()
    slot_views = [slot.views() for slot in slots]
    connection.send(Ready())
    while True:
        start = time.perf_counter()
        task: Task | None = connection.recv()
        if task is None:
            return
        started = time.perf_counter()
        version = parameters.fetch(tensors)
        if isinstance(update.model, TrainableModel):
            update.model.refresh()
        settings, scaled = cloudpickle.loads(task.settings), units.with_scalars(task.scalars)
        result: GradientResult = update.gradients_of_update(task.n_updates, task.batch_size, reader, scaled, settings)
        with th.no_grad():
            for name, gradients in result.gradients.items():
                th._foreach_copy_(slot_views[task.slot][name], gradients)
        times = started - start, time.perf_counter() - started
        connection.send(Outcome(task.n_updates, version, [*result.gradients], result.logs, result.share_masked, *times))


class _Learner:
    """
    The main process's side of a learner.

    :param worker: its process
    :param slots: where its gradients go
    """

    def __init__(self, worker: Worker, slots: list[Slot]):
        self.worker = worker
        self.slots = slots
        self.views = [slot.views() for slot in slots]
        # Since when it owes an answer
        self.since = time.monotonic()


class _Pool:
    """
    Learner processes and what they share with the main process.

    :param update: computes gradients
    :param inputs: what gradients depend on
    :param settings: of the learners
    :param first_update: number of the first update
    """

    def __init__(self, update: Update, inputs: TrainingInputs, settings: LearnerSettings, first_update: int):
        self.scheduler = Scheduler(settings.n_learners, SLOTS_PER_LEARNER, settings.staleness_bound, first_update)
        self.context = process_context(settings.pool.start_method)
        # Collected once: walking through the modules at each update costs more than all else here
        self.networks = update.tensors()
        self.layout = _layout(update, inputs)
        self.parameters = SharedParameters(self.networks + inputs.units.statistics())
        self.replay = SharedReplayBuffer(inputs.replay_buffer)
        content = (update, inputs.units, self.replay.stripped_buffer(), get_matmul_precision())
        self.payload = SharedBytes(pickled(content))
        self.learners: list[_Learner] = []
        try:
            for index in range(settings.n_learners):
                slots = [Slot(update.parameters()) for _ in range(SLOTS_PER_LEARNER)]
                self.learners.append(_Learner(self._start(index, slots), slots))
        except BaseException:
            # Nobody else knows of those that were started
            self.close()
            raise

    def _start(self, index: int, slots: list[Slot]) -> Worker:
        arguments = (self.payload, self.replay.shared_parts(), self.parameters, slots)
        return Worker(self.context, run_learner, arguments, f"learner-{index}")

    def restart(self, index: int) -> None:
        """
        :param index: number of a learner whose process is replaced
        """
        learner = self.learners[index]
        learner.worker.close()
        self.scheduler.restart(index)
        learner.worker = self._start(index, learner.slots)
        learner.since = time.monotonic()

    def publish(self, version: int, inputs: TrainingInputs) -> None:
        """
        :param version: number of updates that the parameters have seen
        :param inputs: what gradients depend on
        """
        self.parameters.publish(self.networks + inputs.units.statistics(), version)
        self.replay.publish()

    def close(self) -> None:
        """End the processes, and give the replay buffer its memory back."""
        workers = [learner.worker for learner in self.learners]
        for worker in workers:
            try:
                worker.connection.send(None)
            except OSError:
                pass  # it is gone
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.close(max(deadline - time.monotonic(), 0.0))
        self.replay.restore()


def _layout(update: Update, inputs: TrainingInputs) -> tuple[Any, ...]:
    """
    :param update: computes gradients
    :param inputs: what gradients depend on
    :return: what learners are started with and cannot be told later; when it changes, they are started again
    """
    n_agents = None if update.simulator is None else update.simulator.num_agents
    # A replay buffer by identity, as it has no other equality
    return id(inputs.replay_buffer), n_agents, [tensor.shape for tensor in inputs.units.statistics()]


def pickled(content: Any) -> bytes:
    """
    :param content: what learners get
    :return: its pickle
    :raises ValueError: when there is none
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

    Parameters, transitions and gradients are in shared memory; only orders, settings, scalars and exceptions are sent.
    Learners always compute at the newest parameters, and while the main process steps the environment. A
    :class:`~sb3_mpg.common.learners.scheduler.Scheduler` decides who computes what.

    The processes are started by the first update; what cannot be sent to them is refused before the first step. A learner
    that dies or hangs is replaced, and its work is handed out again.

    :param update: computes gradients
    :param inputs: what gradients depend on
    :param settings: see there
    :raises ValueError: when something cannot be sent to processes, or would not be computed in them as in this one
    """

    def __init__(self, update: Update, inputs: TrainingInputs, settings: LearnerSettings):
        exit_without_main_guard()
        check_shareable(inputs.replay_buffer)
        if any(isinstance(module, th.nn.modules.batchnorm._NormBase) for module in update.policy.modules()):
            raise ValueError("Batch normalisation gathers statistics with each gradient, which needs n_learners=0.")
        # Refuses what cannot be sent, before the first step
        pickled((update, inputs.settings_of(1)))
        self.update = update
        self.settings = settings
        self.n_dropped = 0
        self.n_restarts = 0
        self._pool: _Pool | None = None
        self._outcomes: dict[int, Outcome] = {}
        self._in_use: Assignment | None = None
        self._last_look = 0.0
        self._apply_times: deque[float] = deque(maxlen=THROUGHPUT_WINDOW)
        self._values: dict[str, list[float]] = {}

    def next_result(self, n_updates: int, inputs: TrainingInputs) -> GradientResult:
        if self._pool is not None and self._pool.layout != _layout(self.update, inputs):
            # A callback brought another replay buffer, or changed what learners cannot be told
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
        Hand out updates as far as the scheduler allows.

        :param pool: the learners
        :param inputs: what gradients depend on
        """
        while True:
            # Before its work counts
            idle = [not pool.scheduler.owes_answer(index) for index in range(len(pool.learners))]
            assignment = pool.scheduler.assign()
            if assignment is None:
                return
            settings = pickled(inputs.settings_of(assignment.n_updates))
            task = Task(assignment.n_updates, inputs.batch_size, assignment.slot, settings, inputs.units.scalars())
            learner = pool.learners[assignment.learner]
            if idle[assignment.learner]:
                learner.since = time.monotonic()
            try:
                learner.worker.connection.send(task)
            except (BrokenPipeError, ConnectionResetError):
                self._replace(pool, assignment.learner)

    def _receive(self, pool: _Pool, timeout: float) -> None:
        """
        Take what learners sent, and replace those that died or hang.

        :param pool: the learners
        :param timeout: how long to wait for anything, in seconds
        """
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
        now = time.monotonic()
        for index, learner in enumerate(pool.learners):
            seconds = self.settings.pool.timeout
            limit = seconds if pool.scheduler.is_ready(index) else max(seconds, START_SECONDS)
            if pool.scheduler.owes_answer(index) and now - learner.since > limit:
                self._replace(pool, index, "did not answer in time")

    def _take(self, pool: _Pool, index: int, message: Ready | Outcome | Failure) -> None:
        """
        :param pool: the learners
        :param index: number of the learner that sent the message
        :param message: the message
        :raises Exception: that of the learner
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
        :param index: number of a learner whose process died, or is to be ended
        :param reason: why it is to be ended
        :raises RuntimeError: when it could not start, or when too many were replaced
        """
        if reason is None:
            code = pool.learners[index].worker.exit_code()
            if code == NO_MAIN_GUARD:
                raise RuntimeError(NO_MAIN_GUARD_MESSAGE)
            reason = "ran out of memory" if code == OUT_OF_MEMORY else f"died with exit code {code}"
            if not pool.scheduler.is_ready(index) and code is not None and code > 0:
                raise RuntimeError(f"A learner {reason} while it was starting; what it says is above.")
        if self.n_restarts >= self.settings.pool.max_restarts:
            raise RuntimeError(
                f"A learner {reason}, after {self.n_restarts} others were replaced: training stops. The model is intact and "
                "can be saved. Learners are often killed for want of memory; `max_restarts` in `learner_kwargs` allows more."
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
                # Since the log was last written
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

    def close(self) -> None:
        pool, self._pool = self._pool, None
        self._in_use = None
        self._outcomes = {}
        if pool is not None:
            pool.close()
