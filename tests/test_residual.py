"""The learned correction of a prior model."""

import math

import pytest
import torch as th
from lq import LinearEnv
from models import Known, batch_of, truth
from settings import SMALL

from sb3_mpg import MPG
from sb3_mpg.common.buffers import RecordedSteps
from sb3_mpg.common.models.residual import ResidualModel
from sb3_mpg.common.models.windows import Transitions

SETTINGS = {**SMALL, "learning_starts": 60, "horizons": (0, 2)}


def test_it_learns_what_the_prior_model_misses():
    model, data, held_out = ResidualModel(Known(), 2, 2), truth(4000), truth(500, seed=1)
    model.rescale(data)
    before = model.validation_error(held_out)
    for step in range(1500):
        model.fit(batch_of(data, 512, step))
    assert model.validation_error(held_out) < 0.01 * before
    next_states, rewards = model.step(held_out.observations, held_out.actions)
    assert (next_states - held_out.next_observations).square().mean().sqrt() < 0.05
    assert (rewards - held_out.rewards).square().mean().sqrt() < 0.05
    # The sign of the action's effect is wrong in the prior model
    actions = held_out.actions.clone().requires_grad_()
    slope = th.autograd.grad(model.transition(held_out.observations, actions)[:, 0].sum(), actions)[0][:, 0]
    assert abs(slope.median() + 0.3) < 0.05


def test_linear_mistakes_and_quadratic_costs_are_solved_for():
    """Before the first step of the optimizer, and far closer than it would come."""
    data, new = truth(300), truth(100, seed=1)

    def observe(data):
        next_states = 0.9 * data.observations - 0.3 * data.actions + 0.5
        weights = th.tensor([3.0, 0.01])
        rewards = 0.2 - (weights * (next_states - 0.1) ** 2).sum(1, keepdim=True) - data.actions[:, :1] ** 2
        return data._replace(next_observations=next_states, rewards=rewards)

    data, new = observe(data), observe(new)
    model = ResidualModel(Known(), 2, 2)
    model.rescale(data)
    next_states, rewards = model.step(new.observations, new.actions)
    th.testing.assert_close(next_states, new.next_observations, rtol=0, atol=1e-5)
    th.testing.assert_close(rewards, new.rewards, rtol=0, atol=1e-5)
    th.testing.assert_close(model.reward(new.observations, new.actions, new.next_observations), new.rewards, rtol=0, atol=1e-5)
    model.use_correction(False)
    th.testing.assert_close(model.transition(new.observations, new.actions), new.observations + 0.1 * new.actions)


def test_a_single_network_has_nothing_to_be_compared_with():
    with pytest.raises(ValueError, match="2 or more"):
        ResidualModel(Known(), 2, 2, n_members=1)


def test_an_overflow_is_not_learned_from():
    class Overflows(Known):
        def reward(self, states, actions, next_states):
            return th.full_like(states[:, :1], float("inf"))

    model = ResidualModel(Overflows(), 2, 2)
    assert math.isfinite(model.fit(truth(64)))
    learned = model.networks.fitted[-1].bias != 0
    assert learned[..., :2].all() and not learned[..., 2].any()
    transitions = truth(64)
    transitions.observations[::2] = th.nan
    assert math.isfinite(model.fit(transitions))
    assert all(th.isfinite(parameter).all() for parameter in model.parameters())


def test_states_at_which_the_prior_model_overflows_are_masked():
    class Overflows(Known):
        def reward(self, states, actions, next_states):
            return super().reward(states, actions, next_states) / (states[:, :1] > -0.9)

    model, data = ResidualModel(Overflows(), 2, 2), truth(600)
    finite = data.observations[:, 0] > -0.9
    assert 0 < (~finite).sum() < 60
    model.rescale(data)
    assert th.isfinite(model.target_scale).all()
    usable = Transitions(*(tensor[finite] for tensor in data))
    other = ResidualModel(Overflows(), 2, 2)
    other.rescale(usable)
    th.testing.assert_close(model.target_scale, other.target_scale, rtol=0.02, atol=0)
    losses = [model.fit(data) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses) and int(model.networks.n_fits) == 3
    # As if they were not there, whichever rows a member gets
    for parameter in model.networks.average.parameters():
        parameter.copy_(parameter.mean(dim=0, keepdim=True).expand_as(parameter))
    assert model.validation_error(data) == pytest.approx(model.validation_error(usable), rel=1e-5)


def noisy(n_rows, n_states, seed=0):
    """Many dimensions of noise, about which nothing is to be learned."""
    rng = th.Generator().manual_seed(seed)
    states, noise = (th.randn(n_rows, n_states, generator=rng) for _ in range(2))
    actions = 2 * th.rand(n_rows, n_states, generator=rng) - 1
    rewards = Known().reward(states, actions, states) + 0.1 * th.randn(n_rows, 1, generator=rng)
    next_states = states + 0.1 * actions + 0.1 * noise
    return Transitions(states, actions, rewards, next_states, th.zeros_like(rewards))


def test_nothing_is_solved_for_from_too_few_data():
    """As many factors as rows reproduce any noise."""

    class Biased(Known):
        def transition(self, states, actions):
            return super().transition(states, actions) + 1.0

        def reward(self, states, actions, next_states):
            return super().reward(states, actions, next_states) + 1.0

    model = ResidualModel(Biased(), 20, 20)
    # 41 factors of the linear part, 121 of the quadratic one
    for n_rows, solves_linear, solves_quadratic in ((100, False, False), (300, True, False), (700, True, True)):
        data = noisy(n_rows, 20)
        assert model.needs_rescaling(data) == (n_rows != 100)
        model.rescale(data)
        assert bool(model.linear.factors.any()) == solves_linear
        assert bool(model.quadratic_reward.quadratic.factors.any()) == solves_quadratic
        assert not model.needs_rescaling(data)
    few = noisy(130, 20)
    model = ResidualModel(Known(), 20, 20)
    model.rescale(few)
    new = noisy(500, 20, seed=1)
    error = (model.reward(new.observations, new.actions, new.next_observations) - new.rewards).square().mean().sqrt()
    assert error < 0.11


def test_what_the_first_data_did_not_show_is_learned_once_it_is_there():
    data = truth(600)
    shown = data.observations[:, 0] < 0
    # The prior model is right where the first data are from
    known = Known().transition(data.observations, data.actions)
    rewards = Known().reward(data.observations, data.actions, known)
    data = data._replace(next_observations=known, rewards=rewards + 5 * (data.observations[:, :1].clamp(min=0)) ** 3)
    model = ResidualModel(Known(), 2, 2)
    first = Transitions(*(tensor[shown] for tensor in data))
    model.rescale(first)
    for _ in range(5):
        model.fit(first)
    assert not model.needs_rescaling(first) and model.needs_rescaling(data)
    model.rescale(data)
    # The networks start again
    assert not model.needs_rescaling(data) and int(model.networks.n_fits) == 0 and not model.networks.optimizer.state
    assert not any(parameter.any() for parameter in model.networks.average[-1].parameters())


def test_a_penalty_where_an_episode_terminates_is_solved_for_separately():
    class Ends(Known):
        def terminal(self, states):
            return (states[:, :1] > 1.0) & (states[:, 1:] < 10.0)

    data = truth(2000)
    next_states = data.observations + 0.1 * data.actions
    ends = Ends().terminal(next_states)
    assert 0.005 < ends.float().mean() < 0.05
    rewards = Known().reward(data.observations, data.actions, next_states) - 100.0 * ends
    data = Transitions(data.observations, data.actions, rewards, next_states, ends.float())
    model = ResidualModel(Ends(), 2, 2)
    model.rescale(data)
    assert model.end_rewards.found.item() == pytest.approx(-100.0, abs=0.01)
    states = data.observations.clone().requires_grad_()
    _, predicted = model.step(states, data.actions)
    th.testing.assert_close(predicted, rewards, rtol=0, atol=0.01)
    (slopes,) = th.autograd.grad(predicted.sum(), states)
    th.testing.assert_close(slopes, -2 * data.observations, rtol=0, atol=0.01)


def test_a_single_transition_gives_no_scales_and_no_warning():
    model = ResidualModel(Known(), 2, 2)
    model.rescale(truth(1))
    assert (model.standardizer.std == 1).all() and math.isfinite(model.fit(truth(1)))


class Known1D(Known):
    def transition(self, states, actions):
        return states + 0.1 * actions.expand_as(states)


class Offset1D(Known1D):
    def __init__(self, offset=0.0):
        super().__init__()
        self.offset = offset

    def transition(self, states, actions):
        return super().transition(states, actions) + self.offset


def test_scales_are_recomputed_when_the_data_have_doubled_and_shifted(monkeypatch):
    calls = []
    monkeypatch.setattr(ResidualModel, "rescale", lambda self, known: calls.append(len(known.rewards)))
    monkeypatch.setattr(ResidualModel, "needs_rescaling", lambda self, known: len(known.rewards) == 84)
    MPG("MlpPolicy", LinearEnv(), prior_model=Known1D(), **{**SETTINGS, "learning_starts": 20}).learn(170)
    # Before the first update and at 84; at 42 and 168 it still fits
    assert calls == [21, 84]


def test_doubling_is_noticed_when_the_replay_buffer_is_small(monkeypatch):
    model = MPG("MlpPolicy", LinearEnv(), **{**SETTINGS, "buffer_size": 100})
    asked = []
    monkeypatch.setattr(
        ResidualModel, "needs_rescaling", lambda self, transitions: asked.append(model.num_timesteps) and False
    )
    model.learn(260)
    assert asked == [122, 244]


def test_what_was_learned_is_saved_and_is_kept_with_another_environment(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Known1D(), **SETTINGS).learn(80)
    data = RecordedSteps(model.replay_buffer, model.units().unscale_actions, model.device).sample(32)
    expected = model.rollout_model.validation_error(data)
    state = model.rollout_model.networks.optimizer.state_dict()["state"][0]["exp_avg"]
    assert state.abs().max() > 0
    model.save(tmp_path / "model.zip")
    for loaded in (
        MPG.load(tmp_path / "model.zip", env=LinearEnv()),
        MPG.load(tmp_path / "model.zip"),
    ):
        if loaded.env is None:
            loaded.set_env(model.get_env())
        assert loaded.rollout_model.validation_error(data) == expected
        assert th.equal(loaded.rollout_model.networks.optimizer.state_dict()["state"][0]["exp_avg"], state)
    model.set_env(LinearEnv())
    assert model.rollout_model.validation_error(data) == expected


def test_the_learning_rate_may_change(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL).learn(50)
    model.save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv(), residual_kwargs={"learning_rate": 1e-5})
    assert loaded.rollout_model.networks.optimizer.param_groups[0]["lr"] == 1e-5
    assert loaded.rollout_model.networks.optimizer.state


def test_what_was_learned_of_another_prior_model_is_forgotten(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Offset1D, prior_model_kwargs={"offset": 0.1}, **SETTINGS).learn(80)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    learned = model.rollout_model.linear.factors
    assert learned.any()

    def load(**kwargs):
        return MPG.load(tmp_path / "model.zip", env=LinearEnv(), **kwargs)

    # Predictions count, not the object or its class
    for same in (load(), load(prior_model=Offset1D(0.1), prior_model_kwargs=None), load(prior_model_kwargs={"offset": 0.1})):
        assert th.equal(same.rollout_model.linear.factors, learned) and len(same.trust.measurements) == 1
        assert th.equal(th.as_tensor(same.weighting_rule.weights(20)), th.as_tensor(model.weighting_rule.weights(20)))
    right = LinearEnv().prior_model()
    for change in (
        {"prior_model": right, "prior_model_kwargs": None},
        {"custom_objects": {"prior_model": right, "prior_model_kwargs": None}},
        {"prior_model_kwargs": {"offset": -0.1}},
        {"residual_kwargs": {"net_arch": (32,)}},
    ):
        with pytest.warns(UserWarning, match="learned of another model is forgotten"):
            loaded = load(**change)
        assert not loaded.rollout_model.linear.factors.any() and loaded.trust.measurements == []
        assert loaded.weighting_rule.weights(20).tolist() == [0.5, 0.5]

    with pytest.warns(UserWarning, match="forgotten"):
        loaded = load(prior_model=right, prior_model_kwargs=None)
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    loaded.learn(20, reset_num_timesteps=False)
    # It is fitted as a new model would be: there is nothing to correct
    assert loaded.rollout_model.linear.factors.abs().max() < 1e-3 < 0.01 < learned.abs().max()


class OffersOffset(LinearEnv):
    def __init__(self, offset):
        super().__init__()
        self.offset = offset

    def prior_model(self):
        return Offset1D(self.offset)


def test_the_model_of_another_environment_is_corrected_from_scratch():
    model = MPG("MlpPolicy", OffersOffset(0.1), **SETTINGS).learn(80)
    model.set_env(OffersOffset(0.1))
    assert model.rollout_model.linear.factors.any()
    with pytest.warns(UserWarning, match="learned of another model is forgotten"):
        model.set_env(OffersOffset(-0.1))
    assert not model.rollout_model.linear.factors.any()
