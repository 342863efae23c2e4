"""The learner side of an algorithm: from the replay buffer to gradients."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mpg.common.batches import ReusedBatches
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.trainable import members_of
from sb3_mpg.common.randomness import randomness_of_update
from sb3_mpg.common.rollouts.diagnosis import first_non_finite_step
from sb3_mpg.common.rollouts.exploration import ModelExploration
from sb3_mpg.common.rollouts.policy_gradient import NEGLIGIBLE_WEIGHT
from sb3_mpg.common.rollouts.steps import EagerSteps, QFunction, RolloutContext, Steps
from sb3_mpg.common.torch_layers import ObservationScaler
from sb3_mpg.common.type_aliases import GradientResult, ReplaySampler, Simulator, TrainingBatch
from sb3_mpg.common.units import Units
from sb3_mpg.common.utils import trainable_parameters
from sb3_mpg.common.value_targets import TargetNetworks, ValueTarget


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """
    What an update depends on besides tensors and units. It is made for every update, in process and for learners alike, so
    that whatever a callback changes takes effect in both.

    :param gamma: discount factor
    :param weights: weight of each horizon
    :param trust: in the model, from 0 to 1
    :param value_target: what the critics regress on
    :param batch_reuse: in how many updates a batch is used
    :param exploration: how start states of rollouts are perturbed
    """

    gamma: float
    weights: dict[int, float]
    trust: float
    value_target: ValueTarget
    batch_reuse: int
    exploration: ModelExploration


Settings = TypeVar("Settings", bound=UpdateSettings)


class Update(ABC, Generic[Settings]):
    """
    Turns a batch of the replay buffer into gradients. It runs in the main process or in learner processes, and can be
    pickled: it knows no environment, no replay buffer and no logger.

    The gradients of an update are a function of its number, of the tensors (:meth:`tensors`), of the replay buffer, of the
    units and of the settings. They change nothing.

    :param policy: networks and target networks
    :param model: the model that the gradient is back-propagated through
    :param seed: what the random numbers of all updates follow from
    """

    def __init__(self, policy: BasePolicy, model: PriorModel, seed: int):
        self.policy = policy
        self.model = model
        self.seed = seed
        #: Takes the steps of rollouts
        self.steps: Steps = EagerSteps()
        #: For value targets that need one: of as many agents as a batch has rows
        self.simulator: Simulator | None = None
        self.batches = ReusedBatches()
        # Collected once: walking through the modules takes longer than what is done with them
        self.observation_scalers = [module for module in policy.modules() if isinstance(module, ObservationScaler)]

    def __getstate__(self) -> dict[str, Any]:
        # Each learner draws batches of its own
        return {**vars(self), "batches": ReusedBatches()}

    @property
    def device(self) -> th.device:
        """Where the networks are."""
        return self.policy.device

    @abstractmethod
    def networks(self) -> Mapping[str, th.nn.Module]:
        """
        :return: the networks that gradients are computed for, by name, each with its ``optimizer``; always in the same order
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
        :return: maps normalised observations, ``(B, *obs_shape)``, and actions in [-1, 1], ``(B, A)``, to values ``(B, 1)``
        """

    @abstractmethod
    def targets(self, settings: Settings) -> TargetNetworks:
        """
        :param settings: of the update
        :return: target policy and values, for value targets
        """

    @abstractmethod
    def compute_gradients(self, batch: TrainingBatch, n_updates: int, units: Units, settings: Settings) -> GradientResult:
        """
        :param batch: transitions with their value targets
        :param n_updates: number of the update
        :param units: conversions between environment and networks
        :param settings: of the update
        :return: the gradients; nothing is changed
        """

    @property
    @abstractmethod
    def n_critics(self) -> int:
        """Number of critics."""

    @abstractmethod
    def n_model_steps(self, settings: Settings) -> float:
        """
        :param settings: of an update
        :return: number of model steps of the policy's rollout in an update, on average
        """

    def q_functions(self, n_functions: int) -> Sequence[QFunction]:
        """
        :param n_functions: number of critics that are asked for
        :return: as many; the last critic stands in for those that do not exist
        """
        return [self.q_function(min(index, self.n_critics - 1)) for index in range(n_functions)]

    def context(self, units: Units, gamma: float) -> RolloutContext:
        """
        :param units: conversions between environment and networks
        :param gamma: discount factor
        :return: what rollouts of this update have in common
        """
        actor = self.networks()["actor"]
        return RolloutContext(actor, self.q_function(0), self.model, units, gamma, self.steps)

    def gradients_of_update(
        self, n_updates: int, batch_size: int, replay_buffer: ReplaySampler, units: Units, settings: Settings
    ) -> GradientResult:
        """
        Sample a batch and compute the gradients.

        :param n_updates: number of the update, which its random numbers follow from
        :param batch_size: number of transitions
        :param replay_buffer: where transitions are sampled
        :param units: conversions between environment and networks
        :param settings: of the update
        :return: the gradients
        """
        with randomness_of_update(self.seed, n_updates, self.device), members_of(self.model, "dealt"):
            batch = self.batches.next(
                settings.batch_reuse, lambda: self.draw_batch(batch_size, replay_buffer, units, settings)
            )
            return self.compute_gradients(batch, n_updates, units, settings)

    @th.no_grad()
    def draw_batch(self, batch_size: int, replay_buffer: ReplaySampler, units: Units, settings: Settings) -> TrainingBatch:
        """
        :param batch_size: number of transitions
        :param replay_buffer: where transitions are sampled
        :param units: conversions between environment and networks
        :param settings: of the update
        :return: transitions with their value targets
        """
        # Raw samples: the model needs them, and the networks get them through `units`
        replay_data: ReplayBufferSamples = replay_buffer.sample(batch_size)
        replay_data = replay_data._replace(
            observations=replay_data.observations.float(), next_observations=replay_data.next_observations.float()
        )
        context = self.context(units, settings.gamma)
        target_q_values = settings.value_target(replay_data, context, self.targets(settings), self.simulator)
        assert target_q_values.shape == (batch_size, 1), target_q_values.shape
        return TrainingBatch(replay_data.observations, replay_data.actions, target_q_values)

    def start_observations(self, batch: TrainingBatch, context: RolloutContext, settings: Settings) -> th.Tensor:
        """
        :param batch: transitions
        :param context: policy, model, units and steps
        :param settings: of the update
        :return: raw observations of the start states of rollouts, ``(B, *obs_shape)``
        """
        return settings.exploration.perturb(batch.observations, context, settings.trust)

    def why_not_finite(
        self, n_updates: int, batch_size: int, replay_buffer: ReplaySampler, units: Units, settings: Settings
    ) -> str:
        """
        Repeat an update whose gradient was not finite, step by step. The batch is the same one, unless batches are reused or a
        learner drew it from another state of the replay buffer; then it is one like it.

        :param n_updates: number of the update
        :param batch_size: number of transitions
        :param replay_buffer: where transitions are sampled
        :param units: conversions between environment and networks
        :param settings: of the update
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
            for horizon, weight in settings.weights.items():
                reason = first_non_finite_step(observations, context, horizon) if weight >= NEGLIGIBLE_WEIGHT else None
                if reason is not None:
                    reasons.append(f"horizon {horizon} (weight {weight:.2g}): {reason}")
        found = "; ".join(reasons) or "The model is sound at this batch: its noise may be the cause"
        return f"{found}. Check the model with `check_prior_model`, bound what overflows in it, or use shorter horizons."

    def tensors(self) -> list[th.Tensor]:
        """
        :return: tensors that gradients depend on and that change while training: the networks, their targets, and the model;
            in the same order in every copy
        """
        modules: tuple[th.nn.Module, ...] = (self.policy, self.model)
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def parameters(self) -> dict[str, list[th.Tensor]]:
        """
        :return: what gradients have the shapes of, by the name of the network
        """
        return {name: [*trainable_parameters(network)] for name, network in self.networks().items()}
