"""Weights of the states of a batch, and the losses that use them. test_mpg.py has both losses in one update."""

import pytest
import torch as th

from sb3_mpg.common.balance import balance_states, balanced_mse_loss, rollout_value_loss


def test_weights_at_their_limits():
    sizes = th.tensor([[0.0], [1.0], [1.0], [1e12], [2.0]])
    th.testing.assert_close(balance_states(sizes, 0.0), th.ones(5, 1))
    for balance in (0.5, 1.0):
        assert balance_states(sizes, balance).mean() == pytest.approx(1.0)
    # A state without error contributes nothing, and one of a diverged rollout little more than the others
    contributions = sizes * balance_states(sizes, 1.0)
    assert contributions[0] == 0
    assert contributions.max() < 1.4 * contributions[1:].min()


def test_states_of_no_size():
    th.testing.assert_close(balance_states(th.zeros(4, 1), 1.0), th.ones(4, 1))
    # They may be the majority, and the others still count: values are 0 after a termination, and not before it
    weights = balance_states(th.tensor([[0.0], [0.0], [0.0], [1.0], [2.0]]), 1.0)
    assert (weights[3:] > 0.1).all()
    assert 2 * weights[4] > weights[3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_hidden(bad):
    """The update is skipped."""
    sizes = th.tensor([[1.0], [bad], [2.0]])
    assert not th.isfinite(sizes * balance_states(sizes, 1.0)).all()
    assert not th.isfinite(balanced_mse_loss(th.zeros(3, 1), sizes, 1.0))
    assert not th.isfinite(balanced_mse_loss(sizes, th.ones(3, 1), 1.0))


def test_one_rollout_that_diverges_moves_the_critics_no_further_than_a_limit_allows():
    values = [th.randn(32, 1, generator=th.Generator().manual_seed(index)) for index in (0, 1)]
    returns = {0: th.full((32, 1), 1e9), 5: values[0] + 0.1 * values[1], 25: values[1] + 0.1 * values[0]}
    weights = {0: 0.2, 5: 0.3, 25: 0.5}
    sound = rollout_value_loss(values, returns, weights, 1.0)
    returns[25][3] = -1e12
    assert sound < rollout_value_loss(values, returns, weights, 1.0) < 10 * sound
