"""What trainable models of this library share: networks, the scales of their inputs, and learned terminations."""

import copy
from abc import abstractmethod
from typing import Any

import torch as th
from stable_baselines3.common.utils import update_learning_rate

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.ensemble import NetworkEnsemble
from sb3_mpg.common.models.learned_ends import LearnedEnds, blurred
from sb3_mpg.common.models.least_squares import EndRewards
from sb3_mpg.common.models.scaling import Standardizer
from sb3_mpg.common.models.state_range import StateRange
from sb3_mpg.common.models.trainable import TrainableModel, copy_to_cpu
from sb3_mpg.common.models.windows import Transitions


class TrainableEnsemble(TrainableModel):
    """
    A trainable model of networks side by side. It learns where episodes terminate (see ``LearnedEnds``), and what is paid for
    it (see ``EndRewards``). Terminations that it claims without having learned them are those of the user, or none.

    :param networks: networks of the dynamics or of their correction
    :param n_states: number of dimensions of a state
    :param n_actions: number of dimensions of an action
    :param others: arguments of the next class in the order of inheritance
    """

    can_learn_ends = True

    def __init__(self, networks: NetworkEnsemble, n_states: int, n_actions: int, **others: Any):
        super().__init__(**others)
        self.n_members, self.n_states = networks.n_members, n_states
        self.networks = networks
        self.standardizer = Standardizer(n_states + n_actions)
        self.range = StateRange(n_states)
        # Models that do not need it draw the same random numbers as without
        with th.random.fork_rng(devices=[]):
            self.ends = LearnedEnds(n_states, networks.n_members, networks.learning_rate)
        self.end_rewards = EndRewards()

    def refresh(self) -> None:
        self.ends.refresh()

    @property
    def state_model(self) -> PriorModel:
        """The model that defines the state: its observation, and differences between states."""
        return self

    def scaled_states(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :return: the states within the range of the data, standardised by their statistics, ``(B, S)``
        """
        mean, std = self.standardizer.mean[: self.n_states], self.standardizer.std[: self.n_states]
        return (self.range.clip(self.state_model, states) - mean) / std

    def scaled_inputs(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        :return: both, standardised by the statistics of the data, ``(B, S + A)``
        """
        if self.is_extrapolating:
            # Far from the data, predict what was learned of the nearest states with data
            states = self.range.clip(self.state_model, states)
        return self.standardizer(th.cat([states, actions], dim=1))

    @abstractmethod
    def claims_end(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :return: whether an episode terminates there as far as it is known without learning, bool ``(B, 1)``
        """

    def learned_ends(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: ``(B, S)``
        :return: learned probabilities that an episode terminates there, ``(B, 1)``
        """
        return self.ends(self.scaled_states(states), self.members)

    def ends_of(self, transitions: Transitions, next_states: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param transitions: recorded transitions
        :param next_states: their next states, ``(B, S)``
        :return: whether the episode terminated, and whether the model claims that without having learned it, bool ``(B, 1)``
            each; the claim is believed where it is unknown
        """
        is_claimed = self.claims_end(next_states)
        return th.where(th.isnan(transitions.terminated), is_claimed, transitions.terminated > 0), is_claimed

    def may_jump(self, transitions: Transitions, next_states: th.Tensor) -> th.Tensor:
        """
        :param transitions: recorded transitions
        :param next_states: their next states, ``(B, S)``
        :return: whether the reward may jump because an episode ends, recorded or claimed, bool ``(B, 1)``
        """
        is_end, is_claimed = self.ends_of(transitions, next_states)
        return is_end | is_claimed

    def fit_ends(self, steps: Transitions, ends: Transitions, rate: float) -> None:
        others, terminal = (
            self._blurred(transitions, is_end)
            for transitions, is_end in ((steps.select((steps.terminated == 0)[:, 0]), False), (ends, True))
        )
        if len(others) > 0 and len(terminal) > 0:
            self.ends.fit(others, terminal, rate)

    @th.no_grad()
    def _blurred(self, transitions: Transitions, is_end: bool) -> th.Tensor:
        """
        :param transitions: recorded transitions
        :param is_end: whether they terminated
        :return: their blurred next states, scaled; without those that are not finite, ``(B', S)``
        """
        states = self.state_from_observation(transitions.observations)
        next_states = self.state_from_observation(transitions.next_observations)
        scaled = self.scaled_states(blurred(self.state_model, states, next_states, is_end))
        return scaled[th.isfinite(scaled).all(dim=1)]

    @property
    def learns_ends(self) -> bool:
        return self.ends.is_used

    def use_learned_ends(self, is_used: bool) -> None:
        self.ends.use(is_used)

    def own_state(self) -> dict[str, th.Tensor]:
        """
        :return: the state dictionary, without what is the user's
        """
        return self.state_dict()

    def is_of_this_model(self, state: dict[str, th.Tensor]) -> bool:
        """
        :param state: an earlier :meth:`own_state`
        :return: whether it is of a model with the same parameters
        """
        own = self.own_state()
        return own.keys() == state.keys() and all(own[name].shape == tensor.shape for name, tensor in state.items())

    def learned_state(self) -> dict[str, Any]:
        optimizers = [networks.optimizer.state_dict() for networks in (self.networks, self.ends.networks)]
        return copy_to_cpu({"model": self.own_state(), "optimizers": optimizers})

    @th.no_grad()
    def load_learned_state(self, state: dict[str, Any]) -> bool:
        if not self.is_of_this_model(state["model"]):
            return False
        self.load_state_dict(state["model"], strict=False)
        self.refresh()
        for networks, optimizer in zip((self.networks, self.ends.networks), state["optimizers"], strict=True):
            # torch would share the tensors of the optimizer with the state
            networks.optimizer.load_state_dict(copy.deepcopy(optimizer))
            # The saved learning rate may have been replaced
            update_learning_rate(networks.optimizer, networks.learning_rate)
        return True
