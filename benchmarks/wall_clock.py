"""
Wall-clock: how long it takes from the call of ``learn`` to a goal, with all that is compiled on the way.

    python benchmarks/wall_clock.py                                   # all missing runs, one after the other: hours
    python benchmarks/wall_clock.py --task pendulum --method mpg td3 --seed 0
    python benchmarks/wall_clock.py --report                          # tables of the runs that are complete

Each run is a process of its own with one thread and an empty cache of compiled code; nothing else may run. The policy is
copied every 50 steps, and the copies are evaluated after the training, so that evaluations cost no time and give none to a
compiler that works beside. ``--earlier FOLDER`` is a checkout of the commit that the method ``earlier`` runs. The methods of
SBX need ``pip install sbx-rl``; what is not installed is skipped.
"""

import argparse
import copy
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch as th
from evaluation import cpu_seconds, evaluate
from machine import git_commit
from stable_baselines3.common.callbacks import BaseCallback
from tables import RESULTS, print_table, read_runs, write_csv

import sb3_mpg
import sb3_mpg_envs  # noqa: F401

FOLDER = RESULTS / "wall_clock"
TASKS = {
    "path_tracking": SimpleNamespace(env_id="PathTracking-v0", steps=200, goals=(-10.0, -5.0)),
    "pendulum": SimpleNamespace(env_id="InvertedPendulumConti-v0", steps=100, goals=(-0.1, -0.01)),
}
# Methods and their numbers of steps: twice as many as they need
METHODS = {
    "mpg": 2500,
    "earlier": 2500,
    "td3": 15_000,
    "sac": 15_000,
    "sbx_td3": 15_000,
    "sbx_sac": 15_000,
    "sbx_crossq": 15_000,
}
# That learning rates fall to their ends after so many steps is the same for all
TOTAL_STEPS = 20_000
EVERY = 50
N_STARTS = 50


def make(method: str, task_name: str, seed: int) -> Any:
    """
    :param method: a key of ``METHODS``
    :param task_name: a key of ``TASKS``
    :param seed: seed
    :return: the algorithm with the defaults of its library; SB3's TD3 and SAC have the settings of ``trust.py``, without which
        they learn neither task
    """
    env_id = TASKS[task_name].env_id
    if method in ("mpg", "earlier"):
        from sb3_mpg import MPG

        return MPG("MlpPolicy", env_id, seed=seed, device="cpu")
    if method.startswith("sbx"):
        import sbx

        return getattr(sbx, {"td3": "TD3", "sac": "SAC", "crossq": "CrossQ"}[method[4:]])("MlpPolicy", env_id, seed=seed)
    from trust import make as make_peer

    return make_peer(method, task_name, None, seed)


def parameters(model: Any) -> Any:
    """
    :param model: an algorithm
    :return: a copy of what its policy acts by; SBX replaces its states and does not change them
    """
    if hasattr(model.policy, "state_dict"):
        return copy.deepcopy(model.policy.state_dict())
    return model.policy.actor_state


class Copies(BaseCallback):
    """
    Copies the policy, and notes the times.

    :param steps: number of environment steps after which training stops
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.rows: list[dict[str, Any]] = []
        self.copies: list[Any] = []
        self.first_update = float("nan")
        self.paused = self.paused_cpu = 0.0

    def _on_training_start(self) -> None:
        self.start, self.start_cpu = time.perf_counter(), cpu_seconds()

    def _on_step(self) -> bool:
        now, cpu = time.perf_counter(), cpu_seconds()
        seconds, used = now - self.start - self.paused, cpu - self.start_cpu - self.paused_cpu
        if np.isnan(self.first_update) and self.model._n_updates > 0:
            self.first_update = seconds
        if self.num_timesteps % EVERY == 0:
            self.copies.append(parameters(self.model))
            counts = {"steps": self.num_timesteps, "updates": self.model._n_updates}
            self.rows.append({**counts, "seconds": f"{seconds:.2f}", "cpu_seconds": f"{used:.2f}"})
            self.paused += time.perf_counter() - now
            self.paused_cpu += cpu_seconds() - cpu
        return self.num_timesteps < self.steps


def run_here(task_name: str, method: str, seed: int, steps: int, path: Path) -> None:
    """
    Train, evaluate all copies of the policy, and write the csv.

    :param task_name: a key of ``TASKS``
    :param method: a key of ``METHODS``
    :param seed: seed of the run
    :param steps: number of environment steps
    :param path: path of the csv
    """
    th.set_num_threads(1)
    task = TASKS[task_name]
    start = time.perf_counter()
    model = make(method, task_name, seed)
    constructed = time.perf_counter() - start

    callback = Copies(steps)
    model.learn(TOTAL_STEPS, callback=callback)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for row, state in zip(callback.rows, callback.copies, strict=True):
        if hasattr(model.policy, "state_dict"):
            model.policy.load_state_dict(state)
        else:
            model.policy.actor_state = state
        row |= {"return_mean": f"{evaluate(model, task, N_STARTS)[0].mean():.5g}"}
        row |= {
            "construct_seconds": f"{constructed:.3f}",
            "first_update_seconds": f"{callback.first_update:.2f}",
            "peak_mib": f"{peak:.0f}",
            # Of the code that ran, which may be that of an earlier commit
            "commit": git_commit(Path(sb3_mpg.__file__).parent),
        }
    write_csv(path, callback.rows)


def run(task: str, method: str, seed: int, earlier: Path | None) -> None:
    """
    Run a process that trains once and writes the csv.

    :param task: a key of ``TASKS``
    :param method: a key of ``METHODS``
    :param seed: seed of the run
    :param earlier: checkout of an earlier commit
    """
    path = FOLDER / f"{task}-{method}-{METHODS[method]}-{seed}.csv"
    if path.exists():
        print(f"{path.name} exists, skipped")
        return
    if method == "earlier" and earlier is None:
        print(f"{path.name} needs --earlier, skipped")
        return
    if method.startswith("sbx") and find_spec("sbx") is None:
        print(f"{path.name} needs sbx-rl, skipped")
        return
    root = Path(__file__).parent.parent if method != "earlier" else earlier
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": str(root)}
        command = [sys.executable, __file__, "--here", task, method, str(seed), str(path)]
        subprocess.run(command, env=environment, check=True)
    print(f"{path.name} is complete", flush=True)


def report() -> None:
    """Print tables of all complete runs: medians over seeds, infinity for a goal that was not reached."""
    runs = {what: read_runs(FOLDER, what, 3) for what in ("steps", "seconds")}
    for task, settings in TASKS.items():
        rows = []
        for cell, by_seed in sorted(runs["steps"].items()):
            if cell[0] != task:
                continue
            row: dict[str, Any] = {"method": cell[1], "seeds": len(by_seed)}
            for goal in settings.goals:
                for what in runs:
                    reached = [run.first_above(goal) for run in runs[what][cell].values()]
                    row[f"{what} to {goal:g}"] = f"{np.median([np.inf if value is None else value for value in reached]):g}"
            rows.append(row)
        if rows:
            print(f"\n{task}\n")
            print_table(rows)


def main() -> None:
    if "--here" in sys.argv:
        task, method, seed, path = sys.argv[2:]
        run_here(task, method, int(seed), METHODS[method], Path(path))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--method", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--earlier", type=Path, help="checkout of an earlier commit")
    parser.add_argument("--report", action="store_true", help="print the tables of the runs that are complete")
    args = parser.parse_args()
    if args.report:
        report()
        return
    for seed in args.seed:
        for task in args.task:
            for method in args.method:
                run(task, method, seed, args.earlier)


if __name__ == "__main__":
    main()
