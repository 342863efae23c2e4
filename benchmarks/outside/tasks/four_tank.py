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
    """Torricelli's law. Outlets 25 % too narrow, pumps 30 % too strong, and the set points never change."""

    outlets = (0.75 * 0.0035, 0.75 * 0.0030, 0.75 * 0.0020, 0.75 * 0.0025)  # m^2
    pumps = (1.3 * 0.00085, 1.3 * 0.00095)  # m^3/(V s)
    to_lower_tank = 0.2
    step_time, n_substeps = 1000 / 60, 4  # s

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        levels, set_points = states[:, 0:4], states[:, 4:6]
        flows = actions * actions.new_tensor(self.pumps)
        outlets, dt = actions.new_tensor(self.outlets), self.step_time / self.n_substeps
        for _ in range(self.n_substeps):
            # An empty tank would have an infinite slope
            drained = outlets * (2 * 9.81 * levels.clamp(min=1e-4)).sqrt()
            lower = drained[:, 2:4] + self.to_lower_tank * flows
            upper = (1 - self.to_lower_tank) * flows.flip(1)
            levels = (levels + dt * (th.cat([lower, upper], dim=1) - drained)).clamp(min=0.0)
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
