"""The trust in a model's terminations."""

from collections.abc import Sequence

import numpy as np

from sb3_mpg.common.buffers import RecordedSteps
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.judged_ends import misjudged_ends
from sb3_mpg.common.models.terminations import looks_like_time_limit
from sb3_mpg.common.models.trainable import evaluated

# Number of recorded steps at which the terminations of a model are compared
N_JUDGED_ENDS = 256
# With fewer held-out terminations, those that the model was fitted to are compared as well
MIN_HELD_OUT_ENDS = 5
# With less trust, a user is warned
LITTLE_TRUST = 0.5
# With less trust there is none
NO_TRUST = 0.05
# Errors are rounded up to it
SMALLEST_ERROR = 1e-30


def trust_in_ends(model: PriorModel, recorded: RecordedSteps, horizon: int) -> float:
    r"""
    The share of rollouts that terminations do not spoil. The measured errors of the gradients do not show this, because all
    members of an ensemble share most mistakes about terminations. With the share :math:`m` of the recorded terminations that
    the model misses, their rate :math:`r` and the rate :math:`i` of those that it invents, the trust is

    .. math:: (1 - m \, (1 - (1 - r)^n)) \, (1 - \max(i - r, 0))^n.

    A termination that is predicted a step too early or too late counts as right.

    :param model: the model
    :param recorded: the recorded steps
    :param horizon: number of model steps of the rollouts :math:`n`
    :return: the trust, from 0 to 1. It is 1 for terminations that are time limits, which no state shows.
    """
    if looks_like_time_limit(recorded.lengths_of_terminated()) is not None:
        return 1.0
    rate = recorded.termination_rate()
    ends = None
    if rate > 0:
        ends = recorded.observed_last(N_JUDGED_ENDS, terminated=True, held_out=True)
        if ends is None or len(ends.rewards) < MIN_HELD_OUT_ENDS:
            ends = recorded.observed_last(N_JUDGED_ENDS, terminated=True)
    others = recorded.observed_last(N_JUDGED_ENDS, terminated=False) if model.may_terminate else None
    with evaluated(model):
        missed, invented = misjudged_ends(model, ends, others)
    spoilt = missed * (1 - (1 - rate) ** horizon)
    trust = (1 - spoilt) * (1 - max(invented - rate, 0.0)) ** horizon
    return trust if trust > NO_TRUST else 0.0


def discounted_by_trust(errors: np.ndarray, horizons: Sequence[int], trust: float) -> np.ndarray:
    """
    The errors of model horizons at which their total weight, inverse to the errors, is multiplied by the trust. Horizon 0 gets
    the rest; without it, the weights do not change.

    :param errors: error of each horizon, ``(n_horizons,)``
    :param horizons: numbers of model steps
    :param trust: from 0 to 1
    :return: ``(n_horizons,)``
    """
    is_model = np.array(horizons) > 0
    if trust == 1 or is_model.all():
        return errors
    if trust == 0:
        return np.where(is_model, np.inf, errors)
    errors = np.maximum(errors, SMALLEST_ERROR)
    # Weights w / (w + v) become t w / (w + v), if the inverse errors are multiplied by t v / (v + (1 - t) w)
    weight = (1 / errors[is_model]).sum()
    critic_error = errors[~is_model].sum()
    if weight == 0:
        return errors
    return np.where(is_model, errors * (1 / trust + (1 / trust - 1) * weight * critic_error), errors)
