"""DVPG against closed forms, and the paper's other algorithms as settings."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from lq import LinearEnv, LinearModel, quadratic_q, tensors
from settings import SMALL
from stable_baselines3 import TD3

from sb3_mpg import DVPG, DynamicsModel
from sb3_mpg.common.rollouts.policy_gradient import mixed_policy_gradient
from sb3_mpg.common.rollouts.steps import EagerSteps, RolloutContext
from sb3_mpg.common.trust.weighting import GeometricWeighting
from sb3_mpg.common.units import Units
from lq import LinearActor

GAMMA, LAMBDA = 0.9, 0.3
A, B = np.array([[1.0, 0.05], [0.0, 1.0]]), np.array([[0.0], [0.05]])
Q, R, K = 0.5 * np.eye(2), 0.5 * np.eye(1), np.array([[-0.8, -1.1]])


def exact_problem():
    """A double integrator, and the exact values of a linear policy."""
    closed = A + B @ K
    p = np.zeros((2, 2))
    for _ in range(2000):
        p = Q + K.T @ R @ K + GAMMA * closed.T @ p @ closed
    critic = Q + GAMMA * A.T @ p @ A, GAMMA * A.T @ p @ B, R + GAMMA * B.T @ p @ B
    model, actor = LinearModel(*tensors(A, B, Q, R)), LinearActor(th.as_tensor(K))
    units = Units.of(spaces.Box(-1, 1, (1,), np.float64), th.device("cpu"), 1.0, None)
    states = th.randn(50, 2, dtype=th.float64)
    context = RolloutContext(actor, quadratic_q(*tensors(*critic)), model, units, GAMMA, EagerSteps())
    # The first-action gradient, -(E S) of the text: (R + gamma B'PB) K - gamma B'PA, here with a = K s
    policy_gradient = -2 * ((R + GAMMA * B.T @ p @ B) @ K + GAMMA * B.T @ p @ A) @ np.asarray(states.T @ states / 50)
    return context, states, policy_gradient


@pytest.mark.parametrize("longest", [0, 1, 2, 5])
def test_with_an_exact_model_it_is_the_deterministic_policy_gradient(longest):
    """(1 - lambda^(t+1)) times it with the paper's weights, which the rule divides by their sum."""
    context, states, policy_gradient = exact_problem()
    horizons = range(longest + 1)
    papers = {k: (1 - LAMBDA) * LAMBDA**k for k in horizons}
    (gradient,) = mixed_policy_gradient(states, context, papers).gradients
    th.testing.assert_close(-gradient, th.as_tensor((1 - LAMBDA ** (longest + 1)) * policy_gradient), rtol=1e-8, atol=1e-10)
    rule = GeometricWeighting(list(horizons), lambda_=LAMBDA)(1)
    for k in horizons:
        assert rule[k] * (1 - LAMBDA ** (longest + 1)) == pytest.approx(papers[k], rel=1e-12)


def make(env=None, **kwargs):
    settings = {**SMALL, "policy_kwargs": {"net_arch": [8]}, "prior_model_kwargs": {"net_arch": (8,)}, **kwargs}
    return DVPG("MlpPolicy", LinearEnv() if env is None else env, **settings)


def test_the_settings_are_those_of_the_paper():
    model = DVPG("MlpPolicy", "Pendulum-v1")
    dynamics = model.rollout_model
    assert isinstance(dynamics, DynamicsModel) and not dynamics.is_gaussian and dynamics.n_members == 1
    assert [layer.weight.shape[1:] for layer in dynamics.networks.fitted[::2]] == [(4, 64), (64, 64), (64, 4)]
    assert isinstance(dynamics.networks.fitted[1], th.nn.ReLU)
    assert (model.batch_size, model.tau, model.policy_delay, len(model.critic.q_networks)) == (128, 0.01, 1, 1)
    assert [module.out_features for module in model.actor.mu if isinstance(module, th.nn.Linear)] == [64, 64, 1]
    assert model.actor.optimizer.param_groups[0]["lr"] == 1e-4
    settings = model.update_settings(1)
    assert settings.weights == pytest.approx({0: 0.9 / 0.99, 1: 0.09 / 0.99})
    # The model has no other part in the update
    assert (settings.trust, settings.blind_trust, settings.imitation, settings.exploration.share) == (0, 0, 0, 0)


def test_learned_dynamics_keep_the_other_settings_of_the_paper():
    dynamics = DVPG("MlpPolicy", "Pendulum-v1", prior_model_kwargs={"n_members": 3}).rollout_model
    assert dynamics.n_members == 3 and not dynamics.is_gaussian


def test_ddpg_is_horizon_zero():
    """The gradients of SB3's TD3 with one critic, at the same parameters and with the same batch."""
    model = make(horizons=(0,)).learn(60)
    assert not isinstance(model.rollout_model, DynamicsModel)
    data = model.replay_buffer.sample(32)
    with th.no_grad():
        next_actions = model.actor_target(data.next_observations)
        next_values = model.critic_target(data.next_observations, next_actions)[0]
        targets = data.rewards + (1 - data.dones) * model.gamma * next_values
    critic_loss = th.nn.functional.mse_loss(model.critic(data.observations, data.actions)[0], targets)
    actor_loss = -model.critic.q1_forward(data.observations, model.actor(data.observations)).mean()
    expected = [
        th.autograd.grad(loss, network.parameters())
        for loss, network in ((critic_loss, model.critic), (actor_loss, model.actor))
    ]

    class Batch:
        def sample(self, n):
            return data

    result = model.update.gradients_of_update(1, 32, Batch(), model.units(), model.update_settings(1))
    for name, gradients in zip(("critic", "actor"), expected, strict=True):
        for got, gradient in zip(result.gradients[name], gradients, strict=True):
            th.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)
    assert isinstance(model.critic, TD3("MlpPolicy", "Pendulum-v1").critic.__class__)


class TestFiniteHorizon:
    def test_without_the_terminal_value_only_rewards_count(self):
        model = make(horizons=(2,), weighting="constant", terminal_value=False).learn(60)
        context = model.update.context(model.units(), model.gamma)
        states = th.randn(6, 2)
        assert not context.q_function(states, th.ones(6, 1)).any()
        with th.no_grad():
            for parameter in model.critic.parameters():
                parameter.add_(1.0)
        before = make(horizons=(2,), weighting="constant", terminal_value=False).learn(60)
        # The policy gradient does not see the critic
        gradients = [
            mixed_policy_gradient(states, algorithm.update.context(algorithm.units(), 0.9), {2: 1.0}).gradients
            for algorithm in (model, before)
        ]
        for one, other in zip(*gradients, strict=True):
            assert th.equal(one, other)

    def test_it_is_saved_and_reaches_learners(self, tmp_path):
        model = make(horizons=(2,), weighting="constant", terminal_value=False)
        model.save(tmp_path / "model.zip")
        loaded = DVPG.load(tmp_path / "model.zip", env=LinearEnv())
        assert not loaded.update.terminal_value and not loaded.update.for_learner().terminal_value


def test_measured_weights():
    model = make(
        weighting="measured",
        horizons=(0, 1, 3),
        prior_model_kwargs={"net_arch": (8,), "n_members": 2},
        policy_kwargs={"net_arch": [8], "n_critics": 2},
    ).learn(80)
    settings = model.update_settings(model._n_updates)
    assert sum(settings.weights.values()) == pytest.approx(1) and settings.trust == pytest.approx(1 - settings.weights[0])
    with pytest.raises(ValueError, match="there is one"):
        make(weighting="measured").learn(60)
