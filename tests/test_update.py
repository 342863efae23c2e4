"""The gradients of an update against those written by hand."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from lq import LinearEnv
from settings import PAPERS, SMALL
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mpg import MPG
from sb3_mpg.common.balance import balanced_mse_loss, rollout_value_loss
from sb3_mpg.common.batches import ReusedBatches
from sb3_mpg.common.models.trainable import members_of
from sb3_mpg.common.rollouts.exploration import ModelExploration
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.rollouts.policy_gradient import mixed_policy_gradient
from sb3_mpg.common.utils import gradient_of


def draw_batch(model, n_updates, batch_size=32):
    return model.update.draw_batch(batch_size, model.replay_buffer, model.units(), model.update_settings(n_updates))


def gradients(model, batch, n_updates):
    """Each row of the batch belongs to one member of the model, as in training."""
    with members_of(model.rollout_model, "dealt"):
        return model.update.compute_gradients(batch, n_updates, model.units(), model.update_settings(n_updates))


def test_horizon_zero_is_the_actor_loss_of_td3():
    env = LinearEnv()
    policy_kwargs = {"net_arch": [16], "layer_norm": False, "features_extractor_kwargs": {"frequencies": []}}
    model = MPG("MlpPolicy", env, horizons=(0,), weighting="constant", **{**SMALL, "policy_kwargs": policy_kwargs})
    td3 = TD3("MlpPolicy", env, policy_kwargs={"net_arch": [16], "activation_fn": th.nn.ELU}, seed=3)
    model.actor.load_state_dict(td3.actor.state_dict(), strict=False)
    model.critic.load_state_dict(td3.critic.state_dict(), strict=False)
    observations = th.randn(32, 2)
    loss = -td3.critic.q1_forward(observations, td3.actor(observations)).mean()
    loss.backward()
    expected = -th.cat([parameter.grad.flatten() for parameter in td3.actor.parameters()])
    th.testing.assert_close(model.policy_gradient(observations, 0), expected)


def test_policy_gradient_is_that_of_the_update():
    """What `train` applies is the weighted sum of what `policy_gradient` returns."""
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2, 6), max_grad_norm=None, policy_delay=1, **SMALL, **PAPERS).learn(50)
    n_updates = 4400
    batch = draw_batch(model, n_updates)
    result = gradients(model, batch, n_updates)
    weights = model.weighting_rule(n_updates)
    assert min(weights.values()) > 0.01
    expected = sum(w * model.policy_gradient(batch.observations, horizon) for horizon, w in weights.items())
    th.testing.assert_close(
        -th.cat([gradient.flatten() for gradient in result.gradients["actor"]]), expected, rtol=1e-4, atol=1e-7
    )


def test_gradient_under_vec_normalize_equals_that_by_hand_in_raw_units():
    env = VecNormalize(DummyVecEnv([lambda: LinearEnv(noise=0.1)]))
    model = MPG("MlpPolicy", env, horizons=(0, 5), reward_scale=0.7, **SMALL, **PAPERS).learn(150)
    mean, std = env.obs_rms.mean, np.sqrt(env.obs_rms.var + env.epsilon)
    reward_std = np.sqrt(env.ret_rms.var + env.epsilon)
    assert abs(std - 1).max() > 0.05
    assert abs(reward_std - 1) > 0.05
    observations = model.replay_buffer.observations[:16, 0].astype(np.float32)
    n = 5

    # A rollout in raw units, written out, with everything the wrapper does done by hand
    linear = LinearEnv()
    a, b = th.as_tensor(linear.a).float(), th.as_tensor(linear.b).float()
    frozen = copy.deepcopy(model.actor)

    def inputs(states):
        return (states - th.as_tensor(mean).float()) / th.as_tensor(std).float()

    states, total = th.as_tensor(observations), 0.0
    actions = model.actor(inputs(states))
    for step in range(n):
        raw_actions = 2.0 * actions
        reward = -((states**2).sum(1) + 0.1 * (raw_actions**2).sum(1))
        total = total + model.gamma**step * 0.7 * reward / float(reward_std)
        states = states @ a.T + raw_actions @ b.T
        actions = frozen(inputs(states))
    q1 = model.critic(inputs(states), actions)[0].squeeze(1)
    gradients = th.autograd.grad((total + model.gamma**n * q1).mean(), list(model.actor.parameters()))
    expected = th.cat([gradient.flatten() for gradient in gradients])
    th.testing.assert_close(model.policy_gradient(observations, n), expected, rtol=1e-4, atol=1e-6)


def test_critic_loss_with_measured_weights_equals_the_one_written_by_hand():
    """
    States are balanced by the size of their values as far as the model is trusted, and where the policy is due
    sum_n w_n^2 (Q(s, pi(s)) - X_n(s))^2 is added, outliers limited.
    """
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2, 6), policy_delay=2, model_exploration=0, **SMALL).learn(50)
    model.weighting_rule._errors = [np.array([0.6, 0.3, 0.1])]
    weights = dict(zip((0, 2, 6), np.array([1, 2, 6]) / 9, strict=True))
    batch = draw_batch(model, 1)
    context = model.update.context(model.units(), model.gamma)

    def median(x):
        return x.sort(dim=0).values[15]

    def balanced_loss(values, targets):
        sizes = targets.abs()
        m = median(sizes)
        factors = 1 / (m / 9 + 8 / 9 * (sizes + 0.3 * m))
        return (factors * (values - targets) ** 2).sum() / factors.sum()

    def loss_by_hand(with_rollouts):
        actions = model.actor(batch.observations).detach()
        loss = 0.0
        for index in (0, 1):
            q_function = model.update.q_function(index)
            loss += balanced_loss(q_function(batch.observations, batch.actions), batch.target_q_values)
            values = q_function(batch.observations, actions)
            for horizon in (2, 6) if with_rollouts else ():
                returns = model_rollout(batch.observations, context, [horizon])[horizon]
                errors = (returns - values).detach()
                limit = 3 * median(errors.abs())
                targets = values.detach() + errors.clamp(-limit, limit)
                loss += weights[horizon] ** 2 * balanced_loss(values, targets)
        return th.cat([gradient.flatten() for gradient in gradient_of(loss, model.critic)])

    for n_updates, is_due in ((2, True), (3, False)):
        gradient = th.cat([gradient.flatten() for gradient in gradients(model, batch, n_updates).gradients["critic"]])
        th.testing.assert_close(gradient, loss_by_hand(is_due), rtol=1e-4, atol=1e-7)


def test_critics_learn_nothing_from_a_model_that_is_not_corrected():
    """However much it weighs: an update is that of the papers."""
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 4), residual=False, policy_delay=1, **SMALL).learn(50)
    model.weighting_rule._errors = [np.array([1.0, 1e-30])]
    assert model.weighting_rule(2)[4] > 0.99
    next_observations = model.replay_buffer.sample(32).next_observations
    least = th.cat(model.critic_target(next_observations, model.actor_target(next_observations)), dim=1).amin(1, keepdim=True)
    actions = model.actor_target(next_observations)
    th.testing.assert_close(model.update.targets(model.update_settings(2)).values(next_observations, actions), least)

    batch = draw_batch(model, 2)
    result = gradients(model, batch, 2)
    loss = sum(th.nn.functional.mse_loss(q, batch.target_q_values) for q in model.critic(batch.observations, batch.actions))
    for ours, other in zip(result.gradients["critic"], gradient_of(loss, model.critic), strict=True):
        th.testing.assert_close(ours, other)
    policy_gradient = -th.cat([gradient.flatten() for gradient in result.gradients["actor"]])
    th.testing.assert_close(policy_gradient, model.policy_gradient(batch.observations, 4), rtol=1e-4, atol=1e-7)


def test_half_of_the_states_are_explored_in_a_model_that_is_trusted():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 4), policy_delay=1, max_grad_norm=None, **SMALL).learn(50)
    batch = draw_batch(model, 1)
    context = model.update.context(model.units(), model.gamma)
    low, high = batch.observations.amin(dim=0), batch.observations.amax(dim=0)

    def explored(trust, observations=batch.observations, **kwargs):
        th.manual_seed(0)
        return ModelExploration(0.5, **{"max_steps": 10, **kwargs}).perturb(observations, context, trust)

    def moved(observations):
        return (observations != batch.observations).any(dim=1)

    assert not moved(explored(0.0)).any()
    # Spread over the batch, so that each member of the model gets its share of them
    assert moved(explored(1.0))[::2].sum() >= 12 and not moved(explored(1.0))[1::2].any()
    assert moved(explored(0.3)).sum() < 10
    within = explored(1.0, margin=0.0)
    assert moved(within).any()
    assert (within >= low).all() and (within <= high).all()
    assert not th.equal(within, explored(1.0))
    # A dimension that happens to be the same in the whole batch does not hold anyone back
    flat = batch.observations.clone()
    flat[:, 0] = 0.5
    assert (explored(1.0, flat)[:, 1] != flat[:, 1]).sum() >= 12

    # There the policy is improved, and the critics learn from its rollouts
    model.weighting_rule._errors = [np.array([1e30, 1e-30])]
    observations = explored(1.0, max_steps=4)
    gradient = mixed_policy_gradient(observations, context, {4: 1.0}, balance=1.0)
    values = model.critic(observations, gradient.actions)
    loss = rollout_value_loss(values, gradient.returns, {4: 1.0}, 1.0) + sum(
        balanced_mse_loss(value, batch.target_q_values, 1.0) for value in model.critic(batch.observations, batch.actions)
    )
    expected = gradient.gradients + gradient_of(loss, model.critic)
    th.manual_seed(0)
    result = gradients(model, batch, 2)
    for ours, other in zip(result.gradients["actor"] + result.gradients["critic"], expected, strict=True):
        th.testing.assert_close(ours, other)


def test_without_trust_in_the_model_an_update_is_the_data_driven_one():
    measured = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), policy_delay=1, **SMALL).learn(50)
    measured.weighting_rule._errors = [np.array([1e-30, 1e30])]
    data_driven = MPG("MlpPolicy", LinearEnv(), horizons=(0,), weighting="constant", policy_delay=1, **SMALL).learn(50)
    data_driven.set_parameters(measured.get_parameters())
    data_driven.replay_buffer = measured.replay_buffer
    results = []
    for model in (measured, data_driven):
        np.random.seed(0)
        th.manual_seed(0)
        results.append(gradients(model, draw_batch(model, 2), 2).gradients)
    for name in ("critic", "actor"):
        for ours, expected in zip(results[0][name], results[1][name], strict=True):
            assert th.equal(ours, expected)


@pytest.mark.parametrize(("errors", "n_states"), [([1.0, 0.9], 8), ([0.9, 1.0], 32)])
def test_rollouts_start_from_fewer_states_where_the_model_leads(errors, n_states):
    settings = {"horizons": (0, 2), "rollout_batch_size": 8, "model_exploration": 0, "policy_delay": 1}
    model = MPG("MlpPolicy", LinearEnv(), **settings, **SMALL).learn(50)
    model.weighting_rule._errors = [np.array(errors)]
    batch, weights = draw_batch(model, 2), model.trust.weights(2)
    context = model.update.context(model.units(), model.gamma)
    with members_of(model.rollout_model, "dealt"):
        states = batch.observations[:n_states]
        expected = mixed_policy_gradient(states, context, weights, balance=model.trust.in_model(2)).gradients
    for ours, other in zip(gradients(model, batch, 2).gradients["actor"], expected, strict=True):
        th.testing.assert_close(ours, other)


@pytest.mark.parametrize("weighting", ["rule_based", "measured"])
def test_rollouts_start_from_the_whole_batch_where_the_model_does_not_learn(weighting):
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), residual=False, weighting=weighting, **SMALL)
    assert not model.update_settings(1).model_leads


def test_batches_are_raw_whatever_normalises_the_environment():
    env = VecNormalize(make_vec_env(LinearEnv, 1, seed=0))
    model = MPG("MlpPolicy", env, **SMALL).learn(60)
    assert (env.obs_rms.var < 0.9).any() or (env.obs_rms.var > 1.1).any()
    batch = draw_batch(model, 1)
    recorded = {tuple(row) for row in model.replay_buffer.observations[: model.replay_buffer.size(), 0]}
    assert {tuple(row) for row in batch.observations.numpy()} <= recorded


@pytest.mark.parametrize("policy_delay", [1, 2, 3])
def test_the_policy_is_due_once_in_so_many_updates(policy_delay):
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), policy_delay=policy_delay, **SMALL).learn(50)
    batch = draw_batch(model, 1)
    for n_updates in range(1, 7):
        result = gradients(model, batch, n_updates)
        assert list(result.gradients) == (["critic", "actor"] if n_updates % policy_delay == 0 else ["critic"])
        assert ("train/actor_loss" in result.logs) == ("actor" in result.gradients)


def test_an_update_changes_nothing():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL).learn(50)
    before = [tensor.clone() for tensor in model.update.tensors()]
    random_numbers = np.random.get_state()[1].copy(), th.get_rng_state()
    results = []
    for _ in range(2):
        settings = model.update_settings(12)
        results.append(model.update.gradients_of_update(12, 32, model.replay_buffer, model.units(), settings))
    assert results[0].logs == results[1].logs
    assert all(th.equal(*pair) for pair in zip(before, model.update.tensors(), strict=True))
    assert (np.random.get_state()[1] == random_numbers[0]).all() and th.equal(th.get_rng_state(), random_numbers[1])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"horizons": (0, 2)},
        {"horizons": (0, 2), "differentiate": "all_actions", **PAPERS},
        {"horizons": (0, 2), "value_target": "n_step_simulator", "batch_reuse": 2, **PAPERS},
        {"horizons": (0,), "weighting": "constant"},
    ],
    ids=["default", "all_actions", "simulated", "no_model"],
)
def test_a_pickled_update_gives_the_same_gradients(kwargs):
    model = MPG("MlpPolicy", LinearEnv(), **SMALL, **kwargs).learn(50)
    inputs = model.training_inputs(32)
    copied = pickle.loads(pickle.dumps(model.update.for_learner()))
    for name in ("env", "replay_buffer", "logger"):
        assert not hasattr(copied, name)
    # Each copy draws batches of its own
    model.update.batches = ReusedBatches()
    settings = model.update_settings(12)
    ours, theirs = (
        update.gradients_of_update(12, 32, inputs.replay_buffer, inputs.units, settings) for update in (model.update, copied)
    )
    assert ours.logs == theirs.logs
    for name in ("critic", "actor"):
        assert all(th.equal(*pair) for pair in zip(ours.gradients[name], theirs.gradients[name], strict=True))


@pytest.mark.parametrize("differentiate", ["first_action", "all_actions"])
def test_optimizers_apply_each_gradient_to_its_own_weight(differentiate):
    """Fused optimizers look at the memory of a gradient and not at its strides, which tall layers once came with."""
    kwargs = {**SMALL, **PAPERS, "policy_kwargs": {"net_arch": [32]}}
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), differentiate=differentiate, **kwargs).learn(50)
    result = gradients(model, draw_batch(model, 2), 2)
    for name in ("critic", "actor"):
        network = getattr(model, name)
        assert network.optimizer.defaults["fused"]
        reference = copy.deepcopy(network)
        optimizer = th.optim.Adam([parameter for parameter in reference.parameters() if parameter.requires_grad], fused=False)
        # With the moments of the training so far
        state = copy.deepcopy(network.optimizer.state_dict())
        state["param_groups"][0]["fused"] = False
        optimizer.load_state_dict(state)
        for parameter, gradient in zip(reference.parameters(), result.gradients[name], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for parameter, gradient in zip(network.parameters(), result.gradients[name], strict=True):
            parameter.grad = gradient
        network.optimizer.step()
        for ours, expected in zip(network.parameters(), reference.parameters(), strict=True):
            th.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_gradients_come_in_the_order_and_shape_of_the_parameters():
    kwargs = {**SMALL, "policy_kwargs": {"net_arch": [32]}}
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), differentiate="all_actions", **kwargs).learn(50)
    result = gradients(model, draw_batch(model, 2), 2)
    parameters = model.update.parameters()
    assert list(parameters) == list(result.gradients) == ["critic", "actor"]
    for name, tensors in parameters.items():
        for gradient, parameter in zip(result.gradients[name], tensors, strict=True):
            assert gradient.shape == parameter.shape and gradient.is_contiguous()
