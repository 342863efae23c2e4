"""Registers the environments of the Mixed Policy Gradient papers with Gymnasium: ``import sb3_mpg_envs`` is all it takes."""

from gymnasium.envs.registration import register

# Entry points are strings: importing this package must stay cheap (no torch, no MuJoCo, no pygame)
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
