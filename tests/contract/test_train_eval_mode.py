"""Batch normalisation and dropout: only training uses batches, and only training changes statistics."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

NETWORKS = ("actor", "critic", "actor_target", "critic_target")


class BatchNormDropout(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        n_elements = spaces.flatdim(observation_space)
        super().__init__(observation_space, n_elements)
        self.batch_norm = th.nn.BatchNorm1d(n_elements)
        self.layers = th.nn.Sequential(th.nn.Flatten(), self.batch_norm, th.nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(observations)


def make(case, **kwargs):
    return case.make(policy_kwargs={"net_arch": [8, 8], "features_extractor_class": BatchNormDropout}, **kwargs)


def statistics(model):
    """Of each network, a copy of the bias and of the running mean."""
    layers = {name: getattr(model.policy, name).features_extractor.batch_norm for name in NETWORKS}
    return {name: (layer.bias.detach().clone(), layer.running_mean.clone()) for name, layer in layers.items()}


def test_training_updates_statistics_and_copies_them(case):
    model = make(case, learning_starts=0, tau=0.0)
    before = statistics(model)
    model.learn(30)
    after = statistics(model)
    for name in ("actor", "critic"):
        for old, new in zip(before[name], after[name], strict=True):
            assert not th.isclose(old, new).any(), name
        # Without soft updates, weights of targets stay; statistics are copied nevertheless
        bias, running_mean = after[f"{name}_target"]
        th.testing.assert_close(bias, before[f"{name}_target"][0], rtol=0, atol=0)
        th.testing.assert_close(running_mean, after[name][1])


def test_collecting_steps_changes_nothing(case):
    model = make(case, gradient_steps=0)
    before = statistics(model)
    model.learn(40)
    assert model._n_updates == 0
    th.testing.assert_close(statistics(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("is_trained", [False, True])
def test_predictions_are_repeatable_and_change_nothing(case, is_trained):
    model = make(case, learning_starts=0)
    if is_trained:
        model.learn(10)
    before = statistics(model)
    observation = model.get_env().reset()
    first, _ = model.predict(observation, deterministic=True)
    for _ in range(5):
        np.testing.assert_array_equal(model.predict(observation, deterministic=True)[0], first)
    th.testing.assert_close(statistics(model), before, rtol=0, atol=0)
