"""Recorded steps that say where they are from."""

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_mpg.common.buffers import RecordedSteps


def filled_buffer(cls=ReplayBuffer, n_envs=2, n_steps=130, size=200, **kwargs):
    """Step t of environment e holds observation (t, e), ends every 7 steps, and is followed by (t + 1, e), or (-1, e)."""
    box = spaces.Box(-1000, 1000, (2,), dtype=np.float32)
    buffer = cls(size * n_envs, box, spaces.Box(-1, 1, (1,), dtype=np.float32), n_envs=n_envs, device="cpu", **kwargs)
    for t in range(n_steps):
        obs = np.array([[t, e] for e in range(n_envs)], dtype=np.float32)
        done = np.full(n_envs, t % 7 == 6)
        next_obs = np.array([[-1 if t % 7 == 6 else t + 1, e] for e in range(n_envs)], dtype=np.float32)
        infos = [{"TimeLimit.truncated": t % 14 == 13} for _ in range(n_envs)]
        buffer.add(obs, next_obs, np.full((n_envs, 1), 0.5), np.full(n_envs, float(t)), done, infos)
    return RecordedSteps(buffer, lambda actions: 10 * actions, "cpu")
