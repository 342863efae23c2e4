"""A cart, and models of it: what the checker is tried with."""

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mpg import PriorModel

TIME_STEP = 0.1
MASS = 2.0
OBSERVATION_SPACE = spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACTION_SPACE = spaces.Box(-2.0, 2.0, (1,), np.float32)


class Cart(gym.Env):
    """Position and velocity of a cart that is pushed; terminates far away."""

    observation_space = OBSERVATION_SPACE
    action_space = ACTION_SPACE

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1.0, 1.0, size=2)
        self.n_steps = 0
        return self.state.astype(np.float32), {}

    def step(self, action):
        position, velocity = self.state
        reward = float(-(position**2) - 0.1 * action[0] ** 2)
        self.state = np.array([position + TIME_STEP * velocity, velocity + TIME_STEP / MASS * float(action[0])])
        self.n_steps += 1
        terminated = bool(abs(self.state[0]) > 1.5)
        return self.state.astype(np.float32), reward, terminated, self.n_steps >= 40, {}


class CartModel(PriorModel):
    """The exact model."""

    def transition(self, states, actions):
        position, velocity = states.split(1, dim=1)
        return th.cat([position + TIME_STEP * velocity, velocity + TIME_STEP / MASS * actions], dim=1)

    def reward(self, states, actions, next_states):
        return -(states[:, :1] ** 2) - 0.1 * (actions**2).sum(dim=1, keepdim=True)

    def terminal(self, states):
        return states[:, :1].abs() > 1.5


class ChangedCart(CartModel):
    """The exact model with one thing changed."""

    def __init__(self, bias=0.0, gain=1.0, velocity_sign=1.0, reward_scale=1.0):
        super().__init__()
        self.bias, self.gain, self.velocity_sign, self.reward_scale = bias, gain, velocity_sign, reward_scale

    def transition(self, states, actions):
        position, velocity = states.split(1, dim=1)
        position = position + self.velocity_sign * TIME_STEP * velocity
        return th.cat([position, velocity + self.gain * TIME_STEP / MASS * actions + self.bias], dim=1)

    def reward(self, states, actions, next_states):
        return self.reward_scale * super().reward(states, actions, next_states)


class TurntableEnv(gym.Env):
    """An angle that wraps, see ``models.Turntable``."""

    observation_space = spaces.Box(-np.pi, np.pi, (1,), np.float32)
    action_space = ACTION_SPACE

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.angle = self.np_random.uniform(-np.pi, np.pi, 1)
        return self.angle.astype(np.float32), {}

    def step(self, action):
        reward = float(np.cos(self.angle[0]))
        self.angle = np.remainder(self.angle + 0.5 + 0.1 * action + np.pi, 2 * np.pi) - np.pi
        return self.angle.astype(np.float32), reward, False, False, {}
