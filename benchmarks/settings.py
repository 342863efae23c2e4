"""The tasks, and the papers' settings: Table VI of the first version, and the scales of the authors' code."""

import importlib
from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, NStepADP, NStepDPG
from sb3_mpg.mpg.mpg import ACTOR_LEARNING_RATE, CRITIC_LEARNING_RATE


@dataclass(frozen=True)
class Task:
    """
    :param env_id: id of the environment
    :param vec_env: path of the ``VecEnv`` class that runs many agents in one process
    :param steps: number of steps of an evaluation, which has no early resets
    :param observation_scale: factors on the observations, for the networks
    :param reward_scale: factor on the rewards
    :param weighting_updates: T of the papers' weighting rule
    :param goals: goals of the papers' settings: the first evaluation above each is reported
    :param default_goals: goals of the default settings
    """

    env_id: str
    vec_env: str
    steps: int
    observation_scale: tuple[float, ...]
    reward_scale: float
    weighting_updates: int
    goals: tuple[float, ...]
    default_goals: tuple[float, float]


TASKS = {
    "path_tracking": Task(
        "PathTracking-v0",
        "sb3_mpg_envs.path_tracking.vec_env:PathTrackingVecEnv",
        200,
        (1.0, 1.0, 2.0, 1.0, 2.4, 1 / 1200),
        0.01,
        9000,
        (-100.0, -30.0, -10.0, -5.0),
        (-10.0, -5.0),
    ),
    "pendulum": Task(
        "InvertedPendulumConti-v0",
        "sb3_mpg_envs.inverted_pendulum.vec_env:InvertedPendulumContiVecEnv",
        100,
        (0.001, 1 / 3, 0.1, 0.5),
        1.0,
        4000,
        (-20.0, -2.0, -0.1, -0.01),
        (-0.1, -0.01),
    ),
}

ALGORITHMS: dict[str, tuple[type[MPG], dict[str, Any]]] = {
    "mpg_v1": (MPG, {"value_target": "n_step_simulator", "batch_reuse": 10}),
    # Table VI, except that each batch is used once. Reused batches save time, but the critic overfits to them
    "mpg_v1_exploring_starts": (MPG, {"value_target": "n_step_simulator"}),
    "mpg_v2": (MPG, {"value_target": "clipped_double_q", "value_target_kwargs": {"noise_std": 0.0}}),
    "data_driven": (MPG, {"horizons": (0,), "weighting": "constant"}),
    "n_step_dpg": (NStepDPG, {}),
    "n_step_adp": (NStepADP, {}),
}

# Number of starts of an evaluation of the default settings
N_STARTS = 50

# Arguments of the environment of an algorithm. With exploring starts, every transition is the first of an episode. The replay
# buffer of the authors' code holds the same, because its early reset ends every episode after the first step
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
    :param env: environment to learn in
    :param seed: seed
    :param kwargs: settings that differ
    :return: the algorithm with the papers' settings
    """
    cls, settings = ALGORITHMS[algorithm]
    rates = {"learning_rate": ACTOR_LEARNING_RATE, "critic_learning_rate": CRITIC_LEARNING_RATE}
    settings = {"learning_starts": 3000, "gamma": 0.98, "tau": 0.005, **rates, **settings}
    if cls is MPG and "weighting" not in settings:
        settings["weighting"], settings["residual"] = "rule_based", False
        settings["weighting_kwargs"] = {"eta": 0.1, "total_updates": task.weighting_updates}
    return cls(
        "MlpPolicy",
        env,
        reward_scale=task.reward_scale,
        policy_kwargs={"layer_norm": False, "features_extractor_kwargs": {"scale": list(task.observation_scale)}},
        seed=seed,
        device="cpu",
        **{**settings, **kwargs},
    )
