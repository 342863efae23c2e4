"""
Evaluate the newest agent that RL Zoo's commands saved with the papers' protocol, and draw its episodes.

    python benchmarks/evaluate.py --algo mpg --env PathTracking-v0 -f logs
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from evaluation import evaluate, latest_run
from settings import TASKS

from sb3_mpg.zoo import ALGORITHMS
from sb3_mpg_envs.path_tracking.dynamics import path_reference


def draw_path_tracking(observations: np.ndarray, returns: np.ndarray, path: Path) -> None:
    """
    Draw the driven paths with the worst, the median and the best return.

    :param observations: observations of the evaluation, ``(steps + 1, n_starts, 6)``
    :param returns: returns of the evaluation, ``(n_starts,)``
    :param path: file of the picture
    """
    order = np.argsort(returns)
    shown = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(11, 9), height_ratios=(2, 1, 1), layout="constrained")
    seconds = 0.1 * np.arange(len(observations))
    span = np.zeros(2)
    for (name, index), colour in zip(shown.items(), ("#D55E00", "#0072B2", "#009E73"), strict=True):
        x = np.unwrap(observations[:, index, 5], period=1200)
        span = np.array([min(span[0] or x[0], x[0]), max(span[1], x[-1])])
        lateral_error = observations[:, index, 3]
        label = f"{name} of {len(returns)} starts, return {returns[index]:.1f}"
        top.plot(x, path_reference(x, "path", np)[0] + lateral_error, color=colour, lw=2, label=label)
        top.plot(x[0], path_reference(x[:1], "path", np)[0] + lateral_error[0], "o", color=colour)
        middle.plot(seconds, lateral_error, color=colour)
        bottom.plot(seconds, observations[:, index, 0], color=colour)
    x = np.linspace(*span, 1000)
    top.plot(x, path_reference(x, "path", np)[0], "k--", lw=1, label="reference path")
    top.set(xlabel="x [m]", ylabel="y [m] (stretched)", title="Driven path")
    top.legend()
    middle.set(ylabel="lateral error [m]", xlabel="time [s]")
    bottom.set(ylabel="speed error [m/s]", xlabel="time [s]")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def draw_pendulum(observations: np.ndarray, returns: np.ndarray, path: Path) -> None:
    """
    Draw the states of all episodes.

    :param observations: observations of the evaluation, ``(steps + 1, n_starts, 4)``
    :param returns: returns of the evaluation, ``(n_starts,)``
    :param path: file of the picture
    """
    figure, axes = plt.subplots(4, 1, figsize=(9, 9), sharex=True, layout="constrained")
    labels = ("cart position [m]", "pole angle [rad]", "cart velocity [m/s]", "pole velocity [rad/s]")
    for index, (ax, label) in enumerate(zip(axes, labels, strict=True)):
        ax.plot(0.04 * np.arange(len(observations)), observations[:, :, index], lw=1)
        ax.set(ylabel=label)
        ax.grid(alpha=0.3)
    axes[0].set(title=f"{len(returns)} starts, mean return {returns.mean():.3g}")
    axes[-1].set(xlabel="time [s]")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=ALGORITHMS, default="mpg")
    parser.add_argument("--env", choices=[task.env_id for task in TASKS.values()], default="PathTracking-v0")
    parser.add_argument("-f", "--folder", type=Path, default=Path("logs"), help="log folder of RL Zoo's commands")
    args = parser.parse_args()
    th.set_num_threads(1)

    task = next(task for task in TASKS.values() if task.env_id == args.env)
    run = latest_run(args.folder / args.algo, args.env)
    model = ALGORITHMS[args.algo].load(run / f"{args.env}.zip", device="cpu")
    returns, observations = evaluate(model, task)
    print(
        f"Evaluation of {run}, after {model._n_updates} updates and {model.num_timesteps} environment steps:\n"
        f"{len(returns)} episodes of {task.steps} steps, without noise and early resets: "
        f"mean return {returns.mean():.3g}, standard deviation {returns.std():.2g}, worst {returns.min():.3g}"
    )
    draw = draw_path_tracking if args.env == "PathTracking-v0" else draw_pendulum
    draw(observations, returns, run / "evaluation.png")
    print(f"Agent: {run / args.env}.zip\nPicture: {run / 'evaluation.png'}")


if __name__ == "__main__":
    main()
