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
BLIND = 0.05
# With a smaller share of odd changes, the states are at an optimum in the perturbed direction
SMALL_ODD_PART = 0.1
# The largest differences are ignored, because a few rollouts that diverge must not decide
SHARE_IGNORED = 0.02
# Rounding errors of returns, relative to their size
ROUNDING = 1e-6


class Variation(NamedTuple):
    """
    :param explained: share of the variation of the returns that the derivative explains, from 0 to 1, ``(n_horizons,)``
    :param is_silent: whether the derivative is zero at most states, ``(n_horizons,)``
    :param varies: whether the returns change by more than rounding errors, ``(n_horizons,)``
    """

    explained: np.ndarray
    is_silent: np.ndarray
    varies: np.ndarray


class Perturbed(NamedTuple):
    """
    Changes of the returns of rollouts when the first action is perturbed in a direction and against it. All arrays have the
    shape ``(n_horizons, ...)``.

    :param returns: the returns without perturbation
    :param up: change in the direction
    :param down: change against it
    :param linear: what the derivative promises in the direction
    """

    returns: np.ndarray
    up: np.ndarray
    down: np.ndarray
    linear: np.ndarray


def measure_variation(perturbed: Perturbed) -> Variation:
    r"""
    Compare the derivative :math:`L` with the odd part of the changes of the returns, :math:`D = (D_+ - D_-) / 2`. The
    explained share is the squared correlation over the states,

    .. math:: \frac{\max(E[D L], 0)^2}{E[D^2] \, E[L^2]},

    so a derivative that is right on average but noisy, as where trajectories reach jumps sooner or later, keeps a share. Two
    cases say nothing, and the derivative is believed unless it is zero at most states: changes below the rounding error of the
    returns, and changes in which the even part :math:`(D_+ + D_-) / 2` dominates, as at an optimum.

    :param perturbed: the changes
    :return: the shares
    """
    explained, is_silent, varies = [], [], []
    for returns, up, down, linear in zip(*perturbed, strict=True):
        is_finite = np.isfinite(np.stack([returns, up, down, linear])).all(axis=0)
        silent = bool((linear[is_finite] == 0).mean() > 0.5) if is_finite.any() else False
        is_silent.append(silent)
        if 2 * is_finite.sum() < is_finite.size:
            explained.append(0.0)
            varies.append(True)
            continue
        returns, up, down, linear = (values[is_finite].astype(np.float64) for values in (returns, up, down, linear))
        odd, even = (up - down) / 2, (up + down) / 2
        # Ignore the rollouts that diverge most
        is_counted = np.argsort(odd**2 + even**2 + linear**2)[: len(odd) - int(SHARE_IGNORED * len(odd))]
        odd, even, linear = odd[is_counted], even[is_counted], linear[is_counted]
        rounding = ROUNDING * np.abs(returns).mean()
        varies.append(bool((odd**2 + even**2).mean() > rounding**2))
        if silent:
            explained.append(0.0)
        elif (odd**2).mean() <= rounding**2 + SMALL_ODD_PART * (even**2).mean():
            explained.append(1.0)
        else:
            explained.append(max((odd * linear).mean(), 0.0) ** 2 / max((odd**2).mean() * (linear**2).mean(), 1e-60))
    return Variation(np.array(explained), np.array(is_silent), np.array(varies))
