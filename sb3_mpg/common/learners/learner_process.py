"""Main loop of a learner process, and the messages between it and the main process."""

import threading
import time
from itertools import chain
from multiprocessing.connection import Connection
from typing import NamedTuple

import cloudpickle
import torch as th

from sb3_mpg.common.learners.shared_memory import SharedParameters, SharedTensors
from sb3_mpg.common.models.trainable import TrainableModel
from sb3_mpg.common.precision import set_matmul_precision
from sb3_mpg.common.processes import Ready, SharedBytes
from sb3_mpg.common.type_aliases import GradientResult
from sb3_mpg.common.utils import keep_freed_memory


class Task(NamedTuple):
    """
    Message to a learner: compute the gradients of an update.

    :param n_updates: number of the update
    :param batch_size: number of transitions
    :param slot: index of the slot that the gradients are written to
    :param settings: settings of the update, pickled, because only cloudpickle can pickle some objects in them
    :param scalars: what ``Units.scalars`` returned
    :param drawn: what ``LearnersReplay.draw`` returned
    """

    n_updates: int
    batch_size: int
    slot: int
    settings: bytes
    scalars: dict[str, float]
    drawn: bytes | None


class Outcome(NamedTuple):
    """
    Message of a learner: the gradients of an update are in their slot.

    :param n_updates: number of the update
    :param version: number of updates that were applied to the parameters that the gradients were computed at
    :param networks: names of the networks whose gradients are in the slot
    :param logs: scalars about the update
    :param share_masked: as in ``GradientResult``
    :param idle_seconds: how long the learner waited for the task
    :param busy_seconds: how long the task took
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
    torch's compiler uses tqdm, whose default lock is a semaphore of the operating system. If this process were killed, the
    semaphore would remain.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return  # torch does not need it
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
    Main loop of a learner: fetch the newest parameters, compute the gradients and write them, until ``None`` is received.

    :param connection: connection to the main process
    :param payload: the update, its units, the reader of the replay buffer and the precision of products, pickled
    :param replay: what ``LearnersReplay.shared_parts`` returned
    :param parameters: the parameters that the main process publishes
    :param slots: slots that the gradients are written to
    """
    _avoid_semaphores()
    keep_freed_memory()
    update, units, reader, precision = payload.load()
    set_matmul_precision(precision)
    reader.attach(*replay)
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
        # Fetch the newest parameters
        version = parameters.fetch(tensors)
        if isinstance(update.model, TrainableModel):
            update.model.refresh()
        reader.receive(task.drawn)
        # Compute the gradients, and write them to the slot
        settings, scaled = cloudpickle.loads(task.settings), units.with_scalars(task.scalars)
        result: GradientResult = update.gradients_of_update(task.n_updates, task.batch_size, reader, scaled, settings)
        with th.no_grad():
            for name, gradients in result.gradients.items():
                th._foreach_copy_(slot_views[task.slot][name], gradients)
        times = started - start, time.perf_counter() - started
        connection.send(Outcome(task.n_updates, version, [*result.gradients], result.logs, result.share_masked, *times))
