"""Comparisons that several tests make."""

import torch as th

from sb3_mpg.common.rollouts.steps import EagerSteps, RolloutContext
from sb3_mpg.common.units import Units


def assert_same_parameters(first, second):
    """The policies of two algorithms are equal to the last bit."""
    for (key, expected), value in zip(first.policy.state_dict().items(), second.policy.state_dict().values(), strict=True):
        assert th.equal(expected, value), key


def rollout_context(actor, model, q_function=None, units=None, gamma=0.9, steps=None):
    """What rollouts have in common; by default everything is in the units of the environment, and steps are eager."""
    return RolloutContext(actor, q_function, model, units or Units(), gamma, steps or EagerSteps())


def drawn_batch(model, batch_size=32, n_updates=1):
    """Transitions with their value targets, as an update of the algorithm draws them."""
    inputs = model.training_inputs(batch_size)
    return model.update.draw_batch(batch_size, inputs.replay_buffer, inputs.units, inputs.settings_of(n_updates))
