"""
Table, goals and figures of ``run.py``: all cells in results/outside.csv, goals in results/outside_goals.csv, and two figures,
return against environment steps and against processor time.

    python benchmarks/outside/report.py
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from outside.methods import METHODS, NO_MODEL
from outside.summary import TaskRuns, check_goals, read_task, row_of
from outside.tasks import TASKS
from tables import FIGURES, RESULTS, print_table, write_csv

DPI = 160
FONT_SIZE = 8
N_COLUMNS = 4


class Line(NamedTuple):
    """
    A method in a figure.

    :param method: method, as in ``run.py``
    :param model: prior model, or ``NO_MODEL``
    :param label: label in the legend
    :param color: colour
    :param style: line style
    """

    method: str
    model: str
    label: str
    color: str
    style: str | tuple[int, tuple[int, int]] = "-"


# Colours that readers with colour blindness can tell apart (Okabe and Ito; wine is Tol's)
LINES = (
    Line("crossq", NO_MODEL, "CrossQ", "#E69F00"),
    Line("sac", NO_MODEL, "SAC", "#009E73"),
    Line("td3", NO_MODEL, "TD3", "#D55E00"),
    Line("sac_tuned", NO_MODEL, "SAC, tuned", "#009E73", ":"),
    Line("td3_tuned", NO_MODEL, "TD3, tuned", "#D55E00", ":"),
    Line("mpg", "nothing", "MPG, model that knows nothing", "#882255", (0, (1, 1))),
    Line("mpg", "idea", "MPG, reward only", "#56B4E9", "--"),
    Line("mpg", "rough", "MPG, rough model", "#0072B2"),
)


def draw_panel(axes: Axes, task: str, runs: TaskRuns) -> None:
    """
    Draw the median and the range of the seeds.

    :param axes: axes of the panel
    :param task: a key of ``TASKS``
    :param runs: runs with what is on the x axis
    """
    values = []
    for line in LINES:
        seeds = runs.get((line.method, line.model), {})
        if not seeds:
            continue
        curves = np.stack([run.curve for run in seeds.values()])
        x, returns = np.median(curves[:, :, 0], axis=0), curves[:, :, 1]
        axes.fill_between(x, returns.min(axis=0), returns.max(axis=0), color=line.color, alpha=0.12, lw=0)
        axes.plot(x, np.median(returns, axis=0), color=line.color, ls=line.style, lw=1.5)
        values.append(np.median(returns, axis=0))
    axes.set_title(TASKS[task].title)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if values:
        everything = np.concatenate(values)
        # Single bad evaluations at the start would hide the rest
        low, high = np.quantile(everything, 0.05), everything.max()
        margin = 0.06 * max(high - low, 1e-3)
        axes.set_ylim(low - margin, high + margin)


def draw(all_runs: Mapping[str, TaskRuns], x_column: str, x_label: str, name: str) -> None:
    """
    Draw a panel per task.

    :param all_runs: runs by task
    :param x_column: ``steps`` or ``cpu_seconds``
    :param x_label: label of the x axes
    :param name: file name
    """
    # The last panel is the legend's
    n_rows = -(-(len(all_runs) + 1) // N_COLUMNS)
    figure, panels = plt.subplots(n_rows, N_COLUMNS, figsize=(10.0, 2.3 * n_rows + 0.3), layout="constrained", squeeze=False)
    for (task, runs), axes in zip(all_runs.items(), panels.flat, strict=False):
        draw_panel(axes, task, runs if x_column == "steps" else read_task(task, x_column))
        if x_column == "steps":
            axes.set_xlim(0, TASKS[task].steps)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        else:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in panels.flat[len(all_runs) :]:
        axes.set_axis_off()
    handles = [plt.Line2D([], [], color=line.color, ls=line.style, label=line.label) for line in reversed(LINES)]
    panels.flat[len(all_runs)].legend(handles=handles, loc="center", frameon=False)
    figure.supxlabel(f"{x_label} (median and range of the seeds)", fontsize=FONT_SIZE)
    figure.supylabel("return of an episode", fontsize=FONT_SIZE)
    figure.savefig(FIGURES / name, dpi=DPI)
    plt.close(figure)


def main() -> None:
    all_runs = {task: read_task(task) for task in TASKS}
    rows = []
    for task, runs in all_runs.items():
        order = [(method, model) for method in METHODS for model in [*TASKS[task].models, NO_MODEL]]
        rows += [row_of(task, method, model, runs) for method, model in order if (method, model) in runs]
    write_csv(RESULTS / "outside.csv", rows)
    print_table(rows)
    goals = check_goals(all_runs)
    write_csv(RESULTS / "outside_goals.csv", goals)
    print()
    print_table(goals)
    FIGURES.mkdir(exist_ok=True)
    plt.rcParams.update({"font.size": FONT_SIZE, "axes.titlesize": FONT_SIZE + 1})
    draw(all_runs, "steps", "environment steps", "outside_steps.png")
    draw(all_runs, "cpu_seconds", "processor time, s", "outside_cpu.png")


if __name__ == "__main__":
    main()
