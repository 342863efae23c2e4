"""ONNX files: onnxruntime gives what the algorithm gives, in the units of the environment."""

import errno
import os
import random
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from goals import GoalEnv
from gymnasium import spaces
from helpers import assert_same_parameters
from lq import LinearEnv
from models import LearnedDynamics
from settings import SMALL
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn
from torch._dynamo.utils import counters

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, NStepADP, NStepDPG, PriorModel, __version__
from sb3_mpg.common.models.trainable import evaluated

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'sb3-mpg[export]'")

BATCH_SIZES = (1, 2, 7)
UNIT = spaces.Box(-1, 1, (1,), np.float32)
# Of different ranges
RANGES = spaces.Box(np.float32([-2, 0.1]), np.float32([3, 0.2]))
WITHOUT_MODEL = {**SMALL, "horizons": (0,), "weighting": "constant"}


class ShowsAnything(gym.Env):
    """Random observations of any space, for actions of any space."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class Network(BaseFeaturesExtractor):
    """An extractor of a user, with layers that differ between training and evaluation."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 8)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Swish(), nn.LayerNorm(8)
        )

    def forward(self, observations):
        return self.layers(observations)


class Swish(nn.Module):
    """An activation function of a user."""

    def forward(self, inputs):
        return inputs * th.sigmoid(inputs)


def session(path):
    return onnxruntime.InferenceSession(path)


def inputs_of(file):
    return {node.name: (node.type, node.shape) for node in file.get_inputs()}


def samples(space, n_rows):
    """Raw observations as a vectorised environment shows them, always the same."""
    if isinstance(space, spaces.Dict):
        return {key: samples(part, n_rows) for key, part in space.spaces.items()}
    space.seed(n_rows)
    return np.stack([space.sample() for _ in range(n_rows)])


def shifted_statistics(env, far=1e5):
    """Statistics of observations far from zero, which single precision would lose."""
    statistics = env.obs_rms.values() if isinstance(env.obs_rms, dict) else [env.obs_rms]
    for rms in statistics:
        rms.mean, rms.var = far + np.arange(rms.mean.size).reshape(rms.mean.shape), np.full(rms.var.shape, 0.3)
    env.clip_obs = 1.5
    env.training = False


def random_policy(model):
    """Scales of observations and biases that are not those of the start."""
    state = model.policy.state_dict()
    model.policy.load_state_dict({name: 0.6 * th.rand_like(tensor) - 0.3 for name, tensor in state.items()})


SPACES = {
    "float32": (spaces.Box(-3, 3, (3,), np.float32), RANGES),
    "float64_table": (spaces.Box(-3, 3, (2, 3), np.float64), spaces.Box(-1, 1, (2, 2), np.float64)),
    "float16": (spaces.Box(-3, 3, (3,), np.float16), spaces.Box(-0.3, 7, (3,), np.float16)),
    "int32_fixed_action": (spaces.Box(-9, 9, (3,), np.int32), spaces.Box(np.float32([0.5, -1]), np.float32([0.5, 1]))),
    "dict": (
        spaces.Dict(
            {
                "action": spaces.Box(0, 9, (3,), np.uint8),
                "count": spaces.Box(-9, 9, (2,), np.int64),
                "goal": spaces.Box(-3, 3, (2, 2), np.float64),
            }
        ),
        spaces.Box(-2, 2, (2, 1), np.float32),
    ),
    "tuple": (spaces.Tuple([UNIT, spaces.Box(-2, 2, (2,), np.float32)]), RANGES),
}


def check_policy(model, path, normalize=lambda observations: observations, shifted=()):
    """The file gives the actions of ``predict``, in the dtype and within the bounds of the action space."""
    file = session(path)
    (output,) = file.get_outputs()
    assert (output.name, output.shape) == ("action", ["batch", *model.action_space.shape])
    for n_rows in BATCH_SIZES:
        raw = samples(model.observation_space, n_rows)
        parts = raw if isinstance(raw, dict) else {"observation": raw}
        for key in shifted:
            parts[key] += np.asarray(1e5, parts[key].dtype)
        inputs = {f"observation_{key}" if key == "action" else key: part for key, part in parts.items()}
        (actions,) = file.run(None, inputs)
        expected, _ = model.predict(normalize(raw), deterministic=True)
        assert actions.dtype == model.action_space.dtype
        assert actions.shape == expected.shape == (n_rows, *model.action_space.shape)
        rtol = 1e-3 if actions.dtype == np.float16 else 1e-4
        np.testing.assert_allclose(actions, expected, rtol, 0.1 * rtol)
        assert ((actions >= model.action_space.low) & (actions <= model.action_space.high)).all()
    assert actions.std() > 1e-3


class TestPolicy:
    @pytest.mark.parametrize("name", SPACES)
    def test_spaces(self, name, tmp_path):
        observation_space, action_space = SPACES[name]
        several = isinstance(observation_space, (spaces.Dict, spaces.Tuple))
        env = ShowsAnything(observation_space, action_space)
        model = MPG("MultiInputPolicy" if several else "MlpPolicy", env, **WITHOUT_MODEL)
        random_policy(model)
        model.export_onnx(tmp_path / "policy.onnx")
        check_policy(model, tmp_path / "policy.onnx")

    @pytest.mark.parametrize(
        "names",
        [
            {"": "observation_", "action": "observation_action", "observation_action": "observation_observation_action"},
            {1: "1", 2: "2"},
        ],
        ids=["taken", "numbers"],
    )
    def test_names_of_inputs(self, names, tmp_path):
        """Each key has a name of its own, that the file can hold."""
        observation_space = spaces.Dict({key: spaces.Box(-3, 3, (2,), np.float32) for key in names})
        model = MPG("MultiInputPolicy", ShowsAnything(observation_space, RANGES), **WITHOUT_MODEL)
        random_policy(model)
        model.export_onnx(tmp_path / "policy.onnx")
        file = session(tmp_path / "policy.onnx")
        assert list(inputs_of(file)) == list(names.values())
        raw = samples(model.observation_space, 3)
        (actions,) = file.run(None, {names[key]: part for key, part in raw.items()})
        np.testing.assert_allclose(actions, model.predict(raw, deterministic=True)[0], 1e-4, 1e-5)

    @pytest.mark.parametrize("name", ["float64_table", "dict"])
    def test_statistics_of_vec_normalize(self, name, tmp_path):
        env = DummyVecEnv([lambda: ShowsAnything(*SPACES[name])])
        env = VecNormalize(env, norm_obs_keys=["count", "goal"] if name == "dict" else None)
        shifted_statistics(env)
        model = MPG("MultiInputPolicy" if name == "dict" else "MlpPolicy", env, **WITHOUT_MODEL)
        random_policy(model)
        path = tmp_path / "policy.onnx"
        model.export_onnx(str(path))
        check_policy(model, path, env.normalize_obs, env.norm_obs_keys or ("observation",))
        if name == "dict":
            assert inputs_of(session(path)) == {
                "observation_action": ("tensor(uint8)", ["batch", 3]),
                "count": ("tensor(int64)", ["batch", 2]),
                "goal": ("tensor(double)", ["batch", 2, 2]),
            }

    def test_statistics_are_those_of_the_export(self, tmp_path):
        env = VecNormalize(DummyVecEnv([LinearEnv]))
        model = MPG("MlpPolicy", env, **WITHOUT_MODEL).learn(60)
        raw = samples(model.observation_space, 5)
        expected, _ = model.predict(env.normalize_obs(raw), deterministic=True)
        model.export_onnx(tmp_path / "policy.onnx")
        shifted_statistics(env)
        (actions,) = session(tmp_path / "policy.onnx").run(None, {"observation": raw})
        np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("algorithm", [MPG, NStepDPG, NStepADP])
    def test_algorithms(self, algorithm, tmp_path):
        model = algorithm("MlpPolicy", LinearEnv(), **SMALL).learn(60)
        model.save(tmp_path / "model.zip")
        loaded = algorithm.load(tmp_path / "model.zip")
        loaded.export_onnx(tmp_path / "policy.onnx")
        check_policy(model, tmp_path / "policy.onnx")

    @pytest.mark.parametrize("extractor", [Network, CombinedExtractor])
    def test_networks_of_users(self, extractor, tmp_path):
        """In evaluation mode, while they are in training mode."""
        kwargs = {"policy_kwargs": {"net_arch": [8], "features_extractor_class": extractor, "activation_fn": Swish}}
        space, policy = spaces.Box(-3, 3, (2, 3), np.float64), "MlpPolicy"
        if extractor is CombinedExtractor:
            space, policy = spaces.Dict({"a": space, "b": UNIT}), "MultiInputPolicy"
        model = MPG(policy, ShowsAnything(space, RANGES), **{**WITHOUT_MODEL, **kwargs}).learn(60)
        model.policy.set_training_mode(True)
        model.export_onnx(tmp_path / "policy.onnx")
        assert model.actor.training and model.actor.features_extractor.training and not model.actor_target.training
        check_policy(model, tmp_path / "policy.onnx")

    def test_description(self, tmp_path):
        model = MPG("MlpPolicy", LinearEnv(), **WITHOUT_MODEL)
        model.export_onnx(tmp_path / "policy.onnx")
        description = session(tmp_path / "policy.onnx").get_modelmeta().custom_metadata_map
        assert description == {
            "sb3_mpg": __version__,
            "algorithm": "MPG",
            "what": "policy",
            "num_timesteps": "0",
            "observation_space": str(model.observation_space),
            "action_space": str(model.action_space),
        }
        # Torch would add where the source code is
        assert b".py" not in (tmp_path / "policy.onnx").read_bytes()

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_older_exporter_of_torch_takes_the_actor(self, tmp_path):
        actor, observations = MPG("MlpPolicy", LinearEnv(), **WITHOUT_MODEL).actor, th.randn(3, 2)
        with th.no_grad():
            th.onnx.export(actor, (observations,), tmp_path / "actor.onnx", dynamo=False, input_names=["observation"])
            (actions,) = session(tmp_path / "actor.onnx").run(None, {"observation": observations.numpy()})
            np.testing.assert_allclose(actions, actor(observations), atol=1e-6)


class Loops(PriorModel):
    """What users write: loops, lengths, masks, choices by value, dictionaries, changes in place."""

    def transition(self, states, actions):
        parts = dict(zip(("position", "speed"), states.split(1, dim=1), strict=True))
        for _ in range(3):
            parts["position"] = parts["position"] + 0.05 * parts["speed"]
            parts["speed"] = (parts["speed"] + 0.05 * actions).clamp(-2, 2)
        next_states = th.cat(list(parts.values()), dim=1) + th.zeros(len(states), 1)
        return th.where(next_states > 1.5, next_states - 3.0, next_states)

    def reward(self, states, actions, next_states):
        rewards = -(next_states**2).sum(dim=1, keepdim=True)
        rewards[states[:, 0] > 1] = -5.0
        return rewards

    def terminal(self, states):
        return states[:, :1].abs() > 0.5


def check_model(model, path, recorded=None):
    """With observations that were recorded, or any of the space."""
    file, flat = session(path), model.update.flat
    names = [f"next_{key}" for key in flat.boxes]
    assert [node.name for node in file.get_outputs()] == [*names, "reward", "terminated"]
    for n_rows in BATCH_SIZES:
        raw = samples(model.observation_space, n_rows) if recorded is None else recorded[:n_rows]
        actions = samples(model.action_space, n_rows)
        parts = raw if isinstance(raw, dict) else {"observation": raw}
        outputs = dict(zip([*names, "reward", "terminated"], file.run(None, {**parts, "action": actions}), strict=True))
        prior = model.rollout_model
        with evaluated(prior), th.no_grad():
            tensors = {key: th.as_tensor(part) for key, part in parts.items()}
            states = prior.state_from_observation(flat.flatten(tensors if isinstance(raw, dict) else tensors["observation"]))
            next_states, rewards = prior.step(states, th.as_tensor(actions).float().flatten(1))
            observations, is_terminal = flat.unflatten(prior.observation(next_states)), prior.terminal(next_states)
        np.testing.assert_allclose(outputs["reward"], rewards, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(outputs["terminated"], is_terminal)
        assert outputs["terminated"].dtype == bool and outputs["reward"].shape == (n_rows, 1)
        for key, box in flat.boxes.items():
            expected = observations[key] if isinstance(observations, dict) else observations
            np.testing.assert_allclose(outputs[f"next_{key}"], expected, rtol=1e-4, atol=1e-3)
            assert outputs[f"next_{key}"].dtype == box.dtype
    return outputs


class TestModel:
    def test_prior_model(self, tmp_path):
        kwargs = {"weighting": "rule_based", "residual": False, "prior_model": Loops(), "horizons": (0, 2)}
        model = MPG("MlpPolicy", LinearEnv(), **SMALL, **kwargs)
        model.export_onnx(tmp_path / "model.onnx", what="model")
        outputs = check_model(model, tmp_path / "model.onnx")
        assert 0 < outputs["terminated"].sum() < 7

    @pytest.mark.parametrize("residual", [True, False])
    def test_correction_if_it_is_used(self, residual, tmp_path):
        """With measured weights the correction is fitted anyway."""
        env = VecNormalize(DummyVecEnv([lambda: GoalEnv(action_space=spaces.Box(-2, 1, (1, 1), np.float64))]))
        model = MPG("MultiInputPolicy", env, horizons=(0, 2), residual=residual, compile=False, **SMALL).learn(60)
        model.export_onnx(tmp_path / "model.onnx", what="model")
        check_model(model, tmp_path / "model.onnx")
        raw = samples(model.observation_space, 5)
        inputs = {**raw, "action": np.zeros((5, 1, 1))}
        (next_goals,) = session(tmp_path / "model.onnx").run(["next_desired_goal"], inputs)
        assert np.array_equal(next_goals, raw["desired_goal"]) == (not residual)

    @pytest.mark.parametrize("env_id", ["PathTracking-v0", "InvertedPendulumConti-v0"])
    def test_environments_of_the_library(self, env_id, tmp_path):
        model = MPG("MlpPolicy", env_id, horizons=(0, 2), compile=False, **SMALL).learn(60)
        model.export_onnx(tmp_path / "model.onnx", what="model")
        # Samples of the space are up to 1e5 times as far away, where single precision resolves less than the tolerance
        check_model(model, tmp_path / "model.onnx", model.replay_buffer.observations[:, 0])

    def test_learned_ensemble_predicts_its_mean(self, tmp_path):
        model = MPG("MlpPolicy", LinearEnv(), prior_model=LearnedDynamics(2, 1), horizons=(0, 2), compile=False, **SMALL)
        model.learn(60)
        model.rollout_model.members = "dealt"
        model.rollout_model.train()
        model.export_onnx(tmp_path / "model.onnx", what="model")
        assert model.rollout_model.members == "dealt" and model.rollout_model.training
        check_model(model, tmp_path / "model.onnx")


class Exports(BaseCallback):
    """Exports in the middle of a training."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.n_compiled = Path(folder), []

    def _on_step(self):
        if self.num_timesteps == 55:
            states = [th.get_rng_state(), *np.random.get_state()[1:3], random.getstate()]
            spaces_before = [str(space.np_random.bit_generator.state) for space in self._spaces()]
            for what in ("policy", "model"):
                self.model.export_onnx(self.folder / f"{what}.onnx", what)
            after = [th.get_rng_state(), *np.random.get_state()[1:3], random.getstate()]
            assert all(np.array_equal(*pair) for pair in zip(states[:3], after[:3], strict=True)) and states[3] == after[3]
            assert spaces_before == [str(space.np_random.bit_generator.state) for space in self._spaces()]
        self.n_compiled.append(counters["stats"]["unique_graphs"])
        return True

    def _spaces(self):
        return self.model.observation_space, self.model.action_space


class TestTraining:
    @pytest.mark.parametrize("n_learners", [0, 1])
    def test_goes_on_as_without_an_export(self, n_learners, tmp_path, models_are_fitted_once):
        def train(callback):
            env = VecNormalize(DummyVecEnv([LinearEnv]))
            kwargs = {"horizons": (0, 2), "compile": False, "n_learners": n_learners, "max_staleness": 0}
            return MPG("MlpPolicy", env, **SMALL, **kwargs).learn(60, callback=callback)

        without, exporting = train(None), train(Exports(tmp_path))
        assert_same_parameters(without, exporting)
        for name, tensor in without.rollout_model.state_dict().items():
            assert th.equal(tensor, exporting.rollout_model.state_dict()[name]), name

    @pytest.mark.parametrize("prior_model", [None, Loops()])
    def test_stays_compiled(self, prior_model, tmp_path):
        """Where a model takes the length of a tensor, torch forgets what it compiled, and compiles it again."""
        exports = Exports(tmp_path)
        kwargs = {"weighting": "constant", "residual": False, "prior_model": prior_model or "auto", "horizons": (0, 2)}
        model = MPG("MlpPolicy", LinearEnv(), compile=True, **SMALL, **kwargs).learn(60, callback=exports)
        assert model.update.steps.is_compiled and not model.update.steps.has_failed
        assert exports.n_compiled[53] > 0
        if prior_model is None:
            assert exports.n_compiled[53] == exports.n_compiled[-1]


class Interpolates(PriorModel):
    def transition(self, states, actions):
        return states + 0.1 * actions + 0.0 * th.searchsorted(th.linspace(-1, 1, 9), states.contiguous())

    def reward(self, states, actions, next_states):
        return -(states**2).sum(dim=1, keepdim=True)


class Branches(Interpolates):
    def transition(self, states, actions):
        return states + 0.1 * actions if (states > 0).any() else states - 0.1 * actions


class Differentiates(Interpolates):
    """A failure of torch within ``vmap``, which leaves it behind."""

    def transition(self, states, actions):
        return states + 0.1 * actions + th.vmap(th.func.grad(lambda state: (state**2).sum()))(states)


class Forgets(Interpolates):
    """Noise that training mode does not switch off."""

    def transition(self, states, actions):
        return states + actions * (1 + random.random())


class TestRefusals:
    @pytest.mark.parametrize(
        ("prior_model", "message"),
        [
            (
                Interpolates,
                r"Interpolates uses the operator aten\.searchsorted, which ONNX does not have; write it with other",
            ),
            (Branches, r"cannot follow what Branches computes \(.*[Dd]ata-dependent.*choose by values with torch\.where"),
            (Differentiates, r"cannot follow what Differentiates computes.*with torch\.autograd\.grad instead of torch\.func"),
            (Forgets, "'next_observation' of Forgets would be another one in the file.*no noise in evaluation mode"),
        ],
    )
    def test_models_that_cannot_be_converted(self, prior_model, message, tmp_path, capfd):
        kwargs = {"weighting": "constant", "residual": False, "horizons": (0, 2)}
        model = MPG("MlpPolicy", LinearEnv(), prior_model=LinearEnv().prior_model(), **SMALL, **kwargs)
        model.update.model = prior_model()
        (tmp_path / "model.onnx").write_text("the file of before")
        with pytest.raises(ValueError, match=message):
            model.export_onnx(tmp_path / "model.onnx", what="model")
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.onnx", "the file of before")]
        assert capfd.readouterr() == ("", "")
        # The same process goes on
        assert th.isfinite(th.randn(3)).all()

    def test_policies_that_cannot_be_converted(self, tmp_path):
        class Sorts(BaseFeaturesExtractor):
            def forward(self, observations):
                return th.searchsorted(th.linspace(-1, 1, 9), observations.contiguous()).float()

        kwargs = {"policy_kwargs": {"features_extractor_class": Sorts, "features_extractor_kwargs": {"features_dim": 2}}}
        model = MPG("MlpPolicy", LinearEnv(), **{**WITHOUT_MODEL, **kwargs})
        with pytest.raises(ValueError, match="MPGPolicy with Sorts uses the operator"):
            model.export_onnx(tmp_path / "policy.onnx")

    def test_arguments(self, tmp_path):
        model = MPG("MlpPolicy", LinearEnv(), **WITHOUT_MODEL)
        with pytest.raises(ValueError, match="'policy' or 'model', got 'critic'"):
            model.export_onnx(tmp_path / "file.onnx", what="critic")
        with pytest.raises(ValueError, match="must be that of a file, got the folder"):
            model.export_onnx(tmp_path)
        with pytest.raises(ValueError, match=r"create '.*/missing' first"):
            model.export_onnx(tmp_path / "missing" / "file.onnx")
        assert list(tmp_path.iterdir()) == []

    def test_no_model(self, tmp_path):
        with pytest.raises(ValueError, match="no model to export: the only horizon is 0"):
            MPG("MlpPolicy", LinearEnv(), **WITHOUT_MODEL).export_onnx(tmp_path / "model.onnx", what="model")
        MPG("MlpPolicy", LinearEnv(), **SMALL).save(tmp_path / "model.zip")
        with pytest.raises(ValueError, match="the environment is missing"):
            MPG.load(tmp_path / "model.zip").export_onnx(tmp_path / "model.onnx", what="model")

    def test_missing_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
        with pytest.raises(ImportError, match=r"onnxscript.*pip install 'sb3-mpg\[export\]'"):
            MPG("MlpPolicy", LinearEnv(), **WITHOUT_MODEL).export_onnx(tmp_path / "policy.onnx")

    def test_full_disk(self, tmp_path, monkeypatch):
        def write_half(path, content):
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(OSError, match="No space left on device"):
            MPG("MlpPolicy", LinearEnv(), **WITHOUT_MODEL).export_onnx(tmp_path / "policy.onnx")
        assert list(tmp_path.iterdir()) == []
