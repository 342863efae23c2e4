"""Integration schemes: positions that take the old or the new velocity. Errors that follow from those of others."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mpg import PriorModel, check_prior_model

TIME_STEP = 0.1
INF = np.inf
#: How strongly the position sees the change of the velocity within a step
PARTS = {"explicit": 0.0, "several substeps": 0.5, "semi-implicit": 1.0}
VALUES = {"explicit": "the old value", "several substeps": "a value between old and new", "semi-implicit": "the new value"}
OTHERS = [(of_env, of_model) for of_env in PARTS for of_model in PARTS if of_env != of_model]


def oscillate(position, velocity, action, scheme, gain=1.0, stiffness=2.0, damping=0.5):
    """One step of a mass on a spring, for numbers and for tensors."""
    new_velocity = velocity + TIME_STEP * (gain * action - stiffness * position - damping * velocity)
    seen = velocity + PARTS[scheme] * (new_velocity - velocity)
    return position + TIME_STEP * seen, new_velocity


class Oscillator(gym.Env):
    """Position and velocity, or sine and cosine of the position (an angle) and velocity."""

    action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, scheme, shows_angle=False):
        self.observation_space = spaces.Box(-INF, INF, (2 + shows_angle,), np.float32)
        self.scheme, self.shows_angle = scheme, shows_angle

    def observe(self):
        position, velocity = self.state
        values = [np.sin(position), np.cos(position), velocity] if self.shows_angle else [position, velocity]
        return np.array(values, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = tuple(self.np_random.uniform(-1, 1, 2))
        return self.observe(), {}

    def step(self, action):
        self.state = oscillate(*self.state, float(action[0]), self.scheme)
        return self.observe(), -float(self.state[0] ** 2), False, False, {}


class OscillatorModel(PriorModel):
    def __init__(self, scheme, **changes):
        super().__init__()
        self.scheme, self.changes = scheme, changes

    def transition(self, states, actions):
        return th.cat(oscillate(*states.split(1, dim=1), actions, self.scheme, **self.changes), dim=1)

    def reward(self, states, actions, next_states):
        return -(next_states[:, :1] ** 2)


class AngleModel(OscillatorModel):
    def state_from_observation(self, observations):
        return th.cat([th.atan2(observations[:, :1], observations[:, 1:2]), observations[:, 2:]], dim=1)

    def observation(self, states):
        return th.cat([states[:, :1].sin(), states[:, :1].cos(), states[:, 1:]], dim=1)

    def reward(self, states, actions, next_states):
        return -(next_states[:, :1] ** 2)


def check(of_env, of_model, **changes):
    return check_prior_model(OscillatorModel(of_model, **changes), Oscillator(of_env), n_samples=400, verbose=False)


@pytest.mark.parametrize(("of_env", "of_model"), OTHERS)
def test_schemes_are_named(of_env, of_model):
    report = check(of_env, of_model)
    assert report.verdicts == ("other integration scheme", "good")
    (hint,) = report.hints
    assert f"the integration of observation[0] differs: of observation[1], the environment takes {VALUES[of_env]} (as" in hint
    assert f"and the model {VALUES[of_model]} (as" in hint
    assert "times as strongly" not in hint and "missing" not in hint


@pytest.mark.parametrize("scheme", PARTS)
def test_the_same_scheme(scheme):
    assert check(scheme, scheme).hints == ()


@pytest.mark.parametrize(
    ("of_env", "of_model", "changes"),
    [
        (of_env, of_model, changes)
        for of_env, of_model in OTHERS
        for changes in ({"gain": 0.5}, {"gain": 1.6}, {"stiffness": 6.0, "damping": 0.0})
        # Else the two mistakes cancel each other, and the position is good
        if abs(changes.get("gain", 1.0) * PARTS[of_model] - PARTS[of_env]) > 0.3
    ],
)
def test_schemes_are_named_beside_wrong_velocities(of_env, of_model, changes):
    report = check(of_env, of_model, **changes)
    assert report.verdicts[0].split(",")[0] == "other integration scheme"
    (hint,) = (hint for hint in report.hints if "integration" in hint)
    assert f"takes {VALUES[of_env]} " in hint and f"the model {VALUES[of_model]} " in hint
    if "gain" in changes:
        expected = f"{1 / changes['gain']:.2g} times as strongly on observation[1] as in the model"
        assert expected in report.hints[0] and report.verdicts[1].split(",")[0] == "wrong gain of action 0"


def test_positions_are_right_and_velocities_wrong():
    """The old velocity is recorded: the position has no error in one step."""
    report = check("explicit", "explicit", gain=0.5)
    assert report.verdicts == ("good", "wrong gain of action 0")


def test_errors_that_follow_from_those_of_the_velocity():
    """With the new velocity, the position inherits its error; the gain needs to be mended only once."""
    report = check("semi-implicit", "semi-implicit", gain=0.2)
    assert report.verdicts == ("follows observation[1]", "wrong gain of action 0")
    assert "5 times as strongly on observation[1] as in the model" in report.hints[0]
    assert report.hints[1] == "the errors of observation[0] follow from those of observation[1]: mend that one first."


def test_an_own_mistake_of_the_position_is_neither():
    class PushesPosition(OscillatorModel):
        def transition(self, states, actions):
            return super().transition(states, actions) + th.cat([0.05 * actions, 0 * actions], dim=1)

    report = check_prior_model(PushesPosition("explicit"), Oscillator("explicit"), n_samples=400, verbose=False)
    assert "action 0 moves observation[0] in the model, and not in the environment" in report.hints[0]

    class Reverses(OscillatorModel):
        def transition(self, states, actions):
            position, velocity = super().transition(states, actions).split(1, dim=1)
            return th.cat([2 * states[:, :1] - position, velocity], dim=1)

    report = check_prior_model(Reverses("semi-implicit"), Oscillator("explicit"), n_samples=400, verbose=False)
    assert "integration" not in " ".join(report.hints)


@pytest.mark.parametrize(("of_env", "of_model"), [("semi-implicit", "explicit"), ("explicit", "semi-implicit")])
def test_angles_that_are_shown_as_sine_and_cosine(of_env, of_model):
    model, env = AngleModel(of_model), Oscillator(of_env, shows_angle=True)
    report = check_prior_model(model, env, n_samples=400, verbose=False)
    assert report.verdicts == ("other integration scheme", "other integration scheme", "good")
    (hint,) = report.hints
    assert "the integration of observation[0] and observation[1] differs: of state[1], the environment" in hint
    assert hint.index(VALUES[of_env]) < hint.index(VALUES[of_model])
