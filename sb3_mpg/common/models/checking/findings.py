"""What a check finds, and the order and wording of the hints that follow."""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from sb3_mpg.common.tables import format_share

# A hint names this many dimensions; the others are counted
MAX_NAMES = 4


class Cost(IntEnum):
    """What a finding costs the user. Hints come in this order, the most costly first."""

    #: Wrong terminations spoil many rollouts: with measured weights, the model weighs less
    SPOILT_ROLLOUTS = 0
    #: The gradient of the reward, or with respect to an action, vanishes: there is nothing to learn from
    SILENT = 1
    #: Predictions or gradients are not finite in some states, which training masks
    NOT_FINITE = 2
    #: Some terminations are wrong
    TERMINATIONS = 3
    #: An action, a dimension or the reward goes in the opposite direction
    WRONG_SIGN = 4
    #: The effect of an action, or the change of a dimension, is too large or too small
    WRONG_SCALE = 5
    #: The model lacks the effect of an action
    MISSED_ACTION = 6
    #: The reward is wrong
    REWARD = 7
    #: Gradients vanish in some of the states, or the reward jumps
    FLAT = 8
    #: ``observation`` does not return what ``state_from_observation`` was given
    ENCODING = 9
    #: Something that observations do not show acts on a dimension
    HIDDEN = 10
    #: A dimension is predicted worse than by no change
    WORSE_THAN_NO_CHANGE = 11
    #: A constant is missing or too much
    BIASED = 12
    #: A dimension is right in nearly all steps and far off in others
    RARE_JUMPS = 13
    #: A term or a parameter is off; this can be good enough to train with
    ROUGH = 14
    #: A dimension follows another one by another integration scheme
    SCHEME = 15
    #: Errors are those of other dimensions, or add up over the steps
    DRIFT = 16
    #: Noise, and differences that can stay
    NOISE = 17


class Finding(NamedTuple):
    """
    Something that is wrong with a dimension of the observation, with the reward, or with the model as a whole.

    :param cost: what it costs the user
    :param verdict: what it is called in the table
    :param hint: what is wrong, what follows, and what to do. Dimensions with the same hint share one: ``{names}`` stands for
        their names, ``{values[0]}`` for the range of their first value, ``{values[0].plural}`` for an "s" if it is one, and
        ``{values[0].percent}`` for a share in percent.
    :param name: name of the dimension
    :param values: measured numbers
    """

    cost: Cost
    verdict: str
    hint: str
    name: str = ""
    values: tuple[float, ...] = ()


class _Range(NamedTuple):
    """Formats as one number or, if that reads differently, as two."""

    low: float
    high: float

    @property
    def plural(self) -> str:
        """What is appended to the noun of the numbers."""
        return "" if self.low == self.high else "s"

    @property
    def percent(self) -> str:
        """The numbers as shares."""
        return self._join(format_share(self.low, digits=0), format_share(self.high, digits=0))

    def __format__(self, spec: str) -> str:
        return self._join(format(self.low, spec), format(self.high, spec))

    @staticmethod
    def _join(low: str, high: str) -> str:
        return low if low == high else f"{low} to {high}"


def join_names(names: Sequence[str]) -> str:
    """
    :param names: names of dimensions, at least one
    :return: an enumeration of the first ``MAX_NAMES``, and the number of the others
    """
    n_others = len(names) - MAX_NAMES
    # "and 1 other" is no shorter than its name
    parts = list(names) if n_others <= 1 else [*names[:MAX_NAMES], f"{n_others} others"]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def hints_of(findings: Sequence[Finding]) -> tuple[str, ...]:
    """
    :param findings: all findings, those of the dimensions in their order
    :return: one hint for each cause, the most costly first
    """
    causes: dict[tuple[Cost, str], list[Finding]] = {}
    for finding in findings:
        causes.setdefault((finding.cost, finding.hint), []).append(finding)
    hints = []
    for (_, hint), members in sorted(causes.items(), key=lambda cause: cause[0][0]):
        ranges = [_Range(min(values), max(values)) for values in zip(*(member.values for member in members), strict=True)]
        hints.append(hint.format(names=join_names([member.name for member in members]), values=ranges))
    return tuple(hints)


def verdict_of(findings: Sequence[Finding]) -> str:
    """
    :param findings: what was found of one dimension
    :return: the verdict of the most costly finding
    """
    return min(findings, key=lambda finding: finding.cost).verdict if findings else "good"
