"""Files of algorithms that were trained with objects of a user's module, loaded where that module is missing."""

import importlib
import sys
import warnings
import zipfile

import numpy as np
import pytest
from helpers import assert_same_parameters
from lq import LinearEnv
from settings import SMALL
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_mpg import MPG
from sb3_mpg.common.saved_object import SavedObject
from sb3_mpg.common.trust.weighting import make_weighting_rule

pytestmark = pytest.mark.usefixtures("models_are_fitted_once")

MODULE = """
import numpy as np
from lq import LinearEnv, LinearModel
from models import LearnedDynamics
from stable_baselines3.common.noise import NormalActionNoise
from sb3_mpg.common.trust.weighting import WeightingRule
from sb3_mpg.common.value_targets import ReplayTarget

class Car(LinearModel):
    def __init__(self):
        prior = LinearEnv().prior_model()
        super().__init__(prior.a, prior.b, prior.q, prior.r)

class Bias:
    __array_ufunc__ = None

    def __radd__(self, other):
        return other + 0.1

class Learned(LearnedDynamics):
    def __init__(self):
        super().__init__(n_actions=1, net_arch=(8,))

    def learned_state(self):
        return {**super().learned_state(), "of_mine": Bias()}

class Rule(WeightingRule):
    needs_errors = True

    def weights(self, n_updates):
        return np.full(len(self.horizons), 1 / len(self.horizons))

class Target(ReplayTarget):
    pass

class Noise(NormalActionNoise):
    pass

class Count(np.int64):
    def __reduce__(self):
        return Count, (int(self),)

def schedule(progress):
    return 1e-3 * progress
"""
SETTINGS = {**SMALL, "policy_kwargs": {"net_arch": [8]}, "batch_size": 16, "horizons": (0, 2)}
OBSERVATION = np.array([0.3, -0.2], dtype=np.float32)
OTHER = LinearEnv().prior_model(0.01)
# The constructor's argument of the user's module, the setting that is missing afterwards, and what may replace it
KINDS = {
    "class": (lambda mine: {"prior_model": mine.Car}, "prior_model", {"prior_model": OTHER}),
    "instance": (lambda mine: {"prior_model": mine.Car()}, "prior_model", {"prior_model": OTHER}),
    "path": (lambda mine: {"prior_model": "my_car:Car"}, "prior_model", {"prior_model": "auto"}),
    "learned": (lambda mine: {"prior_model": mine.Learned()}, "prior_model", {"prior_model": OTHER}),
    "model_kwargs": (
        lambda mine: {"prior_model_kwargs": {"bias": mine.Bias()}},
        "prior_model_kwargs",
        {"prior_model_kwargs": None},
    ),
    "residual_kwargs": (
        lambda mine: {"residual_kwargs": {"net_arch": (8,), "n_members": mine.Count(2)}},
        "residual_kwargs",
        {"residual_kwargs": None},
    ),
    "rule": (
        lambda mine: {"weighting": mine.Rule((0, 2))},
        "weighting_rule",
        {"weighting_rule": make_weighting_rule("constant", (0, 2))},
    ),
    "target": (lambda mine: {"value_target": mine.Target(2)}, "value_target", {"value_target": "clipped_double_q"}),
    "noise": (lambda mine: {"action_noise": mine.Noise(np.zeros(1), np.ones(1))}, "action_noise", {"action_noise": None}),
    "schedule": (lambda mine: {"critic_learning_rate": mine.schedule}, "critic_learning_rate", {"critic_learning_rate": 1e-3}),
}
OF_MODEL = ("prior_model", "prior_model_kwargs", "residual_kwargs", "weighting_rule")


class Somewhere:
    """Where a user's module is found, or not any more."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        (folder / "my_car.py").write_text(MODULE)

    def has_module(self, is_there):
        sys.modules.pop("my_car", None)
        importlib.invalidate_caches()
        path = [entry for entry in sys.path if entry != str(self.folder)]
        self.monkeypatch.setattr(sys, "path", [str(self.folder), *path] if is_there else path)
        return importlib.import_module("my_car") if is_there else None


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    yield Somewhere(tmp_path, monkeypatch)
    sys.modules.pop("my_car", None)


def trained(kwargs):
    return MPG("MlpPolicy", LinearEnv(), **{**SETTINGS, **kwargs}).learn(60)


def refused(name):
    return pytest.raises(ValueError, match=rf"needs the `{name}` of the loaded file.*my_car.*pass `{name}=` to `load`")


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_module_it_predicts_and_nothing_is_lost(kind, somewhere, tmp_path):
    arguments, name, replacement = KINDS[kind]
    model = trained(arguments(somewhere.has_module(True)))
    action = model.predict(OBSERVATION, deterministic=True)[0]
    path, again = tmp_path / "model.zip", tmp_path / "again.zip"
    model.save(path)
    somewhere.has_module(False)
    for env in (None, LinearEnv()):
        loaded = MPG.load(path, env=env)
        np.testing.assert_array_equal(loaded.predict(OBSERVATION, deterministic=True)[0], action)
        loaded.set_parameters(path)
        assert loaded.get_parameters().keys() == model.get_parameters().keys()
        if env is None:
            with refused(name):
                loaded.learn(10)
            loaded.set_env(make_vec_env(LinearEnv, 1))
        with refused(name):
            loaded.learn(10)
        if name in OF_MODEL:
            with refused(name):
                loaded.trust_report()
            with refused(name):
                loaded.policy_gradient(OBSERVATION[None], 1)
            with refused(name):
                loaded.export_onnx(tmp_path / "model.onnx", "model")
        assert loaded._n_updates == model._n_updates
        loaded.save(again)

    # Something else may be given
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="What was learned of another model is forgotten")
        replaced = [MPG.load(path, env=LinearEnv(), **replacement), MPG.load(path, custom_objects=replacement)]
        replaced[1].set_env(make_vec_env(LinearEnv, 1))
    for loaded in replaced:
        assert loaded.learn(60, reset_num_timesteps=False)._n_updates == 20 + 60

    # All that was saved is still there
    somewhere.has_module(True)
    loaded, original = MPG.load(again, env=LinearEnv()), MPG.load(path, env=LinearEnv())
    assert type(getattr(loaded, name)) is type(getattr(original, name))
    for restored in (loaded, original):
        restored.env.seed(3)
        restored.learn(60, reset_num_timesteps=False)
    assert_same_parameters(loaded, original)
    assert len(loaded.trust.measurements) == len(original.trust.measurements) > 0


def test_a_model_may_be_given_after_loading(somewhere, tmp_path):
    kwargs = {"residual": False, "weighting": "constant"}
    trained({"prior_model": somewhere.has_module(True).Car, **kwargs}).save(tmp_path / "model")
    somewhere.has_module(False)
    loaded = MPG.load(tmp_path / "model", env=LinearEnv())
    assert loaded.rollout_model is None and "No module named 'my_car'" in repr(loaded.prior_model)
    loaded.prior_model = OTHER
    loaded.set_env(loaded.get_env())
    assert loaded.rollout_model is OTHER
    assert loaded.learn(60)._n_updates == 40


def test_a_class_that_its_module_no_longer_has(somewhere, tmp_path):
    trained({"prior_model": somewhere.has_module(True).Car}).save(tmp_path / "model")
    (tmp_path / "my_car.py").write_text(MODULE.replace("class Car", "class Lorry"))
    somewhere.has_module(True)
    loaded = MPG.load(tmp_path / "model", env=LinearEnv())
    assert loaded.predict(OBSERVATION)[0].shape == (1,)
    with pytest.raises(ValueError, match=r"needs the `prior_model` of the loaded file.*Can't get attribute 'Car'"):
        loaded.learn(10)


def test_files_hold_plain_settings_as_they_are_and_others_once(tmp_path):
    MPG("MlpPolicy", LinearEnv(), prior_model_kwargs={"bias": 0.1}, **SETTINGS).save(tmp_path / "plain")
    data, _, _ = load_from_zip_file(tmp_path / "plain")
    assert data["prior_model"] == "auto" and data["prior_model_kwargs"] == {"bias": 0.1}
    assert isinstance(data["weighting_rule"], SavedObject) and data["weighting_rule"].opened().horizons == (0, 2)
    MPG("MlpPolicy", LinearEnv(), prior_model=LinearEnv().prior_model(), **SETTINGS).save(tmp_path / "object")
    sizes = [len(zipfile.ZipFile(tmp_path / name).read("data")) for name in ("plain.zip", "object.zip")]
    assert sizes[1] - sizes[0] < 1.5 * len(SavedObject.of(LinearEnv().prior_model()).content)


def test_training_without_an_environment_is_refused(tmp_path):
    MPG("MlpPolicy", LinearEnv(), **SETTINGS).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"Training needs an environment.*`env=`.*`set_env`"):
        MPG.load(tmp_path / "model").learn(10)
