"""Predicted states stay in the range of the data."""

import math

import pytest
import torch as th
from models import Known, Turntable, truth

from sb3_mpg.common.models.residual import ResidualModel
from sb3_mpg.common.models.state_range import StateRange
from sb3_mpg.common.models.windows import Transitions

EVERYTHING = th.ones(2, dtype=th.bool)


def transitions(states, next_states):
    return Transitions(states, th.zeros_like(states), states[:, :1], next_states, th.zeros_like(states[:, :1]))


def test_without_data_there_is_no_range():
    states = th.tensor([[1e30, -1e30]])
    for clip in (lambda states: StateRange(2).clip(Known(), states), StateRange(2).clip_prior):
        assert th.equal(clip(states), states)


def test_the_margins_are_shares_of_the_width():
    states, wide = th.tensor([[0.0, 10.0], [2.0, 30.0]]), th.tensor([[1e6, 1e6], [-1e6, -1e6]])
    state_range = StateRange(2)
    state_range.extend(Known(), transitions(states, states), EVERYTHING)
    assert state_range.clip(Known(), wide).tolist() == [[3.0, 40.0], [-1.0, 0.0]]
    assert state_range.clip_prior(wide).tolist() == [[22.0, 230.0], [-20.0, -190.0]]
    inside = th.tensor([[2.9, 0.1]])
    assert th.equal(state_range.clip(Known(), inside), inside)


def test_there_is_no_margin_beyond_next_states():
    states = th.tensor([[0.0, 0.0], [2.0, 2.0]])
    state_range = StateRange(2)
    state_range.extend(Known(), transitions(states, states + 5), EVERYTHING)
    assert state_range.high.tolist() == [7.0, 7.0] and state_range.low.tolist() == [-1.0, -1.0]
    # It is extended, never made narrower
    state_range.extend(Known(), transitions(states[:1], states[:1] - 9), EVERYTHING)
    assert state_range.high.tolist() == [7.0, 7.0] and state_range.low.tolist() == [-9.0, -9.0]


def test_values_that_are_not_finite_are_ignored():
    states = th.tensor([[0.0, th.nan], [2.0, 1.0], [th.inf, 3.0]])
    state_range = StateRange(2)
    state_range.extend(Known(), transitions(states, states), EVERYTHING)
    assert state_range.high.tolist() == [3.0, 4.0] and state_range.low.tolist() == [-1.0, 0.0]


def test_hidden_dimensions_have_no_range():
    states = th.tensor([[0.0, 0.0], [2.0, 2.0]])
    state_range = StateRange(2)
    state_range.extend(Known(), transitions(states, states), th.tensor([True, False]))
    assert state_range.clip(Known(), th.tensor([[50.0, 50.0]])).tolist() == [[3.0, 50.0]]


def test_rollouts_stay_in_the_range_of_the_data():
    class Explodes(Known):
        def transition(self, states, actions):
            return states * 1e4 + actions

    model, data = ResidualModel(Explodes(), 2, 2), truth(1000)
    model.rescale(data)
    actions = data.actions.clone().requires_grad_()
    states, total = data.observations, 0.0
    for _ in range(25):
        states, rewards = model.step(states, actions)
        total = total + rewards.sum()
    seen = th.cat([data.observations, data.next_observations])
    low, high = seen.min(0).values, seen.max(0).values
    assert (states >= low - 0.51 * (high - low)).all() and (states <= high + 0.51 * (high - low)).all()
    assert th.isfinite(th.autograd.grad(total, actions)[0]).all()
    # The prior model as it is may leave the range
    model.use_correction(False)
    assert model.transition(data.observations, data.actions).abs().max() > 100


def test_predictions_far_beyond_the_range_are_corrected_as_they_are_fitted():
    class FarOff(Known):
        def transition(self, states, actions):
            return super().transition(states, actions) + 50

    model, data = ResidualModel(FarOff(), 2, 2), truth(1000)
    exact = data._replace(next_observations=data.observations + 0.1 * data.actions)
    model.rescale(exact)
    next_states = model.transition(exact.observations, exact.actions)
    th.testing.assert_close(next_states, exact.next_observations, rtol=0, atol=1e-4)


def test_periodic_states_pass_the_border_of_the_range():
    rng = th.Generator().manual_seed(0)
    angles, actions = (2 * th.rand(300, 1, generator=rng) - 1 for _ in range(2))
    angles = math.pi * angles
    prior = Turntable()
    after = prior.transition(angles, actions)
    model = ResidualModel(prior, 1, 1)
    wrapped = after - 2 * math.pi * th.round(after / (2 * math.pi))
    model.rescale(Transitions(angles, actions, angles.cos(), wrapped, th.zeros_like(angles)))
    states, expected = th.zeros(4, 1), th.zeros(4, 1)
    for _ in range(40):
        states, expected = model.transition(states, th.zeros(4, 1)), prior.transition(expected, th.zeros(4, 1))
    assert expected.min() > 3 * math.pi
    th.testing.assert_close(states.cos(), expected.cos(), rtol=0, atol=1e-3)
    assert (states.abs() < 2.1 * math.pi).all()


def fitted_correction():
    """Of a system with s' = 0.9 s - 0.3 a + 0.5 that was recorded between -1 and 1; the prior model says s' = s + 0.1 a."""
    data = truth(300)
    model = ResidualModel(Known(), 2, 2)
    model.rescale(data._replace(next_observations=0.9 * data.observations - 0.3 * data.actions + 0.5))
    return model.eval()


def test_rollouts_go_beyond_the_data_only_to_plan():
    model = fitted_correction()
    states, actions = th.tensor([[0.5, 0.5], [4.0, -4.0]]), th.zeros(2, 2)
    usual = model.transition(states, actions)
    th.testing.assert_close(usual[1], th.stack([model.range.high[0], model.range.low[1]]))
    with model.extrapolating():
        assert model.is_extrapolating
        next_states = model.transition(states, actions)
        # The correction is that of the nearest state with data, on top of what the prior model says
        nearest = model.range.clip(model.prior, states)
        expected = states + (0.9 * nearest + 0.5 - nearest)
        th.testing.assert_close(next_states, expected, rtol=0, atol=1e-3)
        # There is an end to it
        farthest = model.transition(th.tensor([[1e6, -1e6]]), actions[:1])
        assert th.equal(model.range.clip_prior(farthest), farthest) and farthest.abs().min() > 10
    assert not model.is_extrapolating and th.equal(model.transition(states, actions), usual)
    # Within the data it makes no difference
    th.testing.assert_close(next_states[0], usual[0], rtol=0, atol=0)


def test_extrapolation_ends_with_an_error():
    model = fitted_correction()
    with pytest.raises(KeyError), model.extrapolating():
        raise KeyError
    assert not model.is_extrapolating


def test_a_wide_range_still_wraps_periodic_states():
    states = th.tensor([[0.0], [1.0]])
    state_range = StateRange(1)
    state_range.extend(Turntable(), transitions(states, states), EVERYTHING[:1])
    turned = th.tensor([[0.5 + 4 * math.pi]])
    th.testing.assert_close(state_range.clip(Turntable(), turned, is_wide=True), th.tensor([[0.5]]))
