"""Value targets: what the critics regress on (eq. 12 of the revised text, eq. 11 of the first version)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mpg.common.compilation.step_compiler import StepCompiler
from sb3_mpg.common.rollouts.model_rollout import QFunction, start_rollout
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.double_precision import InDoublePrecision
from sb3_mpg.common.type_aliases import Policy, Simulator
from sb3_mpg.common.units import Units
from sb3_mpg.common.checks import check_keywords, check_number, is_whole


def bootstrap_values(
    network_inputs: th.Tensor,
    actor_target: Policy,
    target_values: QFunction,
    noise_std: float = 0.0,
    noise_clip: float = 0.5,
) -> th.Tensor:
    r"""
    The target critics' values of the target policy's actions,
    :math:`Q_{\omega'}(s, \mathrm{clip}(\pi_{\theta'}(s) + \epsilon))`.

    :param network_inputs: normalised observations, ``(B, *obs_shape)``
    :param actor_target: the target policy
    :param target_values: of :func:`target_values_of`
    :param noise_std: standard deviation of the noise that smooths the target policy, in [-1, 1] units
    :param noise_clip: largest absolute value of that noise
    :return: values, ``(B, 1)``
    """
    actions = actor_target(network_inputs)
    if noise_std > 0:
        noise = (noise_std * th.randn_like(actions)).clamp(-noise_clip, noise_clip)
        actions = (actions + noise).clamp(-1, 1)
    return target_values(network_inputs, actions)


def target_values_of(critic_target: ContinuousCritic, pessimism: float = 1.0) -> QFunction:
    r"""
    What several critics say together: :math:`\kappa \min_i Q_i + (1 - \kappa) \, \mathrm{mean}_i \, Q_i`.

    The least of them (clipped double Q) keeps a policy that climbs the critics from exploiting their errors. It also
    leans the values to wherever the critics agree, and so bends their gradient. A policy that follows a model does not
    exploit critics, and needs neither.

    :param critic_target: the target critics
    :param pessimism: :math:`\kappa`, from 0 to 1
    :return: their values, of normalised observations and actions in [-1, 1]
    """

    def target_values(network_inputs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        values = th.cat(critic_target(network_inputs, actions), dim=1)
        least = values.min(dim=1, keepdim=True).values
        return least if pessimism == 1 else th.lerp(values.mean(dim=1, keepdim=True), least, pessimism)

    return target_values


class ValueTarget(ABC):
    """
    A rule for the values that the critics regress on.

    :cvar needs_simulator: whether a batched simulator must be at hand
    """

    needs_simulator: bool = False

    @property
    def replay_n_steps(self) -> int:
        """Number of recorded steps that one sample of the replay buffer must span."""
        return 1

    @abstractmethod
    def __call__(
        self,
        replay_data: ReplayBufferSamples,
        actor: th.nn.Module,
        actor_target: Policy,
        target_values: QFunction,
        units: Units,
        gamma: float,
        make_simulator: Callable[[int], Simulator],
        compiler: StepCompiler | None = None,
    ) -> th.Tensor:
        """
        :param replay_data: raw observations and rewards, actions in [-1, 1]
        :param actor: the current policy
        :param actor_target: the target policy
        :param target_values: of the target critics, see :func:`target_values_of`
        :param units: between the environment and the networks
        :param gamma: discount factor
        :param make_simulator: gives a simulator of so many agents
        :param compiler: of policies and models, where training is compiled
        :return: target values, ``(B, 1)``
        """


class ReplayTarget(ValueTarget):
    r"""
    Clipped double Q on recorded transitions (MPG-v2 and TD3),
    :math:`r_t + \gamma \min_i Q_{\omega'_i}(s_{t+1}, \pi_{\theta'}(s_{t+1}))`, or its form over the next
    ``n_steps`` recorded transitions, which SB3's ``NStepReplayBuffer`` adds up. Behind a termination there is no value.

    :param n_steps: number of recorded steps; more than one follows the policies that gathered the data
    :param noise_std: standard deviation of the noise that smooths the target policy; the papers' MPG has none
    :param noise_clip: largest absolute value of that noise
    """

    def __init__(self, n_steps: int = 1, noise_std: float = 0.0, noise_clip: float = 0.5):
        self.n_steps = check_n_steps(n_steps)
        check_number("noise_std", noise_std, 0.0)
        check_number("noise_clip", noise_clip, 0.0)
        self.noise_std = noise_std
        self.noise_clip = noise_clip

    @property
    def replay_n_steps(self) -> int:
        return self.n_steps

    def __call__(self, replay_data, actor, actor_target, target_values, units, gamma, make_simulator, compiler=None):
        network_inputs = units.normalize_observations(replay_data.next_observations)
        values = bootstrap_values(network_inputs, actor_target, target_values, self.noise_std, self.noise_clip)
        # For n-step replay the discount is gamma ** n_steps, less where an episode ended earlier
        discounts = gamma if replay_data.discounts is None else replay_data.discounts
        rewards = units.scale_rewards(replay_data.rewards, clip=replay_data.discounts is None)
        return rewards + (1 - replay_data.dones) * discounts * values


class SimulatorTarget(ValueTarget):
    r"""
    n-step TD with the current policy (MPG-v1): from each sampled state the simulator takes the recorded action and then
    follows :math:`\pi_\theta`,
    :math:`\sum_{l=t}^{t+n-1} \gamma^{l-t} r_l + \gamma^n \min_i Q_{\omega'_i}(s_{t+n}, \pi_{\theta'}(s_{t+n}))`. The
    paper has one critic; with the least of two training is steadier, and ``policy_kwargs={"n_critics": 1}`` is the paper's.

    Behind a termination there is nothing. A truncation ends the record of an episode, not what happens: the rollout runs on
    behind it, so that leaving the useful region has its true cost. (To stop there would leave it to the critic, which
    never learns from states outside.)

    A simulator with a method ``exact_model()`` gives the same task in torch; what is compiled runs that instead, together with
    the policy.

    :param n_steps: number of simulator steps
    """

    needs_simulator = True

    def __init__(self, n_steps: int = 25):
        self.n_steps = check_n_steps(n_steps)

    def __call__(self, replay_data, actor, actor_target, target_values, units, gamma, make_simulator, compiler=None):
        simulator = make_simulator(len(replay_data.observations))
        compiler = None if compiler is None or compiler.has_failed else compiler
        model = None if compiler is None or not hasattr(simulator, "exact_model") else simulator.exact_model()
        if model is not None:
            model = InDoublePrecision(model).to(replay_data.observations.device)
            returns, last_inputs, goes_on = self._roll_out(replay_data, actor, units, gamma, model, compiler)
        else:
            returns, last_inputs, goes_on = self._simulate(replay_data, actor, units, gamma, simulator, compiler)
        return returns + gamma**self.n_steps * goes_on * bootstrap_values(last_inputs, actor_target, target_values)

    def _roll_out(
        self,
        replay_data: ReplayBufferSamples,
        actor: th.nn.Module,
        units: Units,
        gamma: float,
        model: PriorModel,
        compiler: StepCompiler,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :return: discounted rewards, ``(B, 1)``, the last normalised observations, and whether there is anything behind,
            bool ``(B, 1)``
        """
        rollout = start_rollout(replay_data.observations, actor, model, units, replay_data.actions)
        rollout, returns = compiler(rollout, self.n_steps, actor, dict(actor.named_parameters()), model, units, gamma)
        return returns, rollout.network_inputs, rollout.alive

    def _simulate(
        self,
        replay_data: ReplayBufferSamples,
        actor: th.nn.Module,
        units: Units,
        gamma: float,
        simulator: Simulator,
        compiler: StepCompiler | None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :return: as :meth:`_roll_out`
        """
        observations = replay_data.observations
        n_agents, device = observations.shape[0], observations.device

        def to_tensor(array: np.ndarray) -> th.Tensor:
            return th.as_tensor(array, dtype=th.float32, device=device)

        policy = actor if compiler is None else compiler.policy(actor, n_agents)
        # The simulator speaks NumPy, and so does the bookkeeping: a small operation of torch costs several times as much
        last_obs = observations.cpu().numpy().copy()
        simulator.set_state(last_obs)
        actions = replay_data.actions
        all_rewards = np.zeros((self.n_steps, n_agents, 1))
        is_terminated = np.zeros(n_agents, dtype=bool)
        # Which agents are stepped; as long as it is all of them, nothing needs to be picked out
        running: slice | np.ndarray = slice(None)
        for step in range(self.n_steps):
            if step > 0:
                actions = policy(units.normalize_observations(to_tensor(last_obs[running])))
            env_actions = units.unscale_actions(actions).cpu().numpy()
            indices = None if isinstance(running, slice) else running
            last_obs[running], all_rewards[step, running, 0], is_terminated[running], _ = simulator.step(env_actions, indices)
            if is_terminated.any():
                running = np.flatnonzero(~is_terminated)
                if len(running) == 0:
                    break
        step_discounts = to_tensor(gamma ** np.arange(self.n_steps)).reshape(-1, 1, 1)
        returns = (step_discounts * units.scale_rewards(to_tensor(all_rewards))).sum(dim=0)
        goes_on = th.as_tensor(~is_terminated[:, np.newaxis], device=device)
        return returns, units.normalize_observations(to_tensor(last_obs)), goes_on


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
    "n_step_replay": partial(ReplayTarget, n_steps=25),
    "n_step_simulator": SimulatorTarget,
}


def make_value_target(value_target: str | ValueTarget, value_target_kwargs: dict[str, Any] | None = None) -> ValueTarget:
    """
    :param value_target: name of a value target, or a value target
    :param value_target_kwargs: arguments of the named value target
    :return: the value target
    :raises ValueError: for an unknown name
    """
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
