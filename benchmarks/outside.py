"""
Tasks from outside: the swing-up of Pendulum-v1 with the model of the README, which is all but exact, and the unstable
InvertedDoublePendulum-v5 with a model that knows nothing, or nothing but when an episode ends; TD3 beside them.

    python benchmarks/outside.py swing_up mpg --seed 0 1 2
    python benchmarks/outside.py swing_up mpg_recorded_states --seed 0 1 2 --steps 4000 --exploration-noise 0.5
    python benchmarks/outside.py double_pendulum td3 --seed 0 1 2

The mean return of 20 episodes after each 1000 steps, a csv for each run in ``results/outside``. Runs that are complete are
skipped.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from prior_models import KnowsNothing
from stable_baselines3 import TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from tables import write_csv

from sb3_mpg import MPG, PriorModel

RESULTS = Path(__file__).parent / "results" / "outside"


class MyPendulum(PriorModel):
    """The model of the README."""

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        cos, sin, speed = states.split(1, dim=1)
        speed = (speed + 0.05 * (15 * sin + 3 * actions)).clamp(-8, 8)
        angle = th.atan2(sin, cos) + 0.05 * speed
        return th.cat([angle.cos(), angle.sin(), speed], dim=1)

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        cos, sin, speed = states.split(1, dim=1)
        return -(th.atan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * actions**2)


class KnowsTheEnd(KnowsNothing):
    """Knows nothing of InvertedDoublePendulum-v5 but when an episode ends: when the tip is below one metre."""

    def terminal(self, states: th.Tensor) -> th.Tensor:
        sine, other_sine, cosine, other_cosine = states[:, 1:5].unbind(1)
        height = 0.6 * (cosine + cosine * other_cosine - sine * other_sine)
        return (height <= 1.0).unsqueeze(1)


class OutsideTask(NamedTuple):
    """
    :param env_id: id of the environment
    :param make_model: its prior model
    :param steps: number of environment steps of a run
    """

    env_id: str
    make_model: Callable[[], PriorModel]
    steps: int


TASKS = {
    "swing_up": OutsideTask("Pendulum-v1", MyPendulum, 5000),
    "double_pendulum": OutsideTask("InvertedDoublePendulum-v5", KnowsNothing, 10_000),
    "double_pendulum_end": OutsideTask("InvertedDoublePendulum-v5", KnowsTheEnd, 10_000),
}
# What they change of the defaults of MPG
METHODS: dict[str, dict[str, Any]] = {
    "mpg": {},
    "mpg_recorded_states": {"model_exploration": 0.0, "learning_starts": 500},
    "data_driven": {"horizons": (0,), "weighting": "constant", "learning_starts": 500},
}


class EvaluationCallback(BaseCallback):
    """
    Evaluate after each 1000 steps; the csv is written at the end.

    :param env_id: id of the environment
    :param path: csv file to write
    """

    def __init__(self, env_id: str, path: Path):
        super().__init__()
        self.env_id, self.path = env_id, path
        self.rows: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % 1000 == 0:
            mean, std = evaluate_policy(self.model, make_vec_env(self.env_id, 20, seed=5), n_eval_episodes=20)
            self.rows.append({"steps": self.num_timesteps, "return_mean": f"{mean:.1f}", "return_std": f"{std:.1f}"})
            print(self.path.stem, self.rows[-1], flush=True)
        return True

    def _on_training_end(self) -> None:
        write_csv(self.path, self.rows)


def make(task: OutsideTask, algorithm: str, seed: int, exploration_noise: float) -> BaseAlgorithm:
    """
    :param task: the task
    :param algorithm: a key of ``METHODS``, or ``td3``
    :param seed: of everything random
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("algorithm", choices=[*METHODS, "td3"])
    parser.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="number of environment steps; by default those of the task")
    parser.add_argument("--exploration-noise", type=float, default=0.1)
    args = parser.parse_args()
    th.set_num_threads(1)
    task = TASKS[args.task]
    steps = args.steps or task.steps
    for seed in args.seed:
        path = RESULTS / f"{args.task}-{args.algorithm}-{args.exploration_noise}-{steps}-{seed}.csv"
        if path.exists():
            print(f"{path.name} is there, skipped")
            continue
        model = make(task, args.algorithm, seed, args.exploration_noise)
        model.learn(steps, callback=EvaluationCallback(task.env_id, path))


if __name__ == "__main__":
    main()
