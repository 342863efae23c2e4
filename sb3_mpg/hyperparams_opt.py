"""Samplers of hyperparameters for RL Zoo's optimization with Optuna."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


def _sample_common(trial: "optuna.Trial") -> dict[str, Any]:
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    batch_size_pow = trial.suggest_int("batch_size_pow", 5, 9)
    # Display true values
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    trial.set_user_attr("batch_size", 2**batch_size_pow)
    return {
        "one_minus_gamma": one_minus_gamma,
        "batch_size_pow": batch_size_pow,
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.002, log=True),
        "critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-5, 0.002, log=True),
        "tau": trial.suggest_float("tau", 0.001, 0.08, log=True),
        "exploration_noise": trial.suggest_float("exploration_noise", 0.0, 0.5),
    }


def _sample_mpg(trial: "optuna.Trial") -> dict[str, Any]:
    return {"horizon": trial.suggest_int("horizon", 1, 40), "policy_delay": trial.suggest_int("policy_delay", 1, 3)}


def _sample_dvpg(trial: "optuna.Trial") -> dict[str, Any]:
    return {"n_horizons": trial.suggest_int("n_horizons", 2, 6), "lambda_": trial.suggest_float("lambda_", 0.1, 0.9)}


def _sample_n_step(trial: "optuna.Trial") -> dict[str, Any]:
    return {"n_steps": trial.suggest_int("n_steps", 1, 40), "batch_reuse": trial.suggest_int("batch_reuse", 1, 20)}


def sample_params(
    sample_own: Callable[["optuna.Trial"], dict[str, Any]],
    trial: "optuna.Trial",
    n_actions: int,
    n_envs: int,
    additional_args: dict[str, Any],
) -> dict[str, Any]:
    """
    Sampler of hyperparameters, as RL Zoo calls it.

    :param sample_own: samples those of one algorithm
    :param trial: Optuna trial
    :param n_actions: number of action dimensions, not used
    :param n_envs: number of environments, not used
    :param additional_args: whether the replay buffer is a ``HerReplayBuffer``, and its arguments
    :return: arguments of the constructor
    """
    hyperparams = convert_params({**_sample_common(trial), **sample_own(trial)})
    if not additional_args.get("using_her_replay_buffer"):
        return hyperparams
    # Only RL Zoo calls this function
    from rl_zoo3.hyperparams_opt import sample_her_params

    return sample_her_params(trial, hyperparams, additional_args["her_kwargs"])


def convert_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: hyperparameters as a sampler draws them
    :return: arguments of the constructor, which can be written to a YAML file
    """
    hyperparams = sampled_params.copy()
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    hyperparams["batch_size"] = 2 ** hyperparams.pop("batch_size_pow")
    if "horizon" in hyperparams:
        hyperparams["horizons"] = [0, hyperparams.pop("horizon")]
    if "n_horizons" in hyperparams:
        hyperparams["horizons"] = [*range(hyperparams.pop("n_horizons"))]
        hyperparams["weighting_kwargs"] = {"lambda_": hyperparams.pop("lambda_")}
    return hyperparams


SAMPLERS = {
    "mpg": partial(sample_params, _sample_mpg),
    "ndpg": partial(sample_params, _sample_n_step),
    "nadp": partial(sample_params, _sample_n_step),
    "dvpg": partial(sample_params, _sample_dvpg),
}
