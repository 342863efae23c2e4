"""Network pieces: activations, scaled observations, Fourier features."""

import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import assert_same_parameters
from lq import LinearEnv
from settings import SMALL
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG
from sb3_mpg.common import torch_layers
from sb3_mpg.common.torch_layers import ELU, FadingLayerNorm, ObservationScaler, convert_inputs, first_layer
from sb3_mpg.common.trust.weighting import MeasuredWeighting


@pytest.mark.parametrize("scale", [0.1, 1.0, 200.0])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_elu_is_torchs_and_overwrites_its_input(scale, has_gradient):
    inputs = (scale * th.randn(64, 32)).requires_grad_(has_gradient)
    overwritten = 1.0 * inputs
    outputs = ELU()(overwritten)
    assert outputs.data_ptr() == overwritten.data_ptr()
    assert th.equal(outputs, th.nn.functional.elu(inputs))
    if has_gradient:
        (gradient,) = th.autograd.grad(outputs.sum(), inputs)
        th.testing.assert_close(gradient, th.where(inputs > 0, 1.0, inputs.exp()), rtol=0, atol=2e-7)


class TestObservationScaler:
    space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def test_given_factors(self):
        scaler = ObservationScaler(self.space, [1.0, 2.0, 0.5])
        scaler.fit(100 * th.randn(50, 3))
        th.testing.assert_close(scaler(th.ones(2, 3)), th.tensor([[1.0, 2.0, 0.5]] * 2))

    def test_auto_standardises_whatever_the_unit(self):
        scaler = ObservationScaler(self.space, frequencies=())
        observations = th.randn(1000, 3) * th.tensor([1e5, 1e-4, 0.5]) + th.tensor([3e5, 0.1, 0.0])
        scaler.fit(observations)
        features = scaler(observations)
        th.testing.assert_close(features.mean(dim=0), th.zeros(3), rtol=0, atol=1e-3)
        th.testing.assert_close(features.std(dim=0), th.ones(3), rtol=1e-2, atol=0)

    def test_recorded_values_are_bounded(self):
        scaler = ObservationScaler(self.space, frequencies=())
        observations = th.zeros(1000, 3)
        observations[:, 1] = th.randn(1000)
        observations[7, 0] = -500.0
        scaler.fit(observations)
        features = scaler(observations)
        assert features[:, 0].abs().max().item() == pytest.approx(10.0)
        assert features[:, 1].std().item() == pytest.approx(1.0, rel=1e-2)

    def test_what_never_changed_is_only_shifted(self):
        scaler = ObservationScaler(self.space, frequencies=())
        # Rounding is no change
        observations = th.tensor([1e6, 0.0, 0.3]) * (1 + 1e-7 * th.randn(50, 3))
        scaler.fit(observations)
        assert scaler.scale.tolist() == [1.0, 1.0, 1.0]
        th.testing.assert_close(scaler.shift, observations[0], rtol=1e-6, atol=0)

    def test_observations_that_are_not_finite_do_not_count(self):
        scaler, reference = ObservationScaler(self.space), ObservationScaler(self.space)
        observations = th.randn(100, 3)
        reference.fit(observations)
        scaler.fit(th.cat([observations, th.tensor([[np.nan, 0.0, 0.0], [0.0, np.inf, 0.0]])]))
        assert th.equal(scaler.scale, reference.scale) and th.equal(scaler.shift, reference.shift)
        unfitted = ObservationScaler(self.space)
        unfitted.fit(th.full((5, 3), np.nan))
        assert unfitted.scale.tolist() == [1.0] * 3 and unfitted.shift.tolist() == [0.0] * 3

    def test_when_it_is_fitted(self):
        scaler, inside = ObservationScaler(self.space), th.zeros(1, 3)
        assert scaler.needs_fit(1, inside)
        scaler.fit(th.randn(100, 3))
        assert not scaler.needs_fit(199, inside) and scaler.needs_fit(200, inside)
        # Far outside of the range so far
        outside = scaler.shift + th.tensor([[0.0, -20.0, 0.0]]) / scaler.scale
        assert scaler.needs_fit(101, 1.01 * outside) and not scaler.needs_fit(101, 0.98 * outside)
        assert not scaler.needs_fit(101, th.full((1, 3), np.nan))
        # Never, if the factors are given
        given = ObservationScaler(self.space, [1.0] * 3)
        assert not given.needs_fit(10**6, 100 * outside)
        given.fit(1e3 * th.randn(100, 3))
        assert given.scale.tolist() == [1.0] * 3

    def test_fourier_features_keep_their_units_while_they_count(self):
        scaler, first, second = ObservationScaler(self.space), th.randn(100, 3), 50 * th.randn(200, 3)
        scaler.fit(first)
        before = scaler(first)[:, 3:]
        scaler.fit(second)
        assert th.equal(scaler(first)[:, 3:], before)
        scaler.fourier_scale.fill_(0.0)
        scaler.fit(second)
        assert th.equal(scaler.fourier_unit, scaler.scale) and th.equal(scaler.fourier_shift, scaler.shift)

    def test_fourier_features(self):
        scaler = ObservationScaler(self.space, [1.0, 2.0, 0.5], frequencies=[1.0, 3.0])
        scaled = th.tensor([[1.0, 2.0, 0.5]])
        expected = [scaled, scaled.sin(), scaled.cos(), (3 * scaled).sin(), (3 * scaled).cos()]
        th.testing.assert_close(scaler(th.ones(1, 3)), th.cat(expected, dim=1))
        assert scaler.features_dim == 15
        scaler.fourier_scale.fill_(0.3)
        th.testing.assert_close(scaler(th.ones(1, 3)), th.cat([scaled, *(0.3 * feature for feature in expected[1:])], dim=1))
        assert ObservationScaler(self.space).features_dim == 21
        assert ObservationScaler(self.space, frequencies=()).features_dim == 3

    def test_fourier_features_fade_and_come_back(self, monkeypatch):
        monkeypatch.setattr(torch_layers, "N_FADING_UPDATES", 10)
        scaler, given = ObservationScaler(self.space), ObservationScaler(self.space, [1.0] * 3)
        for is_trusted, n_updates, expected in (
            (True, 3, 1.0),
            (False, 5, 0.5),
            (True, 4, 0.9),
            (True, 9, 1.0),
            (False, 12, 0.0),
            (True, 2, 0.2),
        ):
            for _ in range(n_updates):
                scaler.fade(is_trusted)
                given.fade(is_trusted)
            assert scaler.fourier_scale.item() == pytest.approx(expected)
        # Without Fourier features there is nothing to fade
        assert given.fourier_scale == 1
        for is_trusted in (True, False):
            scaler.fade(is_trusted, at_once=True)
            assert scaler.fourier_scale == is_trusted

    def test_fourier_features_and_normalisation_fade_while_no_model_is_trusted(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch_layers, "N_FADING_UPDATES", 10)

        def shares(model):
            """Of the extractors of policies and critics, and of the hidden layers of the critics."""
            modules = [*model.policy.modules()]
            scales = [module.fourier_scale.item() for module in modules if isinstance(module, ObservationScaler)]
            of_norms = [module.share.item() for module in modules if isinstance(module, FadingLayerNorm)]
            assert (len(scales), len(of_norms)) == (4, 4)
            return scales + of_norms

        def trained(n_updates, **kwargs):
            return MPG("MlpPolicy", LinearEnv(), **SMALL, **kwargs).learn(40 + n_updates)

        # There are none without a model
        model = trained(1, horizons=(0,), weighting="constant")
        assert shares(model) == [0.0] * 8
        model.save(tmp_path / "model.zip")
        assert shares(MPG.load(tmp_path / "model.zip")) == [0.0] * 8
        # Without measured errors, a model that is used is trusted
        assert shares(trained(20, horizons=(0, 2), weighting="rule_based", residual=False)) == [1.0] * 8

        # With them, a model is trusted that has half of the weight
        for weight, expected in ((0.6, 1.0), (0.4, 0.5)):
            rule = MeasuredWeighting((0, 2))
            weights = np.array([1 - weight, weight])
            monkeypatch.setattr(rule, "weights", lambda n_updates, weights=weights: weights)
            assert shares(trained(5, horizons=(0, 2), weighting=rule)) == pytest.approx([expected] * 8)

    def test_every_network_gets_the_same_fit_and_keeps_it_until_the_data_have_doubled(self, tmp_path):
        model = MPG("MlpPolicy", "PathTracking-v0", **SMALL).learn(50)
        scalers = [module for module in model.policy.modules() if isinstance(module, ObservationScaler)]
        assert len(scalers) == 4
        for scaler in scalers:
            assert scaler.scale[5] < 0.1 and scaler.n_fitted == 41
            assert th.equal(scaler.scale, scalers[0].scale)
        before = scalers[0].scale.clone()
        model.learn(20, reset_num_timesteps=False)
        assert th.equal(before, scalers[0].scale)
        model.learn(20, reset_num_timesteps=False)
        for scaler in scalers:
            assert scaler.n_fitted == 82
            assert th.equal(scaler.scale, scalers[0].scale)
        stored = th.as_tensor(model.replay_buffer.observations[:82, 0])
        th.testing.assert_close(scalers[0].shift, stored.mean(dim=0))
        model.save(tmp_path / "model.zip")
        assert th.equal(MPG.load(tmp_path / "model.zip").actor.features_extractor.scale, scalers[0].scale)

    def test_copied_parameters_keep_their_scales(self):
        trained = MPG("MlpPolicy", "PathTracking-v0", **SMALL).learn(50)
        warm = MPG("MlpPolicy", "PathTracking-v0", **SMALL)
        warm.set_parameters(trained.get_parameters())
        observations = np.stack([warm.observation_space.sample() for _ in range(5)])
        # One update, of the critics alone
        warm.learn(41)
        assert warm._n_updates == 1
        np.testing.assert_array_equal(*(model.predict(observations, deterministic=True)[0] for model in (warm, trained)))

    def test_scales_that_were_changed_from_outside_are_not_fitted_again(self):
        """As evolution strategies change them, which know nothing of the meaning of a buffer."""
        scaler = ObservationScaler(self.space)
        scaler.load_state_dict({name: tensor - 0.5 for name, tensor in scaler.state_dict().items()})
        scaler.fit(100 * th.randn(50, 3))
        assert (scaler.scale == 0.5).all() and (scaler.shift == -0.5).all() and not scaler.needs_fit(50, th.zeros(1, 3))

    def test_it_is_fitted_to_what_the_networks_see(self):
        env = VecNormalize(make_vec_env("PathTracking-v0", 1, seed=0))
        model = MPG("MlpPolicy", env, **SMALL).learn(41)
        scaler = model.actor.features_extractor
        stored = model.replay_buffer.observations[:41, 0]
        # Statistics move on with each step
        seen = (stored - env.obs_rms.mean) / np.sqrt(env.obs_rms.var + env.epsilon)
        spread = np.maximum(seen.std(axis=0), np.abs(seen - seen.mean(axis=0)).max(axis=0) / 10)
        assert (stored.std(axis=0) > 2).any() and spread.max() < 1.2
        np.testing.assert_allclose(scaler.scale, 1 / spread, rtol=1e-3)
        np.testing.assert_allclose(scaler.shift, seen.mean(axis=0), atol=1e-5)

    def test_wrong_number_of_factors(self):
        with pytest.raises(ValueError, match="each of the 3 elements"):
            ObservationScaler(self.space, [1.0])
        with pytest.raises(ValueError, match="must be 'auto'"):
            ObservationScaler(self.space, "big")


class TestConvertInputs:
    factors = th.tensor([0.01, 5.0], dtype=th.float64)
    offsets = th.tensor([3.0, -0.5], dtype=th.float64)

    def in_new_units(self, inputs, offsets):
        return th.cat([((inputs[:, :2] - offsets) / self.factors).float(), inputs[:, 2:]], dim=1)

    def test_outputs_do_not_change(self):
        layer, inputs = th.nn.Linear(3, 4), th.randn(16, 3)
        converted = copy.deepcopy(layer)
        convert_inputs(converted, self.factors, self.offsets)
        assert not th.allclose(converted(inputs), layer(inputs), atol=0.1)
        th.testing.assert_close(converted(self.in_new_units(inputs, self.offsets)), layer(inputs), rtol=0, atol=1e-5)

    def both_ways(self, optimizer_class, offsets, **kwargs):
        """
        The state of an optimizer that is converted after some gradients, and of one that had the new units from the start.
        Without steps, so that both layers compute the same.
        """
        states, inputs = [], th.randn(5, 8, 3)
        first = th.nn.Linear(3, 4)
        for converts_first in (False, True):
            layer = copy.deepcopy(first)
            optimizer = optimizer_class(layer.parameters(), lr=0.0, **kwargs)
            if converts_first:
                convert_inputs(layer, self.factors, offsets, optimizer)
            for batch in inputs:
                optimizer.zero_grad()
                layer(self.in_new_units(batch, offsets) if converts_first else batch).square().sum().backward()
                optimizer.step()
            if not converts_first:
                convert_inputs(layer, self.factors, offsets, optimizer)
            states.append((optimizer.state.get(layer.weight), optimizer.state.get(layer.bias)))
        return states

    @pytest.mark.parametrize(
        ("optimizer_class", "kwargs", "name"),
        [(th.optim.SGD, {"momentum": 0.9}, "momentum_buffer"), (th.optim.Adam, {"fused": True}, "exp_avg")],
    )
    def test_running_means_of_gradients(self, optimizer_class, kwargs, name):
        (weight, bias), (expected_weight, expected_bias) = self.both_ways(optimizer_class, self.offsets, **kwargs)
        th.testing.assert_close(weight[name], expected_weight[name], rtol=1e-3, atol=1e-4)
        th.testing.assert_close(bias[name], expected_bias[name])

    def test_running_means_of_squares(self):
        no_offsets = th.zeros(2, dtype=th.float64)
        (weight, bias), (expected, expected_bias) = self.both_ways(th.optim.Adam, no_offsets, amsgrad=True)
        assert weight["step"] == 5
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            th.testing.assert_close(weight[name], expected[name])
            th.testing.assert_close(bias[name], expected_bias[name])
        # With other shifts, the gradients of the bias add to them
        layer = th.nn.Linear(3, 1)
        optimizer = th.optim.Adam(layer.parameters())
        layer(th.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.state[layer.weight]["exp_avg_sq"].fill_(2.0)
        optimizer.state[layer.bias]["exp_avg_sq"].fill_(3.0)
        convert_inputs(layer, self.factors, self.offsets, optimizer)
        squares = optimizer.state[layer.weight]["exp_avg_sq"]
        th.testing.assert_close(squares, th.tensor([[(2 + 9 * 3) / 0.01**2, (2 + 0.25 * 3) / 25, 2.0]]))

    def test_other_states_are_forgotten(self):
        (weight, bias), _ = self.both_ways(th.optim.Adagrad, self.offsets)
        assert weight is None and bias is None


@pytest.mark.parametrize("net_arch", [[], [16, 8]])
@pytest.mark.parametrize("fourier_scale", [1.0, 0.0])
def test_networks_compute_the_same_with_new_scales(net_arch, fourier_scale):
    settings = {**SMALL, "policy_kwargs": {"net_arch": net_arch}}
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0,), weighting="constant", **settings).learn(60)
    # Layer normalisation amplifies rounding
    policy = model.policy.double()
    observations, actions = th.randn(20, 2, dtype=th.float64), th.rand(20, 1, dtype=th.float64)
    for scaler in model.update.observation_scalers:
        scaler.fourier_scale.fill_(fourier_scale)

    @th.no_grad()
    def outputs():
        critics = (policy.critic, policy.critic_target)
        values = [value for critic in critics for value in critic(observations, actions)]
        return th.cat([policy.actor(observations), policy.actor_target(observations), *values])

    before, scale = outputs(), policy.actor.features_extractor.scale.clone()
    recorded = th.tensor([20.0, 0.01]) * th.randn(500, 2) + th.tensor([-10.0, 1.0])
    policy.fit_scales(recorded.double())
    factors = policy.actor.features_extractor.scale / scale
    assert factors[0] < 0.2 and factors[1] > 2
    th.testing.assert_close(outputs(), before, rtol=1e-7, atol=1e-7)


def test_extractors_with_scaled_parts_are_fitted_once():
    """What they compute from scaled observations is unknown."""

    class Squares(ObservationScaler):
        def forward(self, observations):
            return super().forward(observations).square()

    policy_kwargs = {"net_arch": [16], "features_extractor_class": Squares}
    model = MPG("MlpPolicy", LinearEnv(), **{**SMALL, "policy_kwargs": policy_kwargs}).learn(45)
    scaler = model.actor.features_extractor
    before = scaler.scale.clone()
    assert (before != 1).all()
    model.learn(50, reset_num_timesteps=False)
    assert th.equal(scaler.scale, before)


def test_scales_change_in_a_continued_training_as_without_interruption(tmp_path):
    def second_half(model):
        model.env.seed(7)
        model._last_obs = None
        return model.learn(30, reset_num_timesteps=False)

    model = MPG("MlpPolicy", LinearEnv(noise=0.1), horizons=(0, 2), **SMALL).learn(70)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    uninterrupted = second_half(model)
    resumed = MPG.load(tmp_path / "model.zip", env=LinearEnv(noise=0.1))
    resumed.load_replay_buffer(tmp_path / "buffer.pkl")
    assert resumed.actor.features_extractor.n_fitted == 41
    second_half(resumed)
    assert resumed.actor.features_extractor.n_fitted == 82
    assert_same_parameters(uninterrupted, resumed)
    optimizers = [model.critic.optimizer.state_dict()["state"] for model in (uninterrupted, resumed)]
    for ours, other in zip(*(optimizer.values() for optimizer in optimizers), strict=True):
        assert all(th.equal(ours[name], other[name]) for name in ours)


@pytest.mark.usefixtures("nothing_is_left")
def test_learners_follow_the_scales():
    def trained(**kwargs):
        return MPG("MlpPolicy", LinearEnv(noise=0.1), horizons=(0, 2), **SMALL, **kwargs).learn(100)

    in_process, in_learner = trained(), trained(n_learners=1, max_staleness=0)
    assert in_learner.actor.features_extractor.n_fitted == 82
    assert_same_parameters(in_process, in_learner)


@pytest.mark.parametrize("network", [th.nn.Linear(3, 2), th.nn.Sequential(th.nn.Linear(3, 2), th.nn.Tanh())])
def test_first_layers(network):
    assert isinstance(first_layer(network), th.nn.Linear)
    assert first_layer(th.nn.Sequential()) is not None and isinstance(first_layer(ELU()), ELU)
