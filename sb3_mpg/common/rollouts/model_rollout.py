"""Model returns of all horizons from one rollout (eq. 6 of both MPG texts, eq. 5 of the first version)."""

from collections.abc import Sequence

import torch as th

from sb3_mpg.common.rollouts.steps import RolloutContext, RolloutState, expected
from sb3_mpg.common.type_aliases import Differentiate
from sb3_mpg.common.utils import parameters_of_modules


def parameters_of_steps(actor: th.nn.Module, is_frozen: bool) -> dict[str, th.Tensor]:
    """
    :param actor: the policy
    :param is_frozen: whether they are those of a copy without gradient
    :return: its parameters by name
    """
    parameters: dict[str, th.Tensor] = {}
    for name, parameter in parameters_of_modules(actor).items():
        tensor = parameter.detach() if is_frozen else parameter
        # With few inputs, as in a first layer, the gradient takes a third of the time if columns are contiguous in memory
        is_tall = tensor.ndim == 2 and tensor.shape[0] > tensor.shape[1]
        parameters[name] = tensor.t().contiguous().t() if is_tall else tensor
    return parameters


def start_rollout(observations: th.Tensor, context: RolloutContext, first_actions: th.Tensor | None = None) -> RolloutState:
    """
    :param observations: raw observations, ``(B, O)``
    :param context: policy, model and units
    :param first_actions: in [-1, 1], ``(B, A)``; the policy's by default
    :return: the rollout before its first step
    """
    states = context.model.state_from_observation(observations)
    network_inputs = context.units.normalize_observations(observations)
    alive = th.ones(observations.shape[0], 1, device=observations.device)
    actions = context.actor(network_inputs) if first_actions is None else first_actions
    return RolloutState(states, network_inputs, actions, alive, states.detach())


def model_rollout(
    observations: th.Tensor,
    context: RolloutContext,
    horizons: Sequence[int],
    differentiate: Differentiate = "first_action",
    first_actions: th.Tensor | None = None,
) -> dict[int, th.Tensor]:
    r"""
    Discounted model returns of all horizons, with the critic at the end of each:

    .. math::
        X_n(s_t) = \sum_{l=t}^{t+n-1} \gamma^{l-t} \hat r_l + \gamma^n Q(\hat s_{t+n}, \pi(\hat s_{t+n})), \quad
        \hat s_{l+1} = f(\hat s_l, \pi(\hat s_l)), \; \hat s_t = s_t.

    The model is stepped only ``max(horizons)`` times: all horizons share one rollout. Terminal states are followed by neither
    reward nor value; where terminations have a probability, rewards and values are weighted by that of having survived.

    :param observations: raw observations, ``(B, O)``
    :param context: policy, critic, model, units, discount factor and steps
    :param horizons: numbers of model steps, each 0 or more; 0 is :math:`Q(s_t, \pi(s_t))` itself
    :param differentiate: ``"first_action"``: the gradient with respect to the actor's parameters runs through the first action
        only, later actions are those of a frozen copy (eq. 6); ``"all_actions"``: it runs through every action, including the
        last one, which only the critic takes (eq. 5)
    :param first_actions: in [-1, 1], ``(B, A)``; the policy's by default
    :return: returns of each horizon, ``(B, 1)``. They are separate tensors, so that the gradient of one horizon does not
        depend on others, which may have overflowed.
    """
    model, gamma = context.model, context.gamma
    actor_parameters = parameters_of_steps(context.actor, is_frozen=differentiate == "first_action")
    rollout = start_rollout(observations, context, first_actions)
    rewards_so_far: th.Tensor | float = 0.0
    returns: dict[int, th.Tensor] = {}
    step = 0
    for horizon in sorted(horizons):
        if horizon > step:
            rollout, rewards = context.steps.advance(rollout, horizon - step, actor_parameters, context)
            rewards_so_far = rewards_so_far + gamma**step * rewards
            step = horizon
        values = context.q_function(rollout.network_inputs, rollout.actions)
        if model.may_terminate:
            values = expected(values, rollout.alive)
        returns[horizon] = rewards_so_far + gamma**horizon * values
    return returns
