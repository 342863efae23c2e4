"""Copies and pickles of algorithms, before, during and after training: they predict the same and can go on learning."""

import copy
import mmap
import multiprocessing as mp
import pickle

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import settings
import torch as th
from gymnasium import spaces
from helpers import assert_same_parameters
from learner_runs import Each, small_model, when_learning
from lq import LinearEnv
from stable_baselines3 import TD3
from goals import GoalEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecMonitor, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mpg import MPG, AsyncEvalCallback
from sb3_mpg.common import off_policy_model_algorithm
from sb3_mpg.common.compilation.step_compiler import StepCompiler
from sb3_mpg.common.env_pickles import take_env_apart
from sb3_mpg.common.learners import InProcessLearner, MultiprocessLearners

pytestmark = pytest.mark.usefixtures("models_are_fitted_once")

SMALL = {**settings.SMALL, "policy_kwargs": {"net_arch": [8]}, "batch_size": 16, "horizons": (0, 2)}
V1 = {"value_target": "n_step_simulator", "value_target_kwargs": {"n_steps": 3}, "batch_reuse": 2}
OBSERVATIONS = np.array([[0.5, -0.2], [0.1, 0.3]], dtype=np.float32)
HOW = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "cloudpickle": lambda model: cloudpickle.loads(cloudpickle.dumps(model)),
    "deepcopy": copy.deepcopy,
}


class WithExactModel(LinearEnv):
    """Its simulator knows the same task in torch, so that the value target compiles, too."""

    def make_simulator(self, num_agents):
        simulator = super().make_simulator(num_agents)
        simulator.exact_model = self.prior_model
        return simulator


def as_the_same_training(model):
    """Everything random starts from here, and so does the environment."""
    np.random.seed(5)
    th.manual_seed(5)
    model.env.seed(5)
    model._last_obs = None
    return model


def continued(model, n_steps=25):
    return as_the_same_training(model).learn(n_steps, reset_num_timesteps=False)


def assert_is_copy(copied, model):
    """It has all that SB3's algorithms keep, shares nothing, and its parts belong together."""
    assert_same_parameters(copied, model)
    np.testing.assert_array_equal(copied.predict(OBSERVATIONS, deterministic=True)[0], predictions(model))
    assert copied.get_env() is not model.get_env()
    assert copied._n_updates == model._n_updates and copied.num_timesteps == model.num_timesteps
    np.testing.assert_array_equal(copied._last_obs, model._last_obs)
    assert copied.replay_buffer.size() == model.replay_buffer.size() > 0
    for name in ("observations", "actions", "rewards"):
        array = getattr(copied.replay_buffer, name)
        np.testing.assert_array_equal(array, getattr(model.replay_buffer, name))
        assert array.flags.writeable and not isinstance(array.base, mmap.mmap)
    states = [algorithm.actor.optimizer.state_dict()["state"] for algorithm in (copied, model)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 0
    if isinstance(model, MPG):
        assert copied.update.policy is copied.policy and copied.learners.update is copied.update
        assert copied.model_fitting is None or copied.model_fitting.model is copied.update.model


def predictions(model):
    return model.predict(OBSERVATIONS, deterministic=True)[0]


@pytest.mark.parametrize("how", HOW)
def test_a_copy_goes_on_as_the_original(how):
    """With all that is fitted and measured; as SB3's TD3 does."""
    td3 = TD3("MlpPolicy", gym.wrappers.TimeLimit(LinearEnv(), 10), policy_kwargs={"net_arch": [8]}, learning_starts=40)
    for model in (MPG("MlpPolicy", gym.wrappers.TimeLimit(LinearEnv(), 10), **SMALL), td3):
        model.learn(60)
        copied = HOW[how](model)
        assert_is_copy(copied, model)
        assert_same_parameters(continued(copied), continued(model))
        assert copied._n_updates == 45


class InParts(LinearEnv):
    """A tuple of observations, which the algorithm replaces by a dictionary."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Tuple([spaces.Box(-np.inf, np.inf, (1,), np.float32)] * 2)

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return (observation[:1], observation[1:]), info

    def step(self, action):
        observation, *rest = super().step(action)
        return (observation[:1], observation[1:]), *rest


def wrapped(kind):
    """An algorithm around whose environment there are wrappers; those of SB3 cannot be copied by themselves."""
    if kind == "tuple":
        return MPG("MultiInputPolicy", InParts(), **SMALL)
    if kind == "goals":
        env = VecMonitor(DummyVecEnv([lambda: GoalEnv()]))
        return MPG("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, **{**SMALL, "learning_starts": 60})
    env = VecMonitor(VecNormalize(VecCheckNan(DummyVecEnv([LinearEnv] * 2))))
    return MPG("MlpPolicy", env, **SMALL)


@pytest.mark.parametrize("kind", ["tuple", "goals", "normalized"])
@pytest.mark.parametrize("how", HOW)
def test_copies_keep_wrappers(how, kind):
    model = wrapped(kind).learn(70)
    copied = HOW[how](model)
    wrappers = [[wrapper.cls for wrapper in take_env_apart(algorithm.get_env())[0]] for algorithm in (copied, model)]
    assert wrappers[0] == wrappers[1] != []
    assert copied.get_env() is not model.get_env()
    if kind == "normalized":
        assert copied.get_vec_normalize_env() is copied.get_env().venv is not model.get_vec_normalize_env()
        assert copied.get_vec_normalize_env().obs_rms.count == model.get_vec_normalize_env().obs_rms.count
    assert_same_parameters(continued(copied, 60), continued(model, 60))


def test_copies_of_what_was_compiled(monkeypatch):
    """Graphs alone are compiled, and no code, which is what takes the time; a copy has none of them."""
    monkeypatch.setattr(off_policy_model_algorithm, "make_steps", lambda *args: StepCompiler("aot_eager"))
    model = MPG("MlpPolicy", WithExactModel(), compile=True, **V1, **{**SMALL, "learning_starts": 30}).learn(36)
    assert model.update.steps.is_compiled
    for how in HOW.values():
        copied = how(model)
        assert_is_copy(copied, model)
        assert copied.update.steps.is_compiled
        assert copied.update.steps._step_loop is None and copied.update.steps._act is None
    assert continued(copied, 3)._n_updates == 9
    assert not copied.update.steps.has_failed


@pytest.mark.expensive
@pytest.mark.parametrize("how", HOW)
def test_copies_of_what_the_real_compiler_compiled(how):
    model = MPG("MlpPolicy", WithExactModel(), compile=True, **V1, **SMALL).learn(46)
    copied = HOW[how](model)
    assert_is_copy(copied, model)
    continued(copied, 4)
    assert not copied.update.steps.has_failed


def test_a_process_of_the_user_gets_an_algorithm():
    model = MPG("MlpPolicy", LinearEnv(), **SMALL).learn(50)
    with mp.get_context("forkserver").Pool(1) as pool:
        actions = pool.apply(predictions, (model,))
    np.testing.assert_allclose(actions, predictions(model), rtol=1e-6)


@pytest.mark.usefixtures("nothing_is_left")
def test_copies_while_learners_run(tmp_path):
    copies = []

    def take_copies(model):
        assert isinstance(model.learners, MultiprocessLearners)
        assert isinstance(model.replay_buffer.observations.base, mmap.mmap)
        for how in HOW.values():
            copied = how(model)
            assert_is_copy(copied, model)
            assert isinstance(copied.learners, InProcessLearner)
            # Gradients are views of shared memory
            assert all(parameter.grad is None for parameter in how(model.policy).parameters())
            copies.append(copied)

    model = small_model(n_learners=1).learn(70, callback=when_learning(take_copies))
    assert model._n_updates == 30
    # Everything works when the learners have long gone
    for index, copied in enumerate(copies):
        copied.save(tmp_path / "model.zip")
        assert_same_parameters(MPG.load(tmp_path / "model.zip", env=LinearEnv()), copied)
        n_updates = copied._n_updates
        copied.train(2, 16)
        assert copied._n_updates == n_updates + 2
        assert copied.n_learners == 1
        copied.n_learners = int(index == 0)
        assert continued(copied, 20)._n_updates == n_updates + 22


def test_copies_of_an_algorithm_that_holds_its_evaluation(tmp_path):
    """A copy has no evaluator, and evaluates what the first one has not finished."""
    env = VecCheckNan(make_vec_env(lambda: gym.wrappers.TimeLimit(LinearEnv(), 10), 1, seed=3))
    folders = [tmp_path / name for name in ("first", "second")]
    callback = AsyncEvalCallback(env, eval_freq=20, n_eval_episodes=1, log_path=str(folders[0]), verbose=0)
    model = small_model(VecCheckNan(DummyVecEnv([LinearEnv])), compile=False)
    model.evaluation = callback
    copies = []

    def take_copy(model):
        if model.num_timesteps == 40:
            copies.append(copy.deepcopy(model))

    model.learn(60, callback=[callback, Each(take_copy)])
    (copied,) = copies
    copied.evaluation.log_path = str(folders[1] / "evaluations")
    folders[1].mkdir()
    assert copied.evaluation.model is copied
    copied.learn(20, callback=copied.evaluation, reset_num_timesteps=False)
    assert callback.evaluations_timesteps == copied.evaluation.evaluations_timesteps == [20, 40, 60]
