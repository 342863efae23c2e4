"""MountainCarContinuous-v0: swing up to a goal that pays 100 once; every action costs."""

import gymnasium as gym
import torch as th
from outside.tasks.base import NothingChanges, OutsideTask

from sb3_mpg import PriorModel


class KnowsTheGoal(PriorModel):
    """State: position and velocity."""

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return 100.0 * self.terminal(next_states).to(states.dtype) - 0.1 * actions**2

    def terminal(self, states: th.Tensor) -> th.Tensor:
        return states[:, 0:1] >= 0.45


class Rough(KnowsTheGoal):
    """The engine and the slope are 27 and 28 % too weak, and the car does not stop at the wall."""

    power, slope = 0.0011, 0.0018

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        position, velocity = states.split(1, dim=1)
        velocity = (velocity + self.power * actions - self.slope * (3.0 * position).cos()).clamp(-0.07, 0.07)
        return th.cat([(position + velocity).clamp(-1.2, 0.6), velocity], dim=1)


class Idea(NothingChanges, KnowsTheGoal):
    """Knows where the goal is."""


TASK = OutsideTask(
    lambda: gym.make("MountainCarContinuous-v0"),
    {"rough": Rough, "idea": Idea},
    steps=4000,
    every=500,
    zoo_id="MountainCarContinuous-v0",
    title="MountainCarContinuous-v0",
)
