"""The interface of models that learn from recorded transitions."""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.prediction_errors import Windows


class Transitions(NamedTuple):
    """
    Recorded steps, in the units of the environment; none of them crosses a reset.

    :param observations: ``(B, *obs_shape)``
    :param actions: ``(B, A)``
    :param rewards: ``(B, 1)``
    :param next_observations: ``(B, *obs_shape)``
    """

    observations: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor
    next_observations: th.Tensor


class TrainableModel(PriorModel):
    """
    A model that learns from recorded transitions while it is used: a correction of a prior model, or dynamics that are
    learned from nothing. It is an ensemble: in training mode the rows of a batch are dealt out to its members in
    equal parts, the first rows to the first member; in evaluation mode it predicts the members' mean.

    What is learned lives in parameters and buffers, so that ``state_dict()`` saves it and it can be copied to other processes.
    """

    #: Number of members of the ensemble
    n_members: int

    def even_rows(self, tensor: th.Tensor) -> th.Tensor:
        """
        :param tensor: ``(B, ...)``
        :return: the same, with the last row repeated until each member gets as many, ``(B', ...)``
        """
        n_missing = -len(tensor) % self.n_members
        return th.cat([tensor, tensor[-1:].expand(n_missing, *tensor.shape[1:])]) if n_missing > 0 else tensor

    @abstractmethod
    def adapt_to(self, transitions: Transitions) -> None:
        """
        Take the scales of inputs and targets from data, before the first :meth:`fit`; what was learned before is forgotten.

        :param transitions: what was recorded so far
        """

    def adapt_to_rollouts(self, windows: Windows) -> None:
        """
        Settle what single steps cannot tell, when the model is fitted. By default there is nothing to settle.

        :param windows: recorded steps, and what followed them
        """

    def follow(self) -> None:
        """What to do when parameters and buffers were written to from outside. By default there is nothing to do."""

    @abstractmethod
    def is_outgrown(self, transitions: Transitions) -> bool:
        """
        :param transitions: what was recorded so far
        :return: whether the data that :meth:`adapt_to` saw do not stand for these, and it should see them
        """

    @abstractmethod
    def fit(self, transitions: Transitions) -> float:
        """
        One step of the optimizer.

        :param transitions: dealt out to the members as rows always are
        :return: the loss, in scaled units
        """

    @abstractmethod
    def validation_error(self, transitions: Transitions) -> float:
        """
        :param transitions: held out from :meth:`fit`
        :return: the loss there, of the members that rows are dealt out to, in the units of :meth:`fit`
        """

    @abstractmethod
    def learned_state(self) -> dict[str, Any]:
        """
        :return: all that was learned, the state of the optimizer included, copied to the CPU
        """

    @abstractmethod
    def load_learned_state(self, state: dict[str, Any]) -> bool:
        """
        :param state: what :meth:`learned_state` returned
        :return: whether it is of this model. What was learned of another one, a correction of another prior model, say, is
            of no use and is not taken
        """
