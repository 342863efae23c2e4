"""The methods: MPG with nothing set, and what others offer."""

from importlib.resources import files
from typing import Any

import numpy as np
import yaml
from outside.tasks.base import OutsideTask
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise

from sb3_mpg import MPG

# What a file name has in place of the model of a method that has none
NO_MODEL = "no_model"
# Methods without a prior model
PEERS = ("td3", "sac", "td3_tuned", "sac_tuned", "crossq")
METHODS = ("mpg", "data_driven", *PEERS)
NOISES: dict[str, type[NormalActionNoise] | type[OrnsteinUhlenbeckActionNoise]] = {
    "normal": NormalActionNoise,
    "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise,
}


def tuned_hyperparameters(algorithm: str, zoo_id: str) -> dict[str, Any] | None:
    """
    :param algorithm: name of the algorithm in RL Zoo
    :param zoo_id: name of the environment in RL Zoo
    :return: what RL Zoo has tuned for the environment, as arguments of the algorithm; the action noise is named, not made.
        ``None`` if it has nothing
    """
    text = (files("rl_zoo3") / "hyperparams" / f"{algorithm}.yml").read_text(encoding="utf-8")
    hyperparameters = yaml.safe_load(text).get(zoo_id)
    if hyperparameters is None:
        return None
    # The budget is that of the benchmark
    tuned = {name: value for name, value in hyperparameters.items() if name not in ("n_timesteps", "policy")}
    if "policy_kwargs" in tuned:
        tuned["policy_kwargs"] = eval(tuned["policy_kwargs"])
    return tuned


def make_noise(kind: str, std: float, n_actions: int) -> ActionNoise:
    """
    :param kind: a key of ``NOISES``
    :param std: standard deviation, of actions in [-1, 1]
    :param n_actions: number of action dimensions
    :return: the noise
    """
    return NOISES[kind](np.zeros(n_actions), std * np.ones(n_actions))


def has(method: str, task: OutsideTask) -> bool:
    """
    :param method: one of ``METHODS``
    :param task: a task
    :return: whether the method exists for the task
    """
    algorithm = method.removesuffix("_tuned")
    return method == algorithm or tuned_hyperparameters(algorithm, task.zoo_id) is not None


def make(method: str, task: OutsideTask, model: str, seed: int) -> BaseAlgorithm:
    """
    :param method: one of ``METHODS``
    :param task: the task
    :param model: a key of ``task.models``, for MPG
    :param seed: seed
    :return: the algorithm
    """
    env = task.make_env()
    common: dict[str, Any] = {"env": env, "seed": seed, "device": "cpu"}
    if method == "mpg":
        return MPG("MlpPolicy", prior_model=task.models[model](), **common)
    if method == "data_driven":
        return MPG("MlpPolicy", horizons=(0,), weighting="constant", **common)
    if method == "crossq":
        from sb3_contrib import CrossQ

        return CrossQ("MlpPolicy", **common)
    algorithm = method.removesuffix("_tuned")
    settings: dict[str, Any] = {}
    if method != algorithm:
        settings = tuned_hyperparameters(algorithm, task.zoo_id) or {}
    elif algorithm == "td3":
        # Without noise it does not explore; this is the noise of its paper and of RL Zoo
        settings = {"noise_type": "normal", "noise_std": 0.1}
    if "noise_type" in settings:
        noise = make_noise(settings.pop("noise_type"), settings.pop("noise_std"), int(np.prod(env.action_space.shape)))
        settings["action_noise"] = noise
    return {"td3": TD3, "sac": SAC}[algorithm]("MlpPolicy", **settings, **common)
