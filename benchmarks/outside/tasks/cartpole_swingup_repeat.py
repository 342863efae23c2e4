"""The same swing-up with each action repeated four times: 250 steps of 40 ms."""

from typing import Any, SupportsFloat

import gymnasium as gym
import torch as th
from outside.tasks import cartpole_swingup
from outside.tasks.base import OutsideTask

N_REPEATS = 4


class RepeatAction(gym.Wrapper):
    """
    Repeats each action and adds the rewards up.

    :param env: the environment
    :param n_repeats: number of steps of the environment in a step
    """

    def __init__(self, env: gym.Env, n_repeats: int):
        super().__init__(env)
        self.n_repeats = n_repeats

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(self.n_repeats):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


class Rough(cartpole_swingup.Rough):
    """The other model, in as many steps; all of them are rewarded as the last."""

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        for _ in range(N_REPEATS):
            states = super().transition(states, actions)
        return states

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return N_REPEATS * super().reward(states, actions, next_states)


class Idea(cartpole_swingup.Idea):
    """Knows what is rewarded."""

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return N_REPEATS * super().reward(states, actions, next_states)


TASK = OutsideTask(
    lambda: RepeatAction(cartpole_swingup.make_env(), N_REPEATS),
    {"rough": Rough, "idea": Idea},
    steps=4000,
    every=250,
    zoo_id=cartpole_swingup.TASK.zoo_id,
    title="cart-pole swing-up, 25 Hz",
)
