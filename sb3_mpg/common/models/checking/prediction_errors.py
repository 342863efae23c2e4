"""Measures how well a prior model predicts an environment."""

from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.report import PriorModelReport, relative
from sb3_mpg.common.models.windows import MIN_WINDOWS, Windows, rms, rollout_errors, rounding_errors, to_numpy

# Errors below this share of the actual change deserve no hint
GOOD_RELATIVE_ERROR = 0.1
# An action whose gain is below the negative of this has the wrong sign
WRONG_SIGN_GAIN = 0.25
# An action may be this many times stronger or weaker than in the model
WRONG_GAIN = 1.3
# The model misses an action if it causes at least this share of a dimension's change, and none in the model
MISSED_EFFECT = 0.05
# Errors look random if observations and actions explain no more than this share of their variance
RANDOM_SHARE = 0.1


class _Residuals(NamedTuple):
    """
    Predictions compared with records.

    :param n_windows: see :class:`PriorModelReport`, ``(H,)``
    :param rms_errors: see :class:`PriorModelReport`, ``(H, O)``
    :param biases: see :class:`PriorModelReport`, ``(H, O)``
    :param rms_changes: see :class:`PriorModelReport`, ``(H, O)``
    :param rounding: smaller errors and changes may be rounding errors, ``(O,)``
    :param changes: actual changes in one step, ``(B, O)``
    :param predicted_changes: predicted changes in one step, ``(B, O)``
    """

    n_windows: np.ndarray
    rms_errors: np.ndarray
    biases: np.ndarray
    rms_changes: np.ndarray
    rounding: np.ndarray
    changes: np.ndarray
    predicted_changes: np.ndarray

    def relative_errors(self) -> np.ndarray:
        """
        :return: errors divided by the actual changes, with rounding errors counted as zero, ``(H, O)``
        """
        errors = np.where(self.rms_errors <= self.rounding, 0.0, self.rms_errors)
        return relative(errors, np.where(self.rms_changes <= self.rounding, 0.0, self.rms_changes))


def measure_prediction_errors(model: PriorModel, windows: Windows, horizon: int) -> PriorModelReport:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :param horizon: number of steps that should be checked
    :return: the report
    """
    residuals = _compare_predictions(model, windows)
    gains = _action_gains(model, windows, residuals)
    relative_errors = residuals.relative_errors()
    # All dimensions together; clip the relative errors of those that hardly move, which would dominate
    together = rms(np.minimum(relative_errors, 1e3).T)
    judgements = [_judge_dimension(residuals, gains[:, dim], dim) for dim in range(relative_errors.shape[1])]
    rough_hint = _rough_hint(judgements, relative_errors[0], residuals, windows)
    reward_error, reward_bias, reward_std, reward_verdict, reward_hint = _judge_reward(model, windows)
    terminal_errors, terminal_hint = _judge_terminal(model, windows)
    hints = [_silent_actions_hint(model, windows), *(hint for _, hint in judgements), rough_hint, reward_hint, terminal_hint]
    return PriorModelReport(
        dimensions=tuple(_name(dim) for dim in range(len(judgements))),
        n_windows=residuals.n_windows,
        rms_errors=residuals.rms_errors,
        biases=residuals.biases,
        rms_changes=residuals.rms_changes,
        action_gains=gains,
        verdicts=tuple(verdict for verdict, _ in judgements),
        reward_rms_error=reward_error,
        reward_bias=reward_bias,
        reward_std=reward_std,
        reward_verdict=reward_verdict,
        terminal_errors=terminal_errors,
        requested_horizon=horizon,
        supported_horizon=_n_better_than_no_change(together),
        hints=tuple(hint for hint in hints if hint),
    )


def _name(dim: int) -> str:
    return f"observation[{dim}]"


def _n_better_than_no_change(relative_errors: np.ndarray) -> int:
    """
    :param relative_errors: one for each number of steps, ``(H,)``
    :return: the number of steps before the first relative error of one or more
    """
    is_worse = relative_errors >= 1
    return int(is_worse.argmax()) if is_worse.any() else len(is_worse)


@th.no_grad()
def _differences(model: PriorModel, device: th.device, observations: np.ndarray, others: np.ndarray) -> np.ndarray:
    """
    :param model: the model; where its states are the observations, it defines what their difference is
    :param device: device of the model
    :param observations: ``(B, O)``
    :param others: ``(B, O)``
    :return: differences, ``(B, O)``
    """
    if type(model).observation is not PriorModel.observation:
        return observations - others
    states, other_states = (th.as_tensor(array, device=device) for array in (observations, others))
    return to_numpy(model.state_difference(states, other_states))


def _compare_predictions(model: PriorModel, windows: Windows) -> _Residuals:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :return: predictions compared with records, for as many steps as enough windows are long
    """
    device = windows.observations.device

    def differences(values: np.ndarray, others: np.ndarray) -> np.ndarray:
        return _differences(model, device, values, others)

    observations = to_numpy(windows.observations.flatten(1))
    actual = to_numpy(windows.next_observations.flatten(2))
    n_windows, rms_errors, biases, rms_changes = [], [], [], []
    for step, rollout in enumerate(rollout_errors(model, windows)):
        is_recorded = rollout.is_recorded.cpu().numpy()
        if step > 0 and is_recorded.sum() < MIN_WINDOWS:
            break
        with th.no_grad():
            predicted = to_numpy(model.observation(rollout.states).flatten(1))
        if step == 0:
            predicted_changes = differences(predicted, observations)
        with np.errstate(all="ignore"):
            errors = differences(predicted[is_recorded], actual[step, is_recorded])
            bias = errors.mean(axis=0)
        n_windows.append(int(is_recorded.sum()))
        rms_errors.append(rms(errors))
        biases.append(np.where(np.isfinite(bias), bias, np.inf))
        rms_changes.append(rms(differences(actual[step, is_recorded], observations[is_recorded])))
    return _Residuals(
        n_windows=np.array(n_windows),
        rms_errors=np.stack(rms_errors),
        biases=np.stack(biases),
        rms_changes=np.stack(rms_changes),
        rounding=rounding_errors(observations),
        changes=differences(actual[0], observations),
        predicted_changes=predicted_changes,
    )


def _regress(targets: np.ndarray, inputs: np.ndarray) -> tuple[float, float]:
    """
    :param targets: ``(B,)``
    :param inputs: ``(B,)``, not constant
    :return: the slope of the regression of the targets on the inputs, and its standard error
    """
    targets, inputs = targets - targets.mean(), inputs - inputs.mean()
    power = float(inputs @ inputs)
    slope = float(inputs @ targets) / power
    rest = targets - slope * inputs
    return slope, float(np.sqrt(rest @ rest / max(len(rest) - 2, 1) / power))


def _action_gains(model: PriorModel, windows: Windows, residuals: _Residuals) -> np.ndarray:
    """
    The effect of each action in the environment, divided by its effect in the model. Random actions are independent
    of everything else, so other errors of the model do not bias the result.

    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :param residuals: the predictions with the recorded actions
    :return: regression coefficients, ``(A, O)``: infinite where the model does not have the effect, NaN where there is no
        effect or the coefficient is too uncertain
    """
    actions = windows.actions[0]
    gains = np.full((actions.shape[1], residuals.changes.shape[1]), np.nan)
    observations = to_numpy(windows.observations.flatten(1))
    smallest_effects = np.maximum(1e-3 * residuals.rms_changes[0], residuals.rounding)
    for action_dim in range(actions.shape[1]):
        neutral_actions = actions.clone()
        neutral_actions[:, action_dim] = actions[:, action_dim].mean()
        with th.no_grad():
            next_states = model.transition(model.state_from_observation(windows.observations), neutral_actions)
            neutral = to_numpy(model.observation(next_states).flatten(1))
        neutral_changes = _differences(model, windows.observations.device, neutral, observations)
        effects, targets = residuals.predicted_changes - neutral_changes, residuals.changes - neutral_changes
        taken = to_numpy(actions[:, action_dim])
        for dim in np.flatnonzero(np.isfinite(effects).all(axis=0)):
            if rms(effects[:, dim]) > smallest_effects[dim]:
                gain, standard_error = _regress(targets[:, dim], effects[:, dim])
                if 4 * standard_error < max(abs(gain), WRONG_SIGN_GAIN):
                    gains[action_dim, dim] = gain
            elif taken.std() > 0:
                slope, standard_error = _regress(targets[:, dim], taken)
                least = max(MISSED_EFFECT * residuals.rms_changes[0, dim], residuals.rounding[dim]) / taken.std()
                if abs(slope) > max(6 * standard_error, least):
                    gains[action_dim, dim] = np.inf
    return gains


def _silent_actions_hint(model: PriorModel, windows: Windows) -> str | None:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :return: a hint, if an action has an effect in the model but no gradient, which a policy needs to learn
    """
    with th.no_grad():
        states = model.state_from_observation(windows.observations)
    actions = windows.actions[0].clone().requires_grad_()
    with th.enable_grad():
        next_states = model.transition(states, actions)
    if not next_states.requires_grad:
        return None
    (gradient,) = th.autograd.grad(next_states.sum(), actions, allow_unused=True)
    for action_dim in range(actions.shape[1]):
        others = actions.detach().clone()
        others[:, action_dim] = others[:, action_dim].roll(1)
        with th.no_grad():
            is_moved = bool((model.transition(states, others) != next_states).any())
        if is_moved and gradient is not None and not bool(gradient[:, action_dim].any()):
            return (
                f"action {action_dim} moves states in the model, but the gradient of `transition` with respect to it is zero "
                "everywhere, and a policy learns from the gradient alone: replace signs, rounding and comparisons."
            )
    return None


def _judge_dimension(residuals: _Residuals, gains: np.ndarray, dim: int) -> tuple[str, str | None]:
    """
    :param residuals: predictions compared with records
    :param gains: of all actions on this dimension, ``(A,)``
    :param dim: the dimension
    :return: the verdict, and a hint how to fix what is wrong
    """
    name = _name(dim)
    relative_errors = residuals.relative_errors()[:, dim]
    error, bias = residuals.rms_errors[0, dim], residuals.biases[0, dim]
    if not np.isfinite(error):
        return "not finite", f"{name} is not finite after one step: clamp the inputs of roots, logarithms and divisions."
    n_good_steps = _n_better_than_no_change(relative_errors)
    drift = f", worse than no change after step {n_good_steps}" if 0 < n_good_steps < len(relative_errors) else ""
    wrong_actions = np.flatnonzero(gains < -WRONG_SIGN_GAIN)
    if len(wrong_actions) > 0:
        return f"wrong sign of action {wrong_actions[0]}", (
            f"action {wrong_actions[0]} seems to act with the opposite sign on {name} (its effect is "
            f"{gains[wrong_actions[0]]:.2g} times the model's): check the sign of its term in `transition`."
        )
    if relative_errors[0] < GOOD_RELATIVE_ERROR:
        cause = (
            f"its bias of {bias:+.2g} accumulates"
            if bias**2 > 0.5 * error**2
            else "its small error accumulates, or errors of other dimensions do"
        )
        return f"good{drift}", f"{name} is good in one step but drifts: {cause}." if drift else None
    changes, predicted_changes = residuals.changes[:, dim], residuals.predicted_changes[:, dim]
    if rms(changes + predicted_changes) < 0.5 * error:
        return "wrong sign", f"{name} seems to change in the opposite direction: check the sign of its derivative."
    worse = relative_errors[0] >= 1
    if bias**2 > 0.5 * error**2:
        verdict = "biased, worse than no change" if worse else f"biased{drift}"
        direction = "high" if bias > 0 else "low"
        return verdict, f"{name} is predicted too {direction} by {abs(bias):.3g} in each step: look for a constant term in it."
    errors = np.sort(np.abs(predicted_changes - changes))
    if rms(errors[: -max(len(errors) // 20, 1)]) < 0.2 * error:
        return (
            "rare jumps",
            f"{name} is right in 95% of the steps and far off in others: is it an angle that wraps, or a contact?",
        )
    gain_verdict, hint = _judge_gains(name, gains)
    hint = hint or _scale_hint(f"the change of {name}", changes, predicted_changes)
    if worse:
        default = (
            f"{name} is worse than predicting no change: check units, and that a model step is as long as an environment step."
        )
        return "worse than no change", hint or default
    return gain_verdict or f"rough{drift}", hint


def _judge_gains(name: str, gains: np.ndarray) -> tuple[str | None, str | None]:
    """
    :param name: name of the dimension
    :param gains: of all actions on it, ``(A,)``
    :return: the verdict and a hint, ``None`` where all actions act as they should
    """
    missed_actions = np.flatnonzero(np.isinf(gains))
    if len(missed_actions) > 0:
        return f"misses action {missed_actions[0]}", (
            f"action {missed_actions[0]} moves {name}, but not in the model: its term in `transition` is missing."
        )
    is_off = np.isfinite(gains) & ~((gains > 1 / WRONG_GAIN) & (gains < WRONG_GAIN))
    if is_off.any():
        action = int(is_off.argmax())
        return f"wrong gain of action {action}", (
            f"action {action} acts {gains[action]:.2g} times as strongly on {name} as in the model: check its factor in "
            "`transition`, and its units: a model gets actions as the environment does, not scaled to [-1, 1]."
        )
    return None, None


def _explained_share(errors: np.ndarray, windows: Windows) -> float:
    """
    :param errors: of one dimension after one step, ``(B,)``
    :param windows: recorded windows
    :return: share of the variance of the errors that a quadratic function of observation and action explains; the function
        is fitted to one half of the records and evaluated on the other half
    """
    inputs = np.concatenate([to_numpy(windows.observations.flatten(1)), to_numpy(windows.actions[0])], axis=1)
    inputs = (inputs - inputs.mean(axis=0)) / np.maximum(inputs.std(axis=0), 1e-12)
    first, second = np.triu_indices(inputs.shape[1])
    features = np.concatenate([np.ones((len(inputs), 1)), inputs, inputs[:, first] * inputs[:, second]], axis=1)
    if len(features) < 4 * features.shape[1]:
        return 1.0  # too few records to tell
    factors = np.linalg.lstsq(features[::2], errors[::2], rcond=1e-6)[0]
    rest, other = errors[1::2] - features[1::2] @ factors, errors[1::2]
    return float(1 - rest.var() / max(other.var(), 1e-300))


def _rough_hint(
    judgements: list[tuple[str, str | None]], relative_errors: np.ndarray, residuals: _Residuals, windows: Windows
) -> str | None:
    """
    :param judgements: verdict and hint of each dimension
    :param relative_errors: after one step, ``(O,)``
    :param residuals: predictions compared with records
    :param windows: recorded windows
    :return: one hint for all dimensions whose verdict is "rough", which may be good enough
    """
    rough = [dim for dim, (verdict, hint) in enumerate(judgements) if verdict.startswith("rough") and hint is None]
    if not rough:
        return None
    worst = max(rough, key=lambda dim: relative_errors[dim])
    cause = "a term or a parameter is off; this can be good enough to train with."
    if _explained_share((residuals.predicted_changes - residuals.changes)[:, worst], windows) < RANDOM_SHARE:
        cause = (
            "observation and action explain hardly any of its error. It may be noise or the effect of something unobserved, "
            "and not a mistake of the model."
        )
    others = f", {len(rough) - 1} others less so" if len(rough) > 1 else ""
    return f"{_name(worst)} is rough ({relative_errors[worst]:.0%} of its change){others}: {cause}"


def _scale_hint(name: str, actual: np.ndarray, predicted: np.ndarray) -> str | None:
    """
    :param name: name of the quantity
    :param actual: recorded values, ``(B,)``
    :param predicted: predicted values, ``(B,)``
    :return: a hint, if the actual values are the predicted ones times a constant
    """
    if np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return None
    factor, _ = _regress(actual, predicted)
    correlation = np.corrcoef(actual, predicted)[0, 1]
    if correlation**2 < 0.95 or 0.8 < factor < 1.25:
        return None
    return f"{name} is {factor:.3g} times what the model predicts: check units, signs and the length of a step."


@th.no_grad()
def _judge_reward(model: PriorModel, windows: Windows) -> tuple[float, float, float, str, str | None]:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :return: RMS error, bias, standard deviation of the actual reward, verdict, and a hint
    """
    states = model.state_from_observation(windows.observations)
    next_states = model.state_from_observation(windows.next_observations[0])
    predicted = to_numpy(model.reward(states, windows.actions[0], next_states))[:, 0]
    actual = to_numpy(windows.rewards[0])[:, 0]
    error, bias, std = float(rms(predicted - actual)), float((predicted - actual).mean()), float(actual.std())

    def judgement(verdict: str, hint: str | None = None) -> tuple[float, float, float, str, str | None]:
        return error, bias, std, verdict, hint

    if error <= max(GOOD_RELATIVE_ERROR * std, float(rounding_errors(actual))):
        return judgement("good")
    if not np.isfinite(error):
        return judgement("not finite", "the reward is not finite: clamp the inputs of roots, logarithms and divisions.")
    if np.ptp(predicted) == 0:
        return judgement("constant", f"the predicted reward is {predicted[0]:.3g} everywhere, the actual one is not.")
    hint = _scale_hint("the reward", actual, predicted)
    if float(rms(actual + predicted)) < 0.5 * error:
        return judgement("wrong sign", "the reward seems to have the opposite sign: a cost is a negative reward.")
    if hint is not None:
        return judgement("wrong scale", hint)
    if bias**2 > 0.5 * error**2:
        return judgement(
            "biased", f"the reward is predicted {bias:+.3g} off on average: a constant term is missing or too much."
        )
    verdict = "worse than a constant" if error >= std else "rough"
    return judgement(verdict, "check the terms of the reward, and whether it is of the state before or after the step.")


@th.no_grad()
def _judge_terminal(model: PriorModel, windows: Windows) -> tuple[tuple[int, int], str | None]:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :return: numbers of missed and of false terminations, and a hint
    """
    predicted = model.terminal(model.state_from_observation(windows.next_observations[0]))
    n_missed = int((windows.terminated & ~predicted).sum())
    n_false = int((predicted & ~windows.terminated).sum())
    if n_missed == n_false == 0:
        return (0, 0), None
    return (n_missed, n_false), (
        f"`terminal` misses {n_missed} of {int(windows.terminated.sum())} recorded terminations and reports {n_false} that "
        "were none: it must be true in the states where the environment returns terminated=True, and nowhere else."
    )
