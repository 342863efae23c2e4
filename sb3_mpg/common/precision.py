"""
Products in single precision on the fastest kernels that torch has for a CPU.

By default a CPU's float32 products are those of MKL, which runs at half of the speed of oneDNN on some processors that are not
Intel's. torch offers oneDNN's by a setting, ``th.set_float32_matmul_precision("medium")``, that allows for less precision. On
processors with matrix units (AMX) they are of bfloat16 then, with errors of 1 %; on all others they are as exact as MKL's.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch as th

# The rounding error may be so many times that of the default kernels, which differ by as much with the order of a sum
MAX_ERROR_RATIO = 4.0
# Far from what the noise of a timing makes of equal kernels: every run on a machine is to choose the same
MIN_SPEED_UP = 1.25
N_TRIALS = 20


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """
    :param precision: torch's setting within the context, see ``th.set_float32_matmul_precision``
    """
    before = th.get_float32_matmul_precision()
    th.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        th.set_float32_matmul_precision(before)


def is_as_exact(factors: Sequence[tuple[th.Tensor, th.Tensor]], precision: str) -> bool:
    """
    :param factors: of the products, float32
    :param precision: setting of torch
    :return: whether the products have the rounding errors of single precision with it
    """

    def error(precision: str) -> float:
        with matmul_precision(precision):
            return max((left @ right - left.double() @ right.double()).abs().max().item() for left, right in factors)

    return error(precision) <= MAX_ERROR_RATIO * error("highest")


def factors_of_layers(weights: Sequence[th.Tensor], batch_size: int) -> list[tuple[th.Tensor, th.Tensor]]:
    """
    :param weights: of linear layers, each ``(outputs, inputs)``
    :param batch_size: number of rows, B
    :return: the factors of their products forwards, ``(B, inputs)`` and ``(inputs, outputs)``, and backwards,
        ``(B, outputs)`` and ``(outputs, inputs)``; without the random numbers of others
    """
    generator = th.Generator().manual_seed(0)

    def random(width: int) -> th.Tensor:
        return th.randn(batch_size, width, generator=generator)

    return [factors for w in weights for factors in ((random(w.shape[1]), w.t()), (random(w.shape[0]), w))]


def choose_matmul_precision(network: th.nn.Module, batch_size: int) -> str:
    """
    Takes some ten milliseconds.

    :param network: its linear layers count, those of one shape once
    :param batch_size: number of rows that pass through it
    :return: the setting of torch that its products are to be computed with: the one that is set, unless it is torch's default
        on a CPU and another one is as exact and clearly faster
    """
    current = th.get_float32_matmul_precision()
    layers = [module for module in network.modules() if isinstance(module, th.nn.Linear)]
    weights = list({layer.weight.shape: layer.weight.detach() for layer in layers}.values())
    if current != "highest" or any(weight.device.type != "cpu" or weight.dtype != th.float32 for weight in weights):
        return current
    factors = factors_of_layers(weights, batch_size)
    if not factors or not is_as_exact(factors, "medium"):
        return current

    def seconds(precision: str) -> float:
        with matmul_precision(precision):
            start = time.perf_counter()
            for left, right in factors:
                left @ right
            return time.perf_counter() - start

    # By turns, and the least of all: other programs only ever add to it
    times = [(seconds("highest"), seconds("medium")) for _ in range(N_TRIALS)]
    usual, other = (min(column) for column in zip(*times, strict=True))
    return "medium" if usual > MIN_SPEED_UP * other else current
