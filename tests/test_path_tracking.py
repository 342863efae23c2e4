"""Equations, reward and start distribution of the path tracking task, and its compiled simulator."""

import math
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from tasks import SAFE_STATE
from torch._dynamo.utils import counters

import sb3_mpg_envs  # noqa: F401
from sb3_mpg_envs.path_tracking import (
    PathTrackingEnv,
    PathTrackingModel,
    PathTrackingSimulator,
    PathTrackingVecEnv,
    VehicleParameters,
    dynamics,
)
from sb3_mpg_envs.path_tracking.dynamics import sine_and_cosine
from sb3_mpg_envs.path_tracking.simulator import compiled_tracking

HEAVY = VehicleParameters(mass=3000.0, yaw_inertia=5000.0)


def path_reference(x: float) -> tuple[float, float]:
    """The reference path in plain Python, independent of the library."""
    y, slope = 0.0, 0.0
    for amplitude, length in [(7.5, 200), (2.5, 300), (-5.0, 400)]:
        y += amplitude * math.sin(2 * math.pi * x / length)
        slope += amplitude * 2 * math.pi / length * math.cos(2 * math.pi * x / length)
    return y, math.atan(slope)


def bicycle_step(observation, action) -> list[float]:
    """Equation (15) of the paper as printed, in plain Python, one substep after another."""
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


def test_sine_and_cosine_at_every_angle():
    angles = np.concatenate([np.linspace(-7.0, 7.0, 1001), np.pi * np.arange(-4, 5) / 2])
    for angle, sine, cosine in zip(angles, *sine_and_cosine(angles, np), strict=True):
        assert sine == pytest.approx(math.sin(angle), abs=1e-15)
        assert cosine == pytest.approx(math.cos(angle), abs=1e-15)
    # The derivatives must have no poles, although the tangent has
    inputs = th.as_tensor(angles, dtype=th.float32).requires_grad_()
    sines, cosines = sine_and_cosine(inputs, th)
    for values, expected in ((sines, inputs.cos()), (cosines, -inputs.sin())):
        (derivatives,) = th.autograd.grad(values.sum(), inputs, retain_graph=True)
        th.testing.assert_close(derivatives, expected, rtol=0, atol=1e-6)


def test_vehicle_against_scalar_reference():
    rng = np.random.default_rng(0)
    n_states = 300
    low, high = [-19, -3, -1.5, -4, -3.1, 0], [15, 3, 1.5, 4, 3.1, 1200]
    states = rng.uniform(low, high, (n_states, 6))
    # A third of the vehicles spins by more than a quarter turn per step
    states[: n_states // 3, 2] = rng.uniform(-20, 20, n_states // 3)
    states[0] = [0, 0, 0, 0, 0, 1199.9]  # drives across the end of the path's period
    actions = rng.uniform(-1, 1, (n_states, 2))
    simulator = PathTrackingSimulator(n_states)
    simulator.set_state(states)
    simulator.step(actions)
    expected = np.array([bicycle_step(state, action) for state, action in zip(states, actions, strict=True)])
    # The rounding error of x alone, which is up to 1200, is 2e-13 per substep
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


def test_reward_by_hand():
    env = PathTrackingEnv()
    env.reset(options={"state": np.array([2.0, 0.3, -0.5, 1.0, 0.2, 100.0])})
    reward = env.step(np.array([0.1 / 0.4, -2.0 / 3]))[1]
    # The reward is that of the state before the step
    assert reward == pytest.approx(-(0.04 + 0.04 + 0.004 + 0.005 + 0.05 + 0.2), abs=1e-6)


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

    # No agent starts in the early-reset region
    simulator = PathTrackingSimulator(num_agents)
    simulator.seed(0)
    observations = simulator.reset()
    assert not simulator._is_outside(observations.T.astype(np.float64)).any()


def started(n_agents: int, **kwargs) -> tuple[PathTrackingSimulator, PathTrackingSimulator]:
    """
    :return: two simulators in the same states, the first compiled
    """
    simulators = PathTrackingSimulator(n_agents, compile=True, **kwargs), PathTrackingSimulator(n_agents, **kwargs)
    for simulator in simulators:
        simulator.seed(0)
        simulator.reset()
    return simulators


def check_steps(simulators: tuple[PathTrackingSimulator, PathTrackingSimulator], rng: np.random.Generator) -> None:
    """Compare steps of all agents and of some agents in any order."""
    compiled, usual = simulators
    n_agents = usual.num_agents
    for indices in (None, None, rng.permutation(n_agents)[: n_agents // 2 + 1], np.array([1]), None):
        actions = rng.uniform(-1, 1, (n_agents if indices is None else len(indices), 2))
        for result, expected in zip(compiled.step(actions, indices), usual.step(actions, indices), strict=True):
            np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(compiled.get_state(), usual.get_state(), rtol=0, atol=1e-12)


class TestCompiledEquations:
    """Compiled equations of motion (``compile=True``)."""

    @pytest.fixture(autouse=True)
    def empty_cache(self):
        """Compiled functions are kept in a cache of the process."""
        compiled_tracking.cache_clear()
        yield
        compiled_tracking.cache_clear()

    @pytest.fixture
    def few_substeps(self, monkeypatch):
        """20 substeps take too long to compile."""
        monkeypatch.setattr(dynamics, "N_SUBSTEPS", 2)

    @pytest.fixture
    def traced_only(self, monkeypatch):
        """Tracing takes a second, compiling takes many."""
        compile_with = th.compile

        def trace(step, fullgraph, options):
            guards = {"guard_filter_fn": options["guard_filter_fn"]}
            return compile_with(step, fullgraph=fullgraph, backend="eager", options=guards)

        monkeypatch.setattr(th, "compile", trace)

    def test_compiled_steps_equal_those_of_numpy(self, few_substeps):
        rng = np.random.default_rng(0)
        before = counters["stats"]["unique_graphs"]
        for n_agents in (5, 2, 40):
            check_steps(started(n_agents), rng)
        # Compiled once for all numbers of agents
        assert counters["stats"]["unique_graphs"] - before == 1

    def test_each_vehicle_has_its_own_equations(self, traced_only):
        rng = np.random.default_rng(0)
        for _ in range(2):
            for vehicle in (dynamics.PAPER_VEHICLE, HEAVY):
                check_steps(started(4, vehicle=vehicle), rng)

    def test_what_cannot_be_compiled_runs_in_numpy_with_one_warning(self, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("no C++ compiler")

        monkeypatch.setattr(th, "compile", fail)
        compiled, usual = started(3)
        actions = np.full((3, 2), 0.1)
        with pytest.warns(UserWarning, match=r"run in NumPy.*RuntimeError: no C\+\+ compiler"):
            observations, *_ = compiled.step(actions)
        assert np.array_equal(observations, usual.step(actions)[0])
        # There is no second warning: pytest turns warnings into errors
        states = usual.get_state()
        expected = usual.step(actions)[0]
        for again in (compiled, compiled.make_simulator(3)):
            again.set_state(states)
            np.testing.assert_allclose(again.step(actions)[0], expected, rtol=0, atol=1e-6)

    def test_a_single_vehicle_is_not_compiled(self, monkeypatch):
        monkeypatch.setattr(th, "compile", lambda *args, **kwargs: pytest.fail("compiled"))
        compiled, usual = started(1)
        assert np.array_equal(compiled.step(np.zeros((1, 2)))[0], usual.step(np.zeros((1, 2)))[0])

    def test_the_setting_reaches_all_simulators(self):
        env = gym.make("PathTracking-v0", compile=True)
        venv = PathTrackingVecEnv(2, compile=True)
        vector_env = gym.make_vec("PathTracking-v0", 2, compile=True)
        for owner in (env.unwrapped, venv, vector_env.unwrapped):
            assert owner.make_simulator(3).compile
            assert pickle.loads(pickle.dumps(owner.simulator)).compile
        assert not gym.make("PathTracking-v0").unwrapped.make_simulator(3).compile


def test_periodic_states():
    model = PathTrackingModel()
    states = th.zeros(3, 6)
    states[:, 4], states[:, 5] = th.tensor([math.pi - 0.1, -3.0, 0.0]), th.tensor([1190.0, 5.0, 600.0])
    others = th.zeros(3, 6)
    others[:, 4], others[:, 5] = th.tensor([-math.pi + 0.1, 3.0, 1.0]), th.tensor([10.0, 1199.0, 500.0])
    differences = model.state_difference(states, others)
    th.testing.assert_close(differences[:, 4], th.tensor([-0.2, 2 * math.pi - 6.0, -1.0]), rtol=0, atol=1e-5)
    th.testing.assert_close(differences[:, 5], th.tensor([-20.0, 6.0, 100.0]), rtol=0, atol=1e-3)
    th.testing.assert_close(model.state_add(others, differences), states, rtol=0, atol=1e-3)
