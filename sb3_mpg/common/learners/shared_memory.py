"""
Shared memory without names: the system frees it when the last process ends, even if that is killed.

There are no locks, because a killed process would keep its lock. Instead there is one writer and a counter (a *seqlock*):
readers compare the counter before and after, and read again if it has changed. This relies on stores becoming visible in
their order, as they do on x86.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.heap import Arena
from typing import Any

import numpy as np
import torch as th

# Alignment of tensors and arrays in bytes, as in torch
ALIGNMENT = 64
# How long a reader sleeps while the writer writes
READ_AGAIN_SECONDS = 2e-5


class SharedArrays:
    """
    NumPy arrays in shared memory. Pages that are never written to take no memory.

    :param shapes: shapes of the arrays
    :param dtypes: types of the arrays
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any]):
        self.shapes = [tuple(shape) for shape in shapes]
        self.dtypes = [np.dtype(dtype) for dtype in dtypes]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        self.offsets = np.cumsum([0] + [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]).tolist()
        # `RawArray` without its initialisation, which would write zeros to all pages
        self.arena = Arena(max(self.offsets[-1], 1))

    def views(self) -> list[np.ndarray]:
        """
        :return: the arrays
        """
        layout = zip(self.shapes, self.dtypes, self.offsets, strict=False)
        return [np.ndarray(shape, dtype, self.arena.buffer, offset) for shape, dtype, offset in layout]


class SharedTensors:
    """
    Tensors in shared memory, on the CPU.

    :param templates: tensors of the same shapes and types
    """

    def __init__(self, templates: Sequence[th.Tensor]):
        self.shapes = [tuple(tensor.shape) for tensor in templates]
        self.dtypes = [tensor.dtype for tensor in templates]
        sizes = [(tensor.numel() * tensor.element_size(),) for tensor in templates]
        self.bytes = SharedArrays(sizes, [np.uint8] * len(sizes))

    def views(self) -> list[th.Tensor]:
        """
        :return: the tensors
        """
        layout = zip(self.bytes.views(), self.shapes, self.dtypes, strict=True)
        return [th.from_numpy(array).view(dtype).reshape(shape) for array, shape, dtype in layout]


class SeqlockHeader:
    """
    A counter, odd while the writer writes, and a few integers that are written together with the guarded data.

    :param n_values: number of integers
    """

    def __init__(self, n_values: int):
        self.shared = SharedArrays([(1 + n_values,)], [np.int64])
        self.numbers = self.shared.views()[0]

    def __getstate__(self) -> dict[str, Any]:
        return {"shared": self.shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shared = state["shared"]
        self.numbers = self.shared.views()[0]

    @contextmanager
    def writing(self) -> Iterator[np.ndarray]:
        """
        Context of the writer.

        :return: the integers, to be written to
        """
        self.numbers[0] += 1
        try:
            yield self.numbers[1:]
        finally:
            self.numbers[0] += 1

    def attempts(self) -> Iterator[int]:
        """
        :return: a counter for each attempt to read; pass it to :meth:`is_intact` after reading
        """
        while True:
            sequence = int(self.numbers[0])
            if sequence % 2 == 0:
                yield sequence
            else:
                time.sleep(READ_AGAIN_SECONDS)

    def is_intact(self, sequence: int) -> bool:
        """
        :param sequence: counter of :meth:`attempts`
        :return: whether nothing was written since
        """
        return int(self.numbers[0]) == sequence


class SharedParameters:
    """
    Tensors that one process publishes, with a version number, and others fetch.

    :param templates: tensors of the same shapes and types
    """

    def __init__(self, templates: Sequence[th.Tensor]):
        self.shared = SharedTensors(templates)
        self.header = SeqlockHeader(1)
        self.views = self.shared.views()

    def __getstate__(self) -> dict[str, Any]:
        return {"shared": self.shared, "header": self.header}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.views = self.shared.views()

    @th.no_grad()
    def publish(self, tensors: Sequence[th.Tensor], version: int) -> None:
        """
        :param tensors: tensors to publish
        :param version: their version number
        """
        with self.header.writing() as numbers:
            th._foreach_copy_(self.views, list(tensors))
            numbers[0] = version

    @th.no_grad()
    def fetch(self, tensors: Sequence[th.Tensor]) -> int:
        """
        :param tensors: tensors to overwrite in place
        :return: version number of their new contents
        """
        for sequence in self.header.attempts():
            th._foreach_copy_(list(tensors), self.views)
            version = int(self.header.numbers[1])
            if self.header.is_intact(sequence):
                return version
        raise AssertionError("attempts never end")
