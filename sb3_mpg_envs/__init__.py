"""
The environments of the Mixed Policy Gradient papers. Importing this package registers them with Gymnasium.

Their classes can be imported from here. What a class needs (torch, MuJoCo) is imported with it.
"""

import importlib
from typing import Any

from gymnasium.envs.registration import register

# The tasks, and what can be imported from here of each
_PUBLIC = {
    "path_tracking": (
        "PathTrackingEnv",
        "PathTrackingModel",
        "PathTrackingSimulator",
        "PathTrackingVecEnv",
        "PathTrackingVectorEnv",
        "VehicleParameters",
    ),
    "inverted_pendulum": (
        "InvertedPendulumContiEnv",
        "InvertedPendulumContiVecEnv",
        "InvertedPendulumContiVectorEnv",
        "InvertedPendulumModel",
        "InvertedPendulumSimulator",
        "PendulumParameters",
    ),
}
_TASK_OF = {name: task for task, names in _PUBLIC.items() for name in (task, *names)}


def __getattr__(name: str) -> Any:
    if name not in _TASK_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    task = importlib.import_module(f"{__name__}.{_TASK_OF[name]}")
    return task if name in _PUBLIC else getattr(task, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TASK_OF})


# Entry points are strings, so that importing this package imports neither torch nor MuJoCo nor pygame
register(
    id="PathTracking-v0",
    entry_point="sb3_mpg_envs.path_tracking.env:PathTrackingEnv",
    vector_entry_point="sb3_mpg_envs.path_tracking.vec_env:PathTrackingVectorEnv",
    max_episode_steps=200,
)

register(
    id="InvertedPendulumConti-v0",
    entry_point="sb3_mpg_envs.inverted_pendulum.env:InvertedPendulumContiEnv",
    vector_entry_point="sb3_mpg_envs.inverted_pendulum.vec_env:InvertedPendulumContiVectorEnv",
    max_episode_steps=100,
)
