"""Swing-up of dm_control's cart-pole, through Shimmy: 1000 steps of 10 ms, a reward between 0 and 1 for each."""

import math

import gymnasium as gym
import torch as th
from gymnasium.wrappers import FlattenObservation
from outside.tasks.base import NothingChanges, OutsideTask

from sb3_mpg import PriorModel


def make_env() -> gym.Env:
    """
    :return: the environment, with a flat observation
    """
    from shimmy.registration import register_gymnasium_envs

    if "dm_control/cartpole-swingup-v0" not in gym.registry:
        register_gymnasium_envs()
    return FlattenObservation(gym.make("dm_control/cartpole-swingup-v0"))


def closeness(values: th.Tensor, margin: float) -> th.Tensor:
    """
    :param values: any values
    :param margin: what is a tenth as good as zero
    :return: 1 at zero, 0.1 at the margin
    """
    return (math.log(0.1) * (values / margin) ** 2).exp()


class KnowsTheReward(PriorModel):
    """State: position, cosine and sine of the angle, velocity, angular velocity."""

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        position, cos, _, _, speed = next_states.split(1, dim=1)
        is_gentle = (1.0 - actions**2).clamp(min=0.0)
        return (cos + 1) / 2 * (4 + is_gentle) / 5 * (1 + closeness(speed, 5.0)) / 2 * (1 + closeness(position, 2.0)) / 2


class Rough(KnowsTheReward):
    """A textbook's cart-pole: masses 30 and 40 % too large, the pole 30 % too short, a rail without ends."""

    cart_mass, pole_mass = 1.3, 0.14  # kg
    half_length = 0.35  # m, from the joint to the centre of mass
    motor_gain = 10.0  # N
    step_time = 0.01  # s

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        position, cos, sin, velocity, speed = states.split(1, dim=1)
        mass, moment = self.cart_mass + self.pole_mass, self.pole_mass * self.half_length
        push = (self.motor_gain * actions + moment * speed**2 * sin) / mass
        angular = (9.81 * sin - cos * push) / (self.half_length * (4 / 3 - self.pole_mass * cos**2 / mass))
        velocity = velocity + self.step_time * (push - moment * angular * cos / mass)
        speed = speed + self.step_time * angular
        angle = th.atan2(sin, cos) + self.step_time * speed
        return th.cat([position + self.step_time * velocity, angle.cos(), angle.sin(), velocity, speed], dim=1)


class Idea(NothingChanges, KnowsTheReward):
    """Knows what is rewarded."""


TASK = OutsideTask(
    make_env,
    {"rough": Rough, "idea": Idea},
    steps=5000,
    every=500,
    zoo_id="dm_control/cartpole-swingup-v0",
    title="cart-pole swing-up, 100 Hz",
)
