"""What the tasks of pcgym share."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, SupportsFloat

import gymnasium as gym
import numpy as np

# What pcgym imports and never calls here, because CasADi integrates
UNUSED = ("jax", "jax.numpy", "diffrax", "do_mpc")


class Placeholder(ModuleType):
    """A module in place of one that need not be installed: any name in it is a function that does nothing."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def import_pcgym() -> ModuleType:
    """
    :return: pcgym, whether or not what it never calls is installed
    """
    hidden = {name: sys.modules.get(name) for name in UNUSED}
    sys.modules.update({name: Placeholder(name) for name in UNUSED})
    try:
        import pcgym
    finally:
        # Other packages ask whether jax is there
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return pcgym


class SetPoints(gym.Wrapper):
    """
    An environment of pcgym, in raw units, with a start and set points that are drawn for each episode and change after half of
    it. pcgym reports its time limit as the end of the task, and float64 observations in a float32 space; here it is a
    truncation, and they are float32.

    :param env: the environment of pcgym
    :param draw: returns a start without set points, ``(S,)``, and the set points of both halves, ``(2, n)``
    """

    def __init__(self, env: gym.Env, draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]):
        super().__init__(env)
        self.draw = draw

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None or not hasattr(self, "generator"):
            self.generator = np.random.default_rng(seed)
        start, set_points = self.draw(self.generator)
        env: Any = self.env
        half = env.N // 2
        both = np.repeat(set_points, [half, env.N - half], axis=0)
        env.SP = dict(zip(env.SP, both.T.tolist(), strict=True))
        env.env_params["x0"] = np.concatenate([start, set_points[0]])
        observation, info = env.reset()
        return observation.astype(np.float32), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, is_over, _, info = self.env.step(np.asarray(action, dtype=np.float64))
        return observation.astype(np.float32), float(reward), False, is_over, info


def make_env(
    model: str,
    controlled: tuple[str, ...],
    actions: tuple[list[float], list[float]],
    observations: tuple[list[float], list[float]],
    minutes_or_seconds: float,
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
) -> gym.Env:
    """
    :param model: name of the model in pcgym
    :param controlled: names of the states that have set points
    :param actions: lowest and highest actions
    :param observations: lowest and highest observations, set points included
    :param minutes_or_seconds: duration of an episode, in the model's unit of time
    :param draw: as in :class:`SetPoints`
    :return: the environment: 60 steps, a cost of 1000 times the squared error
    """
    n_steps = 60
    start, set_points = draw(np.random.default_rng(0))
    low, high = (np.array(bound) for bound in actions)
    parameters = {
        "N": n_steps,
        "tsim": minutes_or_seconds,
        "SP": {name: [value] * n_steps for name, value in zip(controlled, set_points[0], strict=True)},
        "a_space": {"low": low, "high": high},
        "o_space": {"low": np.array(observations[0]), "high": np.array(observations[1])},
        "x0": np.concatenate([start, set_points[0]]),
        "model": model,
        "r_scale": dict.fromkeys(controlled, 1e3),
        "normalise_a": False,
        "normalise_o": False,
        "integration_method": "casadi",
    }
    return SetPoints(import_pcgym().make_env(parameters), draw)
