"""Levels of the upper two of pcgym's four tanks, each filled by a pump that also feeds a lower tank."""

import numpy as np
import torch as th
from outside.tasks import process_control
from outside.tasks.base import NothingChanges, OutsideTask

from sb3_mpg import PriorModel


def draw(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """
    :param generator: random number generator
    :return: levels at the start, and set points of the upper two
    """
    return generator.uniform([0.1, 0.1, 0.1, 0.1], [0.3, 0.3, 0.4, 0.4]), generator.uniform(0.15, 0.5, (2, 2))


class KnowsTheCost(PriorModel):
    """State: levels of the lower and of the upper tanks, set points of the upper ones, m."""

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return -1e3 * (next_states[:, 2:4] - next_states[:, 4:6]).square().sum(dim=1, keepdim=True)


class Rough(KnowsTheCost):
    """
    Torricelli's law with outlets that are 25 % too narrow. Pumps feed the upper tanks with all that they pump, a quarter more
    than they do, and the lower ones not at all. The set points never change.
    """

    outlets = (0.75 * 0.0035, 0.75 * 0.0030, 0.75 * 0.0020, 0.75 * 0.0025)  # m^2
    # The first pump feeds the second of the upper tanks
    pumps = (0.00095, 0.00085)  # m^3/(V s)
    step_time, n_substeps = 1000 / 60, 4  # s

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        levels, set_points = states[:, 0:4], states[:, 4:6]
        pumped = actions.flip(1) * actions.new_tensor(self.pumps)
        outlets, dt = actions.new_tensor(self.outlets), self.step_time / self.n_substeps
        for _ in range(self.n_substeps):
            # An empty tank would have an infinite slope
            drained = outlets * (2 * 9.81 * levels.clamp(min=1e-4)).sqrt()
            fed = th.cat([drained[:, 2:4], pumped], dim=1)
            levels = (levels + dt * (fed - drained)).clamp(min=0.0)
        return th.cat([levels, set_points], dim=1)


class Idea(NothingChanges, KnowsTheCost):
    """Knows what costs."""


TASK = OutsideTask(
    lambda: process_control.make_env(
        "four_tank", ("h3", "h4"), ([0.1, 0.1], [10.0, 10.0]), ([0.0] * 6, [0.6] * 6), 1000.0, draw
    ),
    {"rough": Rough, "idea": Idea},
    steps=2500,
    every=250,
    zoo_id="four_tank",
    title="four tanks (pcgym)",
)
