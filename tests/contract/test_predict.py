"""Actions for one observation and for many."""

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor


class BoxOfTheUser(spaces.Box):
    """A subclass is a box as well."""


def test_shapes_and_types(case):
    model = case.make()
    env = case.env()
    observation, _ = env.reset(seed=0)
    for deterministic in (True, False):
        action, state = model.predict(observation, deterministic=deterministic)
        assert isinstance(action, np.ndarray) and state is None
        assert env.action_space.contains(action)
        observations = make_vec_env(case.env, 2).reset()
        actions, _ = model.predict(observations, deterministic=deterministic)
        assert isinstance(actions, np.ndarray) and actions.shape == (2, 1)


def test_one_observation_is_a_row_of_many(case):
    model = case.make().learn(16)
    observations = make_vec_env(case.env, 3, seed=0).reset()
    actions, _ = model.predict(observations, deterministic=True)
    for observation, action in zip(observations, actions, strict=True):
        np.testing.assert_allclose(model.predict(observation, deterministic=True)[0], action, rtol=1e-5)
    assert len(np.unique(actions)) == 3


def test_the_answer_of_reset_is_no_observation(case):
    with pytest.raises(ValueError, match="mixing Gym API with SB3 VecEnv API"):
        case.make().predict(case.env().reset())


def test_environments_are_wrapped(case):
    for env in (case.env(), Monitor(case.env())):
        model = case.make(env).learn(12)
        assert model.get_env().num_envs == 1
        assert model.get_env().env_is_wrapped(Monitor) == [True]


def test_subclasses_of_box(case):
    env = case.env(BoxOfTheUser(-1, 1, (2,), np.float32), BoxOfTheUser(-1, 1, (2,), np.float32))
    model = case.make(env).learn(14)
    observation, _ = env.reset(seed=0)
    env.step(model.predict(observation)[0])
