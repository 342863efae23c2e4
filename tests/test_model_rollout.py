"""Returns of model rollouts and their gradients, against closed forms."""

import numpy as np
import pytest
import torch as th
from helpers import rollout_context
from lq import LinearActor, LinearModel, analytic_gradient, quadratic_q, random_problem, rollout_problem, tensors

from sb3_mpg import PriorModel
from sb3_mpg.common.rollouts.diagnosis import first_non_finite_step
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.units import Units


def rollout_gradient(states, context, horizon, differentiate="first_action"):
    returns = model_rollout(states, context, [horizon], differentiate)[horizon]
    return th.autograd.grad(returns.mean(), context.actor.k)[0]


@pytest.fixture(scope="module")
def problem():
    matrices, model, actor, q_function = rollout_problem()
    return matrices, rollout_context(actor, model, q_function, gamma=0.97)


@pytest.mark.parametrize("horizon", [0, 1, 5, 25])
def test_unified_gradient_equals_the_analytic_one(problem, horizon):
    (a, b, q, r, k, critic), context = problem
    states = np.random.default_rng(1).normal(size=(16, 3))
    gradient = rollout_gradient(th.as_tensor(states), context, horizon)
    expected = np.mean([analytic_gradient(s, a, b, q, r, k, critic, horizon, 0.97) for s in states], axis=0)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("horizon", [0, 1, 5])
def test_model_gradient_equals_finite_differences(problem, horizon):
    """Eq. 5 of the first version: the derivative of the return when every action changes with the parameters."""
    (_, _, _, _, k, _), context = problem
    states = th.as_tensor(np.random.default_rng(1).normal(size=(8, 3)))
    gradient = rollout_gradient(states, context, horizon, "all_actions")
    expected = np.zeros_like(k)
    for index in np.ndindex(*k.shape):
        values = []
        for sign in (1, -1):
            moved = k.copy()
            moved[index] += sign * 1e-6
            perturbed = context._replace(actor=LinearActor(th.as_tensor(moved)))
            values.append(model_rollout(states, perturbed, [horizon])[horizon].mean().item())
        expected[index] = (values[0] - values[1]) / 2e-6
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-5, atol=1e-7)


class SharingActor(th.nn.Module):
    """A module of two names, as of a user's extractor, and a parameter of two modules."""

    def __init__(self, k):
        super().__init__()
        self.first, last = th.nn.Linear(3, 2, bias=False), th.nn.Linear(2, 2, bias=False)
        self.layers = th.nn.Sequential(self.first, last, last)
        self.first.weight = th.nn.Parameter(k)
        last.weight = self.mix = th.nn.Parameter(th.eye(2, dtype=th.float64))

    def forward(self, observations):
        return self.layers(observations) + 0 * self.mix.sum()


@pytest.mark.parametrize("differentiate", ["first_action", "all_actions"])
def test_parameters_may_be_shared(problem, differentiate):
    (_, _, _, _, k, _), context = problem
    states = th.as_tensor(np.random.default_rng(1).normal(size=(8, 3)))
    actor = SharingActor(th.as_tensor(k))
    parameters = list(actor.parameters())
    returns = model_rollout(states, context._replace(actor=actor), [5], differentiate)[5]
    # They are in place again, and have the gradient of an actor that shares nothing
    assert all(ours is before for ours, before in zip(actor.parameters(), parameters, strict=True))
    (gradient,) = th.autograd.grad(returns.mean(), actor.first.weight)
    th.testing.assert_close(gradient, rollout_gradient(states, context, 5, differentiate))


def rotation_problem(n_points=7, gamma=0.9):
    """
    The closed loop turns the plane by 2 pi / n_points, so the uniform distribution over an orbit is stationary, exactly:
    expectations are sums over its points. The critic is not the value function.
    """
    angle = 2 * np.pi / n_points
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    rng = np.random.default_rng(3)
    b, k = rng.normal(size=(2, 2)), 0.4 * rng.normal(size=(2, 2))
    q, r = np.array([[1.0, 0.2], [0.2, 0.5]]), np.array([[0.3, 0.1], [0.1, 0.4]])
    model = LinearModel(*tensors(rotation - b @ k, b, q, r))
    start = np.array([0.7, -0.4])
    states = [start]
    for _ in range(n_points - 1):
        states.append(rotation @ states[-1])
    q_function = quadratic_q(*tensors(*random_problem(2, 2, seed=5)[5]))
    return th.as_tensor(np.stack(states)), rollout_context(LinearActor(th.as_tensor(k)), model, q_function, gamma=gamma)


@pytest.mark.parametrize("n", [1, 2, 7, 25])
def test_theorem_1_of_the_first_version(n):
    """
    The model gradient is the sum of gamma^k unified gradients of horizon n - k, whatever the critic.
    The text's sum ends at k = n - 1 and so omits the critic's own action, which eq. 5 differentiates, too.
    """
    states, context = rotation_problem()
    model_gradient = rollout_gradient(states, context, n, "all_actions")
    unified = sum(context.gamma**k * rollout_gradient(states, context, n - k) for k in range(n + 1))
    th.testing.assert_close(model_gradient, unified, rtol=1e-10, atol=1e-12)


def test_theorem_1_of_the_revision():
    """With infinitely many steps, the model gradient is the unified gradient over 1 - gamma."""
    states, context = rotation_problem(gamma=0.9)
    model_gradient = rollout_gradient(states, context, 400, "all_actions")
    unified = rollout_gradient(states, context, 400)
    th.testing.assert_close(model_gradient, unified / (1 - context.gamma), rtol=1e-8, atol=1e-10)


def test_one_rollout_gives_every_horizon(problem):
    _, context = problem
    states = th.as_tensor(np.random.default_rng(2).normal(size=(4, 3)))
    together = model_rollout(states, context, [5, 0, 3])
    assert set(together) == {0, 3, 5}
    for horizon, returns in together.items():
        assert returns.shape == (4, 1)
        alone = model_rollout(states, context, [horizon])
        th.testing.assert_close(returns, alone[horizon])


class TerminalModel(LinearModel):
    """Terminates beyond 1, and is not finite from there on."""

    def transition(self, states, actions):
        next_states = super().transition(states, actions)
        return th.where(states[:, :1].abs() > 1, th.full_like(next_states, float("inf")), next_states)

    def terminal(self, states):
        return states[:, :1].abs() > 1


@pytest.mark.parametrize("differentiate", ["first_action", "all_actions"])
def test_gradient_does_not_pass_through_terminal_states(differentiate):
    """Masked values are not enough where the model has no derivative: 0 * nan is nan."""

    class Root(PriorModel):
        def transition(self, states, actions):
            return states + 0.5 + 0.3 * actions * (1 - states**2).sqrt()

        def reward(self, states, actions, next_states):
            return -((1.5 - states) ** 2)

        def terminal(self, states):
            return states >= 1

    actor = LinearActor(th.full((1, 1), 0.1, dtype=th.float64))
    states = th.tensor([[-0.9], [0.2], [0.9]], dtype=th.float64)
    q_function = quadratic_q(*tensors(np.eye(1), np.eye(1), np.eye(1)))
    context = rollout_context(actor, Root(), q_function)
    gradient = rollout_gradient(states, context, 5, differentiate)
    assert th.isfinite(gradient).all()
    assert (gradient != 0).all()
    assert first_non_finite_step(states, context, 5) is None


@pytest.mark.parametrize("differentiate", ["first_action", "all_actions"])
def test_terminal_states_are_masked(differentiate):
    a, b, q, r, k, critic = random_problem(seed=4)
    a = a * 1.1  # some rollouts terminate
    model = TerminalModel(*tensors(a, b, q, r))
    q_function = quadratic_q(*tensors(*critic))
    actor = LinearActor(th.as_tensor(k))
    states = th.as_tensor(np.random.default_rng(0).uniform(-0.9, 0.9, size=(32, 3)))
    gamma, horizon = 0.9, 6
    context = rollout_context(actor, model, q_function, gamma=gamma)
    returns = model_rollout(states, context, [horizon], differentiate)[horizon]

    n_ended = 0
    for s, value in zip(states.numpy(), returns[:, 0].tolist(), strict=True):
        expected, ended = 0.0, False
        for step in range(horizon):
            action = k @ s
            expected -= gamma**step * (s @ q @ s + action @ r @ action)
            s = a @ s + b @ action
            if abs(s[0]) > 1:
                ended = True
                break
        if not ended:
            p_ss, p_sa, p_aa = critic
            action = k @ s
            expected -= gamma**horizon * (s @ p_ss @ s + 2 * s @ p_sa @ action + action @ p_aa @ action)
        n_ended += ended
        assert value == pytest.approx(expected, rel=1e-10)
    assert 3 < n_ended < 29
    gradient = th.autograd.grad(returns.mean(), actor.k)[0]
    assert th.isfinite(gradient).all()


def test_units_are_those_of_the_environment():
    """Actions are un-scaled, observations normalised and clipped, and rewards scaled, inside the graph."""
    units = Units(
        action_centre=th.tensor([2.0]),
        action_half_range=th.tensor([3.0]),
        reward_scale=0.5,
        observation_mean=th.tensor([1.0, -2.0]),
        observation_std=th.tensor([2.0, 4.0]),
        clip_observation=1.5,
        reward_std=th.tensor(10.0),
        clip_reward=3.0,
    )
    seen = []

    class Spy(PriorModel):
        def transition(self, states, actions):
            seen.append((states.clone(), actions.clone()))
            return states + actions

        def reward(self, states, actions, next_states):
            return -100.0 * next_states[:, :1]

    class Actor(th.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = th.nn.Parameter(th.tensor(0.1))

        def forward(self, observations):
            seen.append(observations.clone())
            return (self.gain * observations).sum(1, keepdim=True)

    observations = th.tensor([[2.0, 2.0], [30.0, -2.0]])
    returns = model_rollout(observations, rollout_context(Actor(), Spy(), lambda o, a: o[:, :1], units), [1])
    network_inputs = th.tensor([[0.5, 1.0], [1.5, 0.0]])
    th.testing.assert_close(seen[0], network_inputs)
    actions = -1 + 0.5 * (0.1 * network_inputs.sum(1, keepdim=True) + 1) * 6
    th.testing.assert_close(seen[1][0], observations)
    th.testing.assert_close(seen[1][1], actions)
    rewards = 0.5 * (-100.0 * (observations + actions)[:, :1] / 10.0).clamp(-3, 3)
    values = (((observations + actions)[:, :1] - 1) / 2).clamp(-1.5, 1.5)
    th.testing.assert_close(returns[1], rewards + 0.9 * values)
