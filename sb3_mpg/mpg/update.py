from collections.abc import Mapping
from dataclasses import dataclass

import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.td3.policies import Actor

from sb3_mpg.common.balance import balanced_mse_loss, rollout_value_loss
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.trainable import TrainableModel
from sb3_mpg.common.rollouts.exploration import perturbed_actions
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.rollouts.planned_actions import with_imitation
from sb3_mpg.common.rollouts.policy_gradient import mixed_policy_gradient
from sb3_mpg.common.rollouts.steps import QFunction, RolloutContext
from sb3_mpg.common.type_aliases import Differentiate, GradientResult, TrainingBatch
from sb3_mpg.common.units import Units
from sb3_mpg.common.update import Update, UpdateSettings
from sb3_mpg.common.utils import gradient_of
from sb3_mpg.common.value_targets import TargetNetworks, target_values_of
from sb3_mpg.mpg.policies import MPGPolicy


@dataclass(frozen=True, kw_only=True)
class MPGUpdateSettings(UpdateSettings):
    """
    Settings of an update of MPG, in addition to those of ``UpdateSettings``.

    :param policy_delay: the policy is updated once in this number of updates
    :param differentiate: which actions of the model rollout carry the gradient
    :param rollout_batch_size: number of states that rollouts start from where the model leads
    """

    policy_delay: int
    differentiate: Differentiate
    rollout_batch_size: int

    @property
    def model_leads(self) -> bool:
        """Whether a model that learns from the data has most of the weight."""
        return min(self.trust, 1 - self.weights.get(0, 0.0)) >= 0.5


class MPGUpdate(Update[MPGUpdateSettings]):
    """
    The gradients of MPG: the critics regress on the value target, and the policy follows the mixed policy gradient (eq. 9).
    Both gradients are computed at the same parameters, as in the papers; in TD3 the actor follows the critic that was just
    updated.

    :param policy: networks and target networks
    :param model: the model that the gradient is back-propagated through
    :param seed: seed of the random numbers of all updates
    """

    policy: MPGPolicy
    actor: Actor
    critic: ContinuousCritic

    def __init__(self, policy: MPGPolicy, model: PriorModel, seed: int):
        super().__init__(policy, model, seed)
        self.actor = policy.actor
        self.critic = policy.critic

    def networks(self) -> Mapping[str, th.nn.Module]:
        return {"critic": self.critic, "actor": self.actor}

    def target_networks(self) -> Mapping[str, th.nn.Module]:
        return {"critic": self.policy.critic_target, "actor": self.policy.actor_target}

    @property
    def n_critics(self) -> int:
        return len(self.critic.q_networks)

    def q_function(self, index: int) -> QFunction:
        # SB3's `q1_forward` extracts features without gradient, but rollouts need dQ/ds
        def q_function(network_inputs: th.Tensor, actions: th.Tensor) -> th.Tensor:
            features = self.critic.extract_features(network_inputs, self.critic.features_extractor)
            return self.critic.q_networks[index](th.cat([features, actions], dim=1))

        return q_function

    def targets(self, settings: MPGUpdateSettings) -> TargetNetworks:
        # With measured errors, the minimum of the critics and the noise of the target policy are weighted as horizon 0
        distrust = 1 - settings.trust
        values = target_values_of(self.policy.critic_target, pessimism=distrust)
        return TargetNetworks(self.policy.actor_target, values, smoothing=distrust)

    def n_model_steps(self, settings: MPGUpdateSettings) -> float:
        return max(settings.weights) / settings.policy_delay

    def n_rollout_rows(self, settings: MPGUpdateSettings, batch_size: int) -> int:
        # Only a model that learns may come to lead
        return min(settings.rollout_batch_size, batch_size) if isinstance(self.model, TrainableModel) else batch_size

    def start_observations(self, batch: TrainingBatch, context: RolloutContext, settings: MPGUpdateSettings) -> th.Tensor:
        # A rollout has little noise, so that a few of them say what many say. Critics are noisy: without the model, the policy
        # needs the whole batch
        if settings.model_leads:
            batch = batch._replace(observations=batch.observations[: settings.rollout_batch_size])
        return super().start_observations(batch, context, settings)

    def compute_gradients(
        self, batch: TrainingBatch, n_updates: int, units: Units, settings: MPGUpdateSettings
    ) -> GradientResult:
        # Get current Q-value estimates for each critic network
        current_q_values = self.critic(units.normalize_observations(batch.observations), batch.actions)

        # Compute critic loss
        critic_losses = [balanced_mse_loss(current_q, batch.target_q_values, settings.trust) for current_q in current_q_values]
        critic_loss = th.stack(critic_losses).sum()
        logs = {"train/critic_loss": critic_loss.item()}

        # Delayed policy updates
        if n_updates % settings.policy_delay != 0:
            return GradientResult({"critic": gradient_of(critic_loss, self.critic)}, logs)

        # Compute actor loss: the returns of all horizons, from replayed and from perturbed start states
        context = self.context(units, settings.gamma)
        observations = self.start_observations(batch, context, settings)
        # Only "first_action" gives a gradient for each state, which can be normalised
        balance = settings.trust if settings.differentiate == "first_action" else 0.0
        policy_gradient = mixed_policy_gradient(observations, context, settings.weights, settings.differentiate, balance)
        logs["train/actor_loss"] = policy_gradient.loss.item()
        logs.update({f"horizons/weight_{horizon}": weight for horizon, weight in settings.weights.items()})
        logs.update({f"horizons/return_{horizon}": mean.item() for horizon, mean in policy_gradient.mean_returns.items()})
        share_masked = logs["train/masked_states"] = policy_gradient.share_masked.item()

        # To the extent that the model is trusted, the critics also regress on the returns of the policy's rollouts
        total_critic_loss = critic_loss
        if settings.trust > 0:
            policy_values = self.critic(units.normalize_observations(observations), policy_gradient.actions)
            value_loss = rollout_value_loss(policy_values, policy_gradient.returns, settings.weights, settings.trust)
            logs["train/rollout_value_loss"] = value_loss.item()
            total_critic_loss = critic_loss + value_loss
        if settings.blind_trust > 0:
            blind_loss = self.blind_value_loss(observations, policy_gradient.actions, context, settings)
            logs["train/blind_value_loss"] = blind_loss.item()
            total_critic_loss = total_critic_loss + blind_loss

        # While plans are better than the policy, it imitates them
        actor_gradients = policy_gradient.gradients
        if settings.imitation > 0:
            planned, planned_actions = self.plans.sample(len(observations))
            network_inputs = units.normalize_observations(planned)
            actor_gradients = with_imitation(actor_gradients, self.actor, network_inputs, planned_actions, settings.imitation)
        logs["train/imitation"] = settings.imitation

        gradients = {"critic": gradient_of(total_critic_loss, self.critic), "actor": actor_gradients}
        return GradientResult(gradients, logs, share_masked)

    def blind_value_loss(
        self, observations: th.Tensor, actions: th.Tensor, context: RolloutContext, settings: MPGUpdateSettings
    ) -> th.Tensor:
        """
        The error of the critics with respect to the returns of rollouts whose first action is perturbed. Where the derivative
        of the returns is blind, the critics learn from their differences, and the policy follows the critics.

        :param observations: raw observations of the start states, ``(B, O)``
        :param actions: actions of the policy in these states, in [-1, 1], ``(B, A)``
        :param context: policy, model, units, discount factor and steps
        :param settings: settings of the update
        :return: the loss, a scalar
        """
        longest = max(settings.weights)
        with th.no_grad():
            tried = perturbed_actions(actions)
            returns = model_rollout(observations, context, [longest], first_actions=tried)
        values = self.critic(context.units.normalize_observations(observations), tried)
        return rollout_value_loss(values, returns, {longest: settings.blind_trust}, settings.trust)
