"""Records an environment under random actions."""

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_mpg.common.models.windows import Windows, cut_windows

# Larger bounds are taken for none: many environments write a large number for "unbounded"
LARGEST_BOUND = 1e6
# Of samples of unbounded dimensions, which may have any unit
SIZES = (1.0, 10.0, 1.0, 1000.0)


def check_box(space: spaces.Space, name: str) -> spaces.Box:
    """
    :param space: a space of the environment
    :param name: what it is the space of, for the message
    :return: the space
    :raises TypeError: when it is not a ``Box`` of floats
    """
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise TypeError(f"Prior models need {name} spaces that are a Box of floats, got {space}.")
    return space


def sample_box(box: spaces.Box, n_rows: int, rng: np.random.Generator) -> np.ndarray:
    """
    :param box: a box; its dimensions may be unbounded
    :param n_rows: number of samples
    :param rng: random number generator
    :return: samples, ``(n_rows, *box.shape)``: uniform in bounded dimensions, normal in all others. The standard deviation of
        a row is one of ``SIZES``.
    """
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)
    is_bounded = (low > -LARGEST_BOUND) & (high < LARGEST_BOUND)
    uniform = rng.uniform(np.where(is_bounded, low, 0.0), np.where(is_bounded, high, 1.0), size=(n_rows, *box.shape))
    sizes = np.resize(SIZES, n_rows).reshape(n_rows, *[1] * len(box.shape))
    normal = np.clip(sizes * rng.standard_normal((n_rows, *box.shape)), low, high)
    return np.where(is_bounded, uniform, normal)


def as_vec_env(env: gym.Env | VecEnv | str) -> VecEnv:
    """
    :param env: Gymnasium environment, its id, or ``VecEnv``
    :return: the ``VecEnv`` with raw observations and rewards: the one below ``VecNormalize``, if there is one
    :raises TypeError: when it is no environment
    """
    if isinstance(env, str):
        made = gym.make(env)
        return DummyVecEnv([lambda: made])
    if isinstance(env, gym.Env):
        return DummyVecEnv([lambda: env])
    if not isinstance(env, VecEnv):
        raise TypeError(
            f"Expected a Gymnasium environment, its id or a VecEnv of Stable-Baselines3, got {type(env).__name__}."
        )
    inner: VecEnv | None = env
    while inner is not None:
        if isinstance(inner, VecNormalize):
            # Models use raw observations and rewards, and a check must not update the statistics
            return inner.venv
        inner = getattr(inner, "venv", None)
    return env


def record_windows(venv: VecEnv, horizon: int, n_samples: int, seed: int, device: th.device) -> Windows:
    """
    Step the environment with uniformly random actions.

    :param venv: the environment
    :param horizon: largest number of steps of a window
    :param n_samples: number of steps to record
    :param seed: of the environment and the actions
    :param device: device of the windows
    :return: one window for each step
    """
    action_box = check_box(venv.action_space, "action")
    rng = np.random.default_rng(seed)
    n_steps = max(-(-n_samples // venv.num_envs), 2)
    # Reset within long episodes, so that several start states are recorded
    max_segment = min(4 * horizon, max(n_steps // 4, 2 * horizon))
    venv.seed(seed)
    observations = np.array(venv.reset())
    records: dict[str, list[np.ndarray]] = {
        name: [] for name in ("observations", "actions", "next_observations", "rewards", "terminated", "ends")
    }
    for step in range(1, n_steps + 1):
        actions = sample_box(action_box, venv.num_envs, rng).astype(action_box.dtype)
        next_observations, rewards, dones, infos = venv.step(actions)
        final_observations, ends = np.array(next_observations), np.array(dones)
        for idx in np.flatnonzero(dones):
            final_observations[idx] = infos[idx]["terminal_observation"]
        terminated = np.array(
            [done and not info.get("TimeLimit.truncated", False) for done, info in zip(dones, infos, strict=True)]
        )
        if step % max_segment == 0 or step == n_steps:
            next_observations, ends = venv.reset(), np.ones_like(ends)
        for name, values in zip(records, (observations, actions, final_observations, rewards, terminated, ends), strict=True):
            records[name].append(np.array(values))
        observations = np.array(next_observations)
    return cut_windows({name: np.stack(values) for name, values in records.items()}, horizon, device)
