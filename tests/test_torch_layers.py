"""Network pieces: activations, scaled observations, Fourier features."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from lq import LinearEnv
from settings import SMALL
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG
from sb3_mpg.common import torch_layers
from sb3_mpg.common.torch_layers import ELU, ObservationScaler
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

    def test_auto_shrinks_and_never_stretches(self):
        scaler = ObservationScaler(self.space)
        observations = th.randn(1000, 3) * th.tensor([100.0, 1e-3, 0.5]) + th.tensor([300.0, 1.0, 0.0])
        scaler.fit(observations)
        features = scaler(observations)
        assert features[:, 0].std().item() == pytest.approx(1, rel=0.01)
        assert features[:, 0].mean().abs() < 1e-3
        th.testing.assert_close(features[:, 1:3], observations[:, 1:])

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
            (False, 9, 0.3),
        ):
            for _ in range(n_updates):
                scaler.fade(is_trusted)
                given.fade(is_trusted)
            assert scaler.fourier_scale.item() == pytest.approx(expected)
        # Without Fourier features there is nothing to fade
        assert given.fourier_scale == 1

    def test_fourier_features_fade_while_no_model_is_trusted(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch_layers, "N_FADING_UPDATES", 10)

        def fourier_scales(model):
            scalers = [module for module in model.policy.modules() if isinstance(module, ObservationScaler)]
            assert len(scalers) == 4
            return [scaler.fourier_scale.item() for scaler in scalers]

        def trained(n_updates, **kwargs):
            return MPG("MlpPolicy", LinearEnv(), **SMALL, **kwargs).learn(40 + n_updates)

        assert fourier_scales(trained(4, horizons=(0,), weighting="constant")) == pytest.approx([0.6] * 4)
        model = trained(20, horizons=(0,), weighting="constant")
        assert fourier_scales(model) == pytest.approx([0.3] * 4)
        model.save(tmp_path / "model.zip")
        assert fourier_scales(MPG.load(tmp_path / "model.zip")) == pytest.approx([0.3] * 4)
        # Without measured errors, a model that is used is trusted
        assert fourier_scales(trained(20, horizons=(0, 2), weighting="rule_based", residual=False)) == [1.0] * 4

        # With them, a model is trusted that has half of the weight
        for weight, expected in ((0.6, 1.0), (0.4, 0.5)):
            rule = MeasuredWeighting((0, 2))
            weights = np.array([1 - weight, weight])
            monkeypatch.setattr(rule, "weights", lambda n_updates, weights=weights: weights)
            assert fourier_scales(trained(5, horizons=(0, 2), weighting=rule)) == pytest.approx([expected] * 4)

    def test_every_network_gets_the_same_fit_and_keeps_it(self, tmp_path):
        model = MPG("MlpPolicy", "PathTracking-v0", **SMALL).learn(50)
        scalers = [module for module in model.policy.modules() if isinstance(module, ObservationScaler)]
        assert len(scalers) == 4
        for scaler in scalers:
            assert scaler.scale[5] < 0.1
            assert th.equal(scaler.scale, scalers[0].scale)
        before = scalers[0].scale.clone()
        model.learn(20, reset_num_timesteps=False)
        assert th.equal(before, scalers[0].scale)
        model.save(tmp_path / "model.zip")
        assert th.equal(MPG.load(tmp_path / "model.zip").actor.features_extractor.scale, before)

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
        assert (scaler.scale == 0.5).all() and (scaler.shift == -0.5).all()

    def test_it_is_fitted_to_what_the_networks_see(self):
        env = VecNormalize(make_vec_env("PathTracking-v0", 1, seed=0))
        model = MPG("MlpPolicy", env, **SMALL).learn(41)
        scaler = model.actor.features_extractor
        stored = model.replay_buffer.observations[:41, 0]
        # Statistics move on with each step
        seen = (stored - env.obs_rms.mean) / np.sqrt(env.obs_rms.var + env.epsilon)
        std = seen.std(axis=0)
        assert (stored.std(axis=0) > 2).any() and std.max() < 1.2
        np.testing.assert_allclose(scaler.scale, np.where(std > 1, 1 / std, 1), rtol=1e-3)

    def test_wrong_number_of_factors(self):
        with pytest.raises(ValueError, match="each of the 3 elements"):
            ObservationScaler(self.space, [1.0])
        with pytest.raises(ValueError, match="must be 'auto'"):
            ObservationScaler(self.space, "big")
