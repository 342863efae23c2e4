"""Whatever a callback changes in the middle of training takes effect in learners as it does in process."""

import inspect

import gymnasium as gym
import pytest
import torch as th
from helpers import assert_same_parameters
from learner_runs import small_model
from lq import LinearEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mpg import MPG
from sb3_mpg.common.trust.weighting import make_weighting_rule
from sb3_mpg.common.value_targets import ReplayTarget

pytestmark = pytest.mark.usefixtures("nothing_is_left", "models_are_fitted_once")

LEARNING_STARTS = 20
N_STEPS = 70


def set_to(**values):
    """What sets attributes of an algorithm."""

    def change(model):
        for name, value in values.items():
            setattr(model, name, value)

    return change


def change_attribute_of_value_target(model):
    model.value_target.noise_std = 0.5


def change_attribute_of_rule(model):
    model.weighting_rule.lambda_ = 0.2


def change_simulated_steps(model):
    model.value_target.n_steps = 1


def stop_correcting(model):
    model.rollout_model.use_correction(False)


def clip_observations(model):
    model.get_vec_normalize_env().clip_obs = 0.5


def clip_rewards(model):
    model.get_vec_normalize_env().clip_reward = 0.1


def stop_normalising_rewards(model):
    model.get_vec_normalize_env().norm_reward = False


def stop_normalising_observations(model):
    model.get_vec_normalize_env().norm_obs = False


def strengthen_the_correction(model):
    with th.no_grad():
        for parameter in model.rollout_model.parameters():
            parameter.mul_(1.5)


def change_a_buffer_of_the_model(model):
    model.rollout_model.b.mul_(-1.0)


GEOMETRIC = {"horizons": (0, 1, 3), "weighting": "geometric"}
MEASURED = {"horizons": (0, 2), "weighting": "measured", "residual": True}
SIMULATED = {"value_target": "n_step_simulator", "value_target_kwargs": {"n_steps": 4}}
#: What is changed, and the settings of a training in which it matters
CHANGES = {
    "gamma": (set_to(gamma=0.5), {}),
    "reward_scale": (set_to(reward_scale=3.0), {}),
    "differentiate": (set_to(differentiate="all_actions"), GEOMETRIC),
    "policy_delay": (set_to(policy_delay=3), {}),
    "rollout_batch_size": (set_to(rollout_batch_size=5), {**MEASURED, "rollout_batch_size": 32}),
    "batch_reuse": (set_to(batch_reuse=3), {}),
    "batch_reuse_less": (set_to(batch_reuse=1), {"batch_reuse": 3}),
    "model_exploration": (set_to(model_exploration=1.0), MEASURED),
    "value_target": (set_to(value_target=ReplayTarget(noise_std=0.3)), {}),
    "value_target_attribute": (change_attribute_of_value_target, {}),
    "value_target_simulated": (change_simulated_steps, SIMULATED),
    "weighting_rule": (set_to(weighting_rule=make_weighting_rule("constant", (0, 1, 3), {"values": [0, 0, 1]})), GEOMETRIC),
    "weighting_rule_attribute": (change_attribute_of_rule, GEOMETRIC),
    "weighting_rule_measured": (set_to(weighting_rule=make_weighting_rule("constant", (0, 2))), MEASURED),
    "batch_size": (set_to(batch_size=24), {}),
    "batch_size_simulated": (set_to(batch_size=24), SIMULATED),
    "tau": (set_to(tau=0.5), {}),
    "max_grad_norm": (set_to(max_grad_norm=0.01), {}),
    "max_grad_norm_of_all_actions": (set_to(max_grad_norm=0.01), {**GEOMETRIC, "differentiate": "all_actions"}),
    "residual": (set_to(residual=False), MEASURED),
    "correction": (stop_correcting, MEASURED),
    "batch_reuse_more": (set_to(batch_reuse=7), {"batch_reuse": 3}),
    "parameters_of_the_model": (strengthen_the_correction, MEASURED),
    "buffers_of_the_model": (change_a_buffer_of_the_model, {}),
    "clip_obs": (clip_observations, {"normalizes": True}),
    "clip_reward": (clip_rewards, {"normalizes": True}),
    "norm_reward": (stop_normalising_rewards, {"normalizes": True}),
    "norm_obs": (stop_normalising_observations, {"normalizes": True}),
}


#: Arguments of the constructor that need not reach learners: what is fixed when networks, model, rule, buffer or processes are
#: made, and what only the main process uses
NOT_FOR_LEARNERS = {
    *["policy", "env", "buffer_size", "replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage", "n_steps"],
    *["prior_model", "prior_model_kwargs", "residual_kwargs", "horizons", "weighting", "weighting_kwargs"],
    *["value_target_kwargs", "n_learners", "max_staleness", "learner_kwargs", "compile", "policy_kwargs", "seed", "device"],
    *["learning_rate", "critic_learning_rate", "learning_starts", "train_freq", "gradient_steps", "action_noise"],
    *[
        "exploration_noise",
        "model_planning",
        "max_skipped_updates",
        "stats_window_size",
        "tensorboard_log",
        "verbose",
        "_init_setup_model",
    ],
}


def test_every_setting_is_tried_or_need_not_reach_learners():
    """A new argument has a place in one of the two."""
    assert set(inspect.signature(MPG).parameters) - CHANGES.keys() == NOT_FOR_LEARNERS


class Once(BaseCallback):
    """Calls a function in the middle of a training, or never."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def _on_step(self):
        if self.change is not None and self.num_timesteps == 45:
            self.change(self.model)
        return True


def trained(change, normalizes=False, **kwargs):
    env = gym.wrappers.TimeLimit(LinearEnv(noise=0.1), 25)
    if normalizes:
        env = VecNormalize(DummyVecEnv([lambda: env]))
    kwargs = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": LEARNING_STARTS, **kwargs}
    return small_model(env, **kwargs).learn(N_STEPS, callback=Once(change))


# Parameters of the policy after a training without a change, by its settings
UNCHANGED = {}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_callback_changes_reaches_the_learners(name):
    change, kwargs = CHANGES[name]
    in_process = trained(change, **kwargs)
    in_learner = trained(change, **kwargs, n_learners=1, max_staleness=0)
    assert in_process._n_updates == in_learner._n_updates == N_STEPS - LEARNING_STARTS
    assert_same_parameters(in_process, in_learner)
    for key, value in in_process.logger.name_to_value.items():
        if key.startswith(("train/", "horizons/", "model/")):
            assert in_learner.logger.name_to_value[key] == value, key
    # Otherwise the test would say nothing
    if repr(kwargs) not in UNCHANGED:
        UNCHANGED[repr(kwargs)] = trained(None, **kwargs).policy.state_dict()
    pairs = zip(in_process.policy.state_dict().values(), UNCHANGED[repr(kwargs)].values(), strict=True)
    assert not all(th.equal(ours, other) for ours, other in pairs), "the change has no effect"
