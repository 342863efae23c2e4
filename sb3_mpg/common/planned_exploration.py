"""Exploration with the model: some of the exploring steps follow plans that the model says are better than the policy."""

import math
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy

from sb3_mpg.common.models.trainable import evaluated
from sb3_mpg.common.rollouts.planned_actions import MIN_PLANNED_STEPS, PlannedActions
from sb3_mpg.common.rollouts.planning import Plan, Planner
from sb3_mpg.common.training_state import PlanState

# The planning horizon in multiples of the time constant of the discount, 1 / (1 - gamma), and its limit
TIME_CONSTANTS = 1.5
LONGEST_HORIZON = 200
# Number of steps after which a plan is made anew
N_STEPS_OF_PLAN = 10
# A plan is followed if all members of the model promise at least this relative advantage
SMALLEST_ADVANTAGE = 0.1
# Before so many updates the policy imitates nothing. A policy that is far behind the plans at first may get ahead of them by
# its gradient, and imitation would hold it up. One that is still behind is stuck, as one that stands still before a hill
N_OWN_UPDATES = 750
# The mean advantage from which it is: plans are better than the policy by more than the spread of random plans
STUCK = 0.5
# Weights of the latest plan in the mean advantage: a policy that fails again is helped at once. And the smallest mean, so that
# planning can come back
WEIGHT_OF_LATEST = 0.1
WEIGHT_OF_LARGER = 0.3
SMALLEST_MEAN = 0.05


def planning_horizon(gamma: float) -> int:
    """
    :param gamma: discount factor
    :return: number of model steps of a plan: as many as the discount lets count
    """
    # Rounded, so that 0.9 gives as many steps as its reciprocal says
    return LONGEST_HORIZON if gamma >= 1 else min(math.ceil(round(TIME_CONSTANTS / (1 - gamma), 6)), LONGEST_HORIZON)


def imitation_of(plans: PlannedActions, state: PlanState, trust: float, n_updates: int) -> float:
    """
    :param plans: the planned steps
    :param state: where planned exploration stands
    :param trust: trust in the model, from 0 to 1
    :param n_updates: number of the update
    :return: share of the imitation of plans in the policy gradient, from 0 to 1
    """
    is_stuck = n_updates > N_OWN_UPDATES and state.mean_advantage > STUCK
    return trust if is_stuck and len(plans) >= MIN_PLANNED_STEPS else 0.0


def need_of_plans(state: PlanState) -> float:
    """
    :param state: where planned exploration stands
    :return: to what extent plans take the lead, from 0 to 1: wholly where their mean advantage is as large as the spread
    """
    return min(2 * state.mean_advantage, 1.0)


def relative_advantage(plan: Plan) -> float:
    """
    :param plan: a plan
    :return: the advantage that all members of the model promise, as a share of its sum with the spread of random plans: near 1
        where the policy is far behind anything that is planned, and 0 where it is the best plan
    """
    advantage = float(plan.advantages.min())
    return advantage / (advantage + plan.spread) if advantage > 0 else 0.0


def env_to_plan_for(algorithm: Any, n_envs: int) -> int | None:
    """
    :param algorithm: an algorithm
    :param n_envs: number of environments
    :return: index of the environment that follows plans, ``None`` for none
    """
    fitting, state = algorithm.model_fitting, algorithm.training_state.plans
    if algorithm.model_planning == 0 or fitting is None or not fitting.is_prepared:
        return None
    if state.n_left == 0:
        # Spread spans of plans evenly, because short trainings have few spans
        trust = algorithm.trust.in_model(algorithm._n_updates)
        state.due += algorithm.model_planning * trust * need_of_plans(state)
        state.env = np.random.randint(n_envs) if state.due >= 1 else None
        state.due %= 1
        state.n_left, state.offsets = planning_horizon(algorithm.gamma), None
    state.n_left -= 1
    return None if state.env is None or state.env >= n_envs else state.env


@th.no_grad()
def planned_action(algorithm: Any, env: int) -> np.ndarray:
    """
    :param algorithm: an algorithm
    :param env: index of an environment
    :return: action of a plan for it, in [-1, 1], ``(A,)``; that of the policy if no plan is better
    """
    state, model, update = algorithm.training_state.plans, algorithm.model_fitting.model, algorithm.update
    # Without `VecNormalize`, SB3 keeps the observation before the last one in `_last_original_obs`
    raw = algorithm._last_obs if algorithm._vec_normalize_env is None else algorithm._last_original_obs
    observation = update.flat.flatten(algorithm.policy.obs_to_tensor(raw)[0])[env : env + 1]
    units = algorithm.units()
    context = update.context(units, algorithm.gamma)
    buffer, planner = algorithm.replay_buffer, Planner(planning_horizon(algorithm.gamma))
    # A plan ends with the episode, and when a callback changes the discount factor
    if buffer.dones[buffer.pos - 1, env] or (state.offsets is not None and len(state.offsets) != planner.horizon):
        state.offsets = None
    with model.using_members("dealt"), model.extrapolating(), evaluated(model):
        if state.offsets is None or state.n_followed == N_STEPS_OF_PLAN:
            plan = planner.plan(observation, context, update.q_functions(update.n_critics), model.n_members, state.offsets)
            advantage = relative_advantage(plan)
            weight = WEIGHT_OF_LARGER if advantage > state.mean_advantage else WEIGHT_OF_LATEST
            state.mean_advantage += weight * (advantage - state.mean_advantage)
            state.mean_advantage = max(state.mean_advantage, SMALLEST_MEAN)
            state.n_followed = 0
            # Follow the policy if no plan is better, until the next one
            state.offsets = plan.offsets if advantage > SMALLEST_ADVANTAGE else np.zeros_like(plan.offsets)
        actions = context.actor(units.normalize_observations(observation)).cpu().numpy()[0]
    planned = np.clip(actions + state.offsets[0], -1, 1).astype(np.float32)
    if state.offsets.any():
        update.plans.add(observation[0], th.as_tensor(planned))
    # The last offsets are held when the plan moves on by a step
    state.offsets = np.concatenate([state.offsets[1:], state.offsets[-1:]])
    state.n_followed += 1
    return planned


class PlansExploration:
    """
    For off-policy algorithms that have a model: exploration of which a share is planned in the model.

    Noise on the policy's actions finds what is near. What takes many steps in one direction, such as a swing-up or a way out
    of a valley, it finds only by chance; a plan finds it in the model. Planning takes turns with the policy, for spans of a
    planning horizon, and only one environment follows plans. It becomes rare in proportion to the distrust in the model, and
    when plans are not better than the policy any more.
    """

    policy: BasePolicy

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        algorithm: Any = super()
        actions, buffer_actions = algorithm._sample_action(learning_starts, action_noise, n_envs)
        env = env_to_plan_for(self, n_envs)
        if env is not None:
            buffer_actions[env] = planned_action(self, env).reshape(buffer_actions[env].shape)
            actions = self.policy.unscale_action(buffer_actions)
        return actions, buffer_actions
