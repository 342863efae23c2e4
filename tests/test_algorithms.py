"""What is true of every algorithm of the library."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import settings
import yaml
from helpers import assert_same_parameters
from lq import LinearEnv
from stable_baselines3.common import utils
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger

import sb3_mpg
from sb3_mpg import MPG, NStepADP, NStepDPG
from sb3_mpg.common.off_policy_model_algorithm import OffPolicyModelAlgorithm
from sb3_mpg.zoo import ALGORITHMS, SAMPLERS, check_hyperparameters

pytestmark = pytest.mark.usefixtures("nothing_is_left")

ROOT = Path(__file__).parent.parent
SMALL = {**settings.SMALL, "policy_kwargs": {"net_arch": [8]}, "batch_size": 16}
#: Settings with which each algorithm steps its model, if it has one, a few times
CLASSES = {MPG: {"horizons": (0, 2)}, NStepDPG: {"n_steps": 2}, NStepADP: {"n_steps": 2}}


def make(cls, env=None, **kwargs):
    return cls("MlpPolicy", LinearEnv(noise=0.1) if env is None else env, **{**SMALL, **CLASSES[cls], **kwargs})


def test_every_algorithm_keeps_the_contract():
    exported = (getattr(sb3_mpg, name) for name in sb3_mpg.__all__)
    algorithms = {thing for thing in exported if inspect.isclass(thing) and issubclass(thing, OffPolicyModelAlgorithm)}
    assert algorithms == CLASSES.keys()


@pytest.mark.parametrize("cls", CLASSES)
class TestContract:
    def test_it_runs(self, cls):
        model = make(cls)
        initial = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
        assert model.learn(60) is model
        assert model._n_updates == 20 and model.n_skipped_updates == 0
        for network in ("actor", "critic", "actor_target", "critic_target"):
            moved = [name for name, tensor in model.policy.state_dict().items() if (tensor != initial[name]).any()]
            assert any(name.startswith(f"{network}.") for name in moved), network
        for key in ("train/critic_loss", "train/actor_loss", "train/actor_grad_norm", "train/critic_grad_norm"):
            assert np.isfinite(model.logger.name_to_value[key]), key

    def test_it_is_saved_and_predicts_without_an_environment(self, cls, tmp_path):
        model = make(cls).learn(60)
        model.save(tmp_path / "model.zip")
        loaded = cls.load(tmp_path / "model.zip")
        assert loaded.env is None and loaded.rollout_model is None
        assert_same_parameters(model, loaded)
        observations = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
        actions, _ = loaded.predict(observations, deterministic=True)
        np.testing.assert_array_equal(actions, model.predict(observations, deterministic=True)[0])
        assert actions.shape == (5, 1)

    def test_resuming_equals_not_stopping(self, cls, tmp_path):
        def second_half(model):
            model.env.seed(7)
            model._last_obs = None
            return model.learn(30, reset_num_timesteps=False)

        model = make(cls, make_vec_env(LinearEnv, 1, seed=0)).learn(60)
        model.save(tmp_path / "model.zip")
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        uninterrupted = second_half(model)
        np.random.seed(99)
        resumed = cls.load(tmp_path / "model.zip", env=make_vec_env(LinearEnv, 1, seed=5))
        resumed.load_replay_buffer(tmp_path / "buffer.pkl")
        resumed = second_half(resumed)
        assert resumed._n_updates == uninterrupted._n_updates == 50
        assert_same_parameters(uninterrupted, resumed)

    def test_learners_compute_the_same(self, cls):
        assert_same_parameters(make(cls).learn(60), make(cls, n_learners=1, max_staleness=0).learn(60))

    def test_rl_zoo_knows_it(self, cls):
        (name,) = [name for name, algorithm in ALGORITHMS.items() if algorithm is cls]
        assert name in SAMPLERS
        entries = yaml.safe_load((ROOT / "hyperparams" / f"{name}.yml").read_text(encoding="utf-8"))
        assert "default" in entries
        for key, entry in entries.items():
            check_hyperparameters(cls, entry, f"{name}.yml, {key}")
            assert entry["policy"] in cls.policy_aliases

    def test_rl_zoo_samples_what_the_constructor_takes(self, cls):
        """Also the settings of relabelled goals."""
        optuna = pytest.importorskip("optuna")
        (sampler,) = [SAMPLERS[name] for name, algorithm in ALGORITHMS.items() if algorithm is cls]
        for uses_her in (False, True):
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
            her = {"using_her_replay_buffer": uses_her, "her_kwargs": {"copy_info_dict": True}}
            sampled = sampler(study.ask(), 1, 1, her)
            assert sampled.keys() <= inspect.signature(cls).parameters.keys()
            assert ("n_sampled_goal" in sampled.get("replay_buffer_kwargs", {})) == uses_her

    def test_every_argument_is_documented(self, cls):
        documented = set(re.findall(r":param (\w+):", inspect.getdoc(cls)))
        # As in "The other parameters are those of :class:`~sb3_mpg.mpg.mpg.MPG`."
        for path in re.findall(r"other parameters are those of\s+:class:`~?([\w.]+)`", inspect.getdoc(cls)):
            module, _, name = path.rpartition(".")
            other = getattr(__import__(module, fromlist=[name]), name)
            assert issubclass(cls, other)
            documented |= set(re.findall(r":param (\w+):", inspect.getdoc(other)))
        arguments = set(inspect.signature(cls).parameters)
        assert arguments <= documented, f"not documented: {sorted(arguments - documented)}"
        own = set(re.findall(r":param (\w+):", inspect.getdoc(cls)))
        assert own <= arguments, f"documented, but no argument: {sorted(own - arguments)}"

    def test_logs_are_named_after_it(self, cls, monkeypatch):
        names = []

        def configure_logger(verbose, tensorboard_log, tb_log_name, reset_num_timesteps):
            names.append(tb_log_name)
            return Logger(None, [])

        monkeypatch.setattr(utils, "configure_logger", configure_logger)
        make(cls).learn(5).learn(5, tb_log_name="other")
        assert names == [cls.__name__, "other"]

    def test_the_arguments_of_the_constructor_are_those_of_sb3_first(self, cls):
        """As in SB3's algorithms, so that positional arguments mean the same."""
        names = list(inspect.signature(cls).parameters)
        assert names[:14] == [
            *["policy", "env", "learning_rate", "buffer_size", "learning_starts", "batch_size", "tau", "gamma", "train_freq"],
            *["gradient_steps", "action_noise", "replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage"],
        ]
        assert names[-7:] == [
            *["stats_window_size", "tensorboard_log", "policy_kwargs", "verbose", "seed", "device", "_init_setup_model"]
        ]


@pytest.mark.parametrize(
    ("cls", "differences"),
    [
        (
            NStepDPG,
            {"residual": False, "horizons": (0,), "weighting": "constant", "value_target": "n_step_simulator"},
        ),
        (
            NStepADP,
            {
                "residual": False,
                "horizons": (3,),
                "weighting": "constant",
                "value_target": "n_step_simulator",
                "differentiate": "all_actions",
            },
        ),
    ],
)
def test_variants_are_mpg_with_pinned_values(cls, differences):
    variant = make(cls, n_steps=3, batch_reuse=2).learn(60)
    kwargs = {"value_target_kwargs": {"n_steps": 3}, "policy_delay": 1, "batch_reuse": 2, **differences}
    mpg = make(MPG, **kwargs).learn(60)
    assert_same_parameters(variant, mpg)
