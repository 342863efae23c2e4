"""Measured errors of the action gradients, the weights that follow from them, and the report."""

import warnings
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import settings
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from lq import LIMIT, LinearActor, LinearEnv, LinearModel, analytic_gradient, quadratic_q, random_problem
from recorded import filled_buffer
from stable_baselines3.common.logger import configure

from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.trust.gradient_errors import MATTERING_ENDS, action_gradients, gradient_errors, misjudges_ends
from sb3_mpg.common.units import Units
from sb3_mpg.common.trust.weighting import MeasuredWeighting
from sb3_mpg.mpg import mpg

IDENTITY = Units()
SMALL = {**settings.SMALL, "learning_starts": 100, "batch_size": 64, "buffer_size": 5000}


def test_action_gradients_are_the_analytic_ones():
    a, b, q, r, k, _ = random_problem()
    rng = np.random.default_rng(1)
    critics = [tuple(rng.normal(size=shape) for shape in ((3, 3), (3, 2), (2, 2))) for _ in range(2)]
    critics = [(p_ss + p_ss.T, p_sa, p_aa + p_aa.T) for p_ss, p_sa, p_aa in critics]
    states = rng.normal(size=(4, 3))
    gradients = action_gradients(
        th.as_tensor(states),
        LinearActor(th.as_tensor(k)),
        [quadratic_q(*(th.as_tensor(matrix) for matrix in critic)) for critic in critics],
        LinearModel(*(th.as_tensor(matrix) for matrix in (a, b, q, r))),
        IDENTITY,
        (0, 1, 7),
        0.95,
    )
    assert gradients.shape == (3, 2, 4, 2)
    for index, horizon in enumerate((0, 1, 7)):
        for member, critic in enumerate(critics):
            for row, state in enumerate(states):
                # dJ/dK = dX/da s', so that dX/da follows from it
                expected = analytic_gradient(state, a, b, q, r, k, critic, horizon, 0.95) @ state / (state @ state)
                np.testing.assert_allclose(gradients[index, member, row], expected, rtol=1e-9, atol=1e-9)


def synthetic(critic_std=0.0, critic_bias=0.0, model_std=0.0, n_states=4000, seed=0):
    """Two estimates each of a gradient (2, -1): critics with a common bias and noise of their own, models with noise."""
    rng = np.random.default_rng(seed)
    gradients = np.tile(np.array([2.0, -1.0]), (2, 2, n_states, 1))
    gradients[0] += critic_std * rng.standard_normal((2, n_states, 2)) + critic_bias * rng.standard_normal((1, n_states, 2))
    gradients[1] += model_std * rng.standard_normal((2, n_states, 2))
    return gradients


def test_independent_errors():
    """Of N(0, std) in two dimensions: the median of |d|^2 / 2 of two estimates is that of chi^2_2 = 2 ln 2, times std^2."""
    measured = gradient_errors(synthetic(critic_std=0.5, model_std=0.1), (0, 25))
    np.testing.assert_allclose(measured.errors, 2 * np.log(2) * np.array([0.25, 0.01]), rtol=0.1)
    assert abs(measured.errors[1] - 2 * np.log(2) * 0.01) < 4 * measured.standard_errors[1]
    assert (measured.standard_errors < 0.1 * measured.errors).all()
    assert measured.gradient_norm == pytest.approx(5.0, rel=0.05)


def test_errors_that_the_critics_share_are_seen_by_the_model():
    measured = gradient_errors(synthetic(critic_bias=0.5, critic_std=0.01, model_std=0.05), (0, 25))
    assert measured.errors[0] == pytest.approx(2 * np.log(2) * 0.25, rel=0.15)
    assert measured.errors[0] > 20 * measured.errors[1]


def test_a_judge_sees_the_whole_error_of_what_it_judges():
    gradients = synthetic(critic_bias=0.3, critic_std=0.01, model_std=0.01)
    gradients[1, 0] += np.array([0.6, 0.8])
    measured = gradient_errors(gradients, (0, 25), with_judge=True)
    assert measured.errors[1] == pytest.approx(1.0, rel=0.05)
    assert measured.errors[0] == pytest.approx(2 * np.log(2) * 0.09, rel=0.15)


def test_a_judged_model_is_useless_when_its_gradient_is_nearly_the_opposite():
    def is_useless(offset, with_judge=True):
        gradients = synthetic(critic_std=0.05, model_std=0.05)
        gradients[1, 0] += np.array(offset)
        return gradient_errors(gradients, (0, 25), with_judge=with_judge).is_useless.tolist()

    assert is_useless((-4.0, 2.0)) == [False, True]
    assert is_useless((-3.0, 1.5)) == [False, False]
    # Of several members none is better than the others
    assert is_useless((-4.0, 2.0), with_judge=False) == [False, False]
    # At an optimum the gradient vanishes, and the errors of prior model and judge are all that there is
    gradients = synthetic(critic_std=0.5, model_std=0.1) - np.array([2.0, -1.0])
    assert gradient_errors(gradients, (0, 25), with_judge=True).is_useless.tolist() == [False, False]


def test_a_judged_model_is_useless_when_it_says_nothing():
    gradients = synthetic(critic_std=0.05, model_std=0.05)
    gradients[1, 0] *= 0.2
    assert gradient_errors(gradients, (0, 25), with_judge=True).is_useless.tolist() == [False, False]
    gradients[1, 0] *= 0.4
    assert gradient_errors(gradients, (0, 25), with_judge=True).is_useless.tolist() == [False, True]
    assert gradient_errors(gradients, (0, 25)).is_useless.tolist() == [False, False]


def test_a_few_rollouts_that_explode_decide_nothing():
    gradients = synthetic(critic_std=0.5, model_std=0.1)
    expected = gradient_errors(gradients, (0, 25)).errors
    gradients[1, 0, ::7] = 1e20
    gradients[1, 1, 3::50] = np.nan
    np.testing.assert_allclose(gradient_errors(gradients, (0, 25)).errors, expected, rtol=0.5)
    gradients[1] = np.inf
    assert gradient_errors(gradients, (0, 25)).errors[1] == np.inf


def test_measured_weights():
    rule = MeasuredWeighting((0, 5, 25), window=2)
    assert rule.needs_errors
    np.testing.assert_allclose(rule.weights(1), [1 / 3] * 3)
    rule.observe(np.array([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(rule.weights(2), np.array([4, 2, 1]) / 7)
    rule.observe(np.array([3.0, 2.0, np.inf]))
    np.testing.assert_allclose(rule.weights(3), [0.5, 0.5, 0.0], atol=1e-20)
    for _ in range(2):
        rule.observe(np.array([1.0, 0.0, np.nan]))
    np.testing.assert_allclose(rule.weights(4), [0.0, 1.0, 0.0], atol=1e-20)
    with pytest.raises(ValueError, match="at least 1"):
        MeasuredWeighting((0, 5), window=0)


class Wrong(PriorModel):
    """LinearEnv's model, but actions act five times as strongly and to the wrong side."""

    def __init__(self):
        super().__init__()
        self.right = LinearEnv().prior_model()

    def transition(self, states, actions):
        return self.right.transition(states, -5 * actions)

    def reward(self, states, actions, next_states):
        return self.right.reward(states, actions, next_states)


class Silent(PriorModel):
    """Nothing changes, and nothing is gained."""

    def transition(self, states, actions):
        return states + 0.0 * actions

    def reward(self, states, actions, next_states):
        return 0.0 * actions


def weight_of_model(**kwargs):
    """Its mean over the second half of the measurements: a single one is noisy."""
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 10), **SMALL, **kwargs).learn(300)
    measurements = model._measurements
    return np.mean([measurement.weights[1] for measurement in measurements[len(measurements) // 2 :]])


def test_a_right_model_is_trusted():
    assert weight_of_model(residual=False) > 0.9
    assert weight_of_model() > 0.9


@pytest.mark.parametrize("prior_model", [Wrong, Silent])
def test_a_model_that_is_of_no_use_is_trusted_once_it_is_corrected(prior_model):
    with pytest.warns(UserWarning, match=f"{prior_model.__name__} is excluded"):
        assert weight_of_model(prior_model=prior_model, residual=False) < 1e-6
    assert weight_of_model(prior_model=prior_model) > 0.9


def test_the_model_of_another_environment_is_measured_at_once():
    model = MPG("MlpPolicy", LinearEnv(), residual=False, horizons=(0, 10), **SMALL).learn(123)
    assert model._n_updates == 23
    model.prior_model = Wrong()
    with pytest.warns(UserWarning, match="learned of another model is forgotten"):
        model.set_env(LinearEnv())
    assert not model._measurements
    model.learn(5, reset_num_timesteps=False)
    (measurement,) = model._measurements
    assert measurement.n_updates == 24 and measurement.weights[1] < 0.1


def test_the_report_says_which_horizon_was_left_out():
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Wrong(), residual=False, horizons=(0, 10), **SMALL)
    with pytest.warns(UserWarning, match="Wrong is excluded"):
        model.learn(200)
    assert model._measurements[-1].gradients.is_useless.tolist() == [False, True]
    rows = [line for line in str(model.trust_report()).splitlines() if "excluded: useless gradient" in line]
    assert len(rows) == 1
    assert "10 model steps" in rows[0]


class Ends(PriorModel):
    """LinearEnv's model, which takes all states beyond a limit for terminal."""

    def __init__(self, limit: float):
        super().__init__()
        self.right = LinearEnv().prior_model()
        self.limit = limit

    def transition(self, states, actions):
        return self.right.transition(states, actions)

    def reward(self, states, actions, next_states):
        return self.right.reward(states, actions, next_states)

    def terminal(self, states):
        return states[:, :1].abs() > self.limit


@pytest.mark.parametrize(
    ("ends", "prior_model", "is_blind"),
    [
        ("terminated", LinearEnv().prior_model(), True),
        ("terminated", Ends(LIMIT), False),
        ("terminated", Ends(1e-3), True),
        ("truncated", LinearEnv().prior_model(), False),
        (None, Ends(1e-3), True),
        (None, Ends(1e3), False),
    ],
)
def test_a_model_that_does_not_know_where_episodes_terminate_is_left_out(ends, prior_model, is_blind):
    # No member of the ensemble knows: nothing else would tell
    env = TimeLimit(LinearEnv(ends=ends), 20)
    model = MPG("MlpPolicy", env, prior_model=prior_model, horizons=(0, 10), **SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(160)
    messages = [str(warning.message) for warning in caught]
    assert any("does not know where episodes terminate" in message for message in messages) == is_blind
    assert (model.weighting_rule(60)[10] < 1e-20) == is_blind
    latest = model._measurements[-1].gradients
    assert latest.misjudges_ends == is_blind and latest.is_left_out.tolist() == [False, is_blind]
    (row,) = [line for line in str(model.trust_report()).splitlines() if "10 model steps" in line]
    assert ("excluded: wrong terminations" in row) == is_blind


@pytest.mark.parametrize("compiles", [True, False])
def test_what_is_wrong_is_said_once(compiles, monkeypatch):
    # Compiling resets what Python remembers of warnings
    monkeypatch.setattr(mpg, "StepCompiler", partial(mpg.StepCompiler, backend="eager"))
    model = MPG("MlpPolicy", LinearEnv(ends="terminated"), horizons=(0, 10), compile=compiles, **SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(160)
    assert sum(measurement.gradients.misjudges_ends for measurement in model._measurements) > 1
    assert sum("does not know where episodes terminate" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("n_members", [2, 3, 4])
def test_members_that_are_compared_have_different_critics(n_members, monkeypatch):
    seen = []

    def record(observations, actor, q_functions, *args):
        seen.append([q_function(*inputs).sum().item() for q_function in q_functions])
        return action_gradients(observations, actor, q_functions, *args)

    inputs = (th.ones(1, 2), th.ones(1, 1))
    monkeypatch.setattr(mpg, "action_gradients", record)
    kwargs = {"residual_kwargs": {"n_members": n_members}, "horizons": (0, 3)}
    MPG("MlpPolicy", LinearEnv(), **kwargs, **SMALL).learn(105)
    assert len(seen[0]) == n_members and seen[0][0] != seen[0][-1]


def test_measured_weights_need_two_critics():
    kwargs = {**SMALL, "policy_kwargs": {"net_arch": [16], "n_critics": 1}}
    with pytest.raises(ValueError, match="compare the critics with each other, of which there is one"):
        MPG("MlpPolicy", LinearEnv(), **kwargs)
    MPG("MlpPolicy", LinearEnv(), weighting="rule_based", **kwargs)


def test_a_termination_that_hardly_a_rollout_comes_to_is_no_reason_to_leave_a_model_out():
    recorded = filled_buffer(n_steps=200)
    blind, horizon = LinearEnv().prior_model(), 10
    rate = recorded.termination_rate()
    assert rate * horizon > MATTERING_ENDS and misjudges_ends(blind, recorded, horizon)
    assert rate * 1 < MATTERING_ENDS and not misjudges_ends(blind, recorded, 1)


class Overflows(Wrong):
    def transition(self, states, actions):
        return 1e30 * states + actions


def test_a_model_that_overflows_weighs_nothing_and_training_goes_on():
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Overflows(), residual=False, horizons=(0, 10), **SMALL)
    with pytest.warns(UserWarning, match="gradient of Overflows over 10 steps is not finite at most states"):
        model.learn(160)
    assert model.weighting_rule(60)[10] < 1e-20
    assert model.n_skipped_updates == 0


class NoNumberButAGradient(Wrong):
    """The logarithm of a negative number has a derivative that looks right."""

    def reward(self, states, actions, next_states):
        return super().reward(states, actions, next_states) + 0.01 * (-1 - states[:, :1]).log()


def test_a_model_whose_values_alone_are_not_finite_weighs_nothing():
    model = MPG("MlpPolicy", LinearEnv(), prior_model=NoNumberButAGradient(), horizons=(0, 5), **SMALL)
    with pytest.warns(UserWarning, match="over 5 steps is not finite at most states"):
        model.learn(160)
    assert model.weighting_rule(60)[5] < 1e-20
    assert model.n_skipped_updates == 0


class OverflowsBeyond(Wrong):
    """Not a number at the quarter of the states that lies highest, and learned from elsewhere."""

    def transition(self, states, actions):
        return super().transition(states, actions) + (0.3 - states[:, :1]).sqrt() * 0


@pytest.mark.parametrize("kwargs", [{}, {"residual": False, "weighting": "constant"}])
def test_states_at_which_a_model_overflows_are_left_out_with_one_warning(kwargs):
    kwargs = {**SMALL, **kwargs, "horizons": (0, 5), "policy_delay": 1}
    model = MPG("MlpPolicy", LinearEnv(), prior_model=OverflowsBeyond(), **kwargs)
    logger = configure(None, [])
    model.set_logger(logger)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(160)
    assert sum("overflow at some states" in str(warning.message) for warning in caught) == 1
    assert model.n_skipped_updates == 0
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    assert 0 < logger.name_to_value["train/states_left_out"] < 0.5
    assert model.weighting_rule(model._n_updates)[5] > 0.1


def test_trust_report(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Wrong(), horizons=(0, 10), **SMALL)
    with pytest.raises(ValueError, match="Nothing is recorded"):
        model.trust_report()
    model.learn(300)
    report = model.trust_report()
    assert len(report.measurements) == 10
    assert [measurement.n_updates for measurement in report.measurements] == list(range(1, 200, 20))
    assert report.corrected.relative.shape == report.prior.relative.shape
    # One step ahead, the correction has learned the sign
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


def test_before_anything_is_learned_the_report_says_so(tmp_path):
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
    """LinearEnv's model, and one in which what never changes does."""

    def __init__(self):
        super().__init__()
        self.right = LinearEnv().prior_model()

    def transition(self, states, actions):
        return th.cat([self.right.transition(states[:, :2], actions), 0.999 * states[:, 2:]], dim=1)

    def reward(self, states, actions, next_states):
        return self.right.reward(states[:, :2], actions, next_states[:, :2])


def test_what_never_changes_is_no_unit_of_errors(tmp_path):
    model = MPG("MlpPolicy", Constant(LinearEnv()), prior_model=Drifts(), horizons=(0, 10), **SMALL).learn(120)
    report = model.trust_report()
    assert np.isnan(report.prior.relative[:, 2]).all() and np.isfinite(report.prior.relative[:, :2]).all()
    (row,) = [line for line in str(report).split("corrected model")[0].splitlines() if line.startswith("state[2]")]
    assert row.split()[1:] == ["constant"] * 3
    line = report.plot(tmp_path / "trust.png").axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(line, np.sqrt((report.prior.relative[:, :2] ** 2).mean(axis=1)))


class Stutters(LinearEnv):
    """Once before learning starts, an observation is not a number, and so is a reward."""

    n = 0

    def step(self, action):
        observation, reward, *rest = super().step(action)
        self.n += 1
        return np.full_like(observation, np.nan) if self.n == 50 else observation, np.nan if self.n == 70 else reward, *rest


def test_a_record_that_is_not_finite_is_reported_and_does_no_harm():
    model = MPG("MlpPolicy", Stutters(), horizons=(0, 10), max_skipped_updates=300, **SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(400)
    assert sum("observation or a reward that is not finite" in str(warning.message) for warning in caught) == 1
    assert 0 < model.n_skipped_updates < 250
    learned = model.rollout_model.state_dict()
    assert all(th.isfinite(tensor).all() for tensor in learned.values())
    assert all(th.isfinite(parameter).all() for parameter in model.rollout_model.parameters())
    assert model.weighting_rule(model._n_updates)[10] > 0.5
    report = model.trust_report()
    assert np.isfinite(report.prior.relative).all() and np.isfinite(report.prior.returns).all()
    assert report.corrected.relative.max() < 0.2


def test_errors_of_the_exact_model_are_those_of_rounding():
    model = MPG("MlpPolicy", LinearEnv(), residual=False, horizons=(0, 5), **SMALL).learn(150)
    report = model.trust_report()
    assert report.corrected is None
    assert report.prior.relative.max() < 1e-3
    assert (report.prior.returns < 1e-4 * report.prior.return_spread).all()
    assert (report.prior.return_spread > 0).all()
