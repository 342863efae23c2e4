"""What bad input gets: one sentence, before the first environment step."""

import sys
import threading

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from lq import LinearEnv, LinearModel
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, AsyncEvalCallback, NStepADP, NStepDPG, PriorModel, check_prior_model
from sb3_mpg.common.trust.weighting import ConstantWeighting, make_weighting_rule
from sb3_mpg.common.value_targets import ReplayTarget


class NeverStepped(LinearEnv):
    def step(self, action):
        raise AssertionError("the error must come before the first environment step")


class WithoutModel(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, dtype=np.float32), {}


def env_with(**space):
    env = NeverStepped()
    for name, value in space.items():
        setattr(env, name, value)
    return env


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"action_space": spaces.Discrete(3)}, "actions, which must be a Box of floats, got Discrete"),
        ({"action_space": spaces.Box(-np.inf, np.inf, (1,))}, "must be finite.*ClipAction hides them"),
        ({"action_space": spaces.Box(-3e38, 3e38, (1,))}, "must be finite.*ClipAction hides them"),
        ({"action_space": spaces.Box(-1, 1, (2,), np.int64)}, "Box of floats, got.*float dtype"),
        (
            {"observation_space": spaces.Discrete(3)},
            "must be a Box of numbers, or a Dict or Tuple.*got Discrete",
        ),
        ({"observation_space": spaces.Dict(a=spaces.Box(-1, 1, (2,)))}, "You must use `MultiInputPolicy`"),
        ({"observation_space": spaces.Box(0, 255, (8, 8, 3), np.uint8)}, "models of images are not supported"),
        ({"observation_space": spaces.Box(-1, 1, ())}, r"Box of observations needs an axis.*got Box.*shape \(1,\)"),
        ({"action_space": spaces.Box(-1, 1, ())}, r"Box of actions needs an axis.*got Box.*shape \(1,\)"),
        ({"action_space": spaces.Box(-1, 1, (0,))}, "Box of actions needs an axis with an element or more"),
    ],
)
def test_spaces(space, message):
    with pytest.raises(ValueError, match=message):
        MPG("MlpPolicy", env_with(**space))


def test_missing_model_shows_how_to_write_one():
    with pytest.raises(ValueError, match="environment offers none") as error:
        MPG("MlpPolicy", WithoutModel())
    assert "class MyModel(PriorModel)" in str(error.value)
    # ... and the algorithms that need none do not ask
    assert MPG("MlpPolicy", WithoutModel(), horizons=(0,), weighting="constant").trust.longest_horizon == 0


@pytest.mark.parametrize(
    ("prior_model", "error", "message"),
    [
        ("somewhere", ValueError, "'auto', 'learned' or a path 'package.module:Class'"),
        ("no_such_package.models:Car", ValueError, "no module 'no_such_package'"),
        ("lq:NoSuchModel", ValueError, "module 'lq' has no 'NoSuchModel'"),
        ("lq:np", TypeError, "'lq:np' names <module 'numpy'.*neither a class nor a function"),
        (42, TypeError, "must be a PriorModel"),
        (lambda: None, TypeError, "must be a PriorModel"),
        (th.nn.Linear(2, 2), TypeError, "must be a PriorModel"),
    ],
)
def test_things_that_are_no_model(prior_model, error, message):
    with pytest.raises(error, match=message):
        MPG("MlpPolicy", NeverStepped(), prior_model=prior_model)


def test_the_example_of_the_error_message_works():
    from sb3_mpg.common.models.loading import HOW_TO_WRITE_A_MODEL

    code = HOW_TO_WRITE_A_MODEL.split("torch:\n\n")[1].split("\n\nPass it")[0]
    namespace: dict = {}
    exec("\n".join(line[4:] for line in code.splitlines()), namespace)
    model = MPG("MlpPolicy", NeverStepped(), prior_model=namespace["MyModel"])
    assert isinstance(model.rollout_model.prior, namespace["MyModel"])


def test_arguments_beside_a_finished_model():
    with pytest.raises(ValueError, match="but `prior_model` is a model"):
        MPG("MlpPolicy", NeverStepped(), prior_model=LinearEnv().prior_model(), prior_model_kwargs={"bias": 1.0})


def model_with(transition=lambda s, a: s + a, reward=lambda s, a, n: -a):
    class Model(PriorModel):
        def transition(self, states, actions):
            return transition(states, actions)

        def reward(self, states, actions, next_states):
            return reward(states, actions, next_states)

    return Model


@pytest.mark.parametrize(
    ("prior_model", "message"),
    [
        (model_with(lambda s, a: s[:, :1]), "transition.*shape"),
        (model_with(reward=lambda s, a, n: -a[:, 0]), "keepdim=True"),
        (model_with(lambda s, a: (s + a).double()), "float64"),
        (model_with(lambda s, a: (s + a).detach()), "gradient|differentiable|detach"),
        (model_with(reward=lambda s, a, n: a / 0), "finite"),
        (model_with(lambda s, a: (s + a).to("meta")), "device"),
    ],
)
def test_models_that_break_the_rules(prior_model, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        MPG("MlpPolicy", NeverStepped(), prior_model=prior_model)
    assert "Model" in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"horizons": ()}, "non-empty sequence"),
        ({"horizons": (0, -5)}, "0 or more"),
        ({"horizons": (5, 25), "weighting": "rule_based"}, "needs horizon 0"),
        ({"weighting": "magic"}, "Unknown weighting"),
        ({"value_target": "magic"}, "Unknown value target"),
        ({"value_target_kwargs": {"n_steps": 0}}, "positive whole number"),
        ({"weighting": ConstantWeighting((0, 25)), "weighting_kwargs": {"values": [1, 1]}}, "`weighting_kwargs` goes with"),
        ({"value_target": ReplayTarget(), "value_target_kwargs": {"n_steps": 2}}, "`value_target_kwargs` goes with"),
        (
            {"value_target": "n_step_replay", "replay_buffer_class": type("Mine", (NStepReplayBuffer,), {})},
            "made for n_steps=3",
        ),
        (
            {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 7}},
            "spans 1 recorded steps with gamma=0.99.*made for n_steps=7, gamma=0.99.*value_target='n_step_replay'",
        ),
        ({"horizons": (0, None)}, "Every horizon must be a whole number"),
        ({"horizons": (0, float("nan"))}, "Every horizon must be a whole number"),
        ({"weighting": [1, 2]}, "Unknown weighting"),
        ({"weighting": "rule_based", "weighting_kwargs": {"etta": 1}}, r"`weighting_kwargs` got \['etta'\].*'eta'"),
        ({"value_target_kwargs": {"noise": 1}}, r"`value_target_kwargs` got \['noise'\].*'noise_std'"),
        ({"value_target_kwargs": {"noise_std": -1}}, "`noise_std` must be a number, 0.0 or more"),
        ({"residual_kwargs": {"members": 3}}, r"`residual_kwargs` got \['members'\].*'n_members'"),
        ({"learner_kwargs": {"time_out": 3}}, r"`learner_kwargs` got \['time_out'\].*'timeout'"),
        ({"learner_kwargs": {"timeout": "3"}}, "`timeout` must be a number, more than 0"),
        ({"residual": "no"}, "`residual` says whether"),
        ({"reward_scale": 0}, "`reward_scale` must be a number, more than 0"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` must be a number, more than 0"),
        ({"batch_size": 0}, "`batch_size` must be a whole number, 1 or more"),
        ({"batch_size": 16.5}, "`batch_size` must be a whole number, 1 or more"),
        ({"batch_size": 16.0}, "`batch_size` must be a whole number, 1 or more, got 16.0"),
        ({"max_skipped_updates": -1}, "`max_skipped_updates` must be a whole number, 0 or more"),
        ({"weighting": "constant", "weighting_kwargs": {"values": [float("nan"), 1]}}, "one weight, 0 or more"),
        ({"gamma": 1.5}, "`gamma` must lie between 0 and 1"),
        ({"tau": 2.0}, "`tau` must lie between 0 and 1"),
        ({"residual_kwargs": {"net_arch": []}}, "lists the sizes of its hidden layers"),
        ({"residual_kwargs": {"net_arch": 64}}, "lists the sizes of its hidden layers"),
        ({"exploration_noise": -0.1}, "`exploration_noise` must be a number, 0.0 or more"),
        ({"model_exploration": 1.5}, "`model_exploration` must lie between 0 and 1, got 1.5"),
        ({"model_planning": -0.1}, "`model_planning` must be a number, 0.0 or more, got -0.1"),
        ({"model_planning": 1.5}, "`model_planning` must lie between 0 and 1, got 1.5"),
        ({"model_exploration": "half"}, "`model_exploration` must be a number, 0.0 or more, got 'half'"),
        ({"batch_reuse": 1.5}, "`batch_reuse` must be a whole number, 1 or more"),
        ({"batch_reuse": 0}, "`batch_reuse` must be a whole number, 1 or more"),
        ({"policy_delay": 0}, "`policy_delay` must be a whole number, 1 or more"),
        ({"rollout_batch_size": 0}, "`rollout_batch_size` must be a whole number, 1 or more"),
        ({"differentiate": "some_actions"}, "'first_action' or 'all_actions'"),
        ({"policy_kwargs": {"share_features_extractor": True}}, "share_features_extractor"),
        ({"value_target": "n_step_replay", "replay_buffer_class": ReplayBuffer}, "needs an NStepReplayBuffer"),
    ],
)
def test_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MPG("MlpPolicy", NeverStepped(), **kwargs)


@pytest.mark.parametrize(
    "cls", [NStepDPG, NStepADP, lambda *args, **kwargs: MPG(*args, value_target="n_step_simulator", **kwargs)]
)
def test_environment_that_cannot_be_put_into_a_state(cls):
    with pytest.raises(ValueError, match="make_simulator"):
        cls("MlpPolicy", WithoutModel(), **({} if cls is NStepDPG else {"prior_model": LinearEnv().prior_model()}))


def test_gradient_of_a_model_that_is_not_there():
    with pytest.raises(ValueError, match="needs a model"):
        MPG("MlpPolicy", NeverStepped(), horizons=(0,), weighting="constant").policy_gradient(np.zeros((1, 2)), 3)


def test_horizon_of_the_analysis():
    with pytest.raises(ValueError, match="0 or more"):
        MPG("MlpPolicy", NeverStepped()).policy_gradient(np.zeros((1, 2)), -1)
    with pytest.raises(ValueError, match="'first_action' or 'all_actions'"):
        MPG("MlpPolicy", NeverStepped()).policy_gradient(np.zeros((1, 2)), 1, "some_actions")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"horizons": (0, 3)}, r"`load` got \['horizons'\]"),
        ({"weighting": "constant"}, r"`load` got \['weighting'\]"),
        ({"weighting_kwargs": {"window": 2}}, r"`load` got \['weighting_kwargs'\]"),
        ({"n_steps": 3}, r"`load` got n_steps=3; give it a `value_target` with value_target_kwargs=\{'n_steps': 3\}"),
        ({"n_steps": 3, "value_target": "n_step_replay"}, "`load` got n_steps=3"),
        ({"batch_reuse": 0}, "`batch_reuse` must be a whole number, 1 or more"),
        ({"n_learners": -1}, "`n_learners` must be"),
    ],
)
def test_settings_given_to_load(tmp_path, kwargs, message):
    MPG("MlpPolicy", LinearEnv(), horizons=np.array([0, 5])).save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=message):
        MPG.load(tmp_path / "model.zip", env=LinearEnv(), **kwargs)
    rule = make_weighting_rule("constant", (0, 3))
    loaded = MPG.load(tmp_path / "model.zip", env=LinearEnv(), weighting_rule=rule)
    assert loaded.weighting_rule.horizons == (0, 3)


def test_file_of_another_algorithm(tmp_path):
    TD3("MlpPolicy", LinearEnv(), buffer_size=10).save(tmp_path / "td3.zip")
    with pytest.raises(TypeError, match="MPG needs an MPGPolicy, got TD3Policy"):
        MPG.load(tmp_path / "td3.zip", env=LinearEnv())


def test_picture_without_matplotlib(monkeypatch):
    report = MPG("MlpPolicy", LinearEnv(), learning_starts=50, policy_kwargs={"net_arch": [8]}).learn(50).trust_report()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sb3-mpg\[plots\]'"):
        report.plot()


def test_attribute_that_is_no_prior_model():
    env = LinearEnv()
    env.prior_model = None
    with pytest.raises(ValueError, match="the environment offers none"):
        MPG("MlpPolicy", env)


def test_attribute_that_is_a_prior_model():
    env = LinearEnv()
    env.prior_model = model = env.prior_model()
    assert MPG("MlpPolicy", env).rollout_model.prior is model


class NeedsArgument(LinearEnv):
    def prior_model(self, friction):
        raise AssertionError


def test_error_of_the_method_itself():
    with pytest.raises(TypeError, match="friction"):
        MPG("MlpPolicy", NeedsArgument())


class HoldsLock(LinearEnv):
    """As environments that talk to another program do: it cannot be sent to another process."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_model_of_an_environment_in_a_worker_process():
    env = make_vec_env(HoldsLock, 1, vec_env_cls=SubprocVecEnv)
    try:
        assert isinstance(MPG("MlpPolicy", env).rollout_model.prior, LinearModel)
    finally:
        env.close()


class TestVectorEnvironmentsOfGymnasium:
    """SB3 would take one for a single environment."""

    message = "SB3 steps several environments as a VecEnv, got SyncVectorEnv.*make_vec_env"

    @pytest.fixture
    def envs(self):
        envs = gym.vector.SyncVectorEnv([NeverStepped] * 2)
        yield envs
        envs.close()

    def test_in_the_constructor(self, envs):
        with pytest.raises(TypeError, match=self.message):
            MPG("MlpPolicy", envs)
        with pytest.raises(TypeError, match="got PathTrackingVectorEnv, a vector environment of Gymnasium"):
            MPG("MlpPolicy", gym.make_vec("PathTracking-v0", num_envs=2))

    def test_in_load_and_set_env(self, envs, tmp_path):
        model = MPG("MlpPolicy", LinearEnv())
        model.save(tmp_path / "model.zip")
        with pytest.raises(TypeError, match=self.message):
            MPG.load(tmp_path / "model.zip", env=envs)
        env = model.get_env()
        with pytest.raises(TypeError, match=self.message):
            model.set_env(envs)
        assert model.get_env() is env

    def test_in_evaluations_and_checks(self, envs):
        with pytest.raises(TypeError, match=self.message):
            AsyncEvalCallback(envs)
        with pytest.raises(TypeError, match=self.message):
            check_prior_model(LinearEnv().prior_model(), envs)


def test_classes_are_no_environments():
    with pytest.raises(TypeError, match=r"got the class WithoutModel: pass an instance, `WithoutModel\(\)`"):
        MPG("MlpPolicy", WithoutModel)


@pytest.mark.parametrize("dtype", [th.float64, th.float16, th.bfloat16])
def test_default_precision_of_torch(dtype, tmp_path):
    model = MPG("MlpPolicy", NeverStepped(), prior_model=LinearEnv().prior_model())
    model.save(tmp_path / "model.zip")
    message = rf"single precision, but torch's default is {dtype}: call torch.set_default_dtype\(torch.float32\)"
    th.set_default_dtype(dtype)
    try:
        for attempt in (
            lambda: MPG("MlpPolicy", NeverStepped()),
            lambda: MPG.load(tmp_path / "model.zip"),
            lambda: model.learn(10),
        ):
            with pytest.raises(ValueError, match=message):
                attempt()
    finally:
        th.set_default_dtype(th.float32)
