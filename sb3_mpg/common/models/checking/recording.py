"""Records an environment under random actions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_mpg.common.models.terminations import steps_of_episodes
from sb3_mpg.common.models.windows import Windows, cut_windows
from sb3_mpg.common.spaces import FlatObservations, TupleAsDict, check_kind_of_env, check_spaces

# Larger bounds are taken for none: many environments write a large number for "unbounded"
LARGEST_BOUND = 1e6


def sample_box(box: spaces.Box, n_rows: int, rng: np.random.Generator, size: float = 1.0) -> np.ndarray:
    """
    :param box: a box; its dimensions may be unbounded
    :param n_rows: number of samples
    :param rng: random number generator
    :param size: standard deviation in unbounded dimensions
    :return: samples, ``(n_rows, *box.shape)``: uniform in bounded dimensions, normal in all others
    """
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)
    is_bounded = (low > -LARGEST_BOUND) & (high < LARGEST_BOUND)
    uniform = rng.uniform(np.where(is_bounded, low, 0.0), np.where(is_bounded, high, 1.0), size=(n_rows, *box.shape))
    normal = np.clip(size * rng.standard_normal((n_rows, *box.shape)), low, high)
    return np.where(is_bounded, uniform, normal)


def as_vec_env(env: gym.Env | VecEnv | str) -> VecEnv:
    """
    :param env: Gymnasium environment, its id, or ``VecEnv``
    :return: the ``VecEnv`` with raw observations and rewards: the one below ``VecNormalize``, if there is one. Observations
        are a ``Box`` or a ``Dict`` of boxes.
    :raises TypeError: when it is no environment
    :raises ValueError: when its spaces are not supported
    """
    if isinstance(env, str):
        env = gym.make(env)
    check_kind_of_env(env)
    if not isinstance(env, (gym.Env, VecEnv)):
        raise TypeError(
            f"Expected a Gymnasium environment, its id or a VecEnv of Stable-Baselines3, got {type(env).__name__}."
        )
    check_spaces(env.observation_space, env.action_space)
    venv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    inner: VecEnv | None = venv
    while inner is not None:
        if isinstance(inner, VecNormalize):
            # Models use raw observations and rewards, and a check must not update the statistics
            venv = inner.venv
            break
        inner = getattr(inner, "venv", None)
    return TupleAsDict(venv) if isinstance(venv.observation_space, spaces.Tuple) else venv


class Recording(NamedTuple):
    """
    :param windows: one window for each step, ``B`` of them
    :param steps: number of the first step of each window in its episode, from 1, ``(B,)``
    """

    windows: Windows
    steps: np.ndarray


def finite_part(recording: Recording) -> Recording:
    """
    :param recording: recorded windows
    :return: those without observations or rewards that are not finite
    """
    windows = recording.windows
    flat = th.cat([windows.next_observations, windows.rewards], dim=2).transpose(0, 1).flatten(1)
    is_finite = th.isfinite(th.cat([windows.observations, flat], dim=1)).all(dim=1).cpu().numpy()
    return Recording(windows.select(is_finite), recording.steps[is_finite])


def record_steps(venv: VecEnv, horizon: int, n_samples: int, seed: int, device: th.device) -> Recording:
    """
    Step the environment with uniformly random actions.

    :param venv: the environment, of :func:`as_vec_env`
    :param horizon: largest number of steps of a window
    :param n_samples: number of steps to record
    :param seed: of the environment and the actions
    :param device: device of the windows
    :return: one window for each step
    """
    action_box: spaces.Box = venv.action_space  # type: ignore[assignment]  # see `as_vec_env`
    flatten: Callable[[Any], np.ndarray] = FlatObservations(venv.observation_space).gather
    rng = np.random.default_rng(seed)
    n_steps = max(-(-n_samples // venv.num_envs), 2)
    # Reset within long episodes, so that several start states are recorded
    max_segment = min(4 * horizon, max(n_steps // 4, 2 * horizon))
    venv.seed(seed)
    observations = flatten(venv.reset())
    records: dict[str, list[np.ndarray]] = {
        name: [] for name in ("observations", "actions", "next_observations", "rewards", "terminated", "ends")
    }
    for step in range(1, n_steps + 1):
        actions = sample_box(action_box, venv.num_envs, rng).astype(action_box.dtype)
        next_observations, rewards, dones, infos = venv.step(actions)
        final_observations, ends = flatten(next_observations).copy(), np.array(dones)
        for idx in np.flatnonzero(dones):
            final_observations[idx] = flatten(infos[idx]["terminal_observation"])
        terminated = np.array(
            [done and not info.get("TimeLimit.truncated", False) for done, info in zip(dones, infos, strict=True)]
        )
        if step % max_segment == 0 or step == n_steps:
            next_observations, ends = venv.reset(), np.ones_like(ends)
        flat_actions = actions.reshape(venv.num_envs, -1)
        for name, values in zip(
            records, (observations, flat_actions, final_observations, rewards, terminated, ends), strict=True
        ):
            records[name].append(np.array(values))
        observations = flatten(next_observations)
    arrays = {name: np.stack(values) for name, values in records.items()}
    return Recording(cut_windows(arrays, horizon, device), steps_of_episodes(arrays["ends"]).reshape(-1))
