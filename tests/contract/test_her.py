"""Hindsight experience replay in a goal environment."""

import copy

import numpy as np
import pytest
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import SubprocVecEnv
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy


def make(case, env=None, n_envs=1, **kwargs):
    env = make_vec_env(case.goal_env, n_envs, seed=0) if env is None else env
    replay_buffer_kwargs = {"n_sampled_goal": 2, **kwargs.pop("replay_buffer_kwargs", {})}
    return case.make(
        env,
        "MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=replay_buffer_kwargs,
        **{"train_freq": 4, "learning_starts": 12, **kwargs},
    )


def test_it_learns_and_is_evaluated(any_case):
    model = make(any_case, gradient_steps=2, replay_buffer_kwargs={"copy_info_dict": True}).learn(24)
    assert model._n_updates == 2 * 3
    mean_reward, _ = evaluate_policy(model, make_vec_env(any_case.goal_env, 1), n_eval_episodes=2)
    assert np.isfinite(mean_reward)
    assert len(model.ep_success_buffer) == 3


def test_success_is_evaluated(case, tmp_path):
    model = make(case)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    callback = EvalCallback(make_vec_env(case.goal_env, 2), eval_freq=12, n_eval_episodes=4, log_path=tmp_path, verbose=0)
    model.learn(24, callback=callback)
    model.logger.close()
    logged = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True)["evalsuccess_rate"]
    with np.load(tmp_path / "evaluations.npz") as evaluations:
        successes = evaluations["successes"]
    assert successes.shape == (2, 4)
    np.testing.assert_array_equal(logged[np.isfinite(logged)], successes.mean(axis=1))


@pytest.mark.parametrize("strategy", ["final", "episode", "future", *GoalSelectionStrategy])
def test_strategies(case, strategy):
    model = make(case, n_envs=2, replay_buffer_kwargs={"goal_selection_strategy": strategy}, learning_starts=16)
    assert isinstance(model.replay_buffer.goal_selection_strategy, GoalSelectionStrategy)
    assert model.learn(24)._n_updates == 1


def test_environments_in_processes(case):
    env = make_vec_env(case.goal_env, 2, vec_env_cls=SubprocVecEnv)
    assert make(case, env, learning_starts=16).learn(24)._n_updates == 1
    env.close()


def test_save_load(case, tmp_path):
    model = make(case, n_envs=2, learning_starts=16).learn(24)
    model.policy.load_state_dict({name: th.rand_like(tensor) for name, tensor in model.policy.state_dict().items()})
    observations = model.get_env().reset()
    actions, _ = model.predict(observations, deterministic=True)
    model.save(tmp_path / "model.zip")
    loaded = case.cls.load(tmp_path / "model.zip", env=model.get_env(), learning_rate=0.5)
    assert loaded.learning_rate == 0.5
    np.testing.assert_allclose(loaded.predict(observations, deterministic=True)[0], actions, rtol=1e-4)
    assert loaded.learn(24)._n_updates == 2


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("truncate_last_traj", [False, True])
def test_the_replay_buffer(case, tmp_path, n_envs, truncate_last_traj):
    model = make(case, n_envs=n_envs, learning_starts=8 * n_envs).learn(20 * n_envs)
    old = copy.deepcopy(model.replay_buffer)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    del model.replay_buffer
    if truncate_last_traj:
        with pytest.warns(UserWarning, match="The last trajectory in the replay buffer will be truncated"):
            model.load_replay_buffer(tmp_path / "buffer.pkl", truncate_last_traj=True)
    else:
        model.load_replay_buffer(tmp_path / "buffer.pkl", truncate_last_traj=False)
    new = model.replay_buffer
    assert new.pos == old.pos == 20
    for key in ("observation", "desired_goal", "achieved_goal"):
        np.testing.assert_array_equal(new.observations[key][:20], old.observations[key][:20])
        np.testing.assert_array_equal(new.next_observations[key][:20], old.next_observations[key][:20])
    for name in ("actions", "rewards"):
        np.testing.assert_array_equal(getattr(new, name)[:20], getattr(old, name)[:20])
    # The last step may have been made the end of its episode
    np.testing.assert_array_equal(new.dones[:19], old.dones[:19])
    n_updates = model._n_updates
    assert model.learn(20 * n_envs, reset_num_timesteps=truncate_last_traj)._n_updates > n_updates


def test_a_full_buffer(case):
    model = make(case, n_envs=2, buffer_size=40, learning_starts=16).learn(120)
    assert model.replay_buffer.full and model._n_updates == 13
