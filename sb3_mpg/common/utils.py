"""What several modules need: random numbers, gradients and parameters of networks, checks of arguments."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th


@contextmanager
def randomness_of_update(seed: int, n_updates: int, device: th.device) -> Iterator[None]:
    """
    Within this context the global random numbers of NumPy and torch are a function of the update alone, and no others are
    used up: whoever computes an update, and whenever, draws the same ones.

    :param seed: seed of the algorithm
    :param n_updates: number of the update
    :param device: where the networks are; the generator of a GPU is seeded, too
    """
    seeds = np.random.SeedSequence([seed, n_updates]).generate_state(2)
    numpy_state = np.random.get_state()
    with th.random.fork_rng([device] if device.type == "cuda" else []):
        np.random.seed(seeds[0])
        th.default_generator.manual_seed(int(seeds[1]))
        if device.type == "cuda":
            with th.cuda.device(device):
                th.cuda.manual_seed(int(seeds[1]))
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


def keep_freed_memory() -> None:
    """
    Let this process keep the memory that a gradient frees, until the next one. By default the C library of Linux gives it
    back to the system at once, and thousands of pages have to be asked for again at each update. It keeps up to twice the size
    of the largest block, of those up to 32 MiB, that was ever freed; that holds for the rest of the process.
    """
    # Never written to, so that it takes up no memory; freed at once
    th.empty(32 * 2**20 - 2**16, dtype=th.uint8, device="cpu")


@th.no_grad()
def polyak_update_all(parameters: Iterable[th.Tensor], target_parameters: Iterable[th.Tensor], tau: float) -> None:
    """
    SB3's ``polyak_update`` in one call for all tensors, which for small networks costs a tenth.

    :param parameters: what the targets follow
    :param target_parameters: what is moved, in place
    :param tau: by which share, between 0 and 1
    """
    th._foreach_lerp_(list(target_parameters), list(parameters), tau)


def trainable_parameters(network: th.nn.Module) -> list[th.nn.Parameter]:
    """
    :param network: a network, parts of which may be frozen
    :return: the parameters that are not
    """
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def gradient_of(output: th.Tensor, network: th.nn.Module, output_gradient: th.Tensor | None = None) -> list[th.Tensor]:
    """
    :param output: a loss, or what a loss is computed from
    :param network: what it depends on
    :param output_gradient: the gradient of the loss with respect to ``output``, in its shape; not for the loss itself
    :return: the gradient of the loss, one tensor for each trainable parameter, 0 for those that it does not depend on
    """
    parameters = trainable_parameters(network)
    return list(th.autograd.grad(output, parameters, output_gradient, allow_unused=True, materialize_grads=True))


@th.no_grad()
def clip_norm(tensors: list[th.Tensor], max_norm: float) -> float:
    """
    torch's ``clip_grad_norm_`` for less: what is small enough is left alone instead of multiplied by 1.

    :param tensors: all that the norm is of; scaled in place where it is larger than allowed, or not finite
    :param max_norm: largest norm
    :return: the norm before
    """
    norm = th.linalg.vector_norm(th.stack(th._foreach_norm(tensors))).item()
    if not norm <= max_norm:
        th._foreach_mul_(tensors, max_norm / (norm + 1e-6))
    return norm


def finite_mean(values: th.Tensor) -> th.Tensor:
    """
    :param values: any shape
    :return: the mean of those that are finite, a scalar; not a number if none is
    """
    is_finite = th.isfinite(values)
    return th.where(is_finite, values, 0.0).sum() / is_finite.sum()


def check_keywords(name: str, kwargs: dict[str, Any] | None, function: Callable[..., Any], *taken: str) -> dict[str, Any]:
    """
    :param name: of the setting that gives keyword arguments
    :param kwargs: the keyword arguments, or ``None`` for none
    :param function: what they are for
    :param taken: its arguments that are given otherwise
    :return: the keyword arguments
    :raises ValueError: when there is one that the function does not have
    """
    kwargs = kwargs or {}
    known = [parameter for parameter in inspect.signature(function).parameters if parameter not in taken]
    unknown = [keyword for keyword in kwargs if keyword not in known]
    if unknown:
        raise ValueError(f"`{name}` got {unknown}, expected some of {known}.")
    return kwargs


def is_finite_number(number: Any) -> bool:
    """
    :param number: anything
    :return: whether it is a finite number; booleans are none
    """
    is_number = isinstance(number, (int, float, np.integer, np.floating)) and not isinstance(number, bool)
    return is_number and bool(np.isfinite(number))


def is_whole(number: Any) -> bool:
    """
    :param number: anything
    :return: whether it is a whole number, written as one or not
    """
    return is_finite_number(number) and int(number) == number


def check_count(name: str, count: int, low: int) -> None:
    """
    :param name: of a setting
    :param count: its value
    :param low: the least that makes sense
    :raises ValueError: when it is no whole number, or too small
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < low:
        raise ValueError(f"`{name}` must be a whole number, {low} or more, got {count!r}.")


def check_number(name: str, number: float, low: float, includes_low: bool = True) -> None:
    """
    :param name: of a setting
    :param number: its value
    :param low: what it must not fall below
    :param includes_low: whether it may be as small as that
    :raises ValueError: when it is no finite number, or too small
    """
    if not is_finite_number(number) or number < low or (number == low and not includes_low):
        expected = f"{low} or more" if includes_low else f"more than {low}"
        raise ValueError(f"`{name}` must be a number, {expected}, got {number!r}.")
