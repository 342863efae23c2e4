"""Settings that parts of an algorithm own, and settings that ``load`` changes."""

import numpy as np
import pytest
from lq import LinearEnv
from settings import SMALL
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise

from sb3_mpg import MPG
from sb3_mpg.common.settings import SettingOf
from sb3_mpg.common.trust.weighting import make_weighting_rule
from sb3_mpg.common.value_targets import SimulatorTarget


class Part:
    def __init__(self):
        self.size = 3


class Whole:
    size = SettingOf("part")

    def __init__(self):
        self.part = Part()


def test_a_setting_of_a_part_is_read_and_set_through_the_whole():
    whole = Whole()
    assert whole.size == 3
    whole.size = 4
    assert whole.part.size == whole.size == 4
    assert "size" not in vars(whole)
    assert isinstance(Whole.size, SettingOf)
    assert Whole.size.part == "part"


SETTINGS_OF_PARTS = {
    "prior_model": LinearEnv().prior_model(),
    "prior_model_kwargs": {"bias": 0.1},
    "residual": False,
    "residual_kwargs": {"n_members": 3},
    "n_learners": 2,
    "max_staleness": 0,
    "learner_kwargs": {"timeout": 7.0},
    "max_grad_norm": 0.5,
    "max_skipped_updates": 7,
}


def test_all_settings_of_parts_are_tried():
    names = {name for name in dir(MPG) if isinstance(getattr(MPG, name), SettingOf)}
    # What is counted is no setting
    assert {*names, "residual"} - {"n_skipped_updates"} == SETTINGS_OF_PARTS.keys()


@pytest.mark.parametrize("name", SETTINGS_OF_PARTS)
def test_a_setting_goes_to_its_part_from_constructor_attribute_and_load(name, tmp_path):
    value = SETTINGS_OF_PARTS[name]
    part = "model_settings" if name == "residual" else getattr(MPG, name).part
    constructed = MPG("MlpPolicy", LinearEnv(), **SMALL, **{name: value})
    default = MPG("MlpPolicy", LinearEnv(), **SMALL)
    assert getattr(default, name) != value
    default.save(tmp_path / "model.zip")
    # A model that is passed needs no arguments
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv(), **{name: value})
    setattr(default, name, value)
    for model in (constructed, loaded, default):
        assert getattr(model, name) == getattr(getattr(model, part), name) == value
        assert name not in vars(model)


def test_residual_given_to_load_is_followed_by_model_and_trust(tmp_path):
    MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL).learn(60).save(tmp_path / "model.zip")
    corrected, bare = (MPG.load(tmp_path / "model.zip", env=LinearEnv(), residual=residual) for residual in (True, False))
    assert corrected.trust.is_corrected and not bare.trust.is_corrected
    assert bare.trust.in_model(1) == 0.0 < corrected.trust.in_model(1)


def test_another_weighting_rule_is_followed_at_once():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL).learn(60)
    assert model.trust.measurements
    model.weighting_rule = make_weighting_rule("constant", (0, 5), {"values": [1, 3]})
    assert model.update_settings(1).weights == {0: 0.25, 5: 0.75}
    # Measurements of other horizons say nothing about these
    assert model.trust.measurements == []
    assert model.weighting_rule is model.trust.rule


def test_value_target_can_be_changed_at_loading(tmp_path):
    MPG("MlpPolicy", LinearEnv(), **SMALL).save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv(), value_target="n_step_simulator")
    assert isinstance(loaded.value_target, SimulatorTarget)
    loaded.learn(50)


def test_settings_that_load_changes_are_followed(tmp_path):
    path = tmp_path / "model.zip"
    MPG("MlpPolicy", LinearEnv(), compile=True, horizons=(0, 2), **SMALL).learn(30).save(path)

    def load(**kwargs):
        return MPG.load(path, env=LinearEnv(), **kwargs)

    assert load().action_noise._sigma[0] == pytest.approx(0.1)
    assert load(exploration_noise=0.7).action_noise._sigma[0] == pytest.approx(0.7)
    assert load(exploration_noise=0.0).action_noise is None
    smoothed = load(value_target="clipped_double_q", value_target_kwargs={"noise_std": 0.2})
    assert smoothed.value_target.noise_std == 0.2
    uncompiled = load(compile=False).learn(1, reset_num_timesteps=False)
    assert not uncompiled.update.steps.is_compiled

    # A noise of the user's stays, also when it comes together with that of ours, or before
    correlated = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
    both = load(action_noise=correlated, exploration_noise=0.3)
    assert isinstance(both.action_noise, OrnsteinUhlenbeckActionNoise)
    both.save(path)
    assert isinstance(load(exploration_noise=0.5).action_noise, OrnsteinUhlenbeckActionNoise)
