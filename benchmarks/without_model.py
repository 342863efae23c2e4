"""
What learns without a model of the user, on tasks of Gymnasium: MPG from data alone and with learned dynamics, DVPG and the
paper's other algorithms, and TD3, SAC and CrossQ. The mean return of 10 episodes after each 1000 steps (Pendulum-v1: 250), one
csv per run in ``results/without_model``.

    python benchmarks/without_model.py                                       # all missing runs of MPG and TD3: hours
    python benchmarks/without_model.py --task hopper --method learned dvpg sac --seed 0 --steps 25000
    python benchmarks/without_model.py --report                              # a table of the runs that are complete

TD3, SAC and CrossQ have the settings of SB3 and sb3-contrib; TD3 has action noise of 0.1, as MPG and DVPG have it. Runs that
are complete are skipped.
"""

import argparse
from typing import Any

import numpy as np
import torch as th
from evaluation import EvaluationCallback
from imagination import ImaginedUpdates
from prior_models import KnowsNothing
from sb3_contrib import CrossQ
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from tables import RESULTS, print_table, read_runs

from sb3_mpg import DVPG, MPG

FOLDER = RESULTS / "without_model"
TASKS = {
    "pendulum": "Pendulum-v1",
    "inverted_pendulum": "InvertedPendulum-v5",
    "double_pendulum": "InvertedDoublePendulum-v5",
    "reacher": "Reacher-v5",
    "hopper": "Hopper-v5",
    "half_cheetah": "HalfCheetah-v5",
    "swimmer": "Swimmer-v5",
}
N_EPISODES = 10
STEPS = 20_000
PEERS: dict[str, type[BaseAlgorithm]] = {"td3": TD3, "sac": SAC, "crossq": CrossQ}
DATA_ALONE = {"horizons": (0,), "weighting": "constant"}
#: Number of horizons of DVPG, where the paper takes more than two
N_HORIZONS = {"hopper": 3}
# How they differ from the defaults of MPG
METHODS: dict[str, dict[str, Any]] = {
    "mpg": DATA_ALONE,
    "learned": {"prior_model": "learned"},
    # The model does not know where episodes terminate, and is excluded
    "left_out": {"prior_model": KnowsNothing},
    "learning_rates_of_td3": {**DATA_ALONE, "learning_rate": 1e-3, "critic_learning_rate": 1e-3},
    "targets_of_td3": {**DATA_ALONE, "tau": 0.005},
    "no_target_noise": {**DATA_ALONE, "value_target_kwargs": {"noise_std": 0.0}},
}
# How they differ from the defaults of DVPG
DVPG_METHODS: dict[str, dict[str, Any]] = {
    "dvpg": {},
    # As in hyperparams/dvpg.yml for small tasks
    "dvpg_fast": {"learning_rate": 1e-3, "learning_starts": 250},
    "ddpg": {"horizons": (0,)},
    "dvg_1": {"horizons": (1,), "weighting": "constant"},
    "dvg_2": {"horizons": (2,), "weighting": "constant"},
    "dvgf_5": {"horizons": (5,), "weighting": "constant", "terminal_value": False},
    # DDPG whose policy also learns from imagined states: the model is learned, and its horizon has no weight
    "ddpg_model": {"weighting": "constant", "weighting_kwargs": {"values": [1, 0]}, "horizons": (0, 1)},
    "dvpg_measured": {
        "weighting": "measured",
        "prior_model_kwargs": {"n_members": 2},
        "policy_kwargs": {"n_critics": 2},
    },
}
# Half of the 95 % interval of a mean of so many seeds, in standard errors
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}


def make(method: str, task: str, seed: int) -> BaseAlgorithm:
    """
    :param method: a key of ``METHODS``, ``DVPG_METHODS`` or ``PEERS``
    :param task: a key of ``TASKS``
    :param seed: seed
    :return: the algorithm
    """
    env = make_vec_env(TASKS[task], 1, seed=seed)
    common: dict[str, Any] = {"seed": seed, "device": "cpu"}
    if method in PEERS:
        if method == "td3":
            n_actions = env.action_space.shape[0]
            common["action_noise"] = NormalActionNoise(np.zeros(n_actions), 0.1 * np.ones(n_actions))
        return PEERS[method]("MlpPolicy", env, **common)
    if method in DVPG_METHODS:
        horizons = {"horizons": range(N_HORIZONS.get(task, 2))}
        return DVPG("MlpPolicy", env, **common, **{**horizons, **DVPG_METHODS[method]})
    return MPG("MlpPolicy", env, **common, **METHODS[method])


def run(task: str, method: str, seed: int, steps: int) -> None:
    """
    Train once and write the csv.

    :param task: a key of ``TASKS``
    :param method: see :func:`make`
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

    every = 250 if task == "pendulum" else 1000
    callbacks: list[BaseCallback] = [EvaluationCallback(evaluate, "steps", every, path)]
    if method == "ddpg_model":
        callbacks.append(ImaginedUpdates())
    make(method, task, seed).learn(steps, callback=callbacks)


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
    seconds = read_runs(FOLDER, "cpu_seconds", 3)
    for (task, method, steps), by_seed in sorted(read_runs(FOLDER, "steps", 3).items()):
        returns = [by_seed[seed].curve[:, 1] for seed in sorted(by_seed)]
        total = [run.curve[-1, 0] for run in seconds[task, method, steps].values()]
        rows.append(
            {
                "task": TASKS[task],
                "method": method,
                "steps": steps,
                "seeds": len(returns),
                "mean return over the run": interval([curve.mean() for curve in returns]),
                "over its second half": interval([curve[len(curve) // 2 :].mean() for curve in returns]),
                "of each seed": " / ".join(f"{curve[len(curve) // 2 :].mean():.4g}" for curve in returns),
                "last": " / ".join(f"{curve[-1]:.4g}" for curve in returns),
                "seconds for 1000 steps": f"{1000 * np.mean(total) / int(steps):.0f}",
            }
        )
    print_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--method", nargs="*", choices=[*METHODS, *DVPG_METHODS, *PEERS], default=["td3", "mpg", "learned"])
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
