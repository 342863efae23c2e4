import random

import numpy as np
import pytest
import torch as th

# The tests run in several processes, and the networks are too small to share
th.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed_everything():
    """A test must not depend on the tests that ran before it."""
    random.seed(0)
    np.random.seed(0)
    th.manual_seed(0)
