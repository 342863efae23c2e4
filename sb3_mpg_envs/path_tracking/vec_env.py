"""The path tracking task with many agents in one process, for Gymnasium and for Stable-Baselines3."""

from sb3_mpg_envs.adapters import SimulatorVecEnv, SimulatorVectorEnv
from sb3_mpg_envs.path_tracking.simulator import PathTrackingSimulator


class PathTrackingVectorEnv(SimulatorVectorEnv):
    """
    ``PathTracking-v0`` as a Gymnasium vector environment. ``gymnasium.make_vec("PathTracking-v0", num_envs)`` returns it.

    The arguments are those of :class:`~sb3_mpg_envs.adapters.SimulatorVectorEnv` and of
    :class:`~sb3_mpg_envs.path_tracking.simulator.PathTrackingSimulator`.
    """

    env_id = "PathTracking-v0"
    simulator_class = PathTrackingSimulator


class PathTrackingVecEnv(SimulatorVecEnv):
    """
    ``PathTracking-v0`` as a Stable-Baselines3 ``VecEnv``. It is much faster than a ``DummyVecEnv`` of the environment.

    The arguments are those of :class:`~sb3_mpg_envs.adapters.SimulatorVecEnv` and of
    :class:`~sb3_mpg_envs.path_tracking.simulator.PathTrackingSimulator`.
    """

    env_id = "PathTracking-v0"
    simulator_class = PathTrackingSimulator
