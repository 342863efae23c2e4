"""
Tasks from outside: the swing-up of Pendulum-v1 with the model of the README, which is almost exact, and the unstable
InvertedDoublePendulum-v5 with a model that knows nothing, or only when an episode ends. TD3 for comparison.

    python benchmarks/outside.py                                               # all missing runs: hours
    python benchmarks/outside.py --task swing_up --algorithm mpg --seed 0
    python benchmarks/outside.py --task swing_up --algorithm mpg_recorded_states --steps 4000 --exploration-noise 0.5

The mean return of 20 episodes after each 1000 steps, one csv per run in ``results/outside``. Runs that are complete are
skipped.
"""

import argparse
import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from evaluation import EvaluationCallback
from prior_models import KnowsNothing
from stable_baselines3 import TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from tables import RESULTS

from sb3_mpg import MPG, PriorModel

README = Path(__file__).parent.parent / "README.md"


def model_of_readme(name: str = "MyPendulum") -> PriorModel:
    """
    :param name: name of a class in a code block of the README, which is the only place of its code
    :return: the prior model
    """
    for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL):
        if f"class {name}(" in block:
            tree = ast.parse(block)
            tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))]
            namespace: dict[str, Any] = {"__name__": "readme"}
            exec(compile(tree, str(README), "exec"), namespace)
            return namespace[name]()
    raise ValueError(f"{README} has no code block with a class {name}")


class KnowsTheEnd(KnowsNothing):
    """Knows only when an episode of InvertedDoublePendulum-v5 ends: when the tip is below one metre."""

    def terminal(self, states: th.Tensor) -> th.Tensor:
        sine, other_sine, cosine, other_cosine = states[:, 1:5].unbind(1)
        height = 0.6 * (cosine + cosine * other_cosine - sine * other_sine)
        return (height <= 1.0).unsqueeze(1)


class OutsideTask(NamedTuple):
    """
    :param env_id: id of the environment
    :param make_model: returns its prior model
    """

    env_id: str
    make_model: Callable[[], PriorModel]


TASKS = {
    "swing_up": OutsideTask("Pendulum-v1", model_of_readme),
    "double_pendulum": OutsideTask("InvertedDoublePendulum-v5", KnowsNothing),
    "double_pendulum_end": OutsideTask("InvertedDoublePendulum-v5", KnowsTheEnd),
}
# How they differ from the defaults of MPG
METHODS: dict[str, dict[str, Any]] = {
    "mpg": {},
    "mpg_recorded_states": {"model_exploration": 0.0, "learning_starts": 500},
    "data_driven": {"horizons": (0,), "weighting": "constant", "learning_starts": 500},
}
# The default runs and their numbers of environment steps
MATRIX = {
    ("swing_up", "mpg"): 5000,
    ("swing_up", "mpg_recorded_states"): 5000,
    ("swing_up", "td3"): 5000,
    ("double_pendulum", "mpg"): 30_000,
    ("double_pendulum", "data_driven"): 30_000,
    ("double_pendulum", "td3"): 30_000,
    ("double_pendulum_end", "mpg"): 10_000,
}


def make(task: OutsideTask, algorithm: str, seed: int, exploration_noise: float) -> BaseAlgorithm:
    """
    :param task: the task
    :param algorithm: a key of ``METHODS``, or ``td3``
    :param seed: seed
    :param exploration_noise: standard deviation of the noise on actions in [-1, 1]
    :return: the algorithm
    """
    if algorithm == "td3":
        # SB3 scales the noise as it scales the actions
        noise = NormalActionNoise(np.zeros(1), exploration_noise * np.ones(1))
        return TD3("MlpPolicy", task.env_id, action_noise=noise, seed=seed, device="cpu")
    return MPG(
        "MlpPolicy",
        task.env_id,
        prior_model=task.make_model(),
        exploration_noise=exploration_noise,
        seed=seed,
        device="cpu",
        **METHODS[algorithm],
    )


def run(task_name: str, algorithm: str, seed: int, steps: int, exploration_noise: float) -> None:
    """
    Train once and write the csv.

    :param task_name: a key of ``TASKS``
    :param algorithm: a key of ``METHODS``, or ``td3``
    :param seed: seed of the run
    :param steps: number of environment steps
    :param exploration_noise: standard deviation of the noise on actions in [-1, 1]
    """
    path = RESULTS / "outside" / f"{task_name}-{algorithm}-{exploration_noise}-{steps}-{seed}.csv"
    if path.exists():
        print(f"{path.name} exists, skipped")
        return
    task = TASKS[task_name]

    def evaluate(model: BaseAlgorithm) -> np.ndarray:
        envs = make_vec_env(task.env_id, 20, seed=5)
        return np.array(evaluate_policy(model, envs, n_eval_episodes=20, return_episode_rewards=True)[0])

    model = make(task, algorithm, seed, exploration_noise)
    model.learn(steps, callback=EvaluationCallback(evaluate, "steps", 1000, path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--algorithm", choices=[*METHODS, "td3"])
    parser.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="number of environment steps; by default those of the matrix in this file")
    parser.add_argument("--exploration-noise", type=float, default=0.1)
    args = parser.parse_args()
    th.set_num_threads(1)
    for seed in args.seed:
        for (task, algorithm), steps in MATRIX.items():
            if args.task in (None, task) and args.algorithm in (None, algorithm):
                run(task, algorithm, seed, args.steps or steps, args.exploration_noise)


if __name__ == "__main__":
    main()
