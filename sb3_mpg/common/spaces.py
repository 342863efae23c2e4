"""Spaces: which are supported, and observations and actions as the flat vectors that models and simulators take."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

# Larger bounds of actions stand for "unbounded", and products of such actions overflow in single precision
LARGEST_ACTION = 1e15


class FlatObservations:
    """
    Observations of a space as flat vectors, ``(B, O)``, and back. The order of the elements is that of
    ``gymnasium.spaces.flatten``: the keys of a ``Dict`` in the order of its ``spaces``, each box row by row.

    :param space: a ``Box``, or a ``Dict`` of boxes
    """

    def __init__(self, space: spaces.Space):
        self.space = space
        self.boxes: dict[str, Any] = dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}
        self.sizes = [int(np.prod(box.shape)) for box in self.boxes.values()]
        #: Number of elements of an observation, ``O``
        self.n_elements = sum(self.sizes)

    @property
    def box(self) -> spaces.Box:
        """The space of flat observations, ``(O,)``."""
        return flat_box(*self.boxes.values())

    @property
    def names(self) -> tuple[str, ...]:
        """
        Names of the elements: ``observation[2]`` in a ``Box``, ``observation[0, 2]`` in a ``Box`` of two axes, ``goal[2]``
        at the key ``goal`` of a ``Dict``.
        """
        return tuple(
            f"{key}[{', '.join(map(str, index))}]" for key, box in self.boxes.items() for index in np.ndindex(*box.shape)
        )

    def flatten(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: observations of the space, ``(B, *obs_shape)``, by key for a ``Dict``; or flat ones
        :return: flat observations, single precision, ``(B, O)``
        """
        if isinstance(observations, th.Tensor):
            return observations.float().flatten(1)
        return th.cat([observations[key].float().flatten(1) for key in self.boxes], dim=1)

    def unflatten(self, observations: th.Tensor) -> PyTorchObs:
        """
        :param observations: flat observations, ``(B, O)``
        :return: observations of the space, ``(B, *obs_shape)``, by key for a ``Dict``
        """
        if not isinstance(self.space, spaces.Dict):
            return observations.reshape(-1, *self.boxes["observation"].shape)
        parts = observations.split(self.sizes, dim=1)
        return {key: part.reshape(-1, *box.shape) for (key, box), part in zip(self.boxes.items(), parts, strict=True)}

    def gather(self, observations: np.ndarray | Mapping[str, np.ndarray], *index: Any) -> np.ndarray:
        """
        :param observations: arrays of a replay buffer, ``(n_rows, n_envs, *obs_shape)``, by key for a ``Dict``
        :param index: what rows and environments to take
        :return: flat observations at this index, single precision, of the shape of the index and ``(O,)``
        """
        arrays = observations if isinstance(observations, Mapping) else {"observation": observations}
        parts = []
        for key, box in self.boxes.items():
            part = arrays[key][index]
            parts.append(part.reshape(*part.shape[: part.ndim - len(box.shape)], -1).astype(np.float32, copy=False))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def normalization(self, env: VecNormalize) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        :param env: a ``VecNormalize`` of these observations, which normalises some keys of a ``Dict`` or the whole ``Box``
        :return: mean and standard deviation of the elements, and whether they are normalised, ``(O,)`` each
        """
        statistics = statistics_by_key(env)
        means, stds, is_normalized = [], [], []
        for key, size in zip(self.boxes, self.sizes, strict=True):
            rms = statistics.get(key)
            means.append(np.zeros(size) if rms is None else rms.mean.reshape(-1))
            stds.append(np.ones(size) if rms is None else np.sqrt(rms.var + env.epsilon).reshape(-1))
            is_normalized.append(np.full(size, rms is not None))
        return np.concatenate(means), np.concatenate(stds), np.concatenate(is_normalized)


def statistics_by_key(env: VecNormalize) -> dict[str, RunningMeanStd]:
    """
    :param env: a ``VecNormalize`` that normalises observations
    :return: its statistics, by the keys of ``FlatObservations.boxes``; other parts are not normalised
    """
    return env.obs_rms if isinstance(env.obs_rms, dict) else {"observation": env.obs_rms}


def flat_box(*boxes: Any) -> spaces.Box:
    """
    :param boxes: boxes of any shapes
    :return: the box of their elements, one after the other, in single precision
    """
    low = np.concatenate([box.low.reshape(-1) for box in boxes])
    high = np.concatenate([box.high.reshape(-1) for box in boxes])
    # Bounds of double precision may overflow
    with np.errstate(over="ignore"):
        return spaces.Box(low.astype(np.float32), high.astype(np.float32))


def shape_of(space: spaces.Space) -> Any:
    """
    :param space: a space
    :return: its shape, or a dictionary of shapes
    """
    return {key: shape_of(part) for key, part in space.spaces.items()} if isinstance(space, spaces.Dict) else space.shape


def check_shape(name: str, box: spaces.Box, got: str) -> None:
    """
    :param name: what the box is the space of
    :param box: a box
    :param got: what it is called
    :raises ValueError: when it has no element, or no axis, which SB3's replay buffers and noise need
    """
    if box.shape == () or 0 in box.shape:
        raise ValueError(
            f"A Box of {name} needs an axis with an element or more, got {got}; a single number has the shape (1,)."
        )


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    :param observation_space: observation space of the environment
    :param action_space: action space of the environment
    :raises ValueError: when the gradient cannot run through observations and actions of these spaces
    """
    parts: dict[Any, spaces.Space] = {"": observation_space}
    if isinstance(observation_space, spaces.Dict):
        parts = dict(observation_space.spaces)
    elif isinstance(observation_space, spaces.Tuple):
        parts = dict(enumerate(observation_space.spaces))
    if not parts:
        raise ValueError(f"Policies need observations, got the empty space {observation_space}; show the state.")
    for key, space in parts.items():
        got = f"{space} at {key!r}" if space is not observation_space else f"{space}"
        if is_image_space(space):
            raise ValueError(
                f"The gradient runs through the observations, and models of images are not supported, got {got}; let the "
                "environment show the state that the image shows, or take SB3's algorithms."
            )
        if not isinstance(space, spaces.Box):
            raise ValueError(
                "The gradient runs through the observations, which must be a Box of numbers, or a Dict or Tuple of such "
                f"boxes, got {got}; flatten what is nested, and write discrete values as numbers in a Box "
                "(gymnasium.wrappers.FlattenObservation does both)."
            )
        check_shape("observations", space, got)
    if not isinstance(action_space, spaces.Box) or not np.issubdtype(action_space.dtype, np.floating):
        raise ValueError(
            f"The gradient runs through the actions, which must be a Box of floats, got {action_space}; "
            "give it a float dtype, or take an algorithm for discrete actions."
        )
    check_shape("actions", action_space, f"{action_space}")
    bounds = np.abs(np.stack([action_space.low, action_space.high]).astype(np.float64))
    if not (bounds < LARGEST_ACTION).all():
        raise ValueError(
            "Policies act between the bounds of the action space, which must be finite (and less than "
            f"{LARGEST_ACTION:.0e}), got {action_space}; set bounds in the environment. "
            "(gymnasium.wrappers.ClipAction hides them; SB3 clips by itself.)"
        )


def check_order(got: spaces.Space, expected: spaces.Space) -> None:
    """
    :param got: observation space of the environment
    :param expected: that of the algorithm. Gymnasium takes spaces for equal whose keys come in another order
    :raises ValueError: when the elements of flat observations come in another order
    """
    orders = [list(space.spaces) for space in (got, expected) if isinstance(space, spaces.Dict)]
    if len(orders) == 2 and orders[0] != orders[1]:
        raise ValueError(
            f"The keys of the observations come in the order {orders[0]}, those of the algorithm in the order {orders[1]}, in "
            "which the networks take them: make the `Dict` space of a list of pairs in that order."
        )


def tuple_keys(n_parts: int) -> list[str]:
    """
    :param n_parts: number of parts of a ``Tuple`` space
    :return: their keys in the ``Dict`` that replaces it
    """
    return [str(index) for index in range(n_parts)]


class TupleAsDict(VecEnvWrapper):
    """
    Replaces a ``Tuple`` of observations by a ``Dict`` with the keys ``"0"``, ``"1"``, ..., because SB3's replay buffers take
    no tuples.

    :param venv: vectorized environment with a ``Tuple`` of observations
    """

    def __init__(self, venv: VecEnv):
        assert isinstance(venv.observation_space, spaces.Tuple), venv.observation_space
        parts = venv.observation_space.spaces
        self.part_keys = tuple_keys(len(parts))
        # A sequence, because a dictionary would be sorted by its keys
        super().__init__(venv, observation_space=spaces.Dict(list(zip(self.part_keys, parts, strict=True))))

    def _as_dict(self, observations: Any) -> dict[str, np.ndarray]:
        return dict(zip(self.part_keys, observations, strict=True))

    def reset(self) -> Any:
        return self._as_dict(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = self._as_dict(info["terminal_observation"])
        return self._as_dict(observations), rewards, dones, infos


def check_kind_of_env(env: Any) -> None:
    """
    :param env: what a user passes as an environment
    :raises TypeError: for a class, or for a vector environment of Gymnasium, which SB3 would take for a single environment
    """
    if isinstance(env, gym.vector.VectorEnv):
        raise TypeError(
            f"SB3 steps several environments as a VecEnv, got {type(env).__name__}, a vector environment of Gymnasium; use "
            "stable_baselines3.common.env_util.make_vec_env, or the VecEnv of the environment if there is one."
        )
    if isinstance(env, type):
        raise TypeError(f"Expected an environment, got the class {env.__name__}: pass an instance, `{env.__name__}()`.")


def make_env(env: GymEnv | str | None, verbose: int) -> GymEnv | None:
    """
    :param env: an environment, its id, or ``None``
    :param verbose: verbosity level
    :return: the environment
    :raises TypeError: when it is no environment for SB3
    :raises ValueError: when its spaces are not supported
    """
    check_kind_of_env(env)
    if env is None:
        return None
    made = maybe_make_env(env, verbose)
    check_spaces(made.observation_space, made.action_space)
    return made


def wrap_env(env: GymEnv | str, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
    """
    :param env: an environment, or its id
    :param verbose: verbosity level
    :param monitor_wrapper: whether to wrap it in a ``Monitor``
    :return: as SB3 wraps it, and with a ``Dict`` of observations in place of a ``Tuple``
    :raises TypeError: when it is no environment for SB3
    :raises ValueError: when ``VecNormalize`` gets a ``Tuple`` of observations, which it takes only to fail at the first reset
    """
    check_kind_of_env(env)
    wrapped = BaseAlgorithm._wrap_env(maybe_make_env(env, verbose), verbose, monitor_wrapper)
    if not isinstance(wrapped.observation_space, spaces.Tuple):
        return wrapped
    if unwrap_vec_normalize(wrapped) is not None:
        raise ValueError(
            f"VecNormalize takes no Tuple of observations, got {wrapped.observation_space}; wrap it around "
            "sb3_mpg.common.spaces.TupleAsDict(env), which makes a Dict of them."
        )
    return TupleAsDict(wrapped)
