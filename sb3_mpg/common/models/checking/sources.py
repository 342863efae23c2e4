"""Which terms explain the errors of a dimension: what is wrong or missing in the model."""

from typing import NamedTuple

import numpy as np

from sb3_mpg.common.models.windows import rms

# Terms that explain this share of the variation of the errors are their source
SOURCE_SHARE = 0.9
# ... and a large part of it, if they explain this share
PART_SHARE = 0.5
# From a large part to nearly all, more terms are worth it if they leave this share of what fewer terms leave
CLEARLY_BETTER = 0.7
# More terms are worth it if they leave this share of what fewer terms leave
BETTER = 0.2
# A constant below this share of the errors is not worth mentioning
SMALL_CONSTANT = 0.05
# A constant of this many times the errors is for the most part cancelled by the other term
CANCELLING = 2.0
# Products of more inputs are too many
MAX_INPUTS_OF_PRODUCTS = 30
# No formula has more terms, beside a constant
MAX_TERMS = 2


class Source(NamedTuple):
    """
    What errors are.

    :param formula: in words and numbers
    :param inputs: which inputs occur in it
    :param is_exchange: whether it is a difference that exchanges and losses are proportional to
    :param share: of the variation of the errors that it explains
    """

    formula: str
    inputs: frozenset[int]
    is_exchange: bool
    share: float


def _product(names: tuple[str, ...], pair: tuple[int, ...]) -> str:
    first, second = (names[index] for index in pair)
    return f"{first} squared" if first == second else f"{first} times {second}"


class _Terms:
    """
    :param errors: ``(B,)``
    :param inputs: observations and actions, ``(B, m)``
    :param names: of the inputs
    """

    def __init__(self, errors: np.ndarray, inputs: np.ndarray, names: tuple[str, ...]):
        self.errors, self.inputs, self.names = errors, inputs, names
        varying = np.flatnonzero(np.ptp(inputs, axis=0) > 1e-6 * np.abs(inputs).max(axis=0)).tolist()
        self.used: list[tuple[int, ...]] = [(index,) for index in varying]
        self.n_linear = len(varying)
        if len(varying) <= MAX_INPUTS_OF_PRODUCTS:
            self.used += [(first, second) for first in varying for second in varying if first <= second]
        self.columns = np.stack([inputs[:, list(term)].prod(axis=1) for term in self.used], axis=1)

    def share(self, rest: float) -> float:
        """
        :param rest: RMS of what is not explained
        :return: share of the variation that is
        """
        return float(1 - (rest / max(float(self.errors.std()), 1e-300)) ** 2)

    def name(self, index: int) -> str:
        """
        :param index: of a column
        :return: its name
        """
        term = self.used[index]
        return self.names[term[0]] if len(term) == 1 else _product(self.names, term)

    def proportional(self, n_columns: slice) -> tuple[float, Source] | None:
        """
        :param n_columns: which columns
        :return: the one that the errors are proportional to, with the rest
        """
        columns = self.columns[:, n_columns]
        if columns.shape[1] == 0:
            return None
        factors = columns.T @ self.errors / (columns**2).sum(axis=0)
        rests = rms(self.errors[:, None] - factors * columns)
        best = int(rests.argmin())
        index = best + (n_columns.start or 0)
        formula = f"{factors[best]:.2g} times {self.name(index)}"
        return float(rests[best]), Source(formula, frozenset(self.used[index]), False, self.share(rests[best]))

    def difference(self) -> tuple[float, Source] | None:
        """
        :return: the difference of two inputs that the errors are proportional to, with the rest
        """
        linear = self.columns[:, : self.n_linear]
        first, second = np.triu_indices(self.n_linear, k=1)
        if len(first) == 0:
            return None
        gram, products = linear.T @ linear, linear.T @ self.errors
        power = gram[first, first] + gram[second, second] - 2 * gram[first, second]
        explained = (products[first] - products[second]) ** 2 / np.maximum(power, 1e-300)
        best = int(explained.argmax())
        pair = first[best], second[best]
        difference = linear[:, pair[0]] - linear[:, pair[1]]
        factor = float(difference @ self.errors / (difference @ difference))
        rest = float(rms(self.errors - factor * difference))
        names = [self.name(index) for index in pair]
        if factor < 0:
            factor, names = -factor, names[::-1]
        used = frozenset(self.used[index][0] for index in pair)
        return rest, Source(f"{factor:.2g} times ({names[0]} - {names[1]})", used, True, self.share(rest))

    def sum_of(self, n_terms: int) -> tuple[float, Source] | None:
        """
        :param n_terms: number of terms beside a constant
        :return: the terms that explain most, chosen one after the other, with the rest
        """
        if self.columns.shape[1] < n_terms:
            return None
        chosen: list[int] = []
        design = np.ones((len(self.errors), 1))
        for _ in range(n_terms):
            basis = np.linalg.qr(design)[0]
            left = self.errors - basis @ (basis.T @ self.errors)
            columns = self.columns - basis @ (basis.T @ self.columns)
            power = (columns**2).sum(axis=0)
            # Columns that the chosen ones determine
            is_new = power > 1e-8 * (self.columns**2).sum(axis=0)
            gains = np.where(is_new, (columns.T @ left) ** 2 / np.maximum(power, 1e-300), -1.0)
            # Products only where they explain clearly more
            best = int(gains.argmax())
            simple = int(gains[: self.n_linear].argmax())
            if (left @ left - gains[simple]) * BETTER**2 < left @ left - gains[best]:
                best = simple
            chosen.append(best)
            design = np.concatenate([design, self.columns[:, [best]]], axis=1)
        constant, *factors = np.linalg.lstsq(design, self.errors, rcond=None)[0].tolist()
        rest = float(rms(self.errors - design @ np.array([constant, *factors])))
        used = frozenset(index for column in chosen for index in self.used[column])
        if n_terms == 1 and abs(constant) > CANCELLING * rms(self.errors) and chosen[0] < self.n_linear:
            # The constant and the term cancel each other for the most part
            zero = -constant / factors[0]
            formula = f"{factors[0]:.2g} times ({self.name(chosen[0])} {'-' if zero > 0 else '+'} {abs(zero):.3g})"
            return rest, Source(formula, used, True, self.share(rest))
        parts = [] if abs(constant) < SMALL_CONSTANT * rms(self.errors) else [f"{constant:.3g}"]
        for factor, column in zip(factors, chosen, strict=True):
            sign = "-" if factor < 0 else "+"
            parts.append(
                f"{sign} {abs(factor):.2g} times {self.name(column)}" if parts else f"{factor:.2g} times {self.name(column)}"
            )
        return rest, Source(" ".join(parts), used, False, self.share(rest))


def find_source(errors: np.ndarray, inputs: np.ndarray, names: tuple[str, ...], tolerance: float) -> Source | None:
    """
    Look for few terms that explain the errors: an input, a difference of two inputs, an input and a constant, a product of
    two inputs, or a sum of such terms. A constant alone is none.

    :param errors: of a dimension, ``(B,)``
    :param inputs: observations and actions, ``(B, m)``
    :param names: of the inputs
    :param tolerance: RMS of errors that do not matter
    :return: the simplest terms that explain nearly all of the variation of the errors or, if there are none, a large part of
        it; ``None`` if there are none either
    """
    if np.ptp(inputs, axis=0).max() == 0 or errors.std() == 0:
        return None
    terms = _Terms(errors, inputs, names)
    candidates = [
        terms.proportional(slice(0, terms.n_linear)),
        terms.difference(),
        terms.sum_of(1),
        terms.proportional(slice(terms.n_linear, None)),
        *(terms.sum_of(number) for number in range(2, MAX_TERMS + 1)),
    ]
    best: tuple[float, Source] | None = None
    for candidate in candidates:
        if candidate is None or candidate[1].share < PART_SHARE:
            continue
        if best is not None and best[0] <= tolerance:
            break
        is_enough = best is not None and best[1].share >= SOURCE_SHARE
        is_nearly_all = not is_enough and candidate[1].share >= SOURCE_SHARE
        if best is None or candidate[0] < (CLEARLY_BETTER if is_nearly_all else BETTER) * best[0]:
            best = candidate
    return None if best is None else best[1]
