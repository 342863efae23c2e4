"""Which terms explain errors, and what the checker says of a heat exchange that a model lacks."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mpg import PriorModel, check_prior_model
from sb3_mpg.common.models.checking.sources import find_source

NAMES = ("x", "y", "z", "u")


def some_inputs(n_rows=500):
    rng = np.random.default_rng(0)
    # Columns that are around zero, and one that is not
    return rng.normal(size=(n_rows, 4)) * [1.0, 0.5, 3.0, 1.0] + [0.2, 0.0, 300.0, 0.0]


@pytest.mark.parametrize(
    ("function", "formula", "is_exchange"),
    [
        (lambda x, y, z, u: 0.3 * y, "0.3 times y", False),
        (lambda x, y, z, u: 0.5 * (u - y), "0.5 times (u - y)", True),
        (lambda x, y, z, u: -0.5 * (u - y), "0.5 times (y - u)", True),
        (lambda x, y, z, u: -2 * (z - 280), "-2 times (z - 280)", True),
        (lambda x, y, z, u: 2 - 0.5 * y, "2 - 0.5 times y", False),
        (lambda x, y, z, u: 2 * x * u, "2 times x times u", False),
        (lambda x, y, z, u: y**2, "1 times y squared", False),
        (lambda x, y, z, u: 1.5 * x - 0.7 * u, "1.5 times x - 0.7 times u", False),
        (lambda x, y, z, u: 0.5 + x - 2 * x * y, "0.5 + 1 times x - 2 times x times y", False),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_formulas(function, formula, is_exchange, noise):
    inputs = some_inputs()
    errors = function(*inputs.T) + noise * np.random.default_rng(1).normal(size=len(inputs))
    source = find_source(errors, inputs, NAMES, tolerance=0.03)
    assert source.formula == formula
    assert source.is_exchange == is_exchange and source.share > 0.98
    assert {NAMES[index] for index in source.inputs} == {name for name in NAMES if name in formula.replace("squared", "")}


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_constants_have_no_source(seed):
    inputs, noise = some_inputs(), np.random.default_rng(seed).normal(size=500)
    assert find_source(noise, inputs, NAMES, 0.0) is None
    assert find_source(3.0 + 0.1 * noise, inputs, NAMES, 0.0) is None
    assert find_source(np.full(500, 3.0), inputs, NAMES, 0.0) is None
    assert find_source(noise, np.ones((500, 4)), NAMES, 0.0) is None


def test_a_large_part():
    inputs = some_inputs()
    source = find_source(inputs[:, 0] + 0.7 * np.random.default_rng(0).normal(size=500), inputs, NAMES, 0.0)
    assert "times x" in source.formula and source.inputs == {0} and 0.5 < source.share < 0.9


def test_the_simplest_formula_that_is_good_enough():
    inputs = some_inputs()
    errors = inputs[:, 3] - 0.3 * inputs[:, 0]
    assert find_source(errors, inputs, NAMES, tolerance=0.4).formula == "0.99 times u"
    assert find_source(errors, inputs, NAMES, tolerance=0.0).formula == "1 times u - 0.3 times x"


class Reactor(gym.Env):
    """
    Concentration and temperature of a stirred tank that is heated by a reaction and cooled through its jacket, whose
    temperature is the action; a set point that is drawn anew for each episode, and in its middle.
    """

    observation_space = spaces.Box(np.float32([0, 200, 0]), np.float32([2, 500, 2]))
    action_space = spaces.Box(295.0, 302.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        draw = self.np_random.uniform
        self.state, self.n_steps = [draw(0.78, 0.9), draw(322, 332), draw(0.82, 0.92)], 0
        return np.array(self.state, dtype=np.float32), {}

    def step(self, action):
        *state, set_point = self.state
        state = react(*state, float(action[0]), np.exp, 5e4)
        self.n_steps += 1
        if self.n_steps == 30:
            set_point = self.np_random.uniform(0.82, 0.92)
        self.state = [*state, set_point]
        reward = -1e3 * (state[0] - set_point) ** 2
        return np.array(self.state, dtype=np.float32), float(reward), False, self.n_steps >= 60, {}


def react(concentration, temperature, jacket, exp, exchange, rate_factor=1.0):
    """26 seconds, for numbers and for tensors."""
    for _ in range(10):
        rate = rate_factor * 7.2e10 * exp(-8750 / temperature) * concentration
        change = 350 - temperature + 209 * rate + exchange * (jacket - temperature) / 23900
        concentration = concentration + 26 / 600 * (1 - concentration - rate)
        temperature = temperature + 26 / 600 * change
    return concentration, temperature


class ReactorModel(PriorModel):
    def __init__(self, exchange, rate_factor=1.0):
        super().__init__()
        self.exchange, self.rate_factor = exchange, rate_factor

    def transition(self, states, actions):
        concentration, temperature, set_point = states.split(1, dim=1)
        changed = react(concentration, temperature, actions, th.exp, self.exchange, self.rate_factor)
        return th.cat([changed[0], changed[1].clamp(250, 450), set_point], dim=1)

    def reward(self, states, actions, next_states):
        return -1e3 * (next_states[:, :1] - next_states[:, 2:]) ** 2


class TestReactor:
    """Its temperature is far from zero, so that all errors have a mean, too."""

    def test_the_right_model(self):
        (hint,) = check_prior_model(ReactorModel(5e4), Reactor(), verbose=False).hints
        assert "observation[2] changes: it looks random" in hint

    @pytest.mark.parametrize("share", [0.7, 0.85])
    def test_a_weaker_heat_exchange(self, share):
        report = check_prior_model(ReactorModel(share * 5e4), Reactor(), verbose=False)
        assert report.biases[0, 1] ** 2 > 0.9 * report.rms_errors[0, 1] ** 2
        assert not any("constant term" in hint for hint in report.hints)
        (hint,) = (hint for hint in report.hints if "predictions of observation[1]" in hint)
        assert "times (observation[1] - 3" in hint
        assert "so a term with it, such as an exchange or a loss, is wrong or missing" in hint
        # The reaction follows the temperature
        assert report.verdicts[0].startswith("follows observation[1]")

    def test_a_much_weaker_heat_exchange(self):
        """The reaction makes its effect stronger than linear."""
        report = check_prior_model(ReactorModel(0.5 * 5e4), Reactor(), verbose=False)
        (hint,) = (hint for hint in report.hints if "predictions of observation[1]" in hint)
        assert "times observation[1]" in hint and "times action 0" in hint
        assert not any("constant term" in hint for hint in report.hints)

    @pytest.mark.parametrize("rate_factor", [0.75, 1.3])
    def test_a_wrong_rate_is_no_integration_scheme(self, rate_factor):
        """Actions move the concentration through the temperature, and too weakly or too strongly."""
        report = check_prior_model(ReactorModel(5e4, rate_factor), Reactor(), verbose=False)
        assert report.rms_errors[0, 0] > 0.1 * report.rms_changes[0, 0]
        assert "integration" not in " ".join(report.hints) + " ".join(report.verdicts)

    def test_a_slower_reaction_beside_it(self):
        """The difference that the heat exchange is proportional to is named, and no integration scheme."""
        report = check_prior_model(ReactorModel(0.7 * 5e4, 0.75), Reactor(), verbose=False)
        assert any("the error is 0.14 times (observation[1] - action 0), so a term with it" in hint for hint in report.hints)
        assert "integration" not in " ".join(report.hints) + " ".join(report.verdicts)

    def test_no_heat_exchange(self):
        report = check_prior_model(ReactorModel(0.0), Reactor(), verbose=False)
        assert "the effect of action 0 on observation[1] is missing" in report.hints[0]
        assert any("times (observation[1] - 3" in hint and "exchange" in hint for hint in report.hints)
        assert not any("constant term" in hint for hint in report.hints)
        assert "> 1000%" in str(report) and "not finite" in str(report) and "inf" not in str(report)
