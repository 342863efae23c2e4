"""What is true of every algorithm of this library, beyond the contract of SB3."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import assert_same_parameters
from lq import LinearEnv
from stable_baselines3.common.env_util import make_vec_env

import sb3_mpg
from contract.cases import OWN_CASES, SMALL
from sb3_mpg import MPG, NStepADP, NStepDPG
from sb3_mpg.common.off_policy_model_algorithm import OffPolicyModelAlgorithm
from sb3_mpg.hyperparams_opt import SAMPLERS
from sb3_mpg.mpg.mpg import ACTOR_LEARNING_RATE, CRITIC_LEARNING_RATE
from sb3_mpg.zoo import ALGORITHMS, check_hyperparameters

ROOT = Path(__file__).parent.parent.parent
CLASSES = list(dict.fromkeys(case.cls for case in OWN_CASES))


def test_every_algorithm_keeps_the_contract():
    exported = (getattr(sb3_mpg, name) for name in sb3_mpg.__all__)
    algorithms = {thing for thing in exported if inspect.isclass(thing) and issubclass(thing, OffPolicyModelAlgorithm)}
    assert algorithms == set(CLASSES)


def test_no_update_is_skipped(own_case):
    model = own_case.make().learn(26)
    assert model._n_updates == 16 and model.n_skipped_updates == 0
    for key in ("train/actor_grad_norm", "train/critic_grad_norm"):
        assert model.logger.name_to_value[key] > 0, key


def test_resuming_equals_not_stopping(own_case, tmp_path):
    def make_env(seed):
        return make_vec_env(lambda: own_case.env(max_steps=8), 1, seed=seed)

    def second_half(model):
        model.env.seed(7)
        model._last_obs = None
        return model.learn(20, reset_num_timesteps=False)

    model = own_case.make(make_env(0)).learn(30)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    uninterrupted = second_half(model)
    np.random.seed(99)
    resumed = own_case.cls.load(tmp_path / "model.zip", env=make_env(5))
    resumed.load_replay_buffer(tmp_path / "buffer.pkl")
    resumed = second_half(resumed)
    assert resumed._n_updates == uninterrupted._n_updates == 40
    assert_same_parameters(uninterrupted, resumed)


@pytest.mark.usefixtures("nothing_is_left")
def test_learners_compute_the_same(own_case):
    models = [own_case.make(**kwargs).learn(26) for kwargs in ({}, {"n_learners": 1, "max_staleness": 0})]
    assert_same_parameters(*models)


@pytest.mark.parametrize("cls", CLASSES)
class TestOfEachClass:
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
    settings = {name: value for name, value in SMALL.items() if name != "gamma"}
    variant = cls("MlpPolicy", LinearEnv(), n_steps=3, batch_reuse=2, **settings).learn(30)
    papers = {"gamma": 0.98, "tau": 0.005, "learning_rate": ACTOR_LEARNING_RATE, "critic_learning_rate": CRITIC_LEARNING_RATE}
    kwargs = {"value_target_kwargs": {"n_steps": 3}, "policy_delay": 1, "batch_reuse": 2, **papers, **differences}
    mpg = MPG("MlpPolicy", LinearEnv(), **kwargs, **settings).learn(30)
    assert_same_parameters(variant, mpg)
