"""The papers' settings (Table VI of the first version and the authors' scales) and their evaluation, for all scripts here."""

import importlib
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, NStepADP, NStepDPG


@dataclass(frozen=True)
class Task:
    """
    :param env_id: id of the environment
    :param vec_env: path of the ``VecEnv`` class that runs many agents in one process
    :param steps: steps of an evaluation, without resets
    :param observation_scale: what the networks see of each dimension
    :param reward_scale: factor of the rewards
    :param weighting_updates: T of the papers' weighting rule
    :param goals: returns whose first crossing is reported
    """

    env_id: str
    vec_env: str
    steps: int
    observation_scale: tuple[float, ...]
    reward_scale: float
    weighting_updates: int
    goals: tuple[float, ...]


TASKS = {
    "path_tracking": Task(
        "PathTracking-v0",
        "sb3_mpg_envs.path_tracking.vec_env:PathTrackingVecEnv",
        200,
        (1.0, 1.0, 2.0, 1.0, 2.4, 1 / 1200),
        0.01,
        9000,
        (-100.0, -30.0, -10.0, -5.0),
    ),
    "pendulum": Task(
        "InvertedPendulumConti-v0",
        "sb3_mpg_envs.inverted_pendulum.vec_env:InvertedPendulumContiVecEnv",
        100,
        (0.001, 1 / 3, 0.1, 0.5),
        1.0,
        4000,
        (-20.0, -2.0, -0.1, -0.01),
    ),
}

ALGORITHMS: dict[str, tuple[type[MPG], dict[str, Any]]] = {
    "mpg_v1": (MPG, {"value_target": "n_step_simulator", "batch_reuse": 10}),
    # Table VI but for the reuse of batches, which saves time at the price of a critic that knows too few of them
    "mpg_v1_exploring_starts": (MPG, {"value_target": "n_step_simulator"}),
    "mpg_v2": (MPG, {"value_target": "clipped_double_q"}),
    "data_driven": (MPG, {"horizons": (0,), "weighting": "constant"}),
    "n_step_dpg": (NStepDPG, {}),
    "n_step_adp": (NStepADP, {}),
}

# Arguments of the environment that an algorithm learns in. Exploring starts: every transition is the first of an episode, as
# in the replay buffer of the authors' code, whose early reset ends every episode after its first step
ENV_SETTINGS: dict[str, dict[str, Any]] = {"mpg_v1_exploring_starts": {"max_episode_steps": 1}}


def make_vec_env(task: Task, n_envs: int, **env_kwargs: Any) -> VecEnv:
    """
    :param task: the task
    :param n_envs: number of agents, all in this process
    :param env_kwargs: arguments of the environment
    :return: the agents as one ``VecEnv``
    """
    module, name = task.vec_env.split(":")
    return getattr(importlib.import_module(module), name)(n_envs, **env_kwargs)


def make_model(algorithm: str, task: Task, env: VecEnv, seed: int, **kwargs: Any) -> MPG:
    """
    :param algorithm: a key of ``ALGORITHMS``
    :param task: the task
    :param env: where to learn
    :param seed: seed of everything random
    :param kwargs: changes of the settings
    :return: the algorithm with the papers' settings
    """
    cls, settings = ALGORITHMS[algorithm]
    settings = {"learning_starts": 3000, **settings}
    if cls is MPG and "weighting" not in settings:
        settings["weighting"], settings["residual"] = "rule_based", False
        settings["weighting_kwargs"] = {"eta": 0.1, "total_updates": task.weighting_updates}
    return cls(
        "MlpPolicy",
        env,
        reward_scale=task.reward_scale,
        policy_kwargs={"features_extractor_kwargs": {"scale": list(task.observation_scale)}},
        seed=seed,
        device="cpu",
        **{**settings, **kwargs},
    )


def evaluate(model: BaseAlgorithm, task: Task, n_starts: int = 20, seed: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """
    The papers' evaluation: no exploration noise, no early resets, a fixed number of steps, from fixed starts.

    :param model: what is evaluated
    :param task: the task
    :param n_starts: number of episodes, run side by side
    :param seed: seed of the starts
    :return: returns ``(n_starts,)`` and observations ``(steps + 1, n_starts, O)``
    """
    env = gym.make(task.env_id, early_reset=False)
    simulator = env.get_wrapper_attr("make_simulator")(n_starts)
    env.close()
    simulator.seed(seed)
    observations = [simulator.reset()]
    returns = np.zeros(n_starts)
    for _ in range(task.steps):
        with th.no_grad():
            actions, _ = model.predict(observations[-1], deterministic=True)
        new_obs, rewards, _, _ = simulator.step(actions)
        observations.append(new_obs)
        returns += rewards
    return returns, np.stack(observations)
