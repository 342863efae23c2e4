"""Start states of rollouts that are explored in the model."""

from typing import NamedTuple

import torch as th

from sb3_mpg.common.checks import check_number
from sb3_mpg.common.rollouts.steps import HeldState, RolloutContext


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
    Perturbed start states: some model steps away from the replayed ones, with an action that is repeated. A row stops before
    it leaves the bounds or terminates. A row that takes no step stays as it is recorded.

    :param observations: raw observations, ``(B, *obs_shape)``
    :param actions: repeated actions, in [-1, 1], ``(B, A)``
    :param context: model, units and steps
    :param n_steps: numbers of model steps, whole numbers, ``(B, 1)``
    :param low: lower bounds of raw observations, ``obs_shape``
    :param high: upper bounds of raw observations, ``obs_shape``
    :param max_steps: the largest number of steps
    :return: raw observations, ``(B, *obs_shape)``
    """
    model = context.model
    held = HeldState(model.state_from_observation(observations), n_steps)
    held, is_taken = context.steps.hold(held, max_steps, context.units.unscale_actions(actions), model, low, high)
    # A model may not predict all that is observed: without a step, the record is kept rather than the model's reading of it.
    # A row that does not take the first step takes none.
    takes_steps = is_taken[0].reshape(-1, *[1] * (observations.ndim - 1))
    return th.where(takes_steps, model.observation(held.states), observations)


class ModelExploration(NamedTuple):
    """
    Replaces a share of replayed states by perturbed ones. Replayed states cover only the neighbourhood of the policy's
    trajectories; a model that is trusted can be explored as well.

    :param share: share of the states of a batch, from 0 to 1
    :param max_steps: largest number of model steps
    :param noise: standard deviation of the noise on the action, in [-1, 1] units
    :param margin: how far outside the batch a state may lie in any dimension, in widths of the batch
    """

    share: float
    max_steps: int = 10
    noise: float = 1.0
    margin: float = 1.0

    def check(self) -> None:
        """
        :raises ValueError: when the share is none
        """
        check_number("model_exploration", self.share, 0.0)
        if self.share > 1:
            raise ValueError(f"`model_exploration` is a share, from 0 to 1, got {self.share!r}.")

    @th.no_grad()
    def perturb(self, observations: th.Tensor, context: RolloutContext, trust: float) -> th.Tensor:
        """
        :param observations: raw observations of replayed states, ``(B, *obs_shape)``
        :param context: policy, model, units and steps
        :param trust: in the model, from 0 to 1: the probability that a chosen row is perturbed
        :return: raw observations, ``(B, *obs_shape)``
        """
        n_explored = round(self.share * len(observations))
        if n_explored == 0 or trust == 0:
            return observations
        device = observations.device
        # Spread over the batch, whose parts belong to different members of an ensemble
        rows = th.arange(n_explored, device=device) * len(observations) // n_explored
        shape = (n_explored, 1)
        n_steps = th.randint(1, self.max_steps + 1, shape, device=device)
        # Always the same number of rows, so that the compiled step is reused
        n_steps = n_steps * (th.rand(shape, device=device) < trust)
        replayed = observations[rows]
        actions = context.actor(context.units.normalize_observations(replayed))
        actions = (actions + self.noise * th.randn_like(actions)).clamp(-1, 1)
        low, high = observations.amin(dim=0), observations.amax(dim=0)
        # A dimension that is constant in the batch gives no bounds
        margin = th.where(high > low, self.margin * (high - low), th.inf)
        explored = explore_in_model(replayed, actions, context, n_steps, low - margin, high + margin, self.max_steps)
        return observations.index_copy(0, rows, explored)
