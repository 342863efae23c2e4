"""Concentration in pcgym's stirred-tank reactor (CSTR), controlled by the temperature of its cooling jacket."""

import numpy as np
import torch as th
from outside.tasks import process_control
from outside.tasks.base import NothingChanges, OutsideTask

from sb3_mpg import PriorModel


def draw(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """
    :param generator: random number generator
    :return: concentration and temperature at the start, and set points of the concentration
    """
    return generator.uniform([0.78, 322.0], [0.9, 332.0]), generator.uniform(0.82, 0.92, (2, 1))


class KnowsTheCost(PriorModel):
    """State: concentration, temperature in K, set point of the concentration."""

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return -1e3 * (next_states[:, 0:1] - next_states[:, 2:3]) ** 2


class Rough(KnowsTheCost):
    """Balances of mass and energy. The reaction is 25 % too slow, the jacket 30 % too weak; the set point never changes."""

    rate = 0.75 * 7.2e10  # 1/min
    cooling = 0.7 * 5e4 / 23_900  # 1/min
    step_time, n_substeps = 26 / 60, 10  # min

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        concentration, temperature, set_point = states.split(1, dim=1)
        dt = self.step_time / self.n_substeps
        for _ in range(self.n_substeps):
            reaction = self.rate * (-8750 / temperature).exp() * concentration
            heating = 350 - temperature + 5e4 / 239 * reaction + self.cooling * (actions - temperature)
            concentration = concentration + dt * (1 - concentration - reaction)
            # A rough model may run away
            temperature = (temperature + dt * heating).clamp(250, 450)
        return th.cat([concentration, temperature, set_point], dim=1)


class Idea(NothingChanges, KnowsTheCost):
    """Knows what costs."""


TASK = OutsideTask(
    lambda: process_control.make_env("cstr", ("Ca",), ([295.0], [302.0]), ([0.7, 300.0, 0.8], [1.0, 350.0, 0.95]), 26.0, draw),
    {"rough": Rough, "idea": Idea},
    steps=2500,
    every=250,
    zoo_id="cstr",
    title="stirred-tank reactor (pcgym)",
)
