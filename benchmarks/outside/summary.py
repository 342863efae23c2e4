"""What the runs say: final returns, steps to what the best peer reaches, and the goals of the benchmark."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from machine import merged_origin
from outside.methods import NO_MODEL
from outside.tasks import TASKS
from outside.tasks.base import MODELS
from tables import RESULTS, Run, Runs, read_runs

# Peers with their own defaults. Tuned ones are in the table and in no goal, since most tasks have none
RIVALS = ("td3", "sac", "crossq")
# Shares of the peers' steps in which MPG has to be as good, and shares of the tasks
SPEED_GOALS = {"rough": (1 / 3, 8 / 10), "idea": (1 / 2, 6 / 10)}
# Standard errors of a difference that are noise
NOISE = 2.0


class AbsoluteGoal(NamedTuple):
    """
    A return that MPG has to reach.

    :param task: a key of ``TASKS``
    :param model: a key of its models
    :param steps: number of environment steps
    :param goal: least return
    """

    task: str
    model: str
    steps: int
    goal: float


ABSOLUTE_GOALS = (
    AbsoluteGoal("inverted_pendulum", "rough", 3000, 1000.0),
    AbsoluteGoal("inverted_pendulum", "idea", 3000, 1000.0),
    AbsoluteGoal("cartpole_swingup", "rough", 5000, 600.0),
    AbsoluteGoal("mountain_car", "rough", 3000, 90.0),
)

#: Runs of a task, by method and model
TaskRuns = Mapping[tuple[str, str], Mapping[int, Run]]


def read_task(task: str, x_column: str = "steps") -> TaskRuns:
    """
    :param task: a key of ``TASKS``
    :param x_column: ``steps`` or ``cpu_seconds``
    :return: its runs of the full length
    """
    runs: Runs = read_runs(RESULTS / "outside" / task, x_column, n_parts=3)
    length = str(TASKS[task].steps)
    return {(method, model): seeds for (method, model, steps), seeds in runs.items() if steps == length}


def finals(seeds: Mapping[int, Run]) -> np.ndarray:
    """
    :param seeds: runs by seed
    :return: their last mean returns, ``(n_seeds,)``
    """
    return np.array([run.curve[-1, 1] for run in seeds.values()])


def returns_at(seeds: Mapping[int, Run], steps: float) -> np.ndarray:
    """
    :param seeds: runs by seed
    :param steps: number of environment steps of an evaluation
    :return: mean returns of this evaluation, ``(n_seeds,)``
    """
    return np.array([float(run.curve[run.curve[:, 0] == steps, 1][0]) for run in seeds.values()])


def steps_to(seeds: Mapping[int, Run], goal: float) -> float:
    """
    :param seeds: runs by seed
    :param goal: a return
    :return: median over the seeds of the steps of the first evaluation that is as good; infinite if most never are
    """
    firsts = []
    for run in seeds.values():
        reached = run.curve[run.curve[:, 1] >= goal, 0]
        firsts.append(reached[0] if len(reached) else np.inf)
    # The median of an even number can lie between a number and infinity
    return float(np.sort(firsts)[len(firsts) // 2])


def best_rival(runs: TaskRuns) -> tuple[str, float] | None:
    """
    :param runs: runs of a task
    :return: the peer with the best final return (median of its seeds), and this return; ``None`` without runs of peers
    """
    medians = {method: float(np.median(finals(runs[method, NO_MODEL]))) for method in RIVALS if (method, NO_MODEL) in runs}
    if not medians:
        return None
    best = max(medians, key=lambda method: medians[method])
    return best, medians[best]


def is_not_below(seeds: Mapping[int, Run], others: Mapping[int, Run]) -> bool:
    """
    :param seeds: runs of a method
    :param others: runs of another
    :return: whether the median of the final returns is not below the other's by more than noise, which is ``NOISE`` standard
        errors of the difference between the seeds' means
    """
    mine, theirs = finals(seeds), finals(others)
    errors = [values.var(ddof=1) / len(values) if len(values) > 1 else 0.0 for values in (mine, theirs)]
    return bool(np.median(mine) >= np.median(theirs) - NOISE * np.sqrt(sum(errors)))


def worse_evaluations(seeds: Mapping[int, Run], others: Mapping[int, Run]) -> list[int]:
    """
    :param seeds: runs of a method
    :param others: runs of another
    :return: steps of the evaluations in the second half whose median is below the worst seed of the other
    """
    steps = next(iter(seeds.values())).curve[:, 0]
    late = steps[steps > steps[-1] / 2]
    return [int(step) for step in late if np.median(returns_at(seeds, step)) < returns_at(others, step).min()]


def number(value: float) -> str:
    """
    :param value: a return, or a number of steps
    :return: as few digits as a table needs
    """
    return "never" if np.isinf(value) else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def row_of(task: str, method: str, model: str, runs: TaskRuns) -> dict[str, Any]:
    """
    :param task: a key of ``TASKS``
    :param method: one of the methods
    :param model: a key of the task's models, or ``NO_MODEL``
    :param runs: runs of the task
    :return: a row of the table
    """
    seeds = runs[method, model]
    returns = finals(seeds)
    row: dict[str, Any] = {
        "task": task,
        "method": method,
        "model": "" if model == NO_MODEL else model,
        "seeds": len(seeds),
        "final return [range]": f"{number(np.median(returns))} [{number(returns.min())}, {number(returns.max())}]",
    }
    best = best_rival(runs)
    if best is not None:
        rival, goal = best
        steps = steps_to(seeds, goal)
        row |= {"best peer": f"{rival} {number(goal)}", "steps to it": number(steps)}
        row["share of its steps"] = "" if np.isinf(steps) else f"{steps / TASKS[task].steps:.2f}"
    if method == "mpg" and ("td3", NO_MODEL) in runs:
        others = runs["td3", NO_MODEL]
        row["not below TD3"] = "yes" if is_not_below(seeds, others) else "no"
        row["worse than TD3's worst seed at"] = " ".join(map(str, worse_evaluations(seeds, others)))
    return {**row, **merged_origin(run.origin for run in seeds.values())}


def check_goals(all_runs: Mapping[str, TaskRuns]) -> list[dict[str, Any]]:
    """
    :param all_runs: runs by task
    :return: rows of a table: each goal, what came out, and whether it is reached. Cells without runs count as missed
    """
    rows = []

    def add(goal: str, outcome: str, is_reached: bool) -> None:
        rows.append({"goal": goal, "outcome": outcome, "reached": "yes" if is_reached else "no"})

    cells = [(task, model) for task in all_runs for model in MODELS]
    compared = {
        (task, model): (all_runs[task]["mpg", model], all_runs[task]["td3", NO_MODEL])
        for task, model in cells
        if ("mpg", model) in all_runs[task] and ("td3", NO_MODEL) in all_runs[task]
    }
    fine = [is_not_below(*both) for both in compared.values()]
    add("every task and model: not below TD3 at the end", f"{sum(fine)} of {len(cells)}", sum(fine) == len(cells))
    fine = [not worse_evaluations(*both) for both in compared.values()]
    add(
        "every task and model: never below TD3's worst seed in the second half",
        f"{sum(fine)} of {len(cells)}",
        sum(fine) == len(cells),
    )
    for model, (share, share_of_tasks) in SPEED_GOALS.items():
        quick = 0
        for task, runs in all_runs.items():
            best = best_rival(runs)
            if best is not None and ("mpg", model) in runs:
                quick += steps_to(runs["mpg", model], best[1]) <= share * TASKS[task].steps
        add(
            f"{model}: the best peer's final return in {share:.0%} of its steps, on {share_of_tasks:.0%} of the tasks",
            f"{quick} of {len(all_runs)}",
            quick >= share_of_tasks * len(all_runs),
        )
    for task, model, steps, goal in ABSOLUTE_GOALS:
        seeds = all_runs.get(task, {}).get(("mpg", model))
        outcome = None if seeds is None else float(np.median(returns_at(seeds, steps)))
        add(
            f"{task}, {model}: {goal:.0f} after {steps} steps",
            "not run" if outcome is None else number(outcome),
            outcome is not None and outcome >= goal,
        )
    return rows
