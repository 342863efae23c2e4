"""Dimensions that no model can predict: references and disturbances that are drawn anew."""

import numpy as np
import pytest
import torch as th
from cart import Cart, CartModel
from gymnasium import spaces

from sb3_mpg import check_prior_model


def redraw(share):
    def follow(reference, env):
        return env.np_random.uniform(-1, 1) if env.np_random.uniform() < share else reference

    return follow


#: How a reference changes, and whether that is random
REFERENCES = {
    "in each step": (redraw(1.0), True),
    "at some steps": (redraw(0.1), True),
    "at few steps": (redraw(0.03), True),
    "random walk": (lambda reference, env: reference + 0.1 * env.np_random.normal(), True),
    "returns to its mean": (lambda reference, env: 0.9 * reference + 0.1 * env.np_random.normal(), True),
    "decays": (lambda reference, env: 0.9 * reference, False),
    "follows the cart": (lambda reference, env: reference + 0.1 * (env.state[0] - reference), False),
    "switches with the position": (lambda reference, env: float(np.sign(env.state[0])), False),
}


class Follows(Cart):
    """A cart that should be where a reference is."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, change):
        self.change = change

    def observe(self, observation):
        return np.append(observation, self.reference).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        self.reference = float(self.np_random.uniform(-1, 1))
        return self.observe(observation), info

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        reward = -float((self.state[0] - self.reference) ** 2)
        self.reference = self.change(self.reference, self)
        return self.observe(observation), reward, terminated, truncated, info


class FollowsModel(CartModel):
    """Keeps the reference, or guesses that it falls."""

    def __init__(self, decay=0.0):
        super().__init__()
        self.decay = decay

    def transition(self, states, actions):
        return th.cat([super().transition(states[:, :2], actions), (1 - self.decay) * states[:, 2:]], dim=1)

    def reward(self, states, actions, next_states):
        return -((next_states[:, :1] - states[:, 2:]) ** 2)


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_reference_that_the_model_keeps(kind):
    change, is_random = REFERENCES[kind]
    report = check_prior_model(FollowsModel(), Follows(change), n_samples=800, verbose=False)
    assert report.verdicts == ("good", "good", "random" if is_random else "not moved")
    (hint,) = report.hints
    if is_random:
        assert "neither observation nor action tell how observation[2] changes: it looks random" in hint
        assert "The model keeps it constant, which is right" in hint
    else:
        assert "the model does not move observation[2], and the environment does" in hint
    assert "worse than no change" not in str(report)


def test_a_reference_that_the_model_moves():
    report = check_prior_model(FollowsModel(0.9), Follows(REFERENCES["random walk"][0]), n_samples=800, verbose=False)
    assert "random" not in report.verdicts
    assert any("the error is -0.9 times observation[2]" in hint for hint in report.hints)


def test_a_reference_that_goes_on_as_before_is_hidden():
    """Its speed is drawn at the start of an episode, and two observations show it."""

    class Ramp(Follows):
        def reset(self, **kwargs):
            result = super().reset(**kwargs)
            self.speed = self.np_random.uniform(-0.1, 0.1)
            return result

    report = check_prior_model(FollowsModel(), Ramp(lambda ref, env: ref + env.speed), n_samples=800, verbose=False)
    assert report.verdicts[2] == "hidden cause"


def test_few_changes_do_not_tell():
    n_changes = 0

    def change(reference, env):
        nonlocal n_changes
        if env.n_steps != 5 or n_changes == 3:
            return reference
        n_changes += 1
        return -reference

    report = check_prior_model(FollowsModel(), Follows(change), n_samples=400, verbose=False)
    assert n_changes == 3 and report.verdicts[2] == "not moved"
