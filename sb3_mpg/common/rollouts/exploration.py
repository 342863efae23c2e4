"""Perturbed start states and first actions of rollouts."""

import math
from typing import NamedTuple

import torch as th

from sb3_mpg.common.rollouts.steps import HeldState, RolloutContext

# The smallest standard deviation of perturbed first actions, in [-1, 1] units; the largest is 1
SMALLEST_TRIAL = 0.02


def perturbed_actions(actions: th.Tensor) -> th.Tensor:
    """
    :param actions: actions in [-1, 1], ``(B, A)``
    :return: the same with noise of all orders of size, from corrections to other ways, ``(B, A)``
    """
    sizes = th.exp(math.log(SMALLEST_TRIAL) * th.rand_like(actions[:, :1]))
    return (actions + sizes * th.randn_like(actions)).clamp(-1, 1)


@th.no_grad()
def explore_in_model(
    observations: th.Tensor,
    actions: th.Tensor,
    context: RolloutContext,
    n_steps: th.Tensor,
    low: th.Tensor,
    high: th.Tensor,
    max_steps: int,
) -> th.Tensor:
    """
    Perturb replayed states by some model steps with a repeated action. A row stops before it leaves the bounds or terminates.
    A row that takes no step keeps its recorded observation.

    :param observations: raw observations, ``(B, O)``
    :param actions: repeated actions, in [-1, 1], ``(B, A)``
    :param context: model, units and steps
    :param n_steps: numbers of model steps, whole numbers, ``(B, 1)``
    :param low: lower bounds of raw observations, ``(O,)``
    :param high: upper bounds of raw observations, ``(O,)``
    :param max_steps: the largest number of steps
    :return: raw observations, ``(B, O)``
    """
    model = context.model
    held = HeldState(model.state_from_observation(observations), n_steps)
    held, is_taken = context.steps.hold(held, max_steps, context.units.unscale_actions(actions), model, low, high)
    # Without a step, keep the recorded observation: the model may not reproduce all elements of it. A row that does not take
    # the first step takes none
    return th.where(is_taken[0], model.observation(held.states), observations)


class ModelExploration(NamedTuple):
    """
    Replaces a share of replayed states by perturbed ones. Replayed states cover only the neighbourhood of the policy's
    trajectories; a model that is trusted can be explored as well.

    :param share: share of the states of a batch, from 0 to 1
    :param max_steps: largest number of model steps, at least 1: in as many steps as a rollout has, the system changes as much
    :param noise: standard deviation of the noise on the action, in [-1, 1] units
    :param margin: how far outside the batch a state may lie in any dimension, in widths of the batch
    """

    share: float
    max_steps: int
    noise: float = 1.0
    margin: float = 1.0

    @th.no_grad()
    def perturb(self, observations: th.Tensor, context: RolloutContext, trust: float) -> th.Tensor:
        """
        :param observations: raw observations of replayed states, ``(B, O)``
        :param context: policy, model, units and steps
        :param trust: trust in the model, from 0 to 1: the probability that a chosen row is perturbed
        :return: raw observations, ``(B, O)``
        """
        n_explored = round(self.share * len(observations))
        if n_explored == 0 or trust == 0:
            return observations
        device = observations.device
        # Choose rows evenly over the batch, whose parts are dealt to the members of an ensemble
        rows = th.arange(n_explored, device=device) * len(observations) // n_explored
        # Draw numbers of steps: 0 for rows that are not perturbed, so that the compiled step always gets as many rows
        shape = (n_explored, 1)
        n_steps = th.randint(1, self.max_steps + 1, shape, device=device)
        n_steps = n_steps * (th.rand(shape, device=device) < trust)
        # Add noise to the policy's actions
        replayed = observations[rows]
        actions = context.actor(context.units.normalize_observations(replayed))
        actions = (actions + self.noise * th.randn_like(actions)).clamp(-1, 1)
        # Stay near the batch. A dimension that is constant in the batch gives no bounds
        low, high = observations.amin(dim=0), observations.amax(dim=0)
        margin = th.where(high > low, self.margin * (high - low), th.inf)
        explored = explore_in_model(replayed, actions, context, n_steps, low - margin, high + margin, self.max_steps)
        return observations.index_copy(0, rows, explored)
