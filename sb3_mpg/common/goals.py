"""What a ``HerReplayBuffer``, which gives recorded steps new goals, needs of the environment."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.goal_selection_strategy import KEY_TO_GOAL_STRATEGY, GoalSelectionStrategy
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mpg.common.checks import warn_of_late_goals
from sb3_mpg.common.spaces import shape_of

GOAL_KEYS = ("achieved_goal", "desired_goal")


def check_goals(
    replay_buffer_class: type[ReplayBuffer] | None, kwargs: dict[str, Any], observation_space: spaces.Space
) -> None:
    """
    :param replay_buffer_class: class of the replay buffer, ``None`` if SB3 chooses it
    :param kwargs: its arguments
    :param observation_space: observation space of the algorithm
    :raises ValueError: when it gives steps new goals, which the observations do not have, in an unknown way
    """
    if replay_buffer_class is None or not issubclass(replay_buffer_class, HerReplayBuffer):
        return
    parts = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
    shapes = [shape_of(parts[key]) if key in parts else None for key in GOAL_KEYS]
    if None in shapes or shapes[0] != shapes[1]:
        raise ValueError(
            f"A {replay_buffer_class.__name__} puts what was achieved in the place of what was desired: observations must be "
            f"a Dict with the keys {' and '.join(map(repr, GOAL_KEYS))}, both of one shape, got {observation_space}; rename "
            "the keys, or leave `replay_buffer_class` at None."
        )
    strategy = kwargs.get("goal_selection_strategy", "future")
    if not isinstance(strategy, GoalSelectionStrategy) and str(strategy).lower() not in KEY_TO_GOAL_STRATEGY:
        raise ValueError(f"`goal_selection_strategy` must be one of {list(KEY_TO_GOAL_STRATEGY)}, got {strategy!r}.")


def follow_env(buffer: ReplayBuffer, env: VecEnv | None) -> None:
    """
    Let the buffer compute rewards with the environment of the algorithm. It keeps that of its creation, or none in a copy.

    :param buffer: the replay buffer
    :param env: the environment
    """
    if isinstance(buffer, HerReplayBuffer) and env is not None:
        buffer.env = env


def prepare_goals(algorithm: Any) -> None:
    """
    Before the first environment step, check that steps can get new goals.

    :param algorithm: the algorithm, whose environment was reset
    :raises ValueError: when the environment does not compute the rewards of a batch of goals
    """
    buffer = algorithm.replay_buffer
    if not isinstance(buffer, HerReplayBuffer):
        return
    if buffer.size() == 0:
        check_rewards(buffer, algorithm.env, algorithm._last_original_obs or algorithm._last_obs)
    if algorithm.train_freq.unit == TrainFrequencyUnit.STEP and not buffer.ep_length.any():
        warn_of_late_goals(algorithm.env, algorithm.num_timesteps, algorithm.learning_starts)


def check_rewards(buffer: HerReplayBuffer, env: VecEnv, observations: dict[str, np.ndarray]) -> None:
    """
    :param buffer: the replay buffer
    :param env: the environment
    :param observations: raw observations of each environment, of which goals are taken
    :raises ValueError: when the environment has no method ``compute_reward``, or one that does not take a batch
    """
    expected = "HerReplayBuffer asks the environment for compute_reward(achieved_goals, desired_goals, infos) of a batch"
    if not env.has_attr("compute_reward"):
        raise ValueError(f"{expected}, but it has no such method; write it, or take another replay buffer.")
    if buffer.copy_info_dict:
        # There are no infos of steps yet
        return
    # No number of elements of a goal
    n_rows = observations["achieved_goal"][0].size + 2
    goals = [np.repeat(observations[key][:1], n_rows, axis=0) for key in GOAL_KEYS]
    shapes = f"goals of the shape {goals[0].shape}"
    try:
        rewards = env.env_method("compute_reward", *goals, [{} for _ in range(n_rows)], indices=[0])[0]
    except Exception as error:
        raise ValueError(
            f"{expected}, but for {shapes} and empty infos it failed with {type(error).__name__}: {error}; compute a reward "
            "for each row, and let `replay_buffer_kwargs` be {'copy_info_dict': True} if infos are needed."
        ) from error
    if not isinstance(rewards, np.ndarray) or rewards.shape not in ((n_rows,), (n_rows, 1)):
        got = f"the shape {rewards.shape}" if isinstance(rewards, np.ndarray) else type(rewards).__name__
        raise ValueError(f"{expected}, but for {shapes} it returned {got}, expected {(n_rows,)}; compute one for each row.")
