"""Errors and changes that no model can predict from observations and actions."""

from typing import Literal

import numpy as np

from sb3_mpg.common.models.checking.prediction_errors import Residuals
from sb3_mpg.common.models.checking.regression import correlation, explained_shares
from sb3_mpg.common.models.windows import MIN_WINDOWS

# Errors look random if observations and actions explain no more than this share of them
RANDOM_SHARE = 0.1
# What is drawn anew in each step tells of half of its next change: that it will be back near the mean
RETURN_SHARE = 0.6
# Fewer changes of a dimension do not tell that they are random
MIN_CHANGES = 5
# Something hidden causes errors if the step before explains this share more of them
HIDDEN_SHARE = 0.25
# ... and if consecutive errors are correlated as much as this
PERSISTENCE = 0.3

Cause = Literal["hidden cause", "random", "noisy"]


def causes_of_errors(residuals: Residuals) -> list[Cause | None]:
    """
    Whether errors look like noise, or like the effect of something that observations do not show; and whether a dimension that
    the model keeps constant changes at random.

    :param residuals: predictions compared with records
    :return: the cause for each dimension, ``None`` if it is none of these
    """
    steps, (first, second) = residuals.steps, residuals.pairs
    errors, earlier_errors, later_errors = (
        np.where(np.isfinite(part.errors), part.errors, 0.0) for part in (steps, first, second)
    )
    shares = explained_shares(errors, steps.inputs)
    is_hidden = np.zeros_like(shares, dtype=bool)
    if len(first.inputs) >= MIN_WINDOWS:
        now = explained_shares(later_errors, second.inputs)
        with_past = explained_shares(later_errors, np.concatenate([first.inputs, second.inputs], axis=1))
        # Noise of a sensor is in two consecutive errors, with opposite signs
        persists = np.array([correlation(*pair) > PERSISTENCE for pair in zip(earlier_errors.T, later_errors.T, strict=True)])
        is_hidden = persists & (with_past > now + HIDDEN_SHARE)
    causes: list[Cause | None] = []
    for dim, share in enumerate(shares):
        if is_hidden[dim]:
            causes.append("hidden cause")
        elif not residuals.is_moved[dim] and _is_random(residuals, dim, float(share)):
            causes.append("random")
        else:
            causes.append("noisy" if share < RANDOM_SHARE else None)
    return causes


def _is_random(residuals: Residuals, dim: int, share: float) -> bool:
    """
    :param residuals: predictions compared with records
    :param dim: a dimension that the model keeps constant
    :param share: of its changes that observations and actions explain; NaN if unknown
    :return: whether it changes, and nothing but its own value tells how: at most that it will be back near its mean
    """
    changes = residuals.steps.changes[:, dim]
    if (np.abs(changes) > residuals.rounding[dim]).sum() < MIN_CHANGES:
        return False
    own_share = float(explained_shares(changes[:, None], residuals.steps.inputs[:, [dim]])[0])
    return share < RANDOM_SHARE or (own_share < RETURN_SHARE and share < own_share + RANDOM_SHARE)
