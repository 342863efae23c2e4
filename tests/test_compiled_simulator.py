import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from torch._dynamo.utils import counters

import sb3_mpg_envs  # noqa: F401
from sb3_mpg_envs.path_tracking import PathTrackingSimulator, PathTrackingVecEnv, VehicleParameters, dynamics
from sb3_mpg_envs.path_tracking.simulator import compiled_tracking

HEAVY = VehicleParameters(mass=3000.0, yaw_inertia=5000.0)


@pytest.fixture(autouse=True)
def compiles_anew():
    """As what was compiled stays with the process."""
    compiled_tracking.cache_clear()
    yield
    compiled_tracking.cache_clear()


@pytest.fixture
def few_substeps(monkeypatch):
    """To compile 20 of them takes longer than many tests."""
    monkeypatch.setattr(dynamics, "N_SUBSTEPS", 2)


def started(n_agents: int, **kwargs) -> tuple[PathTrackingSimulator, PathTrackingSimulator]:
    """
    :return: two simulators in the same states, the first compiled
    """
    simulators = PathTrackingSimulator(n_agents, compile=True, **kwargs), PathTrackingSimulator(n_agents, **kwargs)
    for simulator in simulators:
        simulator.seed(0)
        simulator.reset()
    return simulators


@pytest.fixture
def traced_only(monkeypatch):
    """To trace is a matter of a second, and to compile of many."""
    compile_with = th.compile

    def trace(step, fullgraph, options):
        guards = {"guard_filter_fn": options["guard_filter_fn"]}
        return compile_with(step, fullgraph=fullgraph, backend="eager", options=guards)

    monkeypatch.setattr(th, "compile", trace)


def check_steps(simulators: tuple[PathTrackingSimulator, PathTrackingSimulator], rng: np.random.Generator) -> None:
    """Also of some of the agents, in any order."""
    compiled, usual = simulators
    n_agents = usual.num_agents
    for indices in (None, None, rng.permutation(n_agents)[: n_agents // 2 + 1], np.array([1]), None):
        actions = rng.uniform(-1, 1, (n_agents if indices is None else len(indices), 2))
        for result, expected in zip(compiled.step(actions, indices), usual.step(actions, indices), strict=True):
            np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(compiled.get_state(), usual.get_state(), rtol=0, atol=1e-12)


def test_compiled_steps_equal_numpys(few_substeps):
    rng = np.random.default_rng(0)
    before = counters["stats"]["unique_graphs"]
    for n_agents in (5, 2, 40):
        check_steps(started(n_agents), rng)
    # Once, whatever the number of agents
    assert counters["stats"]["unique_graphs"] - before == 1


def test_each_vehicle_has_its_own_equations(traced_only):
    rng = np.random.default_rng(0)
    for _ in range(2):
        for vehicle in (dynamics.PAPER_VEHICLE, HEAVY):
            check_steps(started(4, vehicle=vehicle), rng)


def test_what_cannot_be_compiled_runs_in_numpy_with_one_warning(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(th, "compile", fail)
    compiled, usual = started(3)
    actions = np.full((3, 2), 0.1)
    with pytest.warns(UserWarning, match=r"run in NumPy.*RuntimeError: no C\+\+ compiler"):
        observations, *_ = compiled.step(actions)
    assert np.array_equal(observations, usual.step(actions)[0])
    # Warnings are errors
    states = usual.get_state()
    expected = usual.step(actions)[0]
    for again in (compiled, compiled.make_simulator(3)):
        again.set_state(states)
        np.testing.assert_allclose(again.step(actions)[0], expected, rtol=0, atol=1e-6)


def test_a_single_vehicle_is_not_compiled(monkeypatch):
    monkeypatch.setattr(th, "compile", lambda *args, **kwargs: pytest.fail("compiled"))
    compiled, usual = started(1)
    assert np.array_equal(compiled.step(np.zeros((1, 2)))[0], usual.step(np.zeros((1, 2)))[0])


def test_the_setting_reaches_all_simulators():
    env = gym.make("PathTracking-v0", compile=True)
    venv = PathTrackingVecEnv(2, compile=True)
    vector_env = gym.make_vec("PathTracking-v0", 2, compile=True)
    for owner in (env.unwrapped, venv, vector_env.unwrapped):
        assert owner.make_simulator(3).compile
        assert pickle.loads(pickle.dumps(owner.simulator)).compile
    assert not gym.make("PathTracking-v0").unwrapped.make_simulator(3).compile
