"""The interfaces of models that learn from recorded transitions."""

import copy
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.ensemble import Members, even_rows
from sb3_mpg.common.models.fitting_schedule import EveryUpdate, FittingSchedule
from sb3_mpg.common.models.windows import Transitions, Windows


class TrainableModel(PriorModel):
    """
    A model that is fitted to recorded transitions during training: a correction of a prior model, or learned dynamics.

    It is an ensemble. ``members`` says which of its members predict, see :meth:`using_members`; the train or evaluation mode
    says only what it does for every ``PriorModel`` (noise, dropout).

    All that is learned lives in parameters and buffers, so that ``state_dict()`` saves it and it can be copied to other
    processes.
    """

    #: Number of members of the ensemble that predict
    n_members: int
    #: Which members predict; set it by :meth:`using_members`
    members: Members = "mean"
    #: When the model is fitted while a policy is trained
    fitting_schedule: FittingSchedule = EveryUpdate()
    #: Whether the model learns where episodes terminate
    can_learn_ends: bool = False
    #: Whether rollouts may go far beyond the recorded states, see :meth:`extrapolating`
    is_extrapolating: bool = False

    @contextmanager
    def using_members(self, members: Members) -> Iterator[None]:
        """
        Choose which members predict within this context. Gradients that are compared between members, and those of a policy
        that should not exploit the errors of one of them, are computed with rows ``"dealt"`` to the members.

        :param members: ``"dealt"``: the rows of a batch are dealt to the members in equal parts, the first rows to the first
            member; ``"sampled"``: they are dealt at random in each step, and a model that has learned the noise of the
            system draws it; ``"mean"``: the mean of all members, without noise
        """
        before = self.members
        self.members = members
        try:
            yield
        finally:
            self.members = before

    @contextmanager
    def extrapolating(self) -> Iterator[None]:
        """
        Let rollouts go far beyond the recorded states within this context. A policy is not trained on such a guess, but it is
        the only way to plan for what was never reached.
        """
        self.is_extrapolating = True
        try:
            yield
        finally:
            # As before, so that nothing is compiled again
            del self.is_extrapolating

    def even_rows(self, tensor: th.Tensor) -> th.Tensor:
        """
        :param tensor: ``(B, ...)``
        :return: the same with the last row repeated, so that each member gets as many rows, ``(B', ...)``
        """
        return even_rows(tensor, self.n_members)

    @abstractmethod
    def rescale(self, transitions: Transitions) -> None:
        """
        Take the scales of inputs and targets, and all that is solved for by least squares, from data. What networks learned
        before is forgotten. Called before the first :meth:`fit`.

        :param transitions: all transitions to fit to that are recorded so far
        """

    @abstractmethod
    def needs_rescaling(self, transitions: Transitions) -> bool:
        """
        :param transitions: all transitions to fit to that are recorded so far
        :return: whether the data have shifted so far that :meth:`rescale` should see them
        """

    def tune_on_rollouts(self, windows: Windows) -> None:
        """
        Make the choices that only rollouts of several steps can decide, after fitting. By default there are none.

        :param windows: recorded trajectory segments
        """

    def refresh(self) -> None:
        """Called after parameters and buffers were written from outside. By default there is nothing to do."""

    @abstractmethod
    def fit(self, transitions: Transitions) -> float:
        """
        One step of the optimizer. The rows are dealt to the members, whatever ``members`` is.

        :param transitions: a batch
        :return: the loss, in scaled units
        """

    @abstractmethod
    def validation_error(self, transitions: Transitions) -> float:
        """
        The loss of :meth:`fit`, without fitting. The rows are dealt to the members, whatever ``members`` is.

        :param transitions: held-out transitions
        :return: the loss, in scaled units
        """

    @property
    def learns_ends(self) -> bool:
        """Whether learned terminations are used, instead of those that are known."""
        return False

    def fit_ends(self, steps: Transitions, ends: Transitions, rate: float) -> None:
        """
        One step of the optimizer of learned terminations, for models that :attr:`can_learn_ends`.

        :param steps: a batch of recorded steps
        :param ends: recorded steps that terminated
        :param rate: terminations for each recorded step
        """

    def use_learned_ends(self, is_used: bool) -> None:
        """
        :param is_used: whether learned terminations are used, instead of those that are known
        """

    def solve_end_rewards(self, transitions: Transitions) -> None:
        """
        Solve for what rewards lack where an episode ends. By default nothing is solved for.

        :param transitions: all transitions to fit to that are recorded so far
        """

    def keep_best(self, transitions: Transitions) -> None:
        """
        Called from time to time while the model is fitted until convergence. By default nothing is kept.

        :param transitions: held-out transitions, always the same until :meth:`restore_best`
        """

    def restore_best(self) -> None:
        """Called at the end of a fit until convergence: return to the best of what :meth:`keep_best` saw."""

    @abstractmethod
    def learned_state(self) -> dict[str, Any]:
        """
        :return: all that was learned, including the state of the optimizer, copied to the CPU
        """

    @abstractmethod
    def load_learned_state(self, state: dict[str, Any]) -> bool:
        """
        :param state: what :meth:`learned_state` returned
        :return: whether it was loaded; it is not if it belongs to another model, for which it would be useless
        """


def members_of(model: PriorModel, members: Members) -> AbstractContextManager[None]:
    """
    :param model: any model
    :param members: which of its members predict
    :return: :meth:`TrainableModel.using_members`; a context that does nothing for models without members
    """
    return model.using_members(members) if isinstance(model, TrainableModel) else nullcontext()


@contextmanager
def evaluated(model: PriorModel) -> Iterator[None]:
    """
    Predict without noise, and with the mean of the members of an ensemble, within this context.

    :param model: any model
    """
    was_training = model.training
    model.eval()
    try:
        with members_of(model, "mean"):
            yield
    finally:
        model.train(was_training)


def copy_to_cpu(value: Any) -> Any:
    """
    :param value: tensors in dictionaries and lists, such as state dictionaries
    :return: a copy on the CPU
    """
    if isinstance(value, th.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    return [copy_to_cpu(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)


class StateDescription(NamedTuple):
    """
    :param is_hidden: dimensions of the state that observations do not show, bool ``(S,)``
    :param is_re_encoded: dimensions that rollouts re-encode in each step, where the others keep latent state, bool ``(S,)``
    """

    is_hidden: np.ndarray
    is_re_encoded: np.ndarray


class CorrectedModel(TrainableModel):
    """
    A prior model with a correction that is fitted to recorded transitions. States, observations and terminations are those
    of the prior model.

    A random prior model is taken at its mean: the noise allows for errors of the model, and those are corrected.

    :param prior: the prior model
    """

    def __init__(self, prior: PriorModel):
        super().__init__()
        self.prior = prior
        self.prior.eval()
        #: Whether predictions are corrected, see :meth:`use_correction`
        self.is_correction_used = True

    def train(self, mode: bool = True) -> "CorrectedModel":
        super().train(mode)
        self.prior.eval()
        return self

    @property
    def may_terminate(self) -> bool:
        return self.prior.may_terminate

    def terminal(self, states: th.Tensor) -> th.Tensor:
        return self.prior.terminal(states)

    def termination_probability(self, states: th.Tensor) -> th.Tensor:
        return self.prior.termination_probability(states)

    def observation(self, states: th.Tensor) -> th.Tensor:
        return self.prior.observation(states)

    def state_from_observation(self, observations: th.Tensor) -> th.Tensor:
        return self.prior.state_from_observation(observations)

    def state_difference(self, states: th.Tensor, others: th.Tensor) -> th.Tensor:
        return self.prior.state_difference(states, others)

    def state_add(self, states: th.Tensor, differences: th.Tensor) -> th.Tensor:
        return self.prior.state_add(states, differences)

    def use_correction(self, is_used: bool) -> None:
        """
        Implementations call this method, and change what they predict.

        :param is_used: whether predictions are corrected; otherwise they are those of the prior model, and the correction is
            fitted only to be compared with it
        """
        self.is_correction_used = is_used

    @abstractmethod
    def compared_with_prior(self) -> AbstractContextManager[None]:
        """
        :return: a context in which rows are dealt, the first member is the prior model as it is, and all others are corrected
        """

    @abstractmethod
    def improves_on_prior(self, transitions: Transitions) -> bool:
        """
        :param transitions: held-out transitions
        :return: whether they are predicted better with the correction than without it
        """

    def choose_outputs(self, transitions: Transitions) -> None:
        """
        Use each output of a correction only if it predicts held-out transitions better than without it. By default, all are
        used.

        :param transitions: held-out transitions
        """

    @abstractmethod
    def describe_states(self) -> StateDescription:
        """
        :return: which dimensions of the state are hidden, and which are re-encoded
        """
