"""Where the tasks of Gymnasium end, compared with the tasks themselves."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.monitor import Monitor

from sb3_mpg.common.models.known_ends import NEVER_TERMINATE, known_terminal

pytest.importorskip("mujoco")

SMALL_OBSERVATIONS = {
    "Ant-v5": {"include_cfrc_ext_in_observation": False},
    "Humanoid-v5": {f"include_{part}_in_observation": False for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")},
}
TASKS = [
    *((env_id, {}) for env_id in ("InvertedPendulum-v5", "InvertedDoublePendulum-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")),
    *((env_id, {}) for env_id in ("Humanoid-v5", *NEVER_TERMINATE)),
    *SMALL_OBSERVATIONS.items(),
    ("Hopper-v5", {"terminate_when_unhealthy": False}),
    ("Hopper-v5", {"healthy_angle_range": (-0.05, 0.1), "healthy_z_range": (1.0, 2.0)}),
    ("Hopper-v5", {"healthy_state_range": (-2.0, 2.0)}),
    ("Walker2d-v5", {"healthy_z_range": (1.1, 1.4)}),
    ("Ant-v5", {"healthy_z_range": (0.5, 0.9)}),
]


@pytest.mark.parametrize(("env_id", "kwargs"), TASKS, ids=str)
def test_they_end_where_the_task_does(env_id, kwargs):
    n_steps = 1000 if "Humanoid" in env_id or env_id == "Pusher-v5" else 3000
    env = gym.make(env_id, **kwargs)
    terminal = known_terminal(env.spec)
    env.action_space.seed(0)
    env.reset(seed=0)
    next_observations, terminated = [], []
    for _ in range(n_steps):
        observation, _, ends, truncated, _ = env.step(env.action_space.sample())
        next_observations.append(observation)
        terminated.append(ends)
        if ends or truncated:
            env.reset()
    env.close()
    predicted = terminal(th.as_tensor(np.array(next_observations)))
    assert predicted.dtype == th.bool and predicted.shape == (n_steps, 1)
    assert predicted[:, 0].tolist() == terminated
    assert any(terminated) == (env_id not in NEVER_TERMINATE and kwargs.get("terminate_when_unhealthy", True))


def test_an_overflow_is_an_end():
    observations = th.zeros(2, 4)
    observations[1, 2] = th.nan
    assert known_terminal(gym.spec("InvertedPendulum-v5"))(observations)[:, 0].tolist() == [False, True]


def test_what_changes_the_observation_makes_it_unknown():
    assert known_terminal(None) is None
    assert known_terminal(gym.spec("MountainCarContinuous-v0")) is None
    hopper = {"exclude_current_positions_from_observation": False}
    assert known_terminal(gym.make("Hopper-v5", **hopper).spec) is None
    env = gym.make("Hopper-v5")
    assert known_terminal(Monitor(gym.wrappers.ClipAction(env)).spec) is not None
    assert known_terminal(gym.wrappers.NormalizeObservation(env).spec) is None
