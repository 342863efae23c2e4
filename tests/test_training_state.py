"""What a continued training needs in order to equal an uninterrupted one."""

import random

import numpy as np
import pytest
import torch as th
from lq import LinearEnv
from settings import SMALL

from sb3_mpg import MPG
from sb3_mpg.common.training_state import TrainingState, restore_rng_state, rng_state


def test_all_random_numbers_go_on_where_they_were():
    def draws():
        return [random.random(), *np.random.rand(2).tolist(), *th.rand(2).tolist()]

    device = th.device("cpu")
    state = rng_state(device)
    expected = draws()
    assert draws() != expected
    restore_rng_state(state, device)
    assert draws() == expected


def test_the_seed_of_updates_is_chosen_once():
    state = TrainingState()
    chosen = state.seed_of_updates(None)
    assert state.seed_of_updates(None) == state.seed_of_updates(5) == state.update_seed == chosen
    assert TrainingState().seed_of_updates(5) == 5


def test_what_is_kept_until_it_is_needed_is_saved_again(tmp_path):
    """A file that is loaded and saved without an environment loses nothing."""
    MPG("MlpPolicy", LinearEnv(), batch_reuse=3, **SMALL).learn(60).save(tmp_path / "first.zip")
    MPG.load(tmp_path / "first.zip").save(tmp_path / "second.zip")
    first, second = (MPG.load(tmp_path / f"{name}.zip", env=LinearEnv()) for name in ("first", "second"))
    for ours, other in zip(first.rollout_model.state_dict().values(), second.rollout_model.state_dict().values(), strict=True):
        assert th.equal(ours, other)
    assert first.model_fitting.n_prepared_for == second.model_fitting.n_prepared_for == 41
    assert first.training_state.update_seed == second.training_state.update_seed


def test_saving_leaves_the_algorithm_as_it_was(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), **SMALL).learn(50)
    state = model.training_state
    model.save(tmp_path / "model.zip")
    assert model.training_state is state and state.rng is None and state.fitting is None


def test_random_states_survive_being_saved_twice(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), **SMALL).learn(50)
    model.save(tmp_path / "first.zip")
    expected = th.rand(3)
    loaded = MPG.load(tmp_path / "first.zip", env=LinearEnv())
    loaded.save(tmp_path / "second.zip")
    again = MPG.load(tmp_path / "second.zip", env=LinearEnv())
    again._setup_learn(10, reset_num_timesteps=False)
    assert th.equal(th.rand(3), expected)


def test_updates_per_step_count_from_the_start_of_learning():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL).learn(80)
    assert model.logger.name_to_value["train/updates_per_step"] == pytest.approx(40 / 80)
    model.learn(60)
    assert model.logger.name_to_value["train/updates_per_step"] == pytest.approx(20 / 60)
