"""Exploration with plans."""

import gymnasium as gym
import numpy as np
import pytest
import settings
import torch as th
from goals import GoalEnv
from gymnasium.wrappers import TimeLimit
from helpers import assert_same_parameters
from lq import LinearEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mpg import MPG
from sb3_mpg.common.planned_exploration import (
    LONGEST_HORIZON,
    N_OWN_UPDATES,
    N_STEPS_OF_PLAN,
    SMALLEST_MEAN,
    WEIGHT_OF_LARGER,
    WEIGHT_OF_LATEST,
    PlansExploration,
    imitation_of,
    planning_horizon,
)
from sb3_mpg.common.rollouts.planned_actions import MIN_PLANNED_STEPS
from sb3_mpg.common.rollouts.planning import Plan, Planner
from sb3_mpg.common.training_state import PlanState
from sb3_mpg.common.trust.measured import MeasuredTrust

pytestmark = pytest.mark.usefixtures("models_are_fitted_once")

#: The policy's actions are never as large as those of :class:`Stub`
SMALL = {**settings.SMALL, "learning_starts": 20, "horizons": (0, 2), "exploration_noise": 0.0, "buffer_size": 500}


@pytest.fixture
def full_trust(monkeypatch):
    """The share of planned exploration is that of the setting."""
    monkeypatch.setattr(MeasuredTrust, "in_model", lambda self, n_updates: 1.0)


class Stub:
    """Takes the place of a search: the plan is to act with full force, however it is judged."""

    def __init__(self, monkeypatch, advantage=1.0):
        self.advantages = np.array([advantage, 1.0])
        self.observations, self.starts, self.is_extrapolating = [], [], []

        def plan(planner, observation, context, q_functions, n_members, start=None):
            assert len(q_functions) == 2 and n_members == 2
            self.observations.append(observation.clone())
            self.starts.append(start)
            self.is_extrapolating.append(context.model.is_extrapolating)
            return Plan(5.0 + np.arange(planner.horizon)[:, np.newaxis], self.advantages, 1.0)

        monkeypatch.setattr(Planner, "plan", plan)


class Recorded(BaseCallback):
    """Which environments follow a plan at each step after the first update of the model."""

    def __init__(self, act=lambda model: None):
        super().__init__()
        self.envs, self.act = [], act

    def _on_step(self):
        if self.model.model_fitting.is_prepared:
            self.envs.append(np.flatnonzero(self.locals["buffer_actions"][:, 0] == 1.0).tolist())
        self.act(self.model)
        return True


def small_model(env=None, policy="MlpPolicy", **kwargs):
    return MPG(policy, LinearEnv() if env is None else env, **{**SMALL, **kwargs})


def test_the_horizon_follows_the_discount():
    assert [planning_horizon(gamma) for gamma in (0.0, 0.5, 0.9, 0.98)] == [2, 3, 15, 75]
    assert planning_horizon(0.999) == planning_horizon(1.0) == LONGEST_HORIZON


@pytest.mark.usefixtures("full_trust")
def test_without_a_share_nothing_is_planned_and_actions_are_those_of_the_policy(monkeypatch):
    never = Stub(monkeypatch)
    without_plans = small_model(model_planning=0, exploration_noise=0.1).learn(40)
    assert not never.starts
    monkeypatch.delattr(PlansExploration, "_sample_action")
    as_in_sb3 = small_model(model_planning=0.5, exploration_noise=0.1).learn(40)
    np.testing.assert_array_equal(as_in_sb3.replay_buffer.actions[:40], without_plans.replay_buffer.actions[:40])
    assert_same_parameters(as_in_sb3, without_plans)


def test_without_trust_nothing_is_planned(monkeypatch):
    never = Stub(monkeypatch)
    monkeypatch.setattr(MeasuredTrust, "in_model", lambda self, n_updates: 0.0)
    small_model(model_planning=1.0).learn(40)
    # Nor with a model that does not learn
    small_model(model_planning=1.0, weighting="constant", residual=False).learn(40)
    assert not never.starts


@pytest.mark.usefixtures("full_trust")
def test_spans_of_plans_take_turns_with_the_policy(monkeypatch):
    stub, recorded = Stub(monkeypatch), Recorded()
    small_model(model_planning=0.5, gamma=0.8).learn(20 + 32, callback=recorded)
    # A span is one planning horizon, which is 8 steps here, and the first plan comes at once
    assert recorded.envs == [[0]] * 8 + [[]] * 8 + [[0]] * 8 + [[]] * 7
    assert stub.starts == [None, None] and stub.is_extrapolating == [True, True]


@pytest.mark.usefixtures("full_trust")
def test_only_one_of_several_environments_follows_a_plan(monkeypatch):
    stub, recorded = Stub(monkeypatch), Recorded()
    env = DummyVecEnv([LinearEnv] * 4)
    model = small_model(env, model_planning=1.0, gamma=0.5, learning_starts=40).learn(180, callback=recorded)
    assert len(recorded.envs) > 30 and all(len(envs) == 1 for envs in recorded.envs)
    assert {env for envs in recorded.envs for env in envs} == {0, 1, 2, 3}
    # The plan is for what this environment observes
    assert len(stub.observations) == -(-len(recorded.envs) // 3)
    n_steps = model.replay_buffer.pos
    for index, observation in enumerate(stub.observations):
        step = n_steps - len(recorded.envs) + 3 * index
        seen = model.replay_buffer.observations[step, recorded.envs[3 * index][0]]
        np.testing.assert_array_equal(observation.numpy(), seen[np.newaxis])


@pytest.mark.usefixtures("full_trust")
def test_a_plan_moves_on_and_starts_the_next_one(monkeypatch):
    stub, recorded = Stub(monkeypatch), Recorded()
    small_model(model_planning=1.0, gamma=0.9).learn(20 + 16, callback=recorded)
    # Spans of 15 steps, in which a plan is followed for 10
    assert recorded.envs == [[0]] * 15
    first, second = stub.starts
    assert first is None
    # Behind the end of a plan, its last offset is held
    np.testing.assert_array_equal(second[:, 0], np.minimum(5 + N_STEPS_OF_PLAN + np.arange(15), 5 + 14))


@pytest.mark.usefixtures("full_trust")
def test_a_reset_starts_a_new_plan(monkeypatch):
    stub = Stub(monkeypatch)
    small_model(TimeLimit(LinearEnv(), 4), model_planning=1.0, gamma=0.9).learn(20 + 17)
    # At the first step and behind each of four resets; the second span begins with a reset, too
    assert len(stub.starts) == 5 and all(start is None for start in stub.starts)


@pytest.mark.usefixtures("full_trust")
@pytest.mark.parametrize("advantage", [0.05, -1.0])
def test_plans_become_rare_when_they_are_no_better(monkeypatch, advantage):
    """If one member of the model does not promise enough, the policy is followed until the next plan."""
    stub, recorded = Stub(monkeypatch, advantage), Recorded()
    model = small_model(model_planning=1.0, gamma=0.5)
    model.training_state.plans.due = 0.99
    model.learn(20 + 60, callback=recorded)
    assert not any(recorded.envs) and len(stub.starts) > 3
    state = model.training_state.plans
    relative = max(advantage, 0) / (max(advantage, 0) + 1)
    assert state.mean_advantage == pytest.approx(relative + (1 - relative) * (1 - WEIGHT_OF_LATEST) ** len(stub.starts))
    assert len(stub.starts) < 20 * 0.9
    # They come back
    stub.advantages = np.ones(2)
    share = state.mean_advantage = SMALLEST_MEAN
    state.due, state.n_left = 1.0, 0
    model.learn(2, reset_num_timesteps=False)
    # The advantage of the plan equals the spread
    assert state.mean_advantage == pytest.approx(share + WEIGHT_OF_LARGER * (0.5 - share))


@pytest.mark.usefixtures("full_trust")
def test_the_share_never_vanishes(monkeypatch):
    Stub(monkeypatch, advantage=0.0)
    model = small_model(model_planning=1.0, gamma=0.0)
    model.training_state.plans.mean_advantage = SMALLEST_MEAN
    model.training_state.plans.due = 1.0
    model.learn(25)
    assert model.training_state.plans.mean_advantage == SMALLEST_MEAN


@pytest.mark.usefixtures("full_trust")
@pytest.mark.parametrize("gamma", [0.5, 0.95])
def test_a_plan_ends_when_the_discount_factor_changes(gamma):
    """Its length was that of the former discount factor."""

    def act(model):
        if model.num_timesteps == 28:
            assert len(model.training_state.plans.offsets) == planning_horizon(0.9)
            model.gamma = gamma
        if model.num_timesteps == 30:
            assert len(model.training_state.plans.offsets) == planning_horizon(gamma)

    small_model(model_planning=1.0, gamma=0.9).learn(32, callback=Recorded(act))


@pytest.mark.usefixtures("full_trust")
def test_plans_with_normalised_observations(monkeypatch):
    """The model takes raw observations."""
    stub = Stub(monkeypatch)
    env = VecNormalize(DummyVecEnv([lambda: TimeLimit(LinearEnv(), 4)]))
    seen = []
    callback = Recorded(lambda model: seen.append(model._last_original_obs))
    small_model(env, model_planning=1.0).learn(26, callback=callback)
    assert len(stub.observations) >= 2
    assert all(any(np.array_equal(observation, raw) for raw in seen) for observation in stub.observations)


@pytest.mark.usefixtures("full_trust")
@pytest.mark.parametrize("normalizes", [False, True])
def test_plans_with_observations_of_several_parts(normalizes):
    env = DummyVecEnv([GoalEnv, GoalEnv])
    env = VecNormalize(env, norm_obs_keys=["observation"]) if normalizes else env
    model = small_model(env, "MultiInputPolicy", model_planning=1.0, gamma=0.8).learn(40)
    assert model.training_state.plans.offsets is not None
    assert np.abs(model.replay_buffer.actions[:30]).max() <= 1


class Tilted(gym.Wrapper):
    """Actions between 1 and 5."""

    def __init__(self, env):
        super().__init__(env)
        self.action_space = gym.spaces.Box(1.0, 5.0, (1,), np.float32)


@pytest.mark.usefixtures("full_trust")
def test_plans_are_in_the_units_of_the_environment_when_they_are_taken(monkeypatch):
    Stub(monkeypatch)
    actions = []

    class Noted(Tilted):
        def step(self, action):
            actions.append(float(action[0]))
            return super().step(action)

    small_model(Noted(LinearEnv()), model_planning=1.0).learn(25)
    assert actions[-4:] == [5.0] * 4


@pytest.mark.usefixtures("full_trust")
def test_continuing_in_the_middle_of_a_plan_equals_not_stopping(tmp_path):
    """Spans, plans and the share of plans that were followed are saved."""
    model = small_model(model_planning=0.8, exploration_noise=0.1, gamma=0.9).learn(24)
    state = model.training_state.plans
    assert state.env == 0 and 0 < state.n_left < 15 and 0 < state.n_followed < N_STEPS_OF_PLAN
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")

    def second_half(model):
        model.env.seed(7)
        model._last_obs = None
        return model.learn(30, reset_num_timesteps=False)

    n_left, offsets = state.n_left, state.offsets.copy()
    second_half(model)
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv())
    assert loaded.training_state.plans.n_left == n_left
    np.testing.assert_array_equal(loaded.training_state.plans.offsets, offsets)
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    second_half(loaded)
    np.testing.assert_array_equal(loaded.replay_buffer.actions[:54], model.replay_buffer.actions[:54])
    assert_same_parameters(loaded, model)
    ours, others = loaded.training_state.plans, model.training_state.plans
    assert ours.mean_advantage == others.mean_advantage and ours.due == others.due and ours.n_left == others.n_left
    np.testing.assert_array_equal(ours.offsets, others.offsets)


def test_the_correction_is_as_before_after_planning(full_trust, monkeypatch):
    model = small_model(model_planning=1.0).learn(30)
    assert not model.rollout_model.is_extrapolating and model.rollout_model.members == "mean"
    assert th.isfinite(th.cat([parameter.flatten() for parameter in model.policy.parameters()])).all()


@pytest.mark.parametrize(
    ("n_updates", "n_planned", "advantage", "share"),
    [
        # Plans are better by more than the spread of random ones: as far as the model is trusted
        (N_OWN_UPDATES + 1, MIN_PLANNED_STEPS, 0.51, 0.7),
        (N_OWN_UPDATES + 1, MIN_PLANNED_STEPS, 0.5, 0.0),
        # Before, the policy may learn by itself
        (N_OWN_UPDATES, MIN_PLANNED_STEPS, 0.9, 0.0),
        (N_OWN_UPDATES + 1, MIN_PLANNED_STEPS - 1, 0.9, 0.0),
    ],
)
def test_only_a_policy_that_is_stuck_imitates_plans(n_updates, n_planned, advantage, share):
    imitation = imitation_of([None] * n_planned, PlanState(mean_advantage=advantage), 0.7, n_updates)
    assert imitation == pytest.approx(share)
