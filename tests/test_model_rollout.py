import numpy as np
import pytest
import torch as th
from lq import LinearActor, LinearModel, analytic_gradient, quadratic_q, random_problem

from sb3_mpg import PriorModel
from sb3_mpg.common.rollouts.model_rollout import (
    HeldState,
    explore_in_model,
    first_non_finite_step,
    hold,
    mixed_policy_gradient,
    model_rollout,
)
from sb3_mpg.common.units import Units

IDENTITY = Units()


def tensors(*arrays):
    return [th.as_tensor(array, dtype=th.float64) for array in arrays]


def rollout_gradient(states, actor, q_function, model, horizon, gamma, differentiate="first_action", units=IDENTITY):
    returns = model_rollout(states, actor, q_function, model, units, [horizon], gamma, differentiate)[horizon]
    return th.autograd.grad(returns.mean(), actor.k)[0]


@pytest.fixture(scope="module")
def problem():
    a, b, q, r, k, critic = random_problem()
    model = LinearModel(*tensors(a, b, q, r))
    q_function = quadratic_q(*tensors(*critic))
    return (a, b, q, r, k, critic), model, q_function


@pytest.mark.parametrize("horizon", [0, 1, 5, 25])
def test_unified_gradient_equals_the_analytic_one(problem, horizon):
    (a, b, q, r, k, critic), model, q_function = problem
    states = np.random.default_rng(1).normal(size=(16, 3))
    gradient = rollout_gradient(th.as_tensor(states), LinearActor(th.as_tensor(k)), q_function, model, horizon, 0.97)
    expected = np.mean([analytic_gradient(s, a, b, q, r, k, critic, horizon, 0.97) for s in states], axis=0)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("horizon", [0, 1, 5])
def test_model_gradient_equals_finite_differences(problem, horizon):
    """Eq. 5 of the first version: the derivative of the return when every action changes with the parameters."""
    (_, _, _, _, k, _), model, q_function = problem
    states = th.as_tensor(np.random.default_rng(1).normal(size=(8, 3)))
    gradient = rollout_gradient(states, LinearActor(th.as_tensor(k)), q_function, model, horizon, 0.97, "all_actions")
    expected = np.zeros_like(k)
    for index in np.ndindex(*k.shape):
        values = []
        for sign in (1, -1):
            moved = k.copy()
            moved[index] += sign * 1e-6
            actor = LinearActor(th.as_tensor(moved))
            returns = model_rollout(states, actor, q_function, model, IDENTITY, [horizon], 0.97)[horizon]
            values.append(returns.mean().item())
        expected[index] = (values[0] - values[1]) / 2e-6
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-5, atol=1e-7)


def rotation_problem(n_points=7, gamma=0.9):
    """
    The closed loop turns the plane by 2 pi / n_points, so the uniform distribution over an orbit is stationary, exactly:
    expectations are sums over its points.
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
    return th.as_tensor(np.stack(states)), LinearActor(th.as_tensor(k)), model, gamma


@pytest.mark.parametrize("n", [1, 2, 7, 25])
def test_theorem_1_of_the_first_version(n):
    """
    The model gradient is the sum of gamma^k unified gradients of horizon n - k, whatever the critic.
    The text's sum ends at k = n - 1 and so leaves out the critic's own action, which eq. 5 differentiates too.
    """
    states, actor, model, gamma = rotation_problem()
    q_function = quadratic_q(*tensors(*random_problem(2, 2, seed=5)[5]))
    model_gradient = rollout_gradient(states, actor, q_function, model, n, gamma, "all_actions")
    unified = sum(gamma**k * rollout_gradient(states, actor, q_function, model, n - k, gamma) for k in range(n + 1))
    th.testing.assert_close(model_gradient, unified, rtol=1e-10, atol=1e-12)


def test_theorem_1_of_the_revision():
    """With infinitely many steps, the model gradient is the unified gradient over 1 - gamma."""
    states, actor, model, gamma = rotation_problem(gamma=0.9)
    q_function = quadratic_q(*tensors(*random_problem(2, 2, seed=5)[5]))
    model_gradient = rollout_gradient(states, actor, q_function, model, 400, gamma, "all_actions")
    unified = rollout_gradient(states, actor, q_function, model, 400, gamma)
    th.testing.assert_close(model_gradient, unified / (1 - gamma), rtol=1e-8, atol=1e-10)


def test_one_rollout_gives_every_horizon(problem):
    (_, _, _, _, k, _), model, q_function = problem
    states = th.as_tensor(np.random.default_rng(2).normal(size=(4, 3)))
    actor = LinearActor(th.as_tensor(k))
    together = model_rollout(states, actor, q_function, model, IDENTITY, [5, 0, 3], 0.9)
    assert set(together) == {0, 3, 5}
    for horizon, returns in together.items():
        assert returns.shape == (4, 1)
        alone = model_rollout(states, actor, q_function, model, IDENTITY, [horizon], 0.9)
        th.testing.assert_close(returns, alone[horizon])


class CountingModel(LinearModel):
    calls = 0

    def transition(self, states, actions):
        self.calls += 1
        return super().transition(states, actions)


def test_negligible_horizons_cost_nothing(problem):
    (a, b, q, r, k, _), _, q_function = problem
    model = CountingModel(*tensors(a, b, q, r))
    states = th.as_tensor(np.random.default_rng(2).normal(size=(4, 3)))
    actor = LinearActor(th.as_tensor(k))
    weights = {0: 1.0, 5: 0.9e-6, 25: 1e-9}
    returns = mixed_policy_gradient(states, actor, q_function, model, IDENTITY, weights, 0.9).returns
    assert model.calls == 0
    assert set(returns) == {0}
    weights = {0: 0.25, 5: 0.75}
    loss, _, actions, returns, means, _ = mixed_policy_gradient(states, actor, q_function, model, IDENTITY, weights, 0.9)
    assert all(means[horizon] == returns[horizon].mean() for horizon in weights)
    assert model.calls == 5
    th.testing.assert_close(loss, -(0.25 * returns[0] + 0.75 * returns[5]).mean())
    th.testing.assert_close(actions, (states @ th.as_tensor(k).T))


def test_mixed_gradient_is_the_weighted_sum(problem):
    (_, _, _, _, k, _), model, q_function = problem
    states = th.as_tensor(np.random.default_rng(2).normal(size=(8, 3)))
    actor = LinearActor(th.as_tensor(k))
    mixed = mixed_policy_gradient(states, actor, q_function, model, IDENTITY, {0: 0.25, 5: 0.75}, 0.9).gradients
    alone = [rollout_gradient(states, actor, q_function, model, horizon, 0.9) for horizon in (0, 5)]
    th.testing.assert_close(mixed[0], -(0.25 * alone[0] + 0.75 * alone[1]))


def test_balanced_gradient_equals_the_one_written_by_hand(problem):
    """Of each horizon, g(s) / (0.2 m + 0.8 (|g(s)| + 0.3 m)), m the median of |g(s)|; then a weighted mean of d(a . g)/dK."""
    (a, b, q, r, k, critic), model, q_function = problem
    states = np.random.default_rng(2).normal(size=(9, 3)) * np.array([1e-3, 1, 1, 1, 1, 1, 1, 1, 1e3])[:, None]
    expected = np.zeros_like(k)
    for horizon, weight in {0: 0.25, 5: 0.75}.items():
        # The derivative with respect to K is the outer product of that with respect to the action and of the state
        outer = [analytic_gradient(s, a, b, q, r, k, critic, horizon, 0.9) for s in states]
        by_action = np.stack([gradient @ s / (s @ s) for gradient, s in zip(outer, states, strict=True)])
        norms = np.linalg.norm(by_action, axis=1)
        median = np.sort(norms)[4]
        factors = 1 / (0.2 * median + 0.8 * (norms + 0.3 * median))
        outer = [factor * np.outer(g, s) for factor, g, s in zip(factors, by_action, states, strict=True)]
        expected -= weight * np.sum(outer, axis=0) / np.sum(factors)
    actor = LinearActor(th.as_tensor(k))
    weights = {0: 0.25, 5: 0.75}
    gradient = mixed_policy_gradient(
        th.as_tensor(states), actor, q_function, model, IDENTITY, weights, 0.9, balance=0.8
    ).gradients[0]
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9)


class OverflowsBeyond(LinearModel):
    """Not a number where the first element of the state is more than 1."""

    def transition(self, states, actions):
        return super().transition(states, actions) + (1 - states[:, :1]).sqrt() * 0


@pytest.mark.parametrize("balance", [0.0, 0.8])
def test_states_at_which_the_model_overflows_add_nothing(problem, balance):
    (a, b, q, r, k, _), model, q_function = problem
    states = 0.1 * np.random.default_rng(2).normal(size=(9, 3))
    breaks, sound = OverflowsBeyond(*tensors(a, b, q, r)), th.as_tensor(states)
    broken = sound.clone()
    broken[3:6, 0] = 2.0
    actor = LinearActor(th.as_tensor(k))

    def gradient_at(states, model, horizons=(0, 2)):
        weights = {horizon: 1 / len(horizons) for horizon in horizons}
        return mixed_policy_gradient(states, actor, q_function, model, IDENTITY, weights, 0.9, balance=balance)

    everywhere, result = gradient_at(sound, model), gradient_at(broken, breaks)
    assert everywhere.share_left_out == 0
    assert result.share_left_out == pytest.approx(3 / 9)
    assert th.isfinite(result.loss)
    th.testing.assert_close(result.returns[2][:3], everywhere.returns[2][:3])
    if balance == 0:
        # A state is left out as a whole
        kept = gradient_at(th.cat([broken[:3], broken[6:]]), model).gradients[0] * 6 / 9
        th.testing.assert_close(result.gradients[0], kept)
    else:
        # Of each horizon by itself, and the balance of the others stays as it is: those left out count as of the middle size
        th.testing.assert_close(gradient_at(broken, breaks, (0,)).gradients[0], gradient_at(broken, model, (0,)).gradients[0])
        assert th.isfinite(result.gradients[0]).all()

    # Of most states it must be seen
    broken[:6, 0] = 2.0
    assert gradient_at(broken, breaks).gradients[0].isnan().any()
    assert gradient_at(broken, breaks).share_left_out == 0


class TerminalModel(LinearModel):
    """Terminates beyond 1, and is not even finite behind it."""

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
    gradient = rollout_gradient(states, actor, q_function, Root(), 5, 0.9, differentiate)
    assert th.isfinite(gradient).all()
    assert (gradient != 0).all()
    assert first_non_finite_step(states, actor, q_function, Root(), IDENTITY, 5, 0.9) is None


@pytest.mark.parametrize("differentiate", ["first_action", "all_actions"])
def test_terminal_states_are_masked(differentiate):
    a, b, q, r, k, critic = random_problem(seed=4)
    a = a * 1.1  # some leave the useful region
    model = TerminalModel(*tensors(a, b, q, r))
    q_function = quadratic_q(*tensors(*critic))
    actor = LinearActor(th.as_tensor(k))
    states = th.as_tensor(np.random.default_rng(0).uniform(-0.9, 0.9, size=(32, 3)))
    gamma, horizon = 0.9, 6
    returns = model_rollout(states, actor, q_function, model, IDENTITY, [horizon], gamma, differentiate)[horizon]

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
    returns = model_rollout(observations, Actor(), lambda o, a: o[:, :1], Spy(), units, [1], 0.9)
    network_inputs = th.tensor([[0.5, 1.0], [1.5, 0.0]])
    th.testing.assert_close(seen[0], network_inputs)
    actions = -1 + 0.5 * (0.1 * network_inputs.sum(1, keepdim=True) + 1) * 6
    th.testing.assert_close(seen[1][0], observations)
    th.testing.assert_close(seen[1][1], actions)
    rewards = 0.5 * (-100.0 * (observations + actions)[:, :1] / 10.0).clamp(-3, 3)
    values = (((observations + actions)[:, :1] - 1) / 2).clamp(-1.5, 1.5)
    th.testing.assert_close(returns[1], rewards + 0.9 * values)


def test_first_non_finite_step_names_the_step():
    class Explodes(PriorModel):
        def transition(self, states, actions):
            return states + 1 + th.exp(100 * (states - 1.5)) + 0 * actions

        def reward(self, states, actions, next_states):
            return -states

    actor = LinearActor(th.zeros(1, 1, dtype=th.float64))
    q_function = quadratic_q(*tensors(np.eye(1), np.eye(1), np.eye(1)))
    units, states = IDENTITY, th.zeros(2, 1, dtype=th.float64)
    assert first_non_finite_step(states, actor, q_function, Explodes(), units, 3, 0.9) is None
    assert "next state of model step 3" in str(first_non_finite_step(states, actor, q_function, Explodes(), units, 5, 0.9))

    class BadSlopeOfActions(Explodes):
        def transition(self, states, actions):
            return states + actions.abs().sqrt()

    reason = first_non_finite_step(states, actor, q_function, BadSlopeOfActions(), units, 1, 0.9)
    assert reason == "the gradient becomes non-finite in model step 0"

    class BadSlope(PriorModel):
        def transition(self, states, actions):
            return states + actions

        def reward(self, states, actions, next_states):
            return -(states**2).sqrt()

    reason = first_non_finite_step(states, actor, q_function, BadSlope(), units, 3, 0.9)
    assert "gradient becomes non-finite in model step 2" in str(reason)


class Counter(PriorModel):
    """s' = s + a; above 10 it says nothing that could be used, and below -3 it ends."""

    may_terminate = True

    def transition(self, states, actions):
        return th.where(states + actions > 10, th.nan, states + actions)

    def reward(self, states, actions, next_states):
        return -(states**2)

    def terminal(self, next_states):
        return next_states < -3


def test_exploring_holds_an_action_and_stays_in_the_region():
    half = LinearActor(th.full((1, 1), 0.5))
    observations = th.tensor([[0.0], [2.0], [-4.0], [0.0], [9.5], [-2.0], [3.0]])
    noise = th.tensor([[0.25], [-5.0], [0.0], [1.0], [0.0], [-1.0], [0.0]])
    n_steps = th.tensor([[3], [2], [0], [9], [9], [9], [1]])
    expected = [
        0.75,  # 3 steps of 0.25
        0.0,  # the action is 1 - 5, clipped to -1, twice
        -4.0,  # no step
        4.0,  # the last one within the region
        9.5,  # outside of the region, where the first step does not come back
        -3.0,  # a step further it ends
        4.0,  # one step of 1.5, clipped
    ]
    explored = explore_in_model(
        observations, half, Counter(), IDENTITY, n_steps, noise, th.tensor([-9.0]), th.tensor([4.5]), 9
    )
    assert explored.flatten().tolist() == pytest.approx(expected)
    # Nor does it go to where the model knows no number
    inf = th.tensor([th.inf])
    explored = explore_in_model(observations[3:4], half, Counter(), IDENTITY, th.tensor([[99]]), noise[3:4], -inf, inf, 99)
    assert explored.item() == 10.0


class DoubledCounter(PriorModel):
    """s' = s + a, of which twice is observed, and something else that the model does not know."""

    def state_from_observation(self, observations):
        return 0.5 * observations[:, :1]

    def observation(self, states):
        return th.cat([2 * states, th.zeros_like(states)], dim=1)

    def transition(self, states, actions):
        return states + actions

    def reward(self, states, actions, next_states):
        return -(states**2)


def test_exploring_keeps_to_the_units_of_everything():
    """Normalised observations for the policy, actions of the environment for the model, its own states."""
    units = Units(
        action_centre=th.tensor([10.0]),
        action_half_range=th.tensor([4.0]),
        observation_mean=th.tensor([6.0, 0.0]),
        observation_std=th.tensor([2.0, 1.0]),
    )
    actor = LinearActor(th.tensor([[0.25, 0.0]]))
    observations, noise = th.tensor([[8.0, 7.0], [8.0, 7.0]]), th.tensor([[0.5], [0.5]])
    inf = th.full((2,), th.inf)
    explored = explore_in_model(observations, actor, DoubledCounter(), units, th.tensor([[2], [0]]), noise, -inf, inf, 2)
    # The action is (8 - 6) / 2 / 4 + 0.5 = 0.75, in the environment 13, and 4 + 2 * 13 = 30 is seen as 60. Where no step is
    # taken, what the model does not know stays, too
    assert explored.tolist() == [[60.0, 0.0], [8.0, 7.0]]


def test_what_stopped_does_not_go_on():
    """Even if it could, as where the model is random."""

    class Swinging(Counter):
        sign = 1.0

        def transition(self, states, actions):
            self.sign = -self.sign
            return states + self.sign * actions

    held = HeldState(th.zeros(2, 1), th.tensor([[5], [5]]))
    low, high = th.tensor([-1.0]), th.tensor([1.0])
    held, is_taken = hold(held, 4, th.tensor([[-2.0], [0.5]]), Swinging(), low, high)
    assert is_taken[:, :, 0].tolist() == [[False, True]] * 4
    assert held.states.tolist() == [[0.0], [0.0]] and held.n_left.tolist() == [[0], [1]]


def test_a_row_that_steps_is_what_the_model_says_of_it():
    """Also where it stands still; what the model does not know is what it says everywhere."""

    class Still(DoubledCounter):
        def transition(self, states, actions):
            return states

    observations, inf = th.tensor([[8.0, 7.0], [8.0, 7.0]]), th.full((2,), th.inf)
    actor, steps = LinearActor(th.zeros(1, 2)), th.tensor([[1], [0]])
    explored = explore_in_model(observations, actor, Still(), IDENTITY, steps, th.zeros(2, 1), -inf, inf, 2)
    assert explored.tolist() == [[8.0, 0.0], [8.0, 7.0]]
