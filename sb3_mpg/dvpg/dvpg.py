from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import nn

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.loading import PriorModelLike
from sb3_mpg.common.trust.weighting import WeightingRule
from sb3_mpg.dvpg.policies import DVPGPolicy, MlpPolicy, MultiInputPolicy
from sb3_mpg.dvpg.update import DVPGUpdate
from sb3_mpg.mpg.mpg import MPG
from sb3_mpg.mpg.update import MPGUpdateSettings

# Two hidden layers of 64 ReLU units with an L2 penalty, whose factor the paper does not give
PAPER_NETWORK = {"n_members": 1, "net_arch": (64, 64), "activation_fn": nn.ReLU, "weight_decay": 1e-4}
PAPER_MODEL = {"distribution": "deterministic", **PAPER_NETWORK}


class DVPG(MPG):
    r"""
    Deterministic Value-Policy Gradient (DVPG): a weighted mean of the deterministic policy gradients of all horizons 0 to t,
    back-propagated through learned deterministic dynamics, with weights :math:`(1 - \lambda) \lambda^k`.

    Paper: https://arxiv.org/abs/1909.03939

    Settings give the paper's other algorithms: ``horizons=(k,)`` is DVG(k), the same with ``terminal_value=False`` is DVGF(k),
    and ``horizons=(0,)`` is DDPG.

    Differences from the paper, which leaves some of it open: the model predicts the change of the state and is fitted until it
    has converged before the first update; terminations end rollouts and targets; weights are divided by their sum, which is
    :math:`1 - \lambda^{t + 1}`. The documentation lists all of them.

    :param policy: The policy model to use (MlpPolicy, or MultiInputPolicy for observations of several parts)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param prior_model: ``"learned"`` dynamics (see ``DynamicsModel``), or as in MPG
    :param prior_model_kwargs: arguments of the model. For learned dynamics, they replace some of the paper's
    :param horizons: numbers of model steps of the gradients that are mixed, 0 to 1 or 0 to 2 in the paper
    :param weighting: how they are weighted, as in MPG. ``"measured"`` needs two members of the model and two critics
    :param weighting_kwargs: arguments of the named weighting rule; ``lambda_`` is 0.1 by default, as in the paper
    :param terminal_value: whether rollouts end with the critic's value

    The other parameters are those of :class:`~sb3_mpg.mpg.mpg.MPG`.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy, "MultiInputPolicy": MultiInputPolicy}
    update: DVPGUpdate
    update_class = DVPGUpdate

    def __init__(
        self,
        policy: str | type[DVPGPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1000,
        batch_size: int = 128,
        tau: float = 0.01,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        critic_learning_rate: float | Schedule = 1e-3,
        prior_model: PriorModelLike = "learned",
        prior_model_kwargs: dict[str, Any] | None = None,
        horizons: Sequence[int] = (0, 1),
        weighting: str | WeightingRule = "geometric",
        weighting_kwargs: dict[str, Any] | None = None,
        terminal_value: bool = True,
        reward_scale: float = 1.0,
        exploration_noise: float = 0.1,
        n_learners: int = 0,
        max_staleness: int | None = None,
        learner_kwargs: dict[str, Any] | None = None,
        compile: bool | Literal["auto"] = "auto",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        self.terminal_value = terminal_value
        if prior_model == "learned":
            prior_model_kwargs = {**PAPER_MODEL, **(prior_model_kwargs or {})}
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class,
            replay_buffer_kwargs,
            optimize_memory_usage,
            n_steps,
            critic_learning_rate=critic_learning_rate,
            prior_model=prior_model,
            prior_model_kwargs=(
                {**PAPER_MODEL, **(prior_model_kwargs or {})} if prior_model == "learned" else prior_model_kwargs
            ),
            horizons=horizons,
            weighting=weighting,
            weighting_kwargs={"lambda_": 0.1} if weighting == "geometric" and weighting_kwargs is None else weighting_kwargs,
            value_target_kwargs={"noise_std": 0.0},
            policy_delay=1,
            max_grad_norm=None,
            reward_scale=reward_scale,
            exploration_noise=exploration_noise,
            model_exploration=0.0,
            model_planning=0.0,
            n_learners=n_learners,
            max_staleness=max_staleness,
            learner_kwargs=learner_kwargs,
            compile=compile,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _setup_update(self, prior: PriorModel | None) -> None:
        super()._setup_update(prior)
        self.update.terminal_value = self.terminal_value

    def update_settings(self, n_updates: int) -> MPGUpdateSettings:
        settings = super().update_settings(n_updates)
        # In the paper, the model has weight in the policy gradient alone
        return settings if self.trust.rule.needs_errors else replace(settings, trust=0.0)
