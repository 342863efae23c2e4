"""Model steps: the state of a rollout, and the strategies that step the model."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch as th
from torch.func import functional_call

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.type_aliases import Policy
from sb3_mpg.common.units import Units

# A row has terminated for sure if the probability that it has not is this small
NEGLIGIBLE_SURVIVAL = 1e-3

#: (normalised observations (B, O), actions in [-1, 1] (B, A)) -> values (B, 1)
QFunction = Callable[[th.Tensor, th.Tensor], th.Tensor]


class RolloutContext(NamedTuple):
    """
    What all rollouts of an update have in common.

    :param actor: the policy, from normalised observations, ``(B, O)``, to actions in [-1, 1], ``(B, A)``
    :param q_function: the critic, in the units of the networks
    :param model: the model, in the units of the environment
    :param units: conversions between the units of the environment and those of the networks
    :param gamma: discount factor
    :param steps: strategy that steps the model
    """

    actor: th.nn.Module
    q_function: QFunction
    model: PriorModel
    units: Units
    gamma: float
    steps: "Steps"


class RolloutState(NamedTuple):
    """
    State of a rollout between two steps.

    :param states: states of the model, ``(B, S)``
    :param network_inputs: normalised observations of these states, ``(B, O)``
    :param actions: actions of the policy in these states, in [-1, 1], ``(B, A)``
    :param alive: probability that the row has not terminated, ``(B, 1)``
    :param start: first states of the rollout, without gradient, ``(B, S)``; rows that have terminated for sure are reset to
        them
    """

    states: th.Tensor
    network_inputs: th.Tensor
    actions: th.Tensor
    alive: th.Tensor
    start: th.Tensor


class HeldState(NamedTuple):
    """
    State between two steps with a repeated action.

    :param states: states of the model, ``(B, S)``
    :param n_left: number of steps that each row still takes, ``(B, 1)``
    """

    states: th.Tensor
    n_left: th.Tensor


def expected(values: th.Tensor, alive: th.Tensor) -> th.Tensor:
    """
    :param values: rewards or values; anything where the row has terminated for sure, ``(B, 1)``
    :param alive: probability that the row has not terminated, ``(B, 1)``
    :return: their expectations; behind a termination they are zero, ``(B, 1)``
    """
    return alive * th.where(alive > 0, values, 0.0)


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
    Step the model with the actions of the policy.

    :param rollout: state of the rollout
    :param n_steps: number of steps, at least 1
    :param actor: the policy
    :param actor_parameters: parameters of the policy for these steps, by the names of ``parameters_of_modules``
    :param model: the model
    :param units: conversions between environment and networks
    :param gamma: discount factor
    :return: the rollout after these steps, and their rewards, discounted to the first of them, ``(B, 1)``
    """
    states, network_inputs, actions, alive, start = rollout
    rewards_of_steps = []
    for _ in range(n_steps):
        env_actions = units.unscale_actions(actions)
        next_states, rewards = model.step(states, env_actions)
        rewards = units.scale_rewards(rewards)
        if model.may_terminate:
            # After a terminal state the model may return anything, and a mask cannot remove infinities from the gradient
            # (0 * inf is not 0). So terminated rows are reset to their start state
            rewards = expected(rewards, alive)
            alive = alive * (1 - model.termination_probability(next_states))
            alive = th.where(alive > NEGLIGIBLE_SURVIVAL, alive, 0.0)
            next_states = th.where(alive > 0, next_states, start)
        rewards_of_steps.append(rewards)
        states = next_states
        network_inputs = units.normalize_observations(model.observation(states))
        actions = functional_call(actor, actor_parameters, (network_inputs,), tie_weights=False)
    total = rewards_of_steps[-1]
    for rewards in reversed(rewards_of_steps[:-1]):
        total = rewards + gamma * total
    return RolloutState(states, network_inputs, actions, alive, start), total


class PlannedState(NamedTuple):
    """
    State of a rollout that follows a plan, between two steps.

    :param states: as in :class:`RolloutState`, as are all fields but the last
    :param offsets: the offsets to the actions of the policy, those of the next step first, ``(B, H * A)``
    """

    states: th.Tensor
    network_inputs: th.Tensor
    actions: th.Tensor
    alive: th.Tensor
    start: th.Tensor
    offsets: th.Tensor


def with_offsets(planned: PlannedState) -> tuple[RolloutState, th.Tensor]:
    """
    :param planned: state of a rollout that follows a plan
    :return: the rollout with the actions that the plan takes next, and the offsets with those of the step after it first
    """
    n_actions, offsets = planned.actions.shape[1], planned.offsets
    actions = (planned.actions + offsets[:, :n_actions]).clamp(-1, 1)
    rollout = RolloutState(planned.states, planned.network_inputs, actions, planned.alive, planned.start)
    return rollout, th.cat([offsets[:, n_actions:], offsets[:, :n_actions]], dim=1)


def follow(
    planned: PlannedState,
    n_steps: int,
    actor: th.nn.Module,
    actor_parameters: dict[str, th.Tensor],
    model: PriorModel,
    units: Units,
    gamma: float,
) -> tuple[PlannedState, th.Tensor]:
    """
    Step the model with the actions of the policy and planned offsets to them. The parameters and the result are those of
    :func:`advance`, for a :class:`PlannedState`.
    """
    total = th.zeros_like(planned.states[:, :1])
    for step in range(n_steps):
        rollout, offsets = with_offsets(planned)
        rollout, rewards = advance(rollout, 1, actor, actor_parameters, model, units, gamma)
        planned, total = PlannedState(*rollout, offsets), total + gamma**step * rewards
    return planned, total


def hold(
    held: HeldState, n_steps: int, env_actions: th.Tensor, model: PriorModel, low: th.Tensor, high: th.Tensor
) -> tuple[HeldState, th.Tensor]:
    """
    Step the model with a repeated action.

    :param held: state before these steps
    :param n_steps: number of steps, at least 1
    :param env_actions: actions in the units of the environment, ``(B, A)``
    :param model: the model
    :param low: lower bounds of raw observations, ``(O,)``
    :param high: upper bounds of raw observations, ``(O,)``
    :return: state after these steps, and whether each row took each step, bool ``(n_steps, B, 1)``. A row whose next step
        would leave the bounds or terminate has no steps left.
    """
    states, n_left = held
    is_taken = []
    for _ in range(n_steps):
        next_states = model.transition(states, env_actions)
        observations = model.observation(next_states)
        # NaN fails both comparisons
        goes_on = ((observations >= low) & (observations <= high)).all(dim=1, keepdim=True) & (n_left > 0)
        if model.may_terminate:
            goes_on = goes_on & ~model.terminal(next_states)
        states, n_left = th.where(goes_on, next_states, states), th.where(goes_on, n_left - 1, 0)
        is_taken.append(goes_on)
    return HeldState(states, n_left), th.stack(is_taken)


class Steps(ABC):
    """Strategy that steps the model in rollouts: eager or compiled."""

    #: Whether steps are compiled. A compiled model is faster than a simulator written in NumPy
    is_compiled: bool = False

    def begin_update(self, n_updates: int) -> None:  # noqa: B027  # only compilers wait for an update
        """
        :param n_updates: number of the update that the next steps are for
        """

    def close(self) -> None:  # noqa: B027  # only compilers have a process
        """End what runs beside the training."""

    @abstractmethod
    def advance(
        self, rollout: RolloutState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[RolloutState, th.Tensor]:
        """
        :param rollout: state of the rollout
        :param n_steps: number of steps, at least 1
        :param actor_parameters: parameters of the policy for these steps
        :param context: policy, model, units and discount factor
        :return: as :func:`advance`
        """

    @abstractmethod
    def hold(
        self, held: HeldState, n_steps: int, env_actions: th.Tensor, model: PriorModel, low: th.Tensor, high: th.Tensor
    ) -> tuple[HeldState, th.Tensor]:
        """See :func:`hold` for the parameters and the result."""

    @abstractmethod
    def follow(
        self, planned: PlannedState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[PlannedState, th.Tensor]:
        """See :func:`follow` and :meth:`advance` for the parameters and the result; without gradient."""

    @abstractmethod
    def policy(self, actor: th.nn.Module, n_rows: int) -> Policy:
        """
        :param actor: the policy
        :param n_rows: usual number of rows of its inputs
        :return: the same policy, for use without gradient and only in one rollout: its parameters must not change
        """


class EagerSteps(Steps):
    """Steps the model without compilation."""

    def advance(
        self, rollout: RolloutState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[RolloutState, th.Tensor]:
        return advance(rollout, n_steps, context.actor, actor_parameters, context.model, context.units, context.gamma)

    def hold(
        self, held: HeldState, n_steps: int, env_actions: th.Tensor, model: PriorModel, low: th.Tensor, high: th.Tensor
    ) -> tuple[HeldState, th.Tensor]:
        return hold(held, n_steps, env_actions, model, low, high)

    def follow(
        self, planned: PlannedState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[PlannedState, th.Tensor]:
        return follow(planned, n_steps, context.actor, actor_parameters, context.model, context.units, context.gamma)

    def policy(self, actor: th.nn.Module, n_rows: int) -> Policy:
        return actor
