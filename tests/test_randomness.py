"""The random numbers of an update follow from its number, and no others are used up."""

import numpy as np
import torch as th
from learner_runs import small_model
from lq import LinearEnv

from sb3_mpg import MPG
from sb3_mpg.common.randomness import randomness_of_update


def test_random_numbers_are_a_function_of_the_update():
    def draws(n_updates):
        with randomness_of_update(3, n_updates, th.device("cpu")):
            return [*np.random.rand(2), *th.rand(2).tolist()]

    assert draws(7) == draws(7) != draws(8)
    np.random.seed(1)
    th.manual_seed(1)
    expected = np.random.rand(), th.rand(1)
    np.random.seed(1)
    th.manual_seed(1)
    draws(7)
    assert (np.random.rand(), th.rand(1)) == expected


def test_a_seed_is_drawn_and_saved(tmp_path):
    first, second = (small_model(seed=None) for _ in range(2))
    assert first.training_state.update_seed != second.training_state.update_seed
    first.save(tmp_path / "model.zip")
    assert MPG.load(tmp_path / "model.zip", env=LinearEnv()).training_state.update_seed == first.training_state.update_seed
    assert small_model(seed=5).training_state.update_seed == 5
