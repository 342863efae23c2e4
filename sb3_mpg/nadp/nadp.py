from typing import Any, Literal

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_mpg.common.models.loading import PriorModelLike
from sb3_mpg.mpg.mpg import ACTOR_LEARNING_RATE, CRITIC_LEARNING_RATE, MPG
from sb3_mpg.mpg.policies import MPGPolicy


class NStepADP(MPG):
    """
    n-step adaptive dynamic programming (the papers' n-step ADP): only the model policy gradient, through all actions of
    the rollout (eq. 5 of the first version), with the value target of MPG-v1.

    Paper: https://arxiv.org/abs/2102.11513 (the first version)

    :param policy: The policy model to use (MlpPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str);
        it must have a method ``make_simulator(num_agents)``
    :param n_steps: number of model steps of the policy gradient, and of simulator steps of the value target
    :param batch_reuse: in how many updates a batch and its targets are used; as many batches take turns

    The other parameters are those of :class:`~sb3_mpg.mpg.mpg.MPG`. ``policy_delay`` is 1, and the model is not corrected.
    """

    def __init__(
        self,
        policy: str | type[MPGPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = ACTOR_LEARNING_RATE,
        buffer_size: int = 500_000,
        learning_starts: int = 3000,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.98,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        critic_learning_rate: float | Schedule = CRITIC_LEARNING_RATE,
        prior_model: PriorModelLike = "auto",
        prior_model_kwargs: dict[str, Any] | None = None,
        n_steps: int = 25,
        batch_reuse: int = 10,
        max_grad_norm: float | None = 3.0,
        reward_scale: float = 1.0,
        exploration_noise: float = 0.1,
        max_skipped_updates: int = 20,
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
        super().__init__(
            policy=policy,
            env=env,
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            critic_learning_rate=critic_learning_rate,
            prior_model=prior_model,
            prior_model_kwargs=prior_model_kwargs,
            # Remove the data-driven gradient from MPG-v1 to obtain n-step ADP
            residual=False,
            horizons=(n_steps,),
            weighting="constant",
            differentiate="all_actions",
            value_target="n_step_simulator",
            value_target_kwargs={"n_steps": n_steps},
            batch_reuse=batch_reuse,
            policy_delay=1,
            max_grad_norm=max_grad_norm,
            reward_scale=reward_scale,
            exploration_noise=exploration_noise,
            max_skipped_updates=max_skipped_updates,
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
