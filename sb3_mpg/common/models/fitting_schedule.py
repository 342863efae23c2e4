"""When a trainable model is fitted while a policy is trained."""

from abc import ABC, abstractmethod
from collections.abc import Callable

#: Fits the model, and returns the loss, ``None`` while nothing is recorded to fit it to
Fit = Callable[[], float | None]


def check_every(every: int) -> int:
    """
    :param every: number of updates between two fits
    :return: the same
    :raises ValueError: when it is less than 1
    """
    if every < 1:
        raise ValueError(f"`every` counts updates and must be at least 1, got {every}.")
    return every


class FittingSchedule(ABC):
    """Decides whether the model is fitted before an update, and how."""

    @abstractmethod
    def fit(self, n_updates: int, fit_once: Fit, fit_until_converged: Fit) -> float | None:
        """
        :param n_updates: number of the update of the policy, from 1
        :param fit_once: takes one step of the model's optimizer
        :param fit_until_converged: takes steps until the error on held-out steps no longer falls
        :return: the loss, ``None`` when nothing was fitted
        """


class EveryUpdate(FittingSchedule):
    """
    One step of the model's optimizer for each update of the policy, as a correction needs it; later for each few updates.

    :param later_every: number of updates between two steps after the first ``n_first`` updates
    :param n_first: number of updates
    """

    def __init__(self, later_every: int = 1, n_first: int = 2000):
        self.later_every, self.n_first = check_every(later_every), n_first

    def fit(self, n_updates: int, fit_once: Fit, fit_until_converged: Fit) -> float | None:
        is_due = n_updates <= self.n_first or (n_updates - 1) % self.later_every == 0
        return fit_once() if is_due else None


class UntilConverged(FittingSchedule):
    """
    The model is fitted until it has converged, once in so many updates of the policy, as ensembles of learned dynamics are.

    :param every: number of updates between two fits
    """

    def __init__(self, every: int = 250):
        self.every = check_every(every)

    def fit(self, n_updates: int, fit_once: Fit, fit_until_converged: Fit) -> float | None:
        return fit_until_converged() if (n_updates - 1) % self.every == 0 else None
