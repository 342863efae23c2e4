"""
MPG without trust in a model against TD3, on tasks of Gymnasium: the mean return of 10 episodes after each 1000 steps, one csv
per run in ``results/without_trust``.

    python benchmarks/without_trust.py                                       # all missing runs: hours
    python benchmarks/without_trust.py --task reacher --method mpg td3 --seed 0 --steps 5000
    python benchmarks/without_trust.py --report                              # a table of the runs that are complete

TD3 has SB3's settings, and action noise of 0.1 as MPG has it. Runs that are complete are skipped.
"""

import argparse
from typing import Any

import numpy as np
import torch as th
from evaluation import EvaluationCallback
from prior_models import KnowsNothing
from stable_baselines3 import TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from tables import RESULTS, print_table, read_runs

from sb3_mpg import MPG

FOLDER = RESULTS / "without_trust"
TASKS = {
    "inverted_pendulum": "InvertedPendulum-v5",
    "double_pendulum": "InvertedDoublePendulum-v5",
    "hopper": "Hopper-v5",
    "reacher": "Reacher-v5",
}
N_EPISODES = 10
STEPS = 20_000
# How they differ from the defaults of MPG
METHODS: dict[str, dict[str, Any]] = {
    "mpg": {"horizons": (0,), "weighting": "constant"},
    # The model does not know where episodes terminate, and is excluded
    "left_out": {"prior_model": KnowsNothing},
}
# How they differ from `mpg`
ABLATIONS: dict[str, dict[str, Any]] = {
    "learning_rates_of_td3": {"learning_rate": 1e-3, "critic_learning_rate": 1e-3},
    "targets_of_td3": {"tau": 0.005},
    "no_target_noise": {"value_target_kwargs": {"noise_std": 0.0}},
}
# Half of the 95 % interval of a mean of so many seeds, in standard errors
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}


def make(method: str, env_id: str, seed: int) -> BaseAlgorithm:
    """
    :param method: a key of ``METHODS`` or ``ABLATIONS``, or ``td3``
    :param env_id: id of the environment
    :param seed: seed
    :return: the algorithm
    """
    env = make_vec_env(env_id, 1, seed=seed)
    if method == "td3":
        n_actions = env.action_space.shape[0]
        noise = NormalActionNoise(np.zeros(n_actions), 0.1 * np.ones(n_actions))
        return TD3("MlpPolicy", env, action_noise=noise, seed=seed, device="cpu")
    settings = METHODS[method] if method in METHODS else {**METHODS["mpg"], **ABLATIONS[method]}
    return MPG("MlpPolicy", env, seed=seed, device="cpu", **settings)


def run(task: str, method: str, seed: int, steps: int) -> None:
    """
    Train once and write the csv.

    :param task: a key of ``TASKS``
    :param method: a key of ``METHODS`` or ``ABLATIONS``, or ``td3``
    :param seed: seed of the run
    :param steps: number of environment steps
    """
    path = FOLDER / f"{task}-{method}-{steps}-{seed}.csv"
    if path.exists():
        print(f"{path.name} exists, skipped")
        return
    envs = make_vec_env(TASKS[task], N_EPISODES)

    def evaluate(model: BaseAlgorithm) -> np.ndarray:
        envs.seed(5)
        return np.array(evaluate_policy(model, envs, N_EPISODES, return_episode_rewards=True)[0])

    make(method, TASKS[task], seed).learn(steps, callback=EvaluationCallback(evaluate, "steps", 1000, path))


def interval(values: list[float]) -> str:
    """
    :param values: one for each seed
    :return: their mean and, for several seeds, half of its 95 % interval
    """
    mean = f"{np.mean(values):.4g}"
    if len(values) not in STUDENT:
        return mean
    return f"{mean} ± {STUDENT[len(values)] * np.std(values, ddof=1) / np.sqrt(len(values)):.2g}"


def report() -> None:
    """Print the returns of all complete runs: means over all evaluations, and over those of the second half."""
    rows = []
    for (task, method, steps), by_seed in sorted(read_runs(FOLDER, "steps", 3).items()):
        returns = [by_seed[seed].curve[:, 1] for seed in sorted(by_seed)]
        rows.append(
            {
                "task": TASKS[task],
                "method": method,
                "steps": steps,
                "seeds": len(returns),
                "mean return over the run": interval([curve.mean() for curve in returns]),
                "over its second half": interval([curve[len(curve) // 2 :].mean() for curve in returns]),
                "of each seed": " / ".join(f"{curve[len(curve) // 2 :].mean():.4g}" for curve in returns),
            }
        )
    print_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--method", nargs="*", choices=["td3", *METHODS, *ABLATIONS], default=["td3", *METHODS])
    parser.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="number of environment steps")
    parser.add_argument("--report", action="store_true", help="print the table of the runs that are complete")
    args = parser.parse_args()
    if args.report:
        report()
        return
    th.set_num_threads(1)
    for seed in args.seed:
        for task in args.task:
            for method in args.method:
                run(task, method, seed, args.steps)


if __name__ == "__main__":
    main()
