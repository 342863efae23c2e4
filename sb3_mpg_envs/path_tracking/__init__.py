from sb3_mpg_envs.path_tracking.dynamics import VehicleParameters
from sb3_mpg_envs.path_tracking.env import PathTrackingEnv
from sb3_mpg_envs.path_tracking.model import PathTrackingModel
from sb3_mpg_envs.path_tracking.simulator import PathTrackingSimulator
from sb3_mpg_envs.path_tracking.vec_env import PathTrackingVecEnv, PathTrackingVectorEnv

__all__ = [
    "PathTrackingEnv",
    "PathTrackingModel",
    "PathTrackingSimulator",
    "PathTrackingVecEnv",
    "PathTrackingVectorEnv",
    "VehicleParameters",
]
