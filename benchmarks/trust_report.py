"""
From the csv files of ``trust.py`` and ``bound.py``: a table, and a figure for each task.

    python benchmarks/trust_report.py
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from learning_report import first_above
from tables import print_table, write_csv
from trust import METHODS, RESULTS, WITHOUT_MODEL

FIGURES = Path(__file__).parent / "figures"
GOALS = {"path_tracking": (-10.0, -5.0), "pendulum": (-0.1, -0.01)}
Runs = dict[tuple[str, str, str, int], dict[int, np.ndarray]]


def read_runs() -> Runs:
    """
    :return: for each task, prior model, method and length, for each seed: steps and mean return ``(n, 2)``
    """
    runs: Runs = defaultdict(dict)
    for path in sorted(RESULTS.glob("*-*-*-*-*.csv")):
        task, model, method, length, seed = path.stem.split("-")
        with path.open() as file:
            rows = [(float(row["steps"]), float(row["return_mean"])) for row in csv.DictReader(file)]
        runs[task, model, method, int(length)][int(seed)] = np.array(rows)
    return dict(runs)


def read_bounds() -> dict[str, float]:
    """
    :return: mean over the starts of the best return that was found, for each task
    """
    bounds = {}
    for task in GOALS:
        path = RESULTS / f"bound-{task}.csv"
        if path.exists():
            with path.open() as file:
                bounds[task] = float(np.mean([float(row["return"]) for row in csv.DictReader(file)]))
    return bounds


def write_table(runs: Runs, bounds: dict[str, float]) -> None:
    """
    Print the table and write it as csv.

    :param runs: see :func:`read_runs`
    :param bounds: see :func:`read_bounds`
    """

    def median(values: list[int | None]) -> str:
        ordered = sorted(float("inf") if value is None else value for value in values)
        middle = float(np.median(ordered))
        return "never" if middle == float("inf") else f"{middle:.0f}"

    rows = []
    for (task, model, method, length), seeds in runs.items():
        row: dict[str, object] = {
            "task": task,
            "prior model": model,
            "method": method,
            "steps run": length,
            "seeds": len(seeds),
        }
        for name, goal in zip(("first goal", "second goal"), GOALS[task], strict=True):
            reached = [first_above(curve, goal) for curve in seeds.values()]
            each = " / ".join("never" if value is None else str(value) for value in reached)
            row[f"steps to the {name}"] = f"{median(reached)} ({each})"
        final = [curve[-1, 1] for curve in seeds.values()]
        row["return at the end"] = f"{np.median(final):.4g}"
        if task in bounds:
            row["worse than the bound by"] = f"{np.median(final) / bounds[task] - 1:.0%}"
        rows.append(row)
    write_csv(RESULTS.parent / "trust.csv", rows)
    print_table(rows)
    for task, bound in bounds.items():
        print(f"bound, {task}: {bound:.5g}")


def draw(runs: Runs, bounds: dict[str, float]) -> None:
    """
    One figure for each task, a panel for each prior model: median and range over seeds. Of each method the longest runs, and
    shorter ones if there are more seeds of them.

    :param runs: see :func:`read_runs`
    :param bounds: see :func:`read_bounds`
    """
    FIGURES.mkdir(exist_ok=True)
    for task, goals in GOALS.items():
        models = list(dict.fromkeys(key[1] for key in runs if key[0] == task and key[1] != "no_model"))
        if not models:
            continue
        n_columns = min(len(models) + 1, 3)
        n_rows = -(-(len(models) + 1) // n_columns)
        figure, panels = plt.subplots(
            n_rows, n_columns, figsize=(4.5 * n_columns, 4 * n_rows), sharey=True, layout="constrained", squeeze=False
        )
        lines = {}
        for model, axes in zip(models, panels.flat, strict=False):
            of_panel = [key for key in runs if key[0] == task and key[1] in (model, "no_model")]
            longest = {key[2]: max(other[3] for other in of_panel if other[2] == key[2]) for key in of_panel}
            for key in of_panel:
                seeds, method, length = runs[key], key[2], key[3]
                is_longest = length == longest[method]
                if not is_longest and len(seeds) <= len(runs[(*key[:3], longest[method])]):
                    continue
                n_evaluations = min(len(curve) for curve in seeds.values())
                costs = -np.stack([curve[:n_evaluations, 1] for curve in seeds.values()])
                steps = next(iter(seeds.values()))[:n_evaluations, 0]
                color = f"C{[*METHODS, *WITHOUT_MODEL].index(method)}"
                (line,) = axes.plot(steps, np.median(costs, axis=0), color=color, ls="-" if is_longest else "--")
                axes.fill_between(steps, costs.min(axis=0), costs.max(axis=0), color=color, alpha=0.2)
                lines.setdefault(method.replace("_", " ") + ("" if is_longest else ", shorter, more seeds"), line)
            if task in bounds:
                lines["bound"] = axes.axhline(-bounds[task], color="black", lw=1.0, ls=":")
            for goal in goals:
                axes.axhline(-goal, color="grey", lw=0.8, ls=":")
            axes.set(yscale="log", xlabel="environment steps", title=model.replace("_", " "))
            axes.grid(alpha=0.3)
        for axes in panels.flat[len(models) :]:
            axes.axis("off")
        panels.flat[len(models)].legend(lines.values(), lines.keys(), loc="center", title="method")
        for row in panels:
            row[0].set_ylabel("cost (negative return, lower is better)")
        figure.suptitle(f"{task.replace('_', ' ')}: default settings with prior models from perfect to useless")
        figure.savefig(FIGURES / f"trust_{task}.png", dpi=80)
        plt.close(figure)


if __name__ == "__main__":
    all_runs, all_bounds = read_runs(), read_bounds()
    write_table(all_runs, all_bounds)
    draw(all_runs, all_bounds)
