"""The benchmark scripts: what they share, and the benchmark of tasks that others wrote."""

import csv
import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from sb3_mpg import MPG

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PROGRAM = """
import csv, sys
from pathlib import Path
import numpy as np
import torch as th
from stable_baselines3 import TD3
from evaluation import EvaluationCallback, evaluate
from machine import ORIGIN, merged_origin
from outside.tasks.pendulum import model_of_readme
from settings import TASKS, make_vec_env
from tables import read_runs, write_csv

folder = Path(sys.argv[1])
task = TASKS["pendulum"]
model = TD3("MlpPolicy", make_vec_env(task, 1), learning_starts=5, policy_kwargs={"net_arch": [8]}, device="cpu")
callback = EvaluationCallback(
    lambda model: evaluate(model, task, 2)[0], "updates", 10, folder / "pendulum-td3-0.csv", first=0, stop_after=20,
    extra_columns=lambda model: {"learning_rate": model.learning_rate},
)
model.learn(100, callback=callback)
assert model._n_updates == 20

rows = list(csv.DictReader((folder / "pendulum-td3-0.csv").open()))
assert [row["updates"] for row in rows] == ["0", "10", "20"]
assert all(row["learning_rate"] == "0.001" and all(row[name] for name in ORIGIN) for row in rows)
# What is known of old rows is kept
write_csv(folder / "old.csv", [{"what": 1, **dict.fromkeys(ORIGIN, "old")}])
assert list(csv.DictReader((folder / "old.csv").open()))[0]["commit"] == "old"

runs = read_runs(folder, "updates", n_parts=2)
assert list(runs) == [("pendulum", "td3")]
run = runs["pendulum", "td3"][0]
assert run.curve[:, 0].tolist() == [0, 10, 20]
assert run.first_above(run.curve[:, 1].min() - 1) == 0 and run.first_above(1.0) is None
other = {**run.origin, "commit": "other"}
assert merged_origin([run.origin, other])["commit"] == run.origin["commit"] + " / other"
assert merged_origin([run.origin, run.origin]) == run.origin

# The model that Pendulum-v1 is trained with is that of the README
next_states = model_of_readme().transition(th.tensor([[1.0, 0.0, 0.0]]), th.tensor([[2.0]]))
assert next_states.shape == (1, 3) and next_states[0, 2] > 0
"""
WALL_CLOCK = """
import contextlib, csv, io, sys
from pathlib import Path
import wall_clock

wall_clock.EVERY, wall_clock.N_STARTS = 20, 2
path = Path(sys.argv[1]) / "pendulum-td3-0.csv"
wall_clock.run_here("pendulum", "td3", 0, 520, path)
rows = list(csv.DictReader(path.open()))
assert [int(row["steps"]) for row in rows] == list(range(20, 521, 20))
seconds, returns = ([float(row[name]) for row in rows] for name in ("seconds", "return_mean"))
assert seconds == sorted(seconds) and 0 < float(rows[0]["first_update_seconds"]) <= seconds[-1]
# The copies are those of their time: nothing is learned before the first update
assert returns[0] == returns[20] != returns[-1]
assert all(row["commit"] for row in rows)
wall_clock.FOLDER = Path(sys.argv[1])
path.rename(path.with_name("pendulum-td3-520-0.csv"))
wall_clock.TASKS["pendulum"].goals = (min(returns) - 1, 1.0)
with contextlib.redirect_stdout(io.StringIO()) as printed:
    wall_clock.report()
cells = [cell.strip() for cell in printed.getvalue().splitlines()[-1].split("|")[1:-1]]
assert cells == ["td3", "1", "20", f"{seconds[0]:g}", "inf", "inf"]
"""
# What a task needs beyond the dependencies of the tests
PACKAGES = {
    "cartpole_swingup": "dm_control",
    "cartpole_swingup_repeat": "dm_control",
    "cstr": "pcgym",
    "four_tank": "pcgym",
    "dc_motor": "gym_electric_motor",
    "parking": "highway_env",
}
OWN_TASKS = ("inverted_pendulum", "inverted_double_pendulum", "reacher", "mountain_car", "pendulum", "pendulum_fast")
# The rewards of four steps are not four times the last
REWARD_TOLERANCE = {"cartpole_swingup_repeat": 0.02}
# A new set point counts one step before it is shown
N_UNKNOWN_REWARDS = {"cstr": 1, "four_tank": 1}


@pytest.mark.parametrize("program", [PROGRAM, WALL_CLOCK], ids=["shared", "wall_clock"])
def test_programs_of_the_benchmarks(program, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=BENCHMARKS, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture
def outside(monkeypatch):
    """Imports a module of the benchmark of tasks that others wrote. Scripts are not part of a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # The tests have a module of this name, too
    hidden = sys.modules.pop("settings", None)
    yield lambda name: importlib.import_module(f"outside.{name}")
    sys.modules.pop("settings", None)
    if hidden is not None:
        sys.modules["settings"] = hidden


@pytest.fixture
def results(outside, monkeypatch, tmp_path):
    """The folder of results, with short runs."""
    run, summary = outside("run"), outside("summary")
    tasks = {name: task._replace(steps=30, every=15) for name, task in run.TASKS.items()}
    for module in (run, summary):
        monkeypatch.setattr(module, "TASKS", tasks)
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "N_EPISODES", 2)
    return tmp_path


def record(env, n_steps):
    """Observations, actions, next observations, rewards and ends of random steps."""
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    rows = []
    for _ in range(n_steps):
        action = env.action_space.sample()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, next_observation, [float(reward)], [terminated]))
        observation = env.reset()[0] if terminated or truncated else next_observation
    return [th.tensor(np.array(column, dtype=np.float64)) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", [*OWN_TASKS, *PACKAGES])
# What other packages warn of is not ours to mend
@pytest.mark.filterwarnings("ignore")
def test_models_of_outside_tasks(outside, monkeypatch, name):
    if name in PACKAGES:
        # Nothing is drawn
        monkeypatch.setenv("MUJOCO_GL", "disable")
        if find_spec(PACKAGES[name]) is None:
            pytest.skip(f"{PACKAGES[name]} is not installed")
    task = outside("tasks").TASKS[name]
    env = task.make_env()
    observations, actions, next_observations, rewards, ends = record(env, 60)
    for model_name, make_model in task.models.items():
        model = make_model().double()
        states, next_states = (model.state_from_observation(each) for each in (observations, next_observations))
        predicted = model.transition(states, actions)
        assert predicted.shape == states.shape and predicted.dtype == states.dtype
        if model_name in ("rough", "idea"):
            known = model.reward(states, actions, next_states)
            is_known = th.isclose(known, rewards, rtol=1e-3, atol=REWARD_TOLERANCE.get(name, 1e-3))
            assert (~is_known).sum() <= N_UNKNOWN_REWARDS.get(name, 0)
            assert th.equal(model.terminal(next_states), ends.bool())
        changes, expected = model.state_difference(predicted, states), model.state_difference(next_states, states)
        if model_name in ("idea", "nothing"):
            assert not changes.any()
        if model_name == "rough":
            # Right signs, wrong numbers
            scale = expected.std(dim=0) + 1e-9
            cosine = th.cosine_similarity((changes / scale).flatten(), (expected / scale).flatten(), dim=0)
            assert 0.3 < cosine < 0.99999, cosine


def test_outside_tasks_are_all_tested(outside):
    assert {*OWN_TASKS, *PACKAGES} == set(outside("tasks").TASKS)


class Counts(gym.Env):
    """Pays 1 for each of a number of steps, or one less where the start is odd."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 5 - seed % 2
        return np.array([self.left], dtype=np.float32), {}

    def step(self, action):
        self.left -= 1
        assert action == self.left + 1, "the action is of another environment"
        return np.array([self.left], dtype=np.float32), 1.0, False, self.left == 0, {}


def test_outside_evaluation_plays_one_episode_per_environment(outside):
    class Echo:
        def predict(self, observations, deterministic):
            assert deterministic
            return observations, None

    returns = outside("run").play(Echo(), [Counts() for _ in range(3)])
    assert returns.tolist() == [5.0, 4.0, 5.0]


@pytest.mark.parametrize("method", ["mpg", "data_driven", "td3", "sac", "sac_tuned", "crossq"])
def test_outside_runs_are_written_once(outside, results, monkeypatch, capsys, method):
    run = outside("run")
    options = ["run.py", "--task", "pendulum", "--method", method, "--model", "idea", "--seed", "3", "--jobs", "0"]
    monkeypatch.setattr(sys, "argv", options)
    run.main()
    model = "idea" if method == "mpg" else "no_model"
    path = results / "outside" / "pendulum" / f"{method}-{model}-30-3.csv"
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["15", "30"]
    for row in rows:
        assert (row["task"], row["method"], row["model"], row["seed"]) == ("pendulum", method, model, "3")
        assert float(row["return_std"]) >= 0 and float(row["cpu_seconds"]) >= 0 and row["commit"]
    # The run is complete
    monkeypatch.setattr(run, "train", lambda cell: pytest.fail(f"{cell} is repeated"))
    run.main()
    assert "0 of 1 runs are missing" in capsys.readouterr().out


def test_outside_runs_that_fail_are_counted(outside, results, monkeypatch):
    run = outside("run")
    cells = [run.Cell("reacher", "td3", "no_model", 30, seed) for seed in range(4)]
    started = []

    def start(cell, core):
        started.append(cell)
        return int(cell.seed == 2)

    monkeypatch.setattr(run, "start", start)
    assert run.start_all(cells, 2) == 1
    assert sorted(started) == cells
    assert cells[0].options() == ["--task", "reacher", "--method", "td3", "--seed", "0", "--steps", "30"]


def test_outside_matrix_has_tuned_methods_where_there_are_some(outside):
    methods, tasks = outside("methods"), outside("tasks").TASKS
    tuned = {
        (method, name)
        for method in methods.METHODS
        if "tuned" in method
        for name, task in tasks.items()
        if methods.has(method, task)
    }
    assert tuned == {(f"{algorithm}_tuned", name) for algorithm in ("td3", "sac") for name in ("pendulum", "mountain_car")}
    model = methods.make("td3_tuned", tasks["mountain_car"], "no_model", 0)
    assert type(model.action_noise).__name__ == "OrnsteinUhlenbeckActionNoise"
    assert model.action_noise._sigma.tolist() == [0.5] and model.actor.net_arch == [400, 300]
    plain = methods.make("td3", tasks["mountain_car"], "no_model", 0)
    assert plain.action_noise._sigma.tolist() == [0.1] and plain.learning_starts == 100
    mpg = methods.make("mpg", tasks["reacher"], "rough", 0)
    default = MPG("MlpPolicy", "Reacher-v5", prior_model=tasks["reacher"].models["rough"]())
    assert (mpg.learning_starts, mpg.gamma, mpg.batch_size) == (default.learning_starts, default.gamma, default.batch_size)


class TestOutsideSummary:
    """Invented curves of four evaluations."""

    @staticmethod
    def runs(outside, *curves):
        """A run for each curve, with evaluations every 10 steps."""
        tables = importlib.import_module("tables")
        origin = dict.fromkeys(importlib.import_module("machine").ORIGIN, "x")
        steps = np.arange(10.0, 50.0, 10.0)
        return {seed: tables.Run(np.stack([steps, curve], axis=1), origin) for seed, curve in enumerate(curves)}

    def test_steps_are_the_median_of_first_evaluations(self, outside):
        summary = outside("summary")
        runs = self.runs(outside, [0, 5, 4, 4], [0, 0, 0, 5], [5, 0, 0, 0])
        assert summary.steps_to(runs, 5.0) == 20
        assert summary.steps_to(runs, 5.1) == np.inf
        # Two of three never
        assert summary.steps_to(self.runs(outside, [0, 5, 4, 4], [0, 0, 0, 0], [0, 0, 0, 0]), 5.0) == np.inf

    def test_best_peer_is_that_of_the_highest_median(self, outside):
        summary = outside("summary")
        runs = {
            ("td3", "no_model"): self.runs(outside, [0, 0, 0, 2], [0, 0, 0, 2], [0, 0, 0, 100]),
            ("sac", "no_model"): self.runs(outside, [9, 9, 9, 3], [9, 9, 9, 3], [9, 9, 9, -50]),
            # Has more, but counts neither when tuned nor as MPG
            ("sac_tuned", "no_model"): self.runs(outside, [0, 0, 0, 50]),
            ("mpg", "rough"): self.runs(outside, [0, 0, 0, 60]),
        }
        assert summary.best_rival(runs) == ("sac", 3.0)
        assert summary.best_rival({}) is None

    def test_noise_is_that_of_the_seeds(self, outside):
        summary = outside("summary")
        # Means 8, 10, 12: a standard error of 2 / sqrt(3)
        noisy, exact = self.runs(outside, [0, 0, 0, 8], [0, 0, 0, 10], [0, 0, 0, 12]), self.runs(
            outside, *[[0, 0, 0, 12.2]] * 3
        )
        assert summary.is_not_below(noisy, exact)
        assert not summary.is_not_below(noisy, self.runs(outside, *[[0, 0, 0, 12.4]] * 3))
        assert summary.is_not_below(self.runs(outside, [0, 0, 0, 13]), exact)

    def test_evaluations_of_the_second_half_count(self, outside):
        summary = outside("summary")
        others = self.runs(outside, [5, 5, 5, 5], [5, 5, 4, 9])
        assert summary.worse_evaluations(self.runs(outside, [0, 0, 3.9, 5], [0, 0, 3.9, 5], [9, 9, 9, 9]), others) == [30]
        assert summary.worse_evaluations(self.runs(outside, [0, 0, 4, 4.9]), others) == [40]

    def test_goals(self, outside, monkeypatch):
        summary = outside("summary")
        task = summary.TASKS["reacher"]._replace(steps=40)
        monkeypatch.setattr(summary, "TASKS", dict.fromkeys(["reacher", "cartpole_swingup"], task))
        peers = {("td3", "no_model"): self.runs(outside, *[[0, 1, 2, 3]] * 3)}
        mpg = {
            ("mpg", "rough"): self.runs(outside, *[[4, 4, 4, 4]] * 3),
            ("mpg", "idea"): self.runs(outside, *[[0, 4, 4, 4]] * 3),
            ("mpg", "nothing"): self.runs(outside, *[[0, 0, 0, 3]] * 3),
        }
        monkeypatch.setattr(summary, "ABSOLUTE_GOALS", (summary.AbsoluteGoal("reacher", "idea", 20, 4.0),))
        rows = summary.check_goals({"reacher": {**peers, **mpg}, "cartpole_swingup": peers})
        assert [(row["outcome"], row["reached"]) for row in rows] == [
            # A task without runs of MPG counts against it
            ("3 of 6", "no"),
            ("2 of 6", "no"),
            ("1 of 2", "no"),
            ("1 of 2", "no"),
            ("4", "yes"),
        ]
        rows = summary.check_goals({"reacher": {**peers, **mpg}})
        assert [row["reached"] for row in rows] == ["yes", "no", "yes", "yes", "yes"]
        row = summary.row_of("reacher", "mpg", "idea", {**peers, **mpg})
        assert (row["final return [range]"], row["best peer"]) == ("4 [4, 4]", "td3 3")
        assert (row["steps to it"], row["share of its steps"], row["not below TD3"]) == ("20", "0.50", "yes")


def test_outside_report(outside, results, monkeypatch, capsys):
    """Draws what there is, and skips runs of another length."""
    pytest.importorskip("matplotlib")
    report, tables = outside("report"), importlib.import_module("tables")
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "FIGURES", results / "figures")
    folder = results / "outside" / "pendulum"
    for length, last in ((30, 2.0), (60, 7.0)):
        for name in ("td3-no_model", "mpg-rough"):
            rows = [{"steps": s, "return_mean": last + s, "cpu_seconds": s} for s in (15, length)]
            tables.write_csv(folder / f"{name}-{length}-0.csv", rows)
    report.main()
    assert "| pendulum | td3 |  | 1 | 32 [32, 32] | td3 32 | 30 | 1.00 |" in capsys.readouterr().out
    assert {path.name for path in (results / "figures").iterdir()} == {"outside_steps.png", "outside_cpu.png"}
    assert (results / "outside.csv").exists() and (results / "outside_goals.csv").exists()
