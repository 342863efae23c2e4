"""The trust report: measured errors of gradients and predictions, for the user."""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.trainable import CorrectedModel, TrainableModel, evaluated
from sb3_mpg.common.models.windows import MIN_WINDOWS, Windows, rms, rollout_errors, rounding_errors, to_numpy
from sb3_mpg.common.tables import MAX_SHARE, format_number, format_share, format_table
from sb3_mpg.common.trust.gradient_errors import GradientErrors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Measurement(NamedTuple):
    """
    A measurement at one update.

    :param n_updates: number of the update
    :param gradients: errors of the action gradients of all horizons
    :param weights: the weights that follow from the errors, ``(n_horizons,)``
    :param validation_error: error of the trainable model on held-out steps; NaN while there are none
    """

    n_updates: int
    gradients: GradientErrors
    weights: np.ndarray
    validation_error: float


class PredictionErrors(NamedTuple):
    """
    Errors of open-loop rollouts along recorded actions.

    :param relative: RMS error of each dimension divided by the RMS of its actual change, ``(H, S)``; row ``k - 1`` is for
        ``k`` steps; NaN if the model predicts a change of a dimension that does not change
    :param returns: RMS error of the sum of discounted rewards, in the units of the environment, ``(H,)``
    :param return_spread: standard deviation of the actual sum, ``(H,)``
    """

    relative: np.ndarray
    returns: np.ndarray
    return_spread: np.ndarray

    def together(self) -> np.ndarray:
        """
        :return: RMS over the dimensions of their relative errors, each at most ``MAX_SHARE``, ``(H,)``; NaN where no dimension
            changes
        """
        is_known = ~np.isnan(self.relative)
        squares = np.where(is_known, np.minimum(self.relative, MAX_SHARE) ** 2, 0.0).sum(axis=1)
        return np.sqrt(squares / np.where(is_known.any(axis=1), is_known.sum(axis=1), np.nan))

    def of_returns(self) -> np.ndarray:
        """
        :return: errors of the returns divided by their spread, at most ``MAX_SHARE``, ``(H,)``
        """
        shares = self.returns / np.maximum(self.return_spread, 1e-12)
        return np.minimum(np.nan_to_num(shares, nan=np.inf), MAX_SHARE)

    def format_return(self, step: int) -> str:
        """
        :param step: number of steps, from 1
        :return: the error of the return and its spread as text
        """
        error, spread = self.returns[step - 1], self.return_spread[step - 1]
        if spread > 0 and MAX_SHARE * spread < error < np.inf:
            return f"> {MAX_SHARE * spread:.3g} of {spread:.3g}"
        return f"{format_number(error)} of {format_number(spread)}"


@th.no_grad()
def prediction_errors(model: PriorModel, windows: Windows, gamma: float) -> PredictionErrors:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded trajectory segments
    :param gamma: discount factor of the returns
    :return: the errors, up to the number of steps for which there are at least ``MIN_WINDOWS`` segments
    """
    start = model.state_from_observation(windows.observations)
    rounding = rounding_errors(np.nan_to_num(to_numpy(start)))
    predicted_returns = th.zeros_like(windows.rewards[0])
    actual_returns = th.zeros_like(predicted_returns)
    relative, returns, spread = [], [], []
    is_counted = th.isfinite(start).all(dim=1)
    for step, rollout in enumerate(rollout_errors(model, windows)):
        predicted_returns = predicted_returns + gamma**step * rollout.rewards
        actual_returns = actual_returns + gamma**step * rollout.actual_rewards
        is_counted = is_counted & rollout.is_recorded
        is_counted &= th.isfinite(rollout.actual_states).all(dim=1) & th.isfinite(actual_returns).squeeze(1)
        if int(is_counted.sum()) < MIN_WINDOWS:
            break
        errors = rms(to_numpy(rollout.errors[is_counted]))
        changes = rms(to_numpy(model.state_difference(rollout.actual_states, start)[is_counted]))
        with np.errstate(divide="ignore", invalid="ignore"):
            relative.append(np.where(errors == 0, 0.0, np.where(changes <= rounding, np.nan, errors / changes)))
        returns.append(float(rms(to_numpy((predicted_returns - actual_returns)[is_counted]))[0]))
        spread.append(float(actual_returns[is_counted].double().std()))
    return PredictionErrors(np.array(relative), np.array(returns), np.array(spread))


def _name_of_horizon(horizon: int) -> str:
    return "data-driven" if horizon == 0 else f"{horizon} model steps"


def remark_on(measurement: Measurement, index: int) -> str:
    """
    :param measurement: a measurement
    :param index: of a horizon
    :return: what is remarkable about this horizon, in a few words; the first reason to leave it out comes first
    """
    gradients = measurement.gradients
    if gradients.is_excluded[index] and gradients.misjudges_ends:
        return "excluded: wrong terminations"
    if gradients.variation is not None and gradients.is_blind[index]:
        if gradients.variation.is_silent[index]:
            return "silent: its derivative is zero" + ", but returns vary" * bool(gradients.variation.varies[index])
        return f"discontinuous: its derivative explains {gradients.variation.explained[index]:.0%} of how returns vary"
    if gradients.is_excluded[index]:
        return "excluded: useless gradient"
    return "<- trusted most" if index == int(np.argmax(measurement.weights)) else ""


def _drawn_errors(measurements: Sequence[Measurement], index: int) -> np.ndarray:
    """
    :param measurements: ``N`` of them
    :param index: of a horizon
    :return: errors of the gradient of the horizon, at most ``MAX_SHARE`` times the norm of the gradient; NaN where there is
        nothing to draw on a logarithmic axis, ``(N,)``
    """
    errors = np.sqrt([float(measurement.gradients.errors[index]) for measurement in measurements])
    norms = np.sqrt([float(measurement.gradients.gradient_norm) for measurement in measurements])
    errors = np.where(norms > 0, np.minimum(errors, MAX_SHARE * norms), errors)
    return np.where(np.isfinite(errors) & (errors > 0), errors, np.nan)


@dataclass(frozen=True)
class TrustReport:
    """
    How far a prior model can be trusted, as measured during training. Print it for a table, or call :meth:`plot`.

    :param horizons: numbers of model steps
    :param measurements: the errors of the gradients and the weights, in the order of the updates
    :param prior: prediction errors of the prior model, or of a model that is learned as a whole
    :param corrected: prediction errors of the corrected model, ``None`` if the rollouts use the prior model
    :param dimensions: names of the dimensions of the state; errors of hidden ones are differences to encoded observations
    :param re_encoded: names of the dimensions that the corrected model re-encodes in each step, see ``HiddenStates``
    :param is_learned: whether the model is learned as a whole
    """

    horizons: tuple[int, ...]
    measurements: list[Measurement]
    prior: PredictionErrors
    corrected: PredictionErrors | None
    dimensions: tuple[str, ...]
    re_encoded: tuple[str, ...] = ()
    is_learned: bool = False

    def _models(self) -> dict[str, PredictionErrors]:
        models = {"learned model" if self.is_learned else "prior model": self.prior}
        return models if self.corrected is None else {**models, "corrected model": self.corrected}

    def __str__(self) -> str:
        lines = []
        if not self.measurements:
            lines.append("The errors of gradients were not measured yet.")
        else:
            latest = self.measurements[-1]
            norm = float(np.sqrt(latest.gradients.gradient_norm))
            rows = [["horizon", "error of gradient", "of gradient", "weight", ""]]
            for index, horizon in enumerate(self.horizons):
                error = float(np.sqrt(latest.gradients.errors[index]))
                share = format_share(error / norm, digits=0) if norm > 0 else "no gradient"
                weight = f"{latest.weights[index]:.1%}"
                rows.append([_name_of_horizon(horizon), format_number(error), share, weight, remark_on(latest, index)])
            lines += [
                f"Errors of the action gradients after {latest.n_updates} updates (medians over states)",
                *format_table(rows),
            ]
            lines.append("of gradient: in units of the norm of the best gradient of a model.")
            if norm == 0:
                lines.append("no gradient: that norm is zero, as where actions have no effect, or where all rewards jump.")
        for name, errors in self._models().items():
            n_steps = len(errors.returns)
            steps = sorted({step for step in (1, 5, 10, 25, n_steps) if step <= n_steps})
            rows = [["dimension", *[f"{step} step{'s' * (step > 1)}" for step in steps], ""]]
            for index, dimension in enumerate(self.dimensions):
                remark = ", re-encoded" if errors is self.corrected and dimension in self.re_encoded else ""
                shares = [errors.relative[step - 1, index] for step in steps]
                cells = ["constant" if np.isnan(share) else format_share(share) for share in shares]
                rows.append([f"{dimension}{remark}", *cells, ""])
            rows.append(["return", *[errors.format_return(step) for step in steps], ""])
            lines += [
                "",
                f"Errors of the {name} along recorded actions (RMS, in units of the actual change)",
                *format_table(rows),
            ]
        lines.append("return: RMS error of the discounted sum of rewards, and the standard deviation of that sum.")
        return "\n".join(lines)

    def plot(self, path: str | pathlib.Path | None = None) -> "Figure":
        """
        Plot the prediction errors over the number of steps (left), and the errors of the gradients (middle) and the weights
        (right) over the updates.

        :param path: where to save the figure; ``None`` does not save it
        :return: the figure
        :raises ModuleNotFoundError: when matplotlib is not installed
        """
        # matplotlib is an optional dependency
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}; pictures need matplotlib: pip install 'sb3-mpg[plots]'") from error

        figure = Figure(figsize=(13, 4), layout="constrained")
        predictions, gradients, weights = figure.subplots(1, 3)
        for name, errors in self._models().items():
            steps = np.arange(1, len(errors.returns) + 1)
            predictions.plot(steps, errors.together(), label=f"{name}: state")
            color = predictions.lines[-1].get_color()
            predictions.plot(steps, errors.of_returns(), "--", color=color, label=f"{name}: return")
        predictions.axhline(1.0, color="grey", linewidth=0.8)
        predictions.set(
            yscale="log",
            xlabel="model steps",
            ylabel=f"RMS error / actual change, at most {MAX_SHARE:.0f}",
            title="Predictions (below 1 is useful)",
        )
        predictions.legend()
        n_updates = [measurement.n_updates for measurement in self.measurements]
        for index, horizon in enumerate(self.horizons):
            label = _name_of_horizon(horizon)
            gradients.plot(n_updates, _drawn_errors(self.measurements, index), label=label)
            weights.plot(n_updates, [measurement.weights[index] for measurement in self.measurements], label=label)
        gradients.set(yscale="log", xlabel="updates", ylabel="error of the action gradient", title="Errors of the gradients")
        weights.set(ylim=(-0.02, 1.02), xlabel="updates", ylabel="weight", title="Weights that followed")
        if self.measurements:
            gradients.legend()
            weights.legend(loc="center right")
        for axes in () if self.measurements else (gradients, weights):
            axes.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=axes.transAxes)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def make_trust_report(
    model: PriorModel,
    is_corrected: bool,
    windows: Windows,
    gamma: float,
    horizons: tuple[int, ...],
    measurements: Sequence[Measurement],
    names_of_observations: Sequence[str],
) -> TrustReport:
    """
    :param model: the model of the rollouts
    :param is_corrected: whether its correction is used, if it has one
    :param windows: recorded trajectory segments
    :param gamma: discount factor of the returns
    :param horizons: numbers of model steps
    :param measurements: measurements during training
    :param names_of_observations: names of the elements of an observation, ``O``
    :return: the report
    """
    prior = model.prior if isinstance(model, CorrectedModel) else model
    with evaluated(model):
        n_states = prior.state_from_observation(windows.observations[:1]).shape[1]
        is_hidden, is_re_encoded = np.zeros(n_states, dtype=bool), np.zeros(n_states, dtype=bool)
        if isinstance(model, CorrectedModel):
            is_hidden, is_re_encoded = model.describe_states()
        shows_states = type(prior).observation is PriorModel.observation
        names = list(names_of_observations) if shows_states else [f"state[{dim}]" for dim in range(n_states)]
        names = [f"{name}, hidden" if is_hidden[dim] else name for dim, name in enumerate(names)]
        return TrustReport(
            horizons=horizons,
            measurements=list(measurements),
            prior=prediction_errors(prior, windows, gamma),
            corrected=prediction_errors(model, windows, gamma) if prior is not model and is_corrected else None,
            dimensions=tuple(names),
            re_encoded=tuple(name for name, is_again in zip(names, is_re_encoded, strict=True) if is_again),
            is_learned=isinstance(model, TrainableModel) and not isinstance(model, CorrectedModel),
        )
