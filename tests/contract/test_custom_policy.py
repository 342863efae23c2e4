"""Architectures, optimizers and features extractors of the user's."""

import copy

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor


class Layer(BaseFeaturesExtractor):
    """A features extractor that learns."""

    def __init__(self, observation_space, features_dim=5):
        super().__init__(observation_space, features_dim)
        self.layers = th.nn.Sequential(th.nn.Linear(spaces.flatdim(observation_space), features_dim), th.nn.Tanh())

    def forward(self, observations):
        return self.layers(observations)


def sizes_of(network):
    return [module.out_features for module in network.modules() if isinstance(module, th.nn.Linear)]


@pytest.mark.parametrize(
    ("net_arch", "of_actor", "of_critic"),
    [([], [], []), ([4], [4], [4]), ([4, 5], [4, 5], [4, 5]), ({"qf": [8], "pi": [6, 4]}, [6, 4], [8])],
)
def test_architectures(case, net_arch, of_actor, of_critic):
    model = case.make(policy_kwargs={"net_arch": net_arch}).learn(13)
    assert sizes_of(model.actor.mu) == [*of_actor, 1]
    for critic in (model.critic, model.critic_target):
        assert all(sizes_of(q_network) == [*of_critic, 1] for q_network in critic.q_networks)


@pytest.mark.parametrize("optimizer_class", [th.optim.AdamW, RMSpropTFLike])
@pytest.mark.parametrize("optimizer_kwargs", [None, {"weight_decay": 0.5}])
def test_optimizers(case, optimizer_class, optimizer_kwargs):
    policy_kwargs = {"net_arch": [8], "optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs}
    model = case.make(learning_rate=1e-3, policy_kwargs=policy_kwargs).learn(13)
    default = optimizer_class([th.nn.Parameter(th.zeros(1))]).defaults["weight_decay"]
    for network in (model.actor, model.critic):
        assert type(network.optimizer) is optimizer_class
        (group,) = network.optimizer.param_groups
        assert group["weight_decay"] == (default if optimizer_kwargs is None else 0.5)
    assert model.actor.optimizer.param_groups[0]["lr"] == 1e-3


def test_features_extractors(case):
    """Each network has its own, that of a target follows that of its network, and all but those of targets are trained."""
    kwargs = {"features_extractor_class": Layer, "features_extractor_kwargs": {"features_dim": 3}}
    model = case.make(policy_kwargs={"net_arch": [8], **kwargs}, tau=0.0)
    networks = {name: getattr(model.policy, name) for name in ("actor", "critic", "actor_target", "critic_target")}
    extractors = {name: network.features_extractor for name, network in networks.items()}
    assert len({id(extractor) for extractor in extractors.values()}) == 4
    assert all(type(extractor) is Layer and extractor.features_dim == 3 for extractor in extractors.values())
    before = {name: copy.deepcopy(extractor.state_dict()) for name, extractor in extractors.items()}
    for name in ("actor", "critic"):
        th.testing.assert_close(before[f"{name}_target"], before[name], rtol=0, atol=0)
    model.learn(16)
    for name, extractor in extractors.items():
        changed = [not th.equal(tensor, before[name][key]) for key, tensor in extractor.state_dict().items()]
        assert (not any(changed)) if name.endswith("target") else all(changed), name
