"""A linear-quadratic problem whose policy gradients are known in closed form, written without the library's rollout."""

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mpg import PriorModel


class LinearModel(PriorModel):
    """s' = A s + B a, r = -s'Qs - a'Ra, in double or single precision."""

    def __init__(self, a: th.Tensor, b: th.Tensor, q: th.Tensor, r: th.Tensor):
        super().__init__()
        for name, matrix in {"a": a, "b": b, "q": q, "r": r}.items():
            self.register_buffer(name, matrix)

    def transition(self, states, actions):
        return states @ self.a.T + actions @ self.b.T

    def reward(self, states, actions, next_states):
        cost = ((states @ self.q) * states).sum(1, keepdim=True) + ((actions @ self.r) * actions).sum(1, keepdim=True)
        return -cost


class LinearActor(th.nn.Module):
    """a = K s, unbounded: the rollout does not care."""

    def __init__(self, k: th.Tensor):
        super().__init__()
        self.k = th.nn.Parameter(k)

    def forward(self, observations):
        return observations @ self.k.T


def quadratic_q(p_ss: th.Tensor, p_sa: th.Tensor, p_aa: th.Tensor):
    """Q(s, a) = -(s'P_ss s + 2 s'P_sa a + a'P_aa a), any matrices: a critic with errors."""

    def q_function(observations, actions):
        return -(
            ((observations @ p_ss) * observations).sum(1, keepdim=True)
            + 2 * ((observations @ p_sa) * actions).sum(1, keepdim=True)
            + ((actions @ p_aa) * actions).sum(1, keepdim=True)
        )

    return q_function


def tensors(*arrays: np.ndarray) -> list[th.Tensor]:
    """In double precision."""
    return [th.as_tensor(array, dtype=th.float64) for array in arrays]


def analytic_gradient(
    s: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    q: np.ndarray,
    r: np.ndarray,
    k: np.ndarray,
    critic,
    horizon: int,
    gamma: float,
) -> np.ndarray:
    """
    The unified gradient of J_n with respect to K (eq. 6), at one state, by matrix algebra: the return as a quadratic form in
    the first action, its derivative there, times the derivative of K s.
    """
    p_ss, p_sa, p_aa = critic
    a0 = k @ s
    closed = a + b @ k
    if horizon == 0:
        return np.outer(-2 * (p_sa.T @ s + p_aa @ a0), s)
    # Cost matrices of the closed loop from the second state on: M_1 = q + k'rk + gamma closed' M_2 closed, ...
    m = p_ss + p_sa @ k + (p_sa @ k).T + k.T @ p_aa @ k
    for _ in range(horizon - 1):
        m = q + k.T @ r @ k + gamma * closed.T @ m @ closed
    s1 = a @ s + b @ a0
    d_return_d_action = -2 * r @ a0 - gamma * 2 * b.T @ m @ s1
    return np.outer(d_return_d_action, s)


def random_problem(n_states: int = 3, n_actions: int = 2, seed: int = 0):
    """Symmetric costs, a stable closed loop, and a critic that is not the value function."""
    rng = np.random.default_rng(seed)

    def positive(n):
        root = rng.normal(size=(n, n))
        return root @ root.T / n + 0.1 * np.eye(n)

    a = rng.normal(size=(n_states, n_states))
    a *= 0.9 / np.abs(np.linalg.eigvals(a)).max()
    b = 0.3 * rng.normal(size=(n_states, n_actions))
    k = 0.3 * rng.normal(size=(n_actions, n_states))
    critic = (positive(n_states), rng.normal(size=(n_states, n_actions)), positive(n_actions))
    return a, b, positive(n_states), positive(n_actions), k, critic


def rollout_problem(n_states: int = 3, n_actions: int = 2, seed: int = 0):
    """The matrices of :func:`random_problem`, and model, policy and critic that are made of them."""
    matrices = a, b, q, r, k, critic = random_problem(n_states, n_actions, seed)
    return matrices, LinearModel(*tensors(a, b, q, r)), LinearActor(th.as_tensor(k)), quadratic_q(*tensors(*critic))


# Beyond it an episode ends, where that is asked for
LIMIT = 0.5


class LinearEnv(gym.Env):
    """A stable linear system, with a prior model and a simulator: the smallest environment that everything runs on."""

    dtype = np.float32
    low, high = -2.0, 2.0

    def __init__(self, noise: float = 0.0, ends: str | None = None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), self.dtype)
        self.action_space = spaces.Box(self.low, self.high, (1,), np.float32)
        self.a = np.array([[1.0, 0.1], [-0.1, 0.9]])
        self.b = np.array([[0.0], [0.1]])
        self.noise, self.ends = noise, ends

    def prior_model(self, bias: float = 0.0) -> PriorModel:
        tensors = [th.as_tensor(m, dtype=th.float32) for m in (self.a + bias, self.b, np.eye(2), 0.1 * np.eye(1))]
        return LinearModel(*tensors)

    def make_simulator(self, num_agents: int) -> "LinearSimulator":
        return LinearSimulator(self, num_agents)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=2)
        return self.state.astype(self.dtype), {}

    def step(self, action):
        reward = -float(self.state @ self.state + 0.1 * action @ action)
        self.state = self.a @ self.state + self.b @ action + self.noise * self.np_random.normal(size=2)
        is_outside = bool(abs(self.state[0]) > LIMIT)
        ends = self.ends
        return (
            self.state.astype(self.dtype),
            reward,
            is_outside and ends == "terminated",
            is_outside and ends == "truncated",
            {},
        )


class LinearSimulator:
    """Many ``LinearEnv`` at once."""

    def __init__(self, env: LinearEnv, num_agents: int):
        self.env, self.num_agents = env, num_agents

    def set_state(self, observations):
        assert observations.shape == (self.num_agents, 2)
        self.states = observations.astype(np.float64)
        return observations

    def step(self, actions, indices):
        indices = slice(None) if indices is None else indices
        states = self.states[indices]
        rewards = -((states**2).sum(1) + 0.1 * (actions**2).sum(1))
        states = self.states[indices] = states @ self.env.a.T + actions @ self.env.b.T
        is_outside = np.abs(states[:, 0]) > LIMIT
        ends = self.env.ends
        return states.astype(np.float32), rewards, is_outside & (ends == "terminated"), is_outside & (ends == "truncated")
