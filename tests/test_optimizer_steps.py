"""Clipping, skipping, and the targets that follow."""

import copy

import numpy as np
import pytest
import torch as th
from lq import LinearEnv
from models import Breaks
from settings import PAPERS, SMALL

from sb3_mpg import MPG
from sb3_mpg.common.optimizer_steps import OptimizerSteps
from sb3_mpg.common.type_aliases import GradientResult


def gradients(model, n_updates):
    settings = model.update_settings(n_updates)
    return model.update.gradients_of_update(n_updates, 32, model.replay_buffer, model.units(), settings)


def apply(model, result):
    return model.optimizer_steps.apply(result, model.update.networks(), model.update.target_networks(), model.tau)


def test_non_finite_gradients_are_skipped_counted_and_explained():
    model = MPG("MlpPolicy", LinearEnv(), prior_model=Breaks, horizons=(0, 5), max_skipped_updates=3, **SMALL, **PAPERS)
    before = copy.deepcopy(model.policy.state_dict())
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(FloatingPointError, match=r"horizon 5.*model step 1") as error,
    ):
        model.learn(200)
    assert "4 updates in a row" in str(error.value)
    assert "horizon 0" not in str(error.value)
    assert model.n_skipped_updates == 4
    for parameter in model.policy.parameters():
        assert th.isfinite(parameter).all()
    for key, value in model.actor.state_dict().items():
        if "features_extractor" not in key:
            assert th.equal(value, before[f"actor.{key}"])


@pytest.mark.filterwarnings("ignore:An update was skipped")
def test_rewards_that_are_too_large_are_named():
    """The model is finite, and not to blame."""

    class Huge(LinearEnv):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            return observation, 1e25 * reward, *rest

    model = MPG("MlpPolicy", Huge(), horizons=(0,), max_skipped_updates=3, **SMALL)
    with pytest.raises(FloatingPointError, match=r"value targets are as large as \de\+2\d.*`reward_scale`"):
        model.learn(200)
    model = MPG("MlpPolicy", Huge(), horizons=(0,), reward_scale=1e-25, **SMALL).learn(60)
    assert model.n_skipped_updates == 0


def test_a_single_bad_update_is_passed_over():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), policy_delay=1, **SMALL).learn(45)
    result = gradients(model, 1)
    result.gradients["actor"][0][0] = float("nan")
    before = [parameter.clone() for parameter in model.policy.parameters()]
    with pytest.warns(UserWarning, match="skipped"):
        assert not apply(model, result)
    assert all(th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert model.n_skipped_updates == 1
    assert apply(model, gradients(model, 1))
    assert model.optimizer_steps.n_skipped_in_a_row == 0


def test_target_networks_follow_where_the_policy_is_due():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), policy_delay=2, tau=0.1, **SMALL).learn(50)
    for n_updates, share in ((3, 0.0), (4, 0.1)):
        before = copy.deepcopy(model.policy)
        assert apply(model, gradients(model, n_updates))
        for name in ("actor", "critic"):
            old, new = getattr(before, f"{name}_target"), getattr(model, f"{name}_target")
            network = getattr(model, name)
            assert any(not th.equal(*pair) for pair in zip(network.parameters(), old.parameters(), strict=True))
            for ours, parameter, target in zip(new.parameters(), network.parameters(), old.parameters(), strict=True):
                th.testing.assert_close(ours, th.lerp(target, parameter, share))


def network(n_inputs=3, **kwargs):
    """A network with an optimizer, as those of SB3's policies."""
    layer = th.nn.Linear(n_inputs, 2)
    layer.optimizer = th.optim.SGD(layer.parameters(), lr=0.1, **kwargs)
    return layer


def result_of(**networks):
    """Random gradients of networks."""
    gradients = {name: [th.randn_like(parameter) for parameter in net.parameters()] for name, net in networks.items()}
    return GradientResult(gradients, {})


def snapshot(net):
    return [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("names", [["critic"], ["critic", "actor"], ["critic", "actor", "entropy_coefficient"]])
def test_any_number_of_networks_is_optimized(names):
    networks = {name: network(n_inputs) for n_inputs, name in enumerate(names, start=2)}
    result = result_of(**networks)
    before = {name: snapshot(net) for name, net in networks.items()}
    assert OptimizerSteps(None, 20).apply(result, networks, {}, 0.1)
    for name, net in networks.items():
        for parameter, old, gradient in zip(net.parameters(), before[name], result.gradients[name], strict=True):
            th.testing.assert_close(parameter.detach(), old - 0.1 * gradient)
        assert result.logs[f"train/{name}_grad_norm"] == result.logs[f"train/{name}_grad_norm_clipped"] > 0


def test_the_gradient_of_each_network_is_clipped_by_its_own_norm():
    networks = {"critic": network(), "actor": network(5)}
    result = result_of(**networks)
    for gradient in result.gradients["actor"]:
        gradient *= 1e-3
    expected = {name: [gradient.clone() for gradient in gradients] for name, gradients in result.gradients.items()}
    norm = th.linalg.vector_norm(th.cat([gradient.flatten() for gradient in expected["critic"]])).item()
    assert norm > 0.5
    before = {name: snapshot(net) for name, net in networks.items()}
    assert OptimizerSteps(0.5, 20).apply(result, networks, {}, 0.1)
    for name, factor in (("critic", 0.5 / norm), ("actor", 1.0)):
        for parameter, old, gradient in zip(networks[name].parameters(), before[name], expected[name], strict=True):
            th.testing.assert_close(parameter.detach(), old - 0.1 * factor * gradient, rtol=1e-4, atol=1e-6)
    assert result.logs["train/critic_grad_norm"] == pytest.approx(norm)
    assert result.logs["train/critic_grad_norm_clipped"] == 0.5
    assert result.logs["train/actor_grad_norm_clipped"] == result.logs["train/actor_grad_norm"] < 0.5


def test_a_network_that_is_not_due_and_all_targets_stay():
    networks, targets = {"critic": network(), "actor": network()}, {"critic": network(), "actor": network()}
    before = [snapshot(net) for net in (networks["actor"], *targets.values())]
    assert OptimizerSteps(None, 20).apply(result_of(critic=networks["critic"]), networks, targets, 0.1)
    for net, old in zip((networks["actor"], *targets.values()), before, strict=True):
        assert all(th.equal(*pair) for pair in zip(net.parameters(), old, strict=True))


def test_targets_follow_with_running_statistics():
    def normalised():
        net = th.nn.Sequential(th.nn.Linear(3, 2), th.nn.BatchNorm1d(2))
        net.optimizer = th.optim.SGD(net.parameters(), lr=0.1)
        return net

    critic, target = normalised(), normalised()
    critic(th.randn(20, 3) + 5.0)
    old = snapshot(target)
    assert OptimizerSteps(None, 20).apply(result_of(critic=critic), {"critic": critic}, {"critic": target}, 0.25)
    for ours, parameter, before in zip(target.parameters(), critic.parameters(), old, strict=True):
        th.testing.assert_close(ours, th.lerp(before, parameter, 0.25))
    assert th.equal(target[1].running_mean, critic[1].running_mean)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["critic", "actor"])
def test_one_bad_network_skips_all(name, bad):
    networks, targets = {"critic": network(), "actor": network()}, {"critic": network(), "actor": network()}
    steps, result = OptimizerSteps(3.0, 20), result_of(**networks)
    result.gradients[name][0][0, 0] = bad
    nets = [*networks.values(), *targets.values()]
    before = [snapshot(net) for net in nets]
    with pytest.warns(UserWarning, match="skipped because its gradient is not finite"):
        assert not steps.apply(result, networks, targets, 0.1)
    for net, old in zip(nets, before, strict=True):
        assert all(th.equal(*pair) for pair in zip(net.parameters(), old, strict=True))
    # It is said once, and counted each time
    assert not steps.apply(result, networks, targets, 0.1)
    assert steps.n_skipped_updates == steps.n_skipped_in_a_row == 2


def test_only_updates_of_all_networks_end_a_row_of_failures():
    networks = {"critic": network(), "actor": network()}
    steps = OptimizerSteps(None, max_skipped_updates=2)

    def apply_all(is_good):
        result = result_of(**networks)
        if not is_good:
            result.gradients["actor"][0][0, 0] = np.nan
        return steps.apply(result, networks, {}, 0.1)

    with pytest.warns(UserWarning, match="skipped"):
        assert not apply_all(False)
    assert not apply_all(False)
    assert steps.apply(result_of(critic=networks["critic"]), networks, {}, 0.1)
    steps.check_skipped(lambda: "the road ends")
    assert not apply_all(False)
    with pytest.raises(FloatingPointError, match=r"after 3 updates in a row .* be saved\). the road ends"):
        steps.check_skipped(lambda: "the road ends")
    assert apply_all(True)
    steps.check_skipped(lambda: "the road ends")
    assert steps.n_skipped_updates == 3
