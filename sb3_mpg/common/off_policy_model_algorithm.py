import copy
import io
import pathlib
import random
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_mpg.common.buffers import RecordedSteps
from sb3_mpg.common.callbacks import close_evaluators
from sb3_mpg.common.learners.base import InProcessLearner, Learners, LearnerSettings
from sb3_mpg.common.learners.multiprocess import MultiprocessLearners
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.checker import validate_prior_model
from sb3_mpg.common.models.loading import PriorModelLike, make_prior_model
from sb3_mpg.common.models.residual import ResidualModel
from sb3_mpg.common.models.trainable import CorrectedModel, TrainableModel, members_of
from sb3_mpg.common.models.windows import Transitions
from sb3_mpg.common.precision import DEFAULT as DEFAULT_PRECISION
from sb3_mpg.common.precision import choose_matmul_precision, matmul_precision, set_matmul_precision
from sb3_mpg.common.torch_layers import ObservationScaler
from sb3_mpg.common.type_aliases import GradientResult, Simulator, TrainingBatch
from sb3_mpg.common.units import Units
from sb3_mpg.common.checks import check_spaces, check_count, check_keywords, check_number
from sb3_mpg.common.randomness import randomness_of_update
from sb3_mpg.common.utils import keep_freed_memory
from sb3_mpg.common.value_targets import ValueTarget, make_value_target

SelfOffPolicyModelAlgorithm = TypeVar("SelfOffPolicyModelAlgorithm", bound="OffPolicyModelAlgorithm")

# A trainable model is fitted to this many steps for each of its members, once an update
FIT_BATCH_SIZE = 256
# Its scales come from at most this many
MAX_PREPARATION_STEPS = 20_000
# Before the first update it is fitted to what was recorded until then, as long as that helps with steps that were held out
MAX_PRETRAINING_STEPS = 2000
PRETRAINING_PATIENCE = 200
PRETRAINING_CHECK_EVERY = 50
# Rewards much smaller than one drown in what critics say before they have learned anything
TINY_REWARD = 1e-4
# What only rollouts show is settled by those from about as many steps
N_JUDGED_STEPS = 1000


class OffPolicyModelAlgorithm(OffPolicyAlgorithm):
    """
    The base of off-policy algorithms that learn from a replay buffer and from a differentiable model at once.

    On top of SB3's ``OffPolicyAlgorithm`` it keeps the model that the gradient is back-propagated through, the conversions
    between the units of the environment and those of the networks, the value target, the processes that compute the gradients,
    and all that makes a continued training equal to an uninterrupted one.

    :param policy: The policy model to use
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of the actor
    :param prior_model: the user's knowledge of the system: a ``PriorModel``, a class or factory of one, a dotted path
        ``"package.module:Class"``, or ``"auto"``, the model that the environment offers
    :param prior_model_kwargs: arguments of the class or factory of the prior model
    :param residual: whether the prior model is corrected by what is recorded, see ``ResidualModel``
    :param residual_kwargs: arguments of ``ResidualModel``
    :param value_target: what the critics regress on: ``"clipped_double_q"``, ``"n_step_simulator"``,
        ``"n_step_replay"``, or a ``ValueTarget``
    :param value_target_kwargs: arguments of the named value target
    :param max_grad_norm: largest norm of the gradient of each network, ``None`` for no limit
    :param reward_scale: factor of all rewards, recorded and predicted ones alike
    :param exploration_noise: standard deviation of the Gaussian noise on actions in [-1, 1] when ``action_noise`` is None
    :param max_skipped_updates: how many updates in a row may be skipped for a non-finite gradient before training stops
    :param n_learners: number of processes that compute the gradients, 0 for none but the main process
    :param max_staleness: how many updates old a gradient of theirs may be, see ``LearnerSettings``
    :param learner_kwargs: further ``LearnerSettings``

    The other parameters are those of ``OffPolicyAlgorithm``.

    :raises ValueError: before the first environment step, for spaces, models, or settings that cannot work
    """

    _model_attributes: ClassVar[list[str]] = ["rollout_model", "_simulator", "_learners", "_matmul_precision"]

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule,
        buffer_size: int,
        learning_starts: int,
        batch_size: int,
        tau: float,
        gamma: float,
        train_freq: int | tuple[int, str],
        gradient_steps: int,
        action_noise: ActionNoise | None,
        replay_buffer_class: type[ReplayBuffer] | None,
        replay_buffer_kwargs: dict[str, Any] | None,
        optimize_memory_usage: bool,
        prior_model: PriorModelLike,
        prior_model_kwargs: dict[str, Any] | None,
        residual: bool,
        residual_kwargs: dict[str, Any] | None,
        value_target: str | ValueTarget,
        value_target_kwargs: dict[str, Any] | None,
        max_grad_norm: float | None,
        reward_scale: float,
        exploration_noise: float,
        max_skipped_updates: int,
        n_learners: int,
        max_staleness: int | None,
        learner_kwargs: dict[str, Any] | None,
        stats_window_size: int,
        tensorboard_log: str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: th.device | str,
    ):
        env = None if env is None else maybe_make_env(env, verbose)
        if env is not None:
            check_spaces(env.observation_space, env.action_space)
        self.value_target = make_value_target(value_target, value_target_kwargs)
        if self.value_target.replay_n_steps > 1 and not (
            replay_buffer_class is None or issubclass(replay_buffer_class, NStepReplayBuffer)
        ):
            raise ValueError(
                f"The value target spans {self.value_target.replay_n_steps} recorded steps and needs an NStepReplayBuffer, "
                f"got replay_buffer_class={replay_buffer_class.__name__}; leave it at None."
            )
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]  # None when loading for predictions
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            support_multi_env=True,
        )
        self.prior_model = prior_model
        self.prior_model_kwargs = prior_model_kwargs
        self.residual = residual
        self.residual_kwargs = residual_kwargs
        self._model_state: dict[str, Any] | None = None
        # How many steps were recorded when the model was last prepared for them, or found to be
        self._n_prepared_for = 0
        self.max_grad_norm = max_grad_norm
        self.reward_scale = reward_scale
        self.exploration_noise = exploration_noise
        self.max_skipped_updates = max_skipped_updates
        self.n_learners = n_learners
        self.max_staleness = max_staleness
        self.learner_kwargs = learner_kwargs
        # While `learn` runs
        self._learners: Learners | None = None
        self._matmul_precision = DEFAULT_PRECISION
        # What the random numbers of an update are drawn from, and its number
        self._update_seed: int | None = None
        #: The model that the gradient is back-propagated through
        self.rollout_model: PriorModel | None = None
        self.n_skipped_updates = 0
        self._n_updates_at_start = 0
        self._n_skipped_in_a_row = 0
        self._has_warned_of_records = False
        self._simulator: Simulator | None = None
        self._rng_state: dict[str, Any] | None = None
        # Standard deviation of the action noise if it is not the user's
        self._own_noise: float | None = None

    def _check_settings(self) -> None:
        """
        Of the constructor, or given to ``load``.

        :raises ValueError: for values that make no sense
        """
        LearnerSettings.of(self.n_learners, self.max_staleness, self.learner_kwargs)
        if not isinstance(self.residual, bool):
            raise ValueError(f"`residual` says whether the model is corrected, True or False, got {self.residual!r}.")
        check_keywords("residual_kwargs", self.residual_kwargs, ResidualModel, "prior", "n_states", "n_actions")
        check_number("reward_scale", self.reward_scale, 0.0, includes_low=False)
        check_number("exploration_noise", self.exploration_noise, 0.0)
        for name, low in (("max_skipped_updates", 0), ("batch_size", 1)):
            check_count(name, getattr(self, name), low)
        for name in ("gamma", "tau"):
            share = getattr(self, name)
            check_number(name, share, 0.0)
            if share > 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {share!r}.")
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, 0.0, includes_low=False)

    def _setup_model(self) -> None:
        self._check_settings()
        # As text when given to `load`, which makes its arguments an attribute
        self.value_target = make_value_target(self.value_target, vars(self).pop("value_target_kwargs", None))
        if self.env is not None:
            # A class of models makes its networks here
            self.set_random_seed(self.seed)
            self._setup_rollout_model()
        self._choose_replay_buffer()
        super()._setup_model()
        if self._update_seed is None:
            self._update_seed = int(np.random.randint(2**31 - 1)) if self.seed is None else self.seed
        if self.rollout_model is not None:
            # After the seed was set
            self.rollout_model = self._make_trainable(self.rollout_model)
        self._check_replay_buffer()
        if self._own_noise is not None and self._own_noise != self.exploration_noise:
            # Given to `load`, perhaps together with a noise
            noise = self.action_noise.base_noise if isinstance(self.action_noise, VectorizedActionNoise) else self.action_noise
            if repr(noise) == repr(self._gaussian_noise(self._own_noise)):
                self.action_noise = None
            self._own_noise = None
        if self.action_noise is None and self.exploration_noise > 0:
            self._own_noise = self.exploration_noise
            self.action_noise = self._gaussian_noise(self.exploration_noise)

    def _gaussian_noise(self, std: float) -> NormalActionNoise:
        n_actions = self.action_space.shape[0]  # type: ignore[index]
        return NormalActionNoise(np.zeros(n_actions), std * np.ones(n_actions))

    def _choose_replay_buffer(self) -> None:
        """
        Let SB3 choose the replay buffer by the value target. A class of the user's is the user's to configure, and is checked
        once it is there. What is loaded has SB3's own choice, for the value target of then, and SB3 would take it for the
        user's. It is the user's where it spans several steps without SB3's setting for that.
        """
        if self.replay_buffer_class is NStepReplayBuffer and self.n_steps > 1:
            self.replay_buffer_class = None
            names = ("n_steps", "gamma")
            self.replay_buffer_kwargs = {k: v for k, v in self.replay_buffer_kwargs.items() if k not in names}
        if self.replay_buffer_class in (None, ReplayBuffer):
            self.replay_buffer_class = None
            self.n_steps = self.value_target.replay_n_steps

    def _check_replay_buffer(self) -> None:
        """
        :raises ValueError: when the replay buffer is of other spaces, or adds up rewards over other steps than the target
        """
        buffer = self.replay_buffer
        assert buffer is not None
        for name in ("observation_space", "action_space"):
            shape, expected = getattr(buffer, name).shape, getattr(self, name).shape
            if shape != expected:
                raise ValueError(f"The {name} of the replay buffer has the shape {shape}, that of the algorithm {expected}.")
        n_steps = self.value_target.replay_n_steps
        of_buffer = getattr(buffer, "n_steps", 1), getattr(buffer, "gamma", self.gamma)
        if of_buffer != (n_steps, self.gamma):
            raise ValueError(
                f"The value target spans {n_steps} recorded steps with gamma={self.gamma}, but the replay buffer was made for "
                f"n_steps={of_buffer[0]}, gamma={of_buffer[1]}. One of a class of yours gets them by `replay_buffer_kwargs`; "
                "one that was saved fits the value target and the discount that it was saved with."
            )

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file.

        :param path: Path to the pickled replay buffer.
        :param truncate_last_traj: When using ``HerReplayBuffer`` with online sampling, whether the last trajectory is cut.
        :raises ValueError: when it is of other spaces, or of a value target that spans another number of steps
        """
        super().load_replay_buffer(path, truncate_last_traj)
        self._check_replay_buffer()

    def _needs_prior_model(self) -> bool:
        """
        :return: whether the model is ever stepped
        """
        return True

    def _setup_rollout_model(self) -> None:
        """Find the prior model and check, before anything is stepped, that it and the environment can be learned with."""
        assert self.env is not None
        if self._needs_prior_model():
            model = make_prior_model(self.prior_model, self.env, self.prior_model_kwargs).to(self.device)
            try:
                validate_prior_model(model, self.observation_space, self.action_space, self.device)
            except ValueError as error:
                if self.prior_model != "auto":
                    raise
                raise ValueError(
                    f"{error}\nThe model is the environment's own (prior_model='auto') and knows nothing of wrappers around "
                    "it: if there are any, pass a model of what they make of it."
                ) from error
        else:
            model = PriorModel()
        self.rollout_model = model
        self._simulator = None
        self._warn_of_wrappers()
        if self.value_target.needs_simulator and not self.env.has_attr("make_simulator"):
            raise ValueError(
                "The value target runs the policy in the simulator from recorded states, but the environment has no method "
                "`make_simulator(num_agents)` and cannot be put into a state; use MPG with value_target='n_step_replay' (and "
                "horizons=(0,), weighting='constant' to do without a model)."
            )

    def _needs_trainable_model(self) -> bool:
        """
        :return: whether a model is fitted to the recorded steps, be it used or only compared with
        """
        return self._needs_prior_model() and self.residual

    def _make_trainable(self, model: PriorModel) -> PriorModel:
        """
        :param model: the prior model
        :return: it, with a correction around it if one is needed, as far as that was learned before
        """
        if self._needs_trainable_model() and not isinstance(model, TrainableModel):
            observation = th.zeros(1, *self.observation_space.shape, device=self.device)  # type: ignore[misc]
            n_states = model.state_from_observation(observation).shape[1]
            n_actions = self.action_space.shape[0]  # type: ignore[index]
            residual = ResidualModel(model, n_states, n_actions, **(self.residual_kwargs or {})).to(self.device)
            model = residual
        if isinstance(model, CorrectedModel):
            model.use_correction(self.residual)
        if isinstance(model, TrainableModel) and self._model_state is not None:
            if model.load_learned_state(self._model_state):
                return model
            if self._n_prepared_for > 0:
                warnings.warn(
                    "What was learned of another model is forgotten; what is missed by this one is learned from the replay "
                    "buffer before the next update."
                )
            self._forget_model()
        return model

    def _forget_model(self) -> None:
        """As before anything was learned of the model."""
        self._model_state, self._n_prepared_for = None, 0

    def _recorded_steps(self, units: Units) -> RecordedSteps:
        assert self.replay_buffer is not None
        return RecordedSteps(self.replay_buffer, units.unscale_actions, self.device)

    def _prepare_model(self, units: Units) -> None:
        """
        Before the first update: scale a trainable model by the steps recorded so far, and fit it to them. And once more
        when twice as many are recorded, if these are not what the first ones promised. What only rollouts show is settled
        each time.

        :param units: conversions between environment and networks
        """
        model = self.rollout_model
        assert self.replay_buffer is not None
        n_held = self.replay_buffer.size() * self.replay_buffer.n_envs
        # Of which a small buffer holds the last ones
        n_recorded = max(n_held, self.num_timesteps)
        if not isinstance(model, TrainableModel) or n_recorded < 2 * self._n_prepared_for:
            return
        if n_held < self._n_prepared_for and not self.replay_buffer.full:
            return  # training goes on without the replay buffer of before, and what is there says less
        recorded = self._recorded_steps(units)
        known = recorded.latest(MAX_PREPARATION_STEPS)
        if known is None:
            return
        is_first, self._n_prepared_for = self._n_prepared_for == 0, n_recorded
        if is_first or model.needs_rescaling(known):
            self._adapt_model(model, recorded, known)
        windows = recorded.windows(N_JUDGED_STEPS, self._longest_rollout())
        if windows is not None:
            model.tune_on_rollouts(windows)

    def _longest_rollout(self) -> int:
        """
        :return: the largest number of model steps of a gradient
        """
        raise NotImplementedError

    def _adapt_model(self, model: TrainableModel, recorded: RecordedSteps, known: Transitions) -> None:
        """
        :param model: what is scaled and fitted
        :param recorded: the recorded steps
        :param known: those that its scales come from
        """
        model.train()
        model.rescale(known)
        best_error, best_step = float("inf"), 0
        for step in range(MAX_PRETRAINING_STEPS):
            self._fit_model(recorded)
            if step % PRETRAINING_CHECK_EVERY == 0:
                error = self._validation_error(recorded)
                if error is not None and error < 0.98 * best_error:
                    best_error, best_step = error, step
                elif step - best_step >= PRETRAINING_PATIENCE:
                    break

    def _fit_model(self, recorded: RecordedSteps) -> float | None:
        """
        :param recorded: what a trainable model is fitted to, by one step of its optimizer
        :return: the loss
        """
        assert isinstance(self.rollout_model, TrainableModel)
        batch = recorded.sample(FIT_BATCH_SIZE * self.rollout_model.n_members)
        return None if batch is None else self.rollout_model.fit(batch)

    def _validation_error(self, recorded: RecordedSteps) -> float | None:
        """
        :param recorded: the recorded steps
        :return: the error of a trainable model in steps that were held out, ``None`` while there is none
        """
        assert isinstance(self.rollout_model, TrainableModel)
        held_out = self._held_out_steps(recorded)
        return None if held_out is None else self.rollout_model.validation_error(held_out)

    @staticmethod
    def _held_out_steps(recorded: RecordedSteps) -> Transitions | None:
        """
        :param recorded: the recorded steps
        :return: some that the model is not fitted to, ``None`` while there is none
        """
        return recorded.sample(FIT_BATCH_SIZE, held_out=True)

    def _warn_of_wrappers(self) -> None:
        """The environment's own model and simulator know nothing of the wrappers around it."""
        assert self.env is not None
        from_inside = {"prior_model='auto'": self._needs_prior_model() and self.prior_model == "auto"}
        from_inside[f"{type(self.value_target).__name__}"] = self.value_target.needs_simulator
        wrappers = (gym.ActionWrapper, gym.ObservationWrapper, gym.RewardWrapper, gym.wrappers.NormalizeReward)
        if any(from_inside.values()) and any(any(self.env.env_is_wrapped(wrapper)) for wrapper in wrappers):
            users = " and ".join(name for name, is_used in from_inside.items() if is_used)
            warnings.warn(
                f"A wrapper changes the actions, observations or rewards of the environment, but {users} speaks the units of "
                "the environment below it. If they differ, pass a model in the units of the wrapper, or use VecNormalize."
            )

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Change the environment, and with it the model and the simulator that it offers.

        :param env: The environment for learning a policy
        :param force_reset: Force call to ``reset()`` before training to avoid unexpected behavior.
        """
        super().set_env(env, force_reset)
        if isinstance(self.rollout_model, TrainableModel):
            self._model_state = self.rollout_model.learned_state()
        self._setup_rollout_model()
        self.rollout_model = self._make_trainable(self.rollout_model)  # type: ignore[arg-type]

    def _make_simulator(self, num_agents: int) -> Simulator:
        """
        :param num_agents: size of the batch
        :return: a simulator, the same one at each call
        """
        if self._simulator is None or self._simulator.num_agents != num_agents:
            assert self.env is not None, "There is no environment to make a simulator"
            self._simulator = self.env.env_method("make_simulator", num_agents, indices=[0])[0]
        assert self._simulator is not None
        return self._simulator

    def _units(self) -> Units:
        """
        :return: the conversions between environment and networks, with the present statistics of ``VecNormalize``
        """
        assert isinstance(self.action_space, spaces.Box)
        return Units.of(self.action_space, self.device, self.reward_scale, self._vec_normalize_env)

    def _warn_of_tiny_rewards(self, units: Units) -> None:
        assert self.replay_buffer is not None
        rewards = th.as_tensor(self.replay_buffer.rewards[: self.replay_buffer.size()], dtype=th.float32, device=self.device)
        size = units.scale_rewards(rewards).square().mean().sqrt().item()
        if 0 < size < TINY_REWARD:
            warnings.warn(
                f"The rewards recorded so far are of the size {size:.2g}, in which critics learn slowly or not at all: set "
                f"`reward_scale` to about {self.reward_scale / size:.0e}, or use VecNormalize."
            )

    def _fit_observation_scalers(self, units: Units) -> None:
        """Let the features extractors that want to know see the observations that were gathered before the first update."""
        scalers = [module for module in self.policy.modules() if isinstance(module, ObservationScaler)]
        if not scalers:
            return
        assert self.replay_buffer is not None
        stored = self.replay_buffer.observations[: self.replay_buffer.size()]
        observations = th.as_tensor(stored.reshape(-1, *stored.shape[2:]), dtype=th.float32, device=self.device)
        for scaler in scalers:
            scaler.fit(units.normalize_observations(observations))

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        keep_freed_memory()
        if reset_num_timesteps:
            self._n_updates_at_start = self._n_updates
        if isinstance(self.action_noise, VectorizedActionNoise) and self.action_noise.n_envs != self.n_envs:
            # Loaded with another number of environments
            self.action_noise = VectorizedActionNoise(self.action_noise.base_noise, self.n_envs)
        setup = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if not reset_num_timesteps and self._rng_state is not None:
            self._restore_rng_state(self._rng_state)
        self._rng_state = None
        settings = LearnerSettings.of(self.n_learners, self.max_staleness, self.learner_kwargs)
        self._learners = MultiprocessLearners(self, settings) if settings.n_learners > 0 else InProcessLearner(self)
        return setup

    def learn(
        self: SelfOffPolicyModelAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOffPolicyModelAlgorithm:
        self._matmul_precision = choose_matmul_precision(self.policy, self.batch_size)
        try:
            with matmul_precision(self._matmul_precision):
                return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        finally:
            # However training ends, no process is left
            learners, self._learners = self._learners, None
            try:
                if learners is not None:
                    learners.close()
                    # The last gradients may be views of memory that learners shared
                    self.policy.zero_grad()
            finally:
                close_evaluators(callback)

    def _store_transition(
        self, replay_buffer: ReplayBuffer, buffer_action: np.ndarray, new_obs: Any, reward: np.ndarray, *args: Any
    ) -> None:
        if not self._has_warned_of_records and not (np.isfinite(new_obs).all() and np.isfinite(reward).all()):
            self._has_warned_of_records = True
            warnings.warn(
                f"The environment gave an observation or a reward that is not finite (step {self.num_timesteps}). It is "
                "recorded, and updates that sample it may be skipped. gymnasium.utils.env_checker.check_env and "
                "stable_baselines3's VecCheckNan help to find out where it is from."
            )
        with nullcontext() if self._learners is None else self._learners.writing():
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, *args)

    def _sample_batch(self, n_updates: int, batch_size: int, units: Units) -> TrainingBatch:
        """
        :param n_updates: number of the update
        :param batch_size: number of transitions
        :param units: conversions between environment and networks
        :return: transitions with their value targets
        """
        raise NotImplementedError

    def compute_gradients(self, batch: TrainingBatch, n_updates: int, units: Units) -> GradientResult:
        """
        The gradients of one update; nothing is changed.

        :param batch: transitions with their value targets
        :param n_updates: number of the update
        :param units: conversions between environment and networks
        :return: the gradients
        """
        raise NotImplementedError

    def gradients_of_update(self, n_updates: int, batch_size: int, units: Units) -> GradientResult:
        """
        What a learner does, in the main process or in one of its own: sample a batch and compute the gradients.

        :param n_updates: number of the update, which its random numbers follow from
        :param batch_size: number of transitions
        :param units: conversions between environment and networks
        :return: the gradients
        """
        assert self._update_seed is not None and self.rollout_model is not None
        with randomness_of_update(self._update_seed, n_updates, self.device), members_of(self.rollout_model, "dealt"):
            return self.compute_gradients(self._sample_batch(n_updates, batch_size, units), n_updates, units)

    def gradient_template(self) -> GradientResult:
        """
        :return: tensors of the shapes and types of the gradients
        """
        raise NotImplementedError

    def published_tensors(self) -> list[th.Tensor]:
        """
        :return: what changes while training, or may be changed by a callback, and gradients depend on: the networks, their
            targets, and the model
        """
        assert self.rollout_model is not None
        modules: list[th.nn.Module] = [self.policy, self.rollout_model]
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def published_attributes(self) -> dict[str, Any]:
        """
        :return: small attributes of the same kind
        """
        return {"gamma": self.gamma}

    def take_published(self, attributes: dict[str, Any]) -> None:
        """
        Called on a replica, when its tensors have the published values.

        :param attributes: those published
        """
        vars(self).update(attributes)
        if isinstance(self.rollout_model, TrainableModel):
            self.rollout_model.refresh()

    def make_replica(self: SelfOffPolicyModelAlgorithm) -> SelfOffPolicyModelAlgorithm:
        """
        :return: the algorithm as far as a learner needs it, to be sent to another process
        :raises ValueError: when gradients computed in another process would not be those of this one
        """
        if any(isinstance(module, th.nn.modules.batchnorm._NormBase) for module in self.policy.modules()):
            raise ValueError("Batch normalisation gathers statistics with each gradient, which needs n_learners=0.")
        replica = object.__new__(type(self))
        excluded = {*self._excluded_save_params(), "prior_model", "prior_model_kwargs", "_model_state", "_rng_state"}
        replica.__dict__ = {name: value for name, value in vars(self).items() if name not in excluded}
        replica.policy, replica.rollout_model, replica.device = self.policy, self.rollout_model, self.device
        replica._matmul_precision = self._matmul_precision
        replica.env = replica._vec_normalize_env = None
        # A learner cannot ask the environment
        replica._simulator = self._make_simulator(self.batch_size) if self.value_target.needs_simulator else None
        return replica

    def setup_replica(self) -> None:
        """Called on a replica, in the process of the learner."""
        keep_freed_memory()
        set_matmul_precision(self._matmul_precision)
        assert self.rollout_model is not None
        self.policy.set_training_mode(True)
        self.rollout_model.train()

    def _restore_rng_state(self, state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        th.set_rng_state(state["torch"])
        if state["cuda"] is not None and th.cuda.is_available():
            th.cuda.set_rng_state(state["cuda"], self.device)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save as SB3 does, with the states of the random number generators: ``learn(reset_num_timesteps=False)`` after
        loading goes on as if training had not been interrupted (with the replay buffer loaded, and the environment in
        the state in which it was).

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        portable = self._portable_attributes()
        replaced = {name: getattr(self, name) for name in (*portable, "_rng_state")}
        if self._rng_state is None:
            self._rng_state = {
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": th.get_rng_state(),
                "cuda": th.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            }
        try:
            self.__dict__.update(portable)
            super().save(path, exclude, include)
        finally:
            self.__dict__.update(replaced)

    def _portable_attributes(self) -> dict[str, Any]:
        """
        :return: what is saved instead of attributes that hold tensors, so that a file of a GPU can be read without one
        """
        portable: dict[str, Any] = {}
        if isinstance(self.prior_model, th.nn.Module):
            portable["prior_model"] = copy.deepcopy(self.prior_model).cpu()
        if isinstance(self.rollout_model, TrainableModel):
            portable["_model_state"] = self.rollout_model.learned_state()
        return portable

    def _excluded_save_params(self) -> list[str]:
        return super()._excluded_save_params() + self._model_attributes
