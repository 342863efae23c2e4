"""
The pictures of README and documentation: a trained agent on path tracking, and a still of each environment.

    make train pictures
    python benchmarks/pictures.py --algo mpg -f logs                           # the newest agent that RL Zoo has saved

Writes docs/images/path_tracking.gif and .png (the driven path), and docs/images/env_ENVIRONMENT.png.
"""

import argparse
from pathlib import Path

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from evaluation import evaluate, latest_run
from machine import REPOSITORY
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from PIL import Image
from settings import TASKS
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_mpg.zoo import ALGORITHMS
from sb3_mpg_envs.path_tracking.dynamics import MAX_LATERAL_ERROR, MAX_STEERING, PATH_PERIOD, STEP_TIME, path_reference

IMAGES = REPOSITORY / "docs" / "images"
# The car starts 2.5 m to the left of the path, heads further away, and is too slow
START = np.array([[-4.0, 0.0, 0.0, 2.5, 0.2, 40.0]])
N_FRAMES = 150
FRAMES_PER_SECOND = 10
# Few colours and no dithering make small files
N_COLORS = 32
STILL_WIDTH = 480  # pixels
CLOSE_UP = (-20.0, 44.0)  # m, from the car
CLOSE_UP_HEIGHT = 18.0  # m
REFERENCE, DRIVEN, ROAD, CAR = "#0072B2", "#D55E00", "#E9ECEF", "#333333"


class Drive:
    """
    What an agent drives on path tracking.

    :param model: the agent
    """

    def __init__(self, model: BaseAlgorithm):
        _, observations = evaluate(model, TASKS["path_tracking"], n_starts=1, states=START)
        self.actions, _ = model.predict(observations[:, 0], deterministic=True)
        self.steering = MAX_STEERING * self.actions[:, 0]
        self.agent = f"{type(model).__name__} after {model.num_timesteps:,} environment steps"
        speed_error, _, _, self.lateral_error, heading_error, x = observations[:, 0].T.astype(np.float64)
        self.x = np.unwrap(x, period=PATH_PERIOD)
        y_ref, phi_ref = path_reference(self.x, "path", np)
        self.y, self.heading, self.speed = y_ref + self.lateral_error, phi_ref + heading_error, 20.0 + speed_error

    def draw_car(self, axes: Axes, step: int, alpha: float = 1.0) -> None:
        """
        :param axes: axes in metres
        :param step: number of the step
        :param alpha: opacity
        """

        def add_rectangle(forward: float, left: float, length: float, width: float, turn: float, color: str) -> None:
            corners = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * (length / 2, width / 2)
            corners = corners @ rotation(turn).T + (forward, left)
            corners = corners @ rotation(self.heading[step]).T + (self.x[step], self.y[step])
            axes.add_patch(Polygon(corners, facecolor=color, edgecolor="white", lw=0.4, alpha=alpha, zorder=4))

        def rotation(angle: float) -> np.ndarray:
            return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

        for left in (-0.95, 0.95):
            add_rectangle(1.14, left, 0.9, 0.35, self.steering[step], CAR)
            add_rectangle(-1.40, left, 0.9, 0.35, 0.0, CAR)
        add_rectangle(0.0, 0.0, 4.6, 1.8, 0.0, DRIVEN)
        add_rectangle(0.6, 0.0, 0.7, 1.5, 0.0, CAR)

    def draw_path(self, axes: Axes, low: float, high: float, last_step: int) -> None:
        """
        Draw the reference path and the driven path.

        :param axes: axes in metres
        :param low: lowest position of the reference path, m
        :param high: highest position, m
        :param last_step: the driven path ends with this step
        """
        x = np.linspace(low, high, 400)
        y, _ = path_reference(x, "path", np)
        axes.fill_between(x, y - MAX_LATERAL_ERROR, y + MAX_LATERAL_ERROR, color=ROAD, lw=0, zorder=1)
        axes.plot(x, y, color=REFERENCE, lw=1.5, ls=(0, (4, 2)), zorder=2, label="reference path")
        axes.plot(self.x[: last_step + 1], self.y[: last_step + 1], color=DRIVEN, lw=2.0, zorder=3, label="driven path")
        axes.set(xlim=(low, high), ylabel="y [m]")

    def overview(self, axes: Axes, last_step: int) -> None:
        """
        Draw the whole drive.

        :param axes: axes of the panel
        :param last_step: the driven path ends with this step
        """
        self.draw_path(axes, self.x[0] - 10.0, self.x[N_FRAMES - 1] + 10.0, last_step)
        axes.plot(self.x[last_step], self.y[last_step], "o", color=CAR, ms=5, zorder=5)
        axes.set(ylim=(-15, 15), xlabel="x [m] (y is stretched)")


def new_figure() -> tuple[Figure, Axes, Axes]:
    """
    :return: a figure of 640 pixels width, its close-up in scale and its overview
    """
    figure = plt.figure(figsize=(6.4, 3.9), dpi=100)
    close_up = figure.add_axes((0.085, 0.46, 0.905, 0.44))
    overview = figure.add_axes((0.085, 0.125, 0.905, 0.22))
    for axes in (close_up, overview):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, close_up, overview


def draw_frame(drive: Drive, step: int) -> Image.Image:
    """
    :param drive: what the agent drives
    :param step: number of the step
    :return: the picture
    """
    figure, close_up, overview = new_figure()
    low, high = drive.x[step] + CLOSE_UP[0], drive.x[step] + CLOSE_UP[1]
    drive.draw_path(close_up, low, high, step)
    drive.draw_car(close_up, step)
    y_ref, _ = path_reference(np.linspace(low, high, 50), "path", np)
    close_up.set_ylim(y_ref.mean() - CLOSE_UP_HEIGHT / 2, y_ref.mean() + CLOSE_UP_HEIGHT / 2)
    close_up.set_aspect("equal")
    close_up.legend(loc="upper right", fontsize=8, ncols=2, framealpha=1.0, edgecolor="white")
    drive.overview(overview, step)
    state = f"{STEP_TIME * step:4.1f} s  lateral error {drive.lateral_error[step]:+.2f} m  {drive.speed[step]:.1f} m/s"
    figure.text(0.085, 0.94, state, fontsize=9, family="monospace")
    figure.text(0.99, 0.94, drive.agent, fontsize=9, ha="right")
    return to_image(figure)


def draw_still(drive: Drive) -> Image.Image:
    """
    :param drive: what the agent drives
    :return: a picture of the first seconds, with a car every half second, and of the whole drive
    """
    figure, close_up, overview = new_figure()
    low = drive.x[0] - 5.0
    high = low + CLOSE_UP[1] - CLOSE_UP[0]
    drive.draw_path(close_up, low, high, int(np.searchsorted(drive.x, high)))
    for step in range(0, int(np.searchsorted(drive.x, high - 2.0)), 5):
        drive.draw_car(close_up, step, alpha=0.8)
    y_ref, _ = path_reference(np.linspace(low, high, 50), "path", np)
    close_up.set_ylim(y_ref.mean() - CLOSE_UP_HEIGHT / 2, y_ref.mean() + CLOSE_UP_HEIGHT / 2)
    close_up.set_aspect("equal")
    close_up.legend(loc="upper right", fontsize=8, ncols=2, framealpha=1.0, edgecolor="white")
    drive.overview(overview, N_FRAMES - 1)
    figure.text(0.085, 0.94, "One car every 0.5 s", fontsize=9)
    figure.text(0.99, 0.94, drive.agent, fontsize=9, ha="right")
    return to_image(figure)


def to_image(figure: Figure) -> Image.Image:
    """
    :param figure: a figure, which is closed
    :return: its picture
    """
    figure.canvas.draw()
    image = Image.frombytes("RGBA", figure.canvas.get_width_height(), bytes(figure.canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    return image


def write_gif(frames: list[Image.Image], path: Path) -> None:
    """
    :param frames: pictures of one size
    :param path: file of the animation, which repeats forever
    """
    # Unlike the default, this method keeps white
    palette = frames[len(frames) // 2].quantize(N_COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=1000 // FRAMES_PER_SECOND, loop=0, optimize=True)


def render_still(env_id: str, start: np.ndarray, actions: np.ndarray) -> Image.Image:
    """
    :param env_id: id of the environment
    :param start: observation of the start, ``(O,)``
    :param actions: actions before the picture, ``(n, A)``
    :return: what ``render`` returns, at the width of the documentation
    """
    env = gym.make(env_id, render_mode="rgb_array", early_reset=False)
    env.reset(options={"state": start})
    pictures = [env.render()]
    for action in actions:
        env.step(action)
        pictures.append(env.render())
    env.close()
    image = Image.fromarray(pictures[-1])
    return image.resize((STILL_WIDTH, round(image.height * STILL_WIDTH / image.width)), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=ALGORITHMS, default="mpg")
    parser.add_argument("-f", "--folder", type=Path, default=Path("logs"), help="log folder of RL Zoo's commands")
    args = parser.parse_args()
    th.set_num_threads(1)
    IMAGES.mkdir(parents=True, exist_ok=True)

    env_id = TASKS["path_tracking"].env_id
    model = ALGORITHMS[args.algo].load(latest_run(args.folder / args.algo, env_id) / f"{env_id}.zip", device="cpu")
    drive = Drive(model)
    write_gif([draw_frame(drive, step) for step in range(N_FRAMES)], IMAGES / "path_tracking.gif")
    draw_still(drive).save(IMAGES / "path_tracking.png", optimize=True)

    render_still(env_id, START[0], drive.actions[:15]).save(IMAGES / "env_path_tracking.png", optimize=True)
    leaning = np.array([0.2, 0.15, 0.0, 0.0])
    still = render_still(TASKS["pendulum"].env_id, leaning, np.zeros((0, 1)))
    still.save(IMAGES / "env_inverted_pendulum.png", optimize=True)
    for path in sorted(IMAGES.iterdir()):
        print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
