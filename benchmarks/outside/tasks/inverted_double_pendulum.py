"""InvertedDoublePendulum-v5: keep the tip of two poles up; an episode ends when it is below one metre."""

import gymnasium as gym
import torch as th
from outside.tasks.base import NothingChanges, OutsideTask
from prior_models import KnowsNothing

from sb3_mpg import PriorModel

LENGTH = 0.6  # m, of each pole
MIN_HEIGHT = 1.0  # m


class KnowsTheTip(PriorModel):
    """
    State: the observation, which is position, sines and cosines of both joints, velocities, and the force of the rail's ends.
    """

    def angles(self, states: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param states: states, ``(B, 9)``
        :return: angles of the poles against the vertical, rad, ``(B, 1)`` each
        """
        first, second = th.atan2(states[:, 1:3], states[:, 3:5]).split(1, dim=1)
        return first, first + second

    def height(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: states, ``(B, 9)``
        :return: heights of the tip, m, ``(B, 1)``
        """
        first, second = self.angles(states)
        return LENGTH * (first.cos() + second.cos())

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        first, second = self.angles(next_states)
        tip = next_states[:, 0:1] + LENGTH * (first.sin() + second.sin())
        speed, other_speed = next_states[:, 6:7], next_states[:, 7:8]
        cost = 0.01 * tip**2 + (self.height(next_states) - 2.0) ** 2 + 1e-3 * speed**2 + 5e-3 * other_speed**2
        return 10.0 * (~self.terminal(next_states)).to(states.dtype) - cost

    def terminal(self, states: th.Tensor) -> th.Tensor:
        return self.height(states) <= MIN_HEIGHT


class Rough(KnowsTheTip):
    """Rigid poles on a cart. The cart is 30 % too heavy, the poles 30 % too light, without damping, the rail without ends."""

    cart_mass, pole_mass = 13.6, 2.9  # kg
    motor_gain = 500.0  # N
    step_time, n_substeps = 0.05, 5  # s

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        position, velocity, speed, other_speed = states[:, 0:1], states[:, 5:6], states[:, 6:7], states[:, 7:8]
        first, second = self.angles(states)
        other_speed = speed + other_speed
        mass, half, dt = self.pole_mass, LENGTH / 2, self.step_time / self.n_substeps
        # Entries of the mass matrix
        total, upper, lower = self.cart_mass + 2 * mass, mass * (half + LENGTH), mass * half
        own, other, coupling = mass * (4 / 3 * half**2 + LENGTH**2), mass * 4 / 3 * half**2, mass * LENGTH * half
        for _ in range(self.n_substeps):
            a, b, c = upper * first.cos(), lower * second.cos(), coupling * (first - second).cos()
            swing = coupling * (first - second).sin()
            force = self.motor_gain * actions + upper * first.sin() * speed**2 + lower * second.sin() * other_speed**2
            torque = 9.81 * upper * first.sin() - swing * other_speed**2
            other_torque = 9.81 * lower * second.sin() + swing * speed**2
            # The cart's acceleration eliminated, then two equations for the poles
            own_left, other_left, c_left = own - a**2 / total, other - b**2 / total, c - a * b / total
            torque, other_torque = torque - a * force / total, other_torque - b * force / total
            determinant = own_left * other_left - c_left**2
            angular = (other_left * torque - c_left * other_torque) / determinant
            other_angular = (own_left * other_torque - c_left * torque) / determinant
            velocity = velocity + dt * (force - a * angular - b * other_angular) / total
            speed, other_speed = speed + dt * angular, other_speed + dt * other_angular
            position, first, second = position + dt * velocity, first + dt * speed, second + dt * other_speed
        joint = second - first
        parts = [position, first.sin(), joint.sin(), first.cos(), joint.cos(), velocity, speed, other_speed - speed]
        return th.cat([*parts, 0.0 * position], dim=1)


class Idea(NothingChanges, KnowsTheTip):
    """Knows where the tip is and when it is too low."""


class KnowsTheEnd(KnowsNothing):
    """Knows only when an episode ends."""

    def terminal(self, states: th.Tensor) -> th.Tensor:
        return KnowsTheTip().height(states) <= MIN_HEIGHT


TASK = OutsideTask(
    lambda: gym.make("InvertedDoublePendulum-v5"),
    {"rough": Rough, "idea": Idea, "end": KnowsTheEnd},
    steps=5000,
    every=250,
    zoo_id="InvertedDoublePendulum-v5",
    title="InvertedDoublePendulum-v5",
)
