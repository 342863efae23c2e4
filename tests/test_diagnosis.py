"""What error messages say of rollouts that are not finite."""

import numpy as np
import torch as th
from helpers import rollout_context
from lq import LinearActor, quadratic_q, tensors

from sb3_mpg import PriorModel
from sb3_mpg.common.rollouts.diagnosis import first_non_finite_step


def test_first_non_finite_step_names_the_step():
    class Explodes(PriorModel):
        def transition(self, states, actions):
            return states + 1 + th.exp(100 * (states - 1.5)) + 0 * actions

        def reward(self, states, actions, next_states):
            return -states

    actor = LinearActor(th.zeros(1, 1, dtype=th.float64))
    q_function = quadratic_q(*tensors(np.eye(1), np.eye(1), np.eye(1)))
    states = th.zeros(2, 1, dtype=th.float64)
    context = rollout_context(actor, Explodes(), q_function)
    assert first_non_finite_step(states, context, 3) is None
    assert "next state of model step 3" in str(first_non_finite_step(states, context, 5))

    class BadSlopeOfActions(Explodes):
        def transition(self, states, actions):
            return states + actions.abs().sqrt()

    reason = first_non_finite_step(states, context._replace(model=BadSlopeOfActions()), 1)
    assert reason == "the gradient becomes non-finite in model step 0"

    class BadSlope(PriorModel):
        def transition(self, states, actions):
            return states + actions

        def reward(self, states, actions, next_states):
            return -(states**2).sqrt()

    reason = first_non_finite_step(states, context._replace(model=BadSlope()), 3)
    assert "gradient becomes non-finite in model step 2" in str(reason)
