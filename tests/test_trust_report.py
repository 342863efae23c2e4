"""The report of how far the model can be trusted."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import settings
import torch as th
from goals import GoalEnv, GoalModel
from gymnasium import spaces
from lq import LinearEnv
from models import Wrong

from sb3_mpg import MPG, PriorModel, check_prior_model
from sb3_mpg.common.trust.gradient_errors import GradientErrors
from sb3_mpg.common.trust.report import Measurement, PredictionErrors, TrustReport, remark_on
from sb3_mpg.common.trust.variation import Variation

SMALL = {**settings.SMALL, "learning_starts": 100, "batch_size": 64, "buffer_size": 5000}


def test_the_report_says_which_horizon_is_excluded():
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Wrong(), residual=False, horizons=(0, 10), **SMALL)
    with pytest.warns(UserWarning, match="Wrong is excluded"):
        model.learn(250)
    assert model.trust.measurements[-1].gradients.is_useless.tolist() == [False, True]
    rows = [line for line in str(model.trust_report()).splitlines() if "excluded: useless gradient" in line]
    assert len(rows) == 1
    assert "10 model steps" in rows[0]


def test_trust_report(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Wrong(), horizons=(0, 10), **SMALL)
    with pytest.raises(ValueError, match="Nothing is recorded"):
        model.trust_report()
    model.learn(300)
    report = model.trust_report()
    assert len(report.measurements) == 10
    assert [measurement.n_updates for measurement in report.measurements] == list(range(1, 200, 20))
    assert report.corrected.relative.shape == report.prior.relative.shape
    # The correction has learned the sign of the effect of actions
    assert report.corrected.relative[0, 1] < 0.3 * report.prior.relative[0, 1]
    text = str(report)
    for words in ("data-driven", "10 model steps", "trusted most", "prior model", "corrected model", "return"):
        assert words in text
    report.plot(tmp_path / "trust.png")
    assert (tmp_path / "trust.png").stat().st_size > 10_000
    # It is saved with the algorithm
    model.save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv())
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert str(loaded.trust_report()) == text
    with pytest.raises(ValueError, match="no model to report on"):
        MPG("MlpPolicy", LinearEnv(), horizons=(0,), weighting="constant", **SMALL).trust_report()


def test_a_report_before_the_first_update(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 10), **SMALL).learn(90)
    report = model.trust_report()
    assert report.corrected is None and not report.measurements
    assert "not measured yet" in str(report) and "corrected" not in str(report)
    figure = report.plot(tmp_path / "trust.png")
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["not measured yet"] * 2


class Constant(gym.ObservationWrapper):
    """A third element that never changes."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def observation(self, observation):
        return np.append(observation, 5.0).astype(np.float32)


class Drifts(PriorModel):
    """The model of ``LinearEnv``, in which the third element changes."""

    def __init__(self):
        super().__init__()
        self.right = LinearEnv().prior_model()

    def transition(self, states, actions):
        return th.cat([self.right.transition(states[:, :2], actions), 0.999 * states[:, 2:]], dim=1)

    def reward(self, states, actions, next_states):
        return self.right.reward(states[:, :2], actions, next_states[:, :2])


def test_a_dimension_that_never_changes_has_no_relative_error(tmp_path):
    model = MPG("MlpPolicy", Constant(LinearEnv()), prior_model=Drifts(), horizons=(0, 10), **SMALL).learn(120)
    report = model.trust_report()
    assert np.isnan(report.prior.relative[:, 2]).all() and np.isfinite(report.prior.relative[:, :2]).all()
    (row,) = [line for line in str(report).split("corrected model")[0].splitlines() if line.startswith("observation[2]")]
    assert row.split()[1:] == ["constant"] * 3
    line = report.plot(tmp_path / "trust.png").axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(line, np.sqrt((report.prior.relative[:, :2] ** 2).mean(axis=1)))


def test_errors_of_the_exact_model_are_those_of_rounding():
    model = MPG("MlpPolicy", LinearEnv(), residual=False, horizons=(0, 5), **SMALL).learn(150)
    report = model.trust_report()
    assert report.corrected is None
    assert report.prior.relative.max() < 1e-3
    assert (report.prior.returns < 1e-4 * report.prior.return_spread).all()
    assert (report.prior.return_spread > 0).all()


def test_dimensions_have_the_names_of_the_checker():
    """Those of the keys, where the states of the model are the observations."""
    model = MPG("MultiInputPolicy", GoalEnv(), **{**SMALL, "horizons": (0, 2)}).learn(60)
    names = ("achieved_goal[0]", "desired_goal[0]", "observation[0]", "observation[1]")
    assert model.trust_report().dimensions == names == check_prior_model(GoalModel(), GoalEnv(), verbose=False).dimensions


def synthetic_report(
    errors=(1.0, 0.01), norm=1.0, relative=((0.5, np.nan),), returns=(1.0,), spread=(2.0,), weights=(0.2, 0.8)
):
    """A report of the horizons 0 and 5 with given numbers."""
    gradients = GradientErrors((0, 5), np.array(errors), np.zeros(2), norm, np.zeros(2, dtype=bool))
    prior = PredictionErrors(np.array(relative), np.array(returns), np.array(spread))
    return TrustReport((0, 5), [Measurement(1, gradients, np.array(weights), np.nan)], prior, None, ("x", "y"))


def cells_of(report, name):
    """The cells of the first row of a table with this name, which two spaces separate."""
    line = next(line for line in str(report).splitlines() if line.startswith(name))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


class TestNumbersThatSayNothing:
    """What is beyond ten times the change, or the gradient, is useless however large it is."""

    def test_a_model_without_gradient(self):
        report = synthetic_report(errors=(1.6, 0.0), norm=0.0)
        assert cells_of(report, "data-driven")[1:3] == ["1.26", "no gradient"]
        assert cells_of(report, "5 model steps")[1:3] == ["0", "no gradient"]
        assert "no gradient: that norm is zero" in str(report)
        assert "that norm is zero" not in str(synthetic_report())

    @pytest.mark.parametrize(
        ("squared_error", "text"), [(0.25, "50%"), (81.0, "900%"), (1e40, "> 1000%"), (np.inf, "not finite"), (0.0, "0%")]
    )
    def test_errors_of_gradients(self, squared_error, text):
        report = synthetic_report(errors=(1.0, squared_error))
        assert cells_of(report, "5 model steps")[2] == text

    def test_errors_of_predictions(self):
        relative = [[0.123, 4e17], [np.inf, np.nan]]
        report = synthetic_report(relative=relative, returns=[1e9, np.inf], spread=[2.0, 3.0])
        assert cells_of(report, "x") == ["x", "12.3%", "not finite"]
        assert cells_of(report, "y") == ["y", "> 1000%", "constant"]
        assert cells_of(report, "return") == ["return", "> 20 of 2", "not finite of 3"]

    def test_the_figure_is_limited_too(self, tmp_path):
        relative = [[0.3, 0.4], [1e20, np.nan], [np.inf, 1.0], [np.nan, np.nan]]
        report = synthetic_report(
            errors=(1e40, 0.0), relative=relative, returns=[1.0, 1e30, np.inf, 0.0], spread=[2.0, 2.0, 2.0, 0.0]
        )
        predictions, gradients, _ = report.plot(tmp_path / "trust.png").axes
        state, of_return = (line.get_ydata() for line in predictions.lines[:2])
        np.testing.assert_allclose(state, [np.sqrt(0.125), 10.0, np.sqrt(50.5), np.nan])
        np.testing.assert_allclose(of_return, [0.5, 10.0, 10.0, 0.0])
        np.testing.assert_allclose([line.get_ydata() for line in gradients.lines], [[10.0], [np.nan]])

    def test_no_gradient_at_all_can_be_drawn(self, tmp_path):
        synthetic_report(errors=(np.inf, 0.0), norm=0.0, relative=[[np.nan, np.nan]]).plot(tmp_path / "trust.png")


def test_remarks():
    report = synthetic_report()
    (measurement,) = report.measurements
    assert [remark_on(measurement, index) for index in (0, 1)] == ["", "<- trusted most"]
    useless = measurement._replace(gradients=measurement.gradients._replace(is_useless=np.array([False, True])))
    assert remark_on(useless, 1) == "excluded: useless gradient"
    ends = measurement._replace(gradients=useless.gradients._replace(trust_in_ends=0.0))
    assert remark_on(ends, 1) == "excluded: wrong terminations" and remark_on(ends, 0) == ""


@pytest.mark.parametrize(
    ("explained", "is_silent", "varies", "remark"),
    [
        (0.0, True, True, "silent: its derivative is zero, but returns vary"),
        (0.0, True, False, "silent: its derivative is zero"),
        (0.032, False, True, "discontinuous: its derivative explains 3% of how returns vary"),
        (0.9, False, True, "<- trusted most"),
    ],
)
def test_remarks_on_blind_derivatives(explained, is_silent, varies, remark):
    """An error of zero never stands without its reason."""
    (measurement,) = synthetic_report(errors=(1.0, 0.0)).measurements
    variation = Variation(np.array([1.0, explained]), np.array([False, is_silent]), np.array([True, varies]))
    blind = measurement._replace(gradients=measurement.gradients._replace(variation=variation))
    assert remark_on(blind, 1) == remark and remark_on(blind, 0) == ""
    report = dataclasses.replace(synthetic_report(), measurements=[blind])
    assert cells_of(report, "5 model steps")[2:] == ["0%", "80.0%", remark]
    # Wrong terminations come first
    wrong = blind._replace(gradients=blind.gradients._replace(trust_in_ends=0.0))
    assert remark_on(wrong, 1) == "excluded: wrong terminations"


def test_a_rollout_that_overflows_is_not_called_discontinuous():
    (measurement,) = synthetic_report(errors=(1.0, np.inf), weights=(1.0, 0.0)).measurements
    variation = Variation(np.array([1.0, 0.0]), np.array([False, False]), np.array([True, True]))
    overflows = measurement._replace(gradients=measurement.gradients._replace(variation=variation))
    assert remark_on(overflows, 1) == ""
