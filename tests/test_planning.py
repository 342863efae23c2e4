"""Plans: a random search for sequences of actions, in the model."""

import numpy as np
import pytest
import torch as th
from helpers import rollout_context
from lq import LinearModel, quadratic_q, random_problem, tensors

from sb3_mpg import PriorModel
from sb3_mpg.common.rollouts import planning
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.rollouts.planning import LARGEST_NOISE, SMALLEST_NOISE, Planner, price

FORCE, GOAL, TIME_STEP = 0.5, 1.2, 0.1


class Idle(th.nn.Module):
    """A policy that does nothing."""

    def forward(self, observations):
        return th.zeros(len(observations), 1)


class Valley(PriorModel):
    """
    Position and velocity in a valley. With full force, the slope is too steep beyond a position of twice the force: whoever
    wants to reach the goal must first swing to the other side.
    """

    def transition(self, states, actions):
        positions, velocities = states.split(1, dim=1)
        velocities = velocities + TIME_STEP * (FORCE * actions - positions)
        return th.cat([positions + TIME_STEP * velocities, velocities], dim=1)

    def reward(self, states, actions, next_states):
        return (next_states[:, :1].abs() > GOAL).float()


class Divided(PriorModel):
    """The two members of an ensemble disagree about what is good."""

    def transition(self, states, actions):
        return states + 0.0 * actions

    def reward(self, states, actions, next_states):
        gains = th.ones(len(states), 1)
        gains[len(states) // 2 :] = -3.0
        return gains * actions


def zero(network_inputs, actions):
    return th.zeros(len(network_inputs), 1)


AT_REST = th.zeros(1, 2)


def plan_in_valley(planner=None, start=None, model=None):
    context = rollout_context(Idle(), model or Valley(), gamma=0.99)
    return (planner or Planner(horizon=70)).plan(AT_REST, context, [zero], 1, start)


def test_a_plan_swings_out_of_the_valley():
    # Full force in one direction does not do it
    states, model = AT_REST, Valley()
    for _ in range(70):
        states = model.transition(states, th.ones(1, 1))
        assert states[0, 0].abs() < GOAL
    plan = plan_in_valley()
    assert plan.offsets.shape == (70, 1) and plan.advantages.shape == (1,)
    assert plan.advantages[0] > 5 and plan.spread > 0
    # What it promises is what happens
    states, total = AT_REST, 0.0
    for step, offset in enumerate(plan.offsets):
        states = model.transition(states, th.as_tensor(offset, dtype=th.float32).clamp(-1, 1).reshape(1, 1))
        total += 0.99**step * float(states[0, 0].abs() > GOAL)
    assert total == pytest.approx(plan.advantages[0], rel=1e-4)


def recorded_rounds(monkeypatch):
    """The sequences that are compared in each round."""
    rounds, returns_of = [], Planner._returns

    def record(self, offsets, *args):
        rounds.append(offsets)
        return returns_of(self, offsets, *args)

    monkeypatch.setattr(Planner, "_returns", record)
    return rounds


def test_a_warm_start_takes_two_rounds_and_loses_nothing(monkeypatch):
    rounds = recorded_rounds(monkeypatch)
    cold = plan_in_valley()
    assert [len(offsets) for offsets in rounds] == [64] * 4
    warm = plan_in_valley(start=cold.offsets)
    assert [len(offsets) for offsets in rounds[4:]] == [64, 64]
    # But for what the mean of the elites may lose
    assert warm.advantages[0] >= 0.95 * cold.advantages[0] > 0
    # Half of the candidates vary the start, and the start and the policy are among them
    assert not rounds[4][0].any() and (rounds[4][1] == cold.offsets).all()
    assert all((offsets == cold.offsets).any() for offsets in rounds[4][2:32])
    assert not any((offsets == cold.offsets).any() for offsets in rounds[4][32:])


def test_the_mean_of_the_elites_is_taken_if_it_is_nearly_as_good(monkeypatch):
    """It has less of the noise of the search."""
    rounds = recorded_rounds(monkeypatch)

    class Even(Divided):
        def reward(self, states, actions, next_states):
            return -((actions - 0.5) ** 2)

    planner = Planner(horizon=1)
    plan = planner.plan(AT_REST, rollout_context(Idle(), Even()), [zero], n_members=1)
    # It is the first child of the last round
    np.testing.assert_array_equal(plan.offsets, rounds[-1][0])
    assert plan.offsets.item() == pytest.approx(0.5, abs=0.1)


class First(Valley):
    """Only the action of the first step is paid for."""

    def transition(self, states, actions):
        return th.ones_like(states) + 0.0 * actions

    def reward(self, states, actions, next_states):
        return actions * (states[:, :1] == 0)


def test_a_plan_changes_no_more_than_it_must(monkeypatch):
    """A policy that imitates plans could not learn offsets that make no difference."""

    def first_and_rest():
        np.random.seed(0)
        offsets = np.stack([plan_in_valley(Planner(horizon=40), model=First()).offsets[:, 0] for _ in range(20)])
        sizes, changes = (np.sqrt((part**2).mean()) for part in (offsets[:, 1:], np.diff(offsets[:, 1:])))
        return offsets[:, 0], sizes, changes / sizes

    first, size, roughness = first_and_rest()
    assert first.min() > 0.9
    for name in ("PRICE_OF_OFFSETS", "PRICE_OF_CHANGES"):
        monkeypatch.setattr(planning, name, 0.0)
    _, size_of_free, roughness_of_free = first_and_rest()
    assert size < 0.6 * size_of_free and roughness < 0.8 * roughness_of_free


class Tiresome(Valley):
    """Whatever is done costs more than the goal pays."""

    def reward(self, states, actions, next_states):
        return super().reward(states, actions, next_states) - 1000 * actions.abs()


@pytest.mark.parametrize("start", [None, np.ones((70, 1))])
def test_a_plan_is_never_worse_than_the_policy(start):
    plan = plan_in_valley(model=Tiresome(), start=start)
    assert not plan.offsets.any() and plan.advantages.tolist() == [0.0]


class Fragile(Valley):
    """Not a number after a push to the right, and endless reward after the strongest to the left."""

    def transition(self, states, actions):
        return super().transition(states, th.where(actions > 0.3, th.nan, actions))

    def reward(self, states, actions, next_states):
        rewards = super().reward(states, actions, next_states) - actions + 0.0 * next_states[:, :1]
        return rewards + th.where(actions == -1, th.inf, 0.0)


def test_rollouts_that_are_not_finite_lose():
    plan = plan_in_valley(model=Fragile())
    assert np.isfinite(plan.advantages).all() and plan.advantages[0] > 0 and np.isfinite(plan.spread)
    assert (plan.offsets <= 0.3).all() and (plan.offsets > -1).all()


class Broken(Valley):
    def reward(self, states, actions, next_states):
        return th.full_like(actions, th.nan)


def test_where_nothing_is_finite_there_is_no_better_plan():
    plan = plan_in_valley(model=Broken())
    assert not plan.advantages.min() > 0 and plan.spread == 0


def test_sequences_are_judged_by_the_mean_over_members():
    plan = Planner(horizon=1).plan(AT_REST, rollout_context(Idle(), Divided()), [zero], n_members=2)
    # The best for the mean is the full action to the left, which one of them takes for the worst
    assert plan.offsets.item() < -0.9
    np.testing.assert_allclose(plan.advantages, [-1.0, 3.0], rtol=0.1)


class Ends(LinearModel):
    may_terminate = True

    def terminal(self, states):
        return states[:, :1].abs() > 0.3


class Clipped(th.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, observations):
        return (observations @ self.k.T).clamp(-1, 1)


@pytest.mark.parametrize("model_class", [LinearModel, Ends])
def test_without_offsets_the_return_is_that_of_a_rollout(model_class):
    a, b, q, r, k, critic = random_problem()
    model, actor = model_class(*tensors(a, b, q, r)), Clipped(th.as_tensor(k))
    of_critics = [quadratic_q(*tensors(*critic)), quadratic_q(*tensors(*reversed(critic[:1]), critic[1], 2 * critic[2]))]
    n_ends = 0
    for state in 0.5 * th.randn(8, 3, dtype=th.float64):
        observation = state.reshape(1, 3)
        context = rollout_context(actor, model, gamma=0.9)
        found = Planner(horizon=7)._returns(np.zeros((2, 7, 2)), observation, context, of_critics, 1)
        of_each = [model_rollout(observation, context._replace(q_function=critic), [7])[7].item() for critic in of_critics]
        np.testing.assert_allclose(found, [[min(of_each)] * 2], rtol=1e-9)
        n_ends += of_each[0] == of_each[1]
    assert (n_ends > 0) == (model_class is Ends)


def test_the_last_state_is_valued_by_the_smaller_critic():
    context = rollout_context(Idle(), Valley(), gamma=0.5)
    critics = [lambda inputs, actions: 5 + 0 * actions, lambda inputs, actions: 3 + 0 * actions]
    found = Planner(horizon=2)._returns(np.zeros((3, 2, 1)), AT_REST, context, critics, 2)
    assert found.tolist() == [[0.75] * 3] * 2


def test_offsets_are_held_for_times_of_all_orders():
    offsets = Planner(horizon=100).random_offsets(2000, 2)
    assert offsets.shape == (2000, 100, 2)
    changes = (np.diff(offsets, axis=1) != 0).sum(axis=1)
    # All dimensions change together
    assert (changes[:, 0] == changes[:, 1]).all()
    n_changes = changes[:, 0]
    # Mean times are between 1 and 50 steps, on a logarithmic scale: that of the median is 7
    assert n_changes.min() == 0 and n_changes.max() == 99
    assert 99 / np.median(n_changes) == pytest.approx(np.sqrt(50), rel=0.15)
    # Sizes are from refinements to full swings, too
    sizes = np.abs(offsets[:, 0]).mean(axis=1) * np.sqrt(np.pi / 2)
    assert np.exp(np.log(sizes).mean()) == pytest.approx(np.sqrt(SMALLEST_NOISE * LARGEST_NOISE), rel=0.3)


def test_children_differ_in_one_segment():
    parents = 7.0 + np.random.default_rng(0).normal(scale=0.01, size=(1000, 50, 1))
    children = Planner(horizon=50).varied(parents)
    changed = (children != parents)[..., 0]
    borders = np.diff(np.pad(changed.astype(int), ((0, 0), (1, 1))), axis=1)
    # The mean of a single step is what it was
    n_segments = (borders == 1).sum(axis=1)
    assert n_segments.max() == 1 and n_segments.mean() > 0.9
    lengths = changed.sum(axis=1)
    assert lengths[lengths > 0].min() == 1 and lengths.max() > 25
    # In a quarter of the children each, the segment has no offsets, one for all its steps, or new ones near the old ones
    children = children[lengths > 2]
    deviations = np.abs(children - 7.0).max(axis=(1, 2))
    is_erased = (children == 0).any(axis=(1, 2))
    is_mean = deviations < 0.05
    is_near = (deviations < 2.5) & ~is_mean
    for kind in (is_erased, is_mean, is_near):
        assert kind.mean() == pytest.approx(1 / 4, abs=0.08)
    # But for a few small additions
    assert ((np.diff(children[is_mean], axis=1) == 0).sum(axis=(1, 2)) >= 2).mean() > 0.9


def test_the_price_of_offsets_and_of_their_changes():
    offsets = np.array([[[0.0], [0.0]], [[1.0], [1.0]], [[1.0], [-1.0]]])
    np.testing.assert_allclose(price(offsets), [0.0, 0.1, 0.1 + 0.3 * 2])
    assert price(np.ones((3, 1, 2))).tolist() == pytest.approx([0.1] * 3)
