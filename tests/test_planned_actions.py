"""Imitation of planned actions, and plans that compiled steps follow."""

import pytest
import torch as th
from helpers import rollout_context
from lq import LinearActor, LinearModel
from torch import nn

from sb3_mpg.common.compilation.step_compiler import StepCompiler
from sb3_mpg.common.rollouts.model_rollout import start_rollout
from sb3_mpg.common.rollouts.planned_actions import FAR_FROM_PLANS, PlannedActions, with_imitation
from sb3_mpg.common.rollouts.steps import EagerSteps, PlannedState
from sb3_mpg.common.utils import parameters_of_modules


def test_the_latest_steps_are_kept_and_restored():
    plans = PlannedActions(2, 1, size=3)
    for step in range(4):
        plans.add(th.full((2,), float(step)), th.tensor([0.1 * step]))
    observations, actions = plans.sample(200)
    assert len(plans) == 3 and set(observations[:, 0].tolist()) == {1.0, 2.0, 3.0}
    th.testing.assert_close(actions, 0.1 * observations[:, :1])
    copy = PlannedActions(2, 1, size=3)
    copy.restore(plans.state_dict())
    assert len(copy) == 3 and th.equal(copy.observations, plans.observations)
    other = PlannedActions(4, 1, size=3)
    other.restore(plans.state_dict())
    assert len(other) == 0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("distance", [1.0, 0.5 * FAR_FROM_PLANS])
def test_both_gradients_have_the_same_norm_unless_the_policy_is_near(share, distance):
    """The policy is a = w s at s = 1, so the gradient of the squared difference points to the planned action."""
    actor = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(actor.weight)
    mixed = with_imitation([th.tensor([[3.0]])], actor, th.ones(5, 1), th.full((5, 1), distance), share)
    fading = min(distance / FAR_FROM_PLANS, 1)
    th.testing.assert_close(mixed[0], th.tensor([[(1 - share) * 3.0 - share * fading * 3.0]]))


def test_imitation_does_without_a_policy_gradient():
    actor = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(actor.weight)
    (gradient,) = with_imitation([th.zeros(1, 1)], actor, th.ones(5, 1), th.ones(5, 1), 1.0)
    th.testing.assert_close(gradient, th.tensor([[-2.0]]))
    (gradient,) = with_imitation([th.ones(1, 1)], actor, th.ones(5, 1), th.zeros(5, 1), 1.0)
    th.testing.assert_close(gradient, th.ones(1, 1))


@pytest.mark.parametrize("steps", [EagerSteps(), StepCompiler(backend="eager")], ids=["eager", "compiled"])
def test_plans_are_offsets_to_the_policy(steps):
    """s' = s + a, r = -s^2 - a^2, and the policy does nothing: returns by hand."""
    one = th.ones(1, 1)
    model = LinearModel(one, one, one, one)
    context = rollout_context(LinearActor(th.zeros(1, 1)), model, gamma=0.5)._replace(steps=steps)
    offsets = th.tensor([[0.5, -2.0], [0.0, 0.25]])
    with th.no_grad():
        rollout = start_rollout(th.tensor([[1.0], [2.0]]), context)
        planned = PlannedState(*rollout, offsets)
        planned, total = context.steps.follow(planned, 2, parameters_of_modules(context.actor), context)
    th.testing.assert_close(planned.states, th.tensor([[0.5], [2.25]]))  # actions of -2 are clipped to -1
    rewards = [
        [model.reward(*(th.tensor([[x]]) for x in step)).item() for step in steps_]
        for steps_ in (
            ((1.0, 0.5, 1.5), (1.5, -1.0, 0.5)),
            ((2.0, 0.0, 2.0), (2.0, 0.25, 2.25)),
        )
    ]
    th.testing.assert_close(total, th.tensor([[first + 0.5 * second] for first, second in rewards]))
    th.testing.assert_close(planned.offsets, offsets)
