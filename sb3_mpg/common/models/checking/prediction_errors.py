"""Measures how well a prior model predicts the steps of an environment."""

from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.regression import regress, without_explained
from sb3_mpg.common.models.checking.report import relative
from sb3_mpg.common.models.windows import MIN_WINDOWS, Windows, rms, rollout_errors, rounding_errors, to_numpy

# An action whose gain is below the negative of this has the wrong sign
WRONG_SIGN_GAIN = 0.25
# The model misses an action if it causes at least this share of a dimension's change, and none in the model
MISSED_EFFECT = 0.05
# The same where the model does not move the dimension at all: smaller effects come with the rest of what is missing
MISSED_EFFECT_OF_MANY = 0.5


class Steps(NamedTuple):
    """
    Steps that a model predicts from the records.

    :param inputs: observations and actions, ``(B, O + A)``
    :param changes: actual changes, ``(B, O)``
    :param predicted_changes: predicted changes, ``(B, O)``
    """

    inputs: np.ndarray
    changes: np.ndarray
    predicted_changes: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Errors of the predictions, ``(B, O)``."""
        return self.predicted_changes - self.changes

    def select(self, is_kept: np.ndarray) -> "Steps":
        """
        :param is_kept: which steps, bool ``(B,)``
        :return: these steps
        """
        return Steps(*(values[is_kept] for values in self))


class Residuals(NamedTuple):
    """
    Predictions compared with records.

    :param n_windows: see :class:`PriorModelReport`, ``(H,)``
    :param rms_errors: see :class:`PriorModelReport`, ``(H, O)``
    :param biases: see :class:`PriorModelReport`, ``(H, O)``
    :param rms_changes: see :class:`PriorModelReport`, ``(H, O)``
    :param rounding: smaller errors and changes may be rounding errors, ``(O,)``
    :param steps: the first steps of the windows, ``B`` of them
    :param pairs: first and second steps of windows with two steps, each predicted from its own records
    """

    n_windows: np.ndarray
    rms_errors: np.ndarray
    biases: np.ndarray
    rms_changes: np.ndarray
    rounding: np.ndarray
    steps: Steps
    pairs: tuple[Steps, Steps]

    @property
    def is_moved(self) -> np.ndarray:
        """Whether the model changes a dimension at all, bool ``(O,)``."""
        return rms(self.steps.predicted_changes) > self.rounding

    def relative_errors(self) -> np.ndarray:
        """
        :return: errors divided by the actual changes, with rounding errors counted as zero, ``(H, O)``
        """
        errors = np.where(self.rms_errors <= self.rounding, 0.0, self.rms_errors)
        return relative(errors, np.where(self.rms_changes <= self.rounding, 0.0, self.rms_changes))


def n_better_than_no_change(relative_errors: np.ndarray) -> int:
    """
    :param relative_errors: one for each number of steps, ``(H,)``
    :return: the number of steps before the first relative error of one or more
    """
    is_worse = relative_errors >= 1
    return int(is_worse.argmax()) if is_worse.any() else len(is_worse)


@th.no_grad()
def observation_differences(model: PriorModel, observations: th.Tensor, others: th.Tensor) -> np.ndarray:
    """
    :param model: the model; where its states are the observations, it defines what their difference is
    :param observations: ``(B, O)``
    :param others: ``(B, O)``
    :return: differences, ``(B, O)``
    """
    observations, others = observations.double(), others.double()
    if type(model).observation is PriorModel.observation:
        return to_numpy(model.state_difference(observations, others))
    return to_numpy(observations - others)


@th.no_grad()
def _one_step(model: PriorModel, observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor) -> Steps:
    """
    :param model: the model, in evaluation mode
    :param observations: ``(B, O)``
    :param actions: ``(B, A)``
    :param next_observations: ``(B, O)``
    :return: the steps, predicted from these observations
    """
    predicted = model.observation(model.transition(model.state_from_observation(observations), actions))
    return Steps(
        inputs=to_numpy(th.cat([observations, actions], dim=1)),
        changes=observation_differences(model, next_observations, observations),
        predicted_changes=observation_differences(model, predicted, observations),
    )


def compare_predictions(model: PriorModel, windows: Windows, horizon: int) -> Residuals:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :param horizon: largest number of steps to predict
    :return: predictions compared with records, for as many steps as enough windows are long
    """
    n_windows, rms_errors, biases, rms_changes = [], [], [], []
    for step, rollout in zip(range(horizon), rollout_errors(model, windows), strict=False):
        is_recorded = rollout.is_recorded
        n_recorded = int(is_recorded.sum())
        if step > 0 and n_recorded < MIN_WINDOWS:
            break
        actual = windows.next_observations[step][is_recorded]
        with th.no_grad(), np.errstate(all="ignore"):
            errors = observation_differences(model, model.observation(rollout.states)[is_recorded], actual)
            bias = errors.mean(axis=0)
        n_windows.append(n_recorded)
        rms_errors.append(rms(errors))
        biases.append(np.where(np.isfinite(bias), bias, np.inf))
        rms_changes.append(rms(observation_differences(model, actual, windows.observations[is_recorded])))
    steps = _one_step(model, windows.observations, windows.actions[0], windows.next_observations[0])
    has_two = windows.lengths > 1
    first = second = steps.select(has_two.cpu().numpy())
    if has_two.any():
        later = windows.select(has_two.cpu().numpy())
        second = _one_step(model, later.next_observations[0], later.actions[1], later.next_observations[1])
    return Residuals(
        n_windows=np.array(n_windows),
        rms_errors=np.stack(rms_errors),
        biases=np.stack(biases),
        rms_changes=np.stack(rms_changes),
        rounding=rounding_errors(to_numpy(windows.observations)),
        steps=steps,
        pairs=(first, second),
    )


@th.no_grad()
def action_gains(model: PriorModel, windows: Windows, residuals: Residuals) -> np.ndarray:
    """
    The effect of each action in the environment, divided by its effect in the model. Random actions are independent
    of everything else, so other errors of the model do not bias the result. What observations and other actions explain is
    taken out before, so that these errors do not make it uncertain either.

    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :param residuals: the predictions with the recorded actions
    :return: regression coefficients, ``(A, O)``: infinite where the model does not have the effect, NaN where there is no
        effect or the coefficient is too uncertain
    """
    steps, actions = residuals.steps, windows.actions[0]
    is_moved = residuals.is_moved
    gains = np.full((actions.shape[1], steps.changes.shape[1]), np.nan)
    smallest_effects = np.maximum(1e-3 * residuals.rms_changes[0], residuals.rounding)
    for action_dim in range(actions.shape[1]):
        neutral_actions = actions.clone()
        neutral_actions[:, action_dim] = actions[:, action_dim].mean()
        neutral = _one_step(model, windows.observations, neutral_actions, windows.next_observations[0])
        effects, targets = steps.predicted_changes - neutral.predicted_changes, -neutral.errors
        is_finite = np.isfinite(effects).all(axis=0) & np.isfinite(targets).all(axis=0)
        sizes = rms(effects)
        others = np.delete(steps.inputs, steps.changes.shape[1] + action_dim, axis=1)
        columns = np.concatenate([effects, targets, to_numpy(actions[:, [action_dim]])], axis=1)
        is_known = np.concatenate([is_finite, is_finite, [True]])
        rest, n_factors = without_explained(np.where(is_known, columns, 0.0), others)
        effects, targets, taken = rest[:, : len(sizes)], rest[:, len(sizes) : -1], rest[:, -1]
        for dim in np.flatnonzero(is_finite):
            if sizes[dim] > smallest_effects[dim]:
                gain, standard_error = regress(targets[:, dim], effects[:, dim], n_factors)
                if 4 * standard_error < max(abs(gain), WRONG_SIGN_GAIN):
                    gains[action_dim, dim] = gain
            elif taken.std() > 0:
                slope, standard_error = regress(targets[:, dim], taken, n_factors)
                share = MISSED_EFFECT if is_moved[dim] else MISSED_EFFECT_OF_MANY
                least = max(share * residuals.rms_changes[0, dim], residuals.rounding[dim]) / taken.std()
                if abs(slope) > max(6 * standard_error, least):
                    gains[action_dim, dim] = np.inf
    return gains
