"""Finds the first non-finite value or gradient of a rollout, for error messages."""

import torch as th

from sb3_mpg.common.rollouts.model_rollout import start_rollout
from sb3_mpg.common.rollouts.steps import EagerSteps, RolloutContext, expected


def first_non_finite_step(observations: th.Tensor, context: RolloutContext, horizon: int) -> str | None:
    """
    Find where a rollout or its gradient becomes non-finite. This is slow: each step is checked.

    :param observations: raw observations, ``(B, O)``
    :param context: policy, critic, model, units and discount factor
    :param horizon: number of model steps
    :return: a clause that names the first model step with a non-finite value, or the step at which back-propagation first
        gives a non-finite gradient; ``None`` if everything is finite
    """
    gamma, steps = context.gamma, EagerSteps()
    parameters = {name: parameter.detach() for name, parameter in context.actor.named_parameters()}
    rollout = start_rollout(observations, context)
    states, first_actions = (tensor.detach().requires_grad_() for tensor in (rollout.states, rollout.actions))
    rollout = rollout._replace(states=states, actions=first_actions)
    trail, total = [states], th.zeros((), device=observations.device)
    for step in range(horizon):
        before = rollout.states
        actions = context.units.unscale_actions(rollout.actions)
        rollout, rewards = steps.advance(rollout, 1, parameters, context)
        for name, tensor in (("action", actions), ("next state", rollout.states), ("reward", rewards)):
            if not th.isfinite(tensor).all():
                row = int((~th.isfinite(tensor)).flatten(1).any(dim=1).nonzero()[0])
                return f"the {name} of model step {step} is not finite, in the state {before[row].tolist()}"
        total = total + gamma**step * rewards.mean()
        trail.append(rollout.states)
    values = expected(context.q_function(rollout.network_inputs, rollout.actions), rollout.alive)
    total = total + gamma**horizon * values.mean()
    if not th.isfinite(total):
        return "the critic's value " + (f"after model step {horizon - 1} " if horizon > 0 else "") + "is not finite"
    # Back-propagation runs from the end to the start: find the last state with a non-finite gradient
    action_gradient, *state_gradients = th.autograd.grad(total, [first_actions, *trail], allow_unused=True)
    # Only the first actions are checked, because later ones are functions of the states
    for step, gradient in reversed([(0, action_gradient), *enumerate(state_gradients)]):
        if gradient is not None and not th.isfinite(gradient).all():
            where = "the critic's value" if step == horizon else f"model step {step}"
            return f"the gradient becomes non-finite in {where}"
    return None
