"""VecNormalize: the buffer holds raw values, and networks get normalised ones."""

import numpy as np
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


def check_exchange_of_environments(case, make_env, **kwargs):
    env = VecNormalize(make_vec_env(make_env, 1), clip_obs=10.0, clip_reward=10.0)
    eval_env = VecNormalize(make_vec_env(make_env, 1), training=False, norm_reward=False)
    model = case.make(env, **kwargs)
    assert model.get_vec_normalize_env() is env
    model.set_env(eval_env)
    assert model.get_vec_normalize_env() is eval_env
    model.learn(5)
    model.set_env(env)
    assert model.get_vec_normalize_env() is env
    return model.learn(24)


def test_environments_are_exchanged(any_case):
    model = check_exchange_of_environments(any_case, any_case.env)
    assert model._n_updates == 14


def test_goal_environments_are_exchanged(case):
    model = check_exchange_of_environments(
        case,
        case.goal_env,
        policy="MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 2},
    )
    assert model._n_updates == 14


def test_the_buffer_is_raw_and_the_networks_are_not(case):
    env = VecNormalize(make_vec_env(case.env, 2, seed=0))
    model = case.make(env).learn(40)
    buffer, newest = model.replay_buffer, env.get_original_obs()
    np.testing.assert_array_equal(buffer.next_observations[buffer.pos - 1], newest)
    np.testing.assert_array_equal(buffer.rewards[buffer.pos - 1], env.get_original_reward())
    everything = np.concatenate([buffer.observations[: buffer.pos].reshape(-1, 2), newest])
    np.testing.assert_allclose(env.obs_rms.mean, everything.mean(axis=0), atol=1e-3)
    # The next action is that of the normalised observation
    expected, seen = env.normalize_obs(newest), []
    model.actor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().cpu().numpy().copy()))
    model.learn(2, reset_num_timesteps=False)
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5)
    assert np.abs(expected - newest).max() > 0.1
