"""The order of hints, what they share, and their place in the printed report."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from cart import TIME_STEP, Cart, CartModel, ChangedCart, TurntableEnv
from gymnasium import spaces
from models import HiddenVelocity, KnowsNothing, Turntable

from sb3_mpg import PriorModel, check_prior_model
from sb3_mpg.common.models.checking.findings import Cost, Finding, hints_of, join_names, verdict_of
from sb3_mpg.common.models.checking.report import MAX_HINTS


def costs_of(hints):
    """What the hints cost, by words that each kind says and no other."""
    words = {
        "With measured weights, the model weighs less": Cost.SPOILT_ROLLOUTS,
        "piecewise constant": Cost.SILENT,
        "opposite": Cost.WRONG_SIGN,
        "times": Cost.WRONG_SCALE,
        "the effect of action": Cost.MISSED_ACTION,
        "the predicted reward": Cost.REWARD,
        "the model does not move": Cost.WORSE_THAN_NO_CHANGE,
        "look for a constant term": Cost.BIASED,
        "is rough": Cost.ROUGH,
        "worse than no change after step": Cost.DRIFT,
    }
    return [next(cost for word, cost in words.items() if word in hint) for hint in hints]


class TestOrder:
    def test_follows_the_cost_and_then_the_dimensions(self):
        findings = [Finding(cost, "", f"{cost.name} of {{names}}", name) for name in "ab" for cost in reversed(Cost)]
        assert hints_of(findings) == tuple(f"{cost.name} of a and b" for cost in Cost)

    def test_the_verdict_is_that_of_the_most_costly_finding(self):
        assert verdict_of([Finding(Cost.ROUGH, "rough", ""), Finding(Cost.ENCODING, "redundant", "")]) == "redundant"
        assert verdict_of([]) == "good"

    def test_missed_terminations_come_first(self):
        """They spoil rollouts, whatever else is wrong."""

        class Forgets(ChangedCart):
            def terminal(self, states):
                return PriorModel.terminal(self, states)

        hints = check_prior_model(Forgets(gain=-1.0, bias=0.5, reward_scale=-1.0), Cart(), n_samples=400, verbose=False).hints
        assert costs_of(hints) == sorted(costs_of(hints))
        assert (
            hints[0].startswith("`terminal` misses")
            and "the model weighs less. A corrected model learns terminations once 10 of them are recorded." in hints[0]
        )

    @pytest.mark.parametrize("horizon", [25, 1])
    def test_terminations_matter_within_a_rollout(self, horizon):
        """As in training: those that are too rare for the horizon do not exclude a model."""
        report = check_prior_model(KnowsNothing(), Cart(), n_samples=400, horizon=horizon, verbose=False)
        rate = report.terminal_errors[0] / 400
        assert 0.1 / 25 < rate < 0.1
        is_first = report.hints[0].startswith("`terminal` misses")
        (hint,) = (hint for hint in report.hints if hint.startswith("`terminal`"))
        assert ("the model weighs less" in hint) == (horizon == 25)
        assert hint.endswith("A corrected model learns terminations once 10 of them are recorded.")
        assert is_first and "time limit" not in hint

    def test_false_terminations(self):
        class Early(CartModel):
            def terminal(self, states):
                return states[:, :1] < 10

        report = check_prior_model(Early(), Cart(), n_samples=400, verbose=False)
        assert "With measured weights, the model weighs less." in report.hints[0] and "time limits" not in report.hints[0]

    def test_the_first_hint_is_always_printed(self):
        """Dimensions with many different mistakes: more than are printed."""

        class Many(gym.Env):
            observation_space = spaces.Box(-np.inf, np.inf, (2 * MAX_HINTS,), np.float32)
            action_space = spaces.Box(-1, 1, (MAX_HINTS + 2,), np.float32)

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                self.state = self.np_random.normal(size=2 * MAX_HINTS)
                return self.state.astype(np.float32), {}

            def step(self, action):
                self.state[: MAX_HINTS + 2] += action
                is_terminal = bool(self.state[0] > 1)
                return self.state.astype(np.float32), 0.0, is_terminal, False, {}

        class Backwards(PriorModel):
            def transition(self, states, actions):
                n_others = states.shape[1] - actions.shape[1]
                return states - th.cat([actions, actions.new_zeros(len(actions), n_others)], dim=1)

            def reward(self, states, actions, next_states):
                return 0 * states[:, :1]

        report = check_prior_model(Backwards(), Many(), n_samples=400, verbose=False)
        printed = [line for line in str(report).splitlines() if line.startswith("How to fix: ")]
        assert len(report.hints) > MAX_HINTS == len(printed)
        assert printed[0].startswith("How to fix: `terminal` misses")
        assert f"... and {len(report.hints) - MAX_HINTS} more hints" in str(report)


class TestSharedCauses:
    def test_names(self):
        assert join_names(["a"]) == "a" and join_names(["a", "b"]) == "a and b"
        assert join_names(list("abcde")) == "a, b, c, d and e"
        assert join_names(list("abcdefg")) == "a, b, c, d and 3 others"

    def test_values_are_a_range(self):
        findings = [
            Finding(Cost.BIASED, "", "{names} by {values[0]:.1f}", name, (value,)) for name, value in (("a", 1), ("b", 3))
        ]
        assert hints_of(findings) == ("a and b by 1.0 to 3.0",)
        assert hints_of(findings[:1]) == ("a by 1.0",)

    def test_shares_are_percentages(self):
        findings = [
            Finding(Cost.ROUGH, "", "{names} by {values[0].percent}", name, (value,))
            for name, value in (("a", 0.2), ("b", 1e20))
        ]
        assert hints_of(findings) == ("a and b by 20% to > 1000%",)
        assert hints_of(findings[1:]) == ("b by > 1000%",)

    @pytest.mark.parametrize("factor", [0.5, 3.0])
    def test_a_wrong_time_step_is_one_hint(self, factor):
        class Slow(CartModel):
            def transition(self, states, actions):
                return states + factor * (super().transition(states, actions) - states)

        report = check_prior_model(Slow(), Cart(), n_samples=400, verbose=False)
        assert [verdict.split(",")[0] for verdict in report.verdicts] == ["wrong scale", "wrong scale"]
        (hint,) = report.hints
        assert f"the change of observation[0] and observation[1] is {1 / factor:.2g} times what the model predicts" in hint
        assert "time step, skipped frames" in hint

    def test_one_wrong_gain_is_none(self):
        hint, *_ = check_prior_model(ChangedCart(gain=0.5), Cart(), n_samples=400, verbose=False).hints
        assert "action 0 acts 2 times as strongly on observation[1]" in hint

    def test_a_model_without_actions(self):
        class Pushed(Cart):
            action_space = spaces.Box(-2, 2, (3,), np.float32)

            def step(self, action):
                _, *rest = super().step(action)
                self.state += 0.1 * action[1:]
                return self.state.astype(np.float32), *rest

        report = check_prior_model(KnowsNothing(), Pushed(), n_samples=400, verbose=False)
        assert sum("the effect of action" in hint for hint in report.hints) == 1
        assert any("the effect of actions 1 to 2 on observation[0] and observation[1]" in hint for hint in report.hints)


class TestCauses:
    """What errors are from, where the records tell."""

    def test_hidden_velocity(self):
        class Covered(gym.ObservationWrapper):
            observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

            def observation(self, observation):
                return observation[:1]

        report = check_prior_model(HiddenVelocity(), Covered(Cart()), n_samples=400, verbose=False)
        assert report.verdicts[0].split(",")[0] == "hidden cause"
        assert any("such as a velocity, a delay or a disturbance" in hint for hint in report.hints)

    def test_noise_of_a_sensor_is_not_hidden(self):
        class Noisy(gym.ObservationWrapper):
            def observation(self, observation):
                return (observation + 0.2 * self.unwrapped.np_random.standard_normal(2)).astype(np.float32)

        report = check_prior_model(CartModel(), Noisy(Cart()), n_samples=400, verbose=False)
        assert [verdict.split(",")[0] for verdict in report.verdicts] == ["noisy", "noisy"]

    def test_a_wrong_term_of_an_element_that_is_not_around_zero(self):
        """The mean of its errors is no missing constant."""

        class Warm(Cart):
            def reset(self, **kwargs):
                _, info = super().reset(**kwargs)
                self.state[1] += 5
                return self.state.astype(np.float32), info

        class Slows(CartModel):
            def transition(self, states, actions):
                position, speed = super().transition(states, actions).split(1, dim=1)
                return th.cat([position, speed - 0.1 * states[:, 1:]], dim=1)

        report = check_prior_model(Slows(), Warm(), n_samples=400, verbose=False)
        assert report.biases[0, 1] ** 2 > 0.5 * report.rms_errors[0, 1] ** 2
        assert "biased" not in report.verdicts[1]
        assert any("the error is -0.1 times observation[1], so a term with it" in hint for hint in report.hints)

    def test_a_constant_beside_a_wrong_term(self):
        """Both are named."""
        both = ChangedCart(bias=0.2)
        both.transition = lambda states, actions: ChangedCart.transition(both, states, actions) - th.cat(
            [th.zeros_like(actions), 0.05 * states[:, 1:]], dim=1
        )
        report = check_prior_model(both, Cart(), n_samples=400, verbose=False)
        assert any("the error is 0.2 - 0.05 times observation[1], so a term with it is wrong" in hint for hint in report.hints)

    @pytest.mark.parametrize("horizon", [1, 25])
    def test_missing_friction(self, horizon):
        class Rubs(Cart):
            def step(self, action):
                before = self.state[1]
                _, *rest = super().step(action)
                self.state[1] -= TIME_STEP * 2 * before
                return self.state.astype(np.float32), *rest

        report = check_prior_model(CartModel(), Rubs(), n_samples=400, horizon=horizon, verbose=False)
        assert report.n_windows.shape == (horizon,)
        hint = next(hint for hint in report.hints if "error" in hint and "observation[1]" in hint)
        assert "the error is 0.2 times observation[1], so a term with it is wrong or missing" in hint

    def test_an_angle_that_wraps(self):
        class Unaware(Turntable):
            state_difference = PriorModel.state_difference

        report = check_prior_model(Unaware(), TurntableEnv(), n_samples=400, verbose=False)
        assert report.verdicts[0].split(",")[0] == "rare jumps"
        assert "and 6.28 off in others. It is probably an angle that wraps" in report.hints[0]

    def test_jumps_of_many_sizes_are_no_angle(self):
        class Bounces(Cart):
            def step(self, action):
                _, *rest = super().step(action)
                if self.n_steps % 8 == 0:
                    self.state[1] *= -1.0
                return self.state.astype(np.float32), *rest

        report = check_prior_model(CartModel(), Bounces(), n_samples=400, verbose=False)
        assert report.verdicts[1].split(",")[0] == "rare jumps"
        assert any(
            "look for a contact, for an angle that wraps, or for something that is drawn anew" in hint for hint in report.hints
        )
