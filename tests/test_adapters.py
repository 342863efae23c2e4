"""The simulators as Gymnasium's environments and vector environments and as SB3's ``VecEnv``."""

import importlib
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env as gym_check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecMonitor, VecNormalize
from tasks import ENV_CLASSES, ENV_IDS, LOST_STATE, SAFE_STATE, SIMULATOR_CLASSES, VEC_ENV_CLASSES, sample_actions

import sb3_mpg_envs
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg_envs.inverted_pendulum import (
    InvertedPendulumContiEnv,
    InvertedPendulumContiVecEnv,
    InvertedPendulumModel,
    InvertedPendulumSimulator,
)
from sb3_mpg_envs.path_tracking import PathTrackingEnv, PathTrackingModel, PathTrackingSimulator, PathTrackingVecEnv

REPOSITORY = Path(sb3_mpg_envs.__file__).parent.parent


def test_import_registers_and_nothing_else():
    program = (
        "import sys, gymnasium, sb3_mpg_envs\n"
        "assert 'PathTracking-v0' in gymnasium.registry and 'InvertedPendulumConti-v0' in gymnasium.registry\n"
        "heavy = {'mujoco', 'torch', 'pygame', 'matplotlib', 'sb3_mpg', 'stable_baselines3'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        # Also when somebody looks for what is not there, or lists what is
        "assert not hasattr(sb3_mpg_envs, '__path_tracking__') and 'PathTrackingVecEnv' in dir(sb3_mpg_envs)\n"
        "from sb3_mpg_envs import PathTrackingVecEnv\n"
        "assert PathTrackingVecEnv(2).reset().shape == (2, 6)\n"
        "assert 'mujoco' not in sys.modules\n"
        "from sb3_mpg_envs import InvertedPendulumContiEnv, path_tracking\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, timeout=60)


def test_what_can_be_imported():
    public = {
        *importlib.import_module("sb3_mpg_envs.path_tracking").__all__,
        *importlib.import_module("sb3_mpg_envs.inverted_pendulum").__all__,
    }
    assert public < set(dir(sb3_mpg_envs))
    assert all(getattr(sb3_mpg_envs, name).__name__ == name for name in public)
    assert sb3_mpg_envs.path_tracking.PathTrackingVecEnv is sb3_mpg_envs.PathTrackingVecEnv
    with pytest.raises(ImportError, match="NoSuchEnv"):
        from sb3_mpg_envs import NoSuchEnv  # noqa: F401


# The checkers must not warn: pytest turns warnings into errors


@pytest.mark.parametrize("env_class", ENV_CLASSES)
def test_check_env(env_class):
    env = env_class()
    sb3_check_env(env)
    env.close()


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_check_env_of_made_environment(env_id):
    env = gym.make(env_id)
    sb3_check_env(env)
    # Gymnasium's checker refuses wrappers. Its check of rendering is in test_rendering.py
    gym_check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("env_id, time_limit", [("PathTracking-v0", 200), ("InvertedPendulumConti-v0", 100)])
def test_time_limit(env_id, time_limit):
    env = gym.make(env_id, early_reset=False)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, dtype=np.float32)
    for step in range(1, time_limit + 1):
        _, _, terminated, truncated, _ = env.step(action)
        assert not terminated
        assert truncated == (step == time_limit)


@pytest.mark.parametrize("env_class", ENV_CLASSES)
def test_seed_reproduces_starts(env_class):
    env, twin = env_class(), env_class()
    first, _ = env.reset(seed=3)
    assert np.array_equal(first, twin.reset(seed=3)[0])
    second, _ = env.reset()
    assert not np.array_equal(first, second)
    assert np.array_equal(second, twin.reset()[0])
    assert not np.array_equal(first, env.reset(seed=4)[0])


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_reset_to_observed_state(env_id):
    env, twin = gym.make(env_id), gym.make(env_id)
    observation, _ = env.reset(seed=0)
    action = sample_actions(env.action_space, 1)[0]
    copy, _ = twin.reset(options={"state": observation})
    assert np.allclose(copy, observation, atol=1e-5)
    next_observation, reward, *_ = env.step(action)
    next_copy, copied_reward, *_ = twin.step(action)
    assert np.allclose(next_copy, next_observation, atol=1e-4)
    assert copied_reward == pytest.approx(reward, abs=1e-5)


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_early_reset(env_id):
    action = np.zeros(gym.make(env_id).action_space.shape, dtype=np.float32)

    def step_from_lost_state(**kwargs):
        env = gym.make(env_id, **kwargs)
        env.reset(seed=0, options={"state": LOST_STATE[env_id]})
        return env.step(action)

    _, reward, terminated, truncated, _ = step_from_lost_state()
    assert (terminated, truncated) == (False, True)
    _, penalised_reward, terminated, truncated, _ = step_from_lost_state(early_reset_terminates=True, early_reset_penalty=7.0)
    assert (terminated, truncated) == (True, False)
    assert penalised_reward == pytest.approx(reward - 7.0)
    _, free_reward, terminated, truncated, _ = step_from_lost_state(early_reset=False)
    assert (terminated, truncated) == (False, False)
    assert free_reward == pytest.approx(reward)


def test_actions_are_normalised():
    for env_class, max_controls in ((PathTrackingEnv, [0.4, 3.0]), (InvertedPendulumContiEnv, [3.0])):
        env = env_class()
        n_dims = len(max_controls)
        assert env.action_space == gym.spaces.Box(-1, 1, (n_dims,), dtype=np.float32)
        env.reset(seed=0)
        env.step(np.full(n_dims, -0.5))
        # The renderers show these controls
        assert np.array_equal(env.simulator.last_controls, -0.5 * np.array([max_controls]))


@pytest.mark.parametrize("env_class", ENV_CLASSES)
def test_actions_are_clipped(env_class):
    env = env_class(early_reset=False)
    observation, _ = env.reset(seed=0)
    results = []
    for action in (env.action_space.high, 10 * env.action_space.high):
        env.reset(options={"state": observation})
        results.append(env.step(action)[:2])
    assert np.array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("env_class", VEC_ENV_CLASSES)
def test_vec_env_episodes(env_class):
    venv = env_class(3, max_episode_steps=4, early_reset=False)
    venv.seed(0)
    venv.reset()
    returns = np.zeros(3)
    for step in range(1, 9):
        previous = venv.simulator.make_simulator(3)
        previous.set_state(venv.simulator.get_state())
        actions = sample_actions(venv.action_space, 3, seed=step)
        observations, rewards, dones, infos = venv.step(actions)
        expected = previous.step(actions)[0]
        returns += rewards
        assert rewards.dtype == np.float32
        assert dones.tolist() == [step % 4 == 0] * 3
        for idx in range(3):
            if not dones[idx]:
                assert infos[idx] == {}
                assert np.allclose(observations[idx], expected[idx], atol=1e-6)
                continue
            assert infos[idx]["TimeLimit.truncated"] is True
            assert np.allclose(infos[idx]["terminal_observation"], expected[idx], atol=1e-6)
            # The observation is the start of the next episode
            assert not np.allclose(observations[idx], expected[idx])
            assert infos[idx]["episode"]["l"] == 4
            assert infos[idx]["episode"]["r"] == pytest.approx(returns[idx], abs=1e-5)
        if step % 4 == 0:
            returns[:] = 0
    assert len({id(info) for info in infos}) == 3
    venv.close()


@pytest.mark.parametrize("env_id, env_class", list(zip(ENV_IDS, VEC_ENV_CLASSES, strict=True)))
@pytest.mark.parametrize("terminates", [False, True])
def test_vec_env_early_reset(env_id, env_class, terminates):
    venv = env_class(2, early_reset_terminates=terminates)
    venv.set_options([{"state": LOST_STATE[env_id]}, {"state": SAFE_STATE[env_id]}])
    assert np.allclose(venv.reset()[0], LOST_STATE[env_id], atol=1e-5)
    _, _, dones, infos = venv.step(np.zeros((2, *venv.action_space.shape)))
    assert dones.tolist() == [True, False]
    assert infos[0]["TimeLimit.truncated"] is (not terminates)
    # Options are used once
    assert not np.allclose(venv.reset()[0], LOST_STATE[env_id])


@pytest.mark.parametrize("env_class", VEC_ENV_CLASSES)
def test_vec_env_seed(env_class):
    starts = []
    for seed in (1, 1, 2):
        venv = env_class(3)
        venv.seed(seed)
        starts.append(venv.reset())
    assert np.array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])


def test_vec_env_attributes():
    venv = PathTrackingVecEnv(3, start_width=0.5)
    assert venv.get_attr("start_width") == [0.5] * 3
    assert venv.get_attr("render_mode", indices=[0, 2]) == [None, None]
    assert not venv.has_attr("compute_reward")
    with pytest.raises(AttributeError):
        venv.get_attr("nothing")
    venv.set_attr("start_width", 0.0)
    assert venv.simulator.start_width == 0.0
    with pytest.raises(ValueError, match="share one simulator"):
        venv.set_attr("start_width", 1.0, indices=[0])
    assert len(venv.env_method("prior_model", indices=0)) == 1
    assert venv.env_method("make_simulator", 7, indices=[0])[0].num_agents == 7
    assert venv.env_is_wrapped(Monitor) == [True] * 3
    assert venv.env_is_wrapped(gym.wrappers.TimeLimit, indices=[1]) == [False]
    with pytest.raises(ValueError, match="max_episode_steps"):
        PathTrackingVecEnv(3, max_episode_steps=0)


@pytest.mark.parametrize("env_class", VEC_ENV_CLASSES)
def test_vec_env_under_wrappers(env_class):
    venv = VecNormalize(env_class(2, max_episode_steps=3), gamma=0.98)
    venv.reset()
    for _ in range(7):
        observations, _, _, _ = venv.step(np.zeros((2, *venv.action_space.shape)))
    assert observations.shape == (2, *venv.observation_space.shape)
    assert isinstance(venv.env_method("prior_model", indices=[0])[0], PriorModel)

    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        monitored = VecMonitor(env_class(2, max_episode_steps=3, early_reset=False))
    monitored.reset()
    for _ in range(3):
        _, _, dones, infos = monitored.step(np.zeros((2, *venv.action_space.shape)))
    assert dones.all() and infos[0]["episode"]["l"] == 3


def test_evaluate_policy_reads_the_episodes():
    class ZeroPolicy:
        def predict(self, observations, state=None, episode_start=None, deterministic=True):
            return np.zeros((len(observations), 1)), None

    venv = InvertedPendulumContiVecEnv(2, max_episode_steps=5)
    # Without a Monitor there would be a warning, which is an error here
    _, lengths = evaluate_policy(ZeroPolicy(), venv, n_eval_episodes=4, return_episode_rewards=True)
    assert lengths == [5] * 4


@pytest.mark.parametrize(
    "env_id, model_class, simulator_class",
    [
        ("PathTracking-v0", PathTrackingModel, PathTrackingSimulator),
        ("InvertedPendulumConti-v0", InvertedPendulumModel, InvertedPendulumSimulator),
    ],
)
def test_environment_offers_model_and_simulator(env_id, model_class, simulator_class):
    env_kwargs = {"early_reset_terminates": True, "early_reset_penalty": 3.0, "start_width": 0.5}
    venv = make_vec_env(env_id, n_envs=1, env_kwargs=env_kwargs)
    model = venv.env_method("prior_model", indices=[0])[0]
    simulator = venv.env_method("make_simulator", 6, indices=[0])[0]
    venv.close()
    assert isinstance(model, model_class) and isinstance(simulator, simulator_class)
    assert model.terminates and model.early_reset_penalty == 3.0
    assert simulator.num_agents == 6 and simulator.start_width == 0.5
    assert simulator.reset().shape == (6, *simulator.observation_space.shape)

    env = gym.make(env_id, **env_kwargs)
    assert isinstance(env.get_wrapper_attr("prior_model")(), model_class)
    assert isinstance(env.get_wrapper_attr("make_simulator")(2), simulator_class)


def test_subprocesses_send_model_and_simulator():
    # Workers import the module that the id names. One pool for both tasks saves time
    venv = SubprocVecEnv([lambda env_id=env_id: gym.make(f"sb3_mpg_envs:{env_id}") for env_id in ENV_IDS])
    try:
        models = venv.env_method("prior_model")
        simulators = venv.env_method("make_simulator", 6)
    finally:
        venv.close()
    assert [type(model) for model in models] == [PathTrackingModel, InvertedPendulumModel]
    for simulator, simulator_class in zip(simulators, SIMULATOR_CLASSES, strict=True):
        assert isinstance(simulator, simulator_class)
        simulator.reset()
        assert simulator.step(sample_actions(simulator.action_space, 6))[1].shape == (6,)


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_make_vec(env_id):
    envs = gym.make_vec(env_id, num_envs=2, max_episode_steps=3, early_reset=False)
    single = gym.make_vec(env_id, num_envs=2, max_episode_steps=3, early_reset=False, vectorization_mode="sync")
    assert type(envs).__name__.endswith("VectorEnv") and type(envs).__module__.startswith("sb3_mpg_envs")
    assert envs.metadata["autoreset_mode"] == single.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert envs.observation_space == single.observation_space
    assert envs.action_space == single.action_space
    start, _ = envs.reset(seed=0)
    assert np.array_equal(start, envs.reset(seed=0)[0])
    single.reset(seed=0)
    for idx in range(2):
        single.envs[idx].reset(options={"state": start[idx]})
    envs.reset(options={"state": start})
    envs.action_space.seed(0)
    for step in range(1, 8):
        actions = envs.action_space.sample()
        results, expected = envs.step(actions), single.step(actions)
        # The fourth step resets the agents to random starts, so that later observations differ
        if step <= 3:
            assert np.allclose(results[0], expected[0], atol=1e-5)
        if step <= 4:
            assert np.allclose(results[1], expected[1], atol=1e-5)
        assert np.array_equal(results[2], expected[2])
        assert np.array_equal(results[3], expected[3])
        assert results[3].all() == (step in (3, 7))
    envs.close()
    single.close()


@pytest.mark.parametrize("env_id, time_limit", [("PathTracking-v0", 200), ("InvertedPendulumConti-v0", 100)])
def test_make_vec_knows_the_time_limit(env_id, time_limit):
    assert gym.make_vec(env_id, num_envs=2).unwrapped.max_episode_steps == time_limit


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_make_vec_early_reset(env_id):
    envs = gym.make_vec(env_id, num_envs=2)
    envs.reset(seed=0, options={"state": np.stack([LOST_STATE[env_id], SAFE_STATE[env_id]])})
    actions = np.zeros(envs.action_space.shape, dtype=np.float32)
    _, rewards, terminated, truncated, _ = envs.step(actions)
    assert truncated.tolist() == [True, False] and not terminated.any()
    assert (rewards < 0).all()
    observations, rewards, terminated, truncated, _ = envs.step(actions)
    assert not truncated.any() and not terminated.any()
    assert rewards[0] == 0.0 and rewards[1] < 0
    assert not np.allclose(observations[0], LOST_STATE[env_id], atol=0.1)


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_steps_and_images_before_the_first_reset(env_id):
    """As Gymnasium's own wrapper says it, in every adapter and for a part of the agents."""
    env_class, vec_env_class = dict(zip(ENV_IDS, zip(ENV_CLASSES, VEC_ENV_CLASSES, strict=True), strict=True))[env_id]
    vector_env = gym.make_vec(env_id, num_envs=2)
    for env in (gym.make(env_id), env_class(render_mode="rgb_array"), vec_env_class(2, render_mode="rgb_array"), vector_env):
        shape = env.action_space.shape if isinstance(env, (gym.Env, gym.vector.VectorEnv)) else (2, *env.action_space.shape)
        actions = np.zeros(shape, dtype=np.float32)
        with pytest.raises(ResetNeeded):
            env.step(actions)
        if env.render_mode is not None:
            with pytest.raises(ResetNeeded):
                env.render()
        env.reset()
        env.step(actions)
        env.close()

    simulator = vec_env_class(2).simulator
    simulator.reset(np.array([1]))
    actions = np.zeros((2, *simulator.action_space.shape))
    with pytest.raises(ResetNeeded, match="call reset"):
        simulator.step(actions)
    simulator.step(actions[1:], np.array([1]))
    simulator.set_state(SAFE_STATE[env_id][None], np.array([0]))
    simulator.step(actions)
    with pytest.raises(ResetNeeded):
        simulator.make_simulator(2).step(actions)
