"""Errors of a dimension that come from another one: through the integration scheme, or because the other one is wrong."""

from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.prediction_errors import Residuals, observation_differences
from sb3_mpg.common.models.checking.regression import without_explained
from sb3_mpg.common.models.windows import Windows, rms, to_numpy

# Dimensions with smaller errors, as shares of their changes, are not looked at
SMALL_ERROR = 0.1
# Errors follow from others that explain this share of them; another scheme explains this share
COUPLED_SHARE = 0.9
SCHEME_SHARE = 0.8
# Another scheme moves by a part of the change of the source that differs by this much
OTHER_SCHEME = 0.15
# Parts of schemes are within these limits, but for the uncertainty of the fit
PARTS = (-0.2, 1.3)
# On the way to the next step, an error of the source acts as if this much of it were there all the time
FOLLOWING = (0.3, 2.5)
# Actions move a source if they cause this share of its change
MOVED_SHARE = 0.05
# States with more dimensions cost too much to look at
MAX_STATES = 100


class Coupling(NamedTuple):
    """
    What the errors of a dimension come from. A step moves it by its slope times the old value of the source, plus a part of
    the change of the source: 0 is the explicit scheme of Euler, 1 the semi-implicit one, which takes the new value.

    :param source: dimension of the state
    :param of_model: the part in the model
    :param of_env: the part in the environment; NaN if it is the same, and the errors follow from those of the source
    """

    source: int
    of_model: float
    of_env: float

    @property
    def is_scheme(self) -> bool:
        """Whether model and environment differ in the integration scheme."""
        return not np.isnan(self.of_env)


class _Responses(NamedTuple):
    """
    Steps of the model and of the environment from the same states.

    :param changes: actual changes of the states, ``(B, S)``
    :param predicted_changes: predicted ones, ``(B, S)``
    :param effects: what the actions change in the predicted states, compared with mean actions, ``(B, S)``
    :param effects_on_observations: the same for the predicted observations, ``(B, O)``
    """

    changes: np.ndarray
    predicted_changes: np.ndarray
    effects: np.ndarray
    effects_on_observations: np.ndarray


@th.no_grad()
def _responses(model: PriorModel, windows: Windows, states: th.Tensor) -> _Responses:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :param states: of their first observations, ``(B, S)``
    :return: the steps
    """
    actions = windows.actions[0]
    predicted, neutral = (model.transition(states, part) for part in (actions, actions.mean(0).expand_as(actions)))
    return _Responses(
        changes=to_numpy(model.state_difference(model.state_from_observation(windows.next_observations[0]), states)),
        predicted_changes=to_numpy(model.state_difference(predicted, states)),
        effects=to_numpy(model.state_difference(predicted, neutral)),
        effects_on_observations=observation_differences(model, model.observation(predicted), model.observation(neutral)),
    )


@th.no_grad()
def _slopes(model: PriorModel, states: th.Tensor, actions: th.Tensor, source: int, size: float) -> np.ndarray:
    """
    :param model: the model, in evaluation mode
    :param states: ``(B, S)``
    :param actions: ``(B, A)``
    :param source: dimension of the state
    :param size: of the differences
    :return: derivatives of the predicted observations with respect to the source, ``(B, O)``
    """
    shift = th.zeros_like(states)
    shift[:, source] = size
    higher, lower = (model.observation(model.transition(states + part, actions)) for part in (shift, -shift))
    return observation_differences(model, higher, lower) / (2 * size)


@th.no_grad()
def _shown_states(model: PriorModel, observations: th.Tensor, dim: int) -> np.ndarray:
    """
    :param model: the model, in evaluation mode
    :param observations: ``(B, O)``
    :param dim: a dimension of the observations
    :return: which dimensions of the state this one shows, bool ``(S,)``
    """
    moved = observations.clone()
    moved[:, dim] = moved[:, dim].roll(1)
    states, others = (model.state_from_observation(part) for part in (observations, moved))
    return (states != others).any(dim=0).cpu().numpy()


def _fit(targets: np.ndarray, inputs: np.ndarray) -> tuple[float, float]:
    """
    :param targets: ``(B,)``
    :param inputs: ``(B,)``, not all zero
    :return: the factor of the inputs, without a constant, and the RMS of what is left of the targets
    """
    factor = float(inputs @ targets / (inputs @ inputs))
    return factor, float(rms(targets - factor * inputs))


def _share(rest: float, targets: np.ndarray) -> float:
    """
    :param rest: RMS of what is left of the targets
    :param targets: ``(B,)``
    :return: the share that is explained
    """
    return 1 - (rest / max(float(rms(targets)), 1e-300)) ** 2


def find_couplings(model: PriorModel, windows: Windows, residuals: Residuals) -> dict[int, Coupling]:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :param residuals: its predictions
    :return: couplings that explain the errors of dimensions of the observation, by dimension
    """
    is_wrong = (residuals.relative_errors()[0] >= SMALL_ERROR) & residuals.is_moved
    is_wrong &= np.isfinite(residuals.steps.errors).all(axis=0)
    states, actions = model.state_from_observation(windows.observations), windows.actions[0]
    if not is_wrong.any() or states.shape[1] > MAX_STATES:
        return {}
    responses = _responses(model, windows, states)
    found: dict[int, tuple[float, Coupling]] = {}
    shown = {dim: _shown_states(model, windows.observations, dim) for dim in np.flatnonzero(is_wrong).tolist()}
    observations = to_numpy(windows.observations)
    for source in range(states.shape[1]):
        size = float(rms(responses.changes[:, source]))
        if not 0 < size < np.inf or not np.isfinite(responses.predicted_changes[:, source]).all():
            continue
        slopes = _slopes(model, states, actions, source, size)
        for dim in np.flatnonzero(is_wrong & np.isfinite(slopes).all(axis=0) & slopes.any(axis=0)).tolist():
            if shown[dim][source]:
                continue
            coupled = _judge_coupling(residuals.steps.errors[:, dim], slopes[:, dim], responses, source, dim, observations)
            if coupled is not None and coupled[0] > found.get(dim, (0.0,))[0]:
                found[dim] = coupled
    return {dim: coupling for dim, (_, coupling) in found.items()}


def _judge_coupling(
    errors: np.ndarray, slopes: np.ndarray, responses: _Responses, source: int, dim: int, observations: np.ndarray
) -> tuple[float, Coupling] | None:
    """
    :param errors: of a dimension, ``(B,)``
    :param slopes: derivatives of its prediction with respect to the source, ``(B,)``
    :param responses: steps of the model and of the environment
    :param source: dimension of the state
    :param dim: the dimension of the observation
    :param observations: ``(B, O)``
    :return: the share of the errors that the source explains, and how; ``None`` if it does not
    """
    changes, predicted_changes, effects = (part[:, source] for part in responses[:3])
    of_effects = slopes * effects
    if rms(effects) > MOVED_SHARE * rms(predicted_changes) and of_effects.any():
        effects_on_dim = responses.effects_on_observations[:, dim]
        of_model, rest = _fit(effects_on_dim, of_effects)
        if rest <= 0.2 * max(rms(effects_on_dim), 0.2 * rms(of_effects)) and PARTS[0] < of_model < PARTS[1]:
            # What the environment does beside the part of the model; actions are independent of all other mistakes
            targets, of_changes = of_model * slopes * predicted_changes - errors, slopes * changes
            of_actions = without_explained(np.stack([targets, of_changes], axis=1), observations)[0]
            of_env = _fit(*of_actions.T)[0]
            # Of all errors: a wrong slope looks like another scheme to actions
            share = _share(float(rms(targets - of_env * of_changes)), errors)
            is_other = PARTS[0] < of_env < PARTS[1] and abs(of_env - of_model) > OTHER_SCHEME
            if is_other and share > SCHEME_SHARE:
                return share, Coupling(source, of_model, of_env)
    following = slopes * (predicted_changes - changes) / 2
    if not following.any():
        return None
    factor, rest = _fit(errors, following)
    share = _share(rest, errors)
    follows = share > COUPLED_SHARE and FOLLOWING[0] < factor < FOLLOWING[1]
    return (share, Coupling(source, factor / 2, np.nan)) if follows else None
