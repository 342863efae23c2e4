"""
Learning with prior models from perfect to useless: return against environment steps, one csv per run.

    python benchmarks/trust.py                                             # all missing runs: days
    python benchmarks/trust.py --task pendulum --model papers --method mpg --seed 0 --steps 5000

All methods have one environment, one update per environment step, the same networks and the same batch size. Runs that are
complete are skipped. Tables and figures: ``python benchmarks/trust_report.py``.
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from evaluation import EvaluationCallback, evaluate
from prior_models import MODELS
from settings import N_STARTS, TASKS
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from tables import RESULTS

from sb3_mpg import MPG
from sb3_mpg.common.torch_layers import ObservationScaler

# Random steps before the first update of the methods that learn from data alone, or may have to. They need more than MPG's
# default
WARM_UP = 500

# Methods with a prior model, and how they differ from the defaults
METHODS: dict[str, dict[str, Any]] = {
    "mpg": {},
    "recorded_states": {"model_exploration": 0.0},
    "measured": {"residual": False, "learning_starts": WARM_UP},
    "rule_based": {
        "residual": False,
        "weighting": "rule_based",
        "value_target_kwargs": {"noise_std": 0.0},
        "learning_starts": WARM_UP,
    },
    "weight_1": {"horizons": (25,), "weighting": "constant"},
}
# Methods without a prior model
WITHOUT_MODEL = ("data_driven", "td3", "sac")


def make(method: str, task_name: str, model_name: str | None, seed: int) -> BaseAlgorithm:
    """
    :param method: one of ``METHODS`` or ``WITHOUT_MODEL``
    :param task_name: a key of ``TASKS``
    :param model_name: a key of ``MODELS[task_name]``
    :param seed: seed
    :return: the algorithm
    """
    task = TASKS[task_name]
    if method in ("td3", "sac"):
        # Hidden layers and discount factor are those of MPG, learning rates those of SB3, scales of the observations those of
        # the authors
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


def columns(model: BaseAlgorithm) -> dict[str, Any]:
    """
    :param model: the algorithm
    :return: of MPG, the weight of the model and the number of skipped updates
    """
    if not isinstance(model, MPG):
        return {}
    weights = model.weighting_rule(max(model._n_updates, 1))
    return {"model_weight": f"{1 - weights.get(0, 0.0):.4g}", "skipped": model.n_skipped_updates}


def run(task: str, model: str | None, method: str, seed: int, steps: int) -> None:
    """
    Train once and write the csv.

    :param task: a key of ``TASKS``
    :param model: a key of ``MODELS[task]``, or ``None`` for methods without one
    :param method: one of ``METHODS`` or ``WITHOUT_MODEL``
    :param seed: seed of the run
    :param steps: number of environment steps
    """
    path = RESULTS / "trust" / f"{task}-{model or 'no_model'}-{method}-{steps}-{seed}.csv"
    if path.exists():
        print(f"{path.name} exists, skipped")
        return
    callback = EvaluationCallback(
        lambda algorithm: evaluate(algorithm, TASKS[task], N_STARTS)[0], "steps", 250, path, extra_columns=columns
    )
    make(method, task, model, seed).learn(steps, callback=callback, log_interval=10**9)


def matrix() -> list[tuple[str, str | None, str, int, int]]:
    """
    :return: the arguments of :func:`run` for all runs: MPG, TD3 and SAC over 20,000 steps with five seeds, all other methods
        over 5000 steps with three seeds
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
