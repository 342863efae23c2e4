"""A region that is paid for: the smallest task whose reward jumps."""

import gymnasium as gym
import numpy as np

from sb3_mpg import PriorModel

N_STEPS, WIDTH, REACH = 10, 0.3, 0.4


class Region(gym.Env):
    """A point that is paid 1 in each step that ends in a region, and nothing outside of it."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def prior_model(self):
        return RegionModel()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.n_steps = self.np_random.uniform(-0.8, 0.8, 1), 0
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.position = np.clip(self.position + REACH * action, -1, 1)
        self.n_steps += 1
        is_inside = abs(self.position[0]) < WIDTH
        return self.position.astype(np.float32), float(is_inside), False, self.n_steps >= N_STEPS, {}


class RegionModel(PriorModel):
    """The exact model."""

    def transition(self, states, actions):
        return (states + REACH * actions).clamp(-1, 1)

    def reward(self, states, actions, next_states):
        return (next_states.abs() < WIDTH).float()
