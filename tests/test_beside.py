"""Compiling beside the training: another process compiles, and this one finds the result."""

import copy
import os
import threading
import time
from pathlib import Path
from typing import ClassVar

import cloudpickle
import pytest
import torch as th
from helpers import assert_same_parameters
from lq import LinearEnv
from settings import SMALL
from torch._dynamo.utils import counters

from sb3_mpg import MPG
from sb3_mpg.common.compilation import step_compiler
from sb3_mpg.common.compilation.beside import CompilerProcess, portable, serve
from sb3_mpg.common.compilation.step_compiler import AT_ONCE, StepCompiler
from sb3_mpg.common.models.trainable import members_of
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.rollouts.steps import EagerSteps, HeldState, RolloutContext

pytestmark = pytest.mark.usefixtures("models_are_fitted_once")


class Recorder:
    """In place of the other process: it does nothing, and writes down what it is asked for."""

    made: ClassVar[list["Recorder"]] = []

    def __init__(self):
        self.requests, self.waits, self.is_closed = [], [], False
        self.made.append(self)

    def request(self, steps, method, args, rank):
        assert isinstance(steps, StepCompiler) and steps.after_update == AT_ONCE
        self.requests.append(method)
        return Path(method)

    def wait(self, done):
        self.waits.append(done.name)

    def close(self):
        self.is_closed = True


TAKEN = []


class Named:
    """In place of steps; this process is served by itself."""

    def __init__(self, name):
        self.name = name

    def call(self):
        TAKEN.append(self.name)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(step_compiler, "CompilerProcess", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder


@pytest.fixture
def early(monkeypatch):
    """Every training is long enough to compile, by a backend that takes no time, after ten updates."""
    monkeypatch.setattr(step_compiler, "COMPILE_FROM_MODEL_STEPS", 0)
    monkeypatch.setattr(step_compiler, "N_EAGER_UPDATES", {"follow": 5, "advance": 10, "hold": 12})
    made = []

    class Quick(StepCompiler):
        def __init__(self, backend="eager", n_rows=None, after_update=AT_ONCE, asks=True):
            super().__init__("eager", n_rows, after_update, asks)
            made.append(self)

    monkeypatch.setattr(step_compiler, "StepCompiler", Quick)
    return made


def lq_model():
    return MPG("MlpPolicy", LinearEnv(), compile=False, horizons=(0, 3), **SMALL).learn(44)


def returns(model, steps, observations):
    context = model.update.context(model.units(), model.gamma)._replace(steps=steps)
    with members_of(model.rollout_model, "dealt"):
        return model_rollout(observations, context, [3])[3]


def test_what_another_process_compiled_is_found_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = lq_model()
    observations = th.as_tensor(model.replay_buffer.observations[:8, 0])
    expected = returns(model, EagerSteps(), observations)
    compiler = StepCompiler(n_rows=8, after_update=0)
    # Eager until then, whatever the other process has done
    assert not compiler.is_compiled
    for n_updates in (1, 100):
        compiler.begin_update(n_updates)
        assert th.equal(returns(model, compiler, observations), expected)
    counters.clear()
    compiler.begin_update(101)
    compiled = returns(model, compiler, observations)
    th.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    assert compiler.is_compiled and compiler._step_loop.graphs[0].loops
    # Both directions
    assert counters["inductor"]["fxgraph_cache_hit"] == 2 and counters["inductor"]["fxgraph_cache_miss"] == 0
    process, folder = compiler._beside._process, compiler._beside._folder
    assert process.poll() is None and folder.exists()
    compiler.close()
    assert process.poll() is not None and not folder.exists()
    # Without the other process all goes on
    assert th.equal(returns(model, compiler, observations), compiled)


def test_requests_that_fail_are_done(tmp_path):
    helper = CompilerProcess()
    start = time.monotonic()
    done = helper.request(StepCompiler(), "no_such_method", (), 0)
    helper.wait(done)
    assert done.exists() and time.monotonic() - start < 60
    # Nobody waits for a process that has ended
    helper._process.kill()
    helper.wait(tmp_path / "never")
    helper.close()


def test_requests_are_taken_by_their_rank(tmp_path):
    TAKEN.clear()
    for rank in (2, 0, 1):
        request = Named(rank), "call", (), (True, th.get_num_threads(), "none")
        (tmp_path / f"{rank}.request").write_bytes(cloudpickle.dumps(request))
    thread = threading.Thread(target=serve, args=(tmp_path, os.getppid()), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while len(list(tmp_path.glob("*.done"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    for path in tmp_path.iterdir():
        path.unlink()
    tmp_path.rmdir()
    thread.join(10)
    assert TAKEN == [0, 1, 2] and not thread.is_alive()


def test_the_process_ends_with_its_owner():
    helper = CompilerProcess()
    process, folder = helper._process, helper._folder
    del helper
    assert process.poll() is not None and not folder.exists()


def test_the_process_ends_with_its_parent_and_its_folder(tmp_path):
    ended = []

    def run(folder, parent):
        serve(folder, parent)
        ended.append(True)

    for folder, parent in ((tmp_path, os.getppid() + 1), (tmp_path / "missing", os.getppid())):
        threading.Thread(target=run, args=(folder, parent), daemon=True).start()
    deadline = time.monotonic() + 10
    while len(ended) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == [True, True]


def test_arguments_become_leaves_without_the_critic():
    weight = th.ones(2, requires_grad=True)
    module = th.nn.Linear(2, 2)
    context = RolloutContext(module, lambda *args: None, module, None, 0.9, EagerSteps())
    sent = portable((HeldState(2 * weight, th.ones(1)), 3, {"w": 3 * weight}, context))
    assert sent[0].states.requires_grad and sent[0].states.is_leaf and not sent[0].n_left.requires_grad
    assert th.equal(sent[0].states, 2 * weight) and sent[1] == 3
    assert sent[2]["w"].is_leaf and th.equal(sent[2]["w"], 3 * weight)
    assert isinstance(sent[3], RolloutContext) and sent[3].q_function is None and sent[3].steps is None
    assert sent[3].actor is module and sent[3].gamma == 0.9
    # Strides are part of what is compiled
    columns = th.ones(3, 2).t()
    assert portable((columns,))[0].stride() == columns.stride()


def test_each_kind_of_steps_is_asked_for_once(recorder):
    model = lq_model()
    observations = th.as_tensor(model.replay_buffer.observations[:8, 0])
    compiler = StepCompiler("eager", after_update=-98)
    for n_updates in range(1, 6):
        compiler.begin_update(n_updates)
        returns(model, compiler, observations)
    (helper,) = recorder.made
    assert helper.requests == ["advance"] and helper.waits == ["advance"]
    assert compiler._step_loop is not None
    compiler.close()
    assert helper.is_closed and compiler._beside is None


def test_the_process_ends_when_nothing_is_left_to_compile(recorder):
    compiler = StepCompiler("eager", after_update=-199)
    for method in ("follow", "hold"):
        compiler._compile_beside(method, ())
    (helper,) = recorder.made
    compiler.begin_update(1)
    compiler._wait_for("follow")
    assert helper.waits == ["follow"] and not helper.is_closed
    compiler.begin_update(2)
    compiler._wait_for("hold")
    assert helper.waits == ["follow", "hold"] and helper.is_closed and compiler._beside is None


@pytest.mark.parametrize("lacks", ["pickle", "interpreter"])
def test_what_cannot_be_sent_is_compiled_here(lacks, monkeypatch):
    model = lq_model()
    if lacks == "pickle":
        model.rollout_model.lock = threading.Lock()
    else:
        monkeypatch.setattr("sys.executable", "/nonexistent")
    observations = th.as_tensor(model.replay_buffer.observations[:8, 0])
    compiler = StepCompiler("eager", after_update=-99)
    returns(model, compiler, observations)
    compiler.begin_update(2)
    returns(model, compiler, observations)
    assert compiler._step_loop is not None and not compiler.has_failed
    compiler.close()


def test_training_changes_over_at_a_fixed_update(recorder, early):
    def train():
        return MPG("MlpPolicy", LinearEnv(), horizons=(0, 3), **SMALL).learn(60)

    model = train()
    (compiler,) = (steps for steps in early if steps.after_update == 0)
    assert compiler.is_compiled and compiler._step_loop is not None and compiler._plan_loop is not None
    (helper,) = recorder.made
    # Plans may come first
    assert sorted(helper.requests) == ["advance", "follow", "hold"] == sorted(helper.waits)
    assert helper.is_closed
    assert_same_parameters(train(), model)


def test_a_continued_training_stays_compiled(recorder, early, tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 3), **SMALL).learn(60)
    model.save(tmp_path / "model.zip")
    recorder.made.clear()
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv())
    loaded.replay_buffer = model.replay_buffer
    loaded.learn(5, reset_num_timesteps=False)
    assert loaded.update.steps.after_update == 0 and loaded.update.steps.is_compiled and not recorder.made
    loaded.learn(60)
    assert loaded.update.steps.after_update == 25


def test_copies_change_over_at_the_same_update_and_ask_nobody(recorder):
    """Those of learners, and of an update that is renewed."""
    compiler = copy.copy(StepCompiler("eager", n_rows=8, after_update=-99))
    assert (compiler.backend, compiler.n_rows, compiler.after_update) == ("eager", 8, -99)
    model = lq_model()
    observations = th.as_tensor(model.replay_buffer.observations[:8, 0])
    for n_updates in (1, 2):
        compiler.begin_update(n_updates)
        returns(model, compiler, observations)
    assert compiler._step_loop is not None and not recorder.made
