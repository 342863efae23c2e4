"""Both tasks, for tests that run with each of them."""

import gymnasium as gym
import numpy as np

from sb3_mpg_envs.inverted_pendulum import InvertedPendulumContiEnv, InvertedPendulumContiVecEnv, InvertedPendulumSimulator
from sb3_mpg_envs.path_tracking import PathTrackingEnv, PathTrackingSimulator, PathTrackingVecEnv

ENV_IDS = ["PathTracking-v0", "InvertedPendulumConti-v0"]
ENV_CLASSES = [PathTrackingEnv, InvertedPendulumContiEnv]
VEC_ENV_CLASSES = [PathTrackingVecEnv, InvertedPendulumContiVecEnv]
SIMULATOR_CLASSES = [PathTrackingSimulator, InvertedPendulumSimulator]
# A start from which no action leads into the early-reset region within a few steps
SAFE_STATE = {
    "PathTracking-v0": np.array([0.5, 0.1, 0.02, 0.3, 0.05, 40.0], dtype=np.float32),
    "InvertedPendulumConti-v0": np.array([0.1, 0.01, -0.02, 0.01], dtype=np.float32),
}
LOST_STATE = {
    "PathTracking-v0": np.array([0.0, 0.0, 0.0, 4.0, 0.0, 40.0], dtype=np.float32),
    "InvertedPendulumConti-v0": np.array([0.0, 0.4, 0.0, 0.0], dtype=np.float32),
}


def sample_actions(space: gym.spaces.Box, n_actions: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(space.low, space.high, (n_actions, *space.shape)).astype(np.float32)
