"""Batches that are used in several updates."""

from collections.abc import Callable
from typing import Any

import torch as th

from sb3_mpg.common.type_aliases import TrainingBatch


class ReusedBatches:
    """
    Batch reuse: ``n_uses`` batches take turns. In each round one of them is replaced by a new one, so that every batch is used
    in ``n_uses`` updates.

    Each of the papers' twelve learners uses a batch several times in a row, but the updates of the learners alternate. With
    one learner, the same batch many times in a row makes the critic fit its noise, and the policy follow the critic.
    """

    def __init__(self) -> None:
        self._batches: list[TrainingBatch] = []
        self._n_served = 0
        self._n_uses = 1

    def next(self, n_uses: int, draw: Callable[[], TrainingBatch]) -> TrainingBatch:
        """
        :param n_uses: in how many updates a batch is used
        :param draw: draws a batch
        :return: the batch of this update
        """
        if n_uses != self._n_uses:
            # A callback changed it: turns of other rounds have no meaning
            self._batches, self._n_served, self._n_uses = [], 0, n_uses
        turn = self._n_served % n_uses
        if len(self._batches) < n_uses:
            self._batches.append(draw())
        elif turn == 0:
            self._batches[self._n_served // n_uses % n_uses] = draw()
        self._n_served += 1
        return self._batches[turn]

    def state(self, n_uses: int) -> dict[str, Any]:
        """
        :param n_uses: in how many updates a batch is used; a batch that is used once is not kept
        :return: the batches on the CPU, to be saved
        """
        batches = self._batches if n_uses > 1 else []
        return {
            "batches": [TrainingBatch(*(tensor.cpu() for tensor in batch)) for batch in batches],
            "n_served": self._n_served,
        }

    def load_state(self, state: dict[str, Any] | None, n_uses: int, device: th.device) -> None:
        """
        :param state: what :meth:`state` returned, or ``None``; ignored when the number of uses differs
        :param n_uses: in how many updates a batch is used
        :param device: device of the batches
        """
        if state is not None and len(state["batches"]) == min(state["n_served"], n_uses):
            self._batches = [TrainingBatch(*(tensor.to(device) for tensor in batch)) for batch in state["batches"]]
            self._n_served, self._n_uses = state["n_served"], n_uses
