"""What a learner process does, and the messages between it and the main process."""

import threading
import time
from itertools import chain
from multiprocessing.connection import Connection
from typing import NamedTuple

import cloudpickle
import torch as th

from sb3_mpg.common.learners.shared_memory import SharedParameters, SharedReplayReader, SharedTensors
from sb3_mpg.common.models.trainable import TrainableModel
from sb3_mpg.common.precision import set_matmul_precision
from sb3_mpg.common.processes import Ready, SharedBytes
from sb3_mpg.common.type_aliases import GradientResult
from sb3_mpg.common.utils import keep_freed_memory


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
