"""Random numbers of an update."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch as th


@contextmanager
def randomness_of_update(seed: int, n_updates: int, device: th.device) -> Iterator[None]:
    """
    Within this context the global random numbers of NumPy and torch are a function of the update alone, and no others are
    used up: whoever computes an update, and whenever, draws the same ones.

    :param seed: seed of the algorithm
    :param n_updates: number of the update
    :param device: where the networks are; the generator of a GPU is seeded, too
    """
    seeds = np.random.SeedSequence([seed, n_updates]).generate_state(2)
    numpy_state = np.random.get_state()
    with th.random.fork_rng([device] if device.type == "cuda" else []):
        np.random.seed(seeds[0])
        th.default_generator.manual_seed(int(seeds[1]))
        if device.type == "cuda":
            with th.cuda.device(device):
                th.cuda.manual_seed(int(seeds[1]))
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
