"""The contract of ``TrainableModel``, for each implementation; and of ``CorrectedModel``."""

import copy
from functools import partial

import pytest
import torch as th
from gymnasium import spaces
from models import Known, KnowsNothing, LearnedDynamics, batch_of, truth

from sb3_mpg import DynamicsModel, PriorModel
from sb3_mpg.common.models.residual import ResidualModel
from sb3_mpg.common.models.trainable import TrainableModel, members_of
from sb3_mpg.common.models.windows import Transitions

PLANE = spaces.Box(-1, 1, (2,))


def dynamics(distribution, n_members=2, **kwargs):
    settings = {"net_arch": (64,), "learning_rate": 3e-3, **kwargs}
    return DynamicsModel(PLANE, PLANE, distribution=distribution, n_members=n_members, **settings)


MODELS = {
    "residual": lambda **kwargs: ResidualModel(KnowsNothing(), 2, 2, **kwargs),
    "a user's": lambda **kwargs: LearnedDynamics(2, 2, **kwargs),
    "deterministic": partial(dynamics, "deterministic"),
    "gaussian": partial(dynamics, "gaussian"),
    "with spares": partial(dynamics, "deterministic", n_spares=2),
}


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def fitted(model, data, n_steps=30):
    """The members see different rows, and differ."""
    model.rescale(data)
    for step in range(n_steps):
        model.fit(batch_of(data, 64, step))
    return model


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]


def linear(data):
    """The same states and actions in a linear system, where the reward is linear, too."""
    next_states = 0.9 * data.observations - 0.3 * data.actions + 0.5
    return data._replace(next_observations=next_states, rewards=data.observations[:, :1] + 2 * data.actions[:, 1:])


def test_the_mean_is_the_default(make):
    assert TrainableModel.members == "mean" and make().members == "mean"


def test_dealt_rows_are_predicted_by_one_member_each(make):
    model, data = fitted(make(n_members=3), truth(1000)), truth(7, seed=1)
    everything = [th.cat([tensor] * 3) for tensor in (data.observations, data.actions, data.next_observations)]
    with model.using_members("dealt"), th.no_grad():
        of_members = th.cat(model.step(*everything[:2]), dim=1).chunk(3)
        dealt = th.cat(model.step(data.observations, data.actions), dim=1)
        rewards_of_members = model.reward(*everything).chunk(3)
        dealt_rewards = model.reward(data.observations, data.actions, data.next_observations)
    # The members do differ
    assert min((of_members[0] - of_members[index]).abs().max() for index in (1, 2)) > 1e-4
    for row, member in enumerate([0, 0, 0, 1, 1, 1, 2]):
        th.testing.assert_close(dealt[row], of_members[member][row])
        th.testing.assert_close(dealt_rewards[row], rewards_of_members[member][row])
    with th.no_grad():
        mean = model.transition(data.observations, data.actions)
        mean_reward = model.reward(data.observations, data.actions, data.next_observations)
    th.testing.assert_close(mean, th.stack(of_members).mean(dim=0)[:, :2])
    th.testing.assert_close(mean_reward, th.stack(rewards_of_members).mean(dim=0))


def test_a_batch_may_be_smaller_than_the_ensemble(make):
    model, data = make(n_members=5), truth(2)
    with model.using_members("dealt"):
        assert model.transition(data.observations, data.actions).shape == (2, 2)
    even = model.even_rows(data.actions)
    assert th.equal(even[:2], data.actions) and th.equal(even[2:], data.actions[1:].expand(3, 2))
    assert model.even_rows(even) is even


def test_members_are_a_choice_of_their_own_and_are_restored(make):
    model, data = fitted(make(), truth(500)), truth(8, seed=1)

    def predict():
        with th.no_grad():
            return model.transition(data.observations, data.actions)

    mean = predict()
    for mode in (True, False):
        model.train(mode)
        assert th.equal(predict(), mean)
        with model.using_members("dealt"):
            dealt = predict()
            assert not th.equal(dealt, mean)
            with model.using_members("mean"):
                assert th.equal(predict(), mean)
            assert th.equal(predict(), dealt)
        with pytest.raises(ZeroDivisionError), members_of(model, "dealt"):
            raise ZeroDivisionError
        assert model.members == "mean" and model.training == mode


def test_models_without_members_have_nothing_to_choose():
    with members_of(KnowsNothing(), "dealt"):
        pass


def test_fitting_deals_rows_whatever_predicts(make):
    data, held_out = truth(500), truth(100, seed=1)
    th.manual_seed(0)
    first = make()
    second = copy.deepcopy(first)
    second.networks.optimizer = th.optim.Adam(
        second.networks.fitted.parameters(), lr=second.networks.learning_rate, fused=True
    )
    second.members = "dealt"
    for model in (first, second):
        fitted(model, data)
    assert first.validation_error(held_out) == second.validation_error(held_out)
    for expected, tensor in zip(tensors_of(first), tensors_of(second), strict=True):
        assert th.equal(expected, tensor)


def test_scales_follow_the_units_of_the_data(make):
    """Whatever the units are, the loss is of the order of one."""
    errors = []
    for factor in (1.0, 1000.0):
        data, held_out = (
            Transitions(factor * observations, actions, factor * rewards, factor * next_observations, 0 * rewards)
            for observations, actions, rewards, next_observations, _ in (truth(500), truth(200, seed=1))
        )
        model = make()
        model.rescale(data)
        errors.append(model.validation_error(held_out))
    assert 0.1 < errors[0] < 3
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_it_tells_when_the_data_have_shifted(make):
    model, data = make(), truth(500)
    model.rescale(data)
    assert not model.needs_rescaling(data) and not model.needs_rescaling(truth(1000, seed=1))
    changes = data.next_observations - data.observations
    shifted = data._replace(next_observations=data.observations + 100 * changes, rewards=100 * data.rewards)
    assert model.needs_rescaling(shifted)
    model.rescale(shifted)
    assert not model.needs_rescaling(shifted)


def test_rescaling_forgets_what_networks_learned(make):
    model, data = make(), truth(500)
    model.rescale(data)
    before = model.validation_error(data)
    fitted(model, data)
    assert model.validation_error(data) != before
    model.rescale(data)
    assert model.validation_error(data) == before and not model.networks.optimizer.state


def test_it_learns_a_linear_system(make):
    data, held_out = linear(truth(2000)), linear(truth(300, seed=1))

    def errors(model):
        with th.no_grad():
            next_states, rewards = model.step(held_out.observations, held_out.actions)
        return th.stack([(next_states - held_out.next_observations).abs().mean(), (rewards - held_out.rewards).abs().mean()])

    model = make()
    before = errors(model)
    model.rescale(data)
    for step in range(400):
        model.fit(batch_of(data, 256, step))
    assert (errors(model) < 0.05 * before).all()


def test_fitting_reduces_the_error_on_held_out_transitions(make):
    data, held_out, model = truth(2000), truth(300, seed=1), make()
    model.rescale(data)
    losses, before = [], model.validation_error(held_out)
    for step in range(300):
        losses.append(model.fit(batch_of(data, 256, step)))
    assert losses[-1] < 0.3 * losses[0]
    assert model.validation_error(held_out) < 0.3 * before


def test_the_validation_error_is_the_loss_without_fitting(make):
    model, data = make(), truth(101)
    model.rescale(data)
    tensors = copy.deepcopy(tensors_of(model))
    error = model.validation_error(data)
    for before, tensor in zip(tensors, tensors_of(model), strict=True):
        assert th.equal(before, tensor)
    assert model.fit(data) == pytest.approx(error, rel=1e-6)


def test_what_was_learned_survives_a_round_trip(make):
    data, held_out = truth(500), truth(100, seed=1)
    model = fitted(make(), data)
    state = model.learned_state()
    loaded = make()
    assert loaded.load_learned_state(state)
    for other in (model, loaded):
        # The optimizer goes on where it was, and the state is a copy
        other.fit(data)
    assert model.validation_error(held_out) == loaded.validation_error(held_out)
    again = make()
    assert again.load_learned_state(state)
    again.fit(data)
    assert again.validation_error(held_out) == loaded.validation_error(held_out)


def test_the_state_of_another_model_is_not_loaded(make):
    state = fitted(make(), truth(500)).learned_state()
    for other in (make(net_arch=(8,)), make(n_members=3), make(net_arch=(64, 64, 64))):
        before = copy.deepcopy(tensors_of(other))
        assert not other.load_learned_state(state)
        assert all(th.equal(old, new) for old, new in zip(before, tensors_of(other), strict=True))
    other = next(MODELS[name]() for name in MODELS if type(MODELS[name]()) is not type(make()))
    assert not other.load_learned_state(state)


def test_parameters_and_buffers_are_all_that_a_copy_needs(make):
    """As learner processes get them."""
    data = truth(100, seed=1)
    model, other = fitted(make(), truth(500)), make()
    with th.no_grad():
        for tensor, value in zip(tensors_of(other), tensors_of(model), strict=True):
            tensor.copy_(value)
    other.refresh()
    for expected, got in zip(*(each.step(data.observations, data.actions) for each in (model, other)), strict=True):
        assert th.equal(expected, got)
    assert other.validation_error(data) == model.validation_error(data)


class TestCorrectedModel:
    def test_it_begins_as_the_prior_model(self):
        model, data = ResidualModel(Known(), 2, 2), truth(7)
        for members in ("dealt", "mean"):
            with model.using_members(members):
                next_states, rewards = model.step(data.observations, data.actions)
            assert th.equal(next_states, Known().transition(data.observations, data.actions))
            assert th.equal(rewards, Known().reward(data.observations, data.actions, next_states))

    def test_the_first_member_may_be_the_prior_model(self):
        model, data = fitted(ResidualModel(Known(), 2, 2, n_members=3), truth(500)), truth(9, seed=1)
        with model.using_members("dealt"), th.no_grad():
            corrected = model.transition(data.observations, data.actions)
        prior = Known().transition(data.observations, data.actions)
        assert not (prior == corrected).all(dim=1).any()
        for is_used in (True, False):
            model.use_correction(is_used)
            # Rows are dealt, whatever members predict otherwise
            with model.compared_with_prior(), th.no_grad():
                compared = model.transition(data.observations, data.actions)
            assert th.equal(compared[:3], prior[:3]) and th.equal(compared[3:], corrected[3:])
            with model.using_members("dealt"), th.no_grad():
                expected = corrected if is_used else prior
                assert th.equal(model.transition(data.observations, data.actions), expected)

    def test_the_correction_can_be_switched_off(self):
        model, data = fitted(ResidualModel(Known(), 2, 2), truth(500)), truth(9, seed=1)
        model.use_correction(False)
        next_states, rewards = model.step(data.observations, data.actions)
        assert th.equal(next_states, Known().transition(data.observations, data.actions))
        assert th.equal(rewards, Known().reward(data.observations, data.actions, next_states))
        # It is no part of what was learned
        other = ResidualModel(Known(), 2, 2)
        assert other.load_learned_state(model.learned_state())
        assert not th.equal(other.transition(data.observations, data.actions), next_states)

    def test_it_improves_on_a_wrong_prior_model_and_not_on_a_right_one(self):
        """A model that is no better than the prior model cannot tell that it is wrong."""
        data, held_out = truth(4000), truth(500, seed=1)
        wrong = ResidualModel(Known(), 2, 2)
        assert not wrong.improves_on_prior(held_out)
        wrong.rescale(data)
        assert wrong.improves_on_prior(held_out)

        def as_known(transitions):
            next_states = Known().transition(transitions.observations, transitions.actions)
            rewards = Known().reward(transitions.observations, transitions.actions, next_states)
            return transitions._replace(next_observations=next_states, rewards=rewards)

        right = ResidualModel(Known(), 2, 2)
        right.rescale(as_known(data))
        for step in range(50):
            right.fit(as_known(batch_of(data, 256, step)))
        assert not right.improves_on_prior(as_known(held_out))

    def test_a_random_prior_model_is_taken_at_its_mean(self):
        class Noisy(PriorModel):
            def transition(self, states, actions):
                return states + th.randn_like(states) if self.training else states

            def reward(self, states, actions, next_states):
                return states[:, :1]

        model = ResidualModel(Noisy(), 2, 2)
        model.train()
        assert model.training and not model.prior.training
        states = th.rand(4, 2)
        assert th.equal(model.transition(states, th.zeros(4, 2)), states)
