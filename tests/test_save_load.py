"""What is saved, what is loaded, and what may be changed at loading."""

import errno
import io
import threading
from pathlib import Path

import numpy as np
import pytest
from lq import LinearEnv
from settings import SMALL
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.trust.weighting import make_weighting_rule


def test_load_with_another_prior_model(tmp_path):
    MPG("MlpPolicy", LinearEnv(), **SMALL).save(tmp_path / "model.zip")
    other = LinearEnv().prior_model(0.5)
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv(), prior_model=other)
    assert loaded.rollout_model.prior is other


def test_load_without_environment_predicts_and_then_asks_for_one(tmp_path):
    MPG("MlpPolicy", LinearEnv(), **SMALL).learn(50).save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip")
    assert loaded.rollout_model is None
    with pytest.raises(ValueError, match=r"give the algorithm an environment first \(`set_env`\)"):
        loaded.policy_gradient(np.zeros((1, 2)), 3)
    assert loaded.predict(np.zeros(2, dtype=np.float32))[0].shape == (1,)
    loaded.set_env(DummyVecEnv([LinearEnv]))
    assert isinstance(loaded.rollout_model, PriorModel)
    assert loaded.learn(60)._n_updates == 10 + 20


def test_load_with_another_number_of_environments(tmp_path):
    MPG("MlpPolicy", make_vec_env(LinearEnv, 2), **SMALL).learn(80).save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip", env=make_vec_env(LinearEnv, 3))
    loaded.learn(90)
    assert loaded.action_noise().shape == (3, 1)


def test_batches_are_reused_as_often_as_load_says(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), batch_reuse=4, **SMALL)
    for batch_reuse in (1, 10, 2):
        model.learn(47, reset_num_timesteps=False).save(tmp_path / "model.zip")
        model = MPG.load(tmp_path / "model.zip", env=LinearEnv(), batch_reuse=batch_reuse)
    model.learn(47, reset_num_timesteps=False)
    assert len(model.update.batches.state(2)["batches"]) == 2


def test_the_replay_buffer_follows_the_value_target(tmp_path):
    path, buffer = tmp_path / "model.zip", tmp_path / "buffer.pkl"
    MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL).learn(30).save(path)

    def n_steps_of(**kwargs):
        """Saved again each time, as the next one finds it."""
        model = MPG.load(path, env=LinearEnv(), **kwargs)
        model.save(path)
        model.save_replay_buffer(buffer)
        return getattr(model.replay_buffer, "n_steps", 1)

    assert n_steps_of() == 1
    assert n_steps_of(value_target="n_step_replay") == n_steps_of() == 25
    assert n_steps_of(value_target="n_step_replay", value_target_kwargs={"n_steps": 5}) == n_steps_of() == 5
    assert n_steps_of(value_target="clipped_double_q") == n_steps_of() == 1

    model = MPG("MlpPolicy", LinearEnv(), value_target="n_step_replay", horizons=(0, 2), **SMALL)
    with pytest.raises(ValueError, match=r"spans 25 recorded steps.*made for n_steps=1.*fits the settings"):
        model.load_replay_buffer(buffer)
    MPG("MlpPolicy", "PathTracking-v0", **SMALL).save_replay_buffer(buffer)
    with pytest.raises(ValueError, match=r"observation_space of the replay buffer has the shape \(6,\)"):
        model.load_replay_buffer(buffer)


def test_a_report_under_other_horizons_than_those_that_were_measured(tmp_path):
    MPG("MlpPolicy", LinearEnv(), horizons=(0, 5), **SMALL).learn(80).save(tmp_path / "model.zip")
    rule = make_weighting_rule("measured", (0, 2, 3))
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv(), weighting_rule=rule).learn(80)
    assert {measurement.gradients.horizons for measurement in loaded.trust.measurements} == {(0, 2, 3)}
    assert "3 model steps" in str(loaded.trust_report())


def test_files_hold_settings_under_the_names_of_the_constructor(tmp_path):
    prior_model, other = LinearEnv().prior_model(), LinearEnv().prior_model(bias=0.1)
    model = MPG("MlpPolicy", LinearEnv(), prior_model=prior_model, n_learners=1, max_grad_norm=0.5, **SMALL)
    attributes = set(vars(model))
    model.save(tmp_path / "model.zip")
    assert set(vars(model)) == attributes and model.prior_model is prior_model
    data, _, _ = load_from_zip_file(tmp_path / "model.zip")
    assert {"n_learners": 1, "max_grad_norm": 0.5, "residual": True}.items() <= data.items()
    assert not {"model_settings", "learner_settings"} & data.keys()

    replaced = MPG.load(tmp_path / "model.zip", env=LinearEnv(), custom_objects={"prior_model": other})
    assert replaced.prior_model is other and replaced.rollout_model.prior is other
    rule = make_weighting_rule("constant", (0, 3))
    assert MPG.load(tmp_path / "model.zip", custom_objects={"weighting_rule": rule}).weighting_rule is rule
    model.save(tmp_path / "without.zip", exclude=["prior_model"])
    assert MPG.load(tmp_path / "without.zip", env=LinearEnv()).prior_model == "auto"


def test_a_replay_buffer_of_another_number_of_environments(tmp_path):
    path, buffer = tmp_path / "model.zip", tmp_path / "buffer.pkl"
    model = MPG("MlpPolicy", make_vec_env(LinearEnv, 2), **SMALL).learn(20)
    model.save(path)
    model.save_replay_buffer(buffer)
    message = "steps of n_envs=2, but the algorithm has n_envs=3"

    three = MPG.load(path, env=make_vec_env(LinearEnv, 3))
    before = three.replay_buffer
    with pytest.raises(ValueError, match=message):
        three.load_replay_buffer(buffer)
    assert three.replay_buffer is before
    assert three.learn(30).num_timesteps == 30
    three.replay_buffer = model.replay_buffer
    with pytest.raises(ValueError, match=message):
        three.learn(30)

    # An algorithm without an environment knows how many it had
    loaded = MPG.load(path)
    loaded.load_replay_buffer(buffer)
    with pytest.raises(AssertionError, match=r"number of environments.*3 != 2"):
        loaded.set_env(make_vec_env(LinearEnv, 3))
    three.replay_buffer = before
    three.save_replay_buffer(buffer)
    with pytest.raises(ValueError, match="steps of n_envs=3, but the algorithm has n_envs=2"):
        loaded.load_replay_buffer(buffer)
    loaded.set_env(make_vec_env(LinearEnv, 2))
    assert loaded.learn(20).num_timesteps == 20


def test_an_environment_may_be_given_by_its_id(tmp_path):
    """As to the constructor."""
    MPG("MlpPolicy", "PathTracking-v0", **SMALL).save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip", env="PathTracking-v0")
    loaded.set_env("PathTracking-v0")
    assert loaded.learn(45)._n_updates == 5


class TestFilesThatCannotBeWritten:
    """An earlier file stays as it is, and so does the algorithm."""

    @pytest.fixture
    def saved(self, tmp_path):
        model = MPG("MlpPolicy", LinearEnv(), **SMALL).learn(45)
        model.save(tmp_path / "model")
        return model, (tmp_path / "model.zip").read_bytes()

    def assert_nothing_is_lost(self, saved, attributes, folder):
        model, content = saved
        assert [path.name for path in folder.iterdir()] == ["model.zip"]
        assert (folder / "model.zip").read_bytes() == content
        assert vars(model).keys() == attributes
        assert MPG.load(folder / "model.zip", env=LinearEnv()).learn(10, reset_num_timesteps=False)._n_updates == 15
        model.save(folder / "model.zip")
        assert model.learn(10, reset_num_timesteps=False)._n_updates == 15

    def test_what_cannot_be_pickled(self, saved, tmp_path):
        model, _ = saved
        model.lock = threading.Lock()
        with pytest.raises(TypeError, match="cannot pickle"):
            model.save(tmp_path / "model.zip")
        del model.lock
        self.assert_nothing_is_lost(saved, vars(model).keys(), tmp_path)

    def test_a_full_disk(self, saved, tmp_path, monkeypatch):
        model, _ = saved
        attributes = set(vars(model))

        def write_half(path, content):
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as context:
            context.setattr(Path, "write_bytes", write_half)
            with pytest.raises(OSError, match="No space left"):
                model.save(tmp_path / "model.zip")
        self.assert_nothing_is_lost(saved, attributes, tmp_path)

    def test_a_stream_that_is_full(self, saved, tmp_path):
        class Full(io.BytesIO):
            def write(self, content):
                raise OSError(errno.ENOSPC, "No space left on device")

        model, _ = saved
        attributes = set(vars(model))
        with pytest.raises(OSError, match="No space left"):
            model.save(Full())
        self.assert_nothing_is_lost(saved, attributes, tmp_path)


@pytest.mark.filterwarnings("ignore:Path .* is a folder", "ignore:Path .* does not exist")
@pytest.mark.parametrize("name", ["agent", "agent.zip", "agent.v1", "folder", "new/agent", "new/er/agent.zip", "link"])
def test_names_of_files_are_those_of_sb3(name, tmp_path, monkeypatch):
    written = []
    for model in (MPG("MlpPolicy", LinearEnv(), **SMALL), TD3("MlpPolicy", LinearEnv(), buffer_size=10)):
        folder = tmp_path / type(model).__name__
        (folder / "folder.zip").mkdir(parents=True)
        (folder / "elsewhere.zip").touch()
        (folder / "link.zip").symlink_to(folder / "elsewhere.zip")
        monkeypatch.chdir(folder)
        model.save(name)
        model.save(name)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 0)
        assert files and all(type(model).load(path).num_timesteps == 0 for path in files)
        written.append([path.relative_to(folder) for path in files])
    assert written[0] == written[1]
