"""Learner processes: what happens when something goes wrong, and that nothing is left of them."""

import multiprocessing as mp
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch as th
from helpers import assert_same_parameters
from learner_runs import (
    Custom,
    Each,
    Fails,
    Tired,
    in_learner,
    learner_pids,
    never,
    shared_files,
    small_model,
    when_learning,
)
from lq import LinearEnv, LinearModel
from models import Breaks
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mpg import MPG
from sb3_mpg.common.learners import InProcessLearner, multiprocess
from sb3_mpg.common.processes import Worker, process_context
from sb3_mpg.common.trust.weighting import ConstantWeighting
from sb3_mpg.common.value_targets import ReplayTarget

pytestmark = pytest.mark.usefixtures("nothing_is_left")

ROOT = Path(__file__).parent.parent


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


class TestFaults:
    def test_a_killed_learner_is_replaced(self):
        noticed = []

        def kill(model):
            os.kill(learner_pids(model)[0], signal.SIGKILL)
            killed = time.monotonic()
            while model.learners.n_restarts == 0:
                # Its death wakes the optimizer, long before that time has passed
                model.learners._receive(model.learners._pool, 60.0)
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
            model.learners._pool.learners[0].worker.process.kill()

        model = small_model(n_learners=1)
        with pytest.warns(UserWarning, match="is replaced"), pytest.raises(BlockingIOError, match="no more processes"):
            model.learn(200, callback=when_learning(kill))
        monkeypatch.undo()
        assert isinstance(model.learners, InProcessLearner) and model.replay_buffer.observations.flags.owndata
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

    def test_what_cannot_be_pickled(self):
        target = ReplayTarget()
        target.handle = (number for number in range(3))
        with pytest.raises(ValueError, match=r"cannot be sent to learner processes.*generator"):
            small_model(n_learners=1, value_target=target).learn(60, callback=Each(never))

    def test_a_weighting_rule_stays_in_the_main_process(self):
        """Learners are told the weights."""
        rule = ConstantWeighting((0, 2))
        rule.handle = (number for number in range(3))
        assert small_model(n_learners=1, weighting=rule).learn(60)._n_updates == 20

    def test_a_callback_brings_what_cannot_be_pickled(self):
        def change(model):
            model.value_target = ReplayTarget()
            model.value_target.handle = (number for number in range(3))

        with pytest.raises(ValueError, match=r"cannot be sent to learner processes.*generator"):
            small_model(n_learners=1).learn(200, callback=when_learning(change))

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
        assert isinstance(model.learners, InProcessLearner)
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
        assert isinstance(loaded.learners, InProcessLearner)
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


def tell_threads(connection):
    connection.send(th.get_num_threads())


def test_workers_have_one_thread():
    worker = Worker(process_context(), tell_threads, (), "counter")
    assert worker.connection.recv() == 1
    worker.close(1)


@pytest.mark.expensive
def test_compiled_in_learners():
    kwargs = {"n_learners": 2, "horizons": (0, 5), "prior_model": LinearEnv().prior_model()}
    assert isinstance(kwargs["prior_model"], LinearModel)
    model = small_model(compile=True, **kwargs).learn(80)
    assert model._n_updates == 40
    assert not model.update.steps.has_failed


class TestCallbacks:
    """What callbacks do to learners that run."""

    def test_another_environment_keeps_learners_and_compilation(self):
        seen = []

        def change(model):
            before = type(model.learners), type(model.update.steps)
            model.set_env(make_vec_env(LinearEnv, 1))
            model._last_obs = model.env.reset()
            seen.append((before, (type(model.learners), type(model.update.steps))))

        model = small_model(n_learners=1)
        model.learn(80, callback=when_learning(change))
        assert seen and all(before == after for before, after in seen)
        assert seen[0][0][0] is multiprocess.MultiprocessLearners
        # The replay buffer has memory of its own again
        assert model.replay_buffer.observations.base is None
        assert isinstance(model.learners, InProcessLearner)

    def test_the_number_of_learners_is_for_the_next_training(self):
        def change(model):
            model.n_learners = 0

        model = small_model(n_learners=1)
        assert model.learn(70, callback=Each(change))._n_updates > 0
        assert model.n_learners == 0

    def test_what_cannot_be_sent_leaves_the_replay_buffer_as_it_was(self):
        model = small_model(n_learners=1)

        def change(model):
            model.rollout_model.lock = threading.Lock()

        with pytest.raises(ValueError, match="cannot be sent to learner processes"):
            model.learn(70, callback=Each(change))
        assert model.replay_buffer.observations.base is None
