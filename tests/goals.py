"""A point that moves to a goal: the same system with observations of all kinds of spaces."""

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mpg import PriorModel

N_STEPS = 20


class GoalEnv(gym.Env):
    """
    Position and speed of a point, and the position that it should have.

    :param kind: ``"goal"``: a dictionary with the keys of goal environments, ``"flat"``, ``"tuple"``, ``"table"``: two axes
    :param action_space: any box of one element
    :param is_sparse: whether the reward is -1 away from the goal and 0 at the goal
    """

    def __init__(self, kind="goal", action_space=None, is_sparse=False):
        def box(*shape):
            return spaces.Box(-3, 3, shape, np.float32)

        self.kind, self.is_sparse = kind, is_sparse
        parts = {"achieved_goal": box(1), "desired_goal": box(1), "observation": box(2)}
        self.observation_space = {
            "goal": spaces.Dict(parts),
            "flat": box(4),
            "tuple": spaces.Tuple(parts.values()),
            "table": box(2, 2),
        }[kind]
        self.action_space = spaces.Box(-1, 1, (1,), np.float32) if action_space is None else action_space

    def prior_model(self):
        return GoalModel()

    def _show(self):
        flat = np.array([self.position, self.goal, self.position, self.speed], np.float32)
        parts = {"achieved_goal": flat[:1], "desired_goal": flat[1:2], "observation": flat[2:]}
        return {"goal": parts, "flat": flat, "tuple": tuple(parts.values()), "table": flat.reshape(2, 2)}[self.kind]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.speed, self.goal = self.np_random.uniform(-1, 1, 3)
        self.n_steps = 0
        return self._show(), {}

    def compute_reward(self, achieved_goal, desired_goal, info):
        distance = np.abs(achieved_goal - desired_goal)[..., 0]
        return -(distance > 0.1).astype(np.float32) if self.is_sparse else -distance

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype)), action
        self.position = np.clip(self.position + 0.1 * self.speed, -3, 3)
        self.speed = np.clip(self.speed + 0.1 * np.asarray(action).flat[-1], -3, 3)
        self.n_steps += 1
        reward = float(self.compute_reward(np.array([self.position]), np.array([self.goal]), {}))
        return self._show(), reward, False, self.n_steps >= N_STEPS, {}


class GoalModel(PriorModel):
    """The keys in their order: achieved goal, desired goal, observation (position and speed)."""

    def transition(self, states, actions):
        _, goal, position, speed = states.split(1, dim=1)
        position = position + 0.1 * speed
        return th.cat([position, goal, position, speed + 0.1 * actions[:, -1:]], dim=1)

    def reward(self, states, actions, next_states):
        return -(next_states[:, :1] - next_states[:, 1:2]).abs()
