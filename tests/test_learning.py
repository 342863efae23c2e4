"""Training reaches what can be computed by hand."""

import gymnasium as gym
import numpy as np
import pytest
from lq import LinearEnv

from sb3_mpg import MPG


@pytest.mark.expensive
def test_learns_the_linear_system():
    env = gym.wrappers.TimeLimit(LinearEnv(), 50)
    model = MPG("MlpPolicy", env, policy_kwargs={"net_arch": [32]}, learning_starts=200, seed=0, horizons=(0, 10)).learn(1500)
    costs = {}
    for name in ("trained", "zero"):
        obs, _ = env.reset(seed=5)
        costs[name], done = 0.0, False
        while not done:
            action = model.predict(obs, deterministic=True)[0] if name == "trained" else np.zeros(1)
            obs, reward, terminated, truncated, _ = env.step(action)
            costs[name] += reward
            done = terminated or truncated
    assert costs["trained"] > 0.8 * costs["zero"]
