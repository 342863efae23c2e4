"""Ensembles of networks."""

import copy

import pytest
import torch as th
from models import batch_of, truth
from torch.nn import functional as F

from sb3_mpg.common.models.ensemble import EnsembleLinear, NetworkEnsemble, even_rows, values_of_rows
from sb3_mpg.common.torch_layers import fourier_features


def test_rows_come_out_even():
    rows = th.arange(14.0).reshape(7, 2)
    assert even_rows(rows, 7) is rows
    assert even_rows(rows, 3)[:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 12, 12]
    assert even_rows(rows[:1], 4)[:, 0].tolist() == [0, 0, 0, 0]


def test_the_value_of_a_row_is_that_of_its_member():
    values = th.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    assert values_of_rows(values, 7, "dealt").tolist() == [[1], [1], [1], [2], [2], [2], [3]]
    assert values_of_rows(values, 2, "dealt").tolist() == [[1], [2]]
    assert values_of_rows(values, 2, "mean").tolist() == [[2], [2]]


def test_layers_side_by_side_are_linear_layers():
    layers, inputs = EnsembleLinear(3, 5, 2), th.randn(3, 7, 5)
    outputs = layers(inputs)
    for member in range(3):
        expected = F.linear(inputs[member], layers.weight[member].T, layers.bias[member, 0])
        th.testing.assert_close(outputs[member], expected)
    # Initialised as those of torch are
    many = EnsembleLinear(200, 25, 40)
    for parameter in many.parameters():
        assert 0.19 < parameter.abs().max() <= 0.2
        assert parameter.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.05)


def test_outputs_are_zero_at_first():
    networks = NetworkEnsemble(2, 4, 3, (16,), 1e-3)
    for is_fitting in (True, False):
        assert not networks(th.randn(6, 4), "dealt", is_fitting).any()


def test_rows_are_dealt_to_the_members():
    networks, inputs = NetworkEnsemble(3, 4, 2, (16, 16), 1e-3), th.randn(7, 4)
    for parameter in networks.average.parameters():
        parameter.copy_(th.randn_like(parameter))

    def member(index):
        values = fourier_features(inputs)
        for layer in networks.average:
            if isinstance(layer, EnsembleLinear):
                values = values @ layer.weight[index] + layer.bias[index]
            else:
                values = layer(values)
        return values

    of_members = [member(index) for index in range(3)]
    expected = th.cat([of_members[0][:3], of_members[1][3:6], of_members[2][6:]])
    th.testing.assert_close(networks(inputs, "dealt"), expected, rtol=1e-4, atol=1e-4)
    th.testing.assert_close(networks(inputs, "mean"), sum(of_members) / 3, rtol=1e-4, atol=1e-4)


def loss_of(networks, data):
    inputs = th.cat([data.observations, data.actions], dim=1)
    return F.mse_loss(networks(inputs, "dealt", is_fitting=True), data.next_observations)


def test_predictions_are_those_of_averaged_networks():
    networks, data = NetworkEnsemble(2, 4, 2, (64, 64), 1e-3), truth(512)
    history = []
    for step in range(1, 61):
        networks.descend(loss_of(networks, data))
        history.append([parameter.detach().clone() for parameter in networks.fitted.parameters()])
        if step == 50:
            # So far all steps have the same weight
            for parameter, *others in zip(networks.average.parameters(), *history, strict=True):
                th.testing.assert_close(parameter, th.stack(others).mean(0), rtol=1e-4, atol=1e-6)
                assert not parameter.requires_grad
            before = [parameter.clone() for parameter in networks.average.parameters()]
    for parameter, old, *new in zip(networks.average.parameters(), before, *history[50:], strict=True):
        for other in new:
            old = old + 0.02 * (other - old)
        th.testing.assert_close(parameter, old, rtol=1e-4, atol=1e-6)


def test_members_that_see_the_same_rows_still_differ():
    """They are initialised differently, so their difference shows what the data leave open."""
    networks, data = NetworkEnsemble(2, 4, 2, (32,), 3e-3), truth(256)
    twice = type(data)(*(th.cat([tensor, tensor]) for tensor in data))
    for _ in range(200):
        networks.descend(loss_of(networks, twice))
    beyond = 10 * th.cat([data.observations, data.actions], dim=1)
    for inputs, low, high in ((beyond / 10, 0.0, 0.2), (beyond, 0.2, float("inf"))):
        first, second = networks(th.cat([inputs, inputs]), "dealt").chunk(2)
        assert low < (first - second).square().mean().sqrt() < high


def test_it_starts_again_when_its_outputs_are_reset():
    networks, data = NetworkEnsemble(2, 4, 2, (32,), 3e-3), truth(256)
    first = loss_of(networks, data).item()
    for step in range(20):
        networks.descend(loss_of(networks, batch_of(data, 64, step)))
    assert networks.optimizer.state and int(networks.n_fits) == 20
    networks.reset_outputs()
    assert not networks.optimizer.state and int(networks.n_fits) == 0
    assert loss_of(networks, data).item() == first
    assert not networks(th.randn(5, 4), "mean").any()
    networks.descend(loss_of(networks, data))
    # The average has forgotten what was before
    for average, fitted in zip(networks.average.parameters(), networks.fitted.parameters(), strict=True):
        assert th.equal(average, fitted)


def test_the_state_of_the_optimizer_goes_where_the_parameters_go():
    networks = NetworkEnsemble(2, 3, 1, (8,), 1e-2)

    def fit():
        inputs = th.ones(4, 3, dtype=networks.fitted[0].weight.dtype)
        networks.descend(networks(inputs, "dealt", is_fitting=True).sub(1.0).square().mean())

    fit()
    copied = copy.deepcopy(networks).double()
    assert {state["exp_avg"].dtype for state in copied.optimizer.state.values()} == {th.float64}
    assert {state["exp_avg"].dtype for state in networks.optimizer.state.values()} == {th.float32}
    assert {state["step"].dtype for state in copied.optimizer.state.values()} == {th.float32}
    # It goes on learning there, from the same moments
    fit()
    expected, networks = networks, copied
    fit()
    for ours, theirs in zip(copied.fitted.parameters(), expected.fitted.parameters(), strict=True):
        th.testing.assert_close(ours.float(), theirs)


class TestSampled:
    def networks(self):
        networks = NetworkEnsemble(3, 4, 2, (16,), 1e-3, frequencies=())
        for parameter in networks.average.parameters():
            parameter.copy_(th.randn_like(parameter))
        return networks

    def test_each_row_is_predicted_by_a_member_that_is_drawn(self):
        networks, inputs = self.networks(), th.randn(9, 4)
        of_members = [networks(th.cat([inputs] * 3), "dealt")[9 * index : 9 * (index + 1)] for index in range(3)]
        drawn = [networks(inputs, "sampled") for _ in range(20)]
        for outputs in drawn:
            members = [[th.allclose(outputs[row], of[row], atol=1e-5) for of in of_members].index(True) for row in range(9)]
            assert sorted(members) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        # Anew in each call
        assert not th.allclose(drawn[0], drawn[1])

    def test_its_gradient_reaches_the_inputs_of_the_same_rows(self):
        networks, inputs = self.networks(), th.randn(7, 4, requires_grad=True)
        outputs = networks(inputs, "sampled")
        (gradient,) = th.autograd.grad(outputs[2].sum(), inputs)
        assert gradient[2].abs().sum() > 0 and gradient[[0, 1, 3, 4, 5, 6]].abs().sum() == 0


def test_the_outputs_of_all_that_are_fitted():
    networks = NetworkEnsemble(2, 4, 3, (16,), 1e-3, n_spares=2)
    for parameter in networks.fitted.parameters():
        parameter.data = th.randn_like(parameter)
    inputs = th.randn(5, 4)
    of_all = networks.of_all(inputs)
    assert of_all.shape == (4, 5, 3)
    th.testing.assert_close(
        of_all.flatten(0, 1), networks(th.cat([inputs] * 4), "dealt", is_fitting=True), atol=1e-4, rtol=1e-4
    )
    # Spares do not predict
    assert all(len(parameter) == 2 for parameter in networks.average.parameters())


def test_the_average_follows_the_elites():
    networks, data = NetworkEnsemble(1, 4, 2, (8,), 1e-2, n_spares=2), truth(64)
    networks.keep_best(th.tensor([3.0, 2.0, 1.0]))
    networks.restore_best()
    assert networks.elites.tolist() == [2]
    networks.n_fits.zero_()
    networks.descend(loss_of(networks, data))
    for average, fitted in zip(networks.average.parameters(), networks.fitted.parameters(), strict=True):
        # The first step of a plain mean
        th.testing.assert_close(average[0], fitted[2])
