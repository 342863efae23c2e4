"""Prior models from perfect to useless, for the benchmark of the default settings."""

from collections.abc import Callable

import torch as th

from sb3_mpg import PriorModel
from sb3_mpg_envs.inverted_pendulum.model import InvertedPendulumModel
from sb3_mpg_envs.path_tracking.model import PathTrackingModel


class KnowsNothing(PriorModel):
    """The state never changes and all rewards are zero."""

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return states + 0.0 * actions.sum(dim=1, keepdim=True)

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return 0.0 * (states.sum(dim=1, keepdim=True) + actions.sum(dim=1, keepdim=True))


class Explodes(PriorModel):
    """
    Another model for five steps, then wrong by a factor of a thousand in each step. Its state is that of the other model and
    the number of steps since the start of the rollout.

    :param model: the other model
    """

    def __init__(self, model: PriorModel):
        super().__init__()
        self.model = model

    def state_from_observation(self, observations: th.Tensor) -> th.Tensor:
        return th.cat([self.model.state_from_observation(observations), th.zeros_like(observations[:, :1])], dim=1)

    def observation(self, states: th.Tensor) -> th.Tensor:
        return self.model.observation(states[:, :-1])

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        age = states[:, -1:]
        next_states = self.model.transition(states[:, :-1], actions)
        return th.cat([th.where(age < 5, next_states, 1000.0 * next_states), age + 1.0], dim=1)

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return self.model.reward(states[:, :-1], actions, next_states[:, :-1])


MODELS: dict[str, dict[str, Callable[[], PriorModel]]] = {
    "path_tracking": {
        "exact": PathTrackingModel.exact,
        "papers": PathTrackingModel,
        "sign_flipped": lambda: PathTrackingModel(steering_gain=-1.0),
        "knows_nothing": KnowsNothing,
        "explodes": lambda: Explodes(PathTrackingModel.exact()),
    },
    "pendulum": {
        "exact": InvertedPendulumModel.exact,
        "papers": InvertedPendulumModel,
        "sign_flipped": lambda: InvertedPendulumModel(force_gain=-1.0),
        "knows_nothing": KnowsNothing,
        "explodes": lambda: Explodes(InvertedPendulumModel.exact()),
    },
}
