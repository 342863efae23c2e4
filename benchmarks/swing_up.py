"""
A task from outside: Gymnasium's Pendulum-v1 with the model of the README, and TD3 beside it.

    python benchmarks/swing_up.py mpg --seed 0 1 2
    python benchmarks/swing_up.py mpg --seed 0 1 2 --steps 4000 --exploration-noise 0.5
    python benchmarks/swing_up.py td3 --seed 0 1 2

The mean return of 20 episodes after each 1000 steps, a csv for each run in ``results/swing_up``. Runs that are complete are
skipped.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from tables import write_csv

from sb3_mpg import MPG, PriorModel

RESULTS = Path(__file__).parent / "results" / "swing_up"
ENV_ID = "Pendulum-v1"


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


class EvaluationCallback(BaseCallback):
    """
    Evaluate after each 1000 steps; the csv is written at the end.

    :param path: csv file to write
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % 1000 == 0:
            mean, std = evaluate_policy(self.model, make_vec_env(ENV_ID, 20, seed=5), n_eval_episodes=20)
            self.rows.append({"steps": self.num_timesteps, "return_mean": f"{mean:.1f}", "return_std": f"{std:.1f}"})
            print(self.path.stem, self.rows[-1], flush=True)
        return True

    def _on_training_end(self) -> None:
        write_csv(self.path, self.rows)


def make(algorithm: str, seed: int, exploration_noise: float) -> BaseAlgorithm:
    """
    :param algorithm: ``mpg``, ``mpg_recorded_states`` (without exploring in the model) or ``td3``
    :param seed: of everything random
    :param exploration_noise: standard deviation of the noise on actions in [-1, 1]
    :return: the algorithm
    """
    if algorithm == "td3":
        # SB3 scales the noise as it scales the actions
        return TD3("MlpPolicy", ENV_ID, action_noise=NormalActionNoise(np.zeros(1), exploration_noise * np.ones(1)), seed=seed)
    settings: dict[str, Any] = {}
    if algorithm == "mpg_recorded_states":
        settings = {"model_exploration": 0.0, "learning_starts": 500}
    return MPG("MlpPolicy", ENV_ID, prior_model=MyPendulum(), exploration_noise=exploration_noise, seed=seed, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=["mpg", "mpg_recorded_states", "td3"])
    parser.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--exploration-noise", type=float, default=0.1)
    args = parser.parse_args()
    th.set_num_threads(1)
    for seed in args.seed:
        path = RESULTS / f"{args.algorithm}-{args.exploration_noise}-{args.steps}-{seed}.csv"
        if path.exists():
            print(f"{path.name} is there, skipped")
            continue
        make(args.algorithm, seed, args.exploration_noise).learn(args.steps, callback=EvaluationCallback(path))


if __name__ == "__main__":
    main()
