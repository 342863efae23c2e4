"""
Learner processes: updates per second, the overhead of the pool, learning curves, and a run whose learners are killed.

    python benchmarks/learners.py throughput                      # updates per second, relative to no learners
    python benchmarks/learners.py curves --updates 3000           # return against updates with 0, 1, 2, 4 learners
    python benchmarks/learners.py soak --minutes 20               # a learner is killed every 10 s; and a run without kills

Each writes a table to ``results/learners``. The measurements of ``throughput`` alternate between the numbers of learners, so
that other load on the machine affects all of them. Wall-clock times need an otherwise idle machine; processor times are less
sensitive.
"""

import argparse
import os
import signal
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th
from evaluation import EvaluationCallback, evaluate
from settings import ALGORITHMS, TASKS, make_model, make_vec_env
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from tables import RESULTS, write_csv

from sb3_mpg import MPG
from sb3_mpg.common.learners import multiprocess
from sb3_mpg.common.learners.multiprocess import MultiprocessLearners

TASK = "path_tracking"
N_ENVS = 16
TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """
    :param pid: a process
    :return: processor time that it has used
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def pids_of_learners(model: MPG) -> list[int]:
    """
    :param model: which learns
    :return: the processes of its learners
    """
    return model.learners.pids() if isinstance(model.learners, MultiprocessLearners) else []


class Stopwatch:
    """
    Measures the total time of all calls of a function.

    :param function: the function
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


class Speed(BaseCallback):
    """
    Measures one call of ``learn`` after its first updates.

    :param skip: number of updates before the measurement
    """

    def __init__(self, skip: int):
        super().__init__()
        self.skip = skip
        self.watches: dict[str, Stopwatch] = {}
        self.wait = Stopwatch(multiprocess.wait)
        self.start: dict[str, float] | None = None
        self.result: dict[str, float] = {}

    def _now(self) -> dict[str, float]:
        pids = pids_of_learners(self.model)  # type: ignore[arg-type]
        return {
            "updates": self.model._n_updates,
            "seconds": time.perf_counter(),
            "main": time.process_time(),
            "learners": sum(processor_seconds(pid) for pid in pids),
            "wait": self.wait.seconds,
            **{name: watch.seconds for name, watch in self.watches.items()},
        }

    def _on_training_start(self) -> None:
        self.first = self.model._n_updates
        learners = self.model.learners
        for name in ("next_result", "applied"):
            self.watches[name] = Stopwatch(getattr(learners, name))
            setattr(learners, name, self.watches[name])
        self.watches["apply"] = Stopwatch(self.model.optimizer_steps.apply)
        self.model.optimizer_steps.apply = self.watches["apply"]
        multiprocess.wait = self.wait  # type: ignore[assignment]

    def _on_step(self) -> bool:
        if self.start is None and self.model._n_updates >= self.first + self.skip:
            self.start = self._now()
        elif self.start is not None:
            self.end = self._now()
        return True

    def _on_training_end(self) -> None:
        multiprocess.wait = self.wait.function  # type: ignore[assignment]
        self.model.optimizer_steps.apply = self.watches["apply"].function
        assert self.start is not None
        change = {name: self.end[name] - value for name, value in self.start.items()}
        updates = change.pop("updates")
        self.result = {name: value / updates for name, value in change.items()}


def throughput(algorithm: str, counts: list[int], rounds: int, updates: int) -> None:
    """
    :param algorithm: a key of ``ALGORITHMS``, or ``"default"``
    :param counts: numbers of learners
    :param rounds: number of measurements of each
    :param updates: number of updates of a measurement
    """
    task = TASKS[TASK]
    env = make_vec_env(task, N_ENVS)
    if algorithm == "default":
        model = MPG("MlpPolicy", env, seed=0, device="cpu", reward_scale=task.reward_scale, compile=False)
    else:
        model = make_model(algorithm, task, env, 0, compile=False)
    model.gradient_steps = 10
    model.learn(model.learning_starts + 20 * N_ENVS, log_interval=None)
    results: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            model.n_learners = count
            speed = Speed(skip=30)
            steps = model.num_timesteps + (30 + updates) // model.gradient_steps * N_ENVS
            model.learn(steps - model.num_timesteps, callback=speed, reset_num_timesteps=False, log_interval=None)
            results[count].append(speed.result)
            print(count, {name: f"{1e3 * value:.3g} ms" for name, value in speed.result.items()}, flush=True)
    rows = []
    in_process = statistics.median(result["seconds"] for result in results[counts[0]])
    work = statistics.median(result["main"] for result in results[counts[0]])
    for count in counts:
        median = {name: statistics.median(result[name] for result in results[count]) for name in results[count][0]}
        spread = [1 / result["seconds"] for result in results[count]]
        # Time of an update with one free core per learner; the main process cannot be faster than its own work
        free = max((median["main"] + median["learners"]) / max(count, 1), median["main"])
        overhead = median["next_result"] + median["applied"] - median["wait"] if count else 0.0
        rows.append(
            {
                "algorithm": algorithm,
                "learners": count,
                "updates_per_s": f"{1 / median['seconds']:.4g}",
                "lowest": f"{min(spread):.4g}",
                "highest": f"{max(spread):.4g}",
                "ratio": f"{in_process / median['seconds']:.3g}",
                "ratio_on_as_many_free_cores": f"{work / free:.3g}",
                "cpu_ms_main": f"{1e3 * median['main']:.3g}",
                "cpu_ms_learners": f"{1e3 * median['learners']:.3g}",
                "apply_ms": f"{1e3 * median['apply']:.3g}",
                "pool_overhead_ms": f"{1e3 * overhead:.3g}",
                "cores": len(os.sched_getaffinity(0)),
                "load": f"{os.getloadavg()[0]:.2g}",
            }
        )
        print(rows[-1], flush=True)
    write_csv(RESULTS / "learners" / f"throughput-{algorithm}.csv", rows)


class Killer(BaseCallback):
    """
    Kills a learner every so many seconds.

    :param every: seconds between kills
    :param stop_after: seconds after which training stops
    """

    def __init__(self, every: float, stop_after: float):
        super().__init__()
        self.every, self.stop_after = every, stop_after
        self.start = self.last_kill = time.monotonic()
        self.kills = 0

    def _on_step(self) -> bool:
        now = time.monotonic()
        pids = pids_of_learners(self.model)  # type: ignore[arg-type]
        if now - self.last_kill > self.every and pids:
            os.kill(pids[self.kills % len(pids)], signal.SIGKILL)
            self.kills += 1
            self.last_kill = now
        return now - self.start < self.stop_after


def columns(model: BaseAlgorithm) -> dict[str, Any]:
    """
    :param model: the algorithm
    :return: what its learners have logged since the start
    """
    values = model.logger.name_to_value
    return {
        "staleness_mean": round(values.get("learners/staleness_mean", 0.0), 3),
        "staleness_max": values.get("learners/staleness_max", 0),
        "dropped": values.get("learners/dropped", 0),
        "restarts": values.get("learners/restarts", 0),
    }


def curve(
    n_learners: int, seed: int, total_updates: int, every: int, stop_after: float, killer: Killer | None = None, **kwargs: Any
) -> list[dict[str, Any]]:
    """
    :param n_learners: number of learners
    :param seed: seed
    :param total_updates: number of updates over which the learning rates decay
    :param every: number of updates between evaluations
    :param stop_after: number of updates after which training stops
    :param killer: kills learners
    :param kwargs: further settings of the algorithm
    :return: a row per evaluation
    """
    task = TASKS[TASK]
    model = MPG(
        "MlpPolicy",
        make_vec_env(task, 1),
        reward_scale=task.reward_scale,
        seed=seed,
        device="cpu",
        n_learners=n_learners,
        learner_kwargs={"max_restarts": 10_000},
        **kwargs,
    )
    evaluation = EvaluationCallback(
        lambda model: evaluate(model, task)[0],
        "updates",
        every,
        stop_after=stop_after,
        extra_columns=lambda model: {**columns(model), "kills": killer.kills if killer else 0},
    )
    # Without log output, the logged staleness is that of all updates so far
    callbacks = [evaluation] if killer is None else [evaluation, killer]
    model.learn(model.learning_starts + total_updates, callback=callbacks, log_interval=None)
    return [{"seed": seed, "learners": n_learners, **row} for row in evaluation.rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "curves", "soak"])
    parser.add_argument("--algorithm", choices=["default", *ALGORITHMS], nargs="*", default=["mpg_v2", "default"])
    parser.add_argument("--learners", type=int, nargs="*", help="numbers of learners; by default 0 1 2 (4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, help="per measurement of `throughput` (200), or per run of `curves` (3000)")
    parser.add_argument("--seed", type=int, nargs="*", default=[0])
    parser.add_argument("--every", type=int, default=250, help="updates between evaluations")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--kill-every", type=float, default=10, help="seconds")
    args = parser.parse_args()
    th.set_num_threads(1)
    warnings.filterwarnings("ignore", message="A learner died")
    if args.what == "throughput":
        for algorithm in args.algorithm:
            throughput(algorithm, args.learners or [0, 1, 2], args.rounds, args.updates or 200)
    elif args.what == "curves":
        rows = []
        for seed in args.seed:
            for n_learners in args.learners or [0, 1, 2, 4]:
                updates = args.updates or 3000
                rows += curve(n_learners, seed, updates, args.every, updates)
                write_csv(RESULTS / "learners" / "curves.csv", rows)
    else:
        # Learners are killed before they would have compiled
        killer = Killer(args.kill_every, 60 * args.minutes)
        killed = curve(2, 0, 10**5, args.every, float("inf"), killer, compile=False)
        # The same number of updates
        undisturbed = curve(2, 0, 10**5, args.every, killed[-1]["updates"], compile=False)
        runs = {"killed": killed, "undisturbed": undisturbed}
        write_csv(RESULTS / "learners" / "soak.csv", [{"run": name, **row} for name, rows in runs.items() for row in rows])


if __name__ == "__main__":
    main()
