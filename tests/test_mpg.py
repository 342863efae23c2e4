import copy
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from lq import LinearEnv
from models import Breaks
from settings import SMALL
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, NStepADP, NStepDPG, PriorModel
from sb3_mpg.common.balance import balanced_mse_loss, rollout_value_loss
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.torch_layers import ObservationScaler
from sb3_mpg.common.utils import gradient_of
from sb3_mpg.common.value_targets import SimulatorTarget
from sb3_mpg.common.trust.weighting import make_weighting_rule
from sb3_mpg.mpg import mpg
from sb3_mpg_envs.path_tracking.dynamics import VehicleParameters

PAPERS = {"weighting": "rule_based", "residual": False}
ALGORITHMS = {
    "v1": (
        MPG,
        {"value_target": "n_step_simulator", "value_target_kwargs": {"n_steps": 4}, "batch_reuse": 2, "horizons": (0, 3)},
    ),
    "v2": (MPG, {"horizons": (0, 2, 5), **PAPERS}),
    "measured": (MPG, {"horizons": (0, 2, 5)}),
    "compared": (MPG, {"horizons": (0, 5), "residual": False}),
    "replay": (MPG, {"horizons": (3,), "weighting": "constant", "value_target": "n_step_replay"}),
    "geometric": (MPG, {"horizons": (0, 1, 3), "weighting": "geometric", "differentiate": "all_actions"}),
    "ndpg": (NStepDPG, {"n_steps": 3}),
    "nadp": (NStepADP, {"n_steps": 3}),
}


@pytest.mark.parametrize("env_id", ["PathTracking-v0", "InvertedPendulumConti-v0"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_run_save_load(name, env_id, tmp_path):
    cls, kwargs = ALGORITHMS[name]
    model = cls("MlpPolicy", env_id, **SMALL, **kwargs)
    initial = copy.deepcopy(model.policy.state_dict())
    model.learn(80, log_interval=1)
    assert model._n_updates == 40
    assert any(not th.equal(initial[key], value) for key, value in model.policy.state_dict().items() if "actor" in key)
    observations = np.stack([model.observation_space.sample() for _ in range(3)])
    model.save(tmp_path / "model.zip")
    loaded = cls.load(tmp_path / "model.zip")
    np.testing.assert_array_equal(model.predict(observations)[0], loaded.predict(observations)[0])
    for key, value in model.policy.state_dict().items():
        th.testing.assert_close(value, loaded.policy.state_dict()[key], rtol=0, atol=0)
    loaded.set_env(model.get_env())
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded._n_updates == 60


def test_log_values():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 4), max_grad_norm=1e-3, **SMALL).learn(44)
    log = model.logger.name_to_value
    for key in (
        "train/critic_loss",
        "train/actor_loss",
        "train/learning_rate",
        "train/critic_learning_rate",
        "horizons/weight_0",
        "horizons/weight_4",
        "horizons/return_4",
        "train/actor_grad_norm",
        "train/critic_grad_norm",
        "train/n_updates",
    ):
        assert np.isfinite(log[key]), key
    assert log["train/skipped_updates"] == 0
    assert log["train/updates_per_step"] == pytest.approx(4 / 44)
    assert log["train/actor_grad_norm"] > log["train/actor_grad_norm_clipped"] == pytest.approx(1e-3)
    assert log["train/critic_grad_norm_clipped"] == pytest.approx(1e-3)


def test_linear_decay_of_both_learning_rates():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 1), **SMALL)
    assert model.actor.optimizer.param_groups[0]["lr"] == 3e-4
    model.learn(100)
    for progress, fraction in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0)):
        assert model.lr_schedule(progress) == pytest.approx(3e-4 + fraction * (3e-6 - 3e-4))
        assert model.critic_lr_schedule(progress) == pytest.approx(8e-4 + fraction * (8e-6 - 8e-4))
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(3e-6)
    assert model.critic.optimizer.param_groups[0]["lr"] == pytest.approx(8e-6)


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_many_environments_and_callbacks(vec_env_cls, tmp_path):
    # The module in the id lets worker processes find the environment
    env = make_vec_env("sb3_mpg_envs:PathTracking-v0", 3, seed=1, vec_env_cls=vec_env_cls)
    eval_env = make_vec_env("sb3_mpg_envs:PathTracking-v0", 1, vec_env_cls=vec_env_cls)
    callbacks = [
        EvalCallback(eval_env, n_eval_episodes=1, eval_freq=20, verbose=0),
        CheckpointCallback(20, str(tmp_path)),
    ]
    model = MPG("MlpPolicy", env, gradient_steps=2, **SMALL)
    model.learn(120, callback=callbacks)
    assert len(list(tmp_path.glob("*.zip"))) == 2
    assert model._n_updates == 2 * 27
    assert model.logger.name_to_value["train/updates_per_step"] == pytest.approx(54 / 120)
    env.close()
    eval_env.close()


def test_horizon_zero_is_the_actor_loss_of_td3():
    env = LinearEnv()
    policy_kwargs = {"net_arch": [16], "features_extractor_kwargs": {"frequencies": []}}
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
    units = model._units()
    batch = model._sample_batch(1, 32, units)
    n_updates = 4400
    result = model.compute_gradients(batch, n_updates, units)
    weights = model.weighting_rule(n_updates)
    assert min(weights.values()) > 0.01
    expected = sum(w * model.policy_gradient(batch.observations, horizon) for horizon, w in weights.items())
    th.testing.assert_close(-th.cat([gradient.flatten() for gradient in result.actor]), expected, rtol=1e-4, atol=1e-7)


def test_critic_loss_with_measured_weights_equals_the_one_written_by_hand():
    """
    States are balanced by the size of their values as far as the model is trusted, and where the policy is due
    sum_n w_n^2 (Q(s, pi(s)) - X_n(s))^2 is added, outliers limited.
    """
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2, 6), policy_delay=2, model_exploration=0, **SMALL).learn(50)
    model.weighting_rule._errors = [np.array([0.6, 0.3, 0.1])]
    weights = dict(zip((0, 2, 6), np.array([1, 2, 6]) / 9, strict=True))
    units = model._units()
    batch = model._sample_batch(1, 32, units)

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
            q_function = model._q_function(index)
            loss += balanced_loss(q_function(batch.observations, batch.actions), batch.target_q_values)
            values = q_function(batch.observations, actions)
            for horizon in (2, 6) if with_rollouts else ():
                returns = model_rollout(
                    batch.observations, model.actor, model._q_function(0), model.rollout_model, units, [horizon], model.gamma
                )[horizon]
                errors = (returns - values).detach()
                limit = 3 * median(errors.abs())
                targets = values.detach() + errors.clamp(-limit, limit)
                loss += weights[horizon] ** 2 * balanced_loss(values, targets)
        return th.cat([gradient.flatten() for gradient in gradient_of(loss, model.critic)])

    for n_updates, is_due in ((2, True), (3, False)):
        gradient = th.cat([gradient.flatten() for gradient in model.compute_gradients(batch, n_updates, units).critic])
        th.testing.assert_close(gradient, loss_by_hand(is_due), rtol=1e-4, atol=1e-7)


def test_critics_learn_nothing_from_a_model_that_is_not_corrected():
    """However much it weighs: an update is that of the papers."""
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 4), residual=False, policy_delay=1, **SMALL).learn(50)
    model.weighting_rule._errors = [np.array([1.0, 1e-30])]
    assert model.weighting_rule(2)[4] > 0.99
    units = model._units()
    next_observations = model.replay_buffer.sample(32).next_observations
    least = th.cat(model.critic_target(next_observations, model.actor_target(next_observations)), dim=1).amin(1, keepdim=True)
    actions = model.actor_target(next_observations)
    th.testing.assert_close(model._target_values(2)(next_observations, actions), least)

    batch = model._sample_batch(2, 32, units)
    result = model.compute_gradients(batch, 2, units)
    loss = sum(th.nn.functional.mse_loss(q, batch.target_q_values) for q in model.critic(batch.observations, batch.actions))
    for ours, other in zip(result.critic, gradient_of(loss, model.critic), strict=True):
        th.testing.assert_close(ours, other)
    policy_gradient = -th.cat([gradient.flatten() for gradient in result.actor])
    th.testing.assert_close(policy_gradient, model.policy_gradient(batch.observations, 4), rtol=1e-4, atol=1e-7)


def test_half_of_the_states_are_explored_in_a_model_that_is_trusted(monkeypatch):
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 4), policy_delay=1, max_grad_norm=None, **SMALL).learn(50)
    units = model._units()
    batch = model._sample_batch(1, 32, units)
    low, high = batch.observations.amin(dim=0), batch.observations.amax(dim=0)

    def explored(trust, observations=batch.observations):
        th.manual_seed(0)
        return model._explored(observations, units, trust)

    def moved(observations):
        return (observations != batch.observations).any(dim=1)

    assert not moved(explored(0.0)).any()
    # Spread over the batch, so that each member of the model gets its share of them
    assert moved(explored(1.0))[::2].sum() >= 12 and not moved(explored(1.0))[1::2].any()
    assert moved(explored(0.3)).sum() < 10
    monkeypatch.setattr(mpg, "EXPLORED_MARGIN", 0.0)
    within = explored(1.0)
    assert moved(within).any()
    assert (within >= low).all() and (within <= high).all()
    monkeypatch.setattr(mpg, "EXPLORED_MARGIN", 1.0)
    assert not th.equal(within, explored(1.0))
    # A dimension that happens to be the same in the whole batch does not hold anyone back
    flat = batch.observations.clone()
    flat[:, 0] = 0.5
    assert (explored(1.0, flat)[:, 1] != flat[:, 1]).sum() >= 12

    # There the policy is improved, and the critics learn from its rollouts
    model.weighting_rule._errors = [np.array([1e30, 1e-30])]
    observations = explored(1.0)
    gradient = model._mixed_policy_gradient(observations, units, {4: 1.0}, 1.0)
    values = model.critic(observations, gradient.actions)
    loss = rollout_value_loss(values, gradient.returns, {4: 1.0}, 1.0) + sum(
        balanced_mse_loss(value, batch.target_q_values, 1.0) for value in model.critic(batch.observations, batch.actions)
    )
    expected = gradient.gradients + gradient_of(loss, model.critic)
    th.manual_seed(0)
    result = model.compute_gradients(batch, 2, units)
    for ours, other in zip(result.actor + result.critic, expected, strict=True):
        th.testing.assert_close(ours, other)


def test_without_trust_in_the_model_an_update_is_the_data_driven_one():
    measured = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), policy_delay=1, **SMALL).learn(50)
    measured.weighting_rule._errors = [np.array([1e-30, 1e30])]
    data_driven = MPG("MlpPolicy", LinearEnv(), horizons=(0,), weighting="constant", policy_delay=1, **SMALL).learn(50)
    data_driven.set_parameters(measured.get_parameters())
    data_driven.replay_buffer = measured.replay_buffer
    units, results = measured._units(), []
    for model in (measured, data_driven):
        np.random.seed(0)
        batch = model._sample_batch(1, 32, units)
        results.append(model.compute_gradients(batch, 2, units))
    for ours, expected in zip(results[0].critic + results[0].actor, results[1].critic + results[1].actor, strict=True):
        assert th.equal(ours, expected)


class ShapedEnv(LinearEnv):
    """The linear system in other shapes and dtypes of observations."""

    def __init__(self, shape, dtype):
        super().__init__()
        self.dtype, self.shape = dtype, shape
        self.observation_space = spaces.Box(-np.inf, np.inf, shape, dtype)

    def prior_model(self):
        shape, linear = self.shape, LinearEnv().prior_model()

        class Shaped(PriorModel):
            def transition(self, states, actions):
                return linear.transition(states, actions)

            def reward(self, states, actions, next_states):
                return linear.reward(states, actions, next_states)

            def observation(self, states):
                return states.reshape(-1, *shape)

            def state_from_observation(self, observations):
                return observations.flatten(1)

        return Shaped()

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs.reshape(self.shape), info

    def step(self, action):
        obs, *rest = super().step(action)
        return obs.reshape(self.shape), *rest


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 1)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_critic_has_a_slope_in_the_state(shape, dtype):
    """SB3's q1_forward loses dQ/ds for all but flat float32 observations; the rollout's gradient must not."""
    model = MPG("MlpPolicy", ShapedEnv(shape, dtype), horizons=(0, 2), **SMALL, **PAPERS).learn(50)
    observations = th.as_tensor(model.replay_buffer.observations[:8, 0]).float().requires_grad_()
    slope = th.autograd.grad(model._q_function(0)(observations, th.zeros(8, 1)).sum(), observations)[0]
    assert slope.shape == (8, *shape)
    assert (slope != 0).all()
    flat = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL, **PAPERS)
    flat.policy.load_state_dict(model.policy.state_dict())
    expected = flat.policy_gradient(observations.detach().reshape(8, 2), 2)
    th.testing.assert_close(model.policy_gradient(observations.detach(), 2), expected)


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


@pytest.mark.parametrize("name", ["v1", "v2", "ndpg", "measured", "compared"])
@pytest.mark.parametrize("env_id", ["PathTracking-v0", "InvertedPendulumConti-v0"])
def test_continuing_equals_not_stopping(name, env_id, tmp_path):
    """Bit-identical parameters after saving and loading in the middle, with the environment seeded anew at the cut."""
    cls, kwargs = ALGORITHMS[name]

    def first_half():
        return cls("MlpPolicy", make_vec_env(env_id, 2, seed=0), **SMALL, **kwargs).learn(121)

    def second_half(model):
        model.env.seed(7)
        model._last_obs = None
        return model.learn(121, reset_num_timesteps=False)

    uninterrupted = first_half()
    th.manual_seed(11)  # what happens in between does not matter ...
    uninterrupted.save(tmp_path / "model.zip")
    uninterrupted.save_replay_buffer(tmp_path / "buffer.pkl")
    uninterrupted = second_half(uninterrupted)

    np.random.seed(99)
    th.rand(100)
    resumed = cls.load(tmp_path / "model.zip", env=make_vec_env(env_id, 2, seed=123))
    resumed.load_replay_buffer(tmp_path / "buffer.pkl")
    resumed = second_half(resumed)

    assert resumed._n_updates == uninterrupted._n_updates > 80
    for (key, expected), value in zip(
        uninterrupted.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True
    ):
        assert th.equal(expected, value), key
    for optimizer in ("actor", "critic"):
        expected = getattr(uninterrupted, optimizer).optimizer.state_dict()
        value = getattr(resumed, optimizer).optimizer.state_dict()
        assert expected["param_groups"] == value["param_groups"]
        th.testing.assert_close(value["state"], expected["state"], rtol=0, atol=0)


def test_batches_are_raw_whatever_normalises_the_environment():
    env = VecNormalize(make_vec_env(LinearEnv, 1, seed=0))
    model = MPG("MlpPolicy", env, **SMALL).learn(60)
    assert (env.obs_rms.var < 0.9).any() or (env.obs_rms.var > 1.1).any()
    batch = model._sample_batch(1, 32, model._units())
    recorded = {tuple(row) for row in model.replay_buffer.observations[: model.replay_buffer.size(), 0]}
    assert {tuple(row) for row in batch.observations.numpy()} <= recorded


def test_same_seed_same_result():
    runs = [MPG("MlpPolicy", "PathTracking-v0", **SMALL).learn(70) for _ in range(2)]
    for first, second in zip(*(run.policy.parameters() for run in runs), strict=True):
        assert th.equal(first, second)


def test_prior_model_can_be_given_in_every_way():
    instance = LinearEnv().prior_model()
    for prior_model, kwargs in (
        (instance, None),
        (type("Fixed", (PriorModel,), dict(transition=lambda self, s, a: s + a, reward=lambda self, s, a, n: -(a**2))), None),
        (lambda bias: LinearEnv().prior_model(bias), {"bias": 0.1}),
        ("auto", {"bias": 0.1}),
        ("sb3_mpg_envs.path_tracking.model:PathTrackingModel", {"steering_gain": -1.0}),
    ):
        env = "PathTracking-v0" if "PathTracking" in str(prior_model) else LinearEnv()
        model = MPG("MlpPolicy", env, prior_model=prior_model, prior_model_kwargs=kwargs, **SMALL)
        assert isinstance(model.rollout_model.prior, PriorModel)
    assert model.rollout_model.prior.steering_gain == -1.0


def test_load_with_another_prior_model(tmp_path):
    MPG("MlpPolicy", LinearEnv(), **SMALL).save(tmp_path / "model.zip")
    other = LinearEnv().prior_model(0.5)
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv(), prior_model=other)
    assert loaded.rollout_model.prior is other


def test_load_without_environment_predicts_and_then_asks_for_one(tmp_path):
    MPG("MlpPolicy", LinearEnv(), **SMALL).learn(50).save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip")
    assert loaded.predict(np.zeros(2, dtype=np.float32))[0].shape == (1,)
    loaded.set_env(DummyVecEnv([LinearEnv]))
    loaded.learn(20)


def test_load_with_another_number_of_environments(tmp_path):
    MPG("MlpPolicy", make_vec_env(LinearEnv, 2), **SMALL).learn(80).save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip", env=make_vec_env(LinearEnv, 3))
    loaded.learn(90)
    assert loaded.action_noise().shape == (3, 1)


def test_another_environment_brings_its_own_model_and_simulator():
    def heavy(mass):
        return gym.make("PathTracking-v0", vehicle=VehicleParameters(mass=mass))

    model = MPG("MlpPolicy", heavy(1500.0), value_target="n_step_simulator", batch_reuse=2, **SMALL).learn(50)
    assert model._make_simulator(4).vehicle.mass == model.rollout_model.prior.vehicle.mass == 1500.0
    assert len(model._batches) == 2
    with pytest.warns(UserWarning, match="learned of another model is forgotten"):
        model.set_env(heavy(3000.0))
    assert model._make_simulator(4).vehicle.mass == model.rollout_model.prior.vehicle.mass == 3000.0
    assert model._batches == []
    model.learn(20)


def test_frozen_features_extractor():
    class Frozen(ObservationScaler):
        def __init__(self, observation_space):
            super().__init__(observation_space, [1.0, 1.0])
            self.mix = th.nn.Linear(2, 2).requires_grad_(False)

        def forward(self, observations):
            return self.mix(super().forward(observations))

    policy_kwargs = {"net_arch": [16], "features_extractor_class": Frozen}
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **{**SMALL, "policy_kwargs": policy_kwargs})
    before = model.actor.features_extractor.mix.weight.clone()
    model.learn(60)
    assert th.equal(before, model.actor.features_extractor.mix.weight)
    assert model.policy_gradient(np.zeros((1, 2)), 2).numel() == sum(p.numel() for p in model.actor.mu.parameters())


def test_updates_per_step_count_from_the_start_of_learning():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL).learn(80)
    assert model.logger.name_to_value["train/updates_per_step"] == pytest.approx(40 / 80)
    model.learn(60)
    assert model.logger.name_to_value["train/updates_per_step"] == pytest.approx(20 / 60)


def test_random_states_survive_being_saved_twice(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), **SMALL).learn(50)
    model.save(tmp_path / "first.zip")
    expected = th.rand(3)
    loaded = MPG.load(tmp_path / "first.zip", env=LinearEnv())
    loaded.save(tmp_path / "second.zip")
    again = MPG.load(tmp_path / "second.zip", env=LinearEnv())
    again._setup_learn(10, reset_num_timesteps=False)
    assert th.equal(th.rand(3), expected)


def test_value_target_can_be_changed_at_loading(tmp_path):
    MPG("MlpPolicy", LinearEnv(), **SMALL).save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv(), value_target="n_step_simulator")
    assert isinstance(loaded.value_target, SimulatorTarget)
    loaded.learn(50)


def test_settings_that_load_changes_are_followed(tmp_path):
    path = tmp_path / "model.zip"
    MPG("MlpPolicy", LinearEnv(), compile=True, horizons=(0, 2), **SMALL).learn(30).save(path)

    def load(**kwargs):
        return MPG.load(path, env=LinearEnv(), **kwargs)

    assert load().action_noise._sigma[0] == pytest.approx(0.1)
    assert load(exploration_noise=0.7).action_noise._sigma[0] == pytest.approx(0.7)
    assert load(exploration_noise=0.0).action_noise is None
    smoothed = load(value_target="clipped_double_q", value_target_kwargs={"noise_std": 0.2})
    assert smoothed.value_target.noise_std == 0.2
    uncompiled = load(compile=False).learn(1, reset_num_timesteps=False)
    assert uncompiled._step_compiler is None

    # A noise of the user's stays, also when it comes together with that of ours, or before
    correlated = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
    both = load(action_noise=correlated, exploration_noise=0.3)
    assert isinstance(both.action_noise, OrnsteinUhlenbeckActionNoise)
    both.save(path)
    assert isinstance(load(exploration_noise=0.5).action_noise, OrnsteinUhlenbeckActionNoise)


def test_batches_are_reused_as_often_as_load_says(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), batch_reuse=4, **SMALL)
    for batch_reuse in (1, 10, 2):
        model.learn(47, reset_num_timesteps=False).save(tmp_path / "model.zip")
        model = MPG.load(tmp_path / "model.zip", env=LinearEnv(), batch_reuse=batch_reuse)
    assert len(model.learn(47, reset_num_timesteps=False)._batches) == 2


def test_the_replay_buffer_follows_the_value_target(tmp_path):
    path, buffer = tmp_path / "model.zip", tmp_path / "buffer.pkl"
    MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL).learn(30).save(path)

    def n_steps_of(**kwargs):
        """Saved again each time, as the next one finds it."""
        model = MPG.load(path, env=LinearEnv(), **kwargs)
        model.save(path)
        model.save_replay_buffer(buffer)
        return getattr(model.replay_buffer, "n_steps", 1)

    assert n_steps_of() == 1
    assert n_steps_of(value_target="n_step_replay") == n_steps_of() == 25
    assert n_steps_of(value_target="n_step_replay", value_target_kwargs={"n_steps": 5}) == n_steps_of() == 5
    assert n_steps_of(value_target="clipped_double_q") == n_steps_of() == 1

    model = MPG("MlpPolicy", LinearEnv(), value_target="n_step_replay", horizons=(0, 2), **SMALL)
    with pytest.raises(ValueError, match=r"spans 25 recorded steps.*made for n_steps=1.*fits the value target"):
        model.load_replay_buffer(buffer)
    MPG("MlpPolicy", "PathTracking-v0", **SMALL).save_replay_buffer(buffer)
    with pytest.raises(ValueError, match=r"observation_space of the replay buffer has the shape \(6,\)"):
        model.load_replay_buffer(buffer)


class TinyRewards(LinearEnv):
    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, 1e-6 * reward, *rest


@pytest.mark.parametrize(("kwargs", "warns"), [({}, True), ({"reward_scale": 1e6}, False)])
def test_tiny_rewards_are_pointed_out(kwargs, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MPG("MlpPolicy", TinyRewards(), horizons=(0, 2), **SMALL, **kwargs).learn(50)
    messages = [str(warning.message) for warning in caught if "reward_scale" in str(warning.message)]
    assert len(messages) == warns and all("to about" in message for message in messages)


def test_target_networks_follow_where_the_policy_is_due():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), policy_delay=2, tau=0.1, **SMALL).learn(50)
    units = model._units()
    for n_updates, share in ((3, 0.0), (4, 0.1)):
        before = copy.deepcopy(model.policy)
        assert model.apply_gradients(model.gradients_of_update(n_updates, 32, units))
        for name in ("actor", "critic"):
            old, new = getattr(before, f"{name}_target"), getattr(model, f"{name}_target")
            network = getattr(model, name)
            assert any(not th.equal(*pair) for pair in zip(network.parameters(), old.parameters(), strict=True))
            for ours, parameter, target in zip(new.parameters(), network.parameters(), old.parameters(), strict=True):
                th.testing.assert_close(ours, th.lerp(target, parameter, share))


class RandomPrior(PriorModel):
    def __init__(self):
        super().__init__()
        self.network = th.nn.Linear(3, 2)

    def transition(self, states, actions):
        return states + self.network(th.cat([states, actions], dim=1))

    def reward(self, states, actions, next_states):
        return -(next_states**2).sum(1, keepdim=True)


def test_the_seed_is_that_of_the_model_too():
    first, second = (MPG("MlpPolicy", LinearEnv(), prior_model=RandomPrior, horizons=(0, 2), **SMALL) for _ in range(2))
    for ours, other in zip(first.rollout_model.parameters(), second.rollout_model.parameters(), strict=True):
        assert th.equal(ours, other)


def test_a_report_under_other_horizons_than_those_that_were_measured(tmp_path):
    MPG("MlpPolicy", LinearEnv(), horizons=(0, 5), **SMALL).learn(80).save(tmp_path / "model.zip")
    rule = make_weighting_rule("measured", (0, 2, 3))
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv(), weighting_rule=rule).learn(80)
    assert {measurement.gradients.horizons for measurement in loaded._measurements} == {(0, 2, 3)}
    assert "3 model steps" in str(loaded.trust_report())


def test_wrappers_that_change_shapes_are_pointed_out():
    with pytest.raises(ValueError, match=r"LinearModel(?s:.*)the environment's own \(prior_model='auto'\)"):
        MPG("MlpPolicy", VecFrameStack(make_vec_env(LinearEnv, 1), 2), **SMALL)


def test_wrappers_that_change_units_are_pointed_out():
    with pytest.warns(UserWarning, match="speaks the units of the environment below it"):
        MPG("MlpPolicy", gym.wrappers.NormalizeReward(LinearEnv()), **SMALL)
    wrapped = gym.wrappers.RescaleAction(LinearEnv(), np.float32(-1), np.float32(1))
    with pytest.warns(UserWarning, match="speaks the units of the environment below it"):
        MPG("MlpPolicy", wrapped, **SMALL)
    # ... but a model that was passed is the user's responsibility
    MPG("MlpPolicy", wrapped, prior_model=LinearEnv().prior_model(), **SMALL)


class TestObservationScaler:
    space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def test_given_factors(self):
        scaler = ObservationScaler(self.space, [1.0, 2.0, 0.5])
        scaler.fit(100 * th.randn(50, 3))
        th.testing.assert_close(scaler(th.ones(2, 3)), th.tensor([[1.0, 2.0, 0.5]] * 2))

    def test_auto_shrinks_and_never_stretches(self):
        scaler = ObservationScaler(self.space)
        observations = th.randn(1000, 3) * th.tensor([100.0, 1e-3, 0.5]) + th.tensor([300.0, 1.0, 0.0])
        scaler.fit(observations)
        features = scaler(observations)
        assert features[:, 0].std().item() == pytest.approx(1, rel=0.01)
        assert features[:, 0].mean().abs() < 1e-3
        th.testing.assert_close(features[:, 1:3], observations[:, 1:])

    def test_fourier_features(self):
        scaler = ObservationScaler(self.space, [1.0, 2.0, 0.5], frequencies=[1.0, 3.0])
        scaled = th.tensor([[1.0, 2.0, 0.5]])
        expected = [scaled, scaled.sin(), scaled.cos(), (3 * scaled).sin(), (3 * scaled).cos()]
        th.testing.assert_close(scaler(th.ones(1, 3)), th.cat(expected, dim=1))
        assert scaler.features_dim == 15
        scaler.fourier_scale.fill_(0.3)
        th.testing.assert_close(scaler(th.ones(1, 3)), th.cat([scaled, *(0.3 * feature for feature in expected[1:])], dim=1))
        assert ObservationScaler(self.space).features_dim == 21
        assert ObservationScaler(self.space, frequencies=()).features_dim == 3

    def test_fourier_features_fade_while_no_model_is_trusted(self, monkeypatch, tmp_path):
        monkeypatch.setattr(mpg, "N_FADING_UPDATES", 10)

        def fourier_scales(model):
            scalers = [module for module in model.policy.modules() if isinstance(module, ObservationScaler)]
            assert len(scalers) == 4
            return [scaler.fourier_scale.item() for scaler in scalers]

        def trained(n_updates, **kwargs):
            return MPG("MlpPolicy", LinearEnv(), **SMALL, **kwargs).learn(40 + n_updates)

        assert fourier_scales(trained(4, horizons=(0,), weighting="constant")) == pytest.approx([0.6] * 4)
        model = trained(20, horizons=(0,), weighting="constant")
        assert fourier_scales(model) == pytest.approx([0.3] * 4)
        model.save(tmp_path / "model.zip")
        assert fourier_scales(MPG.load(tmp_path / "model.zip")) == pytest.approx([0.3] * 4)
        # Without errors to judge by, a model that is used is trusted
        assert fourier_scales(trained(20, horizons=(0, 2), **PAPERS)) == [1.0] * 4

        model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL)
        for weight, n_updates, expected in ((0.6, 3, 1.0), (0.4, 5, 0.5), (0.6, 4, 0.9), (0.6, 9, 1.0), (0.4, 9, 0.3)):
            weights = np.array([1 - weight, weight])
            monkeypatch.setattr(model.weighting_rule, "weights", lambda n_updates, weights=weights: weights)
            for _ in range(n_updates):
                model._fade_waves()
            assert fourier_scales(model) == pytest.approx([expected] * 4)

    def test_every_network_gets_the_same_fit_and_keeps_it(self, tmp_path):
        model = MPG("MlpPolicy", "PathTracking-v0", **SMALL).learn(50)
        scalers = [module for module in model.policy.modules() if isinstance(module, ObservationScaler)]
        assert len(scalers) == 4
        for scaler in scalers:
            assert scaler.scale[5] < 0.1
            assert th.equal(scaler.scale, scalers[0].scale)
        before = scalers[0].scale.clone()
        model.learn(20, reset_num_timesteps=False)
        assert th.equal(before, scalers[0].scale)
        model.save(tmp_path / "model.zip")
        assert th.equal(MPG.load(tmp_path / "model.zip").actor.features_extractor.scale, before)

    def test_parameters_that_are_taken_over_keep_their_scales(self):
        trained = MPG("MlpPolicy", "PathTracking-v0", **SMALL).learn(50)
        warm = MPG("MlpPolicy", "PathTracking-v0", **SMALL)
        warm.set_parameters(trained.get_parameters())
        observations = np.stack([warm.observation_space.sample() for _ in range(5)])
        # One update, of the critics alone
        warm.learn(41)
        assert warm._n_updates == 1
        np.testing.assert_array_equal(*(model.predict(observations, deterministic=True)[0] for model in (warm, trained)))

    def test_it_is_fitted_to_what_the_networks_see(self):
        env = VecNormalize(make_vec_env("PathTracking-v0", 1, seed=0))
        model = MPG("MlpPolicy", env, **SMALL).learn(41)
        scaler = model.actor.features_extractor
        stored = model.replay_buffer.observations[:41, 0]
        # Statistics move on with each step
        seen = (stored - env.obs_rms.mean) / np.sqrt(env.obs_rms.var + env.epsilon)
        std = seen.std(axis=0)
        assert (stored.std(axis=0) > 2).any() and std.max() < 1.2
        np.testing.assert_allclose(scaler.scale, np.where(std > 1, 1 / std, 1), rtol=1e-3)

    def test_wrong_number_of_factors(self):
        with pytest.raises(ValueError, match="each of the 3 elements"):
            ObservationScaler(self.space, [1.0])
        with pytest.raises(ValueError, match="must be 'auto'"):
            ObservationScaler(self.space, "big")


def test_non_finite_gradients_are_skipped_counted_and_explained():
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Breaks, horizons=(0, 5), max_skipped_updates=3, **SMALL, **PAPERS)
    before = copy.deepcopy(model.policy.state_dict())
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(FloatingPointError, match=r"horizon 5.*model step 1") as error,
    ):
        model.learn(200)
    assert "4 updates in a row" in str(error.value)
    assert "horizon 0" not in str(error.value)
    assert model.n_skipped_updates == 4
    for parameter in model.policy.parameters():
        assert th.isfinite(parameter).all()
    for key, value in model.actor.state_dict().items():
        if "features_extractor" not in key:
            assert th.equal(value, before[f"actor.{key}"])


def test_a_single_bad_update_is_passed_over():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), policy_delay=1, **SMALL).learn(45)
    units = model._units()
    batch = model._sample_batch(1, 32, units)
    result = model.compute_gradients(batch, 1, units)
    result.actor[0][0] = float("nan")
    before = [parameter.clone() for parameter in model.policy.parameters()]
    with pytest.warns(UserWarning, match="skipped"):
        assert not model.apply_gradients(result)
    assert all(th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert model.n_skipped_updates == 1
    assert model.apply_gradients(model.compute_gradients(batch, 1, units))
    assert model._n_skipped_in_a_row == 0


@pytest.mark.expensive
def test_learns_the_linear_system():
    env = gym.wrappers.TimeLimit(LinearEnv(), 50)
    model = MPG("MlpPolicy", env, policy_kwargs={"net_arch": [32]}, learning_starts=200, seed=0, horizons=(0, 10)).learn(1500)
    costs = {}
    for name in ("trained", "zero"):
        obs, _ = env.reset(seed=5)
        costs[name], done = 0.0, False
        while not done:
            action = model.predict(obs, deterministic=True)[0] if name == "trained" else np.zeros(1)
            obs, reward, terminated, truncated, _ = env.step(action)
            costs[name] += reward
            done = terminated or truncated
    assert costs["trained"] > 0.8 * costs["zero"]
