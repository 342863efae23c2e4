"""Gradients and parameters of networks."""

from collections.abc import Iterable

import torch as th
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit


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


@th.no_grad()
def copy_running_stats(network: th.nn.Module, target: th.nn.Module) -> None:
    """
    Copy the running statistics of batch normalisation, see SB3 issue #996.

    :param network: a network
    :param target: its target network
    """
    for (name, statistics), copied in zip(network.named_buffers(), target.buffers(), strict=True):
        if "running_" in name:
            copied.copy_(statistics)


def optimizer_of(network: th.nn.Module) -> th.optim.Optimizer:
    """
    :param network: a network of a policy of SB3
    :return: its optimizer
    """
    return network.optimizer  # type: ignore[return-value]  # an attribute that torch does not know


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
    :return: the gradient of the loss, one contiguous tensor for each trainable parameter, 0 for those that it does not
        depend on
    """
    parameters = trainable_parameters(network)
    gradients = th.autograd.grad(output, parameters, output_gradient, allow_unused=True, materialize_grads=True)
    # Gradients through transposed parameters are transposed in memory. Fused optimizers would apply such a gradient in the
    # order of memory, to the wrong weights, and norms are summed in that order.
    return [gradient.contiguous() for gradient in gradients]


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


def expected_updates(n_steps: int, n_envs: int, train_freq: TrainFreq, gradient_steps: int) -> float:
    """
    :param n_steps: number of environment steps
    :param n_envs: number of environments
    :param train_freq: of the algorithm
    :param gradient_steps: of the algorithm
    :return: number of updates in so many steps; 0 when it depends on the length of episodes, which is unknown
    """
    if gradient_steps < 0:
        return n_steps
    if train_freq.unit == TrainFrequencyUnit.EPISODE:
        return 0
    return n_steps / (n_envs * train_freq.frequency) * gradient_steps
