"""Value targets: what the critics regress on (eq. 12 of the revised text, eq. 11 of the first version)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecEnv

from sb3_mpg.common.checks import check_keywords, check_number, is_whole
from sb3_mpg.common.models.double_precision import InDoublePrecision
from sb3_mpg.common.models.windows import to_tensor
from sb3_mpg.common.rollouts.model_rollout import start_rollout
from sb3_mpg.common.rollouts.steps import QFunction, RolloutContext
from sb3_mpg.common.type_aliases import Policy, Simulator
from sb3_mpg.common.utils import parameters_of_modules


def target_values_of(critic_target: ContinuousCritic, pessimism: float = 1.0) -> QFunction:
    r"""
    The value of several critics, :math:`\kappa \min_i Q_i + (1 - \kappa) \, \mathrm{mean}_i \, Q_i`.

    The minimum (clipped double Q) keeps a policy from exploiting overestimated values. It also biases values towards regions
    where the critics agree, which distorts their gradient. A policy that follows a model does not exploit the critics and
    does not need the minimum.

    :param critic_target: the target critics
    :param pessimism: :math:`\kappa`, from 0 to 1
    :return: maps normalised observations and actions in [-1, 1] to values
    """

    def target_values(network_inputs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        values = th.cat(critic_target(network_inputs, actions), dim=1)
        least = values.min(dim=1, keepdim=True).values
        return least if pessimism == 1 else th.lerp(values.mean(dim=1, keepdim=True), least, pessimism)

    return target_values


class TargetNetworks(NamedTuple):
    """
    The target networks, for value targets.

    :param actor: the target policy
    :param values: value of the target critics, see :func:`target_values_of`
    :param smoothing: share of the noise of a value target that smooths the target policy, from 0 to 1
    """

    actor: Policy
    values: QFunction
    smoothing: float = 1.0


def bootstrap_values(
    network_inputs: th.Tensor, targets: TargetNetworks, noise_std: float = 0.0, noise_clip: float = 0.5
) -> th.Tensor:
    r"""
    The values of the target policy's actions,
    :math:`Q_{\omega'}(s, \mathrm{clip}(\pi_{\theta'}(s) + \epsilon))`.

    :param network_inputs: normalised observations, ``(B, O)``
    :param targets: the target networks
    :param noise_std: standard deviation of the noise that smooths the target policy, in [-1, 1] units
    :param noise_clip: largest absolute value of that noise
    :return: values, ``(B, 1)``
    """
    actions = targets.actor(network_inputs)
    noise_std = noise_std * targets.smoothing
    if noise_std > 0:
        noise = (noise_std * th.randn_like(actions)).clamp(-noise_clip, noise_clip)
        actions = (actions + noise).clamp(-1, 1)
    return targets.values(network_inputs, actions)


class ValueTarget(ABC):
    """
    A rule for the values that the critics regress on. It is sent to learner processes with each update, so it must be small
    and picklable, and keep nothing between two calls.

    :cvar needs_simulator: whether the target needs a batched simulator
    """

    needs_simulator: bool = False

    @property
    def replay_n_steps(self) -> int:
        """Number of recorded steps that one sample of the replay buffer must span."""
        return 1

    def check_env(self, env: VecEnv) -> None:
        """
        :param env: the environment
        :raises ValueError: when the target needs a simulator and the environment offers none
        """
        if self.needs_simulator and not env.has_attr("make_simulator"):
            raise ValueError(
                "The value target runs the policy in the simulator from recorded states, but the environment has no method "
                "`make_simulator(num_agents)` and cannot be put into a state; use an algorithm with "
                "value_target='n_step_replay' (and horizons=(0,), weighting='constant' to do without a model)."
            )

    def simulator_for(self, n_agents: int, env: VecEnv | None, simulator: Simulator | None) -> Simulator | None:
        """
        :param n_agents: number of agents
        :param env: the environment, which makes simulators
        :param simulator: the simulator so far, if there is one
        :return: a simulator of so many agents, if the target needs one and there is an environment
        """
        if not self.needs_simulator or env is None or (simulator is not None and simulator.num_agents == n_agents):
            return simulator
        return env.env_method("make_simulator", n_agents, indices=[0])[0]

    @abstractmethod
    def __call__(
        self,
        replay_data: ReplayBufferSamples,
        context: RolloutContext,
        targets: TargetNetworks,
        simulator: Simulator | None,
    ) -> th.Tensor:
        """
        :param replay_data: raw observations and rewards, actions in [-1, 1]
        :param context: the current policy and critic, the model, units, discount factor and steps
        :param targets: the target networks
        :param simulator: simulator with one agent for each sample, if the target needs one
        :return: target values, ``(B, 1)``
        """


class ReplayTarget(ValueTarget):
    r"""
    Clipped double Q on recorded transitions (MPG-v2 and TD3),
    :math:`r_t + \gamma \min_i Q_{\omega'_i}(s_{t+1}, \pi_{\theta'}(s_{t+1}))`, or its form over the next
    ``n_steps`` recorded transitions, whose rewards SB3's ``NStepReplayBuffer`` sums. Terminal states have no value.

    As in TD3, noise smooths the target policy, so that a policy cannot exploit narrow peaks of the critics. A policy that
    follows a model does not, and the noise is multiplied by the distrust in the model.

    :param n_steps: number of recorded steps; with more than one, the target is off-policy: it contains recorded actions
    :param noise_std: standard deviation of the noise that smooths the target policy, without trust; the papers have none
    :param noise_clip: largest absolute value of that noise
    """

    def __init__(self, n_steps: int = 1, noise_std: float = 0.2, noise_clip: float = 0.5):
        self.n_steps = check_n_steps(n_steps)
        check_number("noise_std", noise_std, 0.0)
        check_number("noise_clip", noise_clip, 0.0)
        self.noise_std = noise_std
        self.noise_clip = noise_clip

    @property
    def replay_n_steps(self) -> int:
        return self.n_steps

    def __call__(
        self,
        replay_data: ReplayBufferSamples,
        context: RolloutContext,
        targets: TargetNetworks,
        simulator: Simulator | None,
    ) -> th.Tensor:
        if self.n_steps > 1 and replay_data.discounts is None:
            raise ValueError(
                f"The value target spans {self.n_steps} recorded steps, but the replay buffer samples single ones."
            )
        units = context.units
        network_inputs = units.normalize_observations(replay_data.next_observations)
        values = bootstrap_values(network_inputs, targets, self.noise_std, self.noise_clip)
        # The discount of n steps is gamma ** n_steps, or a lower power where an episode ended earlier
        discounts = context.gamma if replay_data.discounts is None else replay_data.discounts
        rewards = units.scale_rewards(replay_data.rewards, clip=replay_data.discounts is None)
        return rewards + (1 - replay_data.dones) * discounts * values


class SimulatorTarget(ValueTarget):
    r"""
    n-step TD with the current policy (MPG-v1). From each sampled state, the simulator takes the recorded action and then
    follows :math:`\pi_\theta`:
    :math:`\sum_{l=t}^{t+n-1} \gamma^{l-t} r_l + \gamma^n \min_i Q_{\omega'_i}(s_{t+n}, \pi_{\theta'}(s_{t+n}))`. The
    paper has one critic, ``policy_kwargs={"n_critics": 1}``; the minimum of two makes training steadier.

    Terminal states are followed by neither reward nor value. The rollout continues after a truncation, so that leaving the
    useful region has its true cost. (If the rollout stopped there, the target would bootstrap from states outside the region,
    which are never in the data.)

    A simulator may provide the same task in torch by a method ``exact_model()``. With compilation, that model is rolled out
    instead.

    :param n_steps: number of simulator steps
    """

    needs_simulator = True

    def __init__(self, n_steps: int = 25):
        self.n_steps = check_n_steps(n_steps)

    def __call__(
        self,
        replay_data: ReplayBufferSamples,
        context: RolloutContext,
        targets: TargetNetworks,
        simulator: Simulator | None,
    ) -> th.Tensor:
        assert simulator is not None, "The value target needs a simulator"
        exact_model = getattr(simulator, "exact_model", None) if context.steps.is_compiled else None
        model = None if exact_model is None else exact_model()
        if model is not None:
            model = InDoublePrecision(model).to(replay_data.observations.device)
            returns, last_inputs, goes_on = self._roll_out(replay_data, context._replace(model=model))
        else:
            returns, last_inputs, goes_on = self._simulate(replay_data, context, simulator)
        return returns + context.gamma**self.n_steps * goes_on * bootstrap_values(last_inputs, targets)

    def _roll_out(self, replay_data: ReplayBufferSamples, context: RolloutContext) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :return: sums of discounted rewards, ``(B, 1)``; last normalised observations, ``(B, O)``; probability that the row
            has not terminated, ``(B, 1)``
        """
        rollout = start_rollout(replay_data.observations, context, replay_data.actions)
        rollout, returns = context.steps.advance(rollout, self.n_steps, parameters_of_modules(context.actor), context)
        return returns, rollout.network_inputs, rollout.alive

    def _simulate(
        self, replay_data: ReplayBufferSamples, context: RolloutContext, simulator: Simulator
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :return: as :meth:`_roll_out`
        """
        units = context.units
        observations = replay_data.observations
        n_agents, device = observations.shape[0], observations.device

        policy = context.steps.policy(context.actor, n_agents)
        # NumPy, as in the simulator: a small operation in torch takes several times as long
        last_obs = observations.cpu().numpy().copy()
        simulator.set_state(last_obs)
        actions = replay_data.actions
        all_rewards = np.zeros((self.n_steps, n_agents, 1))
        is_terminated = np.zeros(n_agents, dtype=bool)
        # Agents that have not terminated: a slice while there are all of them, which avoids copies
        running: slice | np.ndarray = slice(None)
        for step in range(self.n_steps):
            if step > 0:
                actions = policy(units.normalize_observations(to_tensor(last_obs[running], device)))
            env_actions = units.unscale_actions(actions).cpu().numpy()
            indices = None if isinstance(running, slice) else running
            last_obs[running], all_rewards[step, running, 0], is_terminated[running], _ = simulator.step(env_actions, indices)
            if is_terminated.any():
                running = np.flatnonzero(~is_terminated)
                if len(running) == 0:
                    break
        step_discounts = to_tensor(context.gamma ** np.arange(self.n_steps), device).reshape(-1, 1, 1)
        returns = (step_discounts * units.scale_rewards(to_tensor(all_rewards, device))).sum(dim=0)
        goes_on = th.as_tensor(~is_terminated[:, np.newaxis], device=device)
        return returns, units.normalize_observations(to_tensor(last_obs, device)), goes_on


def check_n_steps(n_steps: int) -> int:
    """
    :param n_steps: number of steps of a value target
    :return: the same
    :raises ValueError: when it is not a positive whole number
    """
    if not is_whole(n_steps) or n_steps < 1:
        raise ValueError(f"A value target spans a positive whole number of steps, got n_steps={n_steps!r}.")
    return int(n_steps)


VALUE_TARGETS: dict[str, Callable[..., ValueTarget]] = {
    "clipped_double_q": ReplayTarget,
    "n_step_replay": partial(ReplayTarget, n_steps=25, noise_std=0.0),
    "n_step_simulator": SimulatorTarget,
}


def make_value_target(
    value_target: str | ValueTarget, value_target_kwargs: dict[str, Any] | None = None, n_steps: int = 1
) -> ValueTarget:
    """
    :param value_target: name of a value target, or a value target
    :param value_target_kwargs: arguments of the named value target
    :param n_steps: number of recorded steps that the target spans: SB3's argument, for targets from the replay buffer
    :return: the value target
    :raises ValueError: for an unknown name, arguments that the value target does not have, or a contradiction
    """
    if check_n_steps(n_steps) > 1:
        if value_target not in ("clipped_double_q", "n_step_replay") or "n_steps" in (value_target_kwargs or {}):
            raise ValueError(
                f"`n_steps={n_steps}` asks for a target from {n_steps} recorded steps, but value_target={value_target!r} with "
                f"value_target_kwargs={value_target_kwargs} says how many steps it takes; give only one of them."
            )
        value_target, value_target_kwargs = "n_step_replay", {**(value_target_kwargs or {}), "n_steps": n_steps}
    if isinstance(value_target, ValueTarget):
        if value_target_kwargs:
            raise ValueError("`value_target_kwargs` goes with the name of a target, but `value_target` is a target.")
        return value_target
    if not isinstance(value_target, str) or value_target not in VALUE_TARGETS:
        raise ValueError(
            f"Unknown value target {value_target!r}; choose one of {sorted(VALUE_TARGETS)} or pass a ValueTarget."
        )
    make = VALUE_TARGETS[value_target]
    return make(**check_keywords("value_target_kwargs", value_target_kwargs, make))
