"""Gradients and parameters of networks."""

from collections.abc import Iterable

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit


def keep_freed_memory() -> None:
    """
    Let this process keep the memory of a gradient for the next one. By default, the C library of Linux returns freed memory to
    the system at once, and each update must request thousands of pages again. The library keeps up to twice the size of the
    largest block that was ever freed, of those up to 32 MiB. So one large block is allocated and freed; the effect lasts until
    the process ends.
    """
    # Never written to, so that it occupies no memory
    th.empty(32 * 2**20 - 2**16, dtype=th.uint8, device="cpu")


@th.no_grad()
def polyak_update_all(parameters: Iterable[th.Tensor], target_parameters: Iterable[th.Tensor], tau: float) -> None:
    """
    SB3's ``polyak_update`` in one call for all tensors, which takes a tenth of the time for small networks.

    :param parameters: parameters of the network
    :param target_parameters: parameters of the target network, updated in place
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
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
    :param network: a network of an SB3 policy
    :return: its optimizer
    """
    return network.optimizer  # type: ignore[return-value]  # an attribute that SB3 adds to the module


def trainable_parameters(network: th.nn.Module) -> list[th.nn.Parameter]:
    """
    :param network: a network
    :return: its parameters that are not frozen
    """
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def parameters_of_modules(network: th.nn.Module) -> dict[str, th.Tensor]:
    """
    The parameters as ``functional_call(..., tie_weights=False)`` replaces them. A parameter that two modules share is listed
    once for each of them, and the parameters of a module with two names are listed once. With ``tie_weights=True``, torch
    (2.13) does not restore those of a module with two names: they would remain replaced and would not be trained.

    :param network: a network
    :return: its parameters, by name
    """
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def gradient_of(output: th.Tensor, network: th.nn.Module, output_gradient: th.Tensor | None = None) -> list[th.Tensor]:
    """
    :param output: a loss, or an output of the network that a loss is computed from
    :param network: the network
    :param output_gradient: the gradient of the loss with respect to ``output``, in its shape; ``None`` if that is the loss
    :return: the gradient of the loss, one contiguous tensor for each trainable parameter; zeros where the loss does
        not depend on it
    """
    parameters = trainable_parameters(network)
    gradients = th.autograd.grad(output, parameters, output_gradient, allow_unused=True, materialize_grads=True)
    # Gradients through transposed parameters are transposed in memory. Fused optimizers would apply such a gradient in the
    # order of memory, to the wrong weights, and norms are summed in that order.
    return [gradient.contiguous() for gradient in gradients]


@th.no_grad()
def clip_norm(tensors: list[th.Tensor], max_norm: float) -> float:
    """
    A faster ``clip_grad_norm_``: it does not multiply by 1 when the norm is small enough.

    :param tensors: the tensors, scaled in place if their common norm exceeds ``max_norm`` or is not finite
    :param max_norm: largest norm
    :return: the norm before clipping
    """
    norm = th.linalg.vector_norm(th.stack(th._foreach_norm(tensors))).item()
    if not norm <= max_norm:
        th._foreach_mul_(tensors, max_norm / (norm + 1e-6))
    return norm


def finite_mean(values: th.Tensor) -> th.Tensor:
    """
    :param values: any shape
    :return: the mean of the finite values, a scalar; NaN if there are none
    """
    is_finite = th.isfinite(values)
    return th.where(is_finite, values, 0.0).sum() / is_finite.sum()


def expected_updates(algorithm: OffPolicyAlgorithm, total_timesteps: int) -> float:
    """
    :param algorithm: the algorithm before training
    :param total_timesteps: number of its environment steps when training ends
    :return: number of updates until then; 0 when it depends on the length of episodes, which is unknown
    """
    n_steps = max(total_timesteps - max(algorithm.num_timesteps, algorithm.learning_starts), 0)
    train_freq = algorithm.train_freq
    assert isinstance(train_freq, TrainFreq)  # as SB3 sets it up
    if algorithm.gradient_steps < 0:
        return n_steps
    if train_freq.unit == TrainFrequencyUnit.EPISODE:
        return 0
    return n_steps / (algorithm.n_envs * train_freq.frequency) * algorithm.gradient_steps
