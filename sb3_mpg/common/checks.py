"""Checks of arguments."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
    VecVideoRecorder,
)

from sb3_mpg.common.spaces import TupleAsDict

# Rewards with a smaller RMS are negligible compared with the initial values of critics
TINY_REWARD = 1e-4
# Wrappers that leave units alone, or that `Units` knows
KEEPING_UNITS = (VecCheckNan, VecMonitor, VecNormalize, VecVideoRecorder, TupleAsDict)


def check_keywords(name: str, kwargs: dict[str, Any] | None, function: Callable[..., Any], *taken: str) -> dict[str, Any]:
    """
    :param name: name of the setting that holds the keyword arguments
    :param kwargs: the keyword arguments, or ``None`` for none
    :param function: the function that they are passed to
    :param taken: its arguments that are passed separately
    :return: the keyword arguments
    :raises ValueError: for keyword arguments that the function does not have
    """
    kwargs = kwargs or {}
    known = [parameter for parameter in inspect.signature(function).parameters if parameter not in taken]
    unknown = [keyword for keyword in kwargs if keyword not in known]
    if unknown:
        raise ValueError(f"`{name}` got {unknown}, expected some of {known}.")
    return kwargs


def is_finite_number(number: Any) -> bool:
    """
    :param number: anything
    :return: whether it is a finite number; booleans are not
    """
    is_number = isinstance(number, (int, float, np.integer, np.floating)) and not isinstance(number, bool)
    return is_number and bool(np.isfinite(number))


def is_whole(number: Any) -> bool:
    """
    :param number: anything
    :return: whether it is a whole number, of any type (``25`` or ``25.0``)
    """
    return is_finite_number(number) and int(number) == number


def check_count(name: str, count: int, low: int) -> None:
    """
    :param name: name of a setting
    :param count: its value
    :param low: smallest allowed value
    :raises ValueError: when it is not an integer, or too small
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < low:
        raise ValueError(f"`{name}` must be a whole number, {low} or more, got {count!r}.")


def check_number(name: str, number: float, low: float, includes_low: bool = True) -> None:
    """
    :param name: name of a setting
    :param number: its value
    :param low: lower bound
    :param includes_low: whether the bound itself is allowed
    :raises ValueError: when it is not a finite number, or too small
    """
    if not is_finite_number(number) or number < low or (number == low and not includes_low):
        expected = f"{low} or more" if includes_low else f"more than {low}"
        raise ValueError(f"`{name}` must be a number, {expected}, got {number!r}.")


def check_share(name: str, share: float) -> None:
    """
    :param name: name of a setting
    :param share: its value
    :raises ValueError: when it is not a number from 0 to 1
    """
    check_number(name, share, 0.0)
    if share > 1:
        raise ValueError(f"`{name}` must lie between 0 and 1, got {share!r}.")


def check_policy(policy: Any, aliases: Mapping[str, type]) -> None:
    """
    :param policy: argument of the constructor
    :param aliases: the policy classes that have a name, by their names
    :raises ValueError: for another name
    :raises TypeError: when it is neither a name nor a class
    """
    expected = f"`policy` must be one of {list(aliases)} or a policy class"
    if isinstance(policy, str) and policy not in aliases:
        raise ValueError(f"{expected}, got {policy!r}; there is none for images.")
    if not isinstance(policy, (str, type)):
        raise TypeError(f"{expected}, got an object of type {type(policy).__name__}.")


def warn_of_record(step: int, infos: Sequence[dict[str, Any]], env: VecNormalize | None, *given: Any) -> bool:
    """
    :param step: number of the environment step
    :param infos: of each environment; at the end of an episode they hold its last observation
    :param env: the ``VecNormalize``, if any, which clips what is not finite; what is recorded are its raw values
    :param given: observations and rewards, arrays or dictionaries of arrays, or ``None``
    :return: whether a value is not finite and a warning was given
    """
    raw = () if env is None else (env.get_original_obs(), env.get_original_reward())
    last = (info.get("terminal_observation") for info in infos)
    parts = (part.values() if isinstance(part, dict) else (part,) for part in (*given, *raw, *last) if part is not None)
    if all(np.isfinite(array).all() for part in parts for array in part):
        return False
    warnings.warn(
        f"The environment gave an observation or a reward that is not finite (step {step}). It is "
        "recorded, and updates that sample it may be skipped. gymnasium.utils.env_checker.check_env and "
        "stable_baselines3's VecCheckNan help to find out where it is from."
    )
    return True


def warn_of_masked_states(share: float, model_name: str) -> bool:
    """
    :param share: share of the states that are masked in a policy gradient
    :param model_name: name of the user's model
    :return: whether there are any; a warning says so
    """
    if share > 0:
        warnings.warn(
            f"Rollouts of {model_name} overflow at some states, which are masked in the policy gradient; "
            "`train/masked_states` is their share. Look for what overflows with `check_prior_model`."
        )
    return share > 0


def check_default_dtype() -> None:
    """
    :raises ValueError: when torch creates tensors of another precision than that of observations and learner processes
    """
    if th.get_default_dtype() != th.float32:
        raise ValueError(
            f"Networks and rollouts are in single precision, but torch's default is {th.get_default_dtype()}: call "
            "torch.set_default_dtype(torch.float32). A model may convert its tensors and compute in double precision."
        )


def keeps_units(wrapper: VecEnvWrapper) -> bool:
    """
    :param wrapper: a wrapper of a vectorized environment
    :return: whether actions, observations and rewards are known to be those below it, or to be converted by ``Units``
    """
    methods = ("reset", "step_async", "step_wait")
    return any(all(getattr(type(wrapper), name) is getattr(known, name) for name in methods) for known in KEEPING_UNITS)


def warn_of_wrappers(env: VecEnv, users: Sequence[str]) -> None:
    """
    Warn of wrappers that change units: the model and the simulator of the environment use the units below them.

    :param env: the environment
    :param users: names of the settings that use these units
    """
    if not users:
        return
    wrappers = (gym.ActionWrapper, gym.ObservationWrapper, gym.RewardWrapper, gym.wrappers.NormalizeReward)
    found = ["A wrapper changes"] if any(any(env.env_is_wrapped(wrapper)) for wrapper in wrappers) else []
    while isinstance(env, VecEnvWrapper):
        if not keeps_units(env):
            found.append(f"{type(env).__name__} may change")
        env = env.venv
    if found:
        warnings.warn(
            f"{found[0]} the actions, observations or rewards of the environment, but {' and '.join(users)} speaks the "
            "units of the environment below it. If they differ, pass a model in the units of the wrapper, or use VecNormalize."
        )


def warn_of_tiny_rewards(rewards: th.Tensor, reward_scale: float) -> None:
    """
    Warn of rewards that are too small for critics to learn from.

    :param rewards: recorded rewards, in the units of the value functions
    :param reward_scale: the factor that they were multiplied by
    """
    size = rewards.square().mean().sqrt().item()
    if 0 < size < TINY_REWARD:
        warnings.warn(
            f"The rewards recorded so far are of the size {size:.2g}, in which critics learn slowly or not at all: set "
            f"`reward_scale` to about {reward_scale / size:.0e}, or use VecNormalize."
        )


def warn_of_late_goals(env: VecEnv, num_timesteps: int, learning_starts: int) -> None:
    """
    Warn of an update before the end of the first episode, when no step can get a new goal.

    :param env: the environment
    :param num_timesteps: number of steps so far
    :param learning_starts: after how many steps updates begin
    """
    # The attribute of ``TimeLimit``: the specification of an environment may be impossible to send from its process
    length = env.get_attr("_max_episode_steps")[0] if env.has_attr("_max_episode_steps") else None
    n_steps = max(learning_starts - num_timesteps, 0) // env.num_envs + 1
    if length is not None and n_steps < length:
        warnings.warn(
            f"Steps of finished episodes only can get new goals, but updates begin after {n_steps} steps of each environment, "
            f"and episodes take up to {length}: set `learning_starts` to {num_timesteps + length * env.num_envs} or more, or "
            "load a replay buffer."
        )
