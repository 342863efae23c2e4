"""
Per-state normalisation of losses and gradients.

The optimal policy and the correct values do not depend on the weights of the states. But at states far from the goal, such
as a fallen pendulum, values and gradients are larger by orders of magnitude: they dominate a plain mean over states, and so
do a few rollouts that diverge. Normalisation gives all states a similar weight. It also amplifies noise: the plain mean is
better for gradients that are mostly noise.
"""

from collections.abc import Sequence

import torch as th
from torch.nn import functional as F

# Added to the sizes, as a share of their median, so that small sizes do not give large weights
OFFSET = 0.3
# Differences between returns and values are clipped to this multiple of their median over states
LARGEST_VALUE_ERROR = 3.0


def balance_states(sizes: th.Tensor, balance: float) -> th.Tensor:
    r"""
    Weights of the states of a batch for a per-state normalisation,

    .. math::
        w(s) \propto \frac{1}{(1 - \kappa) \, m + \kappa \, (x(s) + c \, m)}, \quad m = \mathrm{median}_s \, x(s),

    where :math:`c` is ``OFFSET``, and :math:`m` is the mean if the median is 0.

    :param sizes: size :math:`x` of the contribution of each state, 0 or more, ``(B, 1)``
    :param balance: degree of normalisation :math:`\kappa`, from 0 (all weights are 1) to 1
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
    The mean squared error, normalised per state by the size of the target. (Normalised by the size of the value, the largest
    weights would go to states whose values the critic underestimates, which have the largest errors.)

    :param values: values of a critic, ``(B, 1)``
    :param targets: targets of the values, ``(B, 1)``
    :param balance: degree of normalisation, from 0 (the plain mean) to 1
    :return: the loss, a scalar
    """
    if balance == 0:
        return F.mse_loss(values, targets)
    return (balance_states(targets.abs(), balance) * (values - targets) ** 2).mean()


def rollout_value_loss(
    values: Sequence[th.Tensor], returns: dict[int, th.Tensor], weights: dict[int, float], balance: float
) -> th.Tensor:
    r"""
    The error of the critics with respect to the returns of the policy's rollouts,

    .. math::
        \sum_i \sum_{n > 0} w_n^2 E_s[(Q_i(s, \pi(s)) - X_n(s))^2],

    normalised per state. A return bootstraps over :math:`n` steps at once. With one-step targets from recorded data, values
    propagate by only one step in each time constant of the target networks, which is slow for slow systems.

    The returns bootstrap from the current critic and not from target networks, because after :math:`n` steps its error is
    discounted by :math:`\gamma^n`. The weights are squared, so that the weight of a doubtful model falls faster here than in
    the policy gradient.

    :param values: values of the policy's actions, one tensor ``(B, 1)`` for each critic
    :param returns: returns of each horizon, without gradient, ``(B, 1)``; they may be non-finite
    :param weights: weight of each horizon
    :param balance: degree of normalisation, from 0 to 1
    :return: the loss, a scalar
    """
    loss = th.zeros((), device=values[0].device)
    for critic_values in values:
        for horizon, horizon_returns in returns.items():
            if horizon > 0:
                errors = horizon_returns - critic_values.detach()
                # Mask rollouts that overflow, and clip the errors of those that diverge
                errors = th.where(th.isfinite(errors), errors, 0.0)
                limit = LARGEST_VALUE_ERROR * errors.abs().median()
                targets = critic_values.detach() + errors.clamp(-limit, limit)
                loss = loss + weights[horizon] ** 2 * balanced_mse_loss(critic_values, targets, balance)
    return loss
