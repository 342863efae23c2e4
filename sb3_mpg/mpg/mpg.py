from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.td3.policies import Actor

from sb3_mpg.common.checks import check_count
from sb3_mpg.common.learners import LearnerSettings
from sb3_mpg.common.models.loading import PriorModelLike
from sb3_mpg.common.models.rollout_model import ModelSettings
from sb3_mpg.common.models.trainable import evaluated
from sb3_mpg.common.off_policy_model_algorithm import OffPolicyModelAlgorithm
from sb3_mpg.common.optimizer_steps import OptimizerSteps
from sb3_mpg.common.rollouts.policy_gradient import mixed_policy_gradient
from sb3_mpg.common.rollouts.steps import EagerSteps
from sb3_mpg.common.saved_settings import OF_ROLLOUTS, check_opened
from sb3_mpg.common.trust.weighting import WeightingRule, check_horizons, make_weighting_rule
from sb3_mpg.common.type_aliases import Differentiate
from sb3_mpg.common.value_targets import ValueTarget, make_value_target
from sb3_mpg.mpg.policies import MlpPolicy, MPGPolicy, MultiInputPolicy
from sb3_mpg.mpg.update import MPGUpdate, MPGUpdateSettings

# Of the papers' methods: Table VI of the first version
ACTOR_LEARNING_RATE = LinearSchedule(3e-4, 3e-6, 1.0)
CRITIC_LEARNING_RATE = LinearSchedule(8e-4, 8e-6, 1.0)
# That of TD3 at first, and low enough in the end that the last policy is as good as the best
LEARNING_RATE = LinearSchedule(1e-3, 1e-5, 1.0)


def check_differentiate(differentiate: Differentiate) -> None:
    """
    :param differentiate: which actions carry the gradient, ``"first_action"`` or ``"all_actions"``
    :raises ValueError: for any other value
    """
    if differentiate not in ("first_action", "all_actions"):
        raise ValueError(f"`differentiate` must be 'first_action' or 'all_actions', got {differentiate!r}.")


class MPG(OffPolicyModelAlgorithm):
    """
    Mixed Policy Gradient (MPG): a weighted mean of the policy gradient of the learned Q functions (the data-driven gradient)
    and of policy gradients that are back-propagated through rollouts of a differentiable model.

    Paper: https://arxiv.org/abs/2102.11513 (the first version and its revision)
    Original implementation: https://github.com/idthanm/mpg

    Beyond the papers, and by default:

    - The model is corrected by recorded transitions (``residual``).
    - The gradients are weighted by their measured errors (``weighting="measured"``); the papers' weights are a function of
      the number of updates. A model weighs less as far as it does not know where episodes terminate, unless the replay
      buffer does not tell terminations from time limits (``handle_timeout_termination=False``).
    - The weight of the corrected model is the trust in it. In proportion to the trust, the losses of policy and critics are
      normalised per state (see ``sb3_mpg.common.balance``), the critics regress on the returns of the policy's rollouts as
      well, and up to half of the start states of rollouts are perturbed in the model (``model_exploration``). Without trust,
      an update is that of TD3: the target policy is smoothed by noise, and the critics' minimum is taken.
    - Derivatives that do not show how returns vary, because rewards or terminations jump, get no weight. The critics learn
      from rollouts with perturbed actions instead (see ``sb3_mpg.common.trust.variation``).
    - Part of the exploration follows plans that are made in the corrected model, and the policy imitates them while they are
      better (``model_planning``, see ``PlansExploration``).
    - The networks take scaled observations, and their Fourier features while a model is trusted (see ``ObservationScaler``);
      ``policy_kwargs=dict(features_extractor_kwargs=dict(frequencies=[]))`` removes them.

    - The hidden layers of the critics are normalised, and the target networks follow ten times as fast (``tau``). A critic
      that regresses on targets of one step learns values in about ``policy_delay / tau`` updates for each step that counts.

    MPG-v2 of the papers is ``residual=False, weighting="rule_based", learning_starts=3000, gamma=0.98, tau=0.005`` with
    learning rates that fall from 3e-4 (actor) and 8e-4 (critic) to a hundredth, without Fourier features and normalised
    layers, and with ``value_target_kwargs={"noise_std": 0.0}``: the papers do not smooth the target policy. MPG-v1 is the
    same with ``value_target="n_step_simulator", batch_reuse=10`` in place of that argument. RL Zoo has both in
    ``mpg_v2.yml`` and ``mpg_v1.yml``. The other defaults are those of Table VI of the first version.

    Differences from the papers:

    - Recorded targets bootstrap after truncations, but not after terminations. The simulator of MPG-v1 continues after a
      truncation.
    - The value target of MPG-v1 takes the minimum of two critics; the paper has one critic (see ``SimulatorTarget``).
    - Batches that are reused take turns (see ``ReusedBatches``).
    - ``differentiate="all_actions"`` is the full derivative of eq. 5, which includes the critic's own action.

    As in the papers, and unlike in TD3, both gradients of an update are computed at the same parameters: the actor does not
    follow the critic that was just updated.

    :param policy: The policy model to use (MlpPolicy, or MultiInputPolicy for observations of several parts)
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
    :param n_steps: number of recorded steps of the value target. With more than one, the value target is ``"n_step_replay"``
    :param critic_learning_rate: learning rate of the critics
    :param prior_model: model of the system: a ``PriorModel``, a class or factory of one, a dotted path
        ``"package.module:Class"``; ``"auto"``, the model that the environment offers with a method ``prior_model()``; or
        ``"learned"``, dynamics that are learned from recorded transitions alone, see ``DynamicsModel``
    :param prior_model_kwargs: arguments of the class or factory of the prior model
    :param residual: whether the model is corrected by recorded transitions, see ``ResidualModel``
    :param residual_kwargs: arguments of ``ResidualModel``
    :param horizons: numbers of model steps of the gradients that are mixed; 0 is the data-driven gradient
    :param weighting: how the horizons are weighted: by the ``"measured"`` errors of their gradients, ``"rule_based"`` (the
        papers'), ``"constant"``, ``"geometric"``, or a ``WeightingRule``
    :param weighting_kwargs: arguments of the named weighting rule
    :param differentiate: which actions of the model rollout carry the gradient: ``"first_action"`` is the unified policy
        gradient (eq. 6), ``"all_actions"`` the model policy gradient (eq. 5 of the first version), which is not normalised
        per state
    :param value_target: what the critics regress on: ``"clipped_double_q"`` (MPG-v2), ``"n_step_simulator"`` (MPG-v1),
        ``"n_step_replay"``, or a ``ValueTarget``. With a corrected model and measured weights, the target mixes the minimum
        of the critics and their mean; the weight of the minimum is that of horizon 0 (see ``target_values_of``). So is the
        share of the noise that smooths the target policy (see ``ReplayTarget``)
    :param value_target_kwargs: arguments of the named value target
    :param batch_reuse: in how many updates a batch and its targets are used; as many batches take turns
    :param rollout_batch_size: number of states of a batch that the policy's rollouts start from where a corrected or learned
        model has most of the weight; elsewhere they start from all of them
    :param policy_delay: Policy and target networks will only be updated once every policy_delay updates
    :param max_grad_norm: largest norm of the gradient of each network, ``None`` for no limit
    :param reward_scale: factor of all rewards, both recorded and predicted
    :param exploration_noise: standard deviation of the Gaussian noise on actions in [-1, 1] when ``action_noise`` is None
    :param model_exploration: share of the start states of rollouts that may be perturbed in the corrected model, 0 for none.
        Each of them is perturbed with a probability that equals the trust in the model: as many model steps as the
        longest horizon at most, with one noisy action, which is repeated (see ``ModelExploration``)
    :param model_planning: share of the exploring time in which actions are planned in the corrected model, 0 for none. It is
        multiplied with the trust in the model, and falls when plans are no better than the policy (see ``PlansExploration``)
    :param max_skipped_updates: how many updates in a row may be skipped for a non-finite gradient before training stops
    :param n_learners: number of processes that compute the gradients while the main process steps the environments and
        applies them; 0 computes them in the main process. The number of updates does not depend on it.
    :param max_staleness: largest number of updates between the parameters that a gradient was computed at and those that
        it is applied to; older gradients are computed again. 0 computes one gradient at a time and gives exactly the updates
        of ``n_learners=0`` (without ``batch_reuse``). ``None`` is twice the number of learners
    :param learner_kwargs: rarely needed settings of the learners: ``timeout`` (300 seconds), ``max_restarts`` (10),
        ``start_method`` (``"forkserver"`` or ``"spawn"``)
    :param compile: whether model and policy are compiled for the rollout (``torch.compile``). Compiled gradients differ in
        the last bits only, but a model that draws noise draws other numbers. ``"auto"`` compiles beside the first updates,
        when the call of ``learn`` is long enough to repay it. What cannot be compiled runs eagerly, with a warning.
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

    :raises ValueError: before the first environment step, for spaces, models or settings that cannot work
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy, "MultiInputPolicy": MultiInputPolicy}
    policy: MPGPolicy
    update: MPGUpdate
    update_class = MPGUpdate

    def __init__(
        self,
        policy: str | type[MPGPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = LEARNING_RATE,
        buffer_size: int = 500_000,
        learning_starts: int = 250,
        batch_size: int = 256,
        tau: float = 0.05,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        critic_learning_rate: float | Schedule = LEARNING_RATE,
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
        rollout_batch_size: int = 64,
        policy_delay: int = 2,
        max_grad_norm: float | None = 3.0,
        reward_scale: float = 1.0,
        exploration_noise: float = 0.1,
        model_exploration: float = 0.5,
        model_planning: float = 0.5,
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
            critic_learning_rate=critic_learning_rate,
            model_settings=ModelSettings(prior_model, prior_model_kwargs, residual, residual_kwargs),
            weighting_rule=make_weighting_rule(weighting, horizons, weighting_kwargs),
            value_target=make_value_target(value_target, value_target_kwargs, n_steps),
            batch_reuse=batch_reuse,
            reward_scale=reward_scale,
            exploration_noise=exploration_noise,
            model_exploration=model_exploration,
            model_planning=model_planning,
            optimizer_steps=OptimizerSteps(max_grad_norm, max_skipped_updates),
            learner_settings=LearnerSettings(n_learners, max_staleness, learner_kwargs),
            compile=compile,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.rollout_batch_size = rollout_batch_size
        self.policy_delay = policy_delay
        self.differentiate = differentiate

        if _init_setup_model:
            self._setup_model()

    def _check_settings(self) -> None:
        super()._check_settings()
        if not issubclass(self.policy_class, MPGPolicy):
            raise TypeError(
                f"{type(self).__name__} needs an MPGPolicy, got {self.policy_class.__name__}, which belongs to another "
                f"algorithm. Pass one of {list(self.policy_aliases)}, or load the file with the algorithm that saved it."
            )
        for name in ("policy_delay", "rollout_batch_size"):
            check_count(name, getattr(self, name), 1)
        check_differentiate(self.differentiate)

    @property
    def actor(self) -> Actor:  # type: ignore[override]  # SB3 declares an attribute, which would be a second reference
        """The policy network."""
        return self.policy.actor

    @property
    def actor_target(self) -> Actor:
        """The target policy network."""
        return self.policy.actor_target

    @property
    def critic(self) -> ContinuousCritic:
        """The critics."""
        return self.policy.critic

    @property
    def critic_target(self) -> ContinuousCritic:
        """The target critics."""
        return self.policy.critic_target

    def update_settings(self, n_updates: int) -> MPGUpdateSettings:
        common = vars(super().update_settings(n_updates))
        return MPGUpdateSettings(
            **common,
            policy_delay=self.policy_delay,
            differentiate=self.differentiate,
            rollout_batch_size=self.rollout_batch_size,
        )

    @th.inference_mode(mode=False)
    def policy_gradient(self, observations: Any, horizon: int, differentiate: Differentiate = "first_action") -> th.Tensor:
        r"""
        The policy gradient of one horizon at the given states, for analysis: :math:`\nabla_\theta J_n` (eq. 6), or
        the model policy gradient (eq. 5 of the first version). The model is in evaluation mode: without noise, and an
        ensemble predicts the mean of its members.

        :param observations: raw observations, ``(B, *obs_shape)``, by key for a ``Dict``
        :param horizon: number of model steps, 0 for the data-driven gradient
        :param differentiate: ``"first_action"`` or ``"all_actions"``
        :return: the gradient of the mean return (the direction of ascent), flat, ``(n_actor_parameters,)``
        :raises ValueError: for an impossible horizon, or when the algorithm has no model or that of a file cannot be opened
        """
        check_opened(self, OF_ROLLOUTS)
        check_horizons([horizon])
        check_differentiate(differentiate)
        if horizon > 0 and not self.trust.uses_model:
            raise ValueError(
                f"The gradient of horizon {horizon} needs a model, but this algorithm has none: its horizons are (0,)."
            )
        model = self.rollout_model
        if model is None:
            raise ValueError("There is no model: give the algorithm an environment first (`set_env`).")
        context = self.update.context(self.units(), self.gamma)._replace(steps=EagerSteps())
        if not isinstance(observations, th.Tensor):
            observations = self.policy.obs_to_tensor(observations)[0]
        states = self.update.flat.flatten(observations)
        with evaluated(model):
            gradients = mixed_policy_gradient(states, context, {horizon: 1.0}, differentiate).gradients
        return -th.cat([gradient.flatten() for gradient in gradients])

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []
