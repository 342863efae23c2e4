import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import (
    FloatSchedule,
    LinearSchedule,
    get_parameters_by_name,
    polyak_update,
    update_learning_rate,
)
from stable_baselines3.td3.policies import Actor

from sb3_mpg.common.balance import balanced_mse_loss, rollout_value_loss
from sb3_mpg.common.buffers import RecordedSteps
from sb3_mpg.common.compilation.step_compiler import StepCompiler
from sb3_mpg.common.trust.gradient_errors import (
    GradientErrors,
    action_gradients,
    measure_gradient_errors,
    misjudges_ends,
    warn_of_errors,
)
from sb3_mpg.common.learners.base import InProcessLearner
from sb3_mpg.common.rollouts.model_rollout import (
    NEGLIGIBLE_WEIGHT,
    Advance,
    PolicyGradient,
    QFunction,
    advance,
    explore_in_model,
    first_non_finite_step,
    hold,
    mixed_policy_gradient,
)
from sb3_mpg.common.models.loading import PriorModelLike, name_of
from sb3_mpg.common.models.windows import MIN_WINDOWS
from sb3_mpg.common.models.trainable import CorrectedModel, TrainableModel, members_of
from sb3_mpg.common.off_policy_model_algorithm import OffPolicyModelAlgorithm
from sb3_mpg.common.torch_layers import ObservationScaler
from sb3_mpg.common.trust.report import Measurement, TrustReport, make_trust_report
from sb3_mpg.common.type_aliases import Differentiate, GradientResult, TrainingBatch
from sb3_mpg.common.units import Units
from sb3_mpg.common.checks import check_count, check_number
from sb3_mpg.common.randomness import randomness_of_update
from sb3_mpg.common.utils import clip_norm, gradient_of, polyak_update_all, trainable_parameters
from sb3_mpg.common.value_targets import ValueTarget, target_values_of
from sb3_mpg.common.trust.weighting import WeightingRule, check_horizons, make_weighting_rule
from sb3_mpg.mpg.policies import MlpPolicy, MPGPolicy

SelfMPG = TypeVar("SelfMPG", bound="MPG")

# Table VI of the first version
ACTOR_LEARNING_RATE = LinearSchedule(3e-4, 3e-6, 1.0)
CRITIC_LEARNING_RATE = LinearSchedule(8e-4, 8e-6, 1.0)
# Compiling takes 10 to 20 seconds and saves 1 to 3 milliseconds for each model step of a batch (benchmarks/speed.py)
COMPILE_FROM_MODEL_STEPS = 15_000
# The errors of the gradients are measured at so many states, once in so many updates
N_MEASURED_STATES = 128
MEASURE_EVERY = 20
# The model is explored up to so many steps away from recorded states, with noise of this standard deviation on the action,
# and no further from all that is in the batch than so many times its width, in any dimension (`ResidualModel` keeps to half of
# that by itself)
MAX_EXPLORED_STEPS = 10
EXPLORED_NOISE = 1.0
EXPLORED_MARGIN = 1.0
# Sines and cosines of the observations fade to this amplitude while no model is trusted; from 0 to 1 takes so many updates
UNTRUSTED_AMPLITUDE = 0.3
N_FADING_UPDATES = 500
# The report is about that many of the steps recorded last
N_REPORTED_STEPS = 5000


def check_differentiate(differentiate: Differentiate) -> None:
    """
    :param differentiate: which actions carry the gradient
    :raises ValueError: when it is no such thing
    """
    if differentiate not in ("first_action", "all_actions"):
        raise ValueError(f"`differentiate` must be 'first_action' or 'all_actions', got {differentiate!r}.")


class MPG(OffPolicyModelAlgorithm):
    """
    Mixed Policy Gradient (MPG): the gradient of the learned Q function and the gradient that is back-propagated through
    a differentiable model, mixed.

    Paper: https://arxiv.org/abs/2102.11513 (the first version and its revision)
    Original implementation: https://github.com/idthanm/mpg

    Beyond the papers, and by default, the model is corrected by what is recorded (``residual``), and the gradients are
    weighted by their measured errors (``weighting="measured"``) instead of by the clock. As far as these weights trust the
    corrected model, states count alike in the losses of policy and critics, whatever the size of their gradients and values
    (see ``sb3_mpg.common.balance``), the critics regress on the returns of the policy's rollouts, too, and up to half of the
    states of a policy update are explored in the model (``model_exploration``); without trust an update is that of the
    data-driven gradient. A model that does not know where episodes terminate is left out, unless the replay buffer does not
    tell terminations from time limits (``handle_timeout_termination=False``). MPG-v2 of the papers is
    ``residual=False, weighting="rule_based", learning_starts=3000``, and MPG-v1 the same with
    ``value_target="n_step_simulator", batch_reuse=10``; the other defaults are those of Table VI. Networks see sines and
    cosines of the observations unless ``policy_kwargs`` leaves them out (see ``ObservationScaler``). Differences from the
    papers: both gradients of an update are computed at the same parameters (as the papers' learners do, and unlike TD3,
    whose actor sees the critic just updated); recorded targets bootstrap behind truncations and not behind terminations.

    :param policy: The policy model to use (MlpPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of the actor, a number or a function of the progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps to collect transitions for, with random actions, before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
    :param gamma: the discount factor
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``)
        Set to ``-1`` means to do as many gradient steps as steps done in the environment during the rollout.
    :param action_noise: the action noise type; ``None`` stands for Gaussian noise of ``exploration_noise``
    :param replay_buffer_class: Replay buffer class to use. If ``None``, it will be automatically selected.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer
    :param critic_learning_rate: learning rate of the critics
    :param prior_model: what is known about the system: a ``PriorModel``, a class or factory of one, a dotted path
        ``"package.module:Class"``, or ``"auto"``, the model that the environment offers with a method ``prior_model()``
    :param prior_model_kwargs: arguments of the class or factory of the prior model
    :param residual: whether the model is corrected by what is recorded, see ``ResidualModel``
    :param residual_kwargs: arguments of ``ResidualModel``
    :param horizons: numbers of model steps that are mixed; 0 is the data-driven gradient
    :param weighting: how the horizons are weighted: by the ``"measured"`` errors of their gradients, ``"rule_based"`` (the
        papers'), ``"constant"``, ``"geometric"``, or a ``WeightingRule``
    :param weighting_kwargs: arguments of the named weighting rule
    :param differentiate: which actions of the model rollout carry the gradient: ``"first_action"`` is the unified policy
        gradient (eq. 6), ``"all_actions"`` the model policy gradient (eq. 5 of the first version), in which states are not
        balanced
    :param value_target: what the critics regress on: ``"clipped_double_q"`` (MPG-v2), ``"n_step_simulator"`` (MPG-v1),
        ``"n_step_replay"``, or a ``ValueTarget``. With a corrected model and measured weights, the least of the critics counts
        as much as horizon 0 does, and otherwise their mean (see ``target_values_of``)
    :param value_target_kwargs: arguments of the named value target
    :param batch_reuse: in how many updates a batch and its targets are used; as many batches take turns
    :param policy_delay: Policy and target networks will only be updated once every policy_delay updates
    :param max_grad_norm: largest norm of the gradient of each network, ``None`` for no limit
    :param reward_scale: factor of all rewards, recorded and predicted ones alike
    :param exploration_noise: standard deviation of the Gaussian noise on actions in [-1, 1] when ``action_noise`` is None
    :param model_exploration: share of the states of a policy update that are explored in the corrected model, as far as
        measured weights trust it: up to ``MAX_EXPLORED_STEPS`` model steps away from replayed ones, with a noisy action held.
        0 for none
    :param max_skipped_updates: how many updates in a row may be skipped for a non-finite gradient before training stops
    :param n_learners: number of processes that compute the gradients while the main process steps the environments and
        applies them; 0 computes them in the main process. The number of updates is the same, they come sooner.
    :param max_staleness: largest number of updates between the parameters that a gradient was computed at and those that
        it is applied to; older ones are computed again. 0 gives the very updates of ``n_learners=0`` (without
        ``batch_reuse``), one at a time; ``None`` is twice the number of learners
    :param learner_kwargs: rarely needed settings of the learners: ``timeout`` (300 seconds), ``max_restarts`` (10),
        ``start_method`` (``"forkserver"`` or ``"spawn"``)
    :param compile: whether model and policy are compiled for the rollout (``torch.compile``): the same gradients, sooner.
        ``"auto"`` compiles when the training that ``learn`` is asked for is long enough to repay the time that compiling
        takes. What cannot be compiled runs as it is, with a warning.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation, see ``MPGPolicy``
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy}
    policy: MPGPolicy
    actor: Actor
    actor_target: Actor
    critic: ContinuousCritic
    critic_target: ContinuousCritic
    weighting_rule: WeightingRule

    def __init__(
        self,
        policy: str | type[MPGPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = ACTOR_LEARNING_RATE,
        buffer_size: int = 500_000,
        learning_starts: int = 250,
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
        horizons: Sequence[int] = (0, 25),
        residual: bool = True,
        residual_kwargs: dict[str, Any] | None = None,
        weighting: str | WeightingRule = "measured",
        weighting_kwargs: dict[str, Any] | None = None,
        differentiate: Differentiate = "first_action",
        value_target: str | ValueTarget = "clipped_double_q",
        value_target_kwargs: dict[str, Any] | None = None,
        batch_reuse: int = 1,
        policy_delay: int = 2,
        max_grad_norm: float | None = 3.0,
        reward_scale: float = 1.0,
        exploration_noise: float = 0.1,
        model_exploration: float = 0.5,
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
        self.weighting_rule = make_weighting_rule(weighting, horizons, weighting_kwargs)
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
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            prior_model=prior_model,
            prior_model_kwargs=prior_model_kwargs,
            residual=residual,
            residual_kwargs=residual_kwargs,
            value_target=value_target,
            value_target_kwargs=value_target_kwargs,
            max_grad_norm=max_grad_norm,
            reward_scale=reward_scale,
            exploration_noise=exploration_noise,
            max_skipped_updates=max_skipped_updates,
            n_learners=n_learners,
            max_staleness=max_staleness,
            learner_kwargs=learner_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.critic_learning_rate = critic_learning_rate
        self.differentiate = differentiate
        self.batch_reuse = batch_reuse
        self.compile = compile
        self._compiles: bool | None = None
        self._step_compiler: StepCompiler | None = None
        self.policy_delay = policy_delay
        self.model_exploration = model_exploration
        self._batches: list[TrainingBatch] = []
        self._n_batch_uses = 0
        self._measurements: list[Measurement] = []
        self._has_left_out_states = False

        if _init_setup_model:
            self._setup_model()

    def _check_settings(self) -> None:
        super()._check_settings()
        if not issubclass(self.policy_class, MPGPolicy):
            raise TypeError(
                f"{type(self).__name__} needs an MPGPolicy, got {self.policy_class.__name__}, which is another algorithm's, "
                "as may be the file it is from."
            )
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"`compile` must be True, False or 'auto', got {self.compile!r}.")
        for name in ("batch_reuse", "policy_delay"):
            check_count(name, getattr(self, name), 1)
        check_differentiate(self.differentiate)
        check_number("model_exploration", self.model_exploration, 0.0)
        if self.model_exploration > 1:
            raise ValueError(f"`model_exploration` is a share, from 0 to 1, got {self.model_exploration!r}.")
        # The constructor has made a rule of them
        given = [name for name in ("horizons", "weighting", "weighting_kwargs") if name in vars(self)]
        if given:
            raise ValueError(
                f"A saved algorithm keeps its rule for the weights of the horizons, but `load` got {given}; give it "
                "weighting_rule=sb3_mpg.common.trust.weighting.make_weighting_rule(weighting, horizons, weighting_kwargs)."
            )

    def _setup_model(self) -> None:
        super()._setup_model()
        if self._needs_trainable_model() and self.weighting_rule.needs_errors and len(self.policy.critic.q_networks) < 2:
            raise ValueError(
                "Measured weights compare the critics with each other, of which there is one; leave `n_critics` in "
                "`policy_kwargs` at 2 or take another `weighting`."
            )
        # Those of a rule that `load` replaced say nothing
        if any(measurement.gradients.horizons != self.weighting_rule.horizons for measurement in self._measurements):
            self._measurements = []
        if len(self._batches) != min(self._n_batch_uses, self.batch_reuse):
            # Saved without, or for another number of uses
            self._batches, self._n_batch_uses = [], 0
        # As saved: on the CPU
        self._batches = [TrainingBatch(*(tensor.to(self.device) for tensor in batch)) for batch in self._batches]
        self.critic_lr_schedule = FloatSchedule(self.critic_learning_rate)
        self._create_aliases()
        # Running mean and running var
        self.batch_norm_stats = get_parameters_by_name(self.actor, ["running_"]) + get_parameters_by_name(
            self.critic, ["running_"]
        )
        self.batch_norm_stats_target = get_parameters_by_name(self.actor_target, ["running_"]) + get_parameters_by_name(
            self.critic_target, ["running_"]
        )

    def _create_aliases(self) -> None:
        scalers = [module for module in self.policy.modules() if isinstance(module, ObservationScaler) and module.frequencies]
        self._amplitudes = [scaler.fourier_scale for scaler in scalers]
        self.actor = self.policy.actor
        self.actor_target = self.policy.actor_target
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        super().set_env(env, force_reset)
        # Their targets are those of the old environment
        self._batches, self._n_batch_uses = [], 0

    def _needs_prior_model(self) -> bool:
        return self._longest_rollout() > 0

    def _needs_trainable_model(self) -> bool:
        # Without a correction that is used, measured errors still need one to compare the prior model with
        return self._needs_prior_model() and (self.residual or self.weighting_rule.needs_errors)

    def _q_function(self, index: int) -> QFunction:
        """
        One of the critics. SB3's ``q1_forward`` extracts the features without gradient; a rollout needs dQ/ds.

        :param index: number of the critic
        :return: maps normalised observations, ``(B, *obs_shape)``, and actions in [-1, 1], ``(B, A)``, to values ``(B, 1)``
        """

        def q_function(network_inputs: th.Tensor, actions: th.Tensor) -> th.Tensor:
            features = self.critic.extract_features(network_inputs, self.critic.features_extractor)
            q_network = self.critic.q_networks[index]
            assert isinstance(q_network, th.nn.Module)
            return q_network(th.cat([features, actions], dim=1))

        return q_function

    def _to_tensor(self, observations: np.ndarray | th.Tensor) -> th.Tensor:
        return th.as_tensor(observations, dtype=th.float32, device=self.device)

    def policy_gradient(
        self,
        observations: np.ndarray | th.Tensor,
        horizon: int,
        differentiate: Differentiate = "first_action",
    ) -> th.Tensor:
        r"""
        The policy gradient of one horizon at some states, for analysis: :math:`\nabla_\theta J_n` (eq. 6), or
        the model policy gradient (eq. 5 of the first version). A random model is taken at the mean of its noise.

        :param observations: raw observations, ``(B, *obs_shape)``
        :param horizon: number of model steps, 0 for the data-driven gradient
        :param differentiate: ``"first_action"`` or ``"all_actions"``
        :return: the gradient of the mean return (which ascends), flat, ``(n_actor_parameters,)``
        """
        check_horizons([horizon])
        check_differentiate(differentiate)
        if horizon > 0 and not self._needs_prior_model():
            raise ValueError(
                f"The gradient of horizon {horizon} needs a model, but this algorithm has none: its horizons are (0,)."
            )
        assert self.rollout_model is not None, "There is no model: give the algorithm an environment first (`set_env`)"
        was_training = self.rollout_model.training
        self.rollout_model.eval()
        try:
            with members_of(self.rollout_model, "mean"):
                gradients = mixed_policy_gradient(
                    self._to_tensor(observations),
                    self.actor,
                    self._q_function(0),
                    self.rollout_model,
                    self._units(),
                    {horizon: 1.0},
                    self.gamma,
                    differentiate,
                ).gradients
        finally:
            self.rollout_model.train(was_training)
        return -th.cat([gradient.flatten() for gradient in gradients])

    def _sample_batch(self, n_updates: int, batch_size: int, units: Units) -> TrainingBatch:
        """
        Batch reuse: ``batch_reuse`` batches take turns, and one of them is drawn anew in each round, so that every batch
        serves as many updates. The papers' learners reuse their batches in a row, but theirs are twelve whose updates
        alternate; a single batch many times in a row makes the critic follow its noise, and the policy the critic.

        :param n_updates: number of the update
        :param batch_size: number of transitions
        :param units: conversions between environment and networks
        :return: transitions with their value targets
        """
        turn = self._n_batch_uses % self.batch_reuse
        if len(self._batches) < self.batch_reuse:
            self._batches.append(self._draw_batch(n_updates, batch_size, units))
        elif turn == 0:
            index = self._n_batch_uses // self.batch_reuse % self.batch_reuse
            self._batches[index] = self._draw_batch(n_updates, batch_size, units)
        self._n_batch_uses += 1
        return self._batches[turn]

    def _draw_batch(self, n_updates: int, batch_size: int, units: Units) -> TrainingBatch:
        """
        :param n_updates: number of the update
        :param batch_size: number of transitions
        :param units: conversions between environment and networks
        :return: new transitions with their value targets
        """
        # Raw samples: the model needs them, and the networks get them through `units`
        replay_data = self.replay_buffer.sample(batch_size)  # type: ignore[union-attr]
        replay_data = replay_data._replace(
            observations=replay_data.observations.float(), next_observations=replay_data.next_observations.float()
        )
        with th.no_grad():
            target_q_values = self.value_target(
                replay_data,
                self.actor,
                self.actor_target,
                self._target_values(n_updates),
                units,
                self.gamma,
                self._make_simulator,
                self._step_compiler,
            )
        assert target_q_values.shape == (batch_size, 1), target_q_values.shape
        return TrainingBatch(replay_data.observations, replay_data.actions, target_q_values)

    def _model_weight(self, n_updates: int) -> float:
        """
        :param n_updates: number of the update
        :return: the weight of all model steps, from 0 to 1
        """
        return 1 - self.weighting_rule(n_updates).get(0, 0.0)

    def _trust_in_model(self, n_updates: int) -> float:
        """
        :param n_updates: number of the update
        :return: the weight of all model steps, from 0 to 1; 0 where nothing is measured or nothing corrected: what is wrong
            with a prior model all of its rollouts share, and critics would learn it
        """
        return self._model_weight(n_updates) if self.weighting_rule.needs_errors and self.residual else 0.0

    def _fade_waves(self) -> None:
        """
        With sines and cosines of observations, critics bend as they like where the region ends that episodes stay in. Where
        only recorded steps are known, the last of which leads there, a policy comes to take that for a way out, and never
        sees what comes of it. So they fade unless a model has most of the weight, or is used without being measured.
        """
        is_measured = self.weighting_rule.needs_errors
        is_trusted = self._model_weight(self._n_updates) >= 0.5 if is_measured else self._needs_prior_model()
        for amplitude in self._amplitudes:
            amplitude.add_((1 if is_trusted else -1) / N_FADING_UPDATES).clamp_(UNTRUSTED_AMPLITUDE, 1.0)

    def _target_values(self, n_updates: int) -> QFunction:
        """
        :param n_updates: number of the update
        :return: the values of the target critics; where errors are measured, as pessimistic as the critics are climbed
        """
        return target_values_of(self.critic_target, 1 - self._trust_in_model(n_updates))

    def _mixed_policy_gradient(
        self, observations: th.Tensor, units: Units, weights: dict[int, float], balance: float = 0.0
    ) -> PolicyGradient:
        """
        :param observations: raw observations, ``(B, *obs_shape)``
        :param units: conversions between environment and networks
        :param weights: weight of each horizon
        :param balance: how much states are balanced, from 0 to 1
        :return: the mixed policy gradient
        """
        return mixed_policy_gradient(
            observations,
            self.actor,
            self._q_function(0),
            self.rollout_model,  # type: ignore[arg-type]
            units,
            weights,
            self.gamma,
            self.differentiate,
            self._advance,
            # Of later actions there is no gradient at each state
            balance if self.differentiate == "first_action" else 0.0,
        )

    def _model_name(self) -> str:
        return name_of(self.rollout_model)  # type: ignore[arg-type]

    @property
    def _advance(self) -> Advance:
        return advance if self._step_compiler is None else self._step_compiler

    def _improve_model(self, units: Units, logs: dict[str, list[float]]) -> None:
        """
        Fit a trainable model to the recorded steps, and measure the errors of the gradients now and then.

        :param units: conversions between environment and networks
        :param logs: values for the log, which are added to
        """
        if not isinstance(self.rollout_model, TrainableModel):
            return
        recorded = self._recorded_steps(units)
        loss = self._fit_model(recorded)
        if loss is not None:
            logs.setdefault("model/loss", []).append(loss)
        # At once where nothing is known, as of the model of a new environment
        is_due = not self._measurements or (self._n_updates - 1) % MEASURE_EVERY == 0
        if self.weighting_rule.needs_errors and is_due:
            validation_error = self._validation_error(recorded)
            if validation_error is not None:
                logs.setdefault("model/validation_error", []).append(validation_error)
            measured = self._measure_errors(recorded, units)
            self.weighting_rule.observe(np.where(measured.is_left_out, np.inf, measured.errors))
            weights = self.weighting_rule.weights(self._n_updates)
            validation_error = float("nan") if validation_error is None else validation_error
            warn_of_errors(measured, self._model_name(), [earlier.gradients for earlier in self._measurements])
            self._measurements.append(Measurement(self._n_updates, measured, weights, validation_error))
            for horizon, error, standard_error in zip(*measured[:3], strict=True):
                logs.setdefault(f"horizons/error_{horizon}", []).append(error)
                logs.setdefault(f"horizons/error_{horizon}_se", []).append(standard_error)

    def _measure_errors(self, recorded: RecordedSteps, units: Units) -> GradientErrors:
        """
        :param recorded: the recorded steps
        :param units: conversions between environment and networks
        :return: the errors of the action gradients of all horizons at states of the replay buffer
        """
        model = self.rollout_model
        assert isinstance(model, TrainableModel)
        observations = self.replay_buffer.sample(N_MEASURED_STATES).observations.float()  # type: ignore[union-attr]
        # Each member with a critic of its own; the first and the last member are compared, so with different ones
        last = len(self.critic.q_networks) - 1
        q_functions = [self._q_function(min(member, last)) for member in range(model.n_members)]
        gradients = partial(
            action_gradients,
            observations,
            self.actor,
            q_functions,
            model,
            units,
            self.weighting_rule.horizons,
            self.gamma,
            self._advance,
        )
        measured = measure_gradient_errors(
            gradients,
            model,
            self.weighting_rule.horizons,
            # Without the correction, it is the prior model itself that is judged
            judges_prior=isinstance(model, CorrectedModel) and not self.residual,
            held_out_steps=lambda: self._held_out_steps(recorded),
        )
        return measured._replace(misjudges_ends=misjudges_ends(model, recorded, self._longest_rollout()))

    def _longest_rollout(self) -> int:
        return max(self.weighting_rule.horizons)

    def trust_report(self) -> TrustReport:
        """
        How far the prior model can be trusted: the measured errors of the gradients and the weights that followed, and how
        far rollouts of the model along recorded actions are from what happened. Print it, or ``plot("trust.png")``.

        :return: the report
        :raises ValueError: when there is no model, or nothing is recorded to compare it with
        """
        if not self._needs_prior_model() or self.rollout_model is None:
            raise ValueError(
                "There is no model to report on: the only horizon is 0, or the environment is missing (`set_env`)."
            )
        windows = None
        if self.replay_buffer is not None:
            windows = self._recorded_steps(self._units()).windows(N_REPORTED_STEPS, self._longest_rollout())
        if windows is None or len(windows.lengths) < MIN_WINDOWS:
            raise ValueError("Nothing is recorded to compare the model with: call `learn` or `load_replay_buffer` first.")
        return make_trust_report(
            self.rollout_model,
            self.residual and self._n_prepared_for > 0,
            windows,
            self.gamma,
            self.weighting_rule.horizons,
            self._measurements,
        )

    def compute_gradients(self, batch: TrainingBatch, n_updates: int, units: Units) -> GradientResult:
        """
        The gradients of one update; nothing is changed.

        :param batch: transitions with their value targets
        :param n_updates: number of the update, which sets the weights of the horizons and whether the policy is due
        :param units: conversions between environment and networks
        :return: gradients of critic and actor, and what the log says of them
        """
        network_inputs = units.normalize_observations(batch.observations)
        logs: dict[str, Any] = {}
        trust = self._trust_in_model(n_updates)

        # Get current Q-values estimates for each critic network
        current_q_values = self.critic(network_inputs, batch.actions)
        # Compute critic loss
        critic_loss = sum(balanced_mse_loss(current_q, batch.target_q_values, trust) for current_q in current_q_values)
        assert isinstance(critic_loss, th.Tensor)
        logs["train/critic_loss"] = critic_loss.item()

        # Delayed policy updates
        actor_gradients = None
        if n_updates % self.policy_delay == 0:
            weights = self.weighting_rule(n_updates)
            observations = self._explored(batch.observations, units, trust)
            policy_gradient = self._mixed_policy_gradient(observations, units, weights, trust)
            actor_gradients = policy_gradient.gradients
            logs["train/actor_loss"] = policy_gradient.loss.item()
            logs.update({f"horizons/weight_{horizon}": weight for horizon, weight in weights.items()})
            logs.update({f"horizons/return_{horizon}": mean.item() for horizon, mean in policy_gradient.mean_returns.items()})
            logs["train/states_left_out"] = policy_gradient.share_left_out.item()
            if trust > 0:
                policy_values = self.critic(units.normalize_observations(observations), policy_gradient.actions)
                value_loss = rollout_value_loss(policy_values, policy_gradient.returns, weights, trust)
                logs["train/rollout_value_loss"] = value_loss.item()
                critic_loss = critic_loss + value_loss
        critic_gradients = gradient_of(critic_loss, self.critic)

        return GradientResult(critic_gradients, actor_gradients, logs)

    def _explored(self, observations: th.Tensor, units: Units, trust: float) -> th.Tensor:
        """
        Recorded trajectories of a policy are narrow, and what lies beside them is heard of only by exploring. A model that is
        trusted can be explored besides the system.

        :param observations: raw observations of replayed states, ``(B, *obs_shape)``
        :param units: conversions between environment and networks
        :param trust: in the model, from 0 to 1
        :return: the same, a share of them replaced by what :func:`explore_in_model` makes of them
        """
        n_explored = round(self.model_exploration * len(observations))
        if n_explored == 0 or trust == 0:
            return observations
        # Spread over the batch, parts of which belong to different members of the model
        rows = th.arange(n_explored, device=self.device) * len(observations) // n_explored
        shape = (n_explored, 1)
        n_steps = th.randint(1, MAX_EXPLORED_STEPS + 1, shape, device=self.device)
        # Always as many rows, for which it is compiled
        n_steps = n_steps * (th.rand(shape, device=self.device) < trust)
        noise = EXPLORED_NOISE * th.randn(n_explored, self.action_space.shape[0], device=self.device)  # type: ignore[index]
        low, high = observations.amin(dim=0), observations.amax(dim=0)
        # What is the same in the whole batch says nothing of what it could be
        margin = th.where(high > low, EXPLORED_MARGIN * (high - low), th.inf)
        explored = explore_in_model(
            observations[rows],
            self.actor,
            self.rollout_model,  # type: ignore[arg-type]
            units,
            n_steps,
            noise,
            low - margin,
            high + margin,
            MAX_EXPLORED_STEPS,
            hold if self._step_compiler is None else self._step_compiler.hold,
        )
        return observations.index_copy(0, rows, explored)

    def apply_gradients(self, result: GradientResult) -> bool:
        """
        Clip the gradients, step the optimizers and move the targets; skip all of it when a gradient is not finite.

        :param result: what :meth:`compute_gradients` returned; the norms of the gradients are added to its logs
        :return: whether the gradients were applied
        """
        networks: dict[str, tuple[th.nn.Module, list[th.Tensor] | None]] = {
            "critic": (self.critic, result.critic),
            "actor": (self.actor, result.actor),
        }
        max_norm = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        is_finite = True
        for name, (network, gradients) in networks.items():
            if gradients is None:
                continue
            parameters = trainable_parameters(network)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            norm = clip_norm(gradients, max_norm)
            is_finite = is_finite and np.isfinite(norm)
            result.logs[f"train/{name}_grad_norm"] = norm
            result.logs[f"train/{name}_grad_norm_clipped"] = min(norm, max_norm)

        if not is_finite:
            if self.n_skipped_updates == 0:
                warnings.warn("An update was skipped because its gradient is not finite; `train/skipped_updates` counts them.")
            self.n_skipped_updates += 1
            self._n_skipped_in_a_row += 1
            return False

        self.critic.optimizer.step()
        if result.actor is not None:
            # Updates without the actor say nothing of the model and do not end a row of failures
            self._n_skipped_in_a_row = 0
            self.actor.optimizer.step()
            polyak_update_all(self.critic.parameters(), self.critic_target.parameters(), self.tau)
            polyak_update_all(self.actor.parameters(), self.actor_target.parameters(), self.tau)
            # Copy running stats, see SB3 issue #996
            polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
        return True

    def _warn_of_states_left_out(self, result: GradientResult) -> None:
        if not self._has_left_out_states and result.logs.get("train/states_left_out", 0.0) > 0:
            self._has_left_out_states = True
            warnings.warn(
                f"Rollouts of {self._model_name()} overflow at some states, which are left out of the policy gradient; "
                "`train/states_left_out` is their share. Look for what overflows with `check_prior_model`."
            )

    def _stop_if_hopeless(self, batch_size: int, units: Units) -> None:
        """
        An update was just skipped.

        :param batch_size: number of transitions
        :param units: conversions between environment and networks
        :raises FloatingPointError: when too many updates in a row were skipped
        """
        if self._n_skipped_in_a_row <= self.max_skipped_updates:
            return
        assert self.rollout_model is not None and self._update_seed is not None
        # Its batch once more; unless batches are reused or learners were at other states, when it is one like it
        dealt = members_of(self.rollout_model, "dealt")
        with randomness_of_update(self._update_seed, self._n_updates, self.device), dealt:
            batch = self._draw_batch(self._n_updates, batch_size, units)
            observations = self._explored(batch.observations, units, self._trust_in_model(self._n_updates))
        reasons = []
        recorded_is_finite = th.isfinite(batch.observations).all() and th.isfinite(batch.target_q_values).all()
        advice = "Check the model with `check_prior_model`, bound what overflows in it, or use shorter horizons."
        if not recorded_is_finite:
            reasons.append("recorded observations or rewards are not finite")
            advice = "Look at the environment: gymnasium.utils.env_checker.check_env, stable_baselines3's VecCheckNan."
        for horizon, weight in self.weighting_rule(self._n_updates).items():
            if weight < NEGLIGIBLE_WEIGHT or not recorded_is_finite:
                continue
            with members_of(self.rollout_model, "dealt"):
                reason = first_non_finite_step(
                    observations, self.actor, self._q_function(0), self.rollout_model, units, horizon, self.gamma
                )
            if reason is not None:
                reasons.append(f"horizon {horizon} (weight {weight:.2g}): {reason}")
        raise FloatingPointError(
            f"Training stopped after {self._n_skipped_in_a_row} updates in a row with a non-finite gradient "
            f"(the weights are still finite and can be saved). "
            + ("; ".join(reasons) or "The model is sound at this batch: its noise may be the cause")
            + f". {advice}"
        )

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        # Switch to train mode (this affects batch norm / dropout, and the noise of the model)
        self.policy.set_training_mode(True)
        assert self.rollout_model is not None
        self.rollout_model.train()
        # The statistics of VecNormalize are those of now for all of these updates
        units = self._units()
        if self._n_updates == 0:
            self._fit_observation_scalers(units)
            self._warn_of_tiny_rewards(units)
        self._prepare_model(units)

        # Update learning rates according to their schedules
        self._update_learning_rate(self.actor.optimizer)
        critic_learning_rate = self.critic_lr_schedule(self._current_progress_remaining)
        update_learning_rate(self.critic.optimizer, critic_learning_rate)
        self.logger.record("train/critic_learning_rate", critic_learning_rate)

        # Outside of `learn` nobody would end the processes
        learners = InProcessLearner(self) if self._learners is None else self._learners
        logs: dict[str, list[float]] = {}
        for _ in range(gradient_steps):
            self._n_updates += 1
            self._improve_model(units, logs)
            self._fade_waves()
            result = learners.next_result(self._n_updates, batch_size, units)
            if not self.apply_gradients(result):
                self._stop_if_hopeless(batch_size, units)
            self._warn_of_states_left_out(result)
            learners.applied(self._n_updates, batch_size, units)
            for key, value in result.logs.items():
                logs.setdefault(key, []).append(value)

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/updates_per_step", (self._n_updates - self._n_updates_at_start) / max(self.num_timesteps, 1))
        self.logger.record("train/skipped_updates", self.n_skipped_updates)
        learners.record(self.logger)
        for key, values in logs.items():
            self.logger.record(key, float(np.mean(values)))

    def _is_worth_compiling(self, total_timesteps: int) -> bool:
        """
        :param total_timesteps: when the training that begins now will end
        :return: whether compiling will have been repaid by then
        """
        if self.compile != "auto":
            return bool(self.compile)
        assert isinstance(self.train_freq, TrainFreq)
        steps = max(total_timesteps - max(self.num_timesteps, self.learning_starts), 0)
        if self.train_freq.unit == TrainFrequencyUnit.STEP and self.gradient_steps >= 0:
            updates = steps / (self.n_envs * self.train_freq.frequency) * self.gradient_steps
        else:
            updates = steps if self.gradient_steps < 0 else 0  # who knows how long episodes are
        return updates / self.policy_delay * self._longest_rollout() >= COMPILE_FROM_MODEL_STEPS

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        setup = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if reset_num_timesteps or self._compiles is None or self.compile != "auto":
            # A continued training does as it did before: compiled gradients differ in the last bits
            self._compiles = self._is_worth_compiling(setup[0])
        self._step_compiler = StepCompiler() if self._compiles else None
        return setup

    def learn(
        self: SelfMPG,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "MPG",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfMPG:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def gradient_template(self) -> GradientResult:
        return GradientResult([*trainable_parameters(self.critic)], [*trainable_parameters(self.actor)], {})

    def published_attributes(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("weighting_rule", "policy_delay", "model_exploration")}
        return {**super().published_attributes(), **own}

    def setup_replica(self) -> None:
        super().setup_replica()
        self._create_aliases()
        # Each learner has batches of its own, and compiles for itself
        self._batches, self._n_batch_uses = [], 0
        self._step_compiler = StepCompiler() if self._compiles else None

    def _forget_model(self) -> None:
        super()._forget_model()
        self._measurements = []
        self.weighting_rule.forget()

    def _portable_attributes(self) -> dict[str, Any]:
        # Without reuse nothing of the last batch matters
        kept = self._batches if self.batch_reuse > 1 else []
        batches = [TrainingBatch(*(tensor.cpu() for tensor in batch)) for batch in kept]
        return {**super()._portable_attributes(), "_batches": batches}

    def _excluded_save_params(self) -> list[str]:
        excluded = ["actor", "critic", "actor_target", "critic_target", "_amplitudes", "_step_compiler"]
        return super()._excluded_save_params() + excluded

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = ["policy", "actor.optimizer", "critic.optimizer"]
        return state_dicts, []
