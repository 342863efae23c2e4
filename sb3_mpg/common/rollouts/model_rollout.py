"""
One rollout of the model gives the returns of every horizon: the unified policy gradient (eq. 6 of both MPG texts), the
model policy gradient (eq. 5 of the first version) and any mixture of them are derivatives of what these functions return.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from torch.func import functional_call

from sb3_mpg.common.balance import balance_states
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.type_aliases import Differentiate
from sb3_mpg.common.units import Units
from sb3_mpg.common.utils import finite_mean, gradient_of

#: Horizons that weigh less than this are left out of the rollout.
NEGLIGIBLE_WEIGHT = 1e-6

#: (normalised observations (B, *obs_shape), actions in [-1, 1] (B, A)) -> values (B, 1)
QFunction = Callable[[th.Tensor, th.Tensor], th.Tensor]


class RolloutState(NamedTuple):
    """
    Where a rollout stands.

    :param states: states of the model, ``(B, S)``
    :param network_inputs: what the networks see of them, ``(B, *obs_shape)``
    :param actions: the policy's actions in them, in [-1, 1], ``(B, A)``
    :param alive: rows that did not terminate, bool ``(B, 1)``
    :param start: the states that the rollout came from, without gradient, ``(B, S)``; rows that ended are put back there
    """

    states: th.Tensor
    network_inputs: th.Tensor
    actions: th.Tensor
    alive: th.Tensor
    start: th.Tensor


#: Steps a model as :func:`advance` does
Advance = Callable[..., tuple[RolloutState, th.Tensor]]


def advance(
    rollout: RolloutState,
    n_steps: int,
    actor: th.nn.Module,
    actor_parameters: dict[str, th.Tensor],
    model: PriorModel,
    units: Units,
    gamma: float,
) -> tuple[RolloutState, th.Tensor]:
    """
    Some steps of the model, and of the policy behind each.

    :param rollout: where the rollout stands
    :param n_steps: number of steps
    :param actor: the policy
    :param actor_parameters: with which parameters it acts
    :param model: the model
    :param units: between the environment and the networks
    :param gamma: discount factor
    :return: where the rollout stands then, and the rewards of these steps, discounted to the first of them, ``(B, 1)``
    """
    states, network_inputs, actions, alive, start = rollout
    rewards_of_steps = []
    for _ in range(n_steps):
        env_actions = units.unscale_actions(actions)
        next_states, rewards = model.step(states, env_actions)
        rewards = units.scale_rewards(rewards)
        if model.may_terminate:
            # Behind a terminal state the model may say anything, infinities too, and 0 * inf is not 0: rows that ended
            # must not only be masked, the model must not see them again.
            rewards = th.where(alive, rewards, 0.0)
            alive = alive & ~model.terminal(next_states)
            next_states = th.where(alive, next_states, start)
        rewards_of_steps.append(rewards)
        states = next_states
        network_inputs = units.normalize_observations(model.observation(states))
        actions = functional_call(actor, actor_parameters, (network_inputs,))
    total = rewards_of_steps[-1]
    for rewards in reversed(rewards_of_steps[:-1]):
        total = rewards + gamma * total
    return RolloutState(states, network_inputs, actions, alive, start), total


def start_rollout(
    observations: th.Tensor, actor: th.nn.Module, model: PriorModel, units: Units, first_actions: th.Tensor | None = None
) -> RolloutState:
    """
    :param observations: raw observations, ``(B, *obs_shape)``
    :param actor: the policy
    :param model: the model
    :param units: between the environment and the networks
    :param first_actions: in [-1, 1], ``(B, A)``; by default the actor's
    :return: the rollout before its first step
    """
    states, network_inputs = model.state_from_observation(observations), units.normalize_observations(observations)
    alive = th.ones(observations.shape[0], 1, dtype=th.bool, device=observations.device)
    actions = actor(network_inputs) if first_actions is None else first_actions
    return RolloutState(states, network_inputs, actions, alive, states.detach())


def model_rollout(
    observations: th.Tensor,
    actor: th.nn.Module,
    q_function: QFunction,
    model: PriorModel,
    units: Units,
    horizons: Sequence[int],
    gamma: float,
    differentiate: Differentiate = "first_action",
    advance: Advance = advance,
    first_actions: th.Tensor | None = None,
) -> dict[int, th.Tensor]:
    r"""
    Discounted model returns of all horizons, with the critic at the end of each:

    .. math::
        X_n(s_t) = \sum_{l=t}^{t+n-1} \gamma^{l-t} \hat r_l + \gamma^n Q(\hat s_{t+n}, \pi(\hat s_{t+n})), \quad
        \hat s_{l+1} = f(\hat s_l, \pi(\hat s_l)), \; \hat s_t = s_t.

    The model is stepped ``max(horizons)`` times, whatever the number of horizons. Behind a terminal state there is
    neither reward nor value.

    :param observations: raw observations, ``(B, *obs_shape)``
    :param actor: maps normalised observations to actions in [-1, 1], ``(B, A)``
    :param q_function: the critic, in the units of the networks
    :param model: the model
    :param units: between the environment, which the model speaks for, and the networks
    :param horizons: numbers of model steps, each 0 or more; 0 is :math:`Q(s_t, \pi(s_t))` itself
    :param gamma: discount factor
    :param differentiate: ``"first_action"``: the parameters of the actor get their gradient through the first action
        alone, later ones come from a frozen copy (eq. 6); ``"all_actions"``: through every action, the critic's at the
        end included (eq. 5)
    :param advance: steps the model; :func:`advance` or a :class:`~sb3_mpg.common.compilation.step_compiler.StepCompiler`
    :param first_actions: in [-1, 1], ``(B, A)``; by default the actor's
    :return: returns of each horizon, ``(B, 1)``: tensors of their own, so that the gradient of one has nothing to do with
        another, which may have overflowed
    """
    actor_parameters: dict[str, th.Tensor] = {}
    for name, parameter in actor.named_parameters():
        tensor = parameter.detach() if differentiate == "first_action" else parameter
        # Of few inputs, as in a first layer, the gradient costs a third when the columns lie together in memory
        is_tall = tensor.ndim == 2 and tensor.shape[0] > tensor.shape[1]
        actor_parameters[name] = tensor.t().contiguous().t() if is_tall else tensor

    rollout = start_rollout(observations, actor, model, units, first_actions)
    rewards_so_far: th.Tensor | float = 0.0
    returns: dict[int, th.Tensor] = {}
    step = 0
    for horizon in sorted(horizons):
        if horizon > step:
            rollout, rewards = advance(rollout, horizon - step, actor, actor_parameters, model, units, gamma)
            rewards_so_far = rewards_so_far + gamma**step * rewards
            step = horizon
        values = q_function(rollout.network_inputs, rollout.actions)
        if model.may_terminate:
            values = th.where(rollout.alive, values, 0.0)
        returns[horizon] = rewards_so_far + gamma**horizon * values
    return returns


class HeldState(NamedTuple):
    """
    Where steps with a held action stand.

    :param states: states of the model, ``(B, S)``
    :param n_left: how many steps each row still takes, ``(B, 1)``
    """

    states: th.Tensor
    n_left: th.Tensor


#: Steps a model as :func:`hold` does
Hold = Callable[..., tuple[HeldState, th.Tensor]]


def hold(
    held: HeldState, n_steps: int, env_actions: th.Tensor, model: PriorModel, low: th.Tensor, high: th.Tensor
) -> tuple[HeldState, th.Tensor]:
    """
    Some steps of the model with an action that is held.

    :param held: where the steps stand
    :param n_steps: number of steps, at least 1
    :param env_actions: actions in the units of the environment, ``(B, A)``
    :param model: the model
    :param low: least raw observations of the region, ``obs_shape``
    :param high: largest raw observations of the region, ``obs_shape``
    :return: where they stand then, with no step left of a row that would have left the region or terminated; and whether each
        row took each step, bool ``(n_steps, B, 1)``
    """
    states, n_left = held
    is_taken = []
    for _ in range(n_steps):
        next_states, _ = model.step(states, env_actions)
        observations = model.observation(next_states)
        # What is not a number is within no region
        goes_on = ((observations >= low) & (observations <= high)).flatten(1).all(dim=1, keepdim=True) & (n_left > 0)
        if model.may_terminate:
            goes_on = goes_on & ~model.terminal(next_states)
        states, n_left = th.where(goes_on, next_states, states), th.where(goes_on, n_left - 1, 0)
        is_taken.append(goes_on)
    return HeldState(states, n_left), th.stack(is_taken)


@th.no_grad()
def explore_in_model(
    observations: th.Tensor,
    actor: th.nn.Module,
    model: PriorModel,
    units: Units,
    n_steps: th.Tensor,
    noise: th.Tensor,
    low: th.Tensor,
    high: th.Tensor,
    max_steps: int,
    hold: Hold = hold,
) -> th.Tensor:
    """
    Where the system would be had it been explored from recorded states: some model steps away from them, with an action
    that is held. A row stops before it leaves the given region or terminates; one that takes no step stays as it is recorded.

    :param observations: raw observations, ``(B, *obs_shape)``
    :param actor: the policy
    :param model: the model
    :param units: between the environment and the networks
    :param n_steps: numbers of model steps, whole numbers, ``(B, 1)``
    :param noise: added to the policy's actions, in [-1, 1] units, ``(B, A)``
    :param low: least raw observations of the region, ``obs_shape``
    :param high: largest raw observations of the region, ``obs_shape``
    :param max_steps: the largest number of steps
    :param hold: steps the model; :func:`hold`, or the same compiled
    :return: raw observations, ``(B, *obs_shape)``
    """
    actions = (actor(units.normalize_observations(observations)) + noise).clamp(-1, 1)
    env_actions = units.unscale_actions(actions)
    held = HeldState(model.state_from_observation(observations), n_steps)
    held, is_taken = hold(held, max_steps, env_actions, model, low, high)
    # A model need not know all that is observed. Who does not take the first step takes none
    takes_steps = is_taken[0].reshape(-1, *[1] * (observations.ndim - 1))
    return th.where(takes_steps, model.observation(held.states), observations)


class PolicyGradient(NamedTuple):
    """
    :param loss: the actor loss (eq. 9), a scalar, of the states that count
    :param gradients: of the loss, or of what replaces it, one tensor for each trainable parameter of the actor
    :param actions: of the policy, in [-1, 1], ``(B, A)``
    :param returns: of each horizon that counts, ``(B, 1)``
    :param mean_returns: the same over the states at which they are finite, scalars
    :param share_left_out: of states that a horizon left out, see :func:`finite_rows`, a scalar
    """

    loss: th.Tensor
    gradients: list[th.Tensor]
    actions: th.Tensor
    returns: dict[int, th.Tensor]
    mean_returns: dict[int, th.Tensor]
    share_left_out: th.Tensor


def finite_rows(gradients: th.Tensor, returns: th.Tensor) -> th.Tensor:
    """
    Which states count: a model that overflows at a few of them says nothing there, and the others must not suffer from it.

    :param gradients: of the returns with respect to the first actions, ``(B, A)``
    :param returns: ``(B, 1)``
    :return: rows of which both are finite, bool ``(B, 1)``; all rows if it is not even half of them: it must not go unnoticed
    """
    is_finite = th.isfinite(gradients).all(dim=1, keepdim=True) & th.isfinite(returns)
    return is_finite | (2 * is_finite.sum() < len(is_finite))


def mixed_policy_gradient(
    observations: th.Tensor,
    actor: th.nn.Module,
    q_function: QFunction,
    model: PriorModel,
    units: Units,
    weights: dict[int, float],
    gamma: float,
    differentiate: Differentiate = "first_action",
    advance: Advance = advance,
    balance: float = 0.0,
) -> PolicyGradient:
    r"""
    The gradient of the loss of the mixed policy gradient (eq. 9; the general form of appendix C-A):
    :math:`-E_s[\sum_i w_i X_i(s)]`. Horizons of weight below ``NEGLIGIBLE_WEIGHT`` cost nothing. With
    ``differentiate="first_action"``, states at which the gradient is not finite add nothing, unless it is most of them.

    :param weights: weight of each horizon; see :func:`model_rollout` for the other parameters
    :param balance: how much the action gradients of each horizon are balanced between the states before they are mixed, from
        0 to 1 (see :func:`balance_states`); more than 0 needs ``differentiate="first_action"``
    :return: loss, gradient, and what they were computed from
    """
    assert balance == 0 or differentiate == "first_action", differentiate
    used = {horizon: weight for horizon, weight in weights.items() if abs(weight) >= NEGLIGIBLE_WEIGHT}
    horizons = sorted(used)
    actions = actor(units.normalize_observations(observations))
    # Eq. 6 in two factors, the derivative of the returns by the actions and that of the actions by the parameters
    first_actions = actions.detach().requires_grad_() if differentiate == "first_action" else actions
    returns = model_rollout(
        observations, actor, q_function, model, units, horizons, gamma, differentiate, advance, first_actions
    )
    loss = -sum(used[horizon] * returns[horizon].mean() for horizon in horizons)
    assert isinstance(loss, th.Tensor)
    detached = {horizon: values.detach() for horizon, values in returns.items()}
    counts = th.ones_like(actions[:, :1], dtype=th.bool)
    if differentiate == "all_actions":
        gradients = gradient_of(loss, actor)
    else:
        if balance == 0:
            (descent,) = th.autograd.grad(loss, first_actions)
            counts = finite_rows(descent, sum(detached.values()))  # type: ignore[arg-type]
            descent = th.where(counts, descent, 0.0)
        else:
            descent = th.zeros_like(actions)
            for horizon in horizons:
                keep = horizon != horizons[-1]
                (ascent,) = th.autograd.grad(returns[horizon].sum(), first_actions, retain_graph=keep)
                is_finite = finite_rows(ascent, detached[horizon])
                counts = counts & is_finite
                sizes = ascent.norm(dim=1, keepdim=True)
                # What is left out must not unbalance the others
                sizes = th.where(is_finite, sizes, sizes.nanmedian())
                ascent = th.where(is_finite, ascent, 0.0)
                descent -= used[horizon] * ascent * balance_states(sizes, balance) / len(ascent)
        gradients = gradient_of(actions, actor, descent)
    mean_returns = {horizon: finite_mean(values) for horizon, values in detached.items()}
    finite_loss = -sum(used[horizon] * mean for horizon, mean in mean_returns.items())
    assert isinstance(finite_loss, th.Tensor)
    return PolicyGradient(finite_loss, gradients, actions.detach(), detached, mean_returns, 1 - counts.float().mean())


def first_non_finite_step(
    observations: th.Tensor,
    actor: th.nn.Module,
    q_function: QFunction,
    model: PriorModel,
    units: Units,
    horizon: int,
    gamma: float,
) -> str | None:
    """
    Find out what went wrong in a rollout: slow, for error messages.

    :param horizon: number of model steps; see :func:`model_rollout` for the other parameters
    :return: a clause that names the first model step with a non-finite value, or the last one that a non-finite
        gradient enters at; ``None`` if the horizon is sound
    """
    parameters = {name: parameter.detach() for name, parameter in actor.named_parameters()}
    rollout = start_rollout(observations, actor, model, units)
    states, first_actions = (tensor.detach().requires_grad_() for tensor in (rollout.states, rollout.actions))
    rollout = rollout._replace(states=states, actions=first_actions)
    trail, total = [states], th.zeros((), device=observations.device)
    for step in range(horizon):
        before = rollout.states
        actions = units.unscale_actions(rollout.actions)
        rollout, rewards = advance(rollout, 1, actor, parameters, model, units, gamma)
        for name, tensor in (("action", actions), ("next state", rollout.states), ("reward", rewards)):
            if not th.isfinite(tensor).all():
                row = int((~th.isfinite(tensor)).flatten(1).any(dim=1).nonzero()[0])
                return f"the {name} of model step {step} is not finite, in the state {before[row].tolist()}"
        total = total + gamma**step * rewards.mean()
        trail.append(rollout.states)
    values = th.where(rollout.alive, q_function(rollout.network_inputs, rollout.actions), 0.0)
    total = total + gamma**horizon * values.mean()
    if not th.isfinite(total):
        return "the critic's value " + (f"after model step {horizon - 1} " if horizon > 0 else "") + "is not finite"
    # The gradient runs backwards: the first state, from the end, that it is not finite for names the culprit
    of_actions, *of_states = th.autograd.grad(total, [first_actions, *trail], allow_unused=True)
    # Later actions follow from states
    for step, gradient in reversed([(0, of_actions), *enumerate(of_states)]):
        if gradient is not None and not th.isfinite(gradient).all():
            where = "the critic's value" if step == horizon else f"model step {step}"
            return f"the gradient becomes non-finite in {where}"
    return None
