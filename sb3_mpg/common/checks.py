"""Checks of arguments."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces


def check_keywords(name: str, kwargs: dict[str, Any] | None, function: Callable[..., Any], *taken: str) -> dict[str, Any]:
    """
    :param name: of the setting that gives keyword arguments
    :param kwargs: the keyword arguments, or ``None`` for none
    :param function: what they are for
    :param taken: its arguments that are given otherwise
    :return: the keyword arguments
    :raises ValueError: when there is one that the function does not have
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
    :return: whether it is a finite number; booleans are none
    """
    is_number = isinstance(number, (int, float, np.integer, np.floating)) and not isinstance(number, bool)
    return is_number and bool(np.isfinite(number))


def is_whole(number: Any) -> bool:
    """
    :param number: anything
    :return: whether it is a whole number, written as one or not
    """
    return is_finite_number(number) and int(number) == number


def check_count(name: str, count: int, low: int) -> None:
    """
    :param name: of a setting
    :param count: its value
    :param low: the least that makes sense
    :raises ValueError: when it is no whole number, or too small
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < low:
        raise ValueError(f"`{name}` must be a whole number, {low} or more, got {count!r}.")


def check_number(name: str, number: float, low: float, includes_low: bool = True) -> None:
    """
    :param name: of a setting
    :param number: its value
    :param low: what it must not fall below
    :param includes_low: whether it may be as small as that
    :raises ValueError: when it is no finite number, or too small
    """
    if not is_finite_number(number) or number < low or (number == low and not includes_low):
        expected = f"{low} or more" if includes_low else f"more than {low}"
        raise ValueError(f"`{name}` must be a number, {expected}, got {number!r}.")


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    :param observation_space: observation space of the environment
    :param action_space: action space of the environment
    :raises ValueError: when a policy cannot be differentiated through a model between these spaces
    """
    if not isinstance(observation_space, spaces.Box) or not np.issubdtype(observation_space.dtype, np.floating):
        raise ValueError(
            f"The gradient runs through the observations, which must be a Box of floats, got {observation_space}; "
            "flatten dictionaries (gymnasium.wrappers.FlattenObservation) and convert integers to floats."
        )
    if (
        not isinstance(action_space, spaces.Box)
        or len(action_space.shape) != 1
        or not np.issubdtype(action_space.dtype, np.floating)
    ):
        raise ValueError(
            f"The gradient runs through the actions, which must be a one-dimensional Box of floats, got {action_space}; "
            "flatten it, give it a float dtype, or take an algorithm for discrete actions."
        )
    if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
        raise ValueError(
            f"Policies act between the bounds of the action space, which must be finite, got {action_space}; "
            "set bounds in the environment. (gymnasium.wrappers.ClipAction hides them; SB3 clips by itself.)"
        )
