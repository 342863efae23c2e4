"""
Chooses the fastest kernels of torch for matrix products in single precision on a CPU.

By default, torch computes float32 products on a CPU by MKL, which has half of the speed of oneDNN on some processors that are
not made by Intel. torch uses oneDNN when ``th.backends.mkldnn.matmul.fp32_precision`` allows a lower precision. On processors
with matrix units (AMX), oneDNN then computes in bfloat16, with errors of 1 %. On all others it is as exact as MKL.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th

# Values of torch's setting: the default kernels, and those of oneDNN
DEFAULT, ONEDNN = "none", "bf16"
# Largest rounding error, as a multiple of that of the default kernels. The order of a sum alone can change it by this factor
MAX_ERROR_RATIO = 4.0
# Larger than the noise of timings of equal kernels, so that every run on a machine makes the same choice
MIN_SPEED_UP = 1.25
# Largest total time of the trials in seconds, after the minimum number of trials
MAX_TRIAL_TIME = 0.1
MIN_TRIALS, MAX_TRIALS = 3, 20
# Larger batches would not change the result
MAX_ROWS, MAX_CHECKED_ROWS = 256, 32

Factors = Sequence[tuple[th.Tensor, th.Tensor]]


def _setting() -> Any:
    # Old versions of torch do not have the setting, and use the default kernels
    matmul = getattr(th.backends.mkldnn, "matmul", None)
    return matmul if hasattr(matmul, "fp32_precision") else None


def get_matmul_precision() -> str:
    """
    :return: the current value of ``th.backends.mkldnn.matmul.fp32_precision``, ``DEFAULT`` if torch has no such setting
    """
    setting = _setting()
    return DEFAULT if setting is None else setting.fp32_precision


def set_matmul_precision(precision: str) -> None:
    """
    :param precision: new value of ``th.backends.mkldnn.matmul.fp32_precision``; ``DEFAULT`` leaves the setting as it is
    """
    if precision != DEFAULT:
        _setting().fp32_precision = precision


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """
    Context in which :func:`set_matmul_precision` applies.

    :param precision: value of the setting
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
    :param factors: factors of the products, float32
    :param precision: value of the setting
    :return: whether the products have the rounding errors of single precision with this setting
    """
    checked = [(left[:MAX_CHECKED_ROWS], right) for left, right in factors]

    def error(precision: str) -> float:
        with matmul_precision(precision):
            return max((left @ right - left.double() @ right.double()).abs().max().item() for left, right in checked)

    return error(precision) <= MAX_ERROR_RATIO * error(DEFAULT)


def factors_of_layers(weights: Sequence[th.Tensor], n_rows: int) -> list[tuple[th.Tensor, th.Tensor]]:
    """
    :param weights: weights of linear layers, each ``(outputs, inputs)``
    :param n_rows: number of rows, B
    :return: random factors of the shapes of the forward pass, ``(B, inputs)`` and ``(inputs, outputs)``, and of the backward
        pass, ``(B, outputs)`` and ``(outputs, inputs)``; drawn from a generator of their own
    """
    generator = th.Generator().manual_seed(0)

    def random(width: int) -> th.Tensor:
        return th.randn(n_rows, width, generator=generator)

    return [factors for w in weights for factors in ((random(w.shape[1]), w.t()), (random(w.shape[0]), w))]


def choose_matmul_precision(network: th.nn.Module, batch_size: int) -> str:
    """
    Compare the kernels on the products of a network. This takes a tenth of a second, and longer for layers with thousands of
    units.

    :param network: the network; layers other than linear ones, and repeated shapes, are ignored
    :param batch_size: number of rows of its inputs
    :return: argument of :func:`matmul_precision`: ``ONEDNN`` if it is as exact and clearly faster on the CPU, and the user has
        not changed the setting; otherwise ``DEFAULT``
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

    # Alternate the trials and take the minimum: other programs can only add time
    times: list[tuple[float, float]] = []
    while len(times) < MIN_TRIALS or (len(times) < MAX_TRIALS and sum(map(sum, times)) < MAX_TRIAL_TIME):
        times.append((seconds(DEFAULT), seconds(ONEDNN)))
    default_time, onednn_time = (min(column) for column in zip(*times, strict=True))
    return ONEDNN if default_time > MIN_SPEED_UP * onednn_time else DEFAULT
