"""What `HerReplayBuffer` needs of the environment is told before the first step, and it follows the environment."""

import copy

import gymnasium as gym
import numpy as np
import pytest
from goals import N_STEPS, GoalEnv
from settings import SMALL
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_mpg import MPG


def make(env=None, policy="MultiInputPolicy", **kwargs):
    env = GoalEnv() if env is None else env
    settings = {"horizons": (0, 2), "replay_buffer_class": HerReplayBuffer, **SMALL, **kwargs}
    return MPG(policy, env, **settings)


def with_reward(compute_reward):
    """A goal environment that computes the rewards of batches in this way."""
    env = GoalEnv()
    env.compute_reward = compute_reward
    return env


class OtherKeys(GoalEnv):
    def __init__(self, keys):
        super().__init__()
        self.observation_space = gym.spaces.Dict(dict(zip(keys, self.observation_space.spaces.values(), strict=True)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("env", "policy"),
        [
            (GoalEnv("flat"), "MlpPolicy"),
            (GoalEnv("tuple"), "MultiInputPolicy"),
            (OtherKeys(["achieved", "desired", "observation"]), "MultiInputPolicy"),
            # The goal has one element, what was achieved has two
            (OtherKeys(["desired_goal", "observation", "achieved_goal"]), "MultiInputPolicy"),
        ],
        ids=["Box", "Tuple", "other keys", "other shapes"],
    )
    def test_observations_without_goals(self, env, policy):
        with pytest.raises(ValueError, match=r"the keys 'achieved_goal' and 'desired_goal', both of one shape, got .*Box"):
            make(env, policy)

    def test_an_unknown_strategy(self):
        with pytest.raises(ValueError, match=r"must be one of \['future', 'final', 'episode'\], got 'best'"):
            make(replay_buffer_kwargs={"goal_selection_strategy": "best"})

    @pytest.mark.parametrize(
        ("compute_reward", "message"),
        [
            (None, "failed with TypeError: 'NoneType' object is not callable"),
            (lambda achieved, desired, info: -float(np.abs(achieved - desired).sum()), r"it returned float, expected \(3,\)"),
            # Of one goal, not of a batch
            (lambda achieved, desired, info: -np.abs(achieved[0] - desired[0]), r"the shape \(1,\), expected \(3,\)"),
            (lambda achieved, desired, info: np.ones((len(info), 2)), r"the shape \(3, 2\), expected \(3,\)"),
            (lambda achieved, desired, info: info[0]["scale"] * np.ones(3), r"empty infos it failed with KeyError: 'scale'"),
        ],
        ids=["None", "float", "one goal", "table", "infos"],
    )
    def test_rewards_that_are_not_those_of_a_batch(self, compute_reward, message):
        model = make(with_reward(compute_reward))
        with pytest.raises(ValueError, match=rf"compute_reward\(.*, but for goals of the shape \(3, 1\).*{message}"):
            model.learn(60)
        assert model.num_timesteps == 0

    def test_no_rewards_at_all(self):
        class Env(gym.Env):
            observation_space, action_space = GoalEnv().observation_space, GoalEnv().action_space
            prior_model, reset = GoalEnv.prior_model, lambda self, **kwargs: (self.observation_space.sample(), {})

        with pytest.raises(ValueError, match=r"compute_reward.*but it has no such method"):
            make(Env()).learn(60)

    def test_infos_reach_the_rewards(self):
        """Those of steps are not known before the first one."""

        class Env(GoalEnv):
            def compute_reward(self, achieved_goal, desired_goal, info):
                # A step of the environment gives no list
                factor = 1.0 if isinstance(info, dict) else np.array([of_step["factor"] for of_step in info])
                return factor * super().compute_reward(achieved_goal, desired_goal, info)

            def step(self, action):
                *others, _ = super().step(action)
                return *others, {"factor": 100.0}

        model = make(Env(), replay_buffer_kwargs={"copy_info_dict": True}).learn(60)
        assert model.replay_buffer.rewards.min() > -6
        assert model.replay_buffer.sample(100).rewards.min() < -6

    def test_several_recorded_steps(self):
        with pytest.raises(ValueError, match="a value target of 3 recorded steps for a Box of observations only"):
            make(n_steps=3)

    def test_classes_of_other_observations(self):
        with pytest.raises(ValueError, match=r"support an NStepReplayBuffer for a Box of observations only, got Dict"):
            make(replay_buffer_class=NStepReplayBuffer)
        with pytest.raises(
            TypeError, match="must be a class of replay buffers, or None for SB3's choice, got 'HerReplayBuffer'"
        ):
            make(replay_buffer_class="HerReplayBuffer")


class TestFirstUpdate:
    """Steps can get new goals once their episode is finished."""

    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_a_late_end_is_warned_of(self, n_envs):
        env = make_vec_env(lambda: gym.wrappers.TimeLimit(GoalEnv(), N_STEPS), n_envs)
        model = make(env, learning_starts=(N_STEPS - 1) * n_envs - 1)
        message = rf"begin after {N_STEPS - 1} steps.*up to {N_STEPS}: set `learning_starts` to {N_STEPS * n_envs} or more"
        with pytest.warns(UserWarning, match=message), pytest.raises(RuntimeError, match="end of the first episode"):
            model.learn(N_STEPS * n_envs)
        assert make(env, learning_starts=(N_STEPS - 1) * n_envs).learn((N_STEPS + 1) * n_envs)._n_updates > 0

    def test_training_goes_on_without_its_buffer(self, tmp_path):
        env = gym.wrappers.TimeLimit(GoalEnv(), N_STEPS)
        model = make(env).learn(60)
        model.save(tmp_path / "model.zip")
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        loaded = MPG.load(tmp_path / "model.zip", env=env)
        with pytest.warns(UserWarning, match="begin after 1 steps.*to 80 or more, or load a replay buffer"):
            with pytest.raises(RuntimeError, match="end of the first episode"):
                loaded.learn(30, reset_num_timesteps=False)
        loaded = MPG.load(tmp_path / "model.zip", env=env)
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
        assert loaded.learn(30, reset_num_timesteps=False).num_timesteps == 90

    def test_no_warning_where_updates_follow_episodes(self):
        env = gym.wrappers.TimeLimit(GoalEnv(), N_STEPS)
        assert make(env, learning_starts=0, train_freq=(1, "episode")).learn(2 * N_STEPS)._n_updates == 2


class TestEnvironment:
    """The buffer computes rewards with the environment of the algorithm."""

    @pytest.mark.parametrize("normalised", [False, True])
    def test_a_copy_goes_on(self, normalised):
        env = make_vec_env(GoalEnv, 1)
        model = make(VecNormalize(env) if normalised else env).learn(60)
        clone = copy.deepcopy(model)
        if normalised:
            clone.set_env(model.get_env())
        assert clone.learn(30, reset_num_timesteps=False).num_timesteps == 90
        assert clone.replay_buffer.env is clone.env

    def test_it_is_replaced(self):
        env = make_vec_env(GoalEnv, 2, vec_env_cls=SubprocVecEnv)
        model = make(env).learn(60)
        env.close()
        model.set_env(make_vec_env(GoalEnv, 2))
        assert model.learn(20, reset_num_timesteps=False).num_timesteps == 80

    def test_it_is_replaced_while_training(self):
        class Replace(BaseCallback):
            def _on_step(self):
                if self.n_calls == 50:
                    self.model.set_env(make_vec_env(GoalEnv, 1), force_reset=False)
                    self.model.env.reset()
                    assert self.model.replay_buffer.env is self.model.env
                return True

        assert make().learn(60, callback=Replace()).num_timesteps == 60
