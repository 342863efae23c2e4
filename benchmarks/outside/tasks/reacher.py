"""Reacher-v5: bring the tip of an arm with two joints to a target."""

import math

import gymnasium as gym
import torch as th
from outside.tasks.base import NothingChanges, OutsideTask

from sb3_mpg import PriorModel


class Rough(PriorModel):
    """
    State: angles of both joints, position of the target, velocities of the joints. Each joint is a mass of its own that its
    motor turns; the motors are 30 % too weak, and there is no damping.
    """

    length, other_length = 0.1, 0.11  # m
    motor_gain = 140.0  # rad/s^2
    step_time = 0.02  # s

    def state_from_observation(self, observations: th.Tensor) -> th.Tensor:
        angles = th.atan2(observations[:, 2:4], observations[:, 0:2])
        return th.cat([angles, observations[:, 4:8]], dim=1)

    def tip(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: states, ``(B, 6)``
        :return: positions of the tip, m, ``(B, 2)``
        """
        first, second = states[:, 0:1], states[:, 0:1] + states[:, 1:2]
        x = self.length * first.cos() + self.other_length * second.cos()
        y = self.length * first.sin() + self.other_length * second.sin()
        return th.cat([x, y], dim=1)

    def observation(self, states: th.Tensor) -> th.Tensor:
        angles, target = states[:, 0:2], states[:, 2:4]
        return th.cat([angles.cos(), angles.sin(), states[:, 2:6], self.tip(states) - target], dim=1)

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        angles, target, velocities = states.split(2, dim=1)
        velocities = velocities + self.step_time * self.motor_gain * actions
        return th.cat([angles + self.step_time * velocities, target, velocities], dim=1)

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        distance = (self.tip(next_states) - next_states[:, 2:4]).norm(dim=1, keepdim=True)
        return -distance - actions.square().sum(dim=1, keepdim=True)

    def state_difference(self, states: th.Tensor, others: th.Tensor) -> th.Tensor:
        difference = states - others
        angles = (difference[:, 0:2] + math.pi) % (2 * math.pi) - math.pi
        return th.cat([angles, difference[:, 2:]], dim=1)


class Idea(NothingChanges):
    """State: the observation, of which the last two are the way from the target to the tip."""

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return -next_states[:, 8:10].norm(dim=1, keepdim=True) - actions.square().sum(dim=1, keepdim=True)


TASK = OutsideTask(
    lambda: gym.make("Reacher-v5"),
    {"rough": Rough, "idea": Idea},
    steps=3000,
    every=250,
    zoo_id="Reacher-v5",
    title="Reacher-v5",
)
