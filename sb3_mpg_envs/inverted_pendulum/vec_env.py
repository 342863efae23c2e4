"""The inverted pendulum task with many agents in one process, for Gymnasium and for Stable-Baselines3."""

from typing import Any

from sb3_mpg_envs.inverted_pendulum.simulator import InvertedPendulumSimulator
from sb3_mpg_envs.simulator import SimulatorVecEnv, SimulatorVectorEnv


class InvertedPendulumContiVectorEnv(SimulatorVectorEnv):
    """
    What ``gymnasium.make_vec("InvertedPendulumConti-v0", num_envs)`` makes.

    :param num_envs: number of agents
    :param max_episode_steps: time limit; ``None`` for none
    :param render_mode: ``None``, ``human`` or ``rgb_array``
    :param simulator_kwargs: arguments of :class:`~sb3_mpg_envs.inverted_pendulum.simulator.InvertedPendulumSimulator`
    """

    def __init__(
        self, num_envs: int, max_episode_steps: int | None = 100, render_mode: str | None = None, **simulator_kwargs: Any
    ):
        super().__init__(InvertedPendulumSimulator(num_envs, **simulator_kwargs), max_episode_steps, render_mode)


class InvertedPendulumContiVecEnv(SimulatorVecEnv):
    """
    ``InvertedPendulumConti-v0`` as a Stable-Baselines3 ``VecEnv``, much faster than a ``DummyVecEnv`` of it.

    :param num_envs: number of agents
    :param max_episode_steps: time limit; ``None`` for none
    :param render_mode: ``None``, ``human`` or ``rgb_array``
    :param simulator_kwargs: arguments of :class:`~sb3_mpg_envs.inverted_pendulum.simulator.InvertedPendulumSimulator`
    """

    def __init__(
        self, num_envs: int, max_episode_steps: int | None = 100, render_mode: str | None = None, **simulator_kwargs: Any
    ):
        super().__init__(InvertedPendulumSimulator(num_envs, **simulator_kwargs), max_episode_steps, render_mode)
