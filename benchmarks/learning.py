"""
Learning curves with the papers' settings: return against updates, one csv per run.

    python benchmarks/learning.py                                              # all missing runs: hours
    python benchmarks/learning.py --task pendulum --algorithm mpg_v2 --seed 0

Runs that are complete are skipped. Tables and figures: ``python benchmarks/learning_report.py``.
"""

import argparse
from typing import Any

import torch as th
from evaluation import EvaluationCallback, evaluate
from settings import ALGORITHMS, ENV_SETTINGS, TASKS, make_model, make_vec_env
from stable_baselines3.common.base_class import BaseAlgorithm
from tables import RESULTS

# Length of the papers' runs, over which the learning rates decay
PAPER_UPDATES = 100_000

# The default runs and their numbers of updates
MATRIX = {
    ("path_tracking", "mpg_v2"): 31_000,
    ("path_tracking", "mpg_v1_exploring_starts"): 18_000,
    ("path_tracking", "mpg_v1"): 18_000,
    ("path_tracking", "n_step_adp"): 6_000,
    ("pendulum", "mpg_v2"): 15_000,
}


def columns(model: BaseAlgorithm) -> dict[str, Any]:
    """
    :param model: the algorithm
    :return: its losses and the number of skipped updates
    """
    values = model.logger.name_to_value
    losses = {name: f"{values.get(f'train/{name}', float('nan')):.4g}" for name in ("critic_loss", "actor_loss")}
    return {**losses, "skipped": getattr(model, "n_skipped_updates", 0)}


def run(task_name: str, algorithm: str, seed: int, updates: int, n_envs: int, every: int) -> None:
    """
    Train once and write the csv.

    :param task_name: a key of ``TASKS``
    :param algorithm: a key of ``ALGORITHMS``
    :param seed: seed of the run
    :param updates: number of updates
    :param n_envs: number of agents; each gives one transition per update
    :param every: number of updates between evaluations
    """
    path = RESULTS / "learning" / f"{task_name}-{algorithm}-{n_envs}envs-{seed}.csv"
    if path.exists():
        print(f"{path.name} exists, skipped")
        return
    task = TASKS[task_name]
    env = make_vec_env(task, n_envs, **ENV_SETTINGS.get(algorithm, {}))
    model = make_model(algorithm, task, env, seed)
    callback = EvaluationCallback(
        lambda model: evaluate(model, task)[0],
        "updates",
        every,
        path,
        first=0,
        stop_after=updates,
        extra_columns=columns,
    )
    model.learn(PAPER_UPDATES * n_envs, callback=callback, log_interval=None)


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
