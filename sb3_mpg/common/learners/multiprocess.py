"""Learners that are processes on the same machine."""

import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch as th
from stable_baselines3.common.logger import Logger

from sb3_mpg.common.learners.base import Learnable, Learners, LearnerSettings
from sb3_mpg.common.learners.shared_memory import (
    SharedParameters,
    SharedReplayBuffer,
    SharedReplayReader,
    SharedTensors,
    check_shareable,
)
from sb3_mpg.common.processes import (
    GRACE_SECONDS,
    NO_MAIN_GUARD,
    NO_MAIN_GUARD_MESSAGE,
    OUT_OF_MEMORY,
    SharedBytes,
    Worker,
    exit_without_main_guard,
    process_context,
    raise_packed,
)
from sb3_mpg.common.type_aliases import GradientResult
from sb3_mpg.common.units import Units

# One gradient is computed while another waits to be applied
TASKS_PER_LEARNER = 2
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
    :param attributes: of the replica
    """

    n_updates: int
    batch_size: int
    slot: int
    attributes: dict[str, Any]


class Outcome(NamedTuple):
    """
    :param n_updates: number of the update that was computed
    :param version: number of updates that the parameters had seen
    :param slot: where the gradients are
    :param has_actor: whether those of the actor are among them
    :param logs: scalars about the update
    :param idle_seconds: how long the learner had waited for the task
    :param busy_seconds: how long it took
    """

    n_updates: int
    version: int
    slot: int
    has_actor: bool
    logs: dict[str, Any]
    idle_seconds: float
    busy_seconds: float


def flat_gradients(result: GradientResult) -> list[th.Tensor]:
    """
    :param result: gradients
    :return: those of the critic, and those of the actor if there are any
    """
    return [*result.critic, *(result.actor or [])]


def _avoid_semaphores() -> None:
    """
    torch's compiler shows its progress by tqdm, whose lock is a semaphore of the operating system unless it is given
    another one. Nobody would remove it if this process were killed.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return  # torch does without it, too
    tqdm.set_lock(threading.RLock())


def run_learner(
    connection: Connection, payload: SharedBytes, replay: tuple, parameters: SharedParameters, slots: list[SharedTensors]
) -> None:
    """
    What a learner does: read the newest parameters, compute, write the gradients; until it is told to end.

    :param connection: to the optimizer
    :param payload: the replica of the algorithm, its units and its replay buffer, pickled
    :param replay: of ``SharedReplayBuffer.shared_parts``
    :param parameters: what the optimizer publishes
    :param slots: where the gradients go
    """
    _avoid_semaphores()
    algorithm, units, buffer = payload.load()
    algorithm.replay_buffer = SharedReplayReader(buffer, *replay)
    algorithm.setup_replica()
    tensors = algorithm.published_tensors() + units.statistics()
    slot_views = [slot.views() for slot in slots]
    connection.send("ready")
    while True:
        start = time.perf_counter()
        task: Task | None = connection.recv()
        if task is None:
            return
        started = time.perf_counter()
        version = parameters.fetch(tensors)
        algorithm.take_published(task.attributes)
        result = algorithm.gradients_of_update(task.n_updates, task.batch_size, units)
        gradients = flat_gradients(result)
        with th.no_grad():
            th._foreach_copy_(slot_views[task.slot][: len(gradients)], gradients)
        times = started - start, time.perf_counter() - started
        has_actor = result.actor is not None
        connection.send(Outcome(task.n_updates, version, task.slot, has_actor, result.logs, *times))


class _Learner:
    """
    The optimizer's side of a learner.

    :param index: its number
    :param slots: where its gradients go
    """

    def __init__(self, index: int, slots: list[SharedTensors]):
        self.index = index
        self.slots = slots
        self.views = [slot.views() for slot in slots]
        self.free_slots = list(range(len(slots)))
        self.tasks: dict[int, Task] = {}
        self.worker: Worker | None = None
        self.is_ready = False
        # Since when it owes an answer
        self.since = 0.0

    def start(self, worker: Worker) -> None:
        """
        :param worker: its process
        """
        self.worker = worker
        self.is_ready = False
        self.since = time.monotonic()

    def owes_answer(self) -> bool:
        return not self.is_ready or bool(self.tasks)


class MultiprocessLearners(Learners):
    """
    A pool of learner processes, each with its own copy of the networks and of the model.

    Parameters, transitions and gradients are in shared memory; only orders, scalars and exceptions are sent. Learners
    always compute at the newest parameters. Updates are handed out ahead, as far as ``max_staleness`` allows, so that the
    learners go on while the main process steps the environment; results are applied in the order in which they arrive,
    each once. One that is too old is dropped, counted, and computed again.

    The processes are started by the first update; what cannot be sent to them is refused before the first step. A learner
    that dies or hangs is replaced, and what it had to do is handed out again.

    :param algorithm: whose gradients
    :param settings: see there
    """

    def __init__(self, algorithm: Learnable, settings: LearnerSettings):
        exit_without_main_guard()
        assert algorithm.replay_buffer is not None
        check_shareable(algorithm.replay_buffer)
        self.algorithm = algorithm
        # For its complaints
        self._pickled(algorithm.make_replica())
        self.settings = settings
        self.max_staleness = settings.staleness_bound
        self.n_dropped = 0
        self.n_restarts = 0
        self._context = process_context(settings.start_method)
        self._learners: list[_Learner] = []
        self._replay: SharedReplayBuffer | None = None
        self._parameters: SharedParameters | None = None
        self._payload: SharedBytes | None = None
        # Collected once: to walk through the modules at each update costs more than all else here
        self._networks: list[th.Tensor] = []
        self._n_critic_gradients = 0
        self._next_update = 0
        # Updates that must be computed again
        self._returned: deque[int] = deque()
        self._arrived: deque[tuple[_Learner, Outcome]] = deque()
        self._in_use: tuple[_Learner, int] | None = None
        self._last_look = 0.0
        self._apply_times: deque[float] = deque(maxlen=THROUGHPUT_WINDOW)
        self._values: dict[str, list[float]] = {}

    @staticmethod
    def _pickled(content: Any) -> bytes:
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

    def _open(self, n_updates: int, units: Units) -> None:
        """
        Start the processes.

        :param n_updates: number of the first update
        :param units: conversions between environment and networks
        :raises ValueError: when something cannot be sent to them
        """
        assert self.algorithm.replay_buffer is not None
        gradients = self.algorithm.gradient_template()
        template = flat_gradients(gradients)
        self._n_critic_gradients = len(gradients.critic)
        self._networks = self.algorithm.published_tensors()
        self._parameters = SharedParameters(self._published(units))
        self._replay = SharedReplayBuffer(self.algorithm.replay_buffer)
        replica = self.algorithm.make_replica()
        self._payload = SharedBytes(self._pickled((replica, units, self._replay.stripped_buffer())))
        self._next_update = n_updates
        for index in range(self.settings.n_learners):
            self._learners.append(_Learner(index, [SharedTensors(template) for _ in range(TASKS_PER_LEARNER)]))
            self._start(self._learners[-1])

    def _start(self, learner: _Learner) -> None:
        assert self._replay is not None and self._parameters is not None
        arguments = (self._payload, self._replay.shared_parts(), self._parameters, learner.slots)
        learner.start(Worker(self._context, run_learner, arguments, f"learner-{learner.index}"))

    def _published(self, units: Units) -> list[th.Tensor]:
        return self._networks + units.statistics()

    def _publish(self, version: int, units: Units) -> None:
        """
        :param version: number of updates that the parameters have seen
        :param units: conversions between environment and networks
        """
        assert self._parameters is not None and self._replay is not None
        self._parameters.publish(self._published(units), version)
        self._replay.publish()

    def next_result(self, n_updates: int, batch_size: int, units: Units) -> GradientResult:
        is_first = not self._learners
        if not is_first and self.algorithm.replay_buffer is not self._replay.buffer:  # type: ignore[union-attr]
            # A callback brought another one
            self.close()
            is_first = True
        if is_first:
            self._open(n_updates, units)
        version = n_updates - 1
        if is_first or self.max_staleness == 0:
            self._publish(version, units)
        start = time.perf_counter()
        self._receive(0.0)
        while True:
            self._hand_out(batch_size)
            while self._arrived:
                learner, outcome = self._arrived.popleft()
                staleness = version - outcome.version
                if staleness > self.max_staleness:
                    self.n_dropped += 1
                    learner.free_slots.append(outcome.slot)
                    self._returned.append(outcome.n_updates)
                    self._hand_out(batch_size)
                    continue
                self._in_use = learner, outcome.slot
                self._note(staleness, time.perf_counter() - start, outcome)
                return self._result(learner, outcome)
            self._receive(min(LOOK_EVERY, self.settings.timeout))

    def _result(self, learner: _Learner, outcome: Outcome) -> GradientResult:
        tensors = learner.views[outcome.slot]
        device = self.algorithm.device
        if device.type != "cpu":
            tensors = [tensor.to(device) for tensor in tensors]
        n_critic = self._n_critic_gradients
        return GradientResult(tensors[:n_critic], tensors[n_critic:] if outcome.has_actor else None, outcome.logs)

    def applied(self, n_updates: int, batch_size: int, units: Units) -> None:
        assert self._in_use is not None
        learner, slot = self._in_use
        learner.free_slots.append(slot)
        self._in_use = None
        self._apply_times.append(time.perf_counter())
        if self.max_staleness > 0:
            self._publish(n_updates, units)
            self._hand_out(batch_size)

    def _n_outstanding(self) -> int:
        return len(self._arrived) + sum(len(learner.tasks) for learner in self._learners)

    def _hand_out(self, batch_size: int) -> None:
        """
        Hand out updates as long as their results will not be too old, if they are applied in this order.

        :param batch_size: number of transitions
        """
        attributes: dict[str, Any] | None = None
        while self._n_outstanding() <= self.max_staleness:
            # Nothing waits for one that is still starting
            able = [learner for learner in self._learners if learner.is_ready and learner.free_slots]
            if not able:
                return
            learner = min(able, key=lambda learner: len(learner.tasks))
            if attributes is None:
                attributes = self.algorithm.published_attributes()
            n_updates = self._returned.popleft() if self._returned else self._next_update
            task = Task(n_updates, batch_size, learner.free_slots.pop(), attributes)
            self._next_update = max(self._next_update, n_updates + 1)
            if not learner.owes_answer():
                learner.since = time.monotonic()
            learner.tasks[n_updates] = task
            assert learner.worker is not None
            try:
                learner.worker.connection.send(task)
            except (BrokenPipeError, ConnectionResetError):
                self._replace(learner)

    def _receive(self, timeout: float) -> None:
        """
        Take what learners sent, and replace those that died or hang.

        :param timeout: how long to wait for anything, in seconds
        """
        self._last_look = time.monotonic()
        by_handle: dict[Any, _Learner] = {}
        for learner in self._learners:
            assert learner.worker is not None
            by_handle[learner.worker.connection] = by_handle[learner.worker.process.sentinel] = learner
        ready = {id(learner): learner for learner in (by_handle[handle] for handle in wait(list(by_handle), timeout))}
        for learner in ready.values():
            assert learner.worker is not None
            connection = learner.worker.connection
            try:
                while connection.poll():
                    self._take(learner, connection.recv())
                died = not learner.worker.is_alive()
            except (EOFError, OSError):
                died = True
            if died:
                self._replace(learner)
        now = time.monotonic()
        for learner in self._learners:
            limit = self.settings.timeout if learner.is_ready else max(self.settings.timeout, START_SECONDS)
            if learner.owes_answer() and now - learner.since > limit:
                self._replace(learner, "did not answer in time")

    def _take(self, learner: _Learner, message: Any) -> None:
        """
        :param learner: who sent it
        :param message: that it is ready, an outcome, or an exception
        :raises Exception: that of the learner
        """
        learner.since = time.monotonic()
        if message == "ready":
            learner.is_ready = True
        elif isinstance(message, Outcome):
            del learner.tasks[message.n_updates]
            self._arrived.append((learner, message))
        else:
            raise_packed(*message)

    def _replace(self, learner: _Learner, reason: str | None = None) -> None:
        """
        :param learner: whose process died, or is to be ended
        :param reason: why it is to be ended
        :raises RuntimeError: when it could not start, or when too many were replaced
        """
        worker = learner.worker
        assert worker is not None
        if reason is None:
            code = worker.exit_code()
            if code == NO_MAIN_GUARD:
                raise RuntimeError(NO_MAIN_GUARD_MESSAGE)
            reason = "ran out of memory" if code == OUT_OF_MEMORY else f"died with exit code {code}"
            if not learner.is_ready and code is not None and code > 0:
                raise RuntimeError(f"A learner {reason} while it was starting; what it says is above.")
        if self.n_restarts >= self.settings.max_restarts:
            raise RuntimeError(
                f"A learner {reason}, after {self.n_restarts} others were replaced: training stops. The model is intact and "
                "can be saved. Learners are often killed for want of memory; `max_restarts` in `learner_kwargs` allows more."
            )
        self.n_restarts += 1
        warnings.warn(f"A learner {reason} and is replaced; `learners/restarts` counts them.")
        worker.close()
        # Should another one fail to start
        learner.worker = None
        for task in learner.tasks.values():
            learner.free_slots.append(task.slot)
        self._returned.extend(sorted(learner.tasks))
        learner.tasks = {}
        self._start(learner)

    @contextmanager
    def writing(self) -> Iterator[None]:
        if self._replay is None or self._replay.buffer is not self.algorithm.replay_buffer:
            yield
            return
        with self._replay.writing():
            yield
        if time.monotonic() - self._last_look > LOOK_EVERY:
            self._receive(0.0)

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
        learners, self._learners = self._learners, []
        # One that could not be started has none
        workers = [learner.worker for learner in learners if learner.worker is not None]
        for worker in workers:
            try:
                worker.connection.send(None)
            except OSError:
                pass  # it is gone
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.close(max(deadline - time.monotonic(), 0.0))
        if self._replay is not None:
            self._replay.restore()
        self._replay = self._parameters = self._in_use = None
        self._networks = []
        self._payload = None
        self._arrived.clear()
        self._returned.clear()
