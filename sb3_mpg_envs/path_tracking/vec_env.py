"""The path tracking task with many agents in one process, for Gymnasium and for Stable-Baselines3."""

from typing import Any

from sb3_mpg_envs.path_tracking.simulator import PathTrackingSimulator
from sb3_mpg_envs.simulator import SimulatorVecEnv, SimulatorVectorEnv


class PathTrackingVectorEnv(SimulatorVectorEnv):
    """
    What ``gymnasium.make_vec("PathTracking-v0", num_envs)`` makes.

    :param num_envs: number of agents
    :param max_episode_steps: time limit; ``None`` for none
    :param render_mode: ``None``, ``human`` or ``rgb_array``
    :param simulator_kwargs: arguments of :class:`~sb3_mpg_envs.path_tracking.simulator.PathTrackingSimulator`
    """

    def __init__(
        self, num_envs: int, max_episode_steps: int | None = 200, render_mode: str | None = None, **simulator_kwargs: Any
    ):
        super().__init__(PathTrackingSimulator(num_envs, **simulator_kwargs), max_episode_steps, render_mode)


class PathTrackingVecEnv(SimulatorVecEnv):
    """
    ``PathTracking-v0`` as a Stable-Baselines3 ``VecEnv``, much faster than a ``DummyVecEnv`` of it.

    :param num_envs: number of agents
    :param max_episode_steps: time limit; ``None`` for none
    :param render_mode: ``None``, ``human`` or ``rgb_array``
    :param simulator_kwargs: arguments of :class:`~sb3_mpg_envs.path_tracking.simulator.PathTrackingSimulator`
    """

    def __init__(
        self, num_envs: int, max_episode_steps: int | None = 200, render_mode: str | None = None, **simulator_kwargs: Any
    ):
        super().__init__(PathTrackingSimulator(num_envs, **simulator_kwargs), max_episode_steps, render_mode)
