"""
MPG with nothing set against SB3's TD3 and SAC, RL Zoo's tuned ones, and CrossQ, on tasks that others wrote, with models as a
practitioner writes them: return against environment steps, one csv per run in ``results/outside/TASK``.

    make outside                                                            # the packages of the tasks
    python benchmarks/outside/run.py --jobs 2                               # all missing runs: days
    python benchmarks/outside/run.py --task reacher --method mpg td3 --model rough --seed 0 --steps 3000

A run is a process on one core, with one thread. Its csv is written when it is complete. Runs that are complete are skipped, so
that the command can be interrupted. All methods have one environment and as many environment steps. After every few hundred
steps, 20 episodes with fixed seeds are played without noise. Table and figures: ``python benchmarks/outside/report.py``.
"""

import argparse
import os
import queue
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import gymnasium as gym
import numpy as np
import torch as th
from evaluation import EvaluationCallback
from outside.methods import METHODS, NO_MODEL, PEERS, has, make
from outside.tasks import TASKS
from outside.tasks.base import MODELS
from stable_baselines3.common.base_class import BaseAlgorithm
from tables import RESULTS

# Of the process of a run, unless the user says otherwise: compilers and renderers would start threads and processes
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "MUJOCO_GL": "disable"}
N_EPISODES = 20
START_SEED = 1000
# Methods whose curves do not depend on a prior model
WITHOUT_MODEL = ("data_driven", *PEERS)


class Cell(NamedTuple):
    """
    A run.

    :param task: a key of ``TASKS``
    :param method: one of ``METHODS``
    :param model: a key of the task's models, or ``NO_MODEL``
    :param steps: number of environment steps
    :param seed: seed
    """

    task: str
    method: str
    model: str
    steps: int
    seed: int

    @property
    def path(self) -> Path:
        return RESULTS / "outside" / self.task / f"{self.method}-{self.model}-{self.steps}-{self.seed}.csv"

    def options(self) -> list[str]:
        """
        :return: the options of this script that choose this run only
        """
        model = [] if self.model == NO_MODEL else ["--model", self.model]
        numbers = ["--seed", str(self.seed), "--steps", str(self.steps)]
        return ["--task", self.task, "--method", self.method, *model, *numbers]


def play(model: BaseAlgorithm, envs: Sequence[gym.Env]) -> np.ndarray:
    """
    Play an episode in each environment, always from the same starts. One prediction serves all of them.

    :param model: the algorithm
    :param envs: environments
    :return: returns, ``(n_envs,)``
    """
    observations = np.stack([env.reset(seed=START_SEED + index)[0] for index, env in enumerate(envs)])
    returns = np.zeros(len(envs))
    playing = np.arange(len(envs))
    while len(playing):
        actions, _ = model.predict(observations[playing], deterministic=True)
        is_over = np.zeros(len(playing), dtype=bool)
        for place, (index, action) in enumerate(zip(playing, actions, strict=True)):
            observations[index], reward, terminated, truncated, _ = envs[index].step(action)
            returns[index] += float(reward)
            is_over[place] = terminated or truncated
        playing = playing[~is_over]
    return returns


def weights(model: BaseAlgorithm) -> dict[str, Any]:
    """
    :param model: the algorithm
    :return: of MPG, the weights of its horizons
    """
    values = model.logger.name_to_value
    return {name.split("/")[1]: f"{value:.4g}" for name, value in values.items() if name.startswith("horizons/weight")}


def train(cell: Cell) -> None:
    """
    Train once, in this process, and write the csv.

    :param cell: the run
    """
    task = TASKS[cell.task]
    envs = [task.make_env() for _ in range(N_EPISODES)]
    fixed = {"task": cell.task, "method": cell.method, "model": cell.model, "seed": cell.seed}
    callback = EvaluationCallback(
        lambda model: play(model, envs),
        "steps",
        min(task.every, cell.steps),
        cell.path,
        extra_columns=lambda model: {**fixed, **weights(model)},
    )
    # Nothing is printed, and what is logged stays readable
    make(cell.method, task, cell.model, cell.seed).learn(cell.steps, callback=callback, log_interval=None)


def start(cell: Cell, core: int | None) -> int:
    """
    Train once, in a process of its own.

    :param cell: the run
    :param core: number of the core that the process stays on, or ``None``
    :return: exit code of the process
    """
    print(cell.path.stem, cell.task, "starts", flush=True)
    command = [sys.executable, __file__, *cell.options(), "--jobs", "0"]
    process = subprocess.Popen(command, env={**ENVIRONMENT, **os.environ})
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    return process.wait()


def start_all(cells: Sequence[Cell], n_jobs: int) -> int:
    """
    :param cells: the runs
    :param n_jobs: number of processes at a time, each on a core of its own where the system can do so
    :return: number of runs that failed
    """
    all_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores: queue.Queue[int | None] = queue.Queue()
    for job in range(n_jobs):
        cores.put(all_cores[job % len(all_cores)] if all_cores else None)

    def start_on_free_core(cell: Cell) -> int:
        core = cores.get()
        try:
            return start(cell, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(n_jobs) as pool:
        failed = [cell for cell, code in zip(cells, pool.map(start_on_free_core, cells), strict=True) if code != 0]
    for cell in failed:
        print(f"{cell.task}: {cell.path.stem} failed", flush=True)
    return len(failed)


def matrix(args: argparse.Namespace) -> list[Cell]:
    """
    :param args: options of this script
    :return: the chosen runs; a seed of all tasks comes before the next seed
    """
    cells = []
    for seed in args.seed:
        for name in args.task:
            task = TASKS[name]
            models = [model for model in args.model if model in task.models]
            for method in args.method:
                if has(method, task):
                    for model in [NO_MODEL] if method in WITHOUT_MODEL else models:
                        cells.append(Cell(name, method, model, args.steps or task.steps, seed))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--method", nargs="*", choices=METHODS, default=["mpg", *PEERS])
    all_models = list(dict.fromkeys(name for task in TASKS.values() for name in task.models))
    parser.add_argument("--model", nargs="*", choices=all_models, default=list(MODELS))
    parser.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="number of environment steps; by default those of each task")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; 0 trains in this process")
    args = parser.parse_args()
    missing = [cell for cell in matrix(args) if not cell.path.exists()]
    print(f"{len(missing)} of {len(matrix(args))} runs are missing", flush=True)
    if args.jobs > 0:
        sys.exit(1 if start_all(missing, args.jobs) else 0)
    th.set_num_threads(1)
    # What packages of tasks say about their own code
    warnings.filterwarnings("ignore", module="gymnasium|casadi|gym_electric_motor|highway_env")
    for cell in missing:
        train(cell)


if __name__ == "__main__":
    main()
