"""The hyperparameter files: their keys and values are those that RL Zoo and the constructors take."""

import inspect
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import yaml
from gymnasium import spaces
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG
from sb3_mpg.common.torch_layers import ObservationScaler
from sb3_mpg.hyperparams_opt import convert_params
from sb3_mpg.zoo import (
    ALGORITHMS,
    PASSED_BY_ZOO,
    ZOO_KEYS,
    ScaleReward,
    ZooError,
    check_hyperparameters,
    hyperparameter_file,
)

sb3_contrib = pytest.importorskip("sb3_contrib", reason="sb3_contrib is not installed: pip install 'sb3-mpg[zoo]'")

ROOT = Path(__file__).parent.parent
CLASSES = {
    **ALGORITHMS,
    "mpg_v1": MPG,
    "mpg_v2": MPG,
    **{"td3": TD3, "sac": SAC, "tqc": sb3_contrib.TQC, "crossq": sb3_contrib.CrossQ},
}
ENTRIES = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "hyperparams").glob("*.yml"))
}
FILES_AND_ENTRIES = [(name, key) for name, entries in ENTRIES.items() for key in entries]
TASKS = ("PathTracking-v0", "InvertedPendulumConti-v0")


def policy_kwargs_of(entry):
    """As RL Zoo evaluates them."""
    return eval(entry.get("policy_kwargs", "{}"), {"nn": nn, "ObservationScaler": ObservationScaler})


def test_files_are_known():
    assert ENTRIES.keys() == CLASSES.keys()


@pytest.mark.parametrize(("name", "key"), FILES_AND_ENTRIES)
def test_keys_are_arguments(name, key):
    entry = ENTRIES[name][key]
    check_hyperparameters(CLASSES[name], entry, f"{name}.yml, {key}")
    assert entry.keys() - ZOO_KEYS <= inspect.signature(CLASSES[name]).parameters.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_every_task_has_an_entry(name):
    assert set(TASKS) <= ENTRIES[name].keys()
    assert ("default" in ENTRIES[name]) == issubclass(CLASSES[name], MPG)


@pytest.mark.parametrize(("name", "key"), FILES_AND_ENTRIES)
def test_values_are_accepted(name, key):
    entry = dict(ENTRIES[name][key], policy_kwargs=policy_kwargs_of(ENTRIES[name][key]), buffer_size=100)
    for rate in {"learning_rate", "critic_learning_rate"} & entry.keys():
        entry[rate] = float(str(entry[rate]).removeprefix("lin_"))
    arguments = {argument: value for argument, value in entry.items() if argument not in ZOO_KEYS}
    env = make_vec_env("PathTracking-v0" if key == "default" else key, n_envs=1)
    model = CLASSES[name](env=env, device="cpu", **arguments)
    model.learn(2)
    assert model.num_timesteps == 2
    assert all(
        getattr(model, argument) == arguments[argument] for argument in ("gamma", "batch_size") if argument in arguments
    )
    env.close()


@pytest.mark.parametrize("env_id", TASKS)
def test_settings_are_those_of_the_benchmarks(env_id, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    # Those of the tests have the same name
    monkeypatch.delitem(sys.modules, "settings", raising=False)
    settings = pytest.importorskip("settings")
    sys.modules.pop("settings")
    task = next(task for task in settings.TASKS.values() if task.env_id == env_id)
    for name, entries in ENTRIES.items():
        if name in ("mpg", "dvpg"):
            continue  # nothing set for a task
        entry = entries[env_id]
        scale = policy_kwargs_of(entry)["features_extractor_kwargs"]["scale"]
        assert scale == pytest.approx(task.observation_scale), name
        if "weighting_kwargs" in entry:
            assert entry["weighting_kwargs"] == {"eta": 0.1, "total_updates": task.weighting_updates}, name
        if issubclass(CLASSES[name], MPG):
            assert entry.get("reward_scale", 1.0) == task.reward_scale, name
        else:
            wrappers = entry["env_wrapper"] or [{"sb3_mpg.zoo.ScaleReward": {"factor": 1.0}}]
            assert wrappers == [{"sb3_mpg.zoo.ScaleReward": {"factor": task.reward_scale}}], name


def test_the_papers_methods_learn_as_in_the_papers():
    """Table VI of the first version."""
    for name in ("mpg_v1", "mpg_v2", "nadp", "ndpg"):
        defaults = {argument: parameter.default for argument, parameter in inspect.signature(CLASSES[name]).parameters.items()}
        for entry in ENTRIES[name].values():
            settings = {**defaults, **entry}
            assert (settings["tau"], settings["gamma"], settings["learning_starts"]) == (0.005, 0.98, 3000)
            for key, initial, named in (
                ("learning_rate", 3e-4, "lin_3e-4"),
                ("critic_learning_rate", 8e-4, "lin_8e-4"),
            ):
                assert settings[key] == named or settings[key](1.0) == initial
            assert policy_kwargs_of(entry)["layer_norm"] is False


def test_the_papers_networks_see_no_fourier_features():
    for name in ("mpg_v1", "mpg_v2", "nadp", "ndpg"):
        for key, entry in ENTRIES[name].items():
            space = spaces.Box(-1, 1, (6 if key != "InvertedPendulumConti-v0" else 4,))
            assert not ObservationScaler(space, **policy_kwargs_of(entry)["features_extractor_kwargs"]).frequencies, (
                name,
                key,
            )
    assert "policy_kwargs" not in ENTRIES["mpg"]["default"]


@pytest.mark.parametrize("name", ["td3", "sac", "tqc", "crossq"])
def test_baselines_get_what_mpg_gets(name):
    defaults = {argument: parameter.default for argument, parameter in inspect.signature(MPG).parameters.items()}
    for env_id in TASKS:
        entry = ENTRIES[name][env_id]
        mpg = {**defaults, **ENTRIES["mpg_v2"][env_id]}
        assert entry["n_timesteps"] == mpg["n_timesteps"]
        assert entry["n_envs"] == mpg["n_envs"]
        for argument in ("gamma", "batch_size", "buffer_size", "learning_starts", "train_freq", "gradient_steps", "tau"):
            assert entry.get(argument, mpg[argument]) == mpg[argument], argument
        policy_kwargs = policy_kwargs_of(entry)
        assert policy_kwargs["net_arch"] == [256, 256]
        assert policy_kwargs["activation_fn"] is nn.ELU


@pytest.mark.parametrize("env_id", [*TASKS, "default"])
def test_mpg_needs_no_setting(env_id):
    assert ENTRIES["mpg"][env_id].keys() <= {"n_timesteps", "policy", "prior_model"}


def test_scale_reward():
    env = ScaleReward(gym.make("PathTracking-v0"), factor=0.01)
    bare = gym.make("PathTracking-v0")
    env.reset(seed=1)
    bare.reset(seed=1)
    action = bare.action_space.sample()
    reward = env.step(action)[1]
    assert reward == pytest.approx(0.01 * bare.step(action)[1])
    assert isinstance(reward, float)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"n_timesteps": 1, "policy": "MlpPolicy", "horizon": 25},
            "mpg.yml, X: MPG has no hyperparameter 'horizon', did you mean",
        ),
        ({"n_timesteps": 1, "policy": "MlpPolicy", "seed": 1}, "no hyperparameter 'seed'"),
        ({"policy": "MlpPolicy"}, "'n_timesteps' is missing"),
        ({"n_timesteps": 1}, "'policy' is missing"),
    ],
)
def test_wrong_keys_are_named(entry, message):
    with pytest.raises(ZooError, match=message):
        check_hyperparameters(MPG, entry, "mpg.yml, X")


def test_which_file_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def file_name(*arguments):
        path = hyperparameter_file(*arguments)
        return path and Path(path).name

    assert file_name("mpg", "Pendulum-v1") == "mpg.yml"
    # RL Zoo keeps its own environments, and the files that users choose
    assert file_name("td3", "PathTracking-v0") == "td3.yml"
    assert file_name("td3", "Pendulum-v1") is None
    assert file_name("ppo", "PathTracking-v0") is None
    assert file_name("mpg", "PathTracking-v0", "mpg_v1.yml") == "mpg_v1.yml"
    Path("mpg_v1.yml").touch()
    assert file_name("mpg", "PathTracking-v0", "mpg_v1.yml") is None
    assert file_name("mpg", "PathTracking-v0", "mine.yml") is None


@pytest.mark.parametrize(
    ("names", "sampled"),
    [
        (["mpg"], {"horizon": 10, "policy_delay": 1}),
        (["ndpg", "nadp"], {"n_steps": 10, "batch_reuse": 3}),
        (["dvpg"], {"n_horizons": 3, "lambda_": 0.5}),
    ],
)
def test_sampled_values_become_arguments(names, sampled):
    common = {"one_minus_gamma": 0.02, "batch_size_pow": 5, "learning_rate": 1e-3, "critic_learning_rate": 1e-3, "tau": 0.01}
    hyperparams = convert_params({**common, **sampled})
    assert hyperparams["gamma"] == 0.98
    assert hyperparams["batch_size"] == 32
    for name in names:
        assert hyperparams.keys() <= inspect.signature(ALGORITHMS[name]).parameters.keys() - PASSED_BY_ZOO
    # RL Zoo writes them to a file
    assert yaml.safe_load(yaml.safe_dump(hyperparams)) == hyperparams
