"""What a continued training needs in order to equal an uninterrupted one."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th


def rng_state(device: th.device) -> dict[str, Any]:
    """
    :param device: where the networks are
    :return: states of the global random number generators
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_rng_state(state: dict[str, Any], device: th.device) -> None:
    """
    :param state: of :func:`rng_state`
    :param device: where the networks are
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"])
    if state["cuda"] is not None and th.cuda.is_available():
        th.cuda.set_rng_state(state["cuda"], device)


@dataclass
class TrainingState:
    """
    Saved with an algorithm, beside what SB3 saves.

    :param update_seed: what the random numbers of updates follow from; ``None`` until the algorithm is set up
    :param n_updates_at_start: number of updates when the log began to count
    :param is_compiled: whether rollouts are compiled; ``None`` until ``learn`` decides. A continued training does as it did
        before, since compiled gradients differ in the last bits.
    :param own_noise: standard deviation of the action noise if the algorithm made it; ``None`` if it is the user's
    :param has_warned_of_records: whether a non-finite observation or reward was reported
    :param rng: states of the random number generators, from loading until training goes on
    :param fitting: state of the model's fitting, for the model that is made when there is an environment
    :param batches: state of the batches that are used more than once, likewise
    """

    update_seed: int | None = None
    n_updates_at_start: int = 0
    is_compiled: bool | None = None
    own_noise: float | None = None
    has_warned_of_records: bool = False
    rng: dict[str, Any] | None = field(default=None, repr=False)
    fitting: dict[str, Any] | None = field(default=None, repr=False)
    batches: dict[str, Any] | None = field(default=None, repr=False)

    def seed_of_updates(self, seed: int | None) -> int:
        """
        :param seed: of the algorithm
        :return: what the random numbers of updates follow from, chosen at the first call
        """
        if self.update_seed is None:
            self.update_seed = int(np.random.randint(2**31 - 1)) if seed is None else seed
        return self.update_seed
