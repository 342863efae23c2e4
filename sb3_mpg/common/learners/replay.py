"""How learners get transitions of the replay buffer: from shared memory, or drawn by the main process."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mpg.common.learners.shared_memory import SeqlockHeader, SharedArrays
from sb3_mpg.common.randomness import randomness_of_update
from sb3_mpg.common.update import Update


class ReplayReader(ABC):
    """What a learner samples from. It can be pickled."""

    def attach(self, *parts: Any) -> None:  # noqa: B027  # only shared memory is attached
        """
        Called once in the process of the learner.

        :param parts: what :meth:`LearnersReplay.shared_parts` returned
        """

    def receive(self, drawn: bytes | None) -> None:  # noqa: B027  # only drawn transitions are received
        """
        Called before each update.

        :param drawn: what :meth:`LearnersReplay.draw` returned
        """

    @abstractmethod
    def sample(self, batch_size: int) -> ReplayBufferSamples:
        """
        :param batch_size: number of transitions
        :return: the transitions
        """


class LearnersReplay(ABC):
    """
    The replay buffer as the main process shows it to learners.

    :param buffer: the replay buffer
    """

    def __init__(self, buffer: ReplayBuffer):
        self.buffer = buffer

    @abstractmethod
    def reader(self) -> ReplayReader:
        """
        :return: what a learner samples from, after it has attached :meth:`shared_parts`
        """

    def shared_parts(self) -> tuple[Any, ...]:
        """
        :return: shared memory, which can be passed to a process only when that is started
        """
        return ()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Context in which the buffer is written to. Learners do not read meanwhile."""
        yield

    def publish(self) -> None:  # noqa: B027  # only shared memory is published
        """Make the present transitions visible to learners."""

    def draw(self, update: Update, n_updates: int, batch_size: int) -> bytes | None:
        """
        :param update: computes gradients
        :param n_updates: number of an update
        :param batch_size: number of transitions
        :return: message to the learner that computes the update
        """
        return None

    def close(self) -> None:  # noqa: B027  # only shared memory is given back
        """Give the buffer its own memory back."""


def is_shareable(buffer: ReplayBuffer) -> bool:
    """
    :param buffer: a replay buffer
    :return: whether it keeps nothing but what SB3's ``ReplayBuffer`` keeps. Learners would never see other attributes change.
    """
    reference = ReplayBuffer(1, spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)))
    return vars(buffer).keys() <= vars(reference).keys() | {"n_steps", "gamma"}


#: Attribute of a replay buffer that is an array, or a dictionary of arrays and the key
ArrayName = tuple[str, str | None]


def arrays_of(buffer: ReplayBuffer) -> dict[ArrayName, np.ndarray]:
    """
    :param buffer: a replay buffer
    :return: its arrays with one row for each step, by their names
    """
    arrays: dict[ArrayName, Any] = {}
    for name, value in vars(buffer).items():
        arrays.update({(name, key): part for key, part in value.items()} if isinstance(value, dict) else {(name, None): value})
    return {name: array for name, array in arrays.items() if np.ndim(array) > 0 and len(array) == buffer.buffer_size}


def set_array(buffer: ReplayBuffer, name: ArrayName, array: np.ndarray) -> None:
    """
    :param buffer: a replay buffer
    :param name: name of one of its arrays
    :param array: what replaces it
    """
    attribute, key = name
    if key is None:
        setattr(buffer, attribute, array)
    else:
        # A new dictionary, because a copy of the buffer shares the old one
        setattr(buffer, attribute, {**getattr(buffer, attribute, {}), key: array})


class SharedReplay(LearnersReplay):
    """
    Moves the arrays of a replay buffer into shared memory, in place. :meth:`close` moves them back. Learners sample by
    themselves.

    :param buffer: the replay buffer
    """

    def __init__(self, buffer: ReplayBuffer):
        super().__init__(buffer)
        arrays = arrays_of(buffer)
        self.names = list(arrays)
        self.shared = SharedArrays([array.shape for array in arrays.values()], [array.dtype for array in arrays.values()])
        self.header = SeqlockHeader(2)
        self._replace_arrays(self.shared.views())
        self.publish()

    def _n_rows(self) -> int:
        # With `optimize_memory_usage`, the observation after the last step is in the next row
        return min(self.buffer.size() + 1, self.buffer.buffer_size)

    def _replace_arrays(self, arrays: list[np.ndarray]) -> None:
        """
        :param arrays: new arrays of the buffer, which the filled rows are copied to
        """
        n_rows = self._n_rows()
        present = arrays_of(self.buffer)
        for name, array in zip(self.names, arrays, strict=True):
            array[:n_rows] = present[name][:n_rows]
            set_array(self.buffer, name, array)

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self.header.writing() as numbers:
            yield
            numbers[:] = self.buffer.pos, self.buffer.full

    def publish(self) -> None:
        # The fill level may have changed outside of `writing`
        if tuple(self.header.numbers[1:]) != (self.buffer.pos, self.buffer.full):
            with self.writing():
                pass

    def close(self) -> None:
        """Move the arrays of the buffer back to private memory."""
        layout = zip(self.shared.shapes, self.shared.dtypes, strict=True)
        self._replace_arrays([np.zeros(shape, dtype) for shape, dtype in layout])

    def reader(self) -> "SharedReader":
        buffer = copy.copy(self.buffer)
        for attribute in {attribute for attribute, _ in self.names}:
            delattr(buffer, attribute)
        return SharedReader(buffer, self.names)

    def shared_parts(self) -> tuple[Any, ...]:
        return self.shared, self.header


class SharedReader(ReplayReader):
    """
    A learner's view of the replay buffer.

    :param buffer: the replay buffer without its arrays
    :param names: names of the arrays
    """

    header: SeqlockHeader

    def __init__(self, buffer: ReplayBuffer, names: list[ArrayName]):
        self.buffer = buffer
        self.names = names

    def attach(self, shared: SharedArrays, header: SeqlockHeader) -> None:
        self.header = header
        for name, array in zip(self.names, shared.views(), strict=True):
            array.flags.writeable = False
            set_array(self.buffer, name, array)

    def sample(self, batch_size: int) -> ReplayBufferSamples:
        """
        As ``ReplayBuffer.sample``. The batch is read again if the buffer was written to meanwhile.

        :param batch_size: number of transitions
        :return: the transitions
        """
        shared_timeouts = self.buffer.timeouts
        random_state = np.random.get_state()
        for sequence in self.header.attempts():
            np.random.set_state(random_state)
            self.buffer.pos, self.buffer.full = int(self.header.numbers[1]), bool(self.header.numbers[2])
            if isinstance(self.buffer, NStepReplayBuffer):
                # While it samples, it marks the newest step as a timeout: in a copy, which is not shared
                self.buffer.timeouts = shared_timeouts.copy()
            try:
                samples = self.buffer.sample(batch_size)
            finally:
                self.buffer.timeouts = shared_timeouts
            if self.header.is_intact(sequence):
                return samples
        raise AssertionError("attempts never end")


class DrawnReplay(LearnersReplay):
    """
    Draws the batches of learners in the main process, from a buffer that cannot be shared: one with attributes of its own, as
    the environment of a ``HerReplayBuffer``, which computes rewards.

    :param buffer: the replay buffer
    """

    def reader(self) -> ReplayReader:
        return DrawnReader(self.buffer.device)

    def draw(self, update: Update, n_updates: int, batch_size: int) -> bytes:
        with randomness_of_update(update.seed, n_updates, update.device):
            samples = self.buffer.sample(batch_size)
            # The learner draws all other random numbers of the update
            return cloudpickle.dumps((to_device(samples, "cpu"), np.random.get_state(), th.get_rng_state()))


class DrawnReader(ReplayReader):
    """
    A learner's view of batches that the main process drew.

    :param device: device of the transitions
    """

    drawn: bytes

    def __init__(self, device: th.device):
        self.device = device

    def receive(self, drawn: bytes | None) -> None:
        assert drawn is not None
        self.drawn = drawn

    def sample(self, batch_size: int) -> ReplayBufferSamples:
        samples, numpy_state, torch_state = cloudpickle.loads(self.drawn)
        np.random.set_state(numpy_state)
        th.set_rng_state(torch_state)
        return to_device(samples, self.device)


def to_device(samples: Any, device: th.device | str) -> Any:
    """
    :param samples: a tensor, or samples of a replay buffer
    :param device: a device
    :return: the same on this device
    """
    if isinstance(samples, th.Tensor):
        return samples.to(device)
    if isinstance(samples, dict):
        return {key: to_device(part, device) for key, part in samples.items()}
    if isinstance(samples, tuple):
        return type(samples)(*(to_device(part, device) for part in samples))
    return samples


def replay_for_learners(buffer: ReplayBuffer) -> LearnersReplay:
    """
    :param buffer: the replay buffer
    :return: in shared memory if all that it keeps can be shared
    """
    return (SharedReplay if is_shareable(buffer) else DrawnReplay)(buffer)
