"""One prior model is told from another."""

import pytest
import torch as th
from models import Known, KnowsNothing

from sb3_mpg.common.models.fingerprint import Fingerprint


class Shifted(Known):
    def __init__(self, shift, reward_shift):
        super().__init__()
        self.shift, self.reward_shift = shift, reward_shift

    def transition(self, states, actions):
        return super().transition(states, actions) + self.shift

    def reward(self, states, actions, next_states):
        return super().reward(states, actions, next_states) + self.reward_shift


class Ends(Known):
    def terminal(self, states):
        return states[:, :1] < 0


@pytest.mark.parametrize(
    ("other", "matches"),
    [
        (Known(), True),
        (Shifted(0.0, 0.0), True),
        (Shifted(1e-7, 1e-7), True),
        (Shifted(0.1, 0.0), False),
        (Shifted(0.0, 0.1), False),
        (KnowsNothing(), False),
        (Ends(), False),
    ],
)
@pytest.mark.parametrize("n_rows", [3, 100])
def test_predictions_count_and_not_the_object(other, matches, n_rows):
    fingerprint = Fingerprint(2, 2)
    fingerprint.take(Known(), 2 * th.rand(n_rows, 2) - 1, 2 * th.rand(n_rows, 2) - 1)
    assert Fingerprint.matches(other, fingerprint.state_dict(), th.device("cpu")) == matches


def test_what_overflows_in_both_is_the_same():
    prior = Shifted(th.inf, th.nan)
    fingerprint = Fingerprint(2, 2)
    fingerprint.take(prior, th.rand(5, 2), th.rand(5, 2))
    assert Fingerprint.matches(prior, fingerprint.state_dict(), th.device("cpu"))
    assert not Fingerprint.matches(Known(), fingerprint.state_dict(), th.device("cpu"))
