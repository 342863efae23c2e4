"""An interrupted training gives the same as one without interruption, and the seed is that of the model, too."""

from functools import partial

import numpy as np
import pytest
import torch as th
from helpers import assert_same_parameters
from lq import LinearEnv
from settings import ALGORITHMS, SMALL
from stable_baselines3.common.env_util import make_vec_env

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, PriorModel
from sb3_mpg.common import off_policy_model_algorithm
from sb3_mpg.common.model_fitting import ModelFitting


@pytest.fixture
def models_are_fitted_briefly(monkeypatch):
    """Long enough for a right model to be trusted, not until it has converged."""
    monkeypatch.setattr(off_policy_model_algorithm, "ModelFitting", partial(ModelFitting, max_fits=100))


@pytest.mark.usefixtures("models_are_fitted_briefly")
@pytest.mark.parametrize("name", ["v1", "v2", "ndpg", "measured", "compared"])
@pytest.mark.parametrize("env_id", ["PathTracking-v0", "InvertedPendulumConti-v0"])
def test_continuing_equals_not_stopping(name, env_id, tmp_path):
    """Bit-identical parameters after saving and loading in the middle, with the environment seeded anew at the cut."""
    cls, kwargs = ALGORITHMS[name]

    def first_half():
        return cls("MlpPolicy", make_vec_env(env_id, 2, seed=0), **SMALL, **kwargs).learn(121)

    def second_half(model):
        model.env.seed(7)
        model._last_obs = None
        return model.learn(121, reset_num_timesteps=False)

    uninterrupted = first_half()
    th.manual_seed(11)  # what happens in between does not matter ...
    uninterrupted.save(tmp_path / "model.zip")
    uninterrupted.save_replay_buffer(tmp_path / "buffer.pkl")
    uninterrupted = second_half(uninterrupted)

    np.random.seed(99)
    th.rand(100)
    resumed = cls.load(tmp_path / "model.zip", env=make_vec_env(env_id, 2, seed=123))
    resumed.load_replay_buffer(tmp_path / "buffer.pkl")
    resumed = second_half(resumed)

    assert resumed._n_updates == uninterrupted._n_updates > 80
    assert_same_parameters(uninterrupted, resumed)
    for optimizer in ("actor", "critic"):
        expected = getattr(uninterrupted, optimizer).optimizer.state_dict()
        value = getattr(resumed, optimizer).optimizer.state_dict()
        assert expected["param_groups"] == value["param_groups"]
        th.testing.assert_close(value["state"], expected["state"], rtol=0, atol=0)


class RandomPrior(PriorModel):
    def __init__(self):
        super().__init__()
        self.network = th.nn.Linear(3, 2)

    def transition(self, states, actions):
        return states + self.network(th.cat([states, actions], dim=1))

    def reward(self, states, actions, next_states):
        return -(next_states**2).sum(1, keepdim=True)


def test_the_seed_is_that_of_the_model_too():
    first, second = (MPG("MlpPolicy", LinearEnv(), prior_model=RandomPrior, horizons=(0, 2), **SMALL) for _ in range(2))
    for ours, other in zip(first.rollout_model.parameters(), second.rollout_model.parameters(), strict=True):
        assert th.equal(ours, other)
