"""Weighting rules: the weight of each horizon in the mixed policy gradient of an update."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from sb3_mpg.common.checks import check_keywords, is_whole


def check_horizons(horizons: Sequence[int]) -> tuple[int, ...]:
    """
    :param horizons: numbers of model steps
    :return: the same, sorted
    :raises ValueError: when there is none, or one is negative, fractional or repeated
    """
    if isinstance(horizons, np.ndarray):
        horizons = horizons.tolist()
    if isinstance(horizons, (str, bytes)) or not isinstance(horizons, Sequence) or len(horizons) == 0:
        raise ValueError(f"`horizons` must be a non-empty sequence of whole numbers such as (0, 25), got {horizons!r}.")
    if not all(is_whole(horizon) and horizon >= 0 for horizon in horizons):
        raise ValueError(f"Every horizon must be a whole number of model steps, 0 or more, got {tuple(horizons)}.")
    if len(set(horizons)) < len(horizons):
        raise ValueError(f"Every horizon may be given once, got {tuple(horizons)}.")
    return tuple(sorted(int(horizon) for horizon in horizons))


class WeightingRule(ABC):
    """
    Gives the weight of each horizon at an update. The weights are a function of ``n_updates`` and of the observed errors of
    the gradients. The rule is saved with the algorithm.

    :param horizons: numbers of model steps
    :cvar needs_errors: whether the rule needs measured errors of the gradients
    """

    needs_errors: bool = False

    def __init__(self, horizons: Sequence[int]):
        self.horizons = check_horizons(horizons)

    @abstractmethod
    def weights(self, n_updates: int) -> np.ndarray:
        """
        :param n_updates: number of the update, from 1
        :return: weights in the order of ``horizons``, ``(n_horizons,)``; they sum to one
        """

    def observe(self, errors: np.ndarray) -> None:  # noqa: B027  # most rules ignore it
        """
        Observe a measurement. Only rules that need errors use it.

        :param errors: squared error of the action gradient of each horizon, in the order of ``horizons``, ``(n_horizons,)``
        """

    def forget(self) -> None:  # noqa: B027  # as above
        """Drop all observed errors, because the model was replaced."""

    def __call__(self, n_updates: int) -> dict[int, float]:
        """
        :param n_updates: number of the update, from 1
        :return: the weight of each horizon
        """
        return dict(zip(self.horizons, self.weights(n_updates).tolist(), strict=True))


class RuleBasedWeighting(WeightingRule):
    r"""
    The papers' rule (eq. 10; appendix C-A for many horizons): the weight of the model falls with the number of updates.

    .. math::
        w_i = \mathrm{softmax}(1 / e_i), \quad
        e_i = \lambda^i \text{ if } \lambda \le 1, \text{ else } (2 - \lambda)^{\max I - i},

    where :math:`\lambda` grows linearly from :math:`1 - \eta` to :math:`1 + \eta` within ``total_updates`` and stays there.

    :param horizons: numbers of model steps :math:`I`; they must include 0, the data-driven gradient
    :param eta: :math:`\eta`, half the range of :math:`\lambda`, between 0 and 1
    :param total_updates: number of updates in which :math:`\lambda` grows, the papers' T
    """

    def __init__(self, horizons: Sequence[int] = (0, 25), eta: float = 0.1, total_updates: int = 9000):
        super().__init__(horizons)
        if 0 not in self.horizons:
            raise ValueError(
                f"The rule-based weighting moves from the model to the data-driven gradient and needs horizon 0, "
                f"got horizons {self.horizons}; add 0 or choose the constant or geometric weighting."
            )
        if not 0 < eta < 1:
            raise ValueError(f"`eta` must lie between 0 and 1, got {eta}.")
        if total_updates <= 0:
            raise ValueError(f"`total_updates` must be positive, got {total_updates}.")
        self.eta = eta
        self.total_updates = total_updates

    def weights(self, n_updates: int) -> np.ndarray:
        lambda_ = 1 - self.eta + 2 * self.eta * min(n_updates / self.total_updates, 1.0)
        horizons = np.array(self.horizons)
        # Inverse errors, which may be very large (0.1 ** -25)
        with np.errstate(over="ignore"):
            scores = lambda_**-horizons if lambda_ <= 1 else (2 - lambda_) ** (horizons - horizons.max())
        # The difference of two infinite scores would be NaN
        scores = np.minimum(scores, np.finfo(np.float64).max)
        exponentials = np.exp(scores - scores.max())
        return exponentials / exponentials.sum()


class ConstantWeighting(WeightingRule):
    """
    The same weights at every update.

    :param horizons: numbers of model steps
    :param values: weights of the horizons, 0 or more; they are divided by their sum. Equal weights by default.
    """

    def __init__(self, horizons: Sequence[int], values: Sequence[float] | None = None):
        super().__init__(horizons)
        if values is None:
            values = [1.0] * len(self.horizons)
        if len(values) != len(self.horizons) or not 0 < sum(values) < np.inf or min(values) < 0:
            raise ValueError(
                f"The constant weighting needs one weight, 0 or more, for each of the horizons {tuple(horizons)} "
                f"and a positive sum, got {values!r}."
            )
        by_horizon = dict(zip(horizons, values, strict=True))
        self._weights = np.array([by_horizon[horizon] for horizon in self.horizons], dtype=np.float64)
        self._weights /= self._weights.sum()

    def weights(self, n_updates: int) -> np.ndarray:
        return self._weights


class GeometricWeighting(WeightingRule):
    r"""
    Weights that fall geometrically with the horizon, :math:`w_k \propto (1 - \lambda) \lambda^k`, as in the lambda-return
    and in the DVPG paper. They are normalised, because the number of horizons is finite.

    :param horizons: numbers of model steps
    :param lambda_: :math:`\lambda`, between 0 and 1
    """

    def __init__(self, horizons: Sequence[int], lambda_: float = 0.9):
        super().__init__(horizons)
        if not 0 < lambda_ < 1:
            raise ValueError(f"`lambda_` must lie between 0 and 1, got {lambda_}.")
        self.lambda_ = lambda_

    def weights(self, n_updates: int) -> np.ndarray:
        weights = (1 - self.lambda_) * self.lambda_ ** np.array(self.horizons, dtype=np.float64)
        return weights / weights.sum()


class MeasuredWeighting(WeightingRule):
    r"""
    Weights from the measured errors of the gradients, :math:`w_i \propto 1 / e_i`, which give the mixture of least variance if
    the errors are independent. The errors are averaged over the last few measurements.

    :param horizons: numbers of model steps
    :param window: number of measurements that are averaged
    """

    needs_errors = True

    def __init__(self, horizons: Sequence[int], window: int = 3):
        super().__init__(horizons)
        if window < 1:
            raise ValueError(f"`window` counts measurements and must be at least 1, got {window}.")
        self.window = window
        self._errors: list[np.ndarray] = []

    def observe(self, errors: np.ndarray) -> None:
        # Clip zero and infinite errors, so that the weights are finite
        self._errors = [*self._errors, np.clip(np.nan_to_num(errors, nan=np.inf), 1e-30, 1e30)][-self.window :]

    def forget(self) -> None:
        self._errors = []

    def weights(self, n_updates: int) -> np.ndarray:
        if not self._errors:
            return np.full(len(self.horizons), 1 / len(self.horizons))
        inverse_errors = 1 / np.mean(self._errors, axis=0)
        return inverse_errors / inverse_errors.sum()


WEIGHTING_RULES: dict[str, type[WeightingRule]] = {
    "rule_based": RuleBasedWeighting,
    "constant": ConstantWeighting,
    "geometric": GeometricWeighting,
    "measured": MeasuredWeighting,
}


def make_weighting_rule(
    weighting: str | WeightingRule, horizons: Sequence[int], weighting_kwargs: dict[str, Any] | None = None
) -> WeightingRule:
    """
    :param weighting: name of a rule, or a rule
    :param horizons: numbers of model steps
    :param weighting_kwargs: further arguments of the named rule
    :return: the rule
    :raises ValueError: for an unknown name, arguments that the rule does not have, or a rule for other horizons
    """
    if isinstance(weighting, WeightingRule):
        if weighting_kwargs:
            raise ValueError("`weighting_kwargs` goes with the name of a rule, but `weighting` is a rule.")
        if weighting.horizons != check_horizons(horizons):
            raise ValueError(f"The weighting rule is for horizons {weighting.horizons}, but `horizons` is {tuple(horizons)}.")
        return weighting
    if not isinstance(weighting, str) or weighting not in WEIGHTING_RULES:
        raise ValueError(f"Unknown weighting {weighting!r}; choose one of {sorted(WEIGHTING_RULES)} or pass a WeightingRule.")
    rule = WEIGHTING_RULES[weighting]
    return rule(horizons, **check_keywords("weighting_kwargs", weighting_kwargs, rule, "horizons"))
