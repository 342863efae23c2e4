"""Learner processes: the same updates as in process, and what happens when something goes wrong."""

import gc
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import settings
import torch as th
from helpers import assert_same_parameters
from lq import LinearEnv, LinearModel
from models import Breaks
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_mpg import MPG, NStepADP, NStepDPG, PriorModel
from sb3_mpg.common.learners import multiprocess
from sb3_mpg.common.learners.shared_memory import SharedParameters, SharedReplayBuffer, SharedReplayReader
from sb3_mpg.common.processes import Worker, process_context
from sb3_mpg.common.randomness import randomness_of_update
from sb3_mpg.common.trust.weighting import ConstantWeighting

SMALL = {
    **settings.SMALL,
    "policy_kwargs": {"net_arch": [8]},
    "batch_size": 16,
    "horizons": (0, 2),
    "residual": False,
    "weighting": "constant",
}
LEARNS_A_MODEL = {"residual": True, "weighting": "measured"}
SIMULATED = {"value_target": "n_step_simulator", "value_target_kwargs": {"n_steps": 3}, "batch_reuse": 3}
ROOT = Path(__file__).parent.parent


def small_model(env=None, cls=MPG, **kwargs):
    kwargs = {**SMALL, **kwargs}
    if cls is not MPG:
        for name in ("horizons", "residual", "weighting"):
            del kwargs[name]
    return cls("MlpPolicy", LinearEnv() if env is None else env, **kwargs)


def in_learner():
    return mp.current_process().name.startswith("learner")


def shared_files(pid):
    """Those with a name, and those without that are still open."""
    named = list(Path("/dev/shm").glob(f"*{pid}*"))
    opened = Path(f"/proc/{pid}/fd")
    return named + [fd for fd in opened.glob("*") if fd.is_symlink() and str(os.readlink(fd)).startswith("/dev/shm/")]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not [process for process in mp.active_children() if process.name.startswith("learner")]
    # Tracebacks of errors that were expected may be cycles
    gc.collect()
    assert shared_files(os.getpid()) == []


class Each(BaseCallback):
    """Calls a function at each step."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def _on_step(self):
        return self.function(self.model) is not False


def never(model):
    raise AssertionError("the error must come before the first environment step")


def when_learning(action, at=10):
    """A callback that acts once, after some updates."""
    done = []

    def function(model):
        if model._n_updates >= at and not done:
            done.append(True)
            return action(model)

    return Each(function)


class TestRandomness:
    def test_it_is_a_function_of_the_update(self):
        def draws(n_updates):
            with randomness_of_update(3, n_updates, th.device("cpu")):
                return [*np.random.rand(2), *th.rand(2).tolist()]

        assert draws(7) == draws(7) != draws(8)
        np.random.seed(1)
        th.manual_seed(1)
        expected = np.random.rand(), th.rand(1)
        np.random.seed(1)
        th.manual_seed(1)
        draws(7)
        assert (np.random.rand(), th.rand(1)) == expected

    def test_a_seed_is_drawn_and_saved(self, tmp_path):
        first, second = (small_model(seed=None) for _ in range(2))
        assert first._update_seed != second._update_seed
        first.save(tmp_path / "model.zip")
        assert MPG.load(tmp_path / "model.zip", env=LinearEnv())._update_seed == first._update_seed
        assert small_model(seed=5)._update_seed == 5


IDENTICAL = {
    "default": (MPG, LEARNS_A_MODEL, 500),
    "mpg_v1": (MPG, SIMULATED, 40),
    "nadp": (NStepADP, {"n_steps": 3, "batch_reuse": 2}, 20),
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
            settings = {"prior_model": HasGain(), "residual": False, "weighting": "constant", **kwargs}
            runs.append(small_model(LinearEnv(noise=0.1), **settings).learn(70, callback=Changes()))
        assert_same_parameters(*runs)

    def test_with_changing_statistics_and_many_environments(self):
        runs = []
        for kwargs in ({}, {"n_learners": 2, "max_staleness": 0}):
            env = VecNormalize(DummyVecEnv([lambda: LinearEnv(noise=0.1)] * 3))
            runs.append(small_model(env, gradient_steps=3, **kwargs).learn(120))
        assert_same_parameters(*runs)
        assert runs[0].logger.name_to_value["train/n_updates"] == runs[1].logger.name_to_value["train/n_updates"] > 60


class TestAhead:
    def run(self, **kwargs):
        model = small_model(**kwargs)
        notes = []

        def watch(model):
            learners = model._learners
            if "_note" not in vars(learners):
                note = learners._note
                learners._note = lambda staleness, waited, outcome: (
                    notes.append((staleness, outcome.n_updates)),
                    note(staleness, waited, outcome),
                )
            # On a busy machine one may start so late that the other does everything
            while learners._learners and not all(learner.is_ready for learner in learners._learners):
                learners._receive(0.05)
            # Or be so slow that nothing of it ever comes back
            while model._n_updates in (50, 100, 150) and learners._learners[-1].tasks:
                learners._receive(0.05)

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
        model.learn(300)
        assert model.n_skipped_updates == 0
        in_process = small_model(learning_starts=100, value_target="n_step_replay", buffer_size=100).learn(300)
        assert mean_return(model) > before + 0.8 * (mean_return(in_process) - before) > before


class Tired(PriorModel):
    """Slow, but only in the second learner."""

    def transition(self, states, actions):
        if mp.current_process().name == "learner-1":
            time.sleep(0.05)
        return states + 0.1 * actions

    def reward(self, states, actions, next_states):
        return -(states**2).sum(1, keepdim=True)


class SlowInLearners(Tired):
    def transition(self, states, actions):
        if in_learner():
            time.sleep(0.005)
        return states + 0.1 * actions


class Custom(Exception):
    """An exception of the user's."""


class Fails(Tired):
    def reward(self, states, actions, next_states):
        if in_learner() and self.training:
            raise Custom("the road ends here")
        return super().reward(states, actions, next_states)


class HangsOnce(Tired):
    def __init__(self, flag):
        super().__init__()
        self.flag = flag

    def transition(self, states, actions):
        if in_learner() and not self.flag.exists():
            self.flag.touch()
            time.sleep(1000)
        return states + 0.1 * actions


class NeedsMuchOnce(HangsOnce):
    def transition(self, states, actions):
        if in_learner() and not self.flag.exists():
            self.flag.touch()
            raise MemoryError("too much")
        return states + 0.1 * actions


class Remembers(ReplayBuffer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []


def learner_pids(model):
    return [learner.worker.process.pid for learner in model._learners._learners]


class TestFaults:
    def test_a_killed_learner_is_replaced(self):
        noticed = []

        def kill(model):
            os.kill(learner_pids(model)[0], signal.SIGKILL)
            killed = time.monotonic()
            while model._learners.n_restarts == 0:
                # Its death wakes the optimizer, long before that time has passed
                model._learners._receive(60.0)
            noticed.append(time.monotonic() - killed)

        model = small_model(n_learners=2)
        with pytest.warns(UserWarning, match="exit code -9 and is replaced"):
            model.learn(200, callback=when_learning(kill))
        assert noticed[0] < 60
        assert model._n_updates == 160
        assert model.logger.name_to_value["learners/restarts"] == 1

    def test_the_only_learner_is_killed_and_nothing_changes(self):
        """What it was computing is computed again, with the same random numbers."""
        reference = small_model().learn(100)
        model = small_model(n_learners=1, max_staleness=0)
        with pytest.warns(UserWarning, match="is replaced"):
            model.learn(100, callback=when_learning(lambda model: os.kill(learner_pids(model)[0], signal.SIGKILL)))
        assert_same_parameters(reference, model)

    def test_too_many_are_killed(self, tmp_path):
        def kill(model):
            if model._n_updates > 5:
                with suppress(ProcessLookupError):
                    os.kill(learner_pids(model)[0], signal.SIGKILL)

        model = small_model(n_learners=1, learner_kwargs={"max_restarts": 1})
        with pytest.warns(UserWarning, match="is replaced"), pytest.raises(RuntimeError, match="`max_restarts`"):
            model.learn(200, callback=Each(kill))
        model.save(tmp_path / "model.zip")
        loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv(), n_learners=0)
        assert_same_parameters(model, loaded)
        loaded.learn(50, reset_num_timesteps=False)

    def test_one_that_runs_out_of_memory_is_replaced(self, tmp_path):
        model = small_model(n_learners=1, prior_model=NeedsMuchOnce(tmp_path / "asked"))
        with pytest.warns(UserWarning, match="ran out of memory and is replaced"):
            model.learn(60)
        assert model._n_updates == 20

    def test_one_that_cannot_be_replaced(self, monkeypatch):
        def fail(*args):
            raise BlockingIOError("no more processes")

        def kill(model):
            monkeypatch.setattr(multiprocess, "Worker", fail)
            model._learners._learners[0].worker.process.kill()

        model = small_model(n_learners=1)
        with pytest.warns(UserWarning, match="is replaced"), pytest.raises(BlockingIOError, match="no more processes"):
            model.learn(200, callback=when_learning(kill))
        monkeypatch.undo()
        assert model._learners is None and model.replay_buffer.observations.flags.owndata
        assert model.learn(20, reset_num_timesteps=False).num_timesteps > 20

    def test_an_exception_of_the_prior_model(self):
        with pytest.raises(Custom, match="the road ends here") as error:
            small_model(n_learners=2, prior_model=Fails()).learn(200)
        text = str(error.value.__cause__)
        assert "in another process" in text
        assert 'in reward\n    raise Custom("the road ends here")' in text

    def test_an_exception_that_cannot_be_sent(self):
        class Odd(Exception):
            def __init__(self, first, second):
                super().__init__(first)

        class Model(Fails):
            def reward(self, states, actions, next_states):
                if in_learner():
                    raise Odd("odd", 2)
                return -states.sum(1, keepdim=True)

        with pytest.raises(RuntimeError, match="cannot be sent") as error:
            small_model(n_learners=1, prior_model=Model()).learn(60)
        assert "Odd: odd" in str(error.value.__cause__)

    def test_one_that_hangs_is_replaced(self, tmp_path):
        kwargs = {"prior_model": HangsOnce(tmp_path / "flag")}
        model = small_model(n_learners=1, learner_kwargs={"timeout": 3.0}, **kwargs)
        with pytest.warns(UserWarning, match="did not answer in time and is replaced"):
            model.learn(100)
        assert model._n_updates == 60
        assert model.logger.name_to_value["learners/restarts"] >= 1

    def test_non_finite_gradients(self):
        kwargs = {"prior_model": Breaks(), "horizons": (0, 5), "weighting": "rule_based"}
        model = small_model(n_learners=2, max_skipped_updates=3, **kwargs)
        with (
            pytest.warns(UserWarning, match="skipped"),
            pytest.raises(FloatingPointError, match=r"horizon 5.*model step 1"),
        ):
            model.learn(200)
        assert model.n_skipped_updates == 4

    def test_batch_normalisation_is_refused(self):
        class Normalised(th.nn.BatchNorm1d):
            def __init__(self, observation_space):
                super().__init__(2)
                self.features_dim = 2

        policy_kwargs = {"net_arch": [8], "features_extractor_class": Normalised, "features_extractor_kwargs": {}}
        with pytest.raises(ValueError, match="n_learners=0"):
            small_model(n_learners=1, policy_kwargs=policy_kwargs).learn(60, callback=Each(never))

    def test_replay_buffers_that_keep_more(self):
        with pytest.raises(ValueError, match=r"Remembers also keeps \['seen'\].*n_learners=0"):
            small_model(n_learners=1, replay_buffer_class=Remembers).learn(60, callback=Each(never))

    def test_what_cannot_be_pickled(self):
        rule = ConstantWeighting((0, 2))
        rule.handle = (number for number in range(3))
        with pytest.raises(ValueError, match=r"cannot be sent to learner processes.*generator"):
            small_model(n_learners=1, weighting=rule).learn(60, callback=Each(never))

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"n_learners": -1}, "`n_learners` must be"),
            ({"n_learners": 1.5}, "`n_learners` must be"),
            ({"max_staleness": -1}, "`max_staleness` must be"),
            ({"learner_kwargs": {"timeout": 0}}, "`timeout`"),
            ({"learner_kwargs": {"start_method": "fork"}}, "start method"),
        ],
    )
    def test_settings_that_make_no_sense(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            small_model(**kwargs)


class TestLifeCycle:
    def test_again_and_again(self):
        runs = []
        for kwargs in ({}, {"n_learners": 1, "max_staleness": 0}):
            run = small_model(**kwargs).learn(60)
            run.learn(30, reset_num_timesteps=False)
            run.set_env(DummyVecEnv([lambda: LinearEnv(noise=0.2)]))
            run.env.seed(7)
            runs.append(run.learn(30, reset_num_timesteps=False))
        reference, model = runs
        assert_same_parameters(reference, model)
        assert model._learners is None
        # The replay buffer is as it would have been, and nobody's but the model's
        for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
            array = getattr(model.replay_buffer, name)
            np.testing.assert_array_equal(array, getattr(reference.replay_buffer, name))
            assert array.flags.owndata

    def test_saved_while_learners_run(self, tmp_path):
        model = small_model(n_learners=1)
        model.learn(80, callback=CheckpointCallback(60, str(tmp_path), save_replay_buffer=True))
        loaded = MPG.load(next(tmp_path.glob("*_steps.zip")), env=LinearEnv())
        loaded.load_replay_buffer(next(tmp_path.glob("*.pkl")))
        assert loaded.n_learners == 1
        assert loaded._learners is None
        n_updates = loaded._n_updates
        loaded.learn(40, reset_num_timesteps=False)
        assert loaded._n_updates == n_updates + 40

    def test_continuing_equals_not_stopping(self, tmp_path):
        """With one learner and no staleness, saved and loaded in the middle."""

        def second_half(model):
            model.env.seed(7)
            model._last_obs = None
            return model.learn(60, reset_num_timesteps=False)

        model = small_model(n_learners=1, max_staleness=0).learn(100)
        model.save(tmp_path / "model.zip")
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        uninterrupted = second_half(model)
        np.random.seed(99)
        resumed = MPG.load(tmp_path / "model.zip", env=make_vec_env(LinearEnv, 1))
        resumed.load_replay_buffer(tmp_path / "buffer.pkl")
        assert_same_parameters(uninterrupted, second_half(resumed))

    def test_a_callback_brings_another_replay_buffer(self):
        def replace(model):
            buffer = small_model(learning_starts=100).learn(50).replay_buffer
            model.replay_buffer = buffer

        model = small_model(n_learners=1).learn(100, callback=when_learning(replace))
        assert model._n_updates == 60

    def test_an_exception_in_a_callback(self):
        children = []

        def fail(model):
            children.extend(learner_pids(model))
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            small_model(n_learners=2).learn(200, callback=when_learning(fail))
        assert len(children) == 2
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)

    def test_training_outside_of_learn_is_in_process(self):
        model = small_model(n_learners=2, learning_starts=100).learn(60)
        model.train(3, 16)
        assert model._n_updates == 3
        assert not mp.active_children()


SCRIPT = """
from lq import LinearEnv
from sb3_mpg import MPG
from stable_baselines3.common.callbacks import BaseCallback

class Tell(BaseCallback):
    def _on_step(self):
        if self.model._n_updates == 5:
            print("learning", flush=True)
        return True

def main():
    settings = {"policy_kwargs": {"net_arch": [8]}, "learning_starts": 40, "batch_size": 16, "residual": False}
    settings.update(weighting="constant", horizons=(0, 2), compile=False)
    model = MPG("MlpPolicy", LinearEnv(), n_learners=2, learner_kwargs={"start_method": "START"}, **settings)
    model.learn(STEPS, callback=Tell())

"""
GUARDED = SCRIPT + 'if __name__ == "__main__":\n    main()\n'


class Script:
    """
    A script in a process of its own, whose descendants can be found by a mark in their environment.

    :param path: where to write it
    :param text: the script
    """

    def __init__(self, path, text, start_method="forkserver", steps=1_000_000):
        path.write_text(textwrap.dedent(text).replace("START", start_method).replace("STEPS", str(steps)))
        self.mark = f"SB3_MPG_TEST={uuid.uuid4()}"
        name, value = self.mark.split("=")
        paths = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        env = {**os.environ, name: value, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.process = subprocess.Popen(
            [sys.executable, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            # Tests that a shell runs in the background ignore Ctrl-C, and hand that down
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def pids(self):
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_running = folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
                if is_running and self.mark.encode() in folder.joinpath("environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                pass  # gone, or somebody else's
        return found

    def wait_until_learning(self):
        for line in self.process.stdout:
            if line.strip() == "learning":
                return
        raise AssertionError(self.process.stderr.read())

    def wait_until_gone(self, seconds=20):
        _, errors = self.process.communicate(timeout=120)
        deadline = time.monotonic() + seconds
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.pids() == []
        assert shared_files(self.process.pid) == []
        # The resource tracker says so when a semaphore or a segment is left
        assert "leaked" not in errors
        return errors


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
class TestScripts:
    @pytest.mark.parametrize(
        ("start_method", "how"),
        [
            ("forkserver", signal.SIGINT),
            ("spawn", signal.SIGKILL),
            pytest.param("forkserver", signal.SIGKILL, marks=pytest.mark.expensive),
            pytest.param("spawn", signal.SIGINT, marks=pytest.mark.expensive),
        ],
    )
    def test_nothing_is_left_when_the_main_process_is_stopped(self, tmp_path, start_method, how):
        # A learner that is killed has compiled: the compiler is what might leave something
        text = GUARDED.replace("compile=False", "compile=True") if how == signal.SIGKILL else GUARDED
        script = Script(tmp_path / "script.py", text, start_method)
        script.wait_until_learning()
        assert len(script.pids()) >= 3
        script.process.send_signal(how)
        script.wait_until_gone()
        assert script.process.returncode == -how if how == signal.SIGKILL else script.process.returncode != 0

    @pytest.mark.parametrize("start_method", ["forkserver", pytest.param("spawn", marks=pytest.mark.expensive)])
    def test_without_guard_there_is_one_sentence(self, tmp_path, start_method):
        script = Script(tmp_path / "script.py", SCRIPT + "main()\n", start_method)
        errors = script.wait_until_gone()
        assert script.process.returncode == 1
        assert "put what trains under `if __name__ == '__main__':`" in errors.strip().splitlines()[-1]
        assert errors.count("Traceback") == 1

    def test_models_and_errors_of_the_script_itself(self, tmp_path):
        """What is defined in `__main__` travels too, and comes back as what it was."""
        text = SCRIPT.replace("LinearEnv(), n_learners=2", "LinearEnv(), n_learners=1, prior_model=Mine()")
        text += """
from sb3_mpg import PriorModel
import multiprocessing as mp

class Broken(Exception):
    pass

class Mine(PriorModel):
    def transition(self, states, actions):
        if mp.current_process().name.startswith("learner"):
            raise Broken("mine")
        return states + actions

    def reward(self, states, actions, next_states):
        return -(states**2).sum(1, keepdim=True)

if __name__ == "__main__":
    try:
        main()
    except Broken as error:
        print("caught", error, type(error.__cause__).__name__)
"""
        script = Script(tmp_path / "script.py", text)
        assert "caught mine RemoteTraceback" in script.process.stdout.read()
        script.wait_until_gone()


def read_parameters(connection, parameters, n_reads):
    """In another process: fetch again and again while they are written, until many versions were seen."""
    tensors = [th.zeros(1000) for _ in range(20)]
    torn, versions = 0, set()
    connection.send("ready")
    for number in range(100 * n_reads):
        if number >= n_reads and len(versions) > 10:
            break
        version = parameters.fetch(tensors)
        versions.add(version)
        torn += any((tensor != version).any() for tensor in tensors)
    connection.send((torn, len(versions)))


def read_buffer(connection, buffer, parts, n_reads):
    reader = SharedReplayReader(buffer, *parts)
    np.random.seed(0)
    torn, newest = 0, 0.0
    connection.send("ready")
    for number in range(100 * n_reads):
        if number >= n_reads and newest > 30:
            break
        samples = reader.sample(32)
        torn += not th.equal(samples.observations, samples.rewards.expand(-1, 2))
        torn += not th.equal(samples.next_observations, samples.observations + 1)
        newest = max(newest, samples.rewards.max().item())
    connection.send((torn, newest))


def tell_threads(connection):
    connection.send(th.get_num_threads())


def test_workers_have_one_thread():
    worker = Worker(process_context(), tell_threads, (), "counter")
    assert worker.connection.recv() == 1
    worker.close(1)


class TestSharedMemory:
    def test_parameters_are_never_torn(self):
        parameters = SharedParameters([th.zeros(1000) for _ in range(20)])
        parameters.publish([th.zeros(1000)] * 20, 0)
        worker = Worker(process_context(), read_parameters, (parameters, 2000), "reader")
        assert worker.connection.recv() == "ready"
        version = 0
        while not worker.connection.poll():
            version += 1
            parameters.publish([th.full((1000,), float(version))] * 20, version)
        torn, n_versions = worker.connection.recv()
        worker.close(1)
        assert torn == 0
        assert n_versions > 10

    def test_transitions_are_never_torn(self):
        buffer = small_model(buffer_size=20).replay_buffer

        def add(number):
            obs = np.full((1, 2), number, dtype=np.float32)
            buffer.add(obs, obs + 1, np.zeros((1, 1)), np.full(1, number), np.zeros(1), [{}])

        for number in range(30):
            add(number)
        shared = SharedReplayBuffer(buffer)
        arguments = (shared.stripped_buffer(), shared.shared_parts(), 1000)
        worker = Worker(process_context(), read_buffer, arguments, "reader")
        assert worker.connection.recv() == "ready"
        number = 30
        while not worker.connection.poll():
            with shared.writing():
                add(number)
            number += 1
            time.sleep(1e-4)
        torn, newest = worker.connection.recv()
        worker.close(1)
        assert torn == 0
        assert newest > 30
        shared.restore()
        assert buffer.rewards.max() == number - 1

    def test_types_and_shapes(self):
        tensors = [th.tensor(3), th.rand(2, 3), th.tensor([True, False]), th.rand(3, dtype=th.float64), th.zeros(0)]
        parameters = SharedParameters(tensors)
        parameters.publish(tensors, 7)
        copies = [th.zeros_like(tensor) for tensor in tensors]
        assert parameters.fetch(copies) == 7
        assert all(th.equal(a, b) for a, b in zip(tensors, copies, strict=True))
        assert all(view.data_ptr() % 64 == 0 for view in parameters.views)


@pytest.mark.expensive
def test_compiled_in_learners():
    kwargs = {"n_learners": 2, "horizons": (0, 5), "prior_model": LinearEnv().prior_model()}
    assert isinstance(kwargs["prior_model"], LinearModel)
    model = small_model(compile=True, **kwargs).learn(80)
    assert model._n_updates == 40
    assert not model._step_compiler.has_failed
