"""Models that are learned from recorded transitions alone; what all trainable models have in common is in test_trainable."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from lq import LinearEnv
from models import Known, batch_of
from settings import SMALL

from sb3_mpg import MPG, DynamicsModel
from sb3_mpg.common.models.dynamics import LOG_VARIANCES, bounded
from sb3_mpg.common.models.fitting_schedule import EveryUpdate, UntilConverged
from sb3_mpg.common.models.trainable import evaluated
from sb3_mpg.common.models.windows import Transitions

PLANE = spaces.Box(-1, 1, (2,))
NOISE = 0.1


def make(**kwargs):
    return DynamicsModel(PLANE, PLANE, **{"net_arch": (32,), "learning_rate": 3e-3, "n_members": 2, **kwargs})


def noisy_linear(n_rows, seed=0, noise=NOISE):
    """s' = 0.9 s + 0.3 a + noise, r = s_0 - a_1 + noise."""
    rng = th.Generator().manual_seed(seed)
    states, actions = (2 * th.rand(n_rows, 2, generator=rng) - 1 for _ in range(2))
    next_states = 0.9 * states + 0.3 * actions + noise * th.randn(n_rows, 2, generator=rng)
    rewards = states[:, :1] - actions[:, 1:] + noise * th.randn(n_rows, 1, generator=rng)
    return Transitions(states, actions, rewards, next_states, th.zeros_like(rewards))


def fitted(model, data, n_steps=600):
    model.rescale(data)
    for step in range(n_steps):
        model.fit(batch_of(data, 256 * model.n_members, step))
    return model


def squared_errors(model, data):
    with th.no_grad():
        next_states, rewards = model.step(data.observations, data.actions)
    return th.cat([next_states - data.next_observations, rewards - data.rewards], dim=1).square().mean(dim=0)


@pytest.mark.parametrize("distribution", ["deterministic", "gaussian"])
def test_it_reaches_the_noise_floor_of_linear_data(distribution):
    model = fitted(make(distribution=distribution), noisy_linear(8000))
    errors = squared_errors(model, noisy_linear(4000, seed=1))
    assert (errors < 1.1 * NOISE**2).all() and (errors > 0.9 * NOISE**2).all()


def test_a_gaussian_model_draws_the_noise_of_the_system():
    model = fitted(make(), noisy_linear(8000), 2000)
    states, actions = th.full((4000, 2), 0.3), th.full((4000, 2), -0.2)
    with th.no_grad():
        mean = th.cat(model.step(states, actions), dim=1)
        with model.using_members("sampled"):
            drawn = th.cat(model.step(states, actions), dim=1)
        with model.using_members("dealt"):
            dealt = th.cat(model.step(states, actions), dim=1)
    # Rewards and states alike: their noise is the same
    assert drawn.std(dim=0) == pytest.approx(th.full((3,), NOISE), rel=0.15)
    th.testing.assert_close(drawn.mean(dim=0), mean[0], atol=0.01, rtol=0)
    # Only "sampled" draws noise: one value for each member
    assert (dealt[:2000] - dealt[0]).abs().max() < 1e-5 and (dealt[2000:] - dealt[2000]).abs().max() < 1e-5
    assert (mean - mean[0]).abs().max() < 1e-5


def test_a_deterministic_model_draws_members_but_no_noise():
    model = fitted(make(distribution="deterministic", n_members=3), noisy_linear(500), 20)
    with model.using_members("sampled"), th.no_grad():
        drawn = model.transition(th.zeros(300, 2), th.zeros(300, 2))
    # As many rows of each member, whatever the order
    assert sorted(np.unique(drawn[:, 0].numpy().round(5), return_counts=True)[1]) == [100, 100, 100]


def test_the_likelihood_is_that_of_a_gaussian():
    model, data = make(), noisy_linear(300)
    fitted(model, data, 20)
    inputs, targets = model._inputs_and_targets(data)
    outputs = model.networks(inputs, "mean")
    means, log_variances = outputs[:, :3], bounded(outputs[:, 3:])
    expected = -2 * th.distributions.Normal(means, (0.5 * log_variances).exp()).log_prob(targets) - np.log(2 * np.pi)
    th.testing.assert_close(model._loss(outputs, targets), expected)


def wave(n_rows, seed):
    """The first dimension changes by a wave whose mean is zero everywhere along it, and there is no noise."""
    rng = th.Generator().manual_seed(seed)
    states, actions = (2 * th.rand(n_rows, 2, generator=rng) - 1 for _ in range(2))
    changes = th.cat([th.sin(4 * states[:, :1]) * states[:, 1:], 0.01 * actions[:, :1]], dim=1)
    return Transitions(states, actions, states[:, :1], states + changes, th.zeros(n_rows, 1))


def test_the_mean_is_fitted_where_the_variance_was_large_at_first():
    """A likelihood without weights explains the whole wave by the variance: the error is then 0.97 of the change."""
    model = fitted(make(net_arch=(64, 64)), wave(4000, 0), 1200)
    held_out = wave(1000, 1)
    with th.no_grad():
        errors = model.transition(held_out.observations, held_out.actions) - held_out.next_observations
    changes = held_out.next_observations - held_out.observations
    assert errors[:, 0].square().mean().sqrt() < 0.4 * changes[:, 0].std()


def test_log_variances_are_softly_bounded():
    low, high = LOG_VARIANCES
    values = bounded(th.tensor([-1000.0, -4.0, 1000.0]))
    assert values[0] == pytest.approx(low, abs=1e-4) and values[2] == pytest.approx(high, abs=1e-3)
    assert values[1] == pytest.approx(-4.0, abs=0.02)


@pytest.mark.parametrize("reward", [Known(), Known().reward], ids=["model", "function"])
def test_a_known_reward_is_not_learned(reward):
    model, data = make(reward=reward), noisy_linear(200)
    fitted(model, data, 5)
    next_states, rewards = model.step(data.observations, data.actions)
    expected = Known().reward(data.observations, data.actions, next_states)
    assert th.equal(rewards, expected)
    assert th.equal(model.reward(data.observations, data.actions, next_states), expected)


def test_step_is_transition_and_reward():
    model, data = make(terminal=lambda states: states[:, :1] > 0.5), noisy_linear(200)
    fitted(model, data, 20)
    next_states, rewards = model.step(data.observations, data.actions)
    assert th.equal(next_states, model.transition(data.observations, data.actions))
    th.testing.assert_close(rewards, model.reward(data.observations, data.actions, next_states))


class TestEnds:
    def data(self):
        """Episodes end above 0.5, where -5 is paid."""
        data = noisy_linear(4000, noise=0.0)
        is_end = data.next_observations[:, :1] > 0.5
        return data._replace(rewards=th.where(is_end, -5.0, data.rewards), terminated=is_end.float())

    def test_known_ends_and_what_is_paid_for_them(self):
        data = self.data()
        model = fitted(make(terminal=lambda states: states[:, :1] > 0.5), data)
        model.solve_end_rewards(data)
        assert model.may_terminate
        assert th.equal(model.terminal(data.next_observations), data.terminated > 0)
        _, rewards = model.step(data.observations, data.actions)
        is_end = data.terminated[:, 0] > 0
        # Ordinary rewards are learned as if there were no ends, -5 where there are
        assert (rewards - data.rewards)[~is_end].abs().mean() < 0.1
        assert (rewards - data.rewards)[is_end].abs().mean() < 0.8
        assert model.end_rewards.jump < -4

    def test_nothing_is_known(self):
        model = make(terminal=None)
        assert not model.may_terminate and not model.terminal(th.full((3, 2), 9.0)).any()

    def test_they_are_learned_while_a_policy_is_trained(self):
        env = LinearEnv(ends="terminated")
        env.prior_model = None
        model = MPG("MlpPolicy", env, prior_model="learned", horizons=(0, 3), prior_model_kwargs=SMALL_MODEL, **SMALL)
        model.learn(300)
        dynamics = model.rollout_model
        assert dynamics.ends.is_used and dynamics.may_terminate
        states = th.tensor([[0.0, 0.0], [0.9, 0.0], [-0.9, 0.0]])
        with evaluated(dynamics):
            assert dynamics.terminal(states).flatten().tolist() == [False, True, True]


SMALL_MODEL = {"net_arch": (16,), "n_members": 2}


def test_tasks_that_never_end_have_the_cheaper_rollouts():
    assert not make(spec=gym.spec("Pendulum-v1")).may_terminate
    assert make(spec=gym.spec("Hopper-v5")).may_terminate
    assert not make(spec=gym.spec("Hopper-v5"), terminal=None).may_terminate


class TestElites:
    def test_the_networks_with_the_lowest_errors_predict(self):
        model, data = make(n_members=2, n_spares=3, distribution="deterministic"), noisy_linear(2000)
        fitted(model, data, 100)
        with th.no_grad():
            # Spoil three of the five networks
            for parameter in model.networks.fitted.parameters():
                parameter[[0, 2, 3]] += 1.0
        model.keep_best(noisy_linear(500, seed=1))
        model.restore_best()
        assert model.networks.elites.tolist() == [1, 4]
        assert (squared_errors(model, noisy_linear(500, seed=2)) < 2 * NOISE**2).all()

    def test_the_best_parameters_are_restored(self):
        model, data, held_out = make(distribution="deterministic"), noisy_linear(2000), noisy_linear(500, seed=1)
        fitted(model, data, 300)
        model.keep_best(held_out)
        best = [parameter.detach().clone() for parameter in model.networks.fitted.parameters()]
        for parameter in model.networks.fitted.parameters():
            parameter.data += 3.0
        model.keep_best(held_out)
        model.restore_best()
        for networks in (model.networks.fitted, model.networks.average):
            for expected, parameter in zip(best, networks.parameters(), strict=True):
                assert th.equal(expected, parameter)
        # Nothing is left for the next time
        model.restore_best()


def test_weight_decay_shrinks_weights_and_no_biases():
    def after_a_fit(weight_decay):
        th.manual_seed(0)
        model, data = make(weight_decay=weight_decay, learning_rate=1e-9), noisy_linear(100)
        model.rescale(data)
        model.fit(data)
        state = model.networks.optimizer.state
        # The first moment is a tenth of the gradient
        return {name: 10 * state[p]["exp_avg"] for name, p in model.networks.fitted.named_parameters()}, model

    (plain, model), (decayed, _) = after_a_fit(0.0), after_a_fit(0.5)
    for name, parameter in model.networks.fitted.named_parameters():
        expected = plain[name] + (0.5 * parameter.detach() if name.endswith("weight") else 0.0)
        th.testing.assert_close(decayed[name], expected, atol=1e-4, rtol=1e-3)


def test_predictions_stay_near_the_data():
    model, data = make(), noisy_linear(500)
    fitted(model, data, 20)
    next_states = model.transition(th.full((1, 2), 100.0), th.zeros(1, 2))
    width = data.observations.amax(dim=0) - data.observations.amin(dim=0)
    assert (next_states <= th.maximum(data.observations.amax(dim=0) + 0.5 * width, data.next_observations.amax(dim=0))).all()
    with model.extrapolating():
        further = model.transition(th.full((1, 2), 5.0), th.zeros(1, 2))
    assert (further > 4).all()


def test_values_that_are_not_finite_are_ignored():
    data = noisy_linear(400)
    data.observations[3], data.rewards[5], data.next_observations[7] = th.nan, th.inf, -th.inf
    model = fitted(make(), data, 50)
    assert all(th.isfinite(parameter).all() for parameter in model.networks.fitted.parameters())
    assert np.isfinite(model.validation_error(data))
    assert np.isnan(model.fit(data.select(th.arange(400) == 3)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_members": 0}, "`n_members` must be a whole number, 1 or more"),
        ({"n_spares": -1}, "`n_spares` must be a whole number, 0 or more"),
        ({"net_arch": 64}, "`net_arch` of the model lists the sizes"),
        ({"distribution": "normal"}, "`distribution` must be 'deterministic' or 'gaussian', got 'normal'"),
        ({"terminal": "never"}, "`terminal` must be a function of states, 'known' or None, got 'never'"),
        (
            {"terminal": lambda states: states[:, 0] > 1},
            r"`terminal` must map states .B, 2. to booleans .B, 1., got torch.bool",
        ),
        ({"terminal": lambda states: states[:, :1]}, "got torch.float32 of shape"),
        ({"fitting_schedule": "every"}, "`fitting_schedule` must be an EveryUpdate or an UntilConverged, got 'every'"),
        ({"reward": "quadratic"}, "`reward` must be a function, a PriorModel or None, got 'quadratic'"),
    ],
)
def test_impossible_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


class TestInAlgorithms:
    def make(self, env="Pendulum-v1", **kwargs):
        return MPG("MlpPolicy", env, prior_model="learned", prior_model_kwargs=SMALL_MODEL, horizons=(0, 3), **SMALL, **kwargs)

    def test_it_needs_nothing_of_the_user(self):
        model = self.make().learn(60)
        dynamics = model.rollout_model
        assert isinstance(dynamics, DynamicsModel) and dynamics.n_states == 3
        assert model.model_fitting.is_prepared and dynamics.networks.n_fits > 0
        assert "Errors of the learned model along recorded actions" in str(model.trust_report())

    def test_unknown_arguments_are_named(self):
        with pytest.raises(ValueError, match="`prior_model_kwargs` got \\['n_layers'\\], expected some of"):
            MPG("MlpPolicy", "Pendulum-v1", prior_model="learned", prior_model_kwargs={"n_layers": 2})

    def test_the_schedule_is_the_users(self):
        schedule = UntilConverged(30, max_fits=7)
        kwargs = {**SMALL_MODEL, "fitting_schedule": schedule}
        model = MPG("MlpPolicy", "Pendulum-v1", prior_model="learned", prior_model_kwargs=kwargs, horizons=(0, 3), **SMALL)
        assert model.rollout_model.fitting_schedule is schedule
        assert isinstance(self.make().rollout_model.fitting_schedule, EveryUpdate)

    def test_it_is_saved(self, tmp_path):
        model = self.make().learn(60)
        model.save(tmp_path / "model.zip")
        loaded = MPG.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"))
        states, actions = th.rand(5, 3), th.rand(5, 1)
        expected, got = (algorithm.rollout_model.step(states, actions) for algorithm in (model, loaded))
        assert th.equal(expected[0], got[0]) and th.equal(expected[1], got[1])
