"""Sensors that a model does not reproduce: redundant, noisy, forgotten or mistaken. All of them are findings, not errors."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from cart import Cart, CartModel
from gymnasium import spaces
from settings import SMALL

from sb3_mpg import MPG, check_prior_model


class MoreSensors(gym.ObservationWrapper):
    """
    The cart, which also shows what a function makes of position, velocity, step and noise.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, function):
        super().__init__(Cart())
        self.function = function

    def observation(self, observation):
        env = self.unwrapped
        more = self.function(*observation, env.n_steps, env.np_random.standard_normal())
        return np.array([*observation, more], np.float32)


class MoreSensorsModel(CartModel):
    """The cart, which computes the additional sensor from position and velocity."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def state_from_observation(self, observations):
        return observations[:, :2]

    def observation(self, states):
        return th.cat([states, self.function(*states.split(1, dim=1))], dim=1)


ENERGY = (lambda x, v, step, noise: x**2 + v**2, lambda x, v: x**2 + 1.3 * v**2)
NOISE = (lambda x, v, step, noise: v + 0.1 * noise, lambda x, v: v)


def check(of_env, of_model, n_samples=400):
    model, env = MoreSensorsModel(of_model), MoreSensors(of_env)
    return check_prior_model(model, env, n_samples=n_samples, verbose=False)


class TestVerdicts:
    @pytest.mark.parametrize(
        ("of_env", "of_model"),
        [
            ENERGY,
            (lambda x, v, step, noise: np.cos(2 * x), lambda x, v: 1.1 * th.cos(2 * x)),
            (lambda x, v, step, noise: x + v, lambda x, v: x + 1.1 * v),
            (lambda x, v, step, noise: x, lambda x, v: x + 0.3),
        ],
        ids=["energy", "cosine", "sum", "shifted copy"],
    )
    def test_redundant(self, of_env, of_model):
        report = check(of_env, of_model)
        assert report.verdicts == ("good", "good", "redundant")
        (hint,) = report.hints
        assert "the other elements determine observation[2], but `observation` computes it differently" in hint
        assert "differs from x by" in hint and "Compute it as the environment does" in hint

    @pytest.mark.parametrize(
        "of_env",
        [NOISE[0], lambda x, v, step, noise: noise, lambda x, v, step, noise: v * (1 + 0.5 * noise)],
        ids=["added", "nothing else", "multiplied"],
    )
    def test_noisy(self, of_env):
        report = check(of_env, NOISE[1])
        assert report.verdicts == ("good", "good", "noisy")
        (hint,) = report.hints
        assert "there seems to be noise or rounding in observation[2]" in hint

    def test_not_in_the_state(self):
        report = check(lambda x, v, step, noise: np.sin(step / 5), lambda x, v: 0 * v)
        assert report.verdicts == ("good", "good", "not in the state")
        assert "Make it a dimension of the state." in report.hints[0]

    def test_not_restored(self):
        class Shrinks(CartModel):
            def observation(self, states):
                return states * th.tensor([1.0, 1.1], dtype=states.dtype)

        report = check_prior_model(Shrinks(), Cart(), n_samples=400, verbose=False)
        assert report.verdicts == ("good", "not restored")
        assert "not the inverse of `state_from_observation` in observation[1]" in report.hints[0]

    def test_right_sensors_are_good(self):
        report = check(ENERGY[0], lambda x, v: x**2 + v**2)
        assert report.verdicts == ("good", "good", "good") and not report.hints

    def test_the_gap_is_measured(self):
        """Noise of a known size, and a change of a known size: that of the velocity and of two noises."""
        report = check(*NOISE, n_samples=1000)
        velocity_change = report.rms_changes[0, 1]
        share = 0.1 / np.hypot(velocity_change, 0.1 * np.sqrt(2))
        words = report.hints[0].split("differs from x by ")[1].split()
        assert float(words[0]) == pytest.approx(0.1, rel=0.1)
        assert float(words[1][1:-1]) == pytest.approx(100 * share, rel=0.1)

    def test_small_gaps_may_stay(self):
        report = check(ENERGY[0], lambda x, v: x**2 + 1.001 * v**2)
        assert report.verdicts[2] == "redundant"
        assert report.hints[0].endswith("Small as this is, it can stay.")

    def test_few_records_do_not_tell(self):
        report = check(*NOISE, n_samples=16)
        assert report.verdicts[2] == "not restored"

    def test_other_mistakes_are_found_beside(self):
        class Backwards(MoreSensorsModel):
            def transition(self, states, actions):
                return super().transition(states, -actions)

        report = check_prior_model(Backwards(NOISE[1]), MoreSensors(NOISE[0]), n_samples=400, verbose=False)
        assert report.verdicts[1:] == ("wrong sign of action 0", "wrong sign of action 0")
        assert "opposite sign on observation[1] and observation[2]" in report.hints[0]
        assert "noise" in report.hints[1]


@pytest.mark.parametrize("functions", [ENERGY, NOISE], ids=["redundant", "noisy"])
def test_training_takes_them(functions):
    """At construction, in a new environment, and in updates."""
    env, model = MoreSensors(functions[0]), MoreSensorsModel(functions[1])
    algorithm = MPG("MlpPolicy", env, prior_model=model, horizons=(0, 2), compile=False, **SMALL).learn(60)
    algorithm.set_env(MoreSensors(functions[0]))
    assert np.isfinite(algorithm.predict(np.zeros(3, np.float32))[0]).all()


def test_an_angle_that_wraps_otherwise():
    """Where `state_difference` takes two states for the same, the encoding may return either."""

    class Wrapped(CartModel):
        def state_from_observation(self, observations):
            return observations.remainder(1.0)

        def state_difference(self, states, others):
            difference = states - others
            return difference - difference.round()

    report = check_prior_model(Wrapped(), Cart(), n_samples=200, verbose=False)
    assert not any("state_from_observation" in hint for hint in report.hints)
