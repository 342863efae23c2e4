from sb3_mpg_envs.inverted_pendulum.dynamics import PendulumParameters
from sb3_mpg_envs.inverted_pendulum.env import InvertedPendulumContiEnv
from sb3_mpg_envs.inverted_pendulum.model import InvertedPendulumModel
from sb3_mpg_envs.inverted_pendulum.simulator import InvertedPendulumSimulator
from sb3_mpg_envs.inverted_pendulum.vec_env import InvertedPendulumContiVecEnv, InvertedPendulumContiVectorEnv

__all__ = [
    "InvertedPendulumContiEnv",
    "InvertedPendulumContiVecEnv",
    "InvertedPendulumContiVectorEnv",
    "InvertedPendulumModel",
    "InvertedPendulumSimulator",
    "PendulumParameters",
]
