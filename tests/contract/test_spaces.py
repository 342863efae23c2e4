"""Which observations and actions are taken, and which are refused."""

import re

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from contract.cases import CASES

FLOAT32 = spaces.Box(-3, 3, (2,), np.float32)
FLOAT64 = spaces.Box(-3, 3, (2,), np.float64)
INTEGERS = spaces.Box(-10, 10, (3,), np.int64)


def policy_for(space):
    return "MultiInputPolicy" if isinstance(space, (spaces.Dict, spaces.Tuple)) else "MlpPolicy"


def check_it_learns(case, observation_space, action_space=FLOAT32):
    """It trains, acts within the bounds in the right type, and is evaluated."""
    env = gym.wrappers.TimeLimit(case.env(observation_space, action_space), 8)
    model = case.make(env, policy_for(observation_space)).learn(14)
    assert model._n_updates == 4
    observation, _ = env.reset(seed=0)
    assert observation_space.contains(observation)
    action, _ = model.predict(observation, deterministic=False)
    assert action.dtype == action_space.dtype and action_space.contains(action)
    mean_reward, _ = evaluate_policy(model, env, n_eval_episodes=1, warn=False)
    assert np.isfinite(mean_reward)
    return model


@pytest.mark.parametrize(
    "space",
    [
        FLOAT64,
        spaces.Box(-3, 3, (2, 2), np.float32),
        spaces.Dict(a=FLOAT32, b=FLOAT32),
        spaces.Dict(a=FLOAT32, b=FLOAT64),
        spaces.Dict(b=spaces.Box(-1, 1, (2, 1), np.float32), a=spaces.Box(-1, 1, (1,), np.float32)),
    ],
    ids=str,
)
def test_observations(case, space):
    check_it_learns(case, space)


@pytest.mark.parametrize(
    "space",
    [FLOAT64, spaces.Box(-1, 1, (2, 2), np.float32), spaces.Box(np.float32([-1, 0]), np.float32([3, 10]))],
    ids=str,
)
def test_actions(case, space):
    check_it_learns(case, FLOAT32, space)


def test_float64_throughout(case):
    check_it_learns(case, FLOAT64, FLOAT64)
    check_it_learns(case, spaces.Dict(a=FLOAT32, b=FLOAT64), FLOAT64)


@pytest.mark.parametrize("space", [INTEGERS, spaces.Dict(a=FLOAT32, b=INTEGERS), spaces.Tuple([FLOAT32, INTEGERS])], ids=str)
def test_observations_beyond_those_of_sb3(own_case, space):
    check_it_learns(own_case, space)


def test_the_answer_of_reset_is_no_tuple_of_observations(own_case):
    env = own_case.env(spaces.Tuple([FLOAT32, FLOAT32]))
    model = own_case.make(env, "MultiInputPolicy")
    with pytest.raises(ValueError, match="mixing Gym API with SB3 VecEnv API"):
        model.predict(env.reset())


def test_a_fixed_action(own_case):
    low = np.array([-1.0, 0.5], dtype=np.float32)
    space = spaces.Box(low, np.array([1.0, 0.5], dtype=np.float32))
    model = check_it_learns(own_case, FLOAT32, space)
    assert (model.predict(np.stack([FLOAT32.sample() for _ in range(20)]))[0][:, 1] == 0.5).all()


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(3), spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(3), spaces.Box(-np.inf, np.inf, (1,))],
    ids=str,
)
def test_actions_that_are_refused(case, space):
    env = case.env()
    env.action_space = space
    with pytest.raises((AssertionError, ValueError), match=type(space).__name__ if space.dtype != np.float32 else "finite"):
        case.make(env)


def test_bounds_that_stand_for_none(own_case):
    env = own_case.env()
    env.action_space = spaces.Box(-3e38, 3e38, (1,), np.float32)
    with pytest.raises(ValueError, match="must be finite"):
        own_case.make(env)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Discrete(4), "must be a Box of numbers.*Discrete"),
        (spaces.MultiDiscrete([4, 3]), "must be a Box of numbers.*MultiDiscrete"),
        (spaces.MultiBinary(8), "must be a Box of numbers.*MultiBinary"),
        (spaces.Box(0, 255, (36, 36, 1), np.uint8), "images are not supported"),
        (spaces.Dict(a=FLOAT32, b=spaces.Discrete(4)), "must be a Box of numbers.*'b'"),
        (spaces.Dict(a=FLOAT32, b=spaces.Box(0, 255, (36, 36, 1), np.uint8)), "images are not supported.*'b'"),
    ],
    ids=str,
)
def test_observations_that_are_refused(own_case, space, message):
    """The gradient runs through observations, so they are numbers; SB3's algorithms take these, too."""
    env = own_case.env()
    env.observation_space = space
    with pytest.raises(ValueError, match=message):
        own_case.make(env, policy_for(space))


def test_nested_dictionaries_are_refused(case):
    env = case.env()
    env.observation_space = spaces.Dict(a=FLOAT32, b=spaces.Dict(c=FLOAT32))
    with pytest.raises((NotImplementedError, ValueError)):
        case.make(env, "MultiInputPolicy")


def test_the_policy_fits_the_observations(case):
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        case.make(case.env(spaces.Dict(a=FLOAT32)))
    with pytest.raises(ValueError, match="NoPolicy"):
        case.make(policy="NoPolicy")


# What looks like an image to its reader is a box of floats after VecNormalize
@pytest.mark.parametrize("space", [FLOAT32, spaces.Box(-np.inf, np.inf, (1, 36, 36))], ids=str)
def test_a_policy_is_a_name_or_a_class(own_case, space):
    env = own_case.env(space)
    known = re.escape("must be one of ['MlpPolicy', 'MultiInputPolicy'] or a policy class")
    for name in ("CnnPolicy", "mlppolicy"):
        with pytest.raises(ValueError, match=f"{known}, got '{name}'; there is none for images"):
            own_case.make(env, name)
    for thing, got in ((None, "NoneType"), (own_case.make().policy, own_case.cls.policy_aliases["MlpPolicy"].__name__)):
        with pytest.raises(TypeError, match=f"{known}, got an object of type {got}"):
            own_case.make(env, thing)


def test_a_dictionary_is_its_flat_vector(case):
    """The same seed gives the same networks, updates and actions."""
    observation = np.array([0.5, -1.0], dtype=np.float32)
    flat, of_dict = [], []
    for actions, space, shown in ((flat, FLOAT32, observation), (of_dict, spaces.Dict(vec=FLOAT32), {"vec": observation})):
        model = case.make(case.env(space), policy_for(space))
        for _ in range(2):
            actions.append(model.predict(shown, deterministic=True)[0])
            model.learn(16)
    np.testing.assert_allclose(of_dict, flat, rtol=1e-5)


def test_dictionaries_in_many_environments(case):
    env = make_vec_env(lambda: case.env(spaces.Dict(a=FLOAT32, b=FLOAT32), max_steps=4), 2)
    model = case.make(env, "MultiInputPolicy").learn(16)
    actions, _ = model.predict(env.reset())
    assert actions.shape == (2, 1)


def test_dictionaries_with_normalised_keys(case):
    env = make_vec_env(lambda: case.env(spaces.Dict(a=FLOAT32, b=FLOAT32), max_steps=4), 1)
    env = VecNormalize(env, norm_obs_keys=["a"])
    model = case.make(env, "MultiInputPolicy").learn(20)
    assert model._n_updates == 10
    assert np.isfinite(evaluate_policy(model, env, n_eval_episodes=2, warn=False)[0])


# The models and simulators of the environments here know nothing of earlier observations
@pytest.mark.parametrize("case", [case for case in CASES if not case.offers], ids=str)
def test_stacked_observations(case):
    env = VecFrameStack(make_vec_env(lambda: case.env(spaces.Dict(a=FLOAT32, b=FLOAT32), max_steps=4), 1), n_stack=3)
    model = case.make(env, "MultiInputPolicy").learn(14)
    assert model.observation_space["a"].shape == (6,)
    assert np.isfinite(evaluate_policy(model, env, n_eval_episodes=1, warn=False)[0])
