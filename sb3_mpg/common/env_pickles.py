"""Vectorized environments with their wrappers in pickles and copies, which SB3's wrappers do not support."""

import csv
import inspect
import io
from typing import Any, NamedTuple

import cloudpickle
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, unwrap_vec_normalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer


class Wrapper(NamedTuple):
    """
    A wrapper without the environment inside.

    :param cls: its class
    :param attributes: its attributes
    :param names_of_inner: names of the attributes that are the environment inside
    """

    cls: type[VecEnvWrapper]
    attributes: dict[str, Any]
    names_of_inner: list[str]


def take_env_apart(env: VecEnv) -> tuple[list[Wrapper], VecEnv]:
    """
    Separate an environment from its wrappers, which cannot be pickled.

    :param env: an environment
    :return: its wrappers, the outermost first, and the environment inside
    """
    wrappers = []
    while isinstance(env, VecEnvWrapper):
        attributes = {name: value for name, value in vars(env).items() if name != "class_attributes"}
        names_of_inner = [name for name, value in attributes.items() if value is env.venv]
        for name in names_of_inner:
            del attributes[name]
        wrappers.append(Wrapper(type(env), attributes, names_of_inner))
        env = env.venv
    return wrappers, env


def put_env_together(wrappers: list[Wrapper], env: VecEnv) -> VecEnv:
    """The inverse of :func:`take_env_apart`."""
    for cls, attributes, names_of_inner in reversed(wrappers):
        wrapper = object.__new__(cls)
        wrapper.__dict__.update(attributes, class_attributes=dict(inspect.getmembers(cls)))
        wrapper.__dict__.update(dict.fromkeys(names_of_inner, env))
        env = wrapper
    return env


class CopiedWithEnv:
    """An algorithm whose copies and pickles keep its environment, with all wrappers."""

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        # Found again in the environment
        state.pop("_vec_normalize_env", None)
        return {**state, "env": take_env_apart(state["env"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        env = put_env_together(*state["env"])
        vars(self).update(state, env=env, _vec_normalize_env=unwrap_vec_normalize(env))
        buffer = state.get("replay_buffer")
        if isinstance(buffer, HerReplayBuffer) and env is not None:
            # It asks the environment for rewards, and its pickle has none
            buffer.set_env(env)


def reopen_results(cls: type[ResultsWriter], path: str, names: tuple[str, ...], attributes: dict[str, Any]) -> ResultsWriter:
    """
    :param cls: class of the writer
    :param path: path of its file
    :param names: names of the columns
    :param attributes: its other attributes
    :return: a writer that appends to the file
    """
    writer = object.__new__(cls)
    writer.__dict__.update(attributes)
    writer.file_handler = open(path, "a", newline="\n")
    writer.logger = csv.DictWriter(writer.file_handler, fieldnames=names)
    return writer


class EnvPickler(cloudpickle.Pickler):
    """Pickles the files of ``Monitor`` and ``VecMonitor`` as files that are opened again, to append to them."""

    def reducer_override(self, obj: Any) -> Any:
        """As in ``pickle.Pickler``."""
        if isinstance(obj, ResultsWriter):
            attributes = {name: value for name, value in vars(obj).items() if name not in ("file_handler", "logger")}
            return reopen_results, (type(obj), obj.file_handler.name, tuple(obj.logger.fieldnames), attributes)
        return super().reducer_override(obj)


def pickle_with_env(content: Any) -> bytes:
    """
    :param content: objects, and environments that were taken apart
    :return: their pickle; unpickle it in one process only, because files are written to
    """
    file = io.BytesIO()
    EnvPickler(file).dump(content)
    return file.getvalue()
