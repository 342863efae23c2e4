"""The smoke matrix: every algorithm runs, is saved and loaded on every environment; what it logs and what it warns of."""

import copy
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from lq import LinearEnv
from settings import ALGORITHMS, SMALL
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.torch_layers import ObservationScaler
from sb3_mpg_envs.path_tracking.dynamics import VehicleParameters

pytestmark = pytest.mark.usefixtures("models_are_fitted_once")


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
    assert model.actor.optimizer.param_groups[0]["lr"] == 1e-3
    model.learn(100)
    for progress, fraction in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0)):
        for schedule in (model.lr_schedule, model.critic_learning_rate):
            assert schedule(progress) == pytest.approx(1e-3 + fraction * (1e-5 - 1e-3))
    for network in (model.actor, model.critic):
        assert network.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_many_environments_and_callbacks(tmp_path):
    # The module in the id lets worker processes find the environment
    env = make_vec_env("sb3_mpg_envs:PathTracking-v0", 3, seed=1, vec_env_cls=SubprocVecEnv)
    eval_env = make_vec_env("sb3_mpg_envs:PathTracking-v0", 1, vec_env_cls=SubprocVecEnv)
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


def test_another_environment_brings_its_own_model_and_simulator():
    def heavy(mass):
        return gym.make("PathTracking-v0", vehicle=VehicleParameters(mass=mass))

    def simulator_of(model):
        model.training_inputs(model.batch_size)
        return model.update.simulator

    def n_batches(model):
        return len(model.update.batches.state(model.batch_reuse)["batches"])

    model = MPG("MlpPolicy", heavy(1500.0), value_target="n_step_simulator", batch_reuse=2, **SMALL).learn(50)
    assert simulator_of(model).vehicle.mass == model.rollout_model.prior.vehicle.mass == 1500.0
    assert n_batches(model) == 2
    with pytest.warns(UserWarning, match="learned of another model is forgotten"):
        model.set_env(heavy(3000.0))
    assert simulator_of(model).vehicle.mass == model.rollout_model.prior.vehicle.mass == 3000.0
    assert n_batches(model) == 0
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
