"""Where gradients come from: the contract of learners, and that processes compute what the main process would."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from goals import GoalEnv
from helpers import assert_same_parameters
from learner_runs import SMALL, Custom, Each, SlowInLearners, Tired, small_model
from lq import LinearEnv
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_mpg import MPG, NStepADP, NStepDPG, PriorModel
from sb3_mpg.common.learners import InProcessLearner, LearnerSettings, MultiprocessLearners

pytestmark = pytest.mark.usefixtures("nothing_is_left")

LEARNS_A_MODEL = {"residual": True, "weighting": "measured"}
TALL = {"policy_kwargs": {"net_arch": [32]}, "max_grad_norm": 0.1}
SIMULATED = {"value_target": "n_step_simulator", "value_target_kwargs": {"n_steps": 3}, "batch_reuse": 3}


LEARNERS = {
    "in_process": lambda update, inputs: InProcessLearner(update),
    "processes": lambda update, inputs: MultiprocessLearners(update, inputs, LearnerSettings(n_learners=1, max_staleness=0)),
}


@pytest.fixture(params=LEARNERS)
def make_learners(request):
    """Makes learners of an algorithm, which are closed after the test."""
    made = []

    def make(model):
        made.append((model, LEARNERS[request.param](model.update, model.training_inputs(model.batch_size))))
        return made[-1][1]

    yield make
    for model, learners in made:
        learners.close()
        # The last gradients may be views of memory that learners shared
        model.policy.zero_grad()
    made.clear()


def take(learners, model, n_updates):
    """One update: the gradients, copied, are applied."""
    model._n_updates += n_updates
    results = []
    for number in range(model._n_updates - n_updates + 1, model._n_updates + 1):
        inputs = model.training_inputs(model.batch_size)
        result = learners.next_result(number, inputs)
        results.append({name: [gradient.clone() for gradient in result.gradients[name]] for name in result.gradients})
        update = model.update
        assert model.optimizer_steps.apply(result, update.networks(), update.target_networks(), model.tau)
        learners.applied(number, inputs)
    return results


class TestContract:
    """What is true of learners wherever they compute."""

    def test_gradients_are_those_of_the_update(self, make_learners):
        model, reference = (small_model(LinearEnv(noise=0.1)).learn(50) for _ in range(2))
        learners = make_learners(model)
        for number, gradients in enumerate(take(learners, model, 6), start=11):
            inputs = reference.training_inputs(16)
            expected = reference.update.gradients_of_update(
                number, 16, reference.replay_buffer, inputs.units, reference.update_settings(number)
            )
            assert list(gradients) == list(expected.gradients) == (["critic", "actor"] if number % 2 == 0 else ["critic"])
            for name in gradients:
                for ours, other in zip(gradients[name], expected.gradients[name], strict=True):
                    assert th.equal(ours, other)
            update = reference.update
            reference.optimizer_steps.apply(expected, update.networks(), update.target_networks(), reference.tau)
        assert_same_parameters(model, reference)

    def test_logs_and_shares_come_with_them(self, make_learners):
        model = small_model().learn(50)
        learners = make_learners(model)
        inputs = model.training_inputs(16)
        result = learners.next_result(12, inputs)
        expected = model.update.gradients_of_update(12, 16, model.replay_buffer, inputs.units, model.update_settings(12))
        assert result.logs == expected.logs
        assert result.share_masked == expected.share_masked
        learners.applied(12, inputs)

    def test_settings_are_those_of_the_moment(self, make_learners):
        model = small_model(policy_delay=1).learn(50)
        learners = make_learners(model)
        for number, gamma in ((11, 0.98), (12, 0.5), (13, 0.98)):
            model.gamma = gamma
            inputs = model.training_inputs(16)
            expected = model.update.gradients_of_update(
                number, 16, model.replay_buffer, inputs.units, inputs.settings_of(number)
            )
            result = learners.next_result(number, inputs)
            for ours, other in zip(result.gradients["actor"], expected.gradients["actor"], strict=True):
                assert th.equal(ours, other)
            learners.applied(number, inputs)

    def test_what_is_written_is_sampled(self, make_learners):
        model = small_model(buffer_size=60).learn(50)
        learners = make_learners(model)
        take(learners, model, 1)
        buffer = model.replay_buffer
        for _ in range(60):
            with learners.writing(buffer):
                obs = np.full((1, 2), 3.0, dtype=np.float32)
                buffer.add(obs, obs, np.zeros((1, 1)), np.full(1, -7.0), np.ones(1), [{}])
        inputs = model.training_inputs(16)
        result = learners.next_result(12, inputs)
        values = th.cat(model.critic(th.full((1, 2), 3.0), th.zeros(1, 1)))
        # All targets are the reward of a terminated step
        assert result.logs["train/critic_loss"] == pytest.approx(((values + 7) ** 2).sum().item(), rel=1e-5)
        learners.applied(12, inputs)

    def test_another_replay_buffer_may_be_written_to(self, make_learners):
        model, other = (small_model().learn(50) for _ in range(2))
        learners = make_learners(model)
        take(learners, model, 1)
        with learners.writing(other.replay_buffer):
            other.replay_buffer.reset()
        assert len(take(learners, model, 2)) == 2

    def test_faults_are_raised_in_the_main_process(self, make_learners):
        model = small_model(prior_model=FailsOnDemand())
        model.learn(50)
        learners = make_learners(model)
        take(learners, model, 1)
        model.rollout_model.fails.fill_(True)
        with pytest.raises(Custom, match="the bridge is up"):
            take(learners, model, 2)

    def test_closing_twice_and_taking_the_memory_back(self, make_learners):
        model = small_model().learn(50)
        learners = make_learners(model)
        take(learners, model, 2)
        for _ in range(2):
            learners.close()
        assert model.replay_buffer.observations.flags.owndata
        # ... and they start again
        assert len(take(learners, model, 1)) == 1

    def test_what_is_logged_is_about_learners(self, make_learners):
        model = small_model().learn(50)
        learners, logger = make_learners(model), Logger(None, [])
        take(learners, model, 3)
        learners.record(logger)
        assert all(key.startswith("learners/") and np.isfinite(value) for key, value in logger.name_to_value.items())
        is_pool = isinstance(learners, MultiprocessLearners)
        assert ("learners/staleness_max" in logger.name_to_value) == is_pool
        assert logger.name_to_value["learners/staleness_max"] == 0


class FailsOnDemand(PriorModel):
    """Fails wherever it is, when a buffer says so, which learners see."""

    def __init__(self):
        super().__init__()
        self.register_buffer("fails", th.tensor(False))

    def transition(self, states, actions):
        if self.fails:
            raise Custom("the bridge is up")
        return states + 0.1 * actions

    def reward(self, states, actions, next_states):
        return -(states**2).sum(1, keepdim=True)


IDENTICAL = {
    "default": (MPG, LEARNS_A_MODEL, 500),
    "mpg_v1": (MPG, SIMULATED, 40),
    "nadp": (NStepADP, {"n_steps": 3, "batch_reuse": 2}, 20),
    # Layers with more outputs than inputs, whose norms are clipped: their gradients come from transposed parameters
    "nadp_tall": (NStepADP, {"n_steps": 3, **TALL}, 40),
    "all_actions": (MPG, {"differentiate": "all_actions", "horizons": (0, 3), **TALL}, 40),
    "ndpg": (NStepDPG, {"n_steps": 3, "batch_reuse": 2}, 20),
    "n_step_replay": (MPG, {"value_target": "n_step_replay", "buffer_size": 50}, 40),
    "optimize_memory_usage": (
        MPG,
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}, "buffer_size": 50},
        40,
    ),
    "papers": (MPG, {"weighting": "rule_based", "gradient_steps": 2}, 40),
    "compared": (MPG, {"weighting": "measured"}, 40),
    "no_model": (MPG, {"horizons": (0,)}, 40),
}


class HasGain(PriorModel):
    """Has a buffer, which a callback may change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", th.tensor(0.1))

    def transition(self, states, actions):
        return states + self.gain * actions

    def reward(self, states, actions, next_states):
        return -(states**2).sum(1, keepdim=True)


class Remembers(DictReplayBuffer):
    """Draws what it has not drawn yet, in an order that torch chooses."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.n_drawn = 0

    def sample(self, batch_size, env=None):
        rows = (self.n_drawn + th.randperm(batch_size).numpy()) % self.size()
        self.n_drawn += batch_size
        return self._get_samples(rows, env)


class TestSameAsInProcess:
    @pytest.mark.parametrize("name", IDENTICAL)
    def test_bit_identical(self, name):
        cls, kwargs, n_updates = IDENTICAL[name]
        steps = kwargs.get("learning_starts", 40) + n_updates // kwargs.get("gradient_steps", 1)
        first = small_model(LinearEnv(noise=0.1), cls, **{"learning_starts": 40, **kwargs}).learn(steps)
        second = small_model(
            LinearEnv(noise=0.1), cls, **{"learning_starts": 40, **kwargs}, n_learners=1, max_staleness=0
        ).learn(steps)
        assert first._n_updates == second._n_updates == n_updates
        assert_same_parameters(first, second)
        log = second.logger.name_to_value
        assert log["learners/staleness_max"] == log["learners/dropped"] == log["learners/restarts"] == 0
        for key, value in first.logger.name_to_value.items():
            if key.startswith(("train/", "horizons/", "model/")):
                assert log[key] == value, key

    def test_what_a_callback_changes(self):
        class Changes(BaseCallback):
            def _on_step(self):
                if self.num_timesteps == 50:
                    self.model.gamma, self.model.policy_delay = 0.5, 1
                    self.model.rollout_model.gain.fill_(-0.2)
                return True

        runs = []
        for kwargs in ({}, {"n_learners": 1, "max_staleness": 0}):
            kwargs = {"prior_model": HasGain(), "residual": False, "weighting": "constant", **kwargs}
            runs.append(small_model(LinearEnv(noise=0.1), **kwargs).learn(70, callback=Changes()))
        assert_same_parameters(*runs)

    def test_with_changing_statistics_and_many_environments(self):
        runs = []
        for kwargs in ({}, {"n_learners": 2, "max_staleness": 0}):
            env = VecNormalize(DummyVecEnv([lambda: LinearEnv(noise=0.1)] * 3))
            runs.append(small_model(env, gradient_steps=3, **kwargs).learn(120))
        assert_same_parameters(*runs)
        assert runs[0].logger.name_to_value["train/n_updates"] == runs[1].logger.name_to_value["train/n_updates"] > 60

    @pytest.mark.parametrize("buffer", [None, HerReplayBuffer, Remembers])
    def test_buffers_of_dictionaries_and_with_attributes_of_their_own(self, buffer):
        """Batches of a buffer that cannot be shared, as one that computes rewards, come from the main process."""
        runs = []
        for kwargs in ({}, {"n_learners": 1, "max_staleness": 0}):
            env = VecNormalize(DummyVecEnv([GoalEnv] * 2), norm_obs_keys=["observation"])
            kwargs = {**SMALL, "replay_buffer_class": buffer, "policy_delay": 1, **kwargs}
            runs.append(MPG("MultiInputPolicy", env, **kwargs).learn(80))
        assert_same_parameters(*runs)
        assert runs[0]._n_updates == runs[1]._n_updates > 10


class TestAhead:
    def run(self, **kwargs):
        model = small_model(**kwargs)
        notes = []

        def watch(model):
            learners = model.learners
            if "_note" not in vars(learners):
                note = learners._note
                learners._note = lambda staleness, waited, outcome: (
                    notes.append((staleness, outcome.n_updates)),
                    note(staleness, waited, outcome),
                )
            pool = learners._pool
            if pool is None:
                return  # started by the first update
            # On a busy machine one may start so late that the other does everything
            while not all(pool.scheduler.is_ready(index) for index in range(len(pool.learners))):
                learners._receive(pool, 0.05)
            # Or be so slow that nothing of it ever comes back
            while model._n_updates in (50, 100, 150) and pool.scheduler.owes_answer(len(pool.learners) - 1):
                learners._receive(pool, 0.05)

        model.learn(200, callback=Each(watch))
        assert model._n_updates == model.logger.name_to_value["train/n_updates"] == 160
        return model, notes

    @pytest.mark.parametrize("max_staleness", [1, None])
    def test_staleness_is_bounded_and_no_gradient_is_used_twice(self, max_staleness):
        # So slow that both are at work at once, whatever else the machine does
        model, notes = self.run(n_learners=2, max_staleness=max_staleness, prior_model=SlowInLearners())
        staleness, updates = zip(*notes, strict=True)
        bound = 4 if max_staleness is None else max_staleness
        assert 0 < max(staleness) <= bound
        assert len(set(updates)) == len(updates) == 160
        # They may overtake one another, within what is handed out
        assert max(updates) <= 160 + bound
        log = model.logger.name_to_value
        assert log["learners/staleness_max"] == max(staleness)
        assert log["learners/staleness_mean"] == pytest.approx(np.mean(staleness))
        for name in ("throughput", "optimizer_wait_ms", "learner_wait_ms", "gradient_ms"):
            assert log[f"learners/{name}"] > 0, name

    def test_what_is_too_old_is_dropped_and_computed_again(self):
        model, notes = self.run(n_learners=2, max_staleness=1, prior_model=Tired())
        assert model.logger.name_to_value["learners/dropped"] > 0
        staleness, updates = zip(*notes, strict=True)
        assert max(staleness) <= 1
        assert len(set(updates)) == 160

    def test_beside_workers_that_step_environments(self):
        env = make_vec_env(LinearEnv, 2, vec_env_cls=SubprocVecEnv)
        model = small_model(env, n_learners=2).learn(100)
        env.close()
        assert model._n_updates == 30

    def test_learns_as_well(self):
        def mean_return(model):
            return evaluate_policy(model, make_vec_env(lambda: gym.wrappers.TimeLimit(LinearEnv(), 50), 1, seed=0), 10)[0]

        model = small_model(n_learners=2, learning_starts=100, value_target="n_step_replay", buffer_size=100)
        before = mean_return(model)
        model.learn(600)
        assert model.n_skipped_updates == 0
        in_process = small_model(learning_starts=100, value_target="n_step_replay", buffer_size=100).learn(600)
        assert mean_return(model) > before + 0.8 * (mean_return(in_process) - before) > before
