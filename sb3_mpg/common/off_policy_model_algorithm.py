import copy
import io
import pathlib
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate

from sb3_mpg.common import buffers, checks, goals, saved_settings
from sb3_mpg.common.buffers import RecordedSteps
from sb3_mpg.common.callbacks import close_evaluators
from sb3_mpg.common.compilation.step_compiler import check_compile, choose_to_compile, make_steps
from sb3_mpg.common.env_pickles import PickledWithEnv
from sb3_mpg.common.export import Exported, write_onnx
from sb3_mpg.common.files import saved_whole
from sb3_mpg.common.learners import InProcessLearner, Learners, LearnerSettings, MultiprocessLearners, TrainingInputs
from sb3_mpg.common.model_fitting import ModelFitting
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.loading import name_of
from sb3_mpg.common.models.rollout_model import ModelSettings
from sb3_mpg.common.models.trainable import TrainableModel, members_of
from sb3_mpg.common.noise import choose_action_noise, for_n_envs
from sb3_mpg.common.optimizer_steps import OptimizerSteps
from sb3_mpg.common.planned_exploration import PlansExploration, imitation_of
from sb3_mpg.common.policies import ModelBasePolicy
from sb3_mpg.common.precision import choose_matmul_precision, matmul_precision
from sb3_mpg.common.rollouts.exploration import ModelExploration
from sb3_mpg.common.settings import SettingOf
from sb3_mpg.common.spaces import make_env, wrap_env
from sb3_mpg.common.training_state import TrainingState
from sb3_mpg.common.trust import TrustReport, WeightingRule, make_trust, renew_trust
from sb3_mpg.common.units import Units
from sb3_mpg.common.update import Update, UpdateSettings
from sb3_mpg.common.utils import expected_updates, keep_freed_memory, optimizer_of
from sb3_mpg.common.value_targets import ValueTarget

SelfOffPolicyModelAlgorithm = TypeVar("SelfOffPolicyModelAlgorithm", bound="OffPolicyModelAlgorithm")


class OffPolicyModelAlgorithm(PlansExploration, PickledWithEnv, OffPolicyAlgorithm):
    """
    The base of off-policy algorithms that learn from a replay buffer and from a differentiable model. Subclasses define
    the policies, and an :class:`~sb3_mpg.common.update.Update` that computes the gradients.

    This class owns the model and its fitting, the trust in the model, the learners, the steps of the optimizers, and the
    state that makes a continued training equal to an uninterrupted one.

    :param policy: The policy model to use
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of all networks but the critics
    :param critic_learning_rate: learning rate of the critics
    :param model_settings: the prior model, and whether it is corrected
    :param weighting_rule: gives the weights of the horizons of the rollouts
    :param value_target: what the critics regress on
    :param batch_reuse: in how many updates a batch and its targets are used; as many batches take turns
    :param reward_scale: factor of all rewards, both recorded and predicted
    :param exploration_noise: standard deviation of the Gaussian noise on actions in [-1, 1] when ``action_noise`` is None
    :param model_exploration: share of start states of rollouts that may be perturbed in the model, see ``ModelExploration``
    :param model_planning: share of the exploring time in which actions are planned in the model, see ``PlansExploration``
    :param optimizer_steps: applies the gradients
    :param learner_settings: in how many processes gradients are computed
    :param compile: whether rollouts are compiled; ``"auto"`` compiles when training is long enough to repay the compile time

    The other parameters are those of ``OffPolicyAlgorithm``.

    :raises ValueError: before the first environment step, for spaces, models, or settings that cannot work
    """

    prior_model = SettingOf("model_settings")
    prior_model_kwargs = SettingOf("model_settings")
    residual_kwargs = SettingOf("model_settings")
    n_learners = SettingOf("learner_settings")
    max_staleness = SettingOf("learner_settings")
    learner_kwargs = SettingOf("learner_settings")
    max_grad_norm = SettingOf("optimizer_steps")
    max_skipped_updates = SettingOf("optimizer_steps")
    n_skipped_updates = SettingOf("optimizer_steps")
    action_space: spaces.Box
    policy: ModelBasePolicy
    replay_buffer: ReplayBuffer
    update: Update
    update_class: ClassVar[type[Update]]
    _wrap_env = staticmethod(wrap_env)

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
        critic_learning_rate: float | Schedule,
        model_settings: ModelSettings,
        weighting_rule: WeightingRule,
        value_target: ValueTarget,
        batch_reuse: int,
        reward_scale: float,
        exploration_noise: float,
        model_exploration: float,
        model_planning: float,
        optimizer_steps: OptimizerSteps,
        learner_settings: LearnerSettings,
        compile: bool | Literal["auto"],
        stats_window_size: int,
        tensorboard_log: str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: th.device | str,
    ):
        env = make_env(env, verbose)
        checks.check_policy(policy, self.policy_aliases)
        buffers.check_buffer_class(replay_buffer_class, value_target.replay_n_steps)
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
        self.critic_learning_rate = critic_learning_rate
        self.value_target = value_target
        self.batch_reuse = batch_reuse
        self.reward_scale = reward_scale
        self.exploration_noise = exploration_noise
        self.model_exploration = model_exploration
        self.model_planning = model_planning
        self.compile = compile
        self.model_settings = model_settings
        self.learner_settings = learner_settings
        self.optimizer_steps = optimizer_steps
        self.training_state = TrainingState()
        self.trust = make_trust(weighting_rule, model_settings.residual)
        # `None` unless the model is trainable
        self.model_fitting: ModelFitting | None = None

    def _check_settings(self) -> None:
        """
        Check the arguments of the constructor, or those given to ``load``.

        :raises ValueError: for impossible values
        """
        checks.check_default_dtype()
        for part in (self.learner_settings, self.model_settings, self.optimizer_steps):
            part.check()
        check_compile(self.compile)
        checks.check_number("reward_scale", self.reward_scale, 0.0, includes_low=False)
        checks.check_number("exploration_noise", self.exploration_noise, 0.0)
        for name in ("model_exploration", "model_planning", "gamma", "tau"):
            checks.check_share(name, getattr(self, name))
        for name in ("batch_size", "batch_reuse"):
            checks.check_count(name, getattr(self, name), 1)

    @th.inference_mode(mode=False)
    def _setup_model(self) -> None:
        saved_settings.assign_loaded_settings(self)
        self._check_settings()
        # The prior model may create networks
        self.set_random_seed(self.seed)
        prior = self.model_settings.find_prior(self.env, self.device, self.trust.uses_model, self.value_target)
        self.replay_buffer_class, self.replay_buffer_kwargs, self.n_steps = buffers.choose_replay_buffer(self)
        super()._setup_model()
        self._setup_update(prior)
        buffers.check_replay_buffer(self.replay_buffer, self, self.gamma)
        self.action_noise, self.training_state.own_noise = choose_action_noise(
            self.action_noise, self.training_state.own_noise, self.exploration_noise, self.action_space
        )

    def _setup_update(self, prior: PriorModel | None) -> None:
        """
        Create the update, and the objects that depend on the model.

        :param prior: the prior model, ``None`` without an environment
        """
        model = PriorModel() if prior is None else prior
        # Measured weights need a correction even when it is not used: the prior model is compared with it
        if prior is not None and self.trust.uses_model and (self.residual or self.trust.rule.needs_errors):
            model = self.model_settings.make_trainable(model, self.observation_space, self.action_space, self.device)
        state = self.training_state
        earlier = vars(self).get("update")
        self.update = self.update_class(self.policy, model, state.seed_of_updates(self.seed))
        self.update.plans.restore(state.plans.taken if earlier is None else earlier.plans.state_dict())
        self.update.batches.load_state(state.batches, self.batch_reuse, self.device)
        self.learners: Learners = InProcessLearner(self.update)
        if state.measurements is not None and "weighting_rule" not in state.unopened:
            self.trust.measurements, state.measurements = state.measurements, None
        self.trust = renew_trust(self.trust, self.trust.rule, self.residual, isinstance(prior, TrainableModel))
        self.model_fitting = ModelFitting(model) if isinstance(model, TrainableModel) else None
        if self.model_fitting is not None:
            if not self.model_fitting.restore(state.fitting):
                self.trust.forget()
            state.fitting = None
        state.batches = state.plans.taken = None
        self.model_settings.note_users(self.policy, self.trust)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        with buffers.kept_if_refused(self):
            super().load_replay_buffer(path, truncate_last_traj)
            buffers.check_replay_buffer(self.replay_buffer, self, self.gamma)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        super().set_env(env, force_reset)
        goals.follow_env(self.replay_buffer, self.env)
        self.renew_update()

    @th.inference_mode(mode=False)
    def renew_update(self) -> None:
        """
        Create the update and the model anew, because something that they depend on was replaced: the environment, the policy,
        or settings of the model. What the model learned is kept if it belongs to the new model, too.
        """
        prior = self.model_settings.find_prior(self.env, self.device, self.trust.uses_model, self.value_target)
        if self.model_fitting is not None:
            self.training_state.fitting = self.model_fitting.state()
        learners, steps = self.learners, self.update.steps  # a callback may replace something while they run
        learners.close()
        self._setup_update(prior)
        self.update.steps = copy.copy(steps)
        if isinstance(learners, MultiprocessLearners):
            self.learners = MultiprocessLearners(self.update, self.training_inputs(self.batch_size), self.learner_settings)

    def set_random_seed(self, seed: int | None = None) -> None:
        super().set_random_seed(seed)
        # A loaded algorithm keeps the seed of its updates while it is set up
        if seed is not None and "update" in vars(self):
            self.update.seed = self.training_state.update_seed = seed

    @property
    def rollout_model(self) -> PriorModel | None:
        """The model that the gradient is back-propagated through; ``None`` without an environment or without its module."""
        return None if self.env is None or not self.model_settings.is_open else self.update.model

    @property
    def weighting_rule(self) -> WeightingRule:
        """The rule that gives the weights of the horizons."""
        return self.trust.rule

    @weighting_rule.setter
    def weighting_rule(self, rule: WeightingRule) -> None:
        self.trust = renew_trust(self.trust, rule, self.residual, self.trust.is_learned)

    @property
    def residual(self) -> bool:
        """Whether the prior model is corrected by recorded transitions."""
        return self.model_settings.residual

    @residual.setter
    def residual(self, is_corrected: bool) -> None:
        self.model_settings.residual = is_corrected
        self.trust = renew_trust(self.trust, self.trust.rule, is_corrected, self.trust.is_learned)
        if self.model_fitting is not None and not self.trust.is_learned:
            self.model_fitting.use_correction(is_corrected)

    def update_settings(self, n_updates: int) -> UpdateSettings:
        """The settings of now, for the update of number ``n_updates``."""
        return UpdateSettings(
            gamma=self.gamma,
            weights=self.trust.weights(n_updates),
            trust=self.trust.in_model(n_updates),
            blind_trust=self.trust.in_blind_returns(n_updates),
            value_target=self.value_target,
            batch_reuse=self.batch_reuse,
            exploration=ModelExploration(self.model_exploration, max_steps=max(self.trust.longest_horizon, 1)),
            imitation=imitation_of(self.update.plans, self.training_state.plans, self.trust.in_model(n_updates), n_updates),
        )

    def training_inputs(self, batch_size: int) -> TrainingInputs:
        """
        :param batch_size: number of transitions
        :return: the present inputs of a gradient other than the tensors of the update; they include the statistics of
            ``VecNormalize``
        """
        goals.follow_env(self.replay_buffer, self.env)
        self.update.simulator = self.value_target.simulator_for(batch_size, self.env, self.update.simulator)
        return TrainingInputs(self.replay_buffer, batch_size, self.units(), self.update_settings)

    def units(self) -> Units:
        """Conversions between environment and networks, with the present statistics of ``VecNormalize``."""
        return Units.of(self.action_space, self.device, self.reward_scale, self._vec_normalize_env)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        saved_settings.renew_if_outdated(self)
        # Switch to train mode (this affects batch norm / dropout, and the noise of the model)
        self.policy.set_training_mode(True)
        self.update.model.train()
        inputs = self.training_inputs(batch_size)
        recorded = RecordedSteps(self.replay_buffer, inputs.units.unscale_actions, self.device)
        latest = inputs.units.normalize_observations(recorded.latest_observations())
        if any(scaler.needs_fit(len(recorded), latest) for scaler in self.update.observation_scalers):
            self.policy.fit_scales(inputs.units.normalize_observations(recorded.observations()))
        if self._n_updates == 0:
            checks.warn_of_tiny_rewards(inputs.units.scale_rewards(recorded.rewards()), self.reward_scale)
        if self.model_fitting is not None:
            self.model_fitting.prepare(recorded, self.num_timesteps, self.trust.longest_horizon)

        # Update learning rates according to their schedules
        networks, targets = self.update.networks(), self.update.target_networks()
        self._update_learning_rate([optimizer_of(network) for name, network in networks.items() if name != "critic"])
        critic_learning_rate = FloatSchedule(self.critic_learning_rate)(self._current_progress_remaining)
        update_learning_rate(optimizer_of(networks["critic"]), critic_learning_rate)
        self.logger.record("train/critic_learning_rate", critic_learning_rate)

        logs: dict[str, list[float]] = {}
        state = self.training_state
        for _ in range(gradient_steps):
            self._n_updates += 1
            self.update.steps.begin_update(self._n_updates)
            # Fit the model, and measure the errors of its gradients
            model_logs = self._improve_model(inputs, recorded)
            is_model_trusted = self.trust.prefers_model(self._n_updates)
            for module in self.update.fading:
                module.fade(is_model_trusted, at_once=not self.trust.uses_model)
            # Compute gradients, in this process or in learner processes
            result = self.learners.next_result(self._n_updates, inputs)
            # Optimize the networks, update the target networks
            if not self.optimizer_steps.apply(result, networks, targets, self.tau):
                arguments = batch_size, self.replay_buffer, inputs.units, inputs.settings_of(self._n_updates)
                self.optimizer_steps.check_skipped(partial(self.update.why_not_finite, self._n_updates, *arguments))
            state.warn_of_masks(result.share_masked, name_of(self.update.model))
            self.learners.applied(self._n_updates, inputs)
            for key, value in (model_logs | result.logs).items():
                logs.setdefault(key, []).append(value)

        n_updates = self._n_updates - state.n_updates_at_start
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/updates_per_step", n_updates / max(self.num_timesteps, 1))
        self.logger.record("train/skipped_updates", self.n_skipped_updates)
        self.learners.record(self.logger)
        for key, values in logs.items():
            self.logger.record(key, float(np.mean(values)))

    def _improve_model(self, inputs: TrainingInputs, recorded: RecordedSteps) -> dict[str, float]:
        """Fit a trainable model, and measure the errors of its gradients if a measurement is due. Returns values to log."""
        fitting = self.model_fitting
        if fitting is None:
            return {}
        loss = fitting.fit(self._n_updates, recorded)
        context = self.update.context(inputs.units, self.gamma)
        q_functions = self.update.q_functions(fitting.model.n_members)
        with members_of(fitting.model, "dealt"):
            logs = self.trust.measure(self._n_updates, context, q_functions, fitting, recorded)
        return logs if loss is None else {"model/loss": loss, **logs}

    def trust_report(self) -> TrustReport:
        """
        The measured errors of the gradients, the weights that follow from them, and the prediction errors of rollouts along
        recorded actions. Print the report, or ``plot("trust.png")``.

        :return: the report
        :raises ValueError: when there is no model, or too few steps are recorded to compare it with
        """
        saved_settings.check_has_model(self, "report on")
        is_corrected = self.model_fitting is not None and self.model_fitting.uses_correction
        recorded = RecordedSteps(self.replay_buffer, self.units().unscale_actions, self.device)
        return self.trust.report(self.update.model, is_corrected, recorded, self.gamma)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        keep_freed_memory()
        state = self.training_state
        if reset_num_timesteps:
            state.n_updates_at_start = self._n_updates
        self.action_noise = for_n_envs(self.action_noise, self.n_envs)
        setup = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        goals.prepare_goals(self)
        state.restore_rng(self.device, is_continued=not reset_num_timesteps)
        settings = self.update_settings(1)
        if reset_num_timesteps or state.compiled_after is None or self.compile != "auto":
            n_model_steps = expected_updates(self, setup[0]) * self.update.n_model_steps(settings)
            state.compiled_after = choose_to_compile(self.compile, n_model_steps, self._n_updates, self.device)
        self.update.steps = make_steps(state.compiled_after, self.update.n_rollout_rows(settings, self.batch_size))
        if self.n_learners > 0:
            self.learners = MultiprocessLearners(self.update, self.training_inputs(self.batch_size), self.learner_settings)
        return setup

    @th.inference_mode(mode=False)
    def learn(
        self: SelfOffPolicyModelAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOffPolicyModelAlgorithm:
        saved_settings.prepare_training(self)
        tb_log_name = type(self).__name__ if tb_log_name is None else tb_log_name
        try:
            with matmul_precision(choose_matmul_precision(self.policy, self.batch_size)):
                return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        finally:
            # End all processes, also after an exception
            self.update.steps.close()
            learners, self.learners = self.learners, InProcessLearner(self.update)
            try:
                learners.close()
                # The last gradients may be views of memory that is shared with learners
                self.policy.zero_grad()
            finally:
                close_evaluators(callback)

    def _store_transition(
        self, replay_buffer: ReplayBuffer, buffer_action: np.ndarray, new_obs: Any, reward: np.ndarray, *args: Any
    ) -> None:
        given = (self._last_obs, self._last_original_obs, new_obs, reward)
        self.training_state.warn_of_record(self.num_timesteps, args[-1], self._vec_normalize_env, *given)
        with self.learners.writing(replay_buffer):
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, *args)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save as SB3 does, with the states of the random number generators and of the model's fitting. After loading,
        ``learn(reset_num_timesteps=False)`` continues as if training had not been interrupted, if the replay buffer is loaded
        as well and the environment is in its earlier state. See SB3's ``save`` for the parameters.
        """
        with saved_settings.attributes_to_save(self), saved_whole(path) as file:
            super().save(file, exclude, include)

    def export_onnx(self, path: str | pathlib.Path, what: Exported = "policy") -> None:
        """
        Write the policy or the model as an ONNX file, which takes and gives the units of the environment.

        :param path: path of the file
        :param what: ``"policy"``, or ``"model"`` for one step of the model
        :raises ValueError: when there is no model, when torch cannot convert it, or when there can be no file
        """
        write_onnx(self, pathlib.Path(path), what)

    def _excluded_save_params(self) -> list[str]:
        # Created by `_setup_model`, or saved setting by setting
        created = ["update", "learners", "model_fitting", "model_settings", "learner_settings", "trust"]
        return super()._excluded_save_params() + created
