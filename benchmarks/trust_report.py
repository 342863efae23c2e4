"""
Table and figures of ``trust.py`` and ``bound.py``: all runs in results/trust.csv, a figure per task, and the figure of the
README.

    python benchmarks/trust_report.py
"""

import csv
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from machine import REPOSITORY, merged_origin
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from settings import TASKS
from tables import FIGURES, RESULTS, Runs, print_table, read_runs, write_csv

# Wider than a README, for screens with many pixels
DPI = 160
FONT_SIZE = 8
X_LABEL = "environment steps (median and range of the seeds)"
SUMMARY = REPOSITORY / "docs" / "images" / "results.png"
# Length of the runs that are drawn, in environment steps
DRAWN_STEPS = "20000"
TITLES = {"path_tracking": "Path tracking", "pendulum": "Inverted pendulum"}
# Highest and lowest cost that is drawn: what lies above has left the road or lost the pole
COST_LIMITS = {"path_tracking": (3.5, 300.0), "pendulum": (4e-4, 4000.0)}
MODEL_NAMES = {
    "exact": "exact",
    "papers": "the papers'",
    "sign_flipped": "wrong sign of the action",
    "knows_nothing": "knows nothing",
    "explodes": "explodes after 5 steps",
}
# Colours that readers with colour blindness can tell apart (Okabe and Ito; wine is Tol's)
BLUE, WINE, VERMILION, GREEN = "#0072B2", "#882255", "#D55E00", "#009E73"


class Line(NamedTuple):
    """
    A method in a figure.

    :param model: prior model, or ``no_model``
    :param method: method, as in ``trust.py``
    :param label: label at the end of the line
    :param color: colour
    :param style: line style
    """

    model: str
    method: str
    label: str
    color: str
    style: str = "-"


TD3 = Line("no_model", "td3", "TD3", VERMILION)
SAC = Line("no_model", "sac", "SAC", GREEN)


def read_bounds() -> dict[str, float]:
    """
    :return: the bound of each task: the mean over the starts of the best return that was found
    """
    bounds = {}
    for task in TASKS:
        path = RESULTS / "trust" / f"bound-{task}.csv"
        if path.exists():
            with path.open(encoding="utf-8") as file:
                bounds[task] = float(np.mean([float(row["return"]) for row in csv.DictReader(file)]))
    return bounds


def write_table(runs: Runs, bounds: dict[str, float]) -> None:
    """
    Print the table and write it as csv.

    :param runs: runs by task, prior model, method and length
    :param bounds: bound of each task
    """

    def median(values: list[int | None]) -> str:
        middle = float(np.median([float("inf") if value is None else value for value in values]))
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
        for name, goal in zip(("first goal", "second goal"), TASKS[task].default_goals, strict=True):
            reached = [run.first_above(goal) for run in seeds.values()]
            each = " / ".join("never" if value is None else f"{value:g}" for value in reached)
            row[f"steps to the {name}"] = f"{median(reached)} ({each})"
        final = np.median([run.curve[-1, 1] for run in seeds.values()])
        row["return at the end"] = f"{final:.4g}"
        if task in bounds:
            row["worse than the bound by"] = f"{final / bounds[task] - 1:.0%}"
        rows.append({**row, **merged_origin(run.origin for run in seeds.values())})
    write_csv(RESULTS / "trust.csv", rows)
    print_table(rows)
    for task, bound in bounds.items():
        print(f"bound, {task}: {bound:.5g}")


def draw_panel(axes: Axes, runs: Runs, task: str, lines: Sequence[Line], bound: float, bound_label: str) -> None:
    """
    Draw the costs of some methods against environment steps, with the median and the range of the seeds.

    :param axes: axes of the panel
    :param runs: runs by task, prior model, method and length
    :param task: a key of ``TASKS``
    :param lines: the methods
    :param bound: bound of the task
    :param bound_label: label of the bound
    """
    axes.set(xscale="log", yscale="log", xlim=(250, 20_000), ylim=COST_LIMITS[task])
    axes.set_xticks([250, 1000, 5000, 20_000], ["250", "1k", "5k", "20k"])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(-bound, color="black", lw=1.2, ls=(0, (2, 2)))
    ends = [(-bound, bound_label, "black")]
    for line in lines:
        seeds = runs.get((task, line.model, line.method, DRAWN_STEPS), {})
        if not seeds:
            continue
        costs = -np.stack([run.curve[:, 1] for run in seeds.values()])
        steps = next(iter(seeds.values())).curve[:, 0]
        axes.fill_between(steps, costs.min(axis=0), costs.max(axis=0), color=line.color, alpha=0.18, lw=0)
        axes.plot(steps, np.median(costs, axis=0), color=line.color, ls=line.style, lw=1.6)
        ends.append((float(np.median(costs[:, -1])), line.label, line.color))
    label_ends(axes, ends)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """
    Write labels and values next to the ends of lines, moved apart where they would overlap.

    :param axes: axes with a logarithmic y axis, whose limits are final
    :param ends: value, text and colour of each label
    """
    low, high = np.log(axes.get_ylim())
    spacing = 11 * FONT_SIZE / 8 / (72 * axes.get_figure().get_figheight() * axes.get_position().height)
    next_height = 0.0
    for value, text, color in sorted(ends):
        height = max((np.log(value) - low) / (high - low), next_height)
        axes.text(1.02, height, f"{text} {value:#.3g}", color=color, transform=axes.transAxes, va="center")
        next_height = height + spacing


def draw_task(runs: Runs, task: str, bound: float) -> None:
    """
    Draw the figure of a task: a panel per prior model, and one for MPG without a model.

    :param runs: runs by task, prior model, method and length
    :param task: a key of ``TASKS``
    :param bound: bound of the task
    """
    figure, panels = plt.subplots(2, 3, figsize=(8.0, 5.0), sharex=True, sharey=True, layout="constrained")
    for (model, name), axes in zip(MODEL_NAMES.items(), panels.flat, strict=False):
        draw_panel(axes, runs, task, [SAC, TD3, Line(model, "mpg", "MPG", BLUE)], bound, "bound")
        axes.set_title(f"Model: {name}")
    draw_panel(panels[-1, -1], runs, task, [SAC, TD3, Line("no_model", "data_driven", "MPG", BLUE)], bound, "bound")
    panels[-1, -1].set_title("No model")
    figure.supxlabel(X_LABEL, fontsize=FONT_SIZE)
    figure.supylabel("cost of an episode (lower is better)", fontsize=FONT_SIZE)
    figure.suptitle(f"{TITLES[task]}: MPG with prior models from exact to useless", fontsize=FONT_SIZE + 2)
    figure.savefig(FIGURES / f"trust_{task}.png", dpi=DPI)
    plt.close(figure)


def draw_summary(runs: Runs, bounds: dict[str, float]) -> None:
    """
    Draw the figure of the README: MPG with a decent and with a useless model, TD3 and SAC on both tasks.

    :param runs: runs by task, prior model, method and length
    :param bounds: bound of each task
    """
    lines = [
        SAC,
        TD3,
        Line("knows_nothing", "mpg", "MPG, useless model", WINE, "--"),
        Line("papers", "mpg", "MPG, papers' model", BLUE),
    ]
    figure, panels = plt.subplots(1, len(bounds), figsize=(8.0, 3.2), layout="constrained", squeeze=False)
    for (task, bound), axes in zip(bounds.items(), panels.flat, strict=True):
        draw_panel(axes, runs, task, lines, bound, "best possible")
        axes.set(title=TITLES[task], xlabel=X_LABEL)
    panels[0, 0].set_ylabel("cost of an episode (lower is better)")
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(SUMMARY, dpi=DPI)
    plt.close(figure)


def main() -> None:
    runs, bounds = read_runs(RESULTS / "trust", "steps", n_parts=4), read_bounds()
    write_table(runs, bounds)
    FIGURES.mkdir(exist_ok=True)
    plt.rcParams.update({"font.size": FONT_SIZE, "axes.titlesize": FONT_SIZE + 1})
    for task, bound in bounds.items():
        draw_task(runs, task, bound)
    draw_summary(runs, bounds)


if __name__ == "__main__":
    main()
