"""What the simulators of both tasks have in common."""

import pickle

import numpy as np
import pytest
from tasks import SIMULATOR_CLASSES, sample_actions

from sb3_mpg_envs.inverted_pendulum import InvertedPendulumSimulator


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

    # The results depend on the current states only
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
    # Two steps, and not in the order of the agents: what a simulator caches for an agent must stay with that agent
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
def test_start_width(simulator_class):
    spreads = {}
    for width in (0.0, 0.5, 1.0):
        simulator = simulator_class(4000, start_width=width, early_reset=False)
        simulator.seed(0)
        spreads[width] = simulator.reset().std(axis=0)
    assert np.allclose(spreads[0.0], 0)
    # The lateral velocity of the vehicle is u tan(slip angle), not quite linear in the slip angle
    assert np.allclose(spreads[0.5], 0.5 * spreads[1.0], rtol=0.05)


@pytest.mark.parametrize("simulator_class", SIMULATOR_CLASSES)
def test_pickle_continues(simulator_class):
    simulator = simulator_class(3, start_width=0.5)
    simulator.seed(0)
    simulator.reset()
    copy = pickle.loads(pickle.dumps(simulator))
    actions = sample_actions(simulator.action_space, 3)
    for original, copied in zip(simulator.step(actions), copy.step(actions), strict=True):
        assert np.array_equal(original, copied)
    # The copy has the state of the random number generator
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
