"""
Products in single precision on the fastest kernels that torch has for a CPU.

By default a CPU's float32 products are those of MKL, which runs at half of the speed of oneDNN on some processors that are not
Intel's. torch hands products to oneDNN when ``th.backends.mkldnn.matmul.fp32_precision`` allows for less precision. On
processors with matrix units (AMX) they are of bfloat16 then, with errors of 1 %; on all others they are as exact as MKL's.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th

# Values of torch's setting: nothing said, and what brings oneDNN
DEFAULT, ONEDNN = "none", "bf16"
# The rounding error may be so many times that of the default kernels, which differ by as much with the order of a sum
MAX_ERROR_RATIO = 4.0
# Far from what the noise of a timing makes of equal kernels: every run on a machine is to choose the same
MIN_SPEED_UP = 1.25
# Trials take no longer than that, in seconds, but there are a few
MAX_TRIAL_TIME = 0.1
MIN_TRIALS, MAX_TRIALS = 3, 20
# More rows say nothing more
MAX_ROWS, MAX_CHECKED_ROWS = 256, 32

Factors = Sequence[tuple[th.Tensor, th.Tensor]]


def _setting() -> Any:
    # Not in old versions of torch, in which the default kernels are used
    matmul = getattr(th.backends.mkldnn, "matmul", None)
    return matmul if hasattr(matmul, "fp32_precision") else None


def get_matmul_precision() -> str:
    """
    :return: the value of ``th.backends.mkldnn.matmul.fp32_precision`` now, ``DEFAULT`` where torch has no such setting
    """
    setting = _setting()
    return DEFAULT if setting is None else setting.fp32_precision


def set_matmul_precision(precision: str) -> None:
    """
    :param precision: the value of ``th.backends.mkldnn.matmul.fp32_precision`` from now on; nothing else is touched, and for
        the default nothing at all
    """
    if precision != DEFAULT:
        _setting().fp32_precision = precision


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """
    :param precision: as for :func:`set_matmul_precision`, within the context
    """
    before = None if precision == DEFAULT else _setting().fp32_precision
    set_matmul_precision(precision)
    try:
        yield
    finally:
        if before is not None:
            _setting().fp32_precision = before


def is_as_exact(factors: Factors, precision: str) -> bool:
    """
    :param factors: of the products, float32
    :param precision: value of the setting
    :return: whether the products have the rounding errors of single precision with it
    """
    checked = [(left[:MAX_CHECKED_ROWS], right) for left, right in factors]

    def error(precision: str) -> float:
        with matmul_precision(precision):
            return max((left @ right - left.double() @ right.double()).abs().max().item() for left, right in checked)

    return error(precision) <= MAX_ERROR_RATIO * error(DEFAULT)


def factors_of_layers(weights: Sequence[th.Tensor], n_rows: int) -> list[tuple[th.Tensor, th.Tensor]]:
    """
    :param weights: of linear layers, each ``(outputs, inputs)``
    :param n_rows: number of rows, B
    :return: the factors of their products forwards, ``(B, inputs)`` and ``(inputs, outputs)``, and backwards,
        ``(B, outputs)`` and ``(outputs, inputs)``; without the random numbers of others
    """
    generator = th.Generator().manual_seed(0)

    def random(width: int) -> th.Tensor:
        return th.randn(n_rows, width, generator=generator)

    return [factors for w in weights for factors in ((random(w.shape[1]), w.t()), (random(w.shape[0]), w))]


def choose_matmul_precision(network: th.nn.Module, batch_size: int) -> str:
    """
    Takes a tenth of a second, for networks of thousands of units a few.

    :param network: its linear layers count, those of one shape once
    :param batch_size: number of rows that pass through it
    :return: for :func:`matmul_precision`: the default, unless oneDNN is as exact and clearly faster on the CPU, and the user
        said nothing
    """
    layers = [module for module in network.modules() if isinstance(module, th.nn.Linear)]
    weights = list({layer.weight.shape: layer.weight.detach() for layer in layers}.values())
    setting = _setting()
    if setting is None or setting.fp32_precision != DEFAULT or not weights:
        return DEFAULT
    if any(weight.device.type != "cpu" or weight.dtype != th.float32 for weight in weights):
        return DEFAULT
    factors = factors_of_layers(weights, min(batch_size, MAX_ROWS))
    if not is_as_exact(factors, ONEDNN):
        return DEFAULT

    def seconds(precision: str) -> float:
        with matmul_precision(precision):
            start = time.perf_counter()
            for left, right in factors:
                left @ right
            return time.perf_counter() - start

    # By turns, and the least of all: other programs only ever add to it
    times: list[tuple[float, float]] = []
    while len(times) < MIN_TRIALS or (len(times) < MAX_TRIALS and sum(map(sum, times)) < MAX_TRIAL_TIME):
        times.append((seconds(DEFAULT), seconds(ONEDNN)))
    usual, other = (min(column) for column in zip(*times, strict=True))
    return ONEDNN if usual > MIN_SPEED_UP * other else DEFAULT
