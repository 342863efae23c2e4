"""Start states that are explored in the model."""

import pytest
import torch as th
from helpers import rollout_context
from lq import LinearActor, LinearEnv
from models import Counter
from settings import SMALL

from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.rollouts.exploration import ModelExploration, explore_in_model
from sb3_mpg.common.units import Units


def test_actions_are_repeated_within_the_region():
    observations = th.tensor([[0.0], [2.0], [-4.0], [0.0], [9.5], [-2.0], [3.0]])
    actions = th.tensor([[0.25], [-1.0], [-1.0], [1.0], [1.0], [-1.0], [1.0]])
    n_steps = th.tensor([[3], [2], [0], [9], [9], [9], [1]])
    expected = [
        0.75,  # 3 steps of 0.25
        0.0,  # 2 steps of -1
        -4.0,  # no step
        4.0,  # the last state within the region
        9.5,  # outside of the region, and so is the next state
        -3.0,  # the next step would terminate
        4.0,  # 1 step
    ]
    context = rollout_context(None, Counter())
    explored = explore_in_model(observations, actions, context, n_steps, th.tensor([-9.0]), th.tensor([4.5]), 9)
    assert explored.flatten().tolist() == pytest.approx(expected)
    # Rows stop before a state that is not a number
    inf = th.tensor([th.inf])
    explored = explore_in_model(observations[3:4], actions[3:4], context, th.tensor([[99]]), -inf, inf, 99)
    assert explored.item() == 10.0


class DoubledCounter(PriorModel):
    """s' = s + a. Observed are 2 s, and an element that the model does not know."""

    def state_from_observation(self, observations):
        return 0.5 * observations[:, :1]

    def observation(self, states):
        return th.cat([2 * states, th.zeros_like(states)], dim=1)

    def transition(self, states, actions):
        return states + actions

    def reward(self, states, actions, next_states):
        return -(states**2)


UNITS = Units(
    action_centre=th.tensor([10.0]),
    action_half_range=th.tensor([4.0]),
    observation_mean=th.tensor([6.0, 0.0]),
    observation_std=th.tensor([2.0, 1.0]),
)


def test_the_model_gets_its_own_states_and_actions_in_the_units_of_the_environment():
    observations, actions = th.tensor([[8.0, 7.0], [8.0, 7.0]]), th.tensor([[0.75], [0.75]])
    inf = th.full((2,), th.inf)
    context = rollout_context(None, DoubledCounter(), units=UNITS)
    explored = explore_in_model(observations, actions, context, th.tensor([[2], [0]]), -inf, inf, 2)
    # The environment's action is 10 + 0.75 * 4 = 13, and the state 4 + 2 * 13 = 30 is observed as 60. A row without a step
    # also keeps the element that the model does not know
    assert explored.tolist() == [[60.0, 0.0], [8.0, 7.0]]


def test_a_row_that_takes_a_step_is_what_the_model_observes():
    """Also where the state does not change: the element that the model does not know is the model's everywhere."""

    class Still(DoubledCounter):
        def transition(self, states, actions):
            return states

    observations, inf = th.tensor([[8.0, 7.0], [8.0, 7.0]]), th.full((2,), th.inf)
    actions, n_steps = th.zeros(2, 1), th.tensor([[1], [0]])
    explored = explore_in_model(observations, actions, rollout_context(None, Still()), n_steps, -inf, inf, 2)
    assert explored.tolist() == [[8.0, 0.0], [8.0, 7.0]]


def test_perturbed_states_follow_the_policy():
    """The policy acts on normalised observations, and the model takes its action in the units of the environment."""
    context = rollout_context(LinearActor(th.tensor([[0.25, 0.0]])), DoubledCounter(), units=UNITS)
    observations = th.tensor([[8.0, 7.0], [10.0, 7.0], [12.0, 7.0], [4.0, 7.0]])
    exploration = ModelExploration(0.5, max_steps=1, noise=0.0, margin=100.0)
    perturbed = exploration.perturb(observations, context, trust=1.0)
    # Rows 0 and 2: the environment's actions are 10 + 4 (8 - 6) / 8 = 11 and 10 + 4 (12 - 6) / 8 = 13
    assert perturbed.tolist() == [[30.0, 0.0], [10.0, 7.0], [38.0, 0.0], [4.0, 7.0]]
    # Without trust nothing is perturbed, nor where the share is 0
    assert exploration.perturb(observations, context, trust=0.0) is observations
    assert exploration._replace(share=0.0).perturb(observations, context, trust=1.0) is observations


def test_noise_is_clipped_with_the_action():
    context = rollout_context(LinearActor(th.zeros(1, 1)), Counter())
    observations = th.linspace(-1.0, 1.0, 64).reshape(-1, 1)
    exploration = ModelExploration(1.0, max_steps=1, noise=100.0, margin=10.0)
    actions = exploration.perturb(observations, context, trust=1.0) - observations
    # Nearly all of them are -1 or 1
    assert (actions.abs() < 1 + 1e-6).all() and (actions.abs() > 1 - 1e-6).sum() > 48
    assert 16 < (actions > 0).sum() < 48


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_the_region_is_that_of_the_batch_and_a_margin(margin):
    context = rollout_context(LinearActor(th.zeros(1, 1)), Counter())
    observations = th.linspace(-0.5, 0.5, 64).reshape(-1, 1)
    explored = ModelExploration(1.0, max_steps=10, margin=margin).perturb(observations, context, trust=1.0)
    assert (explored != observations).sum() > 16
    assert explored.abs().max() <= 0.5 + margin
    assert (explored.abs() > 0.5).any() == (margin > 0)


@pytest.mark.parametrize(("horizons", "max_steps"), [((0, 3, 7), 7), ((0,), 1)])
def test_states_are_perturbed_by_as_many_steps_as_rollouts_have(horizons, max_steps):
    model = MPG("MlpPolicy", LinearEnv(), horizons=horizons, weighting="constant", **SMALL)
    assert model.update_settings(1).exploration.max_steps == max_steps
