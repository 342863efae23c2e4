"""Batches that serve several updates."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch as th
from helpers import drawn_batch
from lq import LinearEnv
from settings import SMALL

from sb3_mpg import MPG
from sb3_mpg.common.batches import ReusedBatches
from sb3_mpg.common.type_aliases import TrainingBatch

CPU = th.device("cpu")


def draw():
    return TrainingBatch(th.randn(8, 2), th.randn(8, 1), th.randn(8, 1))


def assert_same_batch(first, second):
    assert all(th.equal(*pair) for pair in zip(first, second, strict=True))


def test_batches_take_turns_and_serve_equally_often():
    """Drawn by an update from its replay buffer."""
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), batch_reuse=3, **SMALL).learn(60)
    reused = ReusedBatches()
    batches = [reused.next(3, lambda: drawn_batch(model, 8)) for _ in range(60)]
    assert all(first is not second for first, second in pairwise(batches))
    uses = [sum(batch is other for other in batches) for batch in batches]
    # The first batches are replaced early, so that batches are drawn at equal intervals from then on
    assert uses[:3] == [3, 1, 2]
    assert all(n == 3 for n in uses[6:-6])


def test_a_batch_that_is_used_once_is_drawn_for_each_update():
    reused = ReusedBatches()
    batches = [reused.next(1, draw) for _ in range(10)]
    assert all(first is not second for index, first in enumerate(batches) for second in batches[:index])
    # It is not saved
    assert reused.state(1)["batches"] == []


@pytest.mark.parametrize("n_served", [0, 2, 3, 8, 17])
def test_the_turns_go_on_after_saving(n_served):
    reused = ReusedBatches()
    for _ in range(n_served):
        reused.next(3, draw)
    loaded = ReusedBatches()
    loaded.load_state(pickle.loads(pickle.dumps(reused.state(3))), 3, CPU)
    states = []
    for batches in (reused, loaded):
        th.manual_seed(0)
        states.append([batches.next(3, draw) for _ in range(10)])
    for expected, batch in zip(*states, strict=True):
        assert_same_batch(expected, batch)


@pytest.mark.parametrize("n_uses", [1, 2, 4])
def test_a_state_of_another_number_of_uses_is_ignored(n_uses):
    reused, loaded = ReusedBatches(), ReusedBatches()
    for _ in range(7):
        reused.next(3, draw)
    loaded.load_state(reused.state(3), n_uses, CPU)
    # Nor is there anything to load where nothing was saved
    loaded.load_state(None, n_uses, CPU)
    drawn = [draw() for _ in range(n_uses)]
    assert [id(loaded.next(n_uses, iter([batch]).__next__)) for batch in drawn] == [id(batch) for batch in drawn]


def test_learners_start_with_batches_of_their_own():
    """A copy of an update keeps its batches, a learner's copy does not."""
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), batch_reuse=3, **SMALL).learn(50)
    assert len(model.update.batches.state(3)["batches"]) == 3
    of_learner = model.update.for_learner()
    assert of_learner.batches.state(3) == {"batches": [], "n_served": 0} and of_learner.policy is model.policy
    for copied in (copy.deepcopy(model.update), pickle.loads(pickle.dumps(model.update))):
        assert len(copied.batches.state(3)["batches"]) == 3


@pytest.mark.parametrize("n_served", range(8))
@pytest.mark.parametrize("n_uses", [1, 2, 7])
def test_the_number_of_uses_may_change_at_any_turn(n_served, n_uses):
    batches, n_drawn = ReusedBatches(), 0

    def draw():
        nonlocal n_drawn
        n_drawn += 1
        return n_drawn

    for _ in range(n_served):
        batches.next(3, draw)
    n_before = n_drawn
    served = [batches.next(n_uses, draw) for _ in range(3 * n_uses**2)]
    # Batches of before are gone, and each of the others is used as often as was asked for
    assert min(served) == n_before + 1
    assert all(served.count(number) <= n_uses**2 for number in set(served))
