"""What is wrong with the predictions of each dimension."""

from collections.abc import Mapping

import numpy as np

from sb3_mpg.common.models.checking.findings import Cost, Finding
from sb3_mpg.common.models.checking.prediction_errors import WRONG_SIGN_GAIN, Residuals, n_better_than_no_change
from sb3_mpg.common.models.checking.regression import correlation, explained_shares, regress
from sb3_mpg.common.models.windows import MIN_WINDOWS, rms

# Errors below this share of the actual change deserve no hint
GOOD_RELATIVE_ERROR = 0.1
# The effect of an action may be this many times larger or smaller than in the model
WRONG_GAIN = 1.3
# An effect that is smaller than this share of that in the model is none
NO_GAIN = 1e-4
# The same for changes
WRONG_SCALE = 1.25
# Factors of changes are the same if they differ by no more than this share
SAME_SCALE = 0.15
# A factor means something if it explains this share of the changes
CLEAR_FACTOR = 0.95
# Errors look random if observations and actions explain no more than this share of them
RANDOM_SHARE = 0.1
# Something hidden causes errors if the step before explains this share more of them
HIDDEN_SHARE = 0.25
# ... and if consecutive errors are correlated as much as this
PERSISTENCE = 0.3
# Errors are proportional to an input that explains this share of them
SOURCE_SHARE = 0.9
# Errors are those of a few steps if these are at most this share of all
MAX_JUMPS = 0.2
# An angle that wraps jumps by the width of its range, up to this share, and more than once or twice
SAME_JUMP = 0.1
MIN_JUMPS = 5
# An encoding explains an error of which it is more than this share
ENCODING_SHARE = 0.5

WORSE = "worse than no change"


def judge_dimensions(
    residuals: Residuals,
    gains: np.ndarray,
    names: tuple[str, ...],
    encoding_gaps: np.ndarray,
    encoding_findings: Mapping[int, Finding],
) -> list[list[Finding]]:
    """
    :param residuals: predictions compared with records
    :param gains: of all actions, ``(A, O)``
    :param names: names of the dimensions
    :param encoding_gaps: RMS of the gaps between observations and what is restored of them, ``(O,)``
    :param encoding_findings: findings about these gaps, by dimension
    :return: what was found about each dimension, nothing about a good one
    """
    factors, causes = _common_factors(residuals, gains), _causes_of_errors(residuals)
    inputs = (*names, *(f"action {action}" for action in range(len(gains))))
    judged = []
    for dim, name in enumerate(names):
        findings = [encoding_findings[dim]] if dim in encoding_findings else []
        is_explained = encoding_gaps[dim] > ENCODING_SHARE * residuals.rms_errors[0, dim]
        # Before signs: a few jumps can turn the sign of a regression
        finding = None if is_explained else _judge_jumps(residuals, dim)
        finding = finding or _judge_sign(residuals, gains[:, dim], dim)
        if finding is None and not is_explained:
            finding = _judge_errors(residuals, gains[:, dim], dim, factors.get(dim), causes[dim], inputs)
        judged.append(findings if finding is None else [*findings, finding._replace(name=name)])
    return judged


def _judge_jumps(residuals: Residuals, dim: int) -> Finding | None:
    """
    :param residuals: predictions compared with records
    :param dim: the dimension
    :return: that its errors are those of a few steps, if they are
    """
    sizes, width = np.sort(np.abs(residuals.steps.errors[:, dim])), np.ptp(residuals.steps.inputs[:, dim])
    error, relative_error = residuals.rms_errors[0, dim], residuals.relative_errors()[0, dim]
    if (
        relative_error < GOOD_RELATIVE_ERROR
        or not np.isfinite(error)
        or rms(sizes[: int((1 - MAX_JUMPS) * len(sizes))]) >= 0.2 * error
    ):
        return None
    jumps = sizes[sizes > 0.5 * error]
    values = (100 * (1 - len(jumps) / len(sizes)), float(jumps.mean()))
    if len(jumps) >= MIN_JUMPS and jumps.std() < SAME_JUMP * values[1] and values[1] > (1 - SAME_JUMP) * width:
        hint = (
            "predictions of {names} are right in {values[0]:.0f}% of the steps and {values[1]:.3g} off in others. It is "
            "probably an angle that wraps: write `state_difference`, and wrap it in `transition` as the environment does."
        )
    else:
        hint = (
            "predictions of {names} are right in most steps ({values[0]:.0f}%) and far off in others: look for a contact, or "
            "for an angle that wraps."
        )
    return _with_drift(Finding(Cost.RARE_JUMPS, "rare jumps", hint, values=values), residuals, dim)


def _judge_sign(residuals: Residuals, gains: np.ndarray, dim: int) -> Finding | None:
    """
    :param residuals: predictions compared with records
    :param gains: of all actions on this dimension, ``(A,)``
    :param dim: the dimension
    :return: what makes all else meaningless, if there is any: values that are not finite, or the wrong sign of an action
    """
    if not np.isfinite(residuals.rms_errors[0, dim]):
        percent = 100 * (1 - np.isfinite(residuals.steps.predicted_changes[:, dim]).mean())
        hint = (
            "predictions of {names} are not finite one step after {values[0]:.2g}% of the recorded states: clamp the inputs "
            "of roots, logarithms and divisions."
        )
        return Finding(Cost.NOT_FINITE, "not finite", hint, values=(percent,))
    wrong_actions = np.flatnonzero(gains < -WRONG_SIGN_GAIN)
    if len(wrong_actions) > 0:
        action = wrong_actions[0]
        hint = (
            f"action {action} seems to act with the opposite sign on {{names}} (its effect is {{values[0]:.2g}} times the "
            "model's): check the sign of its term in `transition`."
        )
        return Finding(Cost.WRONG_SIGN, f"wrong sign of action {action}", hint, values=(gains[action],))
    changes, predicted_changes = residuals.steps.changes[:, dim], residuals.steps.predicted_changes[:, dim]
    if rms(changes + predicted_changes) < 0.5 * residuals.rms_errors[0, dim]:
        hint = "the model seems to change {names} in the opposite direction: check the sign of the derivative."
        return Finding(Cost.WRONG_SIGN, "wrong sign", hint)
    return None


def _judge_errors(
    residuals: Residuals,
    gains: np.ndarray,
    dim: int,
    common_factor: float | None,
    cause: str | None,
    inputs: tuple[str, ...],
) -> Finding | None:
    """
    :param residuals: predictions compared with records
    :param gains: of all actions on this dimension, ``(A,)``
    :param dim: the dimension
    :param common_factor: that its change is scaled by, as the changes of other dimensions
    :param cause: of its errors, see :func:`_causes_of_errors`
    :param inputs: names of the observation dimensions and actions
    :return: what is wrong, if anything is
    """
    relative_error = float(residuals.relative_errors()[0, dim])
    if relative_error < GOOD_RELATIVE_ERROR:
        return _judge_drift(residuals, dim)
    finding = (
        _judge_time_step(common_factor)
        or _judge_gains(gains)
        or _judge_hidden_cause(cause, relative_error)
        or _judge_bias(residuals, dim)
        or _judge_scale(residuals, dim)
        or _judge_noise(cause, relative_error)
        or _judge_size(residuals, dim, relative_error, inputs)
    )
    return _with_drift(finding, residuals, dim)


def _with_drift(finding: Finding, residuals: Residuals, dim: int) -> Finding:
    """
    :param finding: what is wrong with a dimension
    :param residuals: predictions compared with records
    :param dim: the dimension
    :return: the same, with a verdict that says when predictions become worse than no change
    """
    relative_errors = residuals.relative_errors()[:, dim]
    n_good_steps = n_better_than_no_change(relative_errors)
    if n_good_steps == len(relative_errors) or finding.verdict == WORSE:
        return finding
    if n_good_steps == 0:
        return finding._replace(verdict=f"{finding.verdict}, worse than no change")
    return finding._replace(verdict=f"{finding.verdict}, worse than no change after step {n_good_steps}")


def _judge_drift(residuals: Residuals, dim: int) -> Finding | None:
    """
    :param residuals: predictions compared with records
    :param dim: a dimension that is good in one step
    :return: why it drifts, if it does
    """
    error, bias = residuals.rms_errors[0, dim], residuals.biases[0, dim]
    relative_errors = residuals.relative_errors()[:, dim]
    n_good_steps = n_better_than_no_change(relative_errors)
    if n_good_steps == len(relative_errors):
        return None
    values: tuple[float, ...] = (n_good_steps,)
    hint = "predictions of {names} are good in one step, but worse than no change after step {values[0]:.0f}: "
    if bias**2 > 0.5 * error**2:
        hint += "a bias of {values[1]:+.2g} accumulates."
        values = (*values, bias)
    else:
        hint += "errors accumulate, its own or those of other dimensions."
    return _with_drift(Finding(Cost.DRIFT, "good", hint, values=values), residuals, dim)


def _judge_time_step(common_factor: float | None) -> Finding | None:
    """
    :param common_factor: that the change of a dimension is scaled by, as the changes of other dimensions
    :return: that the time step may be wrong, if there is such a factor
    """
    if common_factor is None:
        return None
    hint = (
        "the change of {names} is {values[0]:.2g} times what the model predicts, all alike: check that a model step is as "
        "long as an environment step (time step, skipped frames)."
    )
    return Finding(Cost.WRONG_SCALE, "wrong scale", hint, values=(common_factor,))


def _judge_bias(residuals: Residuals, dim: int) -> Finding | None:
    """
    :param residuals: predictions compared with records
    :param dim: a dimension with large errors
    :return: that a constant explains them, if it does
    """
    error, bias = residuals.rms_errors[0, dim], residuals.biases[0, dim]
    # Errors that are proportional to an input have a mean, too
    if bias**2 <= 0.5 * error**2 or _source_of(residuals.steps.errors[:, dim], residuals.steps.inputs) is not None:
        return None
    direction = "high" if bias > 0 else "low"
    hint = f"the model predicts {{names}} too {direction} by {{values[0]:.3g}} on average: look for a constant term."
    return Finding(Cost.BIASED, "biased", hint, values=(abs(bias),))


def _judge_gains(gains: np.ndarray) -> Finding | None:
    """
    :param gains: of all actions on a dimension, ``(A,)``
    :return: what is wrong with the effects of actions, if anything is
    """
    missed_actions = np.flatnonzero(np.isinf(gains))
    if len(missed_actions) > 0:
        action = missed_actions[0]
        hint = (
            "the effect of action{values[0].plural} {values[0]:.0f} on {names} is missing in the model: add its term to "
            "`transition`."
        )
        return Finding(Cost.MISSED_ACTION, f"misses action {action}", hint, values=(action,))
    is_off = np.isfinite(gains) & ~((gains > 1 / WRONG_GAIN) & (gains < WRONG_GAIN))
    if is_off.any():
        action = int(is_off.argmax())
        only = "only " if gains[action] < 1 else ""
        hint = (
            f"action {action} acts {only}{{values[0]:.2g}} times as strongly on {{names}} as in the model: check its factor "
            "in `transition`, and its units: a model gets actions as the environment does, not scaled to [-1, 1]."
        )
        if abs(gains[action]) < NO_GAIN:
            hint = (
                f"action {action} moves {{names}} in the model, and not in the environment: remove its term, and "
                "look whether the elements of the states are in the order of the observations."
            )
        return Finding(Cost.WRONG_SCALE, f"wrong gain of action {action}", hint, values=(gains[action],))
    return None


def scale_factor(actual: np.ndarray, predicted: np.ndarray) -> float | None:
    """
    :param actual: recorded values, ``(B,)``
    :param predicted: predicted values, ``(B,)``
    :return: the constant that the actual values are the predicted ones times, ``None`` if there is none
    """
    if correlation(actual, predicted) ** 2 < CLEAR_FACTOR:
        return None
    return regress(actual, predicted)[0]


def is_wrong_scale(factor: float | None) -> bool:
    """
    :param factor: of :func:`scale_factor`
    :return: whether there is a factor, and it is not about one
    """
    return factor is not None and not 1 / WRONG_SCALE < factor < WRONG_SCALE


def _judge_scale(residuals: Residuals, dim: int) -> Finding | None:
    """
    :param residuals: predictions compared with records
    :param dim: a dimension with large errors
    :return: whether its change is that of the model times a constant
    """
    factor = scale_factor(residuals.steps.changes[:, dim], residuals.steps.predicted_changes[:, dim])
    if factor is None or not is_wrong_scale(factor):
        return None
    hint = (
        "the change of {names} is {values[0]:.3g} times what the model predicts: check signs, factors and units of its terms."
    )
    return Finding(Cost.WRONG_SCALE, "wrong scale", hint, values=(factor,))


def _common_factors(residuals: Residuals, gains: np.ndarray) -> dict[int, float]:
    """
    :param residuals: predictions compared with records
    :param gains: of all actions, ``(A, O)``
    :return: factors of the changes of dimensions, if those of most dimensions have the same one; empty if not
    """
    moves = np.isfinite(residuals.rms_errors[0]) & (residuals.rms_changes[0] > residuals.rounding)
    factors = {}
    for dim in np.flatnonzero(moves).tolist():
        factor = scale_factor(residuals.steps.changes[:, dim], residuals.steps.predicted_changes[:, dim])
        if factor is not None:
            factors[dim] = factor
    if len(factors) < max(2, int(moves.sum()) / 2):
        return {}
    middle = float(np.median(list(factors.values())))

    def is_same(values: np.ndarray) -> bool:
        return bool((np.abs(values - middle) < SAME_SCALE * abs(middle)).all())

    if middle < 0 or not is_wrong_scale(middle) or not is_same(np.array(list(factors.values()))):
        return {}
    # Dimensions that have other errors, too, but whose actions are scaled alike
    known = {dim: part[np.isfinite(part)] for dim, part in enumerate(gains.T)}
    also = {dim: float(part.mean()) for dim, part in known.items() if dim not in factors and len(part) and is_same(part)}
    return {**factors, **also}


def _causes_of_errors(residuals: Residuals) -> list[str | None]:
    """
    Whether errors look like noise, or like the effect of something that observations do not show.

    :param residuals: predictions compared with records
    :return: ``"noisy"`` or ``"hidden cause"`` for each dimension, ``None`` if it is neither
    """
    steps, (first, second) = residuals.steps, residuals.pairs
    errors, earlier_errors, later_errors = (
        np.where(np.isfinite(part.errors), part.errors, 0.0) for part in (steps, first, second)
    )
    is_random = explained_shares(errors, steps.inputs) < RANDOM_SHARE
    is_hidden = np.zeros_like(is_random)
    if len(first.inputs) >= MIN_WINDOWS:
        now = explained_shares(later_errors, second.inputs)
        with_past = explained_shares(later_errors, np.concatenate([first.inputs, second.inputs], axis=1))
        # Noise of a sensor is in two consecutive errors, with opposite signs
        persists = np.array([correlation(*pair) > PERSISTENCE for pair in zip(earlier_errors.T, later_errors.T, strict=True)])
        is_hidden = persists & (with_past > now + HIDDEN_SHARE)
    return [
        "hidden cause" if hidden else "noisy" if random else None for hidden, random in zip(is_hidden, is_random, strict=True)
    ]


def _judge_hidden_cause(cause: str | None, relative_error: float) -> Finding | None:
    """
    :param cause: of the errors of a dimension, see :func:`_causes_of_errors`
    :param relative_error: of the dimension
    :return: that something hidden acts on it, if it looks like that
    """
    if cause != "hidden cause":
        return None
    hint = (
        "the step before tells more of the errors of {names} ({values[0]:.0f}% of the change) than observation and action do: "
        "something acts there that observations do not show, such as a velocity, a delay or a disturbance. Let the "
        "environment show it, or earlier observations."
    )
    return Finding(Cost.HIDDEN, cause, hint, values=(100 * relative_error,))


def _judge_noise(cause: str | None, relative_error: float) -> Finding | None:
    """
    :param cause: of the errors of a dimension, see :func:`_causes_of_errors`
    :param relative_error: of the dimension
    :return: that they are no mistake of the model, if it looks like that
    """
    if cause != "noisy":
        return None
    hint = (
        "observation and action explain hardly any of the errors of {names} ({values[0]:.0f}% of the change). It may be "
        "noise, rounding, or the effect of something that observations do not show, and not a mistake of the model."
    )
    return Finding(Cost.NOISE, cause, hint, values=(100 * relative_error,))


def _judge_size(residuals: Residuals, dim: int, relative_error: float, inputs: tuple[str, ...]) -> Finding:
    """
    :param residuals: predictions compared with records
    :param dim: a dimension with large errors of no known kind
    :param relative_error: of the dimension
    :param inputs: names of the observation dimensions and actions
    :return: how bad it is
    """
    if rms(residuals.steps.predicted_changes[:, dim]) <= residuals.rounding[dim]:
        hint = "the model does not move {names}, and the environment does: write the term in `transition`."
        return Finding(Cost.WORSE_THAN_NO_CHANGE, WORSE, hint)
    values: tuple[float, ...] = (100 * relative_error,)
    where = "."
    source = _source_of(residuals.steps.errors[:, dim], residuals.steps.inputs)
    if source is not None:
        where = f": the error is {{values[1]:.2g}} times {inputs[source[0]]}, so a term with it is wrong or missing."
        values = (*values, source[1])
    if relative_error >= 1:
        hint = "predictions of {names} are worse than no change ({values[0]:.0f}% of it)" + where
        hint += " Check units, and that a model step is as long as an environment step."
        return Finding(Cost.WORSE_THAN_NO_CHANGE, WORSE, hint, values=values)
    hint = "the prediction of {names} is rough ({values[0]:.0f}% of the change)" + where
    if source is None:
        hint += " A term or a parameter may be off."
    return Finding(Cost.ROUGH, "rough", f"{hint} This can be good enough to train with.", values=values)


def _source_of(errors: np.ndarray, inputs: np.ndarray) -> tuple[int, float] | None:
    """
    :param errors: of a dimension, ``(B,)``
    :param inputs: observations and actions, ``(B, O + A)``
    :return: the input that the errors are proportional to, and the factor; ``None`` if there is none
    """
    shares = [correlation(errors, column) ** 2 for column in inputs.T]
    best = int(np.argmax(shares))
    if shares[best] <= SOURCE_SHARE:
        return None
    factor = regress(errors, inputs[:, best])[0]
    # Without a constant
    is_all = rms(errors - factor * inputs[:, best]) ** 2 < (1 - SOURCE_SHARE) * rms(errors) ** 2
    return (best, factor) if is_all else None
