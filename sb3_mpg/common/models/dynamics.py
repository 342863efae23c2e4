"""Models that are learned from recorded transitions alone."""

from collections.abc import Callable
from typing import Literal

import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from torch import nn
from torch.nn import functional as F

from sb3_mpg.common.checks import check_count
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.ensemble import NetworkEnsemble, is_architecture
from sb3_mpg.common.models.fitting_schedule import EveryUpdate, FittingSchedule
from sb3_mpg.common.models.known_ends import Never, Terminal, known_terminal
from sb3_mpg.common.models.scaling import Standardizer
from sb3_mpg.common.models.trainable_ensemble import TrainableEnsemble
from sb3_mpg.common.models.windows import Transitions

#: Maps states, actions and next states to rewards, ``(B, 1)``
Reward = Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]
# Bounds of the logarithm of the variance of a scaled target
LOG_VARIANCES = (-10.0, 0.5)
# Scaled error from which the loss of a deterministic model grows linearly
HUBER = 0.1
# Exponent of the variance that weights the likelihood in the fit. With 0, the mean is hardly fitted where the variance was
# large at first; with 1, the few transitions with the largest errors dominate, as in a squared error
VARIANCE_EXPONENT = 0.5
# Data whose mean has moved, or whose standard deviation has changed, by this factor of the earlier deviation need new scales
SHIFT = 2.0


def bounded(log_variances: th.Tensor) -> th.Tensor:
    """
    :param log_variances: any numbers, ``(..., n)``
    :return: the same, softly bounded by ``LOG_VARIANCES``
    """
    low, high = LOG_VARIANCES
    return low + F.softplus(high - F.softplus(high - log_variances) - low)


class DynamicsModel(TrainableEnsemble):
    r"""
    Dynamics and rewards that are learned from the replay buffer, without any knowledge of the system,

    .. math:: s' = s + \sigma_s D_s(s, a) + \mu_s, \quad r = \sigma_r D_r(s, a) + \mu_r,

    by an ensemble of networks :math:`D` (see ``NetworkEnsemble``). The state is the observation. Inputs and targets are
    standardised by the statistics of the data.

    ``using_members`` says which members predict. A Gaussian model learns the noise of the system, too, and draws it with the
    members ``"sampled"``.

    Terminations are learned as far as they are not known (see ``LearnedEnds``). For the MuJoCo tasks of Gymnasium (v5) they
    are known. What is paid for a termination is solved for separately (see ``EndRewards``).

    Predicted states are kept within the range of the data and a margin (see ``StateRange``).

    :param observation_space: box of the flat observations
    :param action_space: box of the flat actions
    :param spec: specification of the environment, by which its terminations may be known
    :param reward: the reward if it is known: a function of states, actions and next states, or a ``PriorModel``; learned by
        default
    :param terminal: where episodes terminate: a function of states, ``(B, S)`` to bool ``(B, 1)``; ``"known"`` for what is
        known of a task of Gymnasium; ``None`` if nothing is known. Terminations are learned in any case, and replace the
        known ones if they are as right
    :param distribution: ``"deterministic"``: the mean of the next state and of the reward, by the Huber loss;
        ``"gaussian"``: mean and variance, by the likelihood, weighted by a power of the variance
    :param n_members: number of networks that predict
    :param n_spares: number of networks that are fitted as well; those with the largest held-out errors do not predict
    :param net_arch: sizes of the hidden layers of each network
    :param activation_fn: activation function
    :param learning_rate: learning rate of Adam
    :param weight_decay: factor of the squares of the weights, halved and added to the loss
    :param fitting_schedule: when the model is fitted: once in each update by default (``EveryUpdate``), or ``UntilConverged``

    :raises ValueError: for impossible values
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        spec: EnvSpec | None = None,
        reward: Reward | PriorModel | None = None,
        terminal: Terminal | Literal["known"] | None = "known",
        distribution: Literal["deterministic", "gaussian"] = "gaussian",
        n_members: int = 2,
        n_spares: int = 0,
        net_arch: tuple[int, ...] = (128, 128),
        activation_fn: type[nn.Module] = nn.SiLU,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        fitting_schedule: FittingSchedule | None = None,
    ):
        check_count("n_members", n_members, 1)
        check_count("n_spares", n_spares, 0)
        if not is_architecture(net_arch):
            raise ValueError(
                f"`net_arch` of the model lists the sizes of its hidden layers, as in (128, 128), got {net_arch!r}."
            )
        if distribution not in ("deterministic", "gaussian"):
            raise ValueError(f"`distribution` must be 'deterministic' or 'gaussian', got {distribution!r}.")
        if not (terminal is None or terminal == "known" or callable(terminal)):
            raise ValueError(f"`terminal` must be a function of states, 'known' or None, got {terminal!r}.")
        if not (reward is None or callable(reward)):
            raise ValueError(f"`reward` must be a function, a PriorModel or None, got {reward!r}.")
        if not (fitting_schedule is None or isinstance(fitting_schedule, FittingSchedule)):
            raise ValueError(f"`fitting_schedule` must be an EveryUpdate or an UntilConverged, got {fitting_schedule!r}.")
        (n_states,), (n_actions,) = observation_space.shape, action_space.shape
        if callable(terminal):
            ends = terminal(th.zeros(2, n_states))
            if ends.shape != (2, 1) or ends.dtype != th.bool:
                raise ValueError(
                    f"`terminal` must map states (B, {n_states}) to booleans (B, 1), got {ends.dtype} of shape "
                    f"{tuple(ends.shape)} for 2 states; slices as states[:, :1] keep a dimension."
                )
        n_inputs, n_targets = n_states + n_actions, n_states + 1
        networks = NetworkEnsemble(
            n_members,
            n_inputs,
            n_targets * (2 if distribution == "gaussian" else 1),
            tuple(net_arch),
            learning_rate,
            activation_fn,
            frequencies=(),
            n_spares=n_spares,
            weight_decay=weight_decay,
        )
        super().__init__(networks, n_states, n_actions)
        self.is_gaussian = distribution == "gaussian"
        # A module is moved with this one
        self.reward_model = reward if isinstance(reward, PriorModel) else None
        self.known_reward = reward.reward if isinstance(reward, PriorModel) else reward
        self.known_terminal = known_terminal(spec) if terminal == "known" else terminal
        self.fitting_schedule = EveryUpdate() if fitting_schedule is None else fitting_schedule
        # Of the changes of states, and of rewards
        self.target_standardizer = Standardizer(n_targets)

    @property
    def may_terminate(self) -> bool:
        is_known = self.known_terminal is not None and not isinstance(self.known_terminal, Never)
        return is_known or self.ends.is_used

    def claims_end(self, states: th.Tensor) -> th.Tensor:
        return super().terminal(states) if self.known_terminal is None else self.known_terminal(states)

    def terminal(self, states: th.Tensor) -> th.Tensor:
        return self.learned_ends(states) > 0.5 if self.ends.is_used else self.claims_end(states)

    def termination_probability(self, states: th.Tensor) -> th.Tensor:
        return self.learned_ends(states) if self.ends.is_used else self.claims_end(states).to(states.dtype)

    def _outputs(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :return: changes of the states, and rewards, in the units of the environment, ``(B, S + 1)``
        """
        outputs = self.networks(self.scaled_inputs(states, actions), self.members)
        if self.is_gaussian:
            outputs, log_variances = outputs.chunk(2, dim=1)
            if self.members == "sampled":
                outputs = outputs + (0.5 * bounded(log_variances)).exp() * th.randn_like(outputs)
        return outputs * self.target_standardizer.std + self.target_standardizer.mean

    def _next_states(self, states: th.Tensor, outputs: th.Tensor) -> th.Tensor:
        next_states = self.state_add(states, outputs[:, : self.n_states])
        return self.range.clip(self, next_states, self.is_extrapolating)

    def _rewards(
        self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor, outputs: th.Tensor | None = None
    ) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :param next_states: ``(B, S)``
        :param outputs: of :meth:`_outputs` for them, if they are computed already, ``(B, S + 1)``
        :return: rewards, ``(B, 1)``
        """
        if self.known_reward is not None:
            return self.known_reward(states, actions, next_states)
        rewards = (self._outputs(states, actions) if outputs is None else outputs)[:, self.n_states :]
        return rewards + self.termination_probability(next_states) * self.end_rewards.jump if self.may_terminate else rewards

    def step(self, states: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        outputs = self._outputs(states, actions)
        next_states = self._next_states(states, outputs)
        return next_states, self._rewards(states, actions, next_states, outputs)

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return self._next_states(states, self._outputs(states, actions))

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return self._rewards(states, actions, next_states)

    @th.no_grad()
    def _inputs_and_targets(self, transitions: Transitions) -> tuple[th.Tensor, th.Tensor]:
        """
        :param transitions: recorded transitions
        :return: standardised inputs, ``(B, S + A)``, and targets, ``(B, S + 1)``, of the transitions that are finite. The
            reward of a termination, which jumps, is replaced by the mean of the others.
        """
        states, actions, rewards, next_states, _ = transitions
        targets = self.target_standardizer(th.cat([self.state_difference(next_states, states), rewards], dim=1))
        is_jump = self.may_jump(transitions, next_states)
        targets = th.cat([targets[:, : self.n_states], th.where(is_jump, 0.0, targets[:, self.n_states :])], dim=1)
        inputs = self.scaled_inputs(states, actions)
        # One sum, because to look at each row takes as long as the activation functions
        if th.isfinite(inputs.sum() + targets.sum()):
            return inputs, targets
        is_finite = th.isfinite(targets).all(dim=1) & th.isfinite(inputs).all(dim=1)
        return inputs[is_finite], targets[is_finite]

    @th.no_grad()
    def rescale(self, transitions: Transitions) -> None:
        is_finite = th.stack([th.isfinite(tensor).all(dim=1) for tensor in transitions[:4]]).all(dim=0)
        transitions = transitions.select(is_finite)
        if len(transitions.rewards) == 0:
            return
        states, actions, rewards, next_states, _ = transitions
        self.range.extend(self, transitions)
        self.standardizer.fit(th.cat([states, actions], dim=1))
        is_ordinary = ~self.may_jump(transitions, next_states).squeeze(1)
        targets = th.cat([self.state_difference(next_states, states), rewards], dim=1)
        self.target_standardizer.fit(targets[is_ordinary] if is_ordinary.any() else targets)
        # The outputs have other units now
        self.networks.reset_outputs()
        self.ends.reset()
        self.solve_end_rewards(transitions)

    @th.no_grad()
    def needs_rescaling(self, transitions: Transitions) -> bool:
        inputs, targets = self._inputs_and_targets(transitions)
        if len(inputs) < 2:
            return False
        scaled = th.cat([inputs, targets], dim=1)
        return bool((scaled.mean(dim=0).abs() > SHIFT).any() or (scaled.std(dim=0) > SHIFT).any())

    @th.no_grad()
    def solve_end_rewards(self, transitions: Transitions) -> None:
        if self.known_reward is not None:
            return
        states, actions, rewards, next_states, _ = transitions
        is_end, _ = self.ends_of(transitions, next_states)
        with self.using_members("mean"):
            predicted = self._outputs(states, actions)[:, self.n_states :]
        self.end_rewards.solve(self.end_rewards.jump, rewards - predicted, is_end)

    def _loss(self, outputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        :param outputs: of the networks, ``(..., n_outputs)``
        :param targets: ``(..., S + 1)``
        :return: the Huber loss, so that a few jumps of the environment do not dominate the fit; or the negative
            log-likelihood of a Gaussian up to a constant, ``(..., S + 1)``
        """
        if not self.is_gaussian:
            return F.smooth_l1_loss(outputs, targets, reduction="none", beta=HUBER)
        means, log_variances = outputs.chunk(2, dim=-1)
        log_variances = bounded(log_variances)
        return (means - targets).square() * (-log_variances).exp() + log_variances

    def _weights(self, outputs: th.Tensor) -> th.Tensor | float:
        """
        :param outputs: of the networks, ``(B, n_outputs)``
        :return: weights of the losses in the fit: those of the likelihood of a Gaussian grow with its variance (Seitzer et al.
            2022, "On the Pitfalls of Heteroscedastic Uncertainty Estimation with Probabilistic Neural Networks"),
            ``(B, S + 1)``
        """
        if not self.is_gaussian:
            return 1.0
        return (VARIANCE_EXPONENT * bounded(outputs.detach().chunk(2, dim=1)[1])).exp()

    def fit(self, transitions: Transitions) -> float:
        # The rows of one network, because all rows come from the same steps
        rows = slice(-(-len(transitions.rewards) // self.networks.n_fitted))
        self.range.extend(self, Transitions(*(tensor[rows] for tensor in transitions)))
        inputs, targets = self._inputs_and_targets(transitions)
        if len(inputs) == 0:
            return float("nan")
        n_networks = self.networks.n_fitted
        outputs = self.networks(inputs, "dealt", is_fitting=True)
        losses = self._loss(outputs, targets)
        # The sum over the networks of their means, so that the number of networks does not change the steps of any of them
        self.networks.descend(n_networks * (losses * self._weights(outputs)).mean())
        return losses.mean().item()

    @th.no_grad()
    def validation_error(self, transitions: Transitions) -> float:
        inputs, targets = self._inputs_and_targets(transitions)
        return self._loss(self.networks(inputs, "dealt"), targets).mean().item()

    @th.no_grad()
    def keep_best(self, transitions: Transitions) -> None:
        inputs, targets = self._inputs_and_targets(transitions)
        means = self.networks.of_all(inputs)[..., : self.n_states + 1]
        self.networks.keep_best((means - targets).square().mean(dim=(1, 2)))

    def restore_best(self) -> None:
        self.networks.restore_best()
