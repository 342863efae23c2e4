"""
Learning with prior models from perfect to useless: return against environment steps, a csv for each run.

    python benchmarks/trust.py                                             # everything that is missing, for days
    python benchmarks/trust.py --task pendulum --model papers --method mpg --seed 0 --steps 5000

One environment, one update for each of its steps, the same networks and batches for all. Runs that are complete are
skipped. Tables and figures: ``python benchmarks/trust_report.py``.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from prior_models import MODELS
from settings import TASKS, Task, evaluate
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise
from tables import write_csv

from sb3_mpg import MPG
from sb3_mpg.common.torch_layers import ObservationScaler

RESULTS = Path(__file__).parent / "results" / "trust"
# Random steps before the first update of methods that have no model, or may have to do without: they need more of them than
# the default of MPG
WARM_UP = 500
N_STARTS = 50

# Methods that need a model, and what they change of the defaults
METHODS: dict[str, dict[str, Any]] = {
    "mpg": {},
    "recorded_states": {"model_exploration": 0.0},
    "measured": {"residual": False, "learning_starts": WARM_UP},
    "rule_based": {"residual": False, "weighting": "rule_based", "learning_starts": WARM_UP},
    "weight_1": {"horizons": (25,), "weighting": "constant"},
}
# Methods that need none
WITHOUT_MODEL = ("data_driven", "td3", "sac")


def make(method: str, task_name: str, model_name: str | None, seed: int) -> BaseAlgorithm:
    """
    :param method: one of ``METHODS`` or ``WITHOUT_MODEL``
    :param task_name: a key of ``TASKS``
    :param model_name: a key of ``MODELS[task_name]``
    :param seed: seed of everything random
    :return: the algorithm
    """
    task = TASKS[task_name]
    if method in ("td3", "sac"):
        # What MPG has: the same hidden layers and discount. Observations have the authors' scales, learning rates are SB3's
        # own. `data_driven` has everything that MPG has, sines and cosines too, but for the length of the warm-up
        policy_kwargs = {
            "net_arch": [256, 256],
            "activation_fn": th.nn.ELU,
            "features_extractor_class": ObservationScaler,
            "features_extractor_kwargs": {"scale": list(task.observation_scale)},
        }
        common = {"gamma": 0.98, "batch_size": 256, "learning_starts": WARM_UP, "seed": seed, "device": "cpu"}
        if method == "sac":
            return SAC("MlpPolicy", task.env_id, policy_kwargs=policy_kwargs, **common)
        env = gym.make(task.env_id)
        noise = NormalActionNoise(np.zeros(env.action_space.shape), 0.1 * np.ones(env.action_space.shape))
        return TD3("MlpPolicy", env, policy_kwargs=policy_kwargs, action_noise=noise, **common)
    if method == "data_driven":
        return MPG(
            "MlpPolicy", task.env_id, horizons=(0,), weighting="constant", learning_starts=WARM_UP, seed=seed, device="cpu"
        )
    assert model_name is not None
    settings = dict(METHODS[method])
    if method == "rule_based":
        settings["weighting_kwargs"] = {"total_updates": task.weighting_updates}
    return MPG(
        "MlpPolicy",
        task.env_id,
        prior_model=MODELS[task_name][model_name](),
        seed=seed,
        device="cpu",
        **settings,
    )


class EvaluationCallback(BaseCallback):
    """
    Evaluate every so many environment steps; the csv is complete only at the end.

    :param task: the task
    :param every: number of steps between evaluations
    :param path: csv file to write
    """

    def __init__(self, task: Task, every: int, path: Path):
        super().__init__()
        self.task, self.every, self.path = task, every, path
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0

    def _on_training_start(self) -> None:
        self.resumed = time.perf_counter()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            self.seconds += time.perf_counter() - self.resumed
            returns, _ = evaluate(self.model, self.task, N_STARTS)
            row: dict[str, Any] = {
                "steps": self.num_timesteps,
                "return_mean": f"{returns.mean():.5g}",
                "return_median": f"{np.median(returns):.5g}",
                "return_min": f"{returns.min():.5g}",
                "seconds": f"{self.seconds:.1f}",
            }
            if isinstance(self.model, MPG):
                weights = self.model.weighting_rule(max(self.model._n_updates, 1))
                row["model_weight"] = f"{1 - weights.get(0, 0.0):.4g}"
                row["skipped"] = self.model.n_skipped_updates
            self.rows.append(row)
            print(self.path.stem, row, flush=True)
            self.resumed = time.perf_counter()
        return True

    def _on_training_end(self) -> None:
        write_csv(self.path, self.rows)


def run(task: str, model: str | None, method: str, seed: int, steps: int) -> None:
    """
    Train once and write the csv.

    :param task: a key of ``TASKS``
    :param model: a key of ``MODELS[task]``, or ``None`` for methods without one
    :param method: one of ``METHODS`` or ``WITHOUT_MODEL``
    :param seed: seed of the run
    :param steps: number of environment steps
    """
    path = RESULTS / f"{task}-{model or 'no_model'}-{method}-{steps}-{seed}.csv"
    if path.exists():
        print(f"{path.name} is there, skipped")
        return
    callback = EvaluationCallback(TASKS[task], 250, path)
    make(method, task, model, seed).learn(steps, callback=callback, log_interval=10**9)


def matrix() -> list[tuple[str, str | None, str, int, int]]:
    """
    :return: all runs: the default and its rivals over 20,000 steps with five seeds, everything else over 5000 with three
    """
    runs: list[tuple[str, str | None, str, int, int]] = []
    for seed in range(5):
        for task, models in MODELS.items():
            if seed < 3:
                runs += [(task, model, method, seed, 5000) for model in models for method in METHODS if method != "mpg"]
                runs += [(task, None, "data_driven", seed, 5000)]
            runs += [(task, model, "mpg", seed, 20_000) for model in models]
            runs += [(task, None, method, seed, 20_000) for method in ("td3", "sac")]
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--model", nargs="*", choices=[*MODELS["path_tracking"], "none"])
    parser.add_argument("--method", nargs="*", choices=[*METHODS, *WITHOUT_MODEL])
    parser.add_argument("--seed", type=int, nargs="*")
    parser.add_argument("--steps", type=int, help="number of environment steps; by default those of the matrix in this file")
    args = parser.parse_args()
    th.set_num_threads(1)
    for task, model, method, seed, steps in matrix():
        chosen = (
            args.task in (None, task)
            and (args.model is None or (model or "none") in args.model)
            and (args.method is None or method in args.method)
            and (args.seed is None or seed in args.seed)
        )
        if chosen:
            run(task, model, method, seed, args.steps or steps)


if __name__ == "__main__":
    main()
