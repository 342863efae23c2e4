"""A reward that jumps: the derivative of an exact model is blind to it, and the model helps nevertheless."""

import dataclasses
import warnings

import pytest
from region import Region
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mpg import MPG

SMALL = {
    **{"policy_kwargs": {"net_arch": [32]}, "learning_starts": 100, "batch_size": 64, "buffer_size": 2000, "policy_delay": 1},
    **{"horizons": (0, 5), "gamma": 0.8, "learning_rate": 1e-3, "critic_learning_rate": 2e-3, "compile": False},
}


class Losses(BaseCallback):
    """Keeps a value of the log."""

    def __init__(self, key):
        super().__init__()
        self.key, self.values = key, []

    def _on_step(self):
        if self.key in self.logger.name_to_value:
            self.values.append(self.logger.name_to_value[self.key])
        return True


@pytest.mark.usefixtures("models_are_fitted_once")
@pytest.mark.parametrize("seed", [0, 1])
def test_an_exact_model_of_a_reward_that_jumps(seed):
    model, losses = MPG("MlpPolicy", Region(), seed=seed, **SMALL), Losses("train/blind_value_loss")
    before, _ = evaluate_policy(model, Monitor(Region()), 50)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(600, callback=losses)
    assert sum("does not show how they vary" in str(warning.message) for warning in caught) == 1
    # The members agree about the returns, but their derivative is blind, which excludes the horizon
    blind = [measurement for measurement in model.trust.measurements if measurement.gradients.misses_jumps]
    assert sum(measurement.gradients.misses_jumps for measurement in model.trust.measurements[:6]) >= 3
    assert all(measurement.gradients.is_excluded.tolist() == [False, True] for measurement in blind)
    assert all(measurement.weights[1] < 1e-6 for measurement in blind)
    assert all(measurement.gradients.trust_in_returns > 0.9 for measurement in blind)
    text = str(dataclasses.replace(model.trust_report(), measurements=blind[:1]))
    (row,) = [line for line in text.splitlines() if line.startswith("5 model steps")]
    assert "discontinuous: its derivative explains" in row
    # The critics learn from perturbed rollouts, and the agent is not stuck at an edge
    assert max(losses.values) > 0
    after, _ = evaluate_policy(model, Monitor(Region()), 50)
    assert before < 3 and after > 8


def test_a_model_that_does_not_learn_is_not_asked():
    """All of its rollouts would share its mistakes."""
    model = MPG("MlpPolicy", Region(), seed=0, residual=False, **SMALL).learn(130)
    assert any(measurement.gradients.misses_jumps for measurement in model.trust.measurements)
    assert model.trust.in_blind_returns(30) == 0 and "train/blind_value_loss" not in model.logger.name_to_value
