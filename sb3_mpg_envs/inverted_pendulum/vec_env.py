"""The inverted pendulum task with many agents in one process, for Gymnasium and for Stable-Baselines3."""

from sb3_mpg_envs.adapters import SimulatorVecEnv, SimulatorVectorEnv
from sb3_mpg_envs.inverted_pendulum.simulator import InvertedPendulumSimulator


class InvertedPendulumContiVectorEnv(SimulatorVectorEnv):
    """
    ``InvertedPendulumConti-v0`` as a Gymnasium vector environment.
    ``gymnasium.make_vec("InvertedPendulumConti-v0", num_envs)`` returns it.

    The arguments are those of :class:`~sb3_mpg_envs.adapters.SimulatorVectorEnv` and of
    :class:`~sb3_mpg_envs.inverted_pendulum.simulator.InvertedPendulumSimulator`.
    """

    env_id = "InvertedPendulumConti-v0"
    simulator_class = InvertedPendulumSimulator


class InvertedPendulumContiVecEnv(SimulatorVecEnv):
    """
    ``InvertedPendulumConti-v0`` as a Stable-Baselines3 ``VecEnv``. It is much faster than a ``DummyVecEnv`` of the
    environment.

    The arguments are those of :class:`~sb3_mpg_envs.adapters.SimulatorVecEnv` and of
    :class:`~sb3_mpg_envs.inverted_pendulum.simulator.InvertedPendulumSimulator`.
    """

    env_id = "InvertedPendulumConti-v0"
    simulator_class = InvertedPendulumSimulator
