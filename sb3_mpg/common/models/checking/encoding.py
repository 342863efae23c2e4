"""Whether ``observation`` returns what ``state_from_observation`` was given, and why it does not."""

import numpy as np
import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.findings import Cost, Finding
from sb3_mpg.common.models.checking.prediction_errors import observation_differences
from sb3_mpg.common.models.checking.regression import explained_shares
from sb3_mpg.common.models.windows import Windows, rms, to_numpy

# Larger gaps than this share of the largest value are no rounding errors
ROUNDING = 1e-4
# Gaps below this share of the actual change matter little
SMALL_GAP = 0.1
# A gap is a function of something that explains more than this share of it
EXPLAINED_SHARE = 0.5
# The other elements determine an element if they explain this share of its gap
DETERMINED_SHARE = 0.8
# An element is ignored if its restored value follows it by less than this share
IGNORED_SHARE = 1e-3

DIFFERENT_INPUTS = "The networks see x in recorded steps and the other value in rollouts, and training does not correct this."


def find_encoding_gaps(
    model: PriorModel, windows: Windows, names: tuple[str, ...], changes: np.ndarray
) -> tuple[np.ndarray, dict[int, Finding]]:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :param names: names of the dimensions
    :param changes: RMS of their actual changes in one step, ``(O,)``
    :return: RMS of the gaps between the observations after one step and what the model restores of them, ``(O,)``; and a
        finding for each dimension with gaps that are no rounding errors
    """
    before, after = windows.observations, windows.next_observations[0]
    every = th.cat([before, after])
    sizes = np.abs(to_numpy(every)).max(axis=0)
    has_gap = np.abs(_gaps(model, every)) > ROUNDING * (sizes + 1e-2)
    gaps = _gaps(model, after)
    by_past = explained_shares(gaps, to_numpy(th.cat([before, windows.actions[0]], dim=1)))
    findings = {}
    for dim in np.flatnonzero(has_gap.any(axis=0)).tolist():
        others = np.delete(to_numpy(after), dim, axis=1)
        by_others = explained_shares(gaps[:, [dim]], others)[0] if others.size else 0.0
        share, is_ignored = has_gap[:, dim].mean(), _is_ignored(model, after, dim)
        findings[dim] = _finding(gaps[:, dim], changes[dim], by_others, by_past[dim], share, is_ignored)._replace(
            name=names[dim]
        )
    return rms(gaps), findings


@th.no_grad()
def _gaps(model: PriorModel, observations: th.Tensor) -> np.ndarray:
    """
    :param model: the model, in evaluation mode
    :param observations: ``(B, O)``
    :return: what ``observation`` makes of the states that the observations describe, minus the observations; zero where a row
        is not finite, ``(B, O)``
    """
    restored = model.observation(model.state_from_observation(observations))
    gaps = observation_differences(model, restored, observations)
    return np.where(np.isfinite(gaps).all(axis=1, keepdims=True), gaps, 0.0)


def _is_ignored(model: PriorModel, observations: th.Tensor, dim: int) -> bool:
    """
    :param model: the model, in evaluation mode
    :param observations: ``(B, O)``
    :param dim: a dimension of the flat observations
    :return: whether the restored value of the dimension does not depend on its own value
    """
    moved = observations.clone()
    moved[:, dim] = moved[:, dim].roll(1)
    with th.no_grad():
        restored = [model.observation(model.state_from_observation(part)) for part in (observations, moved)]
    follows, differences = (to_numpy(pair[1] - pair[0])[:, dim] for pair in (restored, (observations, moved)))
    return bool(rms(follows) <= IGNORED_SHARE * rms(differences))


def _finding(gaps: np.ndarray, change: float, by_others: float, by_past: float, share: float, is_ignored: bool) -> Finding:
    """
    Tell a redundant element from a noisy one, and both from mistakes of the encoding.

    :param gaps: restored minus recorded values of a dimension, ``(B,)``
    :param change: RMS of its actual change in one step
    :param by_others: share of the gaps that the other elements explain; NaN if unknown
    :param by_past: share of the gaps that the observation and the action before explain; NaN if unknown
    :param share: share of the observations with a gap
    :param is_ignored: whether the restored value does not depend on the recorded one
    :return: the finding
    """
    gap = float(rms(gaps))
    is_small = gap <= SMALL_GAP * change
    size = "{values[0]:.3g}" if change == 0 else "{values[0]:.3g} ({values[1].percent} of the change in one step)"
    differs = f"`observation(state_from_observation(x))` differs from x by {size}"

    def finding(verdict: str, cause: str, remedy: str) -> Finding:
        if is_small:
            hint = f"{cause}. Small as this is, it can stay."
        else:
            hint = f"{cause}. {DIFFERENT_INPUTS} {remedy}"
        return Finding(
            Cost.NOISE if is_small else Cost.ENCODING, verdict, hint, values=(gap, gap / max(change, 1e-300), 100 * share)
        )

    if by_others < EXPLAINED_SHARE and by_past < EXPLAINED_SHARE and share > 0.5:
        return finding(
            "noisy",
            f"there seems to be noise or rounding in {{names}}: {differs}, and neither the other elements nor the step before "
            "tell how",
            "If it matters, filter it in the environment, or make it a dimension of the state.",
        )
    if is_ignored and by_others >= DETERMINED_SHARE:
        return finding(
            "redundant",
            f"the other elements determine {{names}}, but `observation` computes it differently: {differs}",
            "Compute it as the environment does, or take it out of the observations.",
        )
    if is_ignored and by_past >= EXPLAINED_SHARE:
        return finding(
            "not in the state",
            f"the state of the model lacks {{names}}, which the other elements do not seem to determine: {differs}",
            "Make it a dimension of the state.",
        )
    return finding(
        "not restored",
        "`observation` is not the inverse of `state_from_observation` in {names}: "
        f"{differs}, in {{values[2]:.0f}}% of the steps",
        "Look for a factor, an offset, a clamp or an angle that wraps.",
    )
