"""State that makes a continued training equal to an uninterrupted one."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th

from sb3_mpg.common import checks
from sb3_mpg.common.saved_object import SavedObject


def rng_state(device: th.device) -> dict[str, Any]:
    """
    :param device: device of the networks
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
    :param state: what :func:`rng_state` returned
    :param device: device of the networks
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"])
    if state["cuda"] is not None and th.cuda.is_available():
        th.cuda.set_rng_state(state["cuda"], device)


@dataclass
class PlanState:
    """
    Where planned exploration stands. It is saved with an algorithm.

    :param due: planned exploration is due when it reaches 1; each span adds the share of planned exploration
    :param n_left: number of steps until the next choice between plans and the policy
    :param env: index of the environment that follows plans until then, ``None`` for none
    :param offsets: remaining offsets of the plan, ``(H, A)``; ``None`` before the first plan and after a reset
    :param n_followed: number of steps that were taken from them
    :param mean_advantage: recent mean of the relative advantage of plans, from 0 to 1
    :param taken: state of ``PlannedActions``, kept from loading until the update is created
    """

    due: float = 0.75
    n_left: int = 0
    env: int | None = None
    offsets: np.ndarray | None = field(default=None, repr=False)
    n_followed: int = 0
    mean_advantage: float = 1.0
    taken: dict[str, Any] | None = field(default=None, repr=False)


@dataclass
class TrainingState:
    """
    State that is saved with an algorithm in addition to SB3's attributes.

    :param update_seed: seed of the random numbers of all updates; ``None`` until the algorithm is set up
    :param n_updates_at_start: number of updates when ``num_timesteps`` was last reset
    :param compiled_after: number of updates after which rollouts are compiled beside the training, or infinity, see
        ``choose_to_compile``; ``None`` until ``learn`` decides. A continued training keeps the choice, because compiled
        gradients differ in the last bits
    :param own_noise: standard deviation of the action noise if the algorithm created it; ``None`` for the user's noise
    :param has_warned_of_records: whether a non-finite observation or reward was reported
    :param has_warned_of_masks: whether masked states were reported
    :param plans: where planned exploration stands
    :param rng: states of the random number generators, kept from loading until training continues
    :param fitting: state of the model's fitting, kept from loading until the model is created
    :param batches: state of the reused batches, kept from loading until the update is created
    :param measurements: errors of the gradients, kept from loading until the trust is set up
    :param unopened: settings of a loaded file that could not be opened, each with what is in its place
    """

    update_seed: int | None = None
    n_updates_at_start: int = 0
    compiled_after: float | None = None
    own_noise: float | None = None
    has_warned_of_records: bool = False
    has_warned_of_masks: bool = False
    plans: PlanState = field(default_factory=PlanState)
    rng: dict[str, Any] | None = field(default=None, repr=False)
    fitting: dict[str, Any] | None = field(default=None, repr=False)
    batches: dict[str, Any] | None = field(default=None, repr=False)
    measurements: list[Any] | None = field(default=None, repr=False)
    unopened: dict[str, tuple[SavedObject, Any]] = field(default_factory=dict, repr=False)

    def seed_of_updates(self, seed: int | None) -> int:
        """
        :param seed: seed of the algorithm
        :return: seed of the random numbers of all updates, chosen at the first call
        """
        if self.update_seed is None:
            self.update_seed = int(np.random.randint(2**31 - 1)) if seed is None else seed
        return self.update_seed

    def warn_of_record(self, *args: Any) -> None:
        """
        Warn once of an observation or a reward that is not finite.

        :param args: of :func:`~sb3_mpg.common.checks.warn_of_record`
        """
        self.has_warned_of_records = self.has_warned_of_records or checks.warn_of_record(*args)

    def warn_of_masks(self, share: float, model_name: str) -> None:
        """
        Warn once of masked states.

        :param share: share of the states that are masked in a policy gradient
        :param model_name: name of the user's model
        """
        self.has_warned_of_masks = self.has_warned_of_masks or checks.warn_of_masked_states(share, model_name)

    def restore_rng(self, device: th.device, is_continued: bool) -> None:
        """
        Restore the random number generators once, if training continues after loading.

        :param device: device of the networks
        :param is_continued: whether training continues; otherwise the states are dropped
        """
        if is_continued and self.rng is not None:
            restore_rng_state(self.rng, device)
        self.rng = None
