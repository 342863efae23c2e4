import math
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gym_check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecMonitor, VecNormalize

import sb3_mpg_envs
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg_envs.inverted_pendulum import (
    InvertedPendulumContiEnv,
    InvertedPendulumContiVecEnv,
    InvertedPendulumModel,
    InvertedPendulumSimulator,
)
from sb3_mpg_envs.path_tracking import (
    PathTrackingEnv,
    PathTrackingModel,
    PathTrackingSimulator,
    PathTrackingVecEnv,
    VehicleParameters,
)

ENV_IDS = ["PathTracking-v0", "InvertedPendulumConti-v0"]
ENV_CLASSES = [PathTrackingEnv, InvertedPendulumContiEnv]
VEC_ENV_CLASSES = [PathTrackingVecEnv, InvertedPendulumContiVecEnv]
SIMULATOR_CLASSES = [PathTrackingSimulator, InvertedPendulumSimulator]

REPOSITORY = Path(sb3_mpg_envs.__file__).parent.parent
# A start from which no action leads into the early-reset region within a few steps
SAFE_STATE = {
    "PathTracking-v0": np.array([0.5, 0.1, 0.02, 0.3, 0.05, 40.0], dtype=np.float32),
    "InvertedPendulumConti-v0": np.array([0.1, 0.01, -0.02, 0.01], dtype=np.float32),
}
LOST_STATE = {
    "PathTracking-v0": np.array([0.0, 0.0, 0.0, 4.0, 0.0, 40.0], dtype=np.float32),
    "InvertedPendulumConti-v0": np.array([0.0, 0.4, 0.0, 0.0], dtype=np.float32),
}


def sample_actions(space: gym.spaces.Box, n_actions: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(space.low, space.high, (n_actions, *space.shape)).astype(np.float32)


def path_reference(x: float) -> tuple[float, float]:
    """Written anew, in plain Python."""
    y, slope = 0.0, 0.0
    for amplitude, length in [(7.5, 200), (2.5, 300), (-5.0, 400)]:
        y += amplitude * math.sin(2 * math.pi * x / length)
        slope += amplitude * 2 * math.pi / length * math.cos(2 * math.pi * x / length)
    return y, math.atan(slope)


def bicycle_step(observation, action) -> list[float]:
    """Equation (15) of the paper as it is printed, substep by substep, in plain Python."""
    c_f, c_r, a, b, m, i_z, dt = -88000.0, -94000.0, 1.14, 1.40, 1500.0, 2420.0, 1 / 200
    speed_error, v, r, lateral_error, heading_error, x = (float(value) for value in observation)
    # From [-1, 1] to rad and m/s^2
    delta, acc = 0.4 * float(action[0]), 3 * float(action[1])
    y_ref, phi_ref = path_reference(x)
    u, y, phi = speed_error + 20, lateral_error + y_ref, heading_error + phi_ref
    for _ in range(20):
        u, v, r, y, phi, x = (
            u + dt * (acc + v * r),
            (m * v * u + dt * (a * c_f - b * c_r) * r - dt * c_f * delta * u - dt * m * u**2 * r) / (m * u - dt * (c_f + c_r)),
            (-i_z * r * u - dt * (a * c_f - b * c_r) * v + dt * a * c_f * delta * u)
            / (dt * (a**2 * c_f + b**2 * c_r) - i_z * u),
            y + dt * (u * math.sin(phi) + v * math.cos(phi)),
            phi + dt * r,
            x + dt * (u * math.cos(phi) - v * math.sin(phi)),
        )
    u = min(max(u, 1.0), 35.0)
    y_ref, phi_ref = path_reference(x)
    heading_error = math.remainder(phi - phi_ref, 2 * math.pi)
    return [u - 20, v, r, y - y_ref, heading_error, x % 1200]


# -- The environments --------------------------------------------------------------------------------------------------


# Warnings are errors in all tests: the checkers must have nothing to say


@pytest.mark.parametrize("env_class", ENV_CLASSES)
def test_check_env(env_class):
    env = env_class()
    sb3_check_env(env)
    env.close()


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_check_env_of_made_environment(env_id):
    env = gym.make(env_id)
    sb3_check_env(env)
    # Gymnasium's checker refuses wrappers. It draws, too: see the next test for that
    gym_check_env(env.unwrapped, skip_render_check=True)
    env.close()


def test_check_env_draws_path_tracking(monkeypatch):
    pytest.importorskip("pygame")
    # The checker tries all render modes, and so opens windows
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = gym.make("PathTracking-v0", render_mode="rgb_array")
    gym_check_env(env.unwrapped)
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


@pytest.mark.parametrize("env_class", ENV_CLASSES)
def test_render_mode_is_checked(env_class):
    with pytest.raises(ValueError, match="render_mode must be None or one of"):
        env_class(render_mode="ascii")


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


@pytest.mark.parametrize(
    "index, value, is_outside",
    [
        (0, -17.5, False),
        (0, -18.5, True),
        (2, 0.75, False),
        (2, 0.85, True),
        (2, -0.85, True),
        (3, 2.95, False),
        (3, 3.05, True),
        (3, -3.05, True),
        (4, 0.78, False),
        (4, -0.79, True),
        (4, 0.79, True),
    ],
)
def test_path_tracking_early_reset_limits(index, value, is_outside):
    state = np.zeros((6, 1))
    state[index] = value
    assert PathTrackingSimulator(1)._is_outside(state).tolist() == [is_outside]


@pytest.mark.parametrize("index, value, is_outside", [(0, 1.99, False), (0, -2.0, True), (1, -0.19, False), (1, 0.21, True)])
def test_pendulum_early_reset_limits(index, value, is_outside):
    state = np.zeros((4, 1))
    state[index] = value
    assert InvertedPendulumSimulator(1)._is_outside(state).tolist() == [is_outside]


def test_rewards_by_hand():
    env = PathTrackingEnv()
    env.reset(options={"state": np.array([2.0, 0.3, -0.5, 1.0, 0.2, 100.0])})
    reward = env.step(np.array([0.1 / 0.4, -2.0 / 3]))[1]
    # Of the state before the step
    assert reward == pytest.approx(-(0.04 + 0.04 + 0.004 + 0.005 + 0.05 + 0.2), abs=1e-6)

    env = InvertedPendulumContiEnv()
    env.reset(options={"state": np.array([0.5, 0.1, -0.2, 0.3])})
    x, theta, velocity, angular_velocity = (float(value) for value in env.step(np.array([1 / 3]))[0])
    # Of the state after the step
    expected = -(0.01 * x**2 + theta**2 + 0.1 * velocity**2 + 0.1 * angular_velocity**2)
    env.reset(options={"state": np.array([0.5, 0.1, -0.2, 0.3])})
    assert env.step(np.array([1 / 3]))[1] == pytest.approx(expected, abs=1e-6)


def test_actions_are_normalised():
    for env_class, max_controls in ((PathTrackingEnv, [0.4, 3.0]), (InvertedPendulumContiEnv, [3.0])):
        env = env_class()
        n_dims = len(max_controls)
        assert env.action_space == gym.spaces.Box(-1, 1, (n_dims,), dtype=np.float32)
        env.reset(seed=0)
        env.step(np.full(n_dims, -0.5))
        # What the renderers show
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


# -- The simulators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("simulator_class", SIMULATOR_CLASSES)
def test_batch_equals_loop(simulator_class):
    num_agents = 5
    batch = simulator_class(num_agents)
    batch.seed(0)
    batch.reset()
    singles = [simulator_class(1) for _ in range(num_agents)]
    for single, state in zip(singles, batch.get_state(), strict=True):
        single.set_state(state[np.newaxis])
    for step in range(30):
        actions = sample_actions(batch.action_space, num_agents, seed=step)
        results = batch.step(actions)
        for idx, single in enumerate(singles):
            for batched, alone in zip(results, single.step(actions[idx : idx + 1]), strict=True):
                assert np.allclose(batched[idx], alone[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("simulator_class", SIMULATOR_CLASSES)
def test_types_and_shapes(simulator_class):
    simulator = simulator_class(3)
    simulator.seed(0)
    observations = simulator.reset()
    n_dims = simulator.observation_space.shape[0]
    assert observations.shape == (3, n_dims) and observations.dtype == np.float32
    next_observations, rewards, terminated, truncated = simulator.step(sample_actions(simulator.action_space, 3))
    assert next_observations.shape == (3, n_dims) and next_observations.dtype == np.float32
    assert rewards.shape == (3,) and rewards.dtype == np.float64
    assert terminated.shape == truncated.shape == (3,)
    assert terminated.dtype == truncated.dtype == bool
    assert all(observation in simulator.observation_space for observation in next_observations)


@pytest.mark.parametrize("simulator_class", SIMULATOR_CLASSES)
def test_reset_and_set_state_of_some_agents(simulator_class):
    simulator = simulator_class(4)
    simulator.seed(0)
    before = simulator.reset()
    after = simulator.reset(np.array([1, 3]))
    assert np.array_equal(after[[0, 2]], before[[0, 2]])
    assert not np.any(after[[1, 3]] == before[[1, 3]])
    moved = simulator.set_state(before[[1]], np.array([3]))
    assert np.allclose(moved[3], before[1], atol=1e-5)
    assert np.array_equal(moved[:3], after[:3])

    # Nothing of the states before is left
    fresh = simulator_class(4)
    fresh.set_state(simulator.get_state())
    actions = sample_actions(simulator.action_space, 4)
    for result, expected in zip(simulator.step(actions), fresh.step(actions), strict=True):
        assert np.allclose(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("simulator_class", SIMULATOR_CLASSES)
def test_step_of_some_agents(simulator_class):
    simulator, twin = simulator_class(4), simulator_class(4)
    simulator.seed(0)
    simulator.reset()
    before = simulator.get_state()
    twin.set_state(before)
    actions = sample_actions(simulator.action_space, 8)
    # Twice, and not in the order of the agents: what a simulator remembers of an agent must stay with it
    some = np.array([3, 1])
    for step_actions in (actions[:4], actions[4:]):
        for result, expected in zip(simulator.step(step_actions[some], some), twin.step(step_actions), strict=True):
            assert np.allclose(result, expected[some], rtol=0, atol=1e-6)
    assert np.array_equal(simulator.get_state()[[0, 2]], before[[0, 2]])
    assert not simulator.last_controls[[0, 2]].any()
    assert np.array_equal(simulator.last_controls[some], twin.last_controls[some])


@pytest.mark.parametrize("simulator_class", SIMULATOR_CLASSES)
def test_wrong_input_is_refused(simulator_class):
    simulator = simulator_class(2)
    observations = simulator.reset()
    with pytest.raises(ValueError, match="Expected observations of shape"):
        simulator.set_state(observations[0])
    with pytest.raises(ValueError, match="not finite"):
        simulator.set_state(observations * np.nan)
    with pytest.raises(ValueError, match="Expected actions of shape"):
        simulator.step(sample_actions(simulator.action_space, 3))
    with pytest.raises(ValueError, match="not finite"):
        simulator.step(np.nan * sample_actions(simulator.action_space, 2))
    with pytest.raises(ValueError, match="num_agents must be at least 1"):
        simulator_class(0)
    with pytest.raises(ValueError, match="start_width must be"):
        simulator_class(1, start_width=-1.0)
    with pytest.raises(ValueError, match="early_reset_penalty must be"):
        simulator_class(1, early_reset_penalty=-1.0)


def test_hopeless_start_distribution_is_refused():
    simulator = InvertedPendulumSimulator(4, start_width=1e6)
    with pytest.raises(ValueError, match="early-reset region"):
        simulator.reset()


@pytest.mark.parametrize("simulator_class", SIMULATOR_CLASSES)
def test_pickle_continues(simulator_class):
    simulator = simulator_class(3, start_width=0.5)
    simulator.seed(0)
    simulator.reset()
    copy = pickle.loads(pickle.dumps(simulator))
    actions = sample_actions(simulator.action_space, 3)
    for original, copied in zip(simulator.step(actions), copy.step(actions), strict=True):
        assert np.array_equal(original, copied)
    # The random generator is part of it
    assert np.array_equal(simulator.reset(), copy.reset())


@pytest.mark.parametrize("simulator_class", SIMULATOR_CLASSES)
def test_steps_do_not_share_memory(simulator_class):
    simulator = simulator_class(2)
    first = simulator.reset()
    copy = first.copy()
    second = simulator.step(sample_actions(simulator.action_space, 2))[0]
    second_copy = second.copy()
    simulator.step(sample_actions(simulator.action_space, 2, seed=1))
    assert np.array_equal(first, copy)
    assert np.array_equal(second, second_copy)


def test_vehicle_against_scalar_reference():
    rng = np.random.default_rng(0)
    n_states = 300
    low, high = [-19, -3, -1.5, -4, -3.1, 0], [15, 3, 1.5, 4, 3.1, 1200]
    states = rng.uniform(low, high, (n_states, 6))
    # Spinning, too: beyond a quarter turn per step
    states[: n_states // 3, 2] = rng.uniform(-20, 20, n_states // 3)
    states[0] = [0, 0, 0, 0, 0, 1199.9]  # across the period
    actions = rng.uniform(-1, 1, (n_states, 2))
    simulator = PathTrackingSimulator(n_states)
    simulator.set_state(states)
    simulator.step(actions)
    expected = np.array([bicycle_step(state, action) for state, action in zip(states, actions, strict=True)])
    # Rounding of x, which is up to 1200, alone is 2e-13 per substep
    assert np.allclose(simulator.get_state(), expected, rtol=0, atol=2e-12)
    assert simulator.get_state()[0, 5] < 2


def test_vehicle_state_is_clipped_and_wrapped():
    simulator = PathTrackingSimulator(2, early_reset=False)
    simulator.set_state(np.array([[30.0, 0, 0, 0, 3 * np.pi, 1250.0], [-30.0, 0, 0, 0, -np.pi, -10.0]]))
    assert np.allclose(simulator.get_state(), [[15, 0, 0, 0, np.pi, 50], [-19, 0, 0, 0, np.pi, 1190]])
    observations = simulator.step(np.array([[0.0, 1.0], [0.0, -1.0]]))[0]
    assert observations[:, 0].tolist() == [15.0, -19.0]


def test_vehicle_parameters_reach_the_simulator():
    heavy = VehicleParameters(mass=3000.0)
    state = SAFE_STATE["PathTracking-v0"][np.newaxis]
    results = []
    for vehicle in (VehicleParameters(), heavy):
        env = PathTrackingEnv(vehicle=vehicle)
        assert env.prior_model().vehicle == vehicle
        simulator = env.make_simulator(1)
        simulator.set_state(state)
        results.append(simulator.step(np.array([[0.5, 0.0]]))[0])
    assert not np.allclose(results[0], results[1])


def test_path_tracking_start_distribution():
    num_agents = 40000
    simulator = PathTrackingSimulator(num_agents, early_reset=False)
    simulator.seed(0)
    speed_error, v, r, lateral_error, heading_error, x = simulator.reset().astype(np.float64).T
    slip_angle = np.arctan(v / (speed_error + 20))
    for values, std in ((lateral_error, 1.0), (heading_error, np.pi / 9), (slip_angle, 0.15), (r, 0.3)):
        assert abs(values.mean()) < 0.02 * std
        assert values.std() == pytest.approx(std, rel=0.02)
    assert 0 <= x.min() < 1 and 599 < x.max() <= 600 and x.mean() == pytest.approx(300, abs=4)
    assert -5 <= speed_error.min() < -4.9 and 4.9 < speed_error.max() <= 5

    # Nobody starts in the early-reset region
    simulator = PathTrackingSimulator(num_agents)
    simulator.seed(0)
    observations = simulator.reset()
    assert not simulator._is_outside(observations.T.astype(np.float64)).any()


@pytest.mark.parametrize("simulator_class", SIMULATOR_CLASSES)
def test_start_width(simulator_class):
    spreads = {}
    for width in (0.0, 0.5, 1.0):
        simulator = simulator_class(4000, start_width=width, early_reset=False)
        simulator.seed(0)
        spreads[width] = simulator.reset().std(axis=0)
    assert np.allclose(spreads[0.0], 0)
    # The lateral velocity of the vehicle is u tan(slip angle), not quite linear in the slip angle
    assert np.allclose(spreads[0.5], 0.5 * spreads[1.0], rtol=0.05)


def test_pendulum_start_distribution():
    simulator = InvertedPendulumSimulator(4000)
    simulator.seed(0)
    observations = simulator.reset()
    assert np.all(np.abs(observations) <= 0.01)
    assert np.allclose(observations.std(axis=0), 0.01 / np.sqrt(3), rtol=0.05)


# -- The vector environments -------------------------------------------------------------------------------------------


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
            # Already the start of the next episode
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
    # A warning that there is no Monitor would be an error here
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
    # Workers import nothing by themselves: the module belongs into the id. Both tasks in one pool, to save time
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
        # The fourth step is the reset of the third: other starts, and nothing to compare with after it
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


# -- Imports and pictures ----------------------------------------------------------------------------------------------


def test_import_registers_and_nothing_else():
    program = (
        "import sys, gymnasium, sb3_mpg_envs\n"
        "assert 'PathTracking-v0' in gymnasium.registry and 'InvertedPendulumConti-v0' in gymnasium.registry\n"
        "heavy = {'mujoco', 'torch', 'pygame', 'matplotlib', 'sb3_mpg', 'stable_baselines3'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, timeout=60)


def test_path_tracking_picture():
    pytest.importorskip("pygame")
    env = gym.make("PathTracking-v0", render_mode="rgb_array")
    env.reset(options={"state": SAFE_STATE["PathTracking-v0"]})
    first = env.render()
    assert first.dtype == np.uint8 and first.shape == (600, 900, 3)
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 10
    env.step(np.array([0.5, 0.3], dtype=np.float32))
    assert not np.array_equal(env.render(), first)
    env.close()


def test_vec_env_picture():
    pytest.importorskip("pygame")
    venv = PathTrackingVecEnv(6, render_mode="rgb_array")
    venv.seed(0)
    venv.reset()
    images = venv.get_images()
    assert len(images) == 4 and not np.array_equal(images[0], images[1])
    assert venv.render().shape == (1200, 1800, 3)
    venv.close()
    with pytest.raises(ValueError, match="rgb_array"):
        PathTrackingVecEnv(1).get_images()

    envs = gym.make_vec("PathTracking-v0", num_envs=2, render_mode="rgb_array")
    envs.reset(seed=0)
    frames = envs.render()
    assert len(frames) == 2 and frames[0].shape == (600, 900, 3)
    envs.close()


def test_window_opens_and_closes(monkeypatch):
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = PathTrackingEnv(render_mode="human")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()
    env.close()


DRAW_PENDULUM = """
import gymnasium as gym, numpy as np, sb3_mpg_envs
env = gym.make("InvertedPendulumConti-v0", render_mode="rgb_array")
env.reset(options={"state": np.array([0.3, 0.15, 0.0, 0.0])})
image = env.render()
assert image.shape == (480, 720, 3) and image.dtype == np.uint8
assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
env.step(np.array([1.0], dtype=np.float32))
assert not np.array_equal(env.render(), image)
env.close()
"""


def run_with_backend(program: str, backend: str, monkeypatch) -> subprocess.CompletedProcess:
    # MuJoCo chooses its backend when it is imported
    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    return subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_pendulum_picture(monkeypatch):
    for backend in ("egl", "osmesa"):
        result = run_with_backend(DRAW_PENDULUM, backend, monkeypatch)
        if result.returncode == 0:
            return
        assert "AssertionError" not in result.stderr, result.stderr
    pytest.skip("MuJoCo can draw with neither EGL nor OSMesa on this machine")


def test_pendulum_window_needs_display(monkeypatch):
    if not sys.platform.startswith("linux"):
        pytest.skip("Only Linux runs without a display")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(RuntimeError, match="needs a display"):
        InvertedPendulumContiEnv(render_mode="human").reset()
