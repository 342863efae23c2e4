"""
Let states count alike in means over a batch, whatever the size of what they contribute.

A policy that is optimal is so in every state, and values that are right are so, too, whatever the weights of the states. But
where some are far from what is wanted, as a pendulum that has fallen, their values and gradients are larger by orders of
magnitude, and in a mean over states nothing is heard of all others. Nor should a few rollouts that diverge rule it. Of
what is mostly noise, on the other hand, balancing makes more noise, and the plain mean is better.
"""

from collections.abc import Sequence

import torch as th
from torch.nn import functional as F

# The share of the median below which sizes make no difference
OFFSET = 0.3
# How far a return of a rollout may be from the value of the critic to be learned from, in medians over states
LARGEST_VALUE_ERROR = 3.0


def balance_states(sizes: th.Tensor, balance: float) -> th.Tensor:
    r"""
    Weights of the states of a batch,

    .. math::
        w(s) \propto \frac{1}{(1 - \kappa) \, m + \kappa \, (x(s) + c \, m)}, \quad m = \mathrm{median}_s \, x(s),

    with ``OFFSET`` for :math:`c`, and the mean for :math:`m` where the median is 0.

    :param sizes: of what the states contribute, :math:`x`, 0 or more, ``(B, 1)``
    :param balance: :math:`\kappa`, from 0, when all weights are 1, to 1
    :return: weights whose mean is 1, ``(B, 1)``
    """
    median = sizes.median()
    scale = th.where(median > 0, median, sizes.mean())
    denominators = (1 - balance) * scale + balance * (sizes + OFFSET * scale)
    denominators = denominators.clamp(min=th.finfo(sizes.dtype).tiny)
    weights = denominators.min() / denominators
    return weights / weights.mean()


def balanced_mse_loss(values: th.Tensor, targets: th.Tensor, balance: float) -> th.Tensor:
    """
    The mean squared error, with states balanced by the size of their targets. Not by that of the values: a critic that takes
    large values for small ones would weight its largest errors most.

    :param values: of a critic, ``(B, 1)``
    :param targets: what they should be, ``(B, 1)``
    :param balance: how much states are balanced, from 0, the plain mean, to 1
    :return: a scalar
    """
    if balance == 0:
        return F.mse_loss(values, targets)
    return (balance_states(targets.abs(), balance) * (values - targets) ** 2).mean()


def rollout_value_loss(
    values: Sequence[th.Tensor], returns: dict[int, th.Tensor], weights: dict[int, float], balance: float
) -> th.Tensor:
    r"""
    The rollouts that a policy is improved with end in values of its actions, many steps of bootstrapping at once: the
    critics regress on them as far as their horizons are trusted,
    :math:`\sum_i \sum_{n > 0} w_n^2 E_s[(Q_i(s, \pi(s)) - X_n(s))^2]`, states balanced. From recorded steps alone what a
    critic knows of the far end of a slow motion comes nearer by one step in each time constant of the target networks.

    The returns bootstrap from the critic that the policy follows, not from target networks: behind :math:`n` steps its error
    is discounted by :math:`\gamma^n`. The squares let these targets fade sooner than the gradients of a model in doubt.

    :param values: of the policy's actions, one tensor ``(B, 1)`` for each critic
    :param returns: of each horizon, without gradient, ``(B, 1)``; some perhaps not finite
    :param weights: weight of each horizon
    :param balance: how much states are balanced, from 0 to 1
    :return: a scalar
    """
    loss = th.zeros((), device=values[0].device)
    for critic_values in values:
        for horizon, horizon_returns in returns.items():
            if horizon > 0:
                errors = horizon_returns - critic_values.detach()
                # From a rollout that overflows nothing is learned, and a few that diverge must not be all that is fitted
                errors = th.where(th.isfinite(errors), errors, 0.0)
                limit = LARGEST_VALUE_ERROR * errors.abs().median()
                targets = critic_values.detach() + errors.clamp(-limit, limit)
                loss = loss + weights[horizon] ** 2 * balanced_mse_loss(critic_values, targets, balance)
    return loss
