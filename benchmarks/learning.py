"""
Learning curves with the papers' settings: return against updates, a csv for each run.

    python benchmarks/learning.py                                              # everything that is missing, for hours
    python benchmarks/learning.py --task pendulum --algorithm mpg_v2 --seed 0

Runs that are complete are skipped. Tables and figures: ``python benchmarks/learning_report.py``.
"""

import argparse
import time
from pathlib import Path

import torch as th
from settings import ALGORITHMS, ENV_SETTINGS, TASKS, Task, evaluate, make_model, make_vec_env
from stable_baselines3.common.callbacks import BaseCallback
from tables import write_csv

RESULTS = Path(__file__).parent / "results" / "learning"
# The papers' runs are 100,000 updates long, over which the learning rates decay
PAPER_UPDATES = 100_000

# What is run by default, and for how many updates
MATRIX = {
    ("path_tracking", "mpg_v2"): 31_000,
    ("path_tracking", "mpg_v1_exploring_starts"): 18_000,
    ("path_tracking", "mpg_v1"): 18_000,
    ("path_tracking", "n_step_adp"): 6_000,
    ("pendulum", "mpg_v2"): 15_000,
}


class EvaluationCallback(BaseCallback):
    """
    Evaluate every so many *updates* (the papers' x axis) and stop after the last of them.

    :param task: the task
    :param updates: number of updates to stop after
    :param every: number of updates between evaluations
    :param path: csv file to write
    """

    def __init__(self, task: Task, updates: int, every: int, path: Path):
        super().__init__()
        self.task, self.updates, self.every, self.path = task, updates, every, path
        self.rows: list[dict[str, float]] = []
        self.last_evaluation = -1
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        n_updates = self.model._n_updates
        if n_updates % self.every == 0 and n_updates != self.last_evaluation:
            self.last_evaluation = n_updates
            returns, _ = evaluate(self.model, self.task)
            values = self.model.logger.name_to_value
            self.rows.append(
                {
                    "updates": n_updates,
                    "steps": self.num_timesteps,
                    "return_mean": round(float(returns.mean()), 4),
                    "return_std": round(float(returns.std()), 4),
                    "return_min": round(float(returns.min()), 4),
                    "critic_loss": float(f"{values.get('train/critic_loss', float('nan')):.4g}"),
                    "actor_loss": float(f"{values.get('train/actor_loss', float('nan')):.4g}"),
                    "skipped": self.model.n_skipped_updates,  # type: ignore[attr-defined]
                    "seconds": round(time.perf_counter() - self.start, 1),
                }
            )
            print(self.path.stem, self.rows[-1], flush=True)
        return n_updates < self.updates

    def _on_training_end(self) -> None:
        write_csv(self.path, self.rows)


def run(task_name: str, algorithm: str, seed: int, updates: int, n_envs: int, every: int) -> None:
    """
    Train once and write the csv.

    :param task_name: a key of ``TASKS``
    :param algorithm: a key of ``ALGORITHMS``
    :param seed: seed of the run
    :param updates: number of updates
    :param n_envs: number of agents; each gives one transition an update
    :param every: number of updates between evaluations
    """
    path = RESULTS / f"{task_name}-{algorithm}-{n_envs}envs-{seed}.csv"
    if path.exists():
        print(f"{path.name} is there, skipped")
        return
    task = TASKS[task_name]
    env = make_vec_env(task, n_envs, **ENV_SETTINGS.get(algorithm, {}))
    model = make_model(algorithm, task, env, seed)
    model.learn(PAPER_UPDATES * n_envs, callback=EvaluationCallback(task, updates, every, path), log_interval=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--algorithm", choices=ALGORITHMS)
    parser.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, help="number of updates; by default those of the table in this file")
    parser.add_argument("--n-envs", type=int, default=64)
    parser.add_argument("--every", type=int, default=500, help="updates between evaluations")
    args = parser.parse_args()
    th.set_num_threads(1)
    for seed in args.seed:
        for (task, algorithm), updates in MATRIX.items():
            if args.task in (None, task) and args.algorithm in (None, algorithm):
                run(task, algorithm, seed, args.updates or updates, args.n_envs, args.every)
        if args.task and args.algorithm and (args.task, args.algorithm) not in MATRIX:
            run(args.task, args.algorithm, seed, args.updates or 31_000, args.n_envs, args.every)


if __name__ == "__main__":
    main()
