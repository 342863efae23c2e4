"""The mixed policy gradient (eq. 9 of the revised text; the general form of appendix C-A)."""

from typing import NamedTuple

import torch as th

from sb3_mpg.common.balance import balance_states
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.rollouts.steps import RolloutContext
from sb3_mpg.common.type_aliases import Differentiate
from sb3_mpg.common.utils import finite_mean, gradient_of

#: Horizons with a smaller weight are not computed.
NEGLIGIBLE_WEIGHT = 1e-6


class PolicyGradient(NamedTuple):
    """
    :param loss: the actor loss (eq. 9), from the means of the finite returns, a scalar
    :param gradients: gradient of the loss, or the normalised gradient that replaces it; one tensor for each trainable
        parameter of the actor
    :param actions: actions of the policy, in [-1, 1], ``(B, A)``
    :param returns: returns of each horizon with a weight, ``(B, 1)``
    :param mean_returns: means of the finite returns, scalars
    :param share_masked: share of the states that are masked for some horizon, see :func:`finite_rows`, a scalar
    """

    loss: th.Tensor
    gradients: list[th.Tensor]
    actions: th.Tensor
    returns: dict[int, th.Tensor]
    mean_returns: dict[int, th.Tensor]
    share_masked: th.Tensor


def finite_rows(gradients: th.Tensor, returns: th.Tensor) -> th.Tensor:
    """
    States that are not masked. Rollouts that overflow at a few states must not spoil the gradient of the others.

    :param gradients: gradients of the returns with respect to the first actions, ``(B, A)``
    :param returns: ``(B, 1)``
    :return: rows with finite gradient and return, bool ``(B, 1)``; all rows if fewer than half are finite, so that the update
        is skipped instead of hiding the failure
    """
    is_finite = th.isfinite(gradients).all(dim=1, keepdim=True) & th.isfinite(returns)
    return is_finite | (2 * is_finite.sum() < len(is_finite))


def mixed_policy_gradient(
    observations: th.Tensor,
    context: RolloutContext,
    weights: dict[int, float],
    differentiate: Differentiate = "first_action",
    balance: float = 0.0,
) -> PolicyGradient:
    r"""
    The mixed policy gradient: the gradient of the loss :math:`-E_s[\sum_i w_i X_i(s)]` (eq. 9). Horizons whose weight is
    below ``NEGLIGIBLE_WEIGHT`` are not computed. With ``differentiate="first_action"``, states with a non-finite gradient are
    masked, unless more than half of them are.

    :param observations: raw observations, ``(B, O)``
    :param context: policy, critic, model, units, discount factor and steps
    :param weights: weight of each horizon
    :param differentiate: as in :func:`~sb3_mpg.common.rollouts.model_rollout.model_rollout`
    :param balance: from 0 to 1, how much the action gradients of each horizon are normalised per state before they are mixed
        (see :func:`~sb3_mpg.common.balance.balance_states`). Only ``"first_action"`` has an action gradient for each state;
        0 otherwise.
    :return: loss and gradient, and the actions and returns that they were computed from
    """
    assert balance == 0 or differentiate == "first_action", differentiate
    actor = context.actor
    used = {horizon: weight for horizon, weight in weights.items() if abs(weight) >= NEGLIGIBLE_WEIGHT}
    horizons = sorted(used)
    actions = actor(context.units.normalize_observations(observations))
    # Eq. 6 has two factors: the gradient of the returns with respect to the actions, and that of the actions with respect to
    # the parameters
    first_actions = actions.detach().requires_grad_() if differentiate == "first_action" else actions
    returns = model_rollout(observations, context, horizons, differentiate, first_actions)
    loss = -sum(used[horizon] * returns[horizon].mean() for horizon in horizons)
    detached = {horizon: values.detach() for horizon, values in returns.items()}
    is_used = th.ones_like(actions[:, :1], dtype=th.bool)
    if differentiate == "all_actions":
        gradients = gradient_of(loss, actor)  # type: ignore[arg-type]  # a sum of tensors, of at least one
    else:
        if balance == 0:
            (descent,) = th.autograd.grad(loss, first_actions)  # type: ignore[arg-type]
            is_used = finite_rows(descent, sum(detached.values()))  # type: ignore[arg-type]
            descent = th.where(is_used, descent, 0.0)
        else:
            descent = th.zeros_like(actions)
            for horizon in horizons:
                keep = horizon != horizons[-1]
                (ascent,) = th.autograd.grad(returns[horizon].sum(), first_actions, retain_graph=keep)
                is_finite = finite_rows(ascent, detached[horizon])
                is_used = is_used & is_finite
                sizes = ascent.norm(dim=1, keepdim=True)
                # Masked states must not change the weights of the others
                sizes = th.where(is_finite, sizes, sizes.nanmedian())
                ascent = th.where(is_finite, ascent, 0.0)
                descent -= used[horizon] * ascent * balance_states(sizes, balance) / len(ascent)
        gradients = gradient_of(actions, actor, descent)
    mean_returns = {horizon: finite_mean(values) for horizon, values in detached.items()}
    finite_loss = -sum(used[horizon] * mean for horizon, mean in mean_returns.items())
    share_masked = 1 - is_used.float().mean()
    return PolicyGradient(finite_loss, gradients, actions.detach(), detached, mean_returns, share_masked)  # type: ignore[arg-type]
