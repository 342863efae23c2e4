"""Evaluations: the papers' protocol, the callback of all benchmarks, and the newest agent that RL Zoo has saved."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch as th
from settings import Task
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from tables import write_csv

START_SEED = 1000


def evaluate(
    model: BaseAlgorithm, task: Task, n_starts: int = 20, states: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """
    The papers' evaluation: no exploration noise, no early resets, a fixed number of steps, and always the same starts.

    :param model: the algorithm
    :param task: the task
    :param n_starts: number of episodes
    :param states: starts, ``(n_starts, O)``; by default the fixed ones of all evaluations
    :return: returns, ``(n_starts,)``, and observations, ``(steps + 1, n_starts, O)``
    """
    env = gym.make(task.env_id, early_reset=False)
    simulator = env.get_wrapper_attr("make_simulator")(n_starts)
    env.close()
    simulator.seed(START_SEED)
    observations = [simulator.reset() if states is None else simulator.set_state(states)]
    returns = np.zeros(n_starts)
    for _ in range(task.steps):
        with th.no_grad():
            actions, _ = model.predict(observations[-1], deterministic=True)
        new_obs, rewards, _, _ = simulator.step(actions)
        observations.append(new_obs)
        returns += rewards
    return returns, np.stack(observations)


def cpu_seconds() -> float:
    """
    :return: processor time of this process and of its children that have ended (compilers). On an otherwise idle core it is
        the time on the clock
    """
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class EvaluationCallback(BaseCallback):
    """
    Evaluates every so many environment steps or updates. The csv is written when training ends.

    :param evaluate: returns the returns of the episodes of an evaluation, ``(n_episodes,)``
    :param unit: what is counted, ``steps`` or ``updates``
    :param every: number of steps or updates between evaluations
    :param path: csv file; ``None`` only keeps the ``rows``
    :param first: number of steps or updates before the first evaluation; by default ``every``
    :param stop_after: number of steps or updates after which training stops
    :param extra_columns: returns further columns for an evaluation
    """

    def __init__(
        self,
        evaluate: Callable[[BaseAlgorithm], np.ndarray],
        unit: Literal["steps", "updates"],
        every: int,
        path: Path | None = None,
        *,
        first: int | None = None,
        stop_after: float = float("inf"),
        extra_columns: Callable[[BaseAlgorithm], dict[str, Any]] = lambda model: {},
    ):
        super().__init__()
        self.evaluate, self.unit, self.every, self.path = evaluate, unit, every, path
        self.stop_after, self.extra_columns = stop_after, extra_columns
        self.next_evaluation = every if first is None else first
        self.rows: list[dict[str, Any]] = []
        # Evaluations are not counted
        self.training_seconds = self.cpu_seconds = 0.0

    def _on_training_start(self) -> None:
        self.resumed, self.resumed_cpu = time.perf_counter(), cpu_seconds()

    def _on_step(self) -> bool:
        counts = {"steps": self.num_timesteps, "updates": self.model._n_updates}
        count = counts[self.unit]
        if count >= self.next_evaluation:
            self.next_evaluation = (count // self.every + 1) * self.every
            self.training_seconds += time.perf_counter() - self.resumed
            self.cpu_seconds += cpu_seconds() - self.resumed_cpu
            returns = self.evaluate(self.model)
            row = {
                self.unit: count,
                **counts,
                "return_mean": f"{returns.mean():.5g}",
                "return_median": f"{np.median(returns):.5g}",
                "return_std": f"{returns.std():.5g}",
                "return_min": f"{returns.min():.5g}",
                "seconds": f"{self.training_seconds:.1f}",
                "cpu_seconds": f"{self.cpu_seconds:.1f}",
                **self.extra_columns(self.model),
            }
            self.rows.append(row)
            print(self.path.stem if self.path else "", row, flush=True)
            self.resumed, self.resumed_cpu = time.perf_counter(), cpu_seconds()
        return count < self.stop_after

    def _on_training_end(self) -> None:
        if self.path is not None:
            write_csv(self.path, self.rows)


def latest_run(folder: Path, env_id: str) -> Path:
    """
    :param folder: folder in which RL Zoo keeps the runs of an algorithm
    :param env_id: id of the environment
    :return: folder of the newest run
    """
    runs = [path for path in folder.glob(f"{env_id}_*") if (path / f"{env_id}.zip").exists()]
    if not runs:
        raise SystemExit(f"There is no saved agent for {env_id} in {folder}; train one first: make train ENV={env_id}")
    return max(runs, key=lambda path: int(path.name.rsplit("_", 1)[1]))
