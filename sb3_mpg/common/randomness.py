"""Random numbers of an update."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch as th


@contextmanager
def randomness_of_update(seed: int, n_updates: int, device: th.device) -> Iterator[None]:
    """
    Context in which the global random numbers of NumPy and torch depend only on ``seed`` and the number of the update. Every
    process draws the same numbers for an update, at any time. The states of the generators are restored afterwards.

    :param seed: seed of the random numbers of all updates
    :param n_updates: number of the update
    :param device: device of the networks; the generator of a GPU is seeded as well
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
