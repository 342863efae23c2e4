"""Pendulum-v1: swing a pendulum up with a motor that is too weak to lift it at once."""

import ast
import re
from typing import Any

import gymnasium as gym
import torch as th
from machine import REPOSITORY
from outside.tasks.base import NothingChanges, OutsideTask

from sb3_mpg import PriorModel


def model_of_readme(name: str = "MyPendulum") -> PriorModel:
    """
    :param name: name of a class in a code block of the README, which is the only place of its code
    :return: the prior model
    """
    path = REPOSITORY / "README.md"
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
        if f"class {name}(" in block:
            tree = ast.parse(block)
            tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))]
            namespace: dict[str, Any] = {"__name__": "readme"}
            exec(compile(tree, str(path), "exec"), namespace)
            return namespace[name]()
    raise ValueError(f"{path} has no code block with a class {name}")


class KnowsTheCost(PriorModel):
    """State: cosine and sine of the angle, angular velocity."""

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        cos, sin, speed = states.split(1, dim=1)
        return -(th.atan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * actions**2)


class Rough(KnowsTheCost):
    """A pendulum that is 30 % too heavy (the motor turns it too little), and whose gravity is 30 % too weak."""

    gravity, motor_gain = 10.5, 2.3  # rad/s^2
    step_time = 0.05  # s

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        cos, sin, speed = states.split(1, dim=1)
        speed = speed + self.step_time * (self.gravity * sin + self.motor_gain * actions)
        angle = th.atan2(sin, cos) + self.step_time * speed
        return th.cat([angle.cos(), angle.sin(), speed], dim=1)


class Idea(NothingChanges, KnowsTheCost):
    """Knows what costs."""


TASK = OutsideTask(
    lambda: gym.make("Pendulum-v1"),
    {"rough": Rough, "idea": Idea, "readme": model_of_readme},
    steps=5000,
    every=250,
    zoo_id="Pendulum-v1",
    title="Pendulum-v1",
)
