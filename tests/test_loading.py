"""From what users pass as ``prior_model`` to a model."""

import pytest
import torch as th
from lq import LinearEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.models.loading import make_prior_model


class Sized(PriorModel):
    """A model that needs the sizes of the environment, as learned dynamics do."""

    def __init__(self, observation_space, action_space, gain: float = 1.0):
        super().__init__()
        self.gain = gain
        self.linear = th.nn.Linear(observation_space.shape[0] + action_space.shape[0], observation_space.shape[0])

    def transition(self, states, actions):
        return states + self.gain * self.linear(th.cat([states, actions], dim=1))

    def reward(self, states, actions, next_states):
        return -states.square().sum(dim=1, keepdim=True)


@pytest.fixture
def env():
    return DummyVecEnv([LinearEnv])


@pytest.mark.parametrize("make", [Sized, lambda action_space, observation_space: Sized(observation_space, action_space)])
def test_a_class_or_factory_gets_the_spaces_that_it_asks_for(env, make):
    model = make_prior_model(make, env)
    assert isinstance(model, Sized)
    assert model.linear.weight.shape == (2, 3)


def test_arguments_of_the_user_are_added_and_come_first(env):
    assert make_prior_model(Sized, env, {"gain": 2.0}).gain == 2.0
    narrow = LinearEnv().action_space
    assert make_prior_model(Sized, env, {"observation_space": narrow}).linear.weight.shape == (1, 2)


def test_a_class_that_asks_for_nothing_gets_nothing(env):
    class Plain(PriorModel):
        pass

    assert isinstance(make_prior_model(Plain, env), Plain)


def test_an_algorithm_trains_with_a_class_that_knows_its_sizes():
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Sized, horizons=(0, 2), learning_starts=20, batch_size=8, seed=0)
    model.learn(30)
    assert model.rollout_model.prior.linear.weight.shape == (2, 3)
