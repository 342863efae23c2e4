"""What the benchmark scripts share. They run in a process of their own, because their modules are not part of a package."""

import subprocess
import sys
from pathlib import Path

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


def test_shared_parts_of_the_benchmarks(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=BENCHMARKS, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
