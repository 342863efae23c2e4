"""The same swing-up with a step of 10 ms instead of 50: what a policy decides in a step matters a fifth as much."""

import gymnasium as gym
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from gymnasium.wrappers import TimeLimit
from outside.tasks import pendulum
from outside.tasks.base import OutsideTask

STEP_TIME = 0.01  # s
N_STEPS = 1000


def make_env() -> gym.Env:
    """
    :return: the environment, with the time limit of Pendulum-v1
    """
    env = PendulumEnv()
    env.dt = STEP_TIME
    return TimeLimit(env, N_STEPS)


class Rough(pendulum.Rough):
    """The other model, with the right step."""

    step_time = STEP_TIME


TASK = OutsideTask(
    make_env,
    {"rough": Rough, "idea": pendulum.Idea},
    steps=4000,
    every=500,
    # Nothing is tuned for so short a step
    zoo_id="",
    title="Pendulum, 100 Hz",
)
