import gc
import multiprocessing as mp
import os
import random

import numpy as np
import pytest
import torch as th
from learner_runs import shared_files

from sb3_mpg.common.model_fitting import ModelFitting

# The tests run in several processes, and the networks are too small to share
th.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed_everything():
    """A test must not depend on the tests that ran before it."""
    random.seed(0)
    np.random.seed(0)
    th.manual_seed(0)


@pytest.fixture
def nothing_is_left():
    """Neither processes nor shared memory are left of learners."""
    yield
    assert not [process for process in mp.active_children() if process.name.startswith("learner")]
    # Tracebacks of errors that were expected may be cycles
    gc.collect()
    assert shared_files(os.getpid()) == []


@pytest.fixture
def models_are_fitted_once(monkeypatch):
    """To fit the correction of a model until it has converged takes longer than the rest of a short training."""
    monkeypatch.setattr(ModelFitting, "_fit_until_converged", lambda self, recorded, max_fits: self._fit_once(recorded))
