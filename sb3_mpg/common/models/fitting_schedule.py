"""When a trainable model is fitted while a policy is trained."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from sb3_mpg.common.checks import check_count

#: Takes one step of the model's optimizer, and returns the loss, ``None`` while nothing is recorded to fit it to
FitOnce = Callable[[], float | None]
#: The same, with many steps, at most the given number
FitUntilConverged = Callable[[int], float | None]


class FittingSchedule(ABC):
    """Decides whether the model is fitted before an update, and how."""

    @abstractmethod
    def fit(self, n_updates: int, fit_once: FitOnce, fit_until_converged: FitUntilConverged) -> float | None:
        """
        :param n_updates: number of the update of the policy, from 1
        :param fit_once: takes one step of the model's optimizer
        :param fit_until_converged: takes steps until the error on held-out steps no longer falls, at most the given number
        :return: the loss, ``None`` when nothing was fitted
        """


class EveryUpdate(FittingSchedule):
    """
    One step of the model's optimizer for each update of the policy, as a correction needs it; later for each few updates.

    :param later_every: number of updates between two steps after the first ``n_first`` updates
    :param n_first: number of updates
    """

    def __init__(self, later_every: int = 1, n_first: int = 2000):
        check_count("later_every", later_every, 1)
        self.later_every, self.n_first = later_every, n_first

    def fit(self, n_updates: int, fit_once: FitOnce, fit_until_converged: FitUntilConverged) -> float | None:
        is_due = n_updates <= self.n_first or (n_updates - 1) % self.later_every == 0
        return fit_once() if is_due else None


class UntilConverged(FittingSchedule):
    """
    The model is fitted until it has converged, once in so many updates of the policy, as ensembles of learned dynamics are.

    :param every: number of updates between two fits
    :param max_fits: largest number of steps of the optimizer in one fit, so that training ends in time on a CPU
    """

    def __init__(self, every: int = 250, max_fits: int = 2000):
        check_count("every", every, 1)
        check_count("max_fits", max_fits, 1)
        self.every, self.max_fits = every, max_fits

    def fit(self, n_updates: int, fit_once: FitOnce, fit_until_converged: FitUntilConverged) -> float | None:
        return fit_until_converged(self.max_fits) if (n_updates - 1) % self.every == 0 else None
