"""
parking-v0 of highway-env: drive a car into a spot with the right heading, at best without hitting a wall. An episode takes
20 s (100 steps) instead of 100 s. That is enough to park, and a step of this package takes 10 ms.
"""

import gymnasium as gym
import torch as th
from gymnasium.wrappers import FlattenObservation
from outside.tasks.base import NothingChanges, OutsideTask

from sb3_mpg import PriorModel

# Units of the observation
LENGTH, SPEED = 100.0, 5.0  # m, m/s
# Where the walls are, less half the length of the car. The package reports collisions up to half a metre earlier
MAX_X, MAX_Y = 32.0, 18.0  # m


def make_env() -> gym.Env:
    """
    :return: the environment, with a flat observation: what is achieved, what is desired, and the first again
    """
    import highway_env

    gym.register_envs(highway_env)
    return FlattenObservation(gym.make("parking-v0", config={"duration": 20}))


class KnowsTheGoal(PriorModel):
    """State: x, y, velocities, cosine and sine of the heading, and the same of the goal."""

    def state_from_observation(self, observations: th.Tensor) -> th.Tensor:
        return observations[:, 0:12]

    def observation(self, states: th.Tensor) -> th.Tensor:
        return th.cat([states, states[:, 0:6]], dim=1)

    def distance(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: states, ``(B, 12)``
        :return: weighted distances to the goal, ``(B, 1)``
        """
        difference = (states[:, 0:6] - states[:, 6:12]).abs()
        weighted = difference * states.new_tensor([1.0, 0.3, 0.0, 0.0, 0.02, 0.02])
        # The root has no slope at zero
        return (weighted.sum(dim=1, keepdim=True) + 1e-8).sqrt()

    def has_crashed(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: states, ``(B, 12)``
        :return: booleans, ``(B, 1)``
        """
        return (states[:, 0:1].abs() > MAX_X / LENGTH) | (states[:, 1:2].abs() > MAX_Y / LENGTH)

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return -self.distance(next_states) - 5.0 * self.has_crashed(next_states).to(states.dtype)

    def terminal(self, states: th.Tensor) -> th.Tensor:
        return (self.distance(states) < 0.12) | self.has_crashed(states)


class Rough(KnowsTheGoal):
    """A kinematic bicycle: the car is 30 % too long, its pedals are 20 % too weak, and it does not slip."""

    wheelbase = 1.3 * 5.0  # m
    max_acceleration, max_steering = 4.0, 0.785  # m/s^2, rad
    step_time, n_substeps = 0.2, 3  # s

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        x, y, x_velocity, y_velocity, cos, sin = states[:, 0:6].split(1, dim=1)
        throttle, steering = actions.split(1, dim=1)
        dt = self.step_time / self.n_substeps
        heading, speed = th.atan2(sin, cos), SPEED * (x_velocity * cos + y_velocity * sin)
        turn = (self.max_steering * steering).tan() / self.wheelbase
        for _ in range(self.n_substeps):
            x, y = x + dt * speed * heading.cos() / LENGTH, y + dt * speed * heading.sin() / LENGTH
            heading, speed = heading + dt * speed * turn, speed + dt * self.max_acceleration * throttle
        cos, sin = heading.cos(), heading.sin()
        return th.cat([x, y, speed * cos / SPEED, speed * sin / SPEED, cos, sin, states[:, 6:12]], dim=1)


class Idea(NothingChanges, KnowsTheGoal):
    """Knows the goal and the walls."""


TASK = OutsideTask(
    make_env,
    {"rough": Rough, "idea": Idea},
    steps=4000,
    every=1000,
    zoo_id="parking-v0",
    title="parking-v0 (highway-env)",
)
