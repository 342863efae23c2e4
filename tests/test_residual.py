"""The learned correction of a prior model, and the recorded steps that it learns from."""

import math

import numpy as np
import pytest
import torch as th
from lq import LinearEnv
from recorded import filled_buffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer

from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.buffers import HELD_OUT_BLOCK
from sb3_mpg.common.models.checking.prediction_errors import Windows
from sb3_mpg.common.models.residual import ResidualModel
from sb3_mpg.common.models.trainable import Transitions
from sb3_mpg_envs.path_tracking.model import PathTrackingModel


class Known(PriorModel):
    """s' = s + 0.1 a, r = -s^2: what a user might know of `truth`."""

    def transition(self, states, actions):
        return states + 0.1 * actions

    def reward(self, states, actions, next_states):
        return -(states**2).sum(1, keepdim=True)


def truth(n_rows, seed=0):
    rng = th.Generator().manual_seed(seed)
    states = 2 * th.rand(n_rows, 2, generator=rng) - 1
    actions = 2 * th.rand(n_rows, 2, generator=rng) - 1
    next_states = states - 0.3 * actions + 0.2 * th.sin(3 * states) + 0.5
    rewards = -(states**2).sum(1, keepdim=True) + actions[:, :1] ** 2
    return Transitions(states, actions, rewards, next_states)


def test_it_begins_as_the_prior_model():
    model, data = ResidualModel(Known(), 2, 2), truth(7)
    for mode in (True, False):
        model.train(mode)
        next_states, rewards = model.step(data.observations, data.actions)
        assert th.equal(next_states, Known().transition(data.observations, data.actions))
        assert th.equal(rewards, Known().reward(data.observations, data.actions, next_states))


def test_it_learns_what_the_prior_model_misses():
    model, data, held_out = ResidualModel(Known(), 2, 2), truth(4000), truth(500, seed=1)
    model.adapt_to(data)
    before = model.validation_error(held_out)
    for step in range(1500):
        rows = th.randint(4000, (512,), generator=th.Generator().manual_seed(step))
        model.fit(Transitions(*(tensor[rows] for tensor in data)))
    assert model.validation_error(held_out) < 0.01 * before
    model.eval()
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
    model = ResidualModel(Known(), 2, 2).eval()
    model.adapt_to(data)
    next_states, rewards = model.step(new.observations, new.actions)
    th.testing.assert_close(next_states, new.next_observations, rtol=0, atol=1e-5)
    th.testing.assert_close(rewards, new.rewards, rtol=0, atol=1e-5)
    th.testing.assert_close(model.reward(new.observations, new.actions, new.next_observations), new.rewards, rtol=0, atol=1e-5)
    # The prior model as it is
    model.gains.zero_()
    th.testing.assert_close(model.transition(new.observations, new.actions), new.observations + 0.1 * new.actions)


def test_it_improves_on_a_wrong_prior_model_and_not_on_a_right_one():
    """Whoever is no better than the prior model cannot tell that it leads astray."""
    data, held_out = truth(4000), truth(500, seed=1)
    wrong = ResidualModel(Known(), 2, 2)
    assert not wrong.improves_on_prior(held_out)
    wrong.adapt_to(data)
    assert wrong.improves_on_prior(held_out)

    def as_known(transitions):
        next_states = Known().transition(transitions.observations, transitions.actions)
        rewards = Known().reward(transitions.observations, transitions.actions, next_states)
        return transitions._replace(next_observations=next_states, rewards=rewards)

    right = ResidualModel(Known(), 2, 2)
    right.adapt_to(as_known(data))
    for step in range(50):
        rows = th.randint(4000, (256,), generator=th.Generator().manual_seed(step))
        right.fit(as_known(Transitions(*(tensor[rows] for tensor in data))))
    assert not right.improves_on_prior(as_known(held_out))


def test_predictions_are_those_of_averaged_networks():
    model, data = ResidualModel(Known(), 2, 2), truth(512)
    model.adapt_to(data)
    history = []
    for step in range(1, 61):
        model.fit(data)
        history.append([parameter.detach().clone() for parameter in model.fitted.parameters()])
        if step == 50:
            # So far all count alike
            for parameter, *others in zip(model.correction.parameters(), *history, strict=True):
                th.testing.assert_close(parameter, th.stack(others).mean(0), rtol=1e-4, atol=1e-6)
                assert not parameter.requires_grad
            before = [parameter.clone() for parameter in model.correction.parameters()]
    for parameter, old, *new in zip(model.correction.parameters(), before, *history[50:], strict=True):
        for other in new:
            old = old + 0.02 * (other - old)
        th.testing.assert_close(parameter, old, rtol=1e-4, atol=1e-6)


def test_rows_are_dealt_out_to_the_members():
    model, data = ResidualModel(Known(), 2, 2, n_members=3), truth(7)
    with th.no_grad():
        model.correction[-1].bias[:, 0, 0] = th.tensor([1.0, 2.0, 3.0])
    expected = data.observations[:, 0] + 0.1 * data.actions[:, 0]
    members = model.transition(data.observations, data.actions)[:, 0] - expected
    th.testing.assert_close(members, th.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0]))
    model.eval()
    th.testing.assert_close(model.transition(data.observations, data.actions)[:, 0], expected + 2.0)
    model.train()
    with model.compared_with_prior():
        members = model.transition(data.observations, data.actions)[:, 0] - expected
        th.testing.assert_close(members, th.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 3.0]))
    assert (model.gains == 1).all()
    with pytest.raises(ValueError, match="2 or more"):
        ResidualModel(Known(), 2, 2, n_members=1)


def test_rollouts_stay_in_the_range_of_the_data():
    class Explodes(Known):
        def transition(self, states, actions):
            return states * 1e4 + actions

    model, data = ResidualModel(Explodes(), 2, 2), truth(1000)
    model.adapt_to(data)
    actions = data.actions.clone().requires_grad_()
    states, total = data.observations, 0.0
    for _ in range(25):
        states, rewards = model.step(states, actions)
        total = total + rewards.sum()
    seen = th.cat([data.observations, data.next_observations])
    low, high = seen.min(0).values, seen.max(0).values
    assert (states >= low - 0.51 * (high - low)).all() and (states <= high + 0.51 * (high - low)).all()
    assert th.isfinite(th.autograd.grad(total, actions)[0]).all()
    # The prior model as it is runs wherever it runs
    model.gains.zero_()
    assert model.transition(data.observations, data.actions).abs().max() > 100


def test_an_overflow_is_not_learned_from():
    class Overflows(Known):
        def reward(self, states, actions, next_states):
            return th.full_like(states[:, :1], float("inf"))

    model = ResidualModel(Overflows(), 2, 2)
    assert math.isfinite(model.fit(truth(64)))
    learned = model.fitted[-1].bias != 0
    assert learned[..., :2].all() and not learned[..., 2].any()
    transitions = truth(64)
    transitions.observations[::2] = th.nan
    assert math.isfinite(model.fit(transitions))
    assert all(th.isfinite(parameter).all() for parameter in model.parameters())


def test_states_at_which_the_prior_model_overflows_are_left_out():
    class Overflows(Known):
        def reward(self, states, actions, next_states):
            return super().reward(states, actions, next_states) / (states[:, :1] > -0.9)

    model, data = ResidualModel(Overflows(), 2, 2), truth(600)
    finite = data.observations[:, 0] > -0.9
    assert 0 < (~finite).sum() < 60
    model.adapt_to(data)
    assert th.isfinite(model.target_scale).all()
    usable = Transitions(*(tensor[finite] for tensor in data))
    other = ResidualModel(Overflows(), 2, 2)
    other.adapt_to(usable)
    th.testing.assert_close(model.target_scale, other.target_scale, rtol=0.02, atol=0)
    losses = [model.fit(data) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses) and int(model.n_fits) == 3
    # As if they were not there
    model.eval()
    assert model.validation_error(data) == pytest.approx(model.validation_error(usable), rel=1e-5)


def noisy(n_rows, n_states, seed=0):
    """Many dimensions of noise, about which nothing is to be learned."""
    rng = th.Generator().manual_seed(seed)
    states, noise = (th.randn(n_rows, n_states, generator=rng) for _ in range(2))
    actions = 2 * th.rand(n_rows, n_states, generator=rng) - 1
    rewards = Known().reward(states, actions, states) + 0.1 * th.randn(n_rows, 1, generator=rng)
    return Transitions(states, actions, rewards, states + 0.1 * actions + 0.1 * noise)


def test_nothing_is_solved_for_from_too_few_data():
    """As many factors as rows reproduce any noise."""
    model = ResidualModel(Known(), 20, 20).eval()
    # 41 factors of the linear part, 121 of the quadratic one
    for n_rows, solves_linear, solves_quadratic in ((100, False, False), (300, True, False), (700, True, True)):
        data = noisy(n_rows, 20)
        assert model.is_outgrown(data) == (n_rows != 100)
        model.adapt_to(data)
        assert bool(model.linear.any()) == solves_linear
        assert bool(model.quadratic.any()) == solves_quadratic
        assert not model.is_outgrown(data)
    few = noisy(130, 20)
    model.adapt_to(few)
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
    model.adapt_to(first)
    for _ in range(5):
        model.fit(first)
    assert not model.is_outgrown(first) and model.is_outgrown(data)
    model.adapt_to(data)
    # It begins anew
    assert not model.is_outgrown(data) and int(model.n_fits) == 0 and not model.optimizer.state
    assert not any(parameter.any() for parameter in model.correction[-1].parameters())


def test_preparation_is_repeated_when_twice_as_many_steps_are_not_like_the_first(monkeypatch):
    calls = []
    monkeypatch.setattr(ResidualModel, "adapt_to", lambda self, known: calls.append(len(known.rewards)))
    monkeypatch.setattr(ResidualModel, "is_outgrown", lambda self, known: len(known.rewards) == 84)
    kwargs = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 20, "batch_size": 32, "horizons": (0, 2), "seed": 0}
    MPG("MlpPolicy", LinearEnv(), prior_model=Known1D(), **kwargs).learn(170)
    # Before the first update and at 84; at 42 and 168 it still fits
    assert calls == [21, 84]


def test_a_single_step_is_little_to_adapt_to_but_no_reason_to_warn():
    model = ResidualModel(Known(), 2, 2)
    model.adapt_to(truth(1))
    assert (model.input_std == 1).all() and math.isfinite(model.fit(truth(1)))


def test_a_batch_smaller_than_the_ensemble():
    model = ResidualModel(Known(), 2, 2, n_members=5)
    assert model.transition(*truth(2)[:2]).shape == (2, 2)


def test_a_random_prior_model_is_taken_at_its_mean():
    prior = PathTrackingModel(lateral_noise=10.0)
    model = ResidualModel(prior, 6, 2)
    model.train()
    states, actions = th.zeros(4, 6), th.zeros(4, 2)
    assert th.equal(model.transition(states, actions), model.transition(states, actions))


def test_periodic_states():
    model = PathTrackingModel()
    states = th.zeros(3, 6)
    states[:, 4], states[:, 5] = th.tensor([math.pi - 0.1, -3.0, 0.0]), th.tensor([1190.0, 5.0, 600.0])
    others = th.zeros(3, 6)
    others[:, 4], others[:, 5] = th.tensor([-math.pi + 0.1, 3.0, 1.0]), th.tensor([10.0, 1199.0, 500.0])
    differences = model.state_difference(states, others)
    th.testing.assert_close(differences[:, 4], th.tensor([-0.2, 2 * math.pi - 6.0, -1.0]), rtol=0, atol=1e-5)
    th.testing.assert_close(differences[:, 5], th.tensor([-20.0, 6.0, 100.0]), rtol=0, atol=1e-3)
    th.testing.assert_close(model.state_add(others, differences), states, rtol=0, atol=1e-3)


def test_what_was_learned_is_saved_and_follows_to_another_environment(tmp_path):
    kwargs = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 60, "batch_size": 32, "horizons": (0, 2), "seed": 0}
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Known1D(), **kwargs).learn(80)
    data = model._recorded_steps(model._units()).sample(32)
    expected = model.rollout_model.validation_error(data)
    state = model.rollout_model.optimizer.state_dict()["state"][0]["exp_avg"]
    assert state.abs().max() > 0
    model.save(tmp_path / "model.zip")
    for loaded in (
        MPG.load(tmp_path / "model.zip", env=LinearEnv()),
        MPG.load(tmp_path / "model.zip"),
    ):
        if loaded.env is None:
            loaded.set_env(model.get_env())
        loaded.rollout_model.train(model.rollout_model.training)
        assert loaded.rollout_model.validation_error(data) == expected
        assert th.equal(loaded.rollout_model.optimizer.state_dict()["state"][0]["exp_avg"], state)
    model.set_env(LinearEnv())
    assert model.rollout_model.validation_error(data) == expected


class Known1D(Known):
    def transition(self, states, actions):
        return states + 0.1 * actions.expand_as(states)


class Offset1D(Known1D):
    def __init__(self, offset=0.0):
        super().__init__()
        self.offset = offset

    def transition(self, states, actions):
        return super().transition(states, actions) + self.offset


def test_the_learning_rate_may_change(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), learning_starts=40, batch_size=32, seed=0).learn(50)
    model.save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv(), residual_kwargs={"learning_rate": 1e-5})
    assert loaded.rollout_model.optimizer.param_groups[0]["lr"] == 1e-5
    assert loaded.rollout_model.optimizer.state


def test_what_was_learned_of_another_prior_model_is_forgotten(tmp_path):
    kwargs = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 60, "batch_size": 32, "horizons": (0, 2), "seed": 0}
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Offset1D, prior_model_kwargs={"offset": 0.1}, **kwargs).learn(80)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    learned = model.rollout_model.linear
    assert learned.any()

    def load(**kwargs):
        return MPG.load(tmp_path / "model.zip", env=LinearEnv(), **kwargs)

    # It is not the object or its class that counts, but what it says
    for same in (load(), load(prior_model=Offset1D(0.1), prior_model_kwargs=None), load(prior_model_kwargs={"offset": 0.1})):
        assert th.equal(same.rollout_model.linear, learned) and len(same._measurements) == 1
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
        assert not loaded.rollout_model.linear.any() and loaded._measurements == []
        assert loaded.weighting_rule.weights(20).tolist() == [0.5, 0.5]

    with pytest.warns(UserWarning, match="forgotten"):
        loaded = load(prior_model=right, prior_model_kwargs=None)
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    loaded.learn(20, reset_num_timesteps=False)
    # It is prepared as a new one would be: there is nothing to correct
    assert loaded.rollout_model.linear.abs().max() < 1e-3 < 0.01 < learned.abs().max()


class OffersOffset(LinearEnv):
    def __init__(self, offset):
        super().__init__()
        self.offset = offset

    def prior_model(self):
        return Offset1D(self.offset)


def test_the_model_of_another_environment_is_corrected_anew():
    kwargs = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 60, "batch_size": 32, "horizons": (0, 2), "seed": 0}
    model = MPG("MlpPolicy", OffersOffset(0.1), **kwargs).learn(80)
    model.set_env(OffersOffset(0.1))
    assert model.rollout_model.linear.any()
    with pytest.warns(UserWarning, match="learned of another model is forgotten"):
        model.set_env(OffersOffset(-0.1))
    assert not model.rollout_model.linear.any()


class HiddenVelocity(PriorModel):
    """p' = p + 0.1 v, v' = v + 0.3 a, of which p is seen."""

    def transition(self, states, actions):
        return th.cat([states[:, :1] + 0.1 * states[:, 1:], states[:, 1:] + 0.3 * actions], dim=1)

    def reward(self, states, actions, next_states):
        return -(states[:, :1] ** 2)

    def observation(self, states):
        return states[:, :1]

    def state_from_observation(self, observations):
        return th.cat([observations, th.zeros_like(observations)], dim=1)


def test_dimensions_that_are_not_observed_are_left_to_the_prior_model():
    rng = th.Generator().manual_seed(0)
    positions, velocities = 2 * th.rand(300, 1, generator=rng) - 1, th.randn(300, 1, generator=rng)
    actions = 2 * th.rand(300, 1, generator=rng) - 1
    prior = HiddenVelocity()
    data = Transitions(positions, actions, prior.reward(positions, actions, positions), positions + 0.1 * velocities)
    model = ResidualModel(prior, 2, 1)
    model.adapt_to(data)
    for _ in range(50):
        model.fit(data)
    assert model.is_observed.tolist() == [True, False]
    model.eval()
    states, expected, ones = th.zeros(1, 2), th.zeros(1, 2), th.ones(1, 1)
    for _ in range(10):
        states, expected = model.transition(states, ones), prior.transition(expected, ones)
    assert states[0, 1] == pytest.approx(expected[0, 1].item())
    # What is seen is corrected by what was seen, to which the hidden velocity was noise
    assert states[0, 0] == pytest.approx(expected[0, 0].item(), abs=0.3)


class LosesItself(PriorModel):
    """Right for some steps, which it counts where nobody sees it, and then off by a factor of a thousand in each."""

    def __init__(self, model, n_right=2):
        super().__init__()
        self.model, self.n_right = model, n_right

    def transition(self, states, actions):
        next_states, count = self.model.transition(states[:, :-1], actions), states[:, -1:]
        return th.cat([th.where(count < self.n_right, next_states, 1000 * next_states), count + 1], dim=1)

    def reward(self, states, actions, next_states):
        return self.model.reward(states[:, :-1], actions, next_states[:, :-1])

    def observation(self, states):
        return self.model.observation(states[:, :-1])

    def state_from_observation(self, observations):
        return th.cat([self.model.state_from_observation(observations), th.zeros_like(observations[:, :1])], dim=1)


class Sum(PriorModel):
    """Two tanks, of which the sum is seen: what is read from it is neither."""

    def transition(self, states, actions):
        return states * th.tensor([0.5, 0.9]) + actions

    def reward(self, states, actions, next_states):
        return -states.sum(1, keepdim=True)

    def observation(self, states):
        return states.sum(1, keepdim=True)

    def state_from_observation(self, observations):
        return 0.5 * observations.expand(-1, 2)


def recorded_rollouts(model, states, n_steps=10):
    """Windows of random actions, and what a system does with them that is as the model says."""
    rng = th.Generator().manual_seed(1)
    n_rows, start, reached = len(states), model.observation(states), []
    actions = 2 * th.rand(n_steps, n_rows, start.shape[1], generator=rng) - 1
    for step in range(n_steps):
        states = model.transition(states, actions[step])
        reached.append(model.observation(states))
    never, lengths = th.zeros(n_rows, 1, dtype=th.bool), th.full((n_rows,), n_steps)
    return Windows(start, actions, th.stack(reached), th.zeros(n_steps, n_rows, 1), never, lengths)


@pytest.mark.parametrize("gain", [1.0, 0.0])
@pytest.mark.parametrize(
    ("prior", "system", "is_carried"),
    [
        (HiddenVelocity(), HiddenVelocity(), [True, True]),
        (LosesItself(Known()), Known(), [True, True, False]),
        (LosesItself(HiddenVelocity()), HiddenVelocity(), [True, True, False]),
        (LosesItself(LosesItself(Known())), Known(), [True, True, False, False]),
        (Sum(), Sum(), [True, True]),
    ],
)
def test_what_is_not_observed_is_carried_along_where_that_predicts_better(prior, system, is_carried, gain):
    windows = recorded_rollouts(system, th.rand(300, 2, generator=th.Generator().manual_seed(0)) - 0.5)
    n_states = prior.state_from_observation(windows.observations).shape[1]
    model = ResidualModel(prior, n_states, windows.actions.shape[2])
    # Without correction it is there to judge, and must be no worse for that
    model.gains.fill_(gain)
    model.adapt_to(Transitions(windows.observations, windows.actions[0], windows.rewards[0], windows.next_observations[0]))
    # Whatever was found before
    model._carry(th.nonzero(~model.is_observed).flatten().tolist())
    assert not model.is_observed.all() and model.reads_anew
    model.adapt_to_rollouts(windows)
    assert model.is_carried.tolist() == is_carried and model.reads_anew == (not all(is_carried))
    assert model.training and (model.gains == gain).all()

    other = ResidualModel(prior, n_states, windows.actions.shape[2])
    assert other.load_learned_state(model.learned_state())
    assert other.is_carried.tolist() == is_carried and other.reads_anew == model.reads_anew
    if system is not prior and model.is_observed.sum() > 1:
        other.eval()
        states = prior.state_from_observation(windows.observations)
        for actions in windows.actions:
            states = other.transition(states, actions)
        th.testing.assert_close(prior.observation(states), windows.next_observations[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("n_right", "horizon"), [(2, 5), (30, 33)])
def test_a_memory_that_leads_astray_is_not_trusted_while_training(n_right, horizon, residual):
    env = LinearEnv()
    kwargs = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 200, "batch_size": 32, "horizons": (0, horizon)}
    prior = LosesItself(env.prior_model(), n_right)
    model = MPG("MlpPolicy", env, prior_model=prior, residual=residual, seed=0, **kwargs).learn(210)
    assert model.rollout_model.is_carried.tolist() == [True, True, False]
    report = model.trust_report()
    lines = [line.split("  ")[0] for line in str(report).splitlines() if "hidden" in line]
    if residual:
        assert lines == ["state[2], hidden", "state[2], hidden, read anew"]
        assert report.corrected.relative[-1, :-1].max() < 0.1
    else:
        assert lines == ["state[2], hidden"]

    # A learner that started before this was found
    replica = model.make_replica()
    replica.rollout_model.reads_anew = False
    replica.take_published(model.published_attributes())
    assert replica.rollout_model.reads_anew


def test_training_that_goes_on_without_its_records_keeps_what_was_found(tmp_path):
    env = LinearEnv()
    kwargs = {"prior_model": LosesItself(env.prior_model(), 30), "horizons": (0, 33), "learning_starts": 100, "batch_size": 32}
    model = MPG("MlpPolicy", env, seed=0, policy_kwargs={"net_arch": [16]}, **kwargs).learn(210)
    assert model.rollout_model.is_carried.tolist() == [True, True, False]
    model.save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip", env=env)
    loaded.num_timesteps = 2 * loaded._n_prepared_for
    loaded.learn(3, reset_num_timesteps=False)
    assert loaded.replay_buffer.size() == 3 and loaded._n_updates > model._n_updates
    assert loaded.rollout_model.is_carried.tolist() == [True, True, False]


def test_what_is_carried_along_is_not_read():
    class Root(Known):
        def observation(self, states):
            return states**3

        def state_from_observation(self, observations):
            return observations.sign() * observations.abs() ** (1 / 3)

    data = truth(300)
    model = ResidualModel(Root(), 2, 2)
    model.adapt_to(data)
    assert model.is_observed.all()
    states = th.zeros(4, 2, requires_grad=True)
    (gradient,) = th.autograd.grad(model.transition(states, th.zeros(4, 2)).sum(), states)
    assert th.isfinite(gradient).all()


def test_predictions_far_beyond_the_range_are_corrected_as_they_are_fitted():
    class FarOff(Known):
        def transition(self, states, actions):
            return super().transition(states, actions) + 50

    model, data = ResidualModel(FarOff(), 2, 2), truth(1000)
    exact = data._replace(next_observations=data.observations + 0.1 * data.actions)
    model.adapt_to(exact)
    next_states = model.transition(exact.observations, exact.actions)
    th.testing.assert_close(next_states, exact.next_observations, rtol=0, atol=1e-4)


def test_the_range_is_that_of_next_observations_too():
    model, data = ResidualModel(Known(), 2, 2), truth(200)
    jumps = data._replace(next_observations=data.observations + 10)
    model.adapt_to(jumps)
    assert (model.high >= jumps.next_observations.max(dim=0).values).all()


class Turntable(PriorModel):
    """An angle that runs on, a state that wraps."""

    def transition(self, states, actions):
        return states + 0.5 + 0.1 * actions

    def reward(self, states, actions, next_states):
        return states.cos()

    def state_difference(self, states, others):
        difference = states - others
        return difference - 2 * math.pi * th.round(difference / (2 * math.pi))


def test_states_that_wrap_run_through_the_border_of_the_range():
    rng = th.Generator().manual_seed(0)
    angles, actions = (2 * th.rand(300, 1, generator=rng) - 1 for _ in range(2))
    angles = math.pi * angles
    prior = Turntable()
    after = prior.transition(angles, actions)
    model = ResidualModel(prior, 1, 1)
    model.adapt_to(Transitions(angles, actions, angles.cos(), after - 2 * math.pi * th.round(after / (2 * math.pi))))
    states, expected = th.zeros(4, 1), th.zeros(4, 1)
    for _ in range(40):
        states, expected = model.transition(states, th.zeros(4, 1)), prior.transition(expected, th.zeros(4, 1))
    assert expected.min() > 3 * math.pi
    th.testing.assert_close(states.cos(), expected.cos(), rtol=0, atol=1e-3)
    assert (states.abs() < 2.1 * math.pi).all()


def test_a_penalty_where_an_episode_terminates_is_learned_apart():
    class Ends(Known):
        def terminal(self, states):
            return (states[:, :1] > 1.0) & (states[:, 1:] < 10.0)

    data = truth(2000)
    next_states = data.observations + 0.1 * data.actions
    ends = Ends().terminal(next_states)
    assert 0.005 < ends.float().mean() < 0.05
    rewards = Known().reward(data.observations, data.actions, next_states) - 100.0 * ends
    data = Transitions(data.observations, data.actions, rewards, next_states)
    model = ResidualModel(Ends(), 2, 2)
    model.adapt_to(data)
    assert model.end_reward.item() == pytest.approx(-100.0, abs=0.01)
    states = data.observations.clone().requires_grad_()
    _, predicted = model.step(states, data.actions)
    th.testing.assert_close(predicted, rewards, rtol=0, atol=0.01)
    (slopes,) = th.autograd.grad(predicted.sum(), states)
    th.testing.assert_close(slopes, -2 * data.observations, rtol=0, atol=0.01)


def test_what_is_held_out_is_not_solved_for_and_there_is_some_in_few_steps_of_many_environments():
    for n_envs in range(1, 11):
        recorded = filled_buffer(n_envs=n_envs, n_steps=-(-250 // n_envs), size=250)
        held_out, known = recorded.sample(64, held_out=True), recorded.latest(1000)
        assert held_out is not None, n_envs

        def places(steps):
            return {tuple(row) for row in steps.observations.int().tolist()}

        assert not places(held_out) & places(known)
        assert len(places(known)) >= 0.8 * 250


def test_a_small_buffer_does_not_keep_the_correction_from_being_prepared_anew(monkeypatch):
    kwargs = {"policy_kwargs": {"net_arch": [8]}, "learning_starts": 60, "batch_size": 16, "horizons": (0, 2), "seed": 0}
    model = MPG("MlpPolicy", LinearEnv(), buffer_size=100, **kwargs)
    asked = []
    monkeypatch.setattr(ResidualModel, "is_outgrown", lambda self, transitions: asked.append(model.num_timesteps) and False)
    model.learn(260)
    assert asked == [122, 244]


@pytest.mark.parametrize("cls", [ReplayBuffer, NStepReplayBuffer])
def test_recorded_steps_are_single_steps_in_the_units_of_the_environment(cls):
    recorded = filled_buffer(cls)
    data = recorded.sample(500)
    t = data.observations[:, 0]
    assert th.equal(data.rewards[:, 0], t)
    assert th.equal(data.next_observations[:, 0], th.where(t % 7 == 6, -1.0, t + 1))
    assert (data.actions == 5).all()


def test_steps_that_cross_a_reset_are_left_out_where_memory_is_saved():
    recorded = filled_buffer(optimize_memory_usage=True, handle_timeout_termination=False, n_steps=250)
    data = recorded.sample(3000)
    t = data.observations[:, 0]
    assert (t % 7 != 6).all() and t.max() == 249 and t.min() == 51
    assert th.equal(data.next_observations[:, 0], t + 1)


def test_held_out_steps_are_never_learned_from():
    recorded = filled_buffer(n_steps=200)

    def blocks(data):
        return {(int(t) // HELD_OUT_BLOCK, int(e)) for t, e in data.observations.tolist()}

    learned, held_out = blocks(recorded.sample(4000)), blocks(recorded.sample(2000, held_out=True))
    assert not learned & held_out
    assert learned | held_out == {(block, env) for block in range(200 // HELD_OUT_BLOCK) for env in range(2)}
    assert len(held_out) == 2
    # Nothing is held out yet
    assert filled_buffer(n_envs=1, n_steps=30).sample(10, held_out=True) is None


def test_windows_end_with_their_episodes():
    windows = filled_buffer(n_steps=250).windows(60, horizon=5)
    assert windows.observations.shape == (60, 2)
    t = windows.observations[:, 0].long()
    assert t.min() == 220 and t.max() == 249
    assert th.equal(windows.lengths, th.minimum(th.minimum(7 - t % 7, 250 - t), th.tensor(5)))
    for step in range(5):
        inside = windows.lengths > step
        assert th.equal(windows.rewards[step, inside, 0].long(), t[inside] + step)
    assert th.equal(windows.terminated[:, 0], (t % 7 == 6) & (t % 14 != 13))


def test_windows_are_long_enough_however_many_environments_there_are():
    windows = filled_buffer(n_envs=40, n_steps=60, size=60).windows(100, horizon=5)
    assert 100 <= len(windows.lengths) <= 110
    assert sorted({int(env) for env in windows.observations[:, 1]}) == list(range(0, 40, 4))
    assert windows.observations[:, 0].min() == 50 and (windows.lengths == 5).sum() > 10
    for step in range(5):
        inside = windows.lengths > step
        assert th.equal(windows.rewards[step, inside, 0], windows.observations[inside, 0] + step)


def test_there_are_no_windows_where_every_step_is_an_end():
    recorded = filled_buffer(optimize_memory_usage=True, handle_timeout_termination=False)
    recorded.replay_buffer.dones[:] = 1
    assert recorded.windows(100, horizon=5) is None


def test_windows_do_not_cross_a_reset_between_two_trainings():
    recorded = filled_buffer(n_envs=1, n_steps=6)
    buffer = recorded.replay_buffer
    for t in (100.0, 101.0, 102.0):
        obs, next_obs = np.array([[t, 0.0]]), np.array([[t + 1, 0.0]])
        buffer.add(obs, next_obs, np.zeros((1, 1)), np.zeros(1), np.array([False]), [{}])
    windows = recorded.windows(1000, horizon=5)
    assert windows.observations[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 100, 101, 102]
    assert windows.lengths.tolist() == [5, 5, 4, 3, 2, 1, 3, 2, 1]


def test_windows_stop_before_what_is_not_held_where_memory_is_saved():
    recorded = filled_buffer(optimize_memory_usage=True, handle_timeout_termination=False, n_steps=250)
    windows = recorded.windows(1000, horizon=5)
    t = windows.observations[:, 0].long()
    assert t.min() == 51 and t.max() == 249 and (t % 7 != 6).all()
    assert th.equal(windows.lengths, th.minimum(th.minimum(6 - t % 7, 250 - t), th.tensor(5)))
    for step in range(5):
        inside = windows.lengths > step
        assert th.equal(windows.next_observations[step, inside, 0].long(), t[inside] + step + 1)


def test_what_was_observed_behind_terminations_and_behind_other_steps():
    recorded = filled_buffer(n_steps=250)
    # Of the last 200 steps, those at 62, 76, ... 244; those at 55, 69, ... were truncated
    assert recorded.termination_rate() == pytest.approx(14 / 200)
    assert recorded.observed_last(100, terminated=True).tolist() == [[-1.0, env] for _ in range(14) for env in range(2)]
    assert recorded.observed_last(3, terminated=True).shape == (3, 2)
    others = recorded.observed_last(12, terminated=False).tolist()
    # Step 244 terminated
    assert others == [[t + 1.0, env] for t in (249, 248, 247, 246, 245, 243) for env in range(2)]
    assert filled_buffer(n_steps=6).observed_last(10, terminated=True) is None
    assert filled_buffer(n_steps=6).termination_rate() == 0
    # Who does not know which ends are time limits knows of no termination
    for saves_memory in (True, False):
        ignorant = filled_buffer(optimize_memory_usage=saves_memory, handle_timeout_termination=False, n_steps=250)
        assert ignorant.termination_rate() == 0
        assert ignorant.observed_last(10, terminated=True) is None
        others = ignorant.observed_last(1000, terminated=False)
        # Steps without an end, of the last 200 or 199
        assert set(others[:, 0].tolist()) == {t + 1.0 for t in range(50 + saves_memory, 250) if t % 7 != 6}
