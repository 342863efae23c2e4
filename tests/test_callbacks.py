"""Evaluation in another process: the results of SB3's callback, later."""

import gc
import json
import multiprocessing as mp
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from goals import GoalEnv
from helpers import assert_same_parameters
from lq import LinearEnv
from settings import SMALL
from stable_baselines3 import PPO, TD3
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize, VecVideoRecorder

from sb3_mpg import MPG, AsyncEvalCallback
from sb3_mpg.common import callbacks
from sb3_mpg.common.processes import SharedBytes

FAST = {
    **SMALL,
    "policy_kwargs": {"net_arch": [8]},
    "learning_starts": 20,
    "batch_size": 16,
    "residual": False,
    "weighting": "constant",
    "horizons": (0, 1),
}


def timed_env(noise=0.1, cls=LinearEnv):
    return gym.wrappers.TimeLimit(cls(noise=noise), 10)


def eval_env(normalized=False, **kwargs):
    env = make_vec_env(lambda: timed_env(**kwargs), 1, seed=3)
    return VecNormalize(env, training=False, norm_reward=False) if normalized else env


def small_model(env=None, **kwargs):
    return MPG("MlpPolicy", timed_env() if env is None else env, **{**FAST, **kwargs})


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not [process for process in mp.active_children() if process.name == "evaluator"]


class Succeeds(LinearEnv):
    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {**info, "is_success": bool(abs(self.state[0]) < 0.5)}


class Dies(LinearEnv):
    """The process that steps it is killed, once."""

    flag: Path

    def step(self, action):
        if mp.current_process().name == "evaluator" and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Wrong(LinearEnv):
    def step(self, action):
        if mp.current_process().name == "evaluator":
            raise ZeroDivisionError("in the evaluator")
        return super().step(action)


class Fail(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == 35:
            raise ZeroDivisionError
        return True


@pytest.mark.parametrize("normalized", [False, True])
def test_same_results_as_eval_callback(normalized, tmp_path):
    for cls in (EvalCallback, AsyncEvalCallback):
        env = make_vec_env(lambda: timed_env(cls=Succeeds), 1, seed=0)
        model = small_model(VecNormalize(env) if normalized else env)
        folder = str(tmp_path / cls.__name__)
        callback = cls(
            eval_env(normalized, cls=Succeeds),
            eval_freq=20,
            n_eval_episodes=2,
            log_path=folder,
            best_model_save_path=folder,
            verbose=0,
        )
        model.learn(100, callback=callback)
    first, second = (np.load(tmp_path / cls.__name__ / "evaluations.npz") for cls in (EvalCallback, AsyncEvalCallback))
    assert sorted(first.files) == sorted(second.files) == ["ep_lengths", "results", "successes", "timesteps"]
    for name in first.files:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert first["timesteps"].tolist() == [20, 40, 60, 80, 100]
    best = [MPG.load(tmp_path / cls.__name__ / "best_model.zip") for cls in (EvalCallback, AsyncEvalCallback)]
    assert best[0].num_timesteps == best[1].num_timesteps
    assert_same_parameters(*best)


def test_log_is_of_the_step_of_the_snapshot(tmp_path, capsys):
    model = small_model()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(75, callback=AsyncEvalCallback(eval_env(), eval_freq=25, n_eval_episodes=1), log_interval=1)
    model.logger.close()
    table = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True)
    evaluated = np.isfinite(table["evalmean_reward"])
    assert table["timetotal_timesteps"][evaluated].tolist() == [25, 50, 75]
    # What training says belongs to other steps
    assert np.isnan(table["traincritic_loss"][evaluated]).all()
    assert np.isfinite(table["traincritic_loss"][~evaluated]).any()
    output = capsys.readouterr().out
    assert "Eval num_timesteps=25, episode_reward=" in output
    assert "New best mean reward!" in output


@pytest.mark.parametrize("together", [list, CallbackList])
def test_an_exception_leaves_no_process(together):
    callback = AsyncEvalCallback(eval_env(), eval_freq=10, verbose=0)
    with pytest.raises(ZeroDivisionError):
        small_model().learn(100, callback=together([callback, Fail()]))


@pytest.mark.parametrize("algorithm", [TD3, PPO])
def test_with_algorithms_of_sb3(algorithm, tmp_path):
    kwargs = {"n_steps": 32, "batch_size": 32} if algorithm is PPO else {"learning_starts": 20}
    model = algorithm("MlpPolicy", timed_env(), policy_kwargs={"net_arch": [8]}, **kwargs)
    callback = AsyncEvalCallback(eval_env(), eval_freq=30, n_eval_episodes=1, best_model_save_path=str(tmp_path), verbose=0)
    model.learn(64, callback=callback)
    assert callback.best_mean_reward > -np.inf
    algorithm.load(tmp_path / "best_model.zip")


def test_an_exception_in_an_algorithm_of_sb3():
    """It does not tell its callbacks: the evaluator goes when its callback does."""
    model = TD3("MlpPolicy", timed_env(), policy_kwargs={"net_arch": [8]}, learning_starts=20)
    with pytest.raises(ZeroDivisionError):
        model.learn(100, callback=[AsyncEvalCallback(eval_env(), eval_freq=10, verbose=0), Fail()])
    del model
    gc.collect()


def test_without_guard_there_is_one_sentence(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
from lq import LinearEnv
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from sb3_mpg import AsyncEvalCallback
callback = AsyncEvalCallback(make_vec_env(LinearEnv, 1), eval_freq=10, verbose=0)
TD3("MlpPolicy", LinearEnv(), policy_kwargs={"net_arch": [8]}, learning_starts=20).learn(1_000_000, callback=callback)
""")
    root = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "put what trains under `if __name__ == '__main__':`" in result.stderr.strip().splitlines()[-1]


def test_callbacks_on_results():
    stop = StopTrainingOnRewardThreshold(reward_threshold=-1e9)
    callback = AsyncEvalCallback(eval_env(), callback_on_new_best=stop, eval_freq=5, n_eval_episodes=1, verbose=0)
    model = small_model(learning_starts=50).learn(1_000_000, callback=callback)
    assert model.num_timesteps < 1_000_000
    after = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1)
    callback = AsyncEvalCallback(eval_env(), callback_after_eval=after, eval_freq=5, n_eval_episodes=1, verbose=0)
    model = small_model(learning_starts=2_000_000).learn(1_000_000, callback=callback)
    assert model.num_timesteps < 1_000_000


def test_the_evaluator_gets_no_optimizers(monkeypatch):
    """Their tensors stay where they are when a policy is moved."""
    payloads = []
    monkeypatch.setattr(callbacks, "SharedBytes", lambda payload: payloads.append(payload) or SharedBytes(payload))
    model = small_model().learn(60, callback=AsyncEvalCallback(eval_env(), eval_freq=30, verbose=0))
    ((policy, *_),) = (pickle.loads(payload) for payload in payloads)
    assert policy.actor.optimizer is policy.critic.optimizer is None
    assert model.actor.optimizer is not None


def test_a_dead_evaluator_is_replaced(tmp_path):
    env = make_vec_env(lambda: timed_env(cls=Dies), 1)
    env.envs[0].unwrapped.flag = tmp_path / "flag"
    callback = AsyncEvalCallback(env, eval_freq=20, n_eval_episodes=1, log_path=str(tmp_path), verbose=0)
    with pytest.warns(UserWarning, match=r"died with exit code -9.*evaluation of step 20 is missing"):
        small_model().learn(60, callback=callback)
    assert callback.evaluations_timesteps == [40, 60]


def test_an_exception_of_the_environment():
    callback = AsyncEvalCallback(eval_env(cls=Wrong), eval_freq=20, verbose=0)
    with pytest.raises(ZeroDivisionError, match="in the evaluator") as error:
        small_model().learn(60, callback=callback)
    assert "in another process" in str(error.value.__cause__)


def test_with_learners(tmp_path):
    callback = AsyncEvalCallback(eval_env(), eval_freq=20, n_eval_episodes=1, log_path=str(tmp_path), verbose=0)
    model = small_model(n_learners=1).learn(60, callback=callback)
    assert model._n_updates == 40
    assert callback.evaluations_timesteps == [20, 40, 60]


def test_environments_that_cannot_be_sent(tmp_path):
    env = SubprocVecEnv([LinearEnv])
    with pytest.raises(ValueError, match="cannot be a SubprocVecEnv"):
        AsyncEvalCallback(VecMonitor(env))
    env.close()
    env = timed_env()
    for handle in ((number for number in range(3)), threading.Lock(), open(tmp_path / "log.txt", "w")):
        env.handle = handle
        with pytest.raises(ValueError, match="cannot be sent to the evaluator"):
            model = small_model()
            model.learn(30, callback=AsyncEvalCallback(DummyVecEnv([lambda: env]), eval_freq=1000, verbose=0))
        assert model.num_timesteps == 0
    handle.close()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (GoalEnv("flat"), r"observation_space of the evaluation has the shape \(4,\), that of the algorithm \{"),
        (GoalEnv("tuple"), r"observation_space of the evaluation has the shape \{'0': \(1,\)"),
        (GoalEnv("goal", gym.spaces.Box(-1, 1, (1, 1))), r"action_space of the evaluation has the shape \(1, 1\)"),
    ],
    ids=["Box", "Tuple", "actions"],
)
def test_environments_of_other_spaces(env, message):
    model = MPG("MultiInputPolicy", GoalEnv(), **FAST)
    with pytest.raises(ValueError, match=message):
        model.learn(30, callback=AsyncEvalCallback(env, eval_freq=1000, verbose=0))
    assert model.num_timesteps == 0


@pytest.mark.filterwarnings("error:Training and eval env are not of the same type")
def test_tuples_of_observations():
    callback = AsyncEvalCallback(Monitor(GoalEnv("tuple")), eval_freq=20, n_eval_episodes=1, verbose=0)
    MPG("MultiInputPolicy", GoalEnv("tuple"), **FAST).learn(30, callback=callback)
    assert -60 < callback.best_mean_reward < 0


def monitored(kind, path):
    """An environment for evaluations that writes a csv file, in each of the ways of SB3."""
    if kind == "Monitor":
        return Monitor(timed_env(cls=Succeeds), str(path / "log"), info_keywords=("is_success",))
    if kind == "monitor_dir":
        return make_vec_env(timed_env, 2, seed=3, monitor_dir=str(path))
    return VecMonitor(DummyVecEnv([timed_env] * 2), str(path / "log"))


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
@pytest.mark.parametrize("kind", ["Monitor", "monitor_dir", "VecMonitor"])
def test_files_of_monitors_are_those_of_eval_callback(kind, tmp_path):
    written = []
    for cls in (EvalCallback, AsyncEvalCallback):
        path = tmp_path / cls.__name__
        path.mkdir()
        env = monitored(kind, path)
        env.reset(seed=3) if kind == "Monitor" else env.seed(3)
        small_model().learn(60, callback=cls(env, eval_freq=20, n_eval_episodes=3, verbose=0))
        env.close()
        written.append(
            {file.name: [without_time(line) for line in file.read_text().splitlines()] for file in path.glob("*.csv")}
        )
    assert written[0] == written[1]
    assert len(written[0]) == (2 if kind == "monitor_dir" else 1)
    # The header, the names of the columns, and episodes of all evaluations
    assert all(len(lines) >= 2 + 3 for lines in written[0].values())


def without_time(line):
    """A line of a file of ``Monitor`` without what the clock says."""
    if line.startswith("#"):
        return sorted(json.loads(line[1:]))
    reward, length, _, *rest = line.split(",")
    return [reward, length, *rest]


class Drawn(LinearEnv):
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    render_mode = "rgb_array"

    def render(self):
        return np.zeros((16, 16, 3), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
@pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped with a ``Monitor``")
@pytest.mark.parametrize("kind", ["RecordVideo", "VecVideoRecorder"])
def test_videos_are_those_of_eval_callback(kind, tmp_path):
    """The last one is not complete when training ends."""
    pytest.importorskip("moviepy")
    recorded = []
    for cls in (EvalCallback, AsyncEvalCallback):
        folder = tmp_path / cls.__name__
        env = timed_env(cls=Drawn)
        if kind == "RecordVideo":
            recorder = gym.wrappers.RecordVideo(env, str(folder), episode_trigger=lambda episode: episode != 1)
            env = DummyVecEnv([lambda recorder=recorder: recorder])
        else:
            env = VecMonitor(DummyVecEnv([lambda env=env: env]))
            env = VecVideoRecorder(env, str(folder), lambda step: step in (0, 15), video_length=8)
        small_model().learn(20, callback=cls(env, eval_freq=10, n_eval_episodes=1, verbose=0))
        env.close()
        recorded.append(sorted(path.name for path in folder.glob("*.mp4")))
    assert recorded[0] == recorded[1]
    assert len(recorded[0]) == (3 if kind == "RecordVideo" else 2)


def test_wrappers_survive():
    env, training = (VecMonitor(VecNormalize(DummyVecEnv([timed_env] * 2))) for _ in range(2))
    callback = AsyncEvalCallback(env, eval_freq=10, n_eval_episodes=2, verbose=0)
    small_model(training).learn(60, callback=callback)
    assert np.isfinite(callback.last_mean_reward)
