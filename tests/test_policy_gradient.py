"""The mixed policy gradient: weights, normalisation per state, and masked states."""

import numpy as np
import pytest
import torch as th
from helpers import rollout_context
from lq import LinearModel, analytic_gradient, rollout_problem, tensors

from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.rollouts.policy_gradient import mixed_policy_gradient


@pytest.fixture(scope="module")
def problem():
    matrices, model, actor, q_function = rollout_problem()
    return matrices, rollout_context(actor, model, q_function)


class CountingModel(LinearModel):
    calls = 0

    def transition(self, states, actions):
        self.calls += 1
        return super().transition(states, actions)


def test_negligible_horizons_cost_nothing(problem):
    (a, b, q, r, k, _), context = problem
    model = CountingModel(*tensors(a, b, q, r))
    context = context._replace(model=model)
    states = th.as_tensor(np.random.default_rng(2).normal(size=(4, 3)))
    result = mixed_policy_gradient(states, context, {0: 1.0, 5: 0.9e-6, 25: 1e-9})
    assert model.calls == 0
    assert set(result.returns) == {0}
    weights = {0: 0.25, 5: 0.75}
    result = mixed_policy_gradient(states, context, weights)
    returns = result.returns
    assert all(result.mean_returns[horizon] == returns[horizon].mean() for horizon in weights)
    assert model.calls == 5
    th.testing.assert_close(result.loss, -(0.25 * returns[0] + 0.75 * returns[5]).mean())
    th.testing.assert_close(result.actions, (states @ th.as_tensor(k).T))


def test_mixed_gradient_is_the_weighted_sum(problem):
    _, context = problem
    states = th.as_tensor(np.random.default_rng(2).normal(size=(8, 3)))
    mixed = mixed_policy_gradient(states, context, {0: 0.25, 5: 0.75}).gradients
    returns = model_rollout(states, context, (0, 5))
    alone = [th.autograd.grad(returns[horizon].mean(), context.actor.k, retain_graph=True)[0] for horizon in (0, 5)]
    th.testing.assert_close(mixed[0], -(0.25 * alone[0] + 0.75 * alone[1]))


def test_gradient_that_is_normalised_per_state_equals_the_one_written_by_hand(problem):
    """Of each horizon, g(s) / (0.2 m + 0.8 (|g(s)| + 0.3 m)), m the median of |g(s)|; then a weighted mean of d(a . g)/dK."""
    (a, b, q, r, k, critic), context = problem
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
    gradient = mixed_policy_gradient(th.as_tensor(states), context, {0: 0.25, 5: 0.75}, balance=0.8).gradients[0]
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9)


class OverflowsBeyond(LinearModel):
    """Not a number where the first element of the state is more than 1."""

    def transition(self, states, actions):
        return super().transition(states, actions) + (1 - states[:, :1]).sqrt() * 0


@pytest.mark.parametrize("balance", [0.0, 0.8])
def test_states_at_which_the_model_overflows_are_masked(problem, balance):
    (a, b, q, r, _, _), context = problem
    states = 0.1 * np.random.default_rng(2).normal(size=(9, 3))
    model, breaks, sound = context.model, OverflowsBeyond(*tensors(a, b, q, r)), th.as_tensor(states)
    broken = sound.clone()
    broken[3:6, 0] = 2.0

    def gradient_at(states, model, horizons=(0, 2)):
        weights = {horizon: 1 / len(horizons) for horizon in horizons}
        return mixed_policy_gradient(states, context._replace(model=model), weights, balance=balance)

    everywhere, result = gradient_at(sound, model), gradient_at(broken, breaks)
    assert everywhere.share_masked == 0
    assert result.share_masked == pytest.approx(3 / 9)
    assert th.isfinite(result.loss)
    th.testing.assert_close(result.returns[2][:3], everywhere.returns[2][:3])
    if balance == 0:
        # A state is masked for all horizons
        kept = gradient_at(th.cat([broken[:3], broken[6:]]), model).gradients[0] * 6 / 9
        th.testing.assert_close(result.gradients[0], kept)
    else:
        # A state is masked for each horizon by itself. The weights of the other states do not change: masked states count as
        # of the median size
        th.testing.assert_close(gradient_at(broken, breaks, (0,)).gradients[0], gradient_at(broken, model, (0,)).gradients[0])
        assert th.isfinite(result.gradients[0]).all()

    # An overflow at most states must not be hidden
    broken[:6, 0] = 2.0
    assert gradient_at(broken, breaks).gradients[0].isnan().any()
    assert gradient_at(broken, breaks).share_masked == 0
