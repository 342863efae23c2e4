"""MPGPolicy: its networks, and the slope of its critics."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from lq import LinearEnv
from settings import PAPERS, SMALL

from sb3_mpg import MPG
from sb3_mpg.common.torch_layers import ELU, FadingLayerNorm, ObservationScaler
from sb3_mpg.mpg.policies import MPGPolicy


class ShapedEnv(LinearEnv):
    """The linear system in other shapes and dtypes of observations."""

    def __init__(self, shape, dtype):
        super().__init__()
        self.dtype, self.shape = dtype, shape
        self.observation_space = spaces.Box(-np.inf, np.inf, shape, dtype)

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs.reshape(self.shape), info

    def step(self, action):
        obs, *rest = super().step(action)
        return obs.reshape(self.shape), *rest


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 1)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_critic_has_a_slope_in_the_state(shape, dtype):
    """SB3's q1_forward loses dQ/ds for all but flat float32 observations; the rollout's gradient must not."""
    model = MPG("MlpPolicy", ShapedEnv(shape, dtype), horizons=(0, 2), **SMALL, **PAPERS).learn(50)
    observations = th.as_tensor(model.replay_buffer.observations[:8, 0]).float().requires_grad_()
    slope = th.autograd.grad(model.update.q_function(0)(observations, th.zeros(8, 1)).sum(), observations)[0]
    assert slope.shape == (8, *shape)
    assert (slope != 0).all()
    # Rollouts evaluate it at flat observations
    numbers = observations.detach().flatten(1).requires_grad_()
    flat_slope = th.autograd.grad(model.update.q_function(0)(numbers, th.zeros(8, 1)).sum(), numbers)[0]
    th.testing.assert_close(flat_slope, slope.flatten(1))
    flat = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL, **PAPERS)
    flat.policy.load_state_dict(model.policy.state_dict())
    expected = flat.policy_gradient(observations.detach().reshape(8, 2), 2)
    th.testing.assert_close(model.policy_gradient(observations.detach(), 2), expected)


def test_networks_are_those_of_the_papers():
    policy = MPG("MlpPolicy", LinearEnv(), buffer_size=10).policy
    assert isinstance(policy, MPGPolicy)
    for network in (policy.actor.mu, *policy.critic.q_networks):
        linear = [module for module in network if isinstance(module, th.nn.Linear)]
        assert [layer.out_features for layer in linear] == [256, 256, 1]
        assert sum(isinstance(module, ELU) for module in network) == 2
    assert len(policy.critic.q_networks) == 2
    assert isinstance(policy.actor.features_extractor, ObservationScaler)
    assert policy.actor.optimizer.defaults["fused"]


def test_hidden_layers_of_critics_are_normalised():
    policy = MPG("MlpPolicy", LinearEnv(), buffer_size=10).policy
    for critic in (policy.critic, policy.critic_target):
        for q_network in critic.q_networks:
            kinds = [type(module) for module in q_network]
            assert kinds == [th.nn.Linear, FadingLayerNorm, ELU, th.nn.Linear, FadingLayerNorm, ELU, th.nn.Linear]
            assert [module.normalized_shape for module in q_network if isinstance(module, th.nn.LayerNorm)] == [(256,)] * 2
        # SB3 finds them by these names
        assert all(getattr(critic, f"qf{index}") is q_network for index, q_network in enumerate(critic.q_networks))
    assert not any(isinstance(module, th.nn.LayerNorm) for module in policy.actor.modules())


def test_without_a_model_nothing_is_normalised():
    """The critics are bit for bit those without layers of normalisation."""
    settings = {"horizons": (0,), "weighting": "constant", **SMALL}
    normalised = MPG("MlpPolicy", LinearEnv(), **settings).learn(60)
    policy_kwargs = {**SMALL["policy_kwargs"], "layer_norm": False}
    plain = MPG("MlpPolicy", LinearEnv(), **{**settings, "policy_kwargs": policy_kwargs}).learn(60)
    inputs = th.randn(5, 2), th.randn(5, 1)
    for ours, expected in zip(normalised.critic(*inputs), plain.critic(*inputs), strict=True):
        assert th.equal(ours, expected)


def test_without_normalisation_the_critics_are_those_of_td3(tmp_path):
    settings = {"buffer_size": 10, "seed": 0, "device": "cpu", "policy_kwargs": {"layer_norm": False}}
    policy = MPG("MlpPolicy", LinearEnv(), **settings).policy
    normalised = MPG("MlpPolicy", LinearEnv(), **{**settings, "policy_kwargs": {}}).policy
    for q_network, other in zip(policy.critic.q_networks, normalised.critic.q_networks, strict=True):
        assert [type(module) for module in q_network] == [th.nn.Linear, ELU, th.nn.Linear, ELU, th.nn.Linear]
        # Both start from the same weights
        pairs = zip(q_network[::2], other[::3], strict=True)
        assert all(th.equal(layer.weight, other_layer.weight) for layer, other_layer in pairs)
    # A policy that is saved on its own knows it
    policy.save(tmp_path / "policy.zip")
    loaded = MPGPolicy.load(tmp_path / "policy.zip")
    assert not any(isinstance(module, th.nn.LayerNorm) for module in loaded.modules())
