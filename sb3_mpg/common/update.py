"""Updates: from a batch of the replay buffer to gradients."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mpg.common.batches import ReusedBatches
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.trainable import members_of
from sb3_mpg.common.randomness import randomness_of_update
from sb3_mpg.common.rollouts.diagnosis import first_non_finite_step
from sb3_mpg.common.rollouts.exploration import ModelExploration
from sb3_mpg.common.rollouts.planned_actions import PlannedActions
from sb3_mpg.common.rollouts.policy_gradient import NEGLIGIBLE_WEIGHT
from sb3_mpg.common.rollouts.steps import EagerSteps, QFunction, RolloutContext, Steps
from sb3_mpg.common.spaces import FlatObservations
from sb3_mpg.common.torch_layers import FadingLayerNorm, ObservationScaler
from sb3_mpg.common.type_aliases import GradientResult, ReplaySampler, Simulator, TrainingBatch
from sb3_mpg.common.units import Units
from sb3_mpg.common.utils import trainable_parameters
from sb3_mpg.common.value_targets import TargetNetworks, ValueTarget

# Squares of larger values, summed over a batch, overflow in single precision
LARGEST_VALUE = 1e17


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """
    Settings of an update. They are created for every update, both in process and for learner processes, so that changes by a
    callback take effect in both.

    :param gamma: discount factor
    :param weights: weight of each horizon
    :param trust: trust in the model, from 0 to 1
    :param blind_trust: trust in the returns of rollouts whose derivative is blind, from 0 to 1
    :param value_target: what the critics regress on
    :param batch_reuse: in how many updates a batch is used
    :param exploration: how start states of rollouts are perturbed
    :param imitation: share of the imitation of planned actions in the policy gradient, from 0 to 1
    """

    gamma: float
    weights: dict[int, float]
    trust: float
    blind_trust: float
    value_target: ValueTarget
    batch_reuse: int
    exploration: ModelExploration
    imitation: float


Settings = TypeVar("Settings", bound=UpdateSettings)


class Update(ABC, Generic[Settings]):
    """
    Computes gradients from a batch of the replay buffer, in the main process or in learner processes. It can be pickled: it
    holds no environment, no replay buffer and no logger.

    The gradients of an update are a function of its number, of the tensors (:meth:`tensors`), of the replay buffer, of the
    units and of the settings. Computing them changes none of these.

    :param policy: networks and target networks
    :param model: the model that the gradient is back-propagated through
    :param seed: seed of the random numbers of all updates
    """

    def __init__(self, policy: BasePolicy, model: PriorModel, seed: int):
        self.policy = policy
        self.model = model
        self.seed = seed
        #: Of the environment; models, simulators and rollouts take flat observations
        self.flat = FlatObservations(policy.observation_space)
        #: Takes the steps of rollouts
        self.steps: Steps = EagerSteps()
        #: Simulator of value targets that need one, with one agent for each row of a batch
        self.simulator: Simulator | None = None
        self.batches = ReusedBatches()
        #: Planned steps that the policy imitates
        self.plans = PlannedActions(self.flat.n_elements, get_action_dim(policy.action_space))
        # Collected once, because searching the modules at each update is slow
        self.observation_scalers = [module for module in policy.modules() if isinstance(module, ObservationScaler)]
        #: What fades where no model is trusted
        self.fading = [module for module in policy.modules() if isinstance(module, (ObservationScaler, FadingLayerNorm))]

    def for_learner(self) -> "Update[Settings]":
        """
        :return: a copy for a learner: it shares networks and model, and draws batches of its own
        """
        copied = copy.copy(self)
        copied.batches = ReusedBatches()
        return copied

    @property
    def device(self) -> th.device:
        """Device of the networks."""
        return self.policy.device

    @abstractmethod
    def networks(self) -> Mapping[str, th.nn.Module]:
        """
        :return: the networks that gradients are computed for, by name, each with an ``optimizer``; always in the same order.
            ``"actor"`` is the policy; ``"critic"`` has a learning rate of its own, all others share one
        """

    @abstractmethod
    def target_networks(self) -> Mapping[str, th.nn.Module]:
        """
        :return: the target networks, by the name of the network that they follow
        """

    @abstractmethod
    def q_function(self, index: int) -> QFunction:
        """
        :param index: number of the critic
        :return: maps normalised observations, ``(B, O)``, and actions in [-1, 1], ``(B, A)``, to values ``(B, 1)``
        """

    @abstractmethod
    def targets(self, settings: Settings) -> TargetNetworks:
        """
        :param settings: settings of the update
        :return: target policy and target values, for value targets
        """

    @abstractmethod
    def compute_gradients(self, batch: TrainingBatch, n_updates: int, units: Units, settings: Settings) -> GradientResult:
        """
        :param batch: transitions with their value targets
        :param n_updates: number of the update
        :param units: conversions between environment and networks
        :param settings: settings of the update
        :return: the gradients; the networks are not changed
        """

    @property
    @abstractmethod
    def n_critics(self) -> int:
        """Number of critics."""

    @abstractmethod
    def n_model_steps(self, settings: Settings) -> float:
        """
        :param settings: settings of an update
        :return: mean number of model steps of the policy's rollout in an update
        """

    def n_rollout_rows(self, settings: Settings, batch_size: int) -> int:
        """
        :param settings: settings of an update
        :param batch_size: number of transitions of an update
        :return: usual number of states that the policy's rollouts start from
        """
        return batch_size

    def q_functions(self, n_functions: int) -> Sequence[QFunction]:
        """
        :param n_functions: requested number of critics
        :return: this number of critics; the last one is repeated if there are fewer
        """
        return [self.q_function(min(index, self.n_critics - 1)) for index in range(n_functions)]

    def context(self, units: Units, gamma: float) -> RolloutContext:
        """
        :param units: conversions between environment and networks
        :param gamma: discount factor
        :return: context of all rollouts of an update
        """
        actor = self.networks()["actor"]
        return RolloutContext(actor, self.q_function(0), self.model, units, gamma, self.steps)

    def gradients_of_update(
        self, n_updates: int, batch_size: int, replay_buffer: ReplaySampler, units: Units, settings: Settings
    ) -> GradientResult:
        """
        Sample a batch and compute the gradients.

        :param n_updates: number of the update, which determines its random numbers
        :param batch_size: number of transitions
        :param replay_buffer: what transitions are sampled from
        :param units: conversions between environment and networks
        :param settings: settings of the update
        :return: the gradients
        """
        self.steps.begin_update(n_updates)
        with randomness_of_update(self.seed, n_updates, self.device), members_of(self.model, "dealt"):
            batch = self.batches.next(
                settings.batch_reuse, lambda: self.draw_batch(batch_size, replay_buffer, units, settings)
            )
            return self.compute_gradients(batch, n_updates, units, settings)

    @th.no_grad()
    def draw_batch(self, batch_size: int, replay_buffer: ReplaySampler, units: Units, settings: Settings) -> TrainingBatch:
        """
        :param batch_size: number of transitions
        :param replay_buffer: what transitions are sampled from
        :param units: conversions between environment and networks
        :param settings: settings of the update
        :return: transitions with their value targets
        """
        # Without `VecNormalize`: the model takes raw observations, and `units` normalises those of the networks
        replay_data: ReplayBufferSamples = replay_buffer.sample(batch_size)
        replay_data = replay_data._replace(
            observations=self.flat.flatten(replay_data.observations),
            next_observations=self.flat.flatten(replay_data.next_observations),
        )
        context = self.context(units, settings.gamma)
        target_q_values = settings.value_target(replay_data, context, self.targets(settings), self.simulator)
        assert target_q_values.shape == (batch_size, 1), target_q_values.shape
        return TrainingBatch(replay_data.observations, replay_data.actions, target_q_values)

    def start_observations(self, batch: TrainingBatch, context: RolloutContext, settings: Settings) -> th.Tensor:
        """
        :param batch: transitions
        :param context: policy, model, units and steps
        :param settings: settings of the update
        :return: raw observations of the start states of rollouts, ``(B, O)``
        """
        return settings.exploration.perturb(batch.observations, context, settings.trust)

    def why_not_finite(
        self, n_updates: int, batch_size: int, replay_buffer: ReplaySampler, units: Units, settings: Settings
    ) -> str:
        """
        Repeat an update whose gradient was not finite, step by step. The batch is the same, unless batches are reused or a
        learner sampled from an earlier state of the replay buffer; it is then a similar one.

        :param n_updates: number of the update
        :param batch_size: number of transitions
        :param replay_buffer: what transitions are sampled from
        :param units: conversions between environment and networks
        :param settings: settings of the update
        :return: what is not finite, and what to do
        """
        context = self.context(units, settings.gamma)._replace(steps=EagerSteps())
        reasons = []
        with randomness_of_update(self.seed, n_updates, self.device), members_of(self.model, "dealt"):
            batch = self.draw_batch(batch_size, replay_buffer, units, settings)
            observations = self.start_observations(batch, context, settings)
            if not th.isfinite(batch.observations).all() or not th.isfinite(batch.target_q_values).all():
                return (
                    "recorded observations or rewards are not finite. Look at the environment: "
                    "gymnasium.utils.env_checker.check_env, stable_baselines3's VecCheckNan."
                )
            largest = batch.target_q_values.abs().max().item()
            if largest > LARGEST_VALUE:
                return (
                    f"value targets are as large as {largest:.0e}, and the loss of critics overflows. Look at the rewards, "
                    "and at what they depend on, such as actions with wide bounds; `reward_scale` makes them smaller."
                )
            for horizon, weight in settings.weights.items():
                reason = first_non_finite_step(observations, context, horizon) if weight >= NEGLIGIBLE_WEIGHT else None
                if reason is not None:
                    reasons.append(f"horizon {horizon} (weight {weight:.2g}): {reason}")
        found = "; ".join(reasons) or "The model is finite at this batch: its noise may be the cause"
        return f"{found}. Check the model with `check_prior_model`, bound what overflows in it, or use shorter horizons."

    def tensors(self) -> list[th.Tensor]:
        """
        :return: tensors that gradients depend on and that change during training: those of the networks, of the target
            networks, of the model and of the plans, in the same order in every copy
        """
        modules: tuple[th.nn.Module, ...] = (self.policy, self.model, self.plans)
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def parameters(self) -> dict[str, list[th.Tensor]]:
        """
        :return: the trainable parameters, by the name of the network; gradients have the same shapes
        """
        return {name: [*trainable_parameters(network)] for name, network in self.networks().items()}
