"""
From the csv files of ``learning.py``: a table of the updates needed to reach each goal, and a figure for each task.

    python benchmarks/learning_report.py
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from learning import RESULTS
from settings import TASKS
from tables import print_table, write_csv

FIGURES = Path(__file__).parent / "figures"
# Table I of the first version: iterations to each goal, mean of five runs; None: never
PAPER = {
    ("path_tracking", "mpg_v1"): (3000, 9000, 11000, 18000),
    ("path_tracking", "mpg_v1_exploring_starts"): (3000, 9000, 11000, 18000),
    ("path_tracking", "mpg_v2"): (3000, 6000, 11000, 31000),
    ("path_tracking", "n_step_adp"): (17000, None, None, None),
    ("pendulum", "mpg_v2"): (3000, 14000, 15000, 17000),
}


def read_runs() -> dict[tuple[str, str, str], dict[int, np.ndarray]]:
    """
    :return: for each task, algorithm and number of environments, for each seed: updates and mean return ``(n, 2)``
    """
    runs: dict[tuple[str, str, str], dict[int, np.ndarray]] = defaultdict(dict)
    for path in sorted(RESULTS.glob("*.csv")):
        task, algorithm, n_envs, seed = path.stem.split("-")
        with path.open() as file:
            rows = [(float(row["updates"]), float(row["return_mean"])) for row in csv.DictReader(file)]
        runs[task, algorithm, n_envs][int(seed)] = np.array(rows)
    return runs


def first_above(curve: np.ndarray, goal: float) -> int | None:
    """
    :param curve: updates and returns, ``(n, 2)``
    :param goal: a return
    :return: updates at the first evaluation above the goal, ``None`` if there is none
    """
    above = curve[curve[:, 1] > goal]
    return int(above[0, 0]) if len(above) else None


def write_table(runs: dict[tuple[str, str, str], dict[int, np.ndarray]]) -> None:
    """
    Print the table and write it as csv: for each goal the updates of every seed, and the paper's.

    :param runs: see :func:`read_runs`
    """
    rows = []
    for (task, algorithm, n_envs), seeds in runs.items():
        for index, goal in enumerate(TASKS[task].goals):
            reached = [first_above(curve, goal) for curve in seeds.values()]
            paper = PAPER.get((task, algorithm))
            rows.append(
                {
                    "task": task,
                    "algorithm": algorithm,
                    "environments": n_envs.removesuffix("envs"),
                    "goal": goal,
                    "updates of each seed": " / ".join("never" if value is None else str(value) for value in reached),
                    "paper": "" if paper is None else paper[index] or "never",
                    "best return of each seed": " / ".join(f"{curve[:, 1].max():.3g}" for curve in seeds.values()),
                    "mean of the last 5 evaluations": " / ".join(f"{curve[-5:, 1].mean():.3g}" for curve in seeds.values()),
                    "updates run": " / ".join(str(int(curve[-1, 0])) for curve in seeds.values()),
                }
            )
    write_csv(RESULTS.parent / "learning.csv", rows)
    print_table(rows)


def draw(runs: dict[tuple[str, str, str], dict[int, np.ndarray]]) -> None:
    """
    One figure for each task: median and range over seeds.

    :param runs: see :func:`read_runs`
    """
    FIGURES.mkdir(exist_ok=True)
    for task, settings in TASKS.items():
        figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
        for (of_task, algorithm, n_envs), seeds in runs.items():
            if of_task != task:
                continue
            length = min(len(curve) for curve in seeds.values())
            returns = np.stack([curve[:length, 1] for curve in seeds.values()])
            updates = next(iter(seeds.values()))[:length, 0]
            label = f"{algorithm.replace('_', '-')}, {n_envs.removesuffix('envs')} environments, {len(seeds)} seeds"
            (line,) = axes.plot(updates, -np.median(returns, axis=0), label=label)
            axes.fill_between(updates, -returns.min(axis=0), -returns.max(axis=0), color=line.get_color(), alpha=0.2)
        for goal in settings.goals:
            axes.axhline(-goal, color="grey", lw=0.8, ls=":")
        axes.set(yscale="log", xlabel="updates", ylabel="cost (negative return, lower is better)", title=settings.env_id)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(FIGURES / f"learning_{task}.png", dpi=90)


if __name__ == "__main__":
    all_runs = read_runs()
    write_table(all_runs)
    draw(all_runs)
