"""The environments of the Mixed Policy Gradient papers. Importing this package registers them with Gymnasium."""

from gymnasium.envs.registration import register

# Entry points are strings, so that importing this package imports neither torch nor MuJoCo nor pygame
register(
    id="PathTracking-v0",
    entry_point="sb3_mpg_envs.path_tracking.env:PathTrackingEnv",
    vector_entry_point="sb3_mpg_envs.path_tracking.vec_env:PathTrackingVectorEnv",
    max_episode_steps=200,
)

register(
    id="InvertedPendulumConti-v0",
    entry_point="sb3_mpg_envs.inverted_pendulum.env:InvertedPendulumContiEnv",
    vector_entry_point="sb3_mpg_envs.inverted_pendulum.vec_env:InvertedPendulumContiVectorEnv",
    max_episode_steps=100,
)
