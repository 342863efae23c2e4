"""What a task consists of, and the model that knows the reward but not the dynamics."""

from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import torch as th

from sb3_mpg import PriorModel

# Models of every task: as a practitioner writes it in an hour, with the reward only, and without either
MODELS = ("rough", "idea", "nothing")


class OutsideTask(NamedTuple):
    """
    :param make_env: returns a new environment, with its time limit
    :param models: prior models by name: those of ``MODELS``, and what else is of interest for this task
    :param steps: number of environment steps of a run
    :param every: number of environment steps between evaluations
    :param zoo_id: name of the environment in the files of hyperparameters of RL Zoo
    :param title: title of its panel in a figure
    """

    make_env: Callable[[], gym.Env]
    models: dict[str, Callable[[], PriorModel]]
    steps: int
    every: int
    zoo_id: str
    title: str


class NothingChanges(PriorModel):
    """Knows no dynamics: the next state is the state."""

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return states + 0.0 * actions.sum(dim=1, keepdim=True)
