"""What is solved for by least squares."""

import pytest
import torch as th

from sb3_mpg.common.models.least_squares import MIN_ROWS_PER_FACTOR, EndRewards, LeastSquares, QuadraticReward


def test_an_affine_function_is_found():
    inputs, factors = th.randn(200, 3), th.tensor([[0.5, -2.0], [1.0, 0.0], [0.0, 3.0], [-1e-3, 100.0]])
    solved = LeastSquares(3, 2)
    assert not solved(inputs).any()
    solved.solve(inputs, factors[0] + inputs @ factors[1:])
    th.testing.assert_close(solved.factors, factors, rtol=1e-4, atol=1e-4)
    new = th.randn(10, 3)
    th.testing.assert_close(solved(new), factors[0] + new @ factors[1:], rtol=1e-4, atol=1e-3)


def test_noise_is_averaged_out():
    inputs = th.randn(4000, 2)
    solved = LeastSquares(2, 1)
    solved.solve(inputs, 3 * inputs[:, :1] + th.randn(4000, 1))
    th.testing.assert_close(solved.factors, th.tensor([[0.0], [3.0], [0.0]]), rtol=0, atol=0.1)


def test_too_few_rows_give_zero():
    inputs, solved = th.randn(200, 3), LeastSquares(3, 1)
    solved.solve(inputs, inputs[:, :1])
    assert solved.factors.any()
    n_enough = 4 * MIN_ROWS_PER_FACTOR
    assert solved.can_be_solved(n_enough) and not solved.can_be_solved(n_enough - 1)
    solved.solve(inputs[: n_enough - 1], inputs[: n_enough - 1, :1])
    assert not solved.factors.any()


def test_dependent_inputs_are_no_obstacle():
    inputs = th.randn(200, 1).expand(200, 3)
    solved = LeastSquares(3, 1)
    solved.solve(inputs, 6 * inputs[:, :1])
    th.testing.assert_close(solved(inputs), 6 * inputs[:, :1], rtol=1e-3, atol=1e-3)


def quadratic_rewards(values):
    return 0.2 - 3 * values[:, :1] ** 2 + values[:, 1:] - 0.01 * values[:, 1:] ** 2


def test_a_quadratic_reward_is_found():
    values, new = th.randn(300, 2), th.randn(20, 2)
    reward = QuadraticReward(2)
    reward.solve(values, quadratic_rewards(values))
    th.testing.assert_close(reward(new), quadratic_rewards(new), rtol=0, atol=1e-4)


def test_outputs_that_would_be_predicted_worse_are_zero():
    """Rare extreme targets have a large influence on all factors."""
    rng = th.Generator().manual_seed(0)
    inputs = th.randn(500, 2, generator=rng)
    outlier = -100.0 * (th.rand(500, 1, generator=rng) < 0.02)
    targets = th.cat([inputs[:, :1], outlier, inputs[:, 1:] + outlier], dim=1)
    solved = LeastSquares(2, 3)
    solved.solve(inputs, targets)
    assert solved.factors[:, 0].tolist() == pytest.approx([0, 1, 0], abs=1e-5)
    assert not solved.factors[:, 1:].any()


def test_rewards_of_ends_are_those_of_most_of_them():
    solved, is_case = EndRewards(), th.tensor([True, True, True, True, False]).reshape(-1, 1)
    rewards = th.tensor([1.0, 100.0, 3.0, float("nan"), 7.0]).reshape(-1, 1)
    solved.solve(solved.jump, rewards, is_case)
    assert (solved.jump.item(), solved.found.item(), solved.own_jump.item()) == (3, 0, 0)
    solved.solve(solved.jump, rewards, ~is_case & is_case)
    assert solved.jump.item() == 0
