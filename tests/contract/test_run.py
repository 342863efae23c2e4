"""Training: how often, with which noise, with how many critics and environments."""

import copy

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import SubprocVecEnv


def test_all_networks_move(any_case):
    model = any_case.make()
    initial = copy.deepcopy(model.policy.state_dict())
    assert model.learn(26, log_interval=1) is model
    assert model.num_timesteps == 26 and model._n_updates == 16
    moved = {name for name, tensor in model.policy.state_dict().items() if not th.equal(tensor, initial[name])}
    for network in ("actor", "actor_target", "critic", "critic_target"):
        assert any(name.startswith(f"{network}.") for name in moved), network
    log = model.logger.name_to_value
    assert log["train/n_updates"] == 16
    for key in ("train/actor_loss", "train/critic_loss", "train/learning_rate"):
        assert np.isfinite(log[key]), key


@pytest.mark.parametrize(
    ("noise", "last"),
    [
        (NormalActionNoise(np.full(1, 0.5), np.full(1, 1e-9)), 0.5),
        # It starts at zero and tends to its mean
        (OrnsteinUhlenbeckActionNoise(np.full(1, 0.5), np.full(1, 1e-9), theta=0.15, dt=1.0), 0.5 * (1 - 0.85**10)),
    ],
)
def test_action_noise(case, noise, last):
    model = case.make(action_noise=noise, learning_starts=0, gradient_steps=0).learn(10)
    assert model.action_noise is noise and model._n_updates == 0
    buffer = model.replay_buffer
    without = model.policy.scale_action(model.predict(buffer.observations[:10, 0], deterministic=True)[0])
    assert (buffer.actions[:10, 0] - without)[-1] == pytest.approx(last, abs=1e-3)


@pytest.mark.parametrize("n_critics", [1, 3])
def test_number_of_critics(case, n_critics):
    model = case.make(policy_kwargs={"net_arch": [8], "n_critics": n_critics})
    assert len(model.critic.q_networks) == len(model.critic_target.q_networks) == n_critics
    if n_critics < case.n_critics:
        with pytest.raises(ValueError, match="critic"):
            model.learn(14)
        assert model.num_timesteps == 0
    else:
        assert model.learn(14)._n_updates == 4


@pytest.mark.parametrize(("train_freq", "n_updates"), [(4, 3), ((4, "step"), 3), ((1, "episode"), 2)])
def test_train_freq(case, tmp_path, train_freq, n_updates):
    model = case.make(case.env(max_steps=8), train_freq=train_freq).learn(20)
    # Whole rollouts are collected, and trained on after `learning_starts`
    assert model._n_updates == n_updates
    model.save(tmp_path / "model.zip")
    for kwargs in ({}, {"train_freq": train_freq}):
        loaded = case.cls.load(tmp_path / "model.zip", env=model.get_env(), **kwargs).learn(20)
        assert loaded._n_updates == 2 * n_updates
        assert loaded.train_freq == model.train_freq


@pytest.mark.parametrize("train_freq", ["4", ("1", "episode"), "episode", (1, "update")])
def test_impossible_train_freq(case, train_freq):
    with pytest.raises(ValueError, match="`train_freq` must be"):
        case.make(train_freq=train_freq)


@pytest.mark.parametrize("vec_env_cls", [None, SubprocVecEnv])
def test_many_environments(case, vec_env_cls):
    env = make_vec_env(lambda: case.env(max_steps=4), 2, vec_env_cls=vec_env_cls)
    model = case.make(env, train_freq=5, action_noise=NormalActionNoise(np.zeros(1), np.ones(1))).learn(30)
    assert isinstance(model.action_noise, VectorizedActionNoise)
    # One update after each rollout of five steps in both environments, but for the first
    assert model.num_timesteps == 30 and model._n_updates == 2
    rows = slice(0, model.replay_buffer.size())
    np.testing.assert_array_equal(np.flatnonzero(model.replay_buffer.timeouts[rows].all(axis=1)), [3, 7, 11])
    env.close()


def test_as_many_updates_as_transitions(any_case):
    env = make_vec_env(any_case.env, 2)
    model = any_case.make(env, train_freq=3, gradient_steps=-1, learning_starts=0).learn(6)
    assert model.logger.name_to_value["train/n_updates"] == 6


def test_environment_by_name(case):
    assert case.make("LinearSystem-v0").learn(14)._n_updates == 4


def test_the_device_of_networks_and_buffer(case):
    for device in ("auto", "cpu"):
        model = case.make(device=device)
        assert model.policy.device == model.device == model.replay_buffer.device == get_device(device)
