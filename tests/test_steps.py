"""Steps of rollouts: whoever takes them, they are the same."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from helpers import rollout_context
from lq import LinearActor, LinearModel, random_problem, tensors
from models import Counter

from sb3_mpg.common.compilation.step_compiler import StepCompiler
from sb3_mpg.common.rollouts.model_rollout import start_rollout
from sb3_mpg.common.rollouts.steps import EagerSteps, HeldState
from sb3_mpg.common.units import Units

# Without torch's C++ compiler, of which test_step_compiler.py is
STEPS = {"eager": EagerSteps, "compiled": lambda: StepCompiler("eager")}
UNITS = Units(action_centre=th.tensor([0.1, 0.2]), action_half_range=th.tensor([0.5, 2.0]), reward_scale=0.5)


@pytest.fixture(params=STEPS)
def steps(request):
    return STEPS[request.param]()


class Terminates(LinearModel):
    def terminal(self, states):
        return states[:, :1].abs() > 0.5


class MayTerminate(LinearModel):
    """Terminations have a probability, which is smooth."""

    may_terminate = True

    def termination_probability(self, states):
        return (0.5 * states[:, :1]).sigmoid() ** 2


def linear_context(steps, model_class=LinearModel):
    a, b, q, r, k, _ = random_problem()
    actor = LinearActor(th.as_tensor(k, dtype=th.float32))
    return rollout_context(actor, model_class(*tensors(a, b, q, r)).float(), units=UNITS, steps=steps)


def rollout_of(context, n_steps):
    """States, rewards, and the gradient of both."""
    observations = th.as_tensor(np.random.default_rng(0).normal(size=(16, 3)), dtype=th.float32)
    rollout = start_rollout(observations, context)
    rollout, rewards = context.steps.advance(rollout, n_steps, dict(context.actor.named_parameters()), context)
    total = rewards.mean() + (rollout.alive * (rollout.states + rollout.actions.sum(dim=1, keepdim=True))).sum()
    (gradient,) = th.autograd.grad(total, context.actor.k)
    return *rollout, rewards, gradient


@pytest.mark.parametrize("model_class", [LinearModel, Terminates])
def test_steps_of_a_rollout_are_those_of_a_loop(steps, model_class):
    context = linear_context(steps, model_class)
    k, model = context.actor.k.detach(), context.model
    states, network_inputs, actions, alive, start, rewards, gradient = rollout_of(context, 5)
    expected, is_alive, total = start, th.ones(16, 1, dtype=th.bool), 0.0
    for step in range(5):
        env_actions = UNITS.unscale_actions(expected @ k.T)
        next_states = model.transition(expected, env_actions)
        total = total + 0.9**step * 0.5 * model.reward(expected, env_actions, next_states) * is_alive
        is_alive = is_alive & ~model.terminal(next_states)
        expected = th.where(is_alive, next_states, start)
    th.testing.assert_close((states, network_inputs, actions), (expected, expected, expected @ k.T))
    th.testing.assert_close(rewards, total)
    assert th.equal(alive, is_alive.float()) and alive.any() and bool(alive.all()) == (model_class is LinearModel)
    assert th.isfinite(gradient).all() and (gradient != 0).all()


def test_rewards_are_weighted_by_the_probability_of_having_survived(steps):
    context = linear_context(steps, MayTerminate)
    k, model = context.actor.k.detach(), context.model
    rollout = rollout_of(context, 3)
    states, survival, total = rollout[4], th.ones(16, 1), 0.0
    for step in range(3):
        env_actions = UNITS.unscale_actions(states @ k.T)
        next_states = model.transition(states, env_actions)
        total = total + 0.9**step * 0.5 * model.reward(states, env_actions, next_states) * survival
        survival = survival * (1 - model.termination_probability(next_states))
        states = next_states
    th.testing.assert_close((rollout[0], rollout[3], rollout[5]), (states, survival, total))


@pytest.mark.parametrize(("n_steps", "model_class"), [(1, LinearModel), (4, LinearModel), (4, MayTerminate)])
def test_numbers_and_gradients_are_those_of_eager_steps(steps, n_steps, model_class):
    expected = rollout_of(linear_context(EagerSteps(), model_class), n_steps)
    context = linear_context(steps, model_class)
    # The second time, what was compiled is used
    for _ in range(2):
        th.testing.assert_close(rollout_of(context, n_steps), expected)
    assert steps.is_compiled == isinstance(steps, StepCompiler)


def test_repeated_actions_stop_at_the_bounds_and_before_terminations(steps):
    states, n_left = th.tensor([[0.0], [0.0], [0.0], [4.0]]), th.tensor([[3], [9], [9], [0]])
    env_actions, low, high = th.tensor([[0.25], [1.0], [-2.0], [1.0]]), th.tensor([-9.0]), th.tensor([4.5])
    held, is_taken = steps.hold(HeldState(states, n_left), 5, env_actions, Counter(), low, high)
    assert held.states.tolist() == [[0.75], [4.0], [-2.0], [4.0]]
    assert held.n_left.tolist() == [[0], [0], [0], [0]]
    assert is_taken.sum(dim=0).tolist() == [[3], [4], [1], [0]]
    assert is_taken.shape == (5, 4, 1)
    assert steps.is_compiled == isinstance(steps, StepCompiler)


class Swinging(Counter):
    """s' = s + a in one step, and s' = s - a in the next."""

    sign = 1.0

    def transition(self, states, actions):
        self.sign = -self.sign
        return states + self.sign * actions


def test_a_row_that_stopped_does_not_go_on():
    """Even if its next step would be possible, as where the model is random."""
    steps = EagerSteps()
    held = HeldState(th.zeros(2, 1), th.tensor([[5], [5]]))
    low, high = th.tensor([-1.0]), th.tensor([1.0])
    held, is_taken = steps.hold(held, 4, th.tensor([[-2.0], [0.5]]), Swinging(), low, high)
    assert is_taken[:, :, 0].tolist() == [[False, True]] * 4
    assert held.states.tolist() == [[0.0], [0.0]] and held.n_left.tolist() == [[0], [1]]


def test_the_policy_acts_as_it_is_on_any_number_of_rows(steps):
    actor, inputs = LinearActor(th.randn(2, 3)), th.randn(5, 3)
    for _ in range(2):
        with th.no_grad():
            policy = steps.policy(actor, 5)
            for rows in (inputs, inputs[:3], inputs):
                th.testing.assert_close(policy(rows), rows @ actor.k.T)
            # The next rollout has another policy
            actor.k.add_(1.0)
    assert steps.is_compiled == isinstance(steps, StepCompiler)


@pytest.mark.parametrize("makes_pickles", [False, True], ids=["copied", "pickled"])
def test_copies_take_the_same_steps(steps, makes_pickles):
    """Also copies of steps that were used before: what was compiled stays with its owner."""
    context = linear_context(steps)
    expected = rollout_of(context, 3)
    other = pickle.loads(pickle.dumps(steps)) if makes_pickles else copy.deepcopy(steps)
    assert type(other) is type(steps) and other is not steps
    assert other.is_compiled == steps.is_compiled
    assert not steps.is_compiled or other.backend == steps.backend
    th.testing.assert_close(rollout_of(context._replace(steps=other), 3), expected)
    th.testing.assert_close(rollout_of(context, 3), expected)
