"""InvertedPendulum-v5: a reward of 1 for each step until the pole falls."""

import gymnasium as gym
import torch as th
from outside.tasks.base import NothingChanges, OutsideTask

from sb3_mpg import PriorModel

MAX_ANGLE = 0.2  # rad


class Upright(PriorModel):
    """State: position, angle, velocity, angular velocity."""

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return (~self.terminal(next_states)).to(states.dtype)

    def terminal(self, states: th.Tensor) -> th.Tensor:
        return states[:, 1:2].abs() > MAX_ANGLE


class Rough(Upright):
    """A textbook's cart-pole. The masses and the length are off by 30 %, joints have no damping, the rail no ends."""

    cart_mass, pole_mass = 14.0, 3.5  # kg
    half_length = 0.4  # m, from the joint to the centre of mass
    motor_gain = 100.0  # N
    step_time, n_substeps = 0.04, 2  # s

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        position, angle, velocity, speed = states.split(1, dim=1)
        mass, moment = self.cart_mass + self.pole_mass, self.pole_mass * self.half_length
        dt = self.step_time / self.n_substeps
        for _ in range(self.n_substeps):
            sin, cos = angle.sin(), angle.cos()
            push = (self.motor_gain * actions + moment * speed**2 * sin) / mass
            angular = (9.81 * sin - cos * push) / (self.half_length * (4 / 3 - self.pole_mass * cos**2 / mass))
            velocity = velocity + dt * (push - moment * angular * cos / mass)
            speed = speed + dt * angular
            position, angle = position + dt * velocity, angle + dt * speed
        return th.cat([position, angle, velocity, speed], dim=1)


class Idea(NothingChanges, Upright):
    """Knows when the pole has fallen."""


TASK = OutsideTask(
    lambda: gym.make("InvertedPendulum-v5"),
    {"rough": Rough, "idea": Idea},
    steps=3000,
    every=250,
    zoo_id="InvertedPendulum-v5",
    title="InvertedPendulum-v5",
)
