"""Current of a DC motor in gym-electric-motor: follow a random reference for 500 steps of 0.1 ms, below the limit."""

import gymnasium as gym
import torch as th
from gymnasium.wrappers import FlattenObservation, TimeLimit
from outside.tasks.base import NothingChanges, OutsideTask

from sb3_mpg import PriorModel

# The motor; the package's own inductance is so small that any voltage breaks the limit within a step
MOTOR = {"r_a": 16e-3, "l_a": 19e-5, "psi_e": 0.165, "j_rotor": 0.025}  # Ohm, H, Vs, kg m^2
# Units of the observation
CURRENT, VOLTAGE, SPEED = 210.0, 60.0, 400.0  # A, V, rad/s
STEP_TIME = 1e-4  # s


def make_env() -> gym.Env:
    """
    :return: the environment, with a flat observation and a time limit
    """
    import gym_electric_motor

    env = gym_electric_motor.make("Cont-CC-PermExDc-v0", motor={"motor_parameter": MOTOR}, tau=STEP_TIME)
    return TimeLimit(FlattenObservation(env), 500)


class KnowsTheReward(PriorModel):
    """State: speed, torque, current, voltage, supply voltage, reference of the current, all in units of their limits."""

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        # The reference that was shown is the one that counts
        error = (next_states[:, 2:3] - states[:, 5:6]).abs() / 2
        return th.where(self.terminal(next_states), -10.0, -error)

    def terminal(self, states: th.Tensor) -> th.Tensor:
        return states[:, 2:3].abs() > 1.0


class Rough(KnowsTheReward):
    """
    An inductance in series with a resistance and the voltage of the motor: both 30 % too large, and the latter 30 % too small.
    The converter has no dead time, and the reference never changes.
    """

    resistance, inductance, psi = 1.3 * 16e-3, 1.3 * 19e-5, 0.7 * 0.165  # Ohm, H, Vs

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        speed, _, current, _, supply, reference = states.split(1, dim=1)
        voltage = VOLTAGE * actions - self.resistance * CURRENT * current - self.psi * SPEED * speed
        current = current + STEP_TIME * voltage / self.inductance / CURRENT
        return th.cat([speed, current, current, actions, supply, reference], dim=1)


class Idea(NothingChanges, KnowsTheReward):
    """Knows reward and limit."""


TASK = OutsideTask(
    make_env,
    {"rough": Rough, "idea": Idea},
    steps=3000,
    every=250,
    zoo_id="Cont-CC-PermExDc-v0",
    title="DC motor (gym-electric-motor)",
)
