"""What is wrong with the predictions of each dimension."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sb3_mpg.common.models.checking.couplings import Coupling
from sb3_mpg.common.models.checking.findings import Cost, Finding
from sb3_mpg.common.models.checking.prediction_errors import WRONG_SIGN_GAIN, Residuals, n_better_than_no_change
from sb3_mpg.common.models.checking.regression import correlation, regress
from sb3_mpg.common.models.checking.sources import SOURCE_SHARE, Source, find_source
from sb3_mpg.common.models.checking.unexplained import Cause, causes_of_errors
from sb3_mpg.common.models.windows import rms

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
# Predictions with larger errors, as shares of the change, are worse than those of no change by more than chance
WORSE_THAN_CONSTANT = 1.05
# Errors are those of a few steps if these are at most this share of all
MAX_JUMPS = 0.2
# An angle that wraps jumps by the width of its range, up to this share, and more than once or twice
SAME_JUMP = 0.1
MIN_JUMPS = 5
# An encoding explains an error of which it is more than this share
ENCODING_SHARE = 0.5

WORSE = "worse than no change"
NOT_MOVED = "not moved"


class Context(NamedTuple):
    """
    What is known of all dimensions.

    :param names: of the dimensions
    :param names_of_states: of the dimensions of the state
    :param names_of_inputs: of observations and actions
    :param gains: of all actions, ``(A, O)``
    :param couplings: that explain errors, by dimension, see :func:`find_couplings`
    :param common_factors: of changes, by dimension, see :func:`_common_factors`
    :param causes: of errors, one for each dimension, see :func:`causes_of_errors`
    """

    names: tuple[str, ...]
    names_of_states: tuple[str, ...]
    names_of_inputs: tuple[str, ...]
    gains: np.ndarray
    couplings: Mapping[int, Coupling]
    common_factors: Mapping[int, float]
    causes: Sequence[Cause | None]


def judge_dimensions(
    residuals: Residuals,
    gains: np.ndarray,
    names: tuple[str, ...],
    names_of_states: tuple[str, ...],
    couplings: Mapping[int, Coupling],
    encoding_gaps: np.ndarray,
    encoding_findings: Mapping[int, Finding],
) -> list[list[Finding]]:
    """
    :param residuals: predictions compared with records
    :param gains: of all actions, ``(A, O)``
    :param names: names of the dimensions
    :param names_of_states: names of the dimensions of the state
    :param couplings: that explain errors, by dimension
    :param encoding_gaps: RMS of the gaps between observations and what is restored of them, ``(O,)``
    :param encoding_findings: findings about these gaps, by dimension
    :return: what was found about each dimension, nothing about a good one
    """
    context = Context(
        names=names,
        names_of_states=names_of_states,
        names_of_inputs=(*names, *(f"action {action}" for action in range(len(gains)))),
        gains=gains,
        couplings=couplings,
        common_factors=_common_factors(residuals, gains),
        causes=causes_of_errors(residuals),
    )
    judged = []
    for dim, name in enumerate(names):
        of_encoding = [encoding_findings[dim]] if dim in encoding_findings else []
        is_explained = encoding_gaps[dim] > ENCODING_SHARE * residuals.rms_errors[0, dim]
        findings = _judge_dimension(residuals, context, dim, is_explained)
        judged.append([*of_encoding, *(finding._replace(name=name) for finding in findings)])
    return judged


def _judge_dimension(residuals: Residuals, context: Context, dim: int, is_explained: bool) -> list[Finding]:
    """
    :param residuals: predictions compared with records
    :param context: what is known of all dimensions
    :param dim: the dimension
    :param is_explained: whether its encoding explains its errors
    :return: what was found about its predictions
    """
    if not is_explained and not residuals.is_moved[dim] and residuals.relative_errors()[0, dim] > 0:
        return [_judge_not_moved(context, dim)]
    # Before signs: a few jumps can turn the sign of a regression
    finding = None if is_explained else _judge_jumps(residuals, dim)
    finding = finding or _judge_sign(residuals, context.gains[:, dim], dim)
    if finding is not None:
        return [finding]
    return [] if is_explained else _judge_errors(residuals, context, dim)


def _judge_not_moved(context: Context, dim: int) -> Finding:
    """
    :param context: what is known of all dimensions
    :param dim: a dimension that the model keeps constant, and the environment does not
    :return: what this means
    """
    missed = _judge_gains(context.gains[:, dim])
    if missed is not None:
        return missed
    if context.causes[dim] == "random":
        hint = (
            "neither observation nor action tell how {names} changes: it looks random, as a reference or a disturbance that "
            "is drawn anew. The model keeps it constant, which is right: no model predicts it."
        )
        return Finding(Cost.NOISE, "random", hint)
    if context.causes[dim] == "hidden cause":
        return _judge_hidden_cause("hidden cause", 1.0)  # type: ignore[return-value]  # never None
    hint = "the model does not move {names}, and the environment does: write the term in `transition`."
    return Finding(Cost.WORSE_THAN_NO_CHANGE, NOT_MOVED, hint)


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
            "predictions of {names} are right in most steps ({values[0]:.0f}%) and far off in others: look for a contact, "
            "for an angle that wraps, or for something that is drawn anew."
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


def _judge_errors(residuals: Residuals, context: Context, dim: int) -> list[Finding]:
    """
    :param residuals: predictions compared with records
    :param context: what is known of all dimensions
    :param dim: the dimension
    :return: what is wrong, if anything is
    """
    relative_error = float(residuals.relative_errors()[0, dim])
    if relative_error < GOOD_RELATIVE_ERROR:
        drift = _judge_drift(residuals, dim)
        return [] if drift is None else [drift]
    tolerance = GOOD_RELATIVE_ERROR * float(residuals.rms_changes[0, dim])
    source = find_source(residuals.steps.errors[:, dim], residuals.steps.inputs, context.names_of_inputs, tolerance)
    cause = context.causes[dim]
    of_actions = _judge_gains(context.gains[:, dim])
    finding = (
        _judge_time_step(context.common_factors.get(dim))
        or _judge_coupling(context, dim)
        or of_actions
        or _judge_hidden_cause(cause, relative_error)
        or _judge_bias(residuals, dim, source)
        or _judge_scale(residuals, dim)
        or _judge_noise(cause, relative_error)
        or _judge_size(relative_error, source)
    )
    findings = [_with_drift(finding, residuals, dim)]
    n_states = len(context.names)
    if finding is of_actions and source is not None and any(index < n_states for index in source.inputs):
        # Not only the effect of the action is wrong
        findings.append(_judge_size(relative_error, source))
    return findings


def _judge_coupling(context: Context, dim: int) -> Finding | None:
    """
    :param context: what is known of all dimensions
    :param dim: the dimension
    :return: that its errors come from the integration scheme, or from the errors of another dimension, if they do
    """
    coupling = context.couplings.get(dim)
    if coupling is None:
        return None
    source = context.names_of_states[coupling.source]
    if not coupling.is_scheme:
        hint = f"the errors of {{names}} follow from those of {source}: mend that one first."
        return Finding(Cost.DRIFT, f"follows {source}", hint)
    hint = (
        f"the integration of {{names}} differs: of {source}, the environment takes {_part_of_step(coupling.of_env)}, and the "
        f"model {_part_of_step(coupling.of_model)}. Integrate as the environment does; no gain of an action is "
        "wrong here."
    )
    return Finding(Cost.SCHEME, "other integration scheme", hint)


def _part_of_step(part: float) -> str:
    """
    :param part: of the change of a source that its dependents see within the same step
    :return: in words
    """
    if part < 0.2:
        return "the old value (as explicit Euler)"
    if part > 0.8:
        return "the new value (as semi-implicit Euler)"
    return "a value between old and new (as several substeps, or Runge-Kutta)"


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


def _judge_bias(residuals: Residuals, dim: int, source: Source | None) -> Finding | None:
    """
    :param residuals: predictions compared with records
    :param dim: a dimension with large errors
    :param source: of its errors
    :return: that a constant explains them, if it does
    """
    error, bias = residuals.rms_errors[0, dim], residuals.biases[0, dim]
    if bias**2 <= 0.5 * error**2:
        return None
    # Errors that depend on an input have a mean, too: then a constant would not mend them
    rest = float(residuals.steps.errors[:, dim].std())
    if source is not None and rest > GOOD_RELATIVE_ERROR * residuals.rms_changes[0, dim]:
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
    factor = regress(actual, predicted)[0]
    # Not if a constant is off, too
    is_all = rms(actual - factor * predicted) ** 2 <= (1 - CLEAR_FACTOR) * rms(actual) ** 2
    return factor if is_all else None


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


def _judge_hidden_cause(cause: Cause | None, relative_error: float) -> Finding | None:
    """
    :param cause: of the errors of a dimension, see :func:`causes_of_errors`
    :param relative_error: of the dimension
    :return: that something hidden acts on it, if it looks like that
    """
    if cause != "hidden cause":
        return None
    hint = (
        "the step before tells more of the errors of {names} ({values[0].percent} of the change) than observation and action "
        "do: something acts there that observations do not show, such as a velocity, a delay or a disturbance. Let the "
        "environment show it, or earlier observations."
    )
    return Finding(Cost.HIDDEN, cause, hint, values=(relative_error,))


def _judge_noise(cause: Cause | None, relative_error: float) -> Finding | None:
    """
    :param cause: of the errors of a dimension, see :func:`causes_of_errors`
    :param relative_error: of the dimension
    :return: that they are no mistake of the model, if it looks like that
    """
    if cause != "noisy":
        return None
    hint = (
        "observation and action explain hardly any of the errors of {names} ({values[0].percent} of the change). It may be "
        "noise, rounding, or the effect of something that observations do not show, and not a mistake of the model."
    )
    if relative_error > WORSE_THAN_CONSTANT:
        hint += " The model would be better without its own change: keep a random reference constant."
    return Finding(Cost.NOISE, cause, hint, values=(relative_error,))


def _judge_size(relative_error: float, source: Source | None) -> Finding:
    """
    :param relative_error: of a dimension with large errors of no known kind
    :param source: of its errors
    :return: how bad it is
    """
    where = "."
    if source is not None:
        much = "the error" if source.share >= SOURCE_SHARE else "much of the error"
        exchange = ", such as an exchange or a loss," if source.is_exchange else ""
        where = f": {much} is {source.formula}, so a term with it{exchange} is wrong or missing."
    if relative_error >= 1:
        hint = "predictions of {names} are worse than no change ({values[0].percent} of it)" + where
        if source is None:
            hint += " Check units, and that a model step is as long as an environment step."
        return Finding(Cost.WORSE_THAN_NO_CHANGE, WORSE, hint, values=(relative_error,))
    hint = "the prediction of {names} is rough ({values[0].percent} of the change)" + where
    if source is None:
        hint += " A term or a parameter may be off."
    return Finding(Cost.ROUGH, "rough", f"{hint} This can be good enough to train with.", values=(relative_error,))
