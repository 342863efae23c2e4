r"""
How much of the variation of returns their derivatives explain.

A derivative is blind to jumps: where an episode ends, where a reward is paid only inside of a region, where something is hit.
All members of an ensemble agree on a blind derivative, so their disagreement does not show it. Difference quotients do: the
first action is perturbed, and everything else in the rollout stays the same (Suh et al. 2022, "Do Differentiable Simulators
Give Better Policy Gradients?").
"""

from typing import NamedTuple

import numpy as np

# Size of the perturbation of the first action in each dimension, in [-1, 1] units: small, because a derivative is local
PERTURBATION = 0.03
# A derivative that explains less of the variation is blind
BLIND = 0.2
# The largest differences are ignored, because a few rollouts that diverge must not decide
SHARE_IGNORED = 0.02
# Rounding errors of returns, relative to their size
ROUNDING = 1e-6


class Variation(NamedTuple):
    """
    :param explained: share of the variation of the returns that the derivative explains, from 0 to 1, ``(n_horizons,)``
    :param is_silent: whether the derivative is zero at most states, ``(n_horizons,)``
    """

    explained: np.ndarray
    is_silent: np.ndarray


class Perturbed(NamedTuple):
    """
    Changes of the returns of rollouts whose first action is perturbed by :math:`+\\delta` and :math:`-\\delta`. All arrays have
    the shape ``(n_horizons, ...)``.

    :param returns: the returns without perturbation
    :param up: change for :math:`+\\delta`
    :param down: change for :math:`-\\delta`
    :param linear: what the derivative promises for :math:`+\\delta`
    """

    returns: np.ndarray
    up: np.ndarray
    down: np.ndarray
    linear: np.ndarray


def measure_variation(perturbed: Perturbed) -> Variation:
    r"""
    Compare the derivative :math:`L` with the changes :math:`D_+, D_-` of the returns. A smooth return changes by
    :math:`(D_+ - D_-) / 2 \approx L`, whatever its curvature. The explained share is

    .. math:: 1 - \frac{2 \, E[((D_+ - D_-) / 2 - L)^2]}{E[(D_+^2 + D_-^2) / 2]},

    which is 0 for a derivative of zero and returns that jump on one side. (The curvature counts as explained, because near an
    optimum there is hardly anything else.) Changes below the rounding error of the returns say nothing: then only a derivative
    that is zero at most states is blind.

    :param perturbed: the changes
    :return: the shares
    """
    explained, is_silent = [], []
    for returns, up, down, linear in zip(*perturbed, strict=True):
        is_finite = np.isfinite(np.stack([returns, up, down, linear])).all(axis=0)
        is_silent.append(bool((linear[is_finite] == 0).mean() > 0.5) if is_finite.any() else False)
        if 2 * is_finite.sum() < is_finite.size:
            explained.append(0.0)
            continue
        returns, up, down, linear = (values[is_finite] for values in (returns, up, down, linear))
        rounding = ROUNDING * np.abs(returns).mean()
        missed = np.maximum(np.abs((up - down) / 2 - linear) - rounding, 0.0) ** 2
        changes = (up**2 + down**2) / 2
        is_counted = np.argsort(changes + missed)[: len(missed) - int(SHARE_IGNORED * len(missed))]
        change = changes[is_counted].mean()
        if change <= rounding**2:
            explained.append(float(not is_silent[-1]))
        else:
            explained.append(float(np.clip(1 - 2 * missed[is_counted].mean() / change, 0.0, 1.0)))
    return Variation(np.array(explained), np.array(is_silent))
