"""
Table and figures of ``learning.py``: the updates needed to reach each goal, and a figure per task.

    python benchmarks/learning_report.py
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from machine import merged_origin
from settings import TASKS
from tables import FIGURES, RESULTS, Runs, print_table, read_runs, write_csv

# Table I of the first version: iterations to each goal, mean of five runs; ``None`` is never
PAPER = {
    ("path_tracking", "mpg_v1"): (3000, 9000, 11000, 18000),
    ("path_tracking", "mpg_v1_exploring_starts"): (3000, 9000, 11000, 18000),
    ("path_tracking", "mpg_v2"): (3000, 6000, 11000, 31000),
    ("path_tracking", "n_step_adp"): (17000, None, None, None),
    ("pendulum", "mpg_v2"): (3000, 14000, 15000, 17000),
}


def write_table(runs: Runs) -> None:
    """
    Print the table and write it as csv: the updates to each goal, of every seed and of the paper.

    :param runs: runs by task, algorithm and number of environments
    """
    rows = []
    for (task, algorithm, n_envs), seeds in runs.items():
        for index, goal in enumerate(TASKS[task].goals):
            reached = [run.first_above(goal) for run in seeds.values()]
            curves = [run.curve for run in seeds.values()]
            paper = PAPER.get((task, algorithm))
            rows.append(
                {
                    "task": task,
                    "algorithm": algorithm,
                    "environments": n_envs.removesuffix("envs"),
                    "goal": goal,
                    "updates of each seed": " / ".join("never" if value is None else f"{value:g}" for value in reached),
                    "paper": "" if paper is None else paper[index] or "never",
                    "best return of each seed": " / ".join(f"{curve[:, 1].max():.3g}" for curve in curves),
                    "mean of the last 5 evaluations": " / ".join(f"{curve[-5:, 1].mean():.3g}" for curve in curves),
                    "updates run": " / ".join(str(int(curve[-1, 0])) for curve in curves),
                    **merged_origin(run.origin for run in seeds.values()),
                }
            )
    write_csv(RESULTS / "learning.csv", rows)
    print_table(rows)


def draw(runs: Runs) -> None:
    """
    Draw a figure per task, with the median and the range of the seeds.

    :param runs: runs by task, algorithm and number of environments
    """
    FIGURES.mkdir(exist_ok=True)
    for task, settings in TASKS.items():
        figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
        for (of_task, algorithm, n_envs), seeds in runs.items():
            if of_task != task:
                continue
            length = min(len(run.curve) for run in seeds.values())
            returns = np.stack([run.curve[:length, 1] for run in seeds.values()])
            updates = next(iter(seeds.values())).curve[:length, 0]
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
    all_runs = read_runs(RESULTS / "learning", "updates", n_parts=3)
    write_table(all_runs)
    draw(all_runs)
