"""Comparisons that several tests make."""

import random

import torch as th

from sb3_mpg.common.models.trainable import members_of
from sb3_mpg.common.rollouts.policy_gradient import mixed_policy_gradient
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


def policy_gradient_of(model, observations, weights, balance=0.0):
    """
    Mixed policy gradient of an algorithm, with rows dealt to the members of its model. The noise of the model is the same in
    each call.
    """
    th.manual_seed(3)
    random.seed(3)
    model.rollout_model.train()
    context = model.update.context(model.units(), model.gamma)
    with members_of(model.rollout_model, "dealt"):
        return mixed_policy_gradient(observations, context, weights, model.differentiate, balance)
