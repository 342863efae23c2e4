"""Linear environments of any spaces, with the models and simulators that algorithms may ask for."""

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from lq import LinearModel

from sb3_mpg import PriorModel

OBSERVATIONS = spaces.Box(-10, 10, (2,), np.float32)
ACTIONS = spaces.Box(-2, 2, (1,), np.float32)


def boxes_of(space):
    """The boxes that a space is made of, in the order of ``gymnasium.spaces.flatten``."""
    if isinstance(space, spaces.Box):
        return [space]
    return list(space.spaces.values()) if isinstance(space, spaces.Dict) else list(space.spaces)


class LinearSystem(gym.Env):
    """
    x' = 0.9 x + 0.5 B a and r = -x'x - 0.1 a'a, where x and a are the flat observation and the flat action. Integers are
    rounded.

    :param offers: the methods of a user's environment that this one has
    :param max_steps: number of steps until an episode is truncated
    """

    # SB3 makes environments by name with it
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(
        self, observation_space=OBSERVATIONS, action_space=ACTIONS, offers=("prior_model", "make_simulator"), max_steps=None
    ):
        self.observation_space, self.action_space = observation_space, action_space
        boxes = boxes_of(observation_space)
        self.low, self.high = (np.concatenate([getattr(box, name).ravel() for box in boxes]) for name in ("low", "high"))
        self.is_integer = np.concatenate([np.full(box.low.size, box.dtype.kind in "iu") for box in boxes])
        n_states, n_actions = len(self.low), spaces.flatdim(action_space)
        self.a = 0.9 * np.eye(n_states)
        self.b = 0.5 * (np.arange(n_states)[:, None] % n_actions == np.arange(n_actions))
        self.max_steps = max_steps
        for name in offers:
            setattr(self, name, getattr(self, f"_{name}"))

    def _prior_model(self):
        costs = np.eye(len(self.a)), 0.1 * np.eye(self.b.shape[1])
        return LinearModel(*(th.as_tensor(matrix, dtype=th.float32) for matrix in (self.a, self.b, *costs)))

    def _make_simulator(self, num_agents):
        return LinearSimulator(self, num_agents)

    def observe(self, states):
        """What is observed of states, still flat."""
        states = np.clip(states, self.low, self.high)
        return np.where(self.is_integer, np.round(states), states)

    def next_states(self, states, actions):
        return self.observe(states @ self.a.T + actions @ self.b.T)

    def rewards(self, states, actions):
        return -(states**2).sum(-1) - 0.1 * (actions**2).sum(-1)

    def _observation(self):
        return spaces.unflatten(self.observation_space, self.state)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.observe(self.np_random.uniform(-3, 3, len(self.low)))
        self.n_steps = 0
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        action = np.ravel(action).astype(np.float64)
        reward = float(self.rewards(self.state, action))
        self.state = self.next_states(self.state, action)
        self.n_steps += 1
        return self._observation(), reward, False, self.n_steps == self.max_steps, {}


class LinearSimulator:
    """Many environments at once, in flat observations and actions."""

    def __init__(self, env, num_agents):
        self.env, self.num_agents = env, num_agents

    def set_state(self, observations):
        self.states = observations.astype(np.float64)
        return observations

    def step(self, actions, indices):
        indices = slice(None) if indices is None else indices
        rewards = self.env.rewards(self.states[indices], actions)
        self.states[indices] = self.env.next_states(self.states[indices], actions)
        never = np.zeros(len(actions), dtype=bool)
        return self.states[indices].astype(np.float32), rewards, never, never


class GoalModel(PriorModel):
    """p' = p + 0.1 a, and the reward of ``GoalEnv``."""

    def transition(self, states, actions):
        position = states[:, :2] + 0.1 * actions
        return th.cat([position, states[:, 2:4], position], dim=1)

    def reward(self, states, actions, next_states):
        return -(next_states[:, :2] - next_states[:, 2:4]).square().sum(1, keepdim=True)


class GoalEnv(gym.Env):
    """A point is moved to a goal in the plane within eight steps."""

    def __init__(self, offers=("prior_model", "make_simulator")):
        box = spaces.Box(-2, 2, (2,), np.float32)
        self.observation_space = spaces.Dict(achieved_goal=box, desired_goal=box, observation=box)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        for name in offers:
            setattr(self, name, getattr(self, f"_{name}"))

    def _prior_model(self):
        return GoalModel()

    def _make_simulator(self, num_agents):
        return GoalSimulator(self, num_agents)

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -np.square(achieved_goal - desired_goal).sum(-1)

    def _observation(self):
        position = self.position.astype(np.float32)
        return {"achieved_goal": position, "desired_goal": self.goal, "observation": position}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(2)
        self.goal = self.np_random.uniform(-0.4, 0.4, 2).astype(np.float32)
        self.n_steps = 0
        return self._observation(), {}

    def step(self, action):
        self.position = self.position + 0.1 * action
        self.n_steps += 1
        reward = float(self.compute_reward(self.position, self.goal, {}))
        return self._observation(), reward, False, self.n_steps == 8, {"is_success": reward > -0.1}


class GoalSimulator(LinearSimulator):
    def step(self, actions, indices):
        indices = slice(None) if indices is None else indices
        position = self.states[indices, :2] + 0.1 * actions
        self.states[indices, :2] = self.states[indices, 4:] = position
        rewards = self.env.compute_reward(position, self.states[indices, 2:4], {})
        never = np.zeros(len(actions), dtype=bool)
        return self.states[indices].astype(np.float32), rewards, never, never


gym.register("LinearSystem-v0", entry_point=LinearSystem)
