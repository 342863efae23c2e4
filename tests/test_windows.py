"""Trajectory segments, and rollouts that are compared with them."""

import math

import numpy as np
import pytest
import torch as th
from models import HiddenVelocity, Known, Turntable

from sb3_mpg.common.models.windows import cut_windows, rms, rollout_errors, rounding_errors, to_numpy, to_tensor


def records(n_steps=6, n_envs=2, ends=((2, 0), (4, 1))):
    """Step t of environment e is observed as (t, e); its reward is t."""
    t, e = np.meshgrid(np.arange(float(n_steps)), np.arange(float(n_envs)), indexing="ij")
    is_end = np.zeros((n_steps, n_envs), dtype=bool)
    is_end[-1] = True
    for step, env in ends:
        is_end[step, env] = True
    observations = np.stack([t, e], axis=2)
    next_observations = np.stack([t + 1, e], axis=2)
    actions = 10 * t[..., None]
    return {
        "observations": observations,
        "actions": actions,
        "next_observations": next_observations,
        "rewards": t,
        "terminated": is_end & (t == 2),
        "ends": is_end,
    }


@pytest.mark.parametrize("horizon", [1, 2, 10])
def test_windows_end_with_their_episodes(horizon):
    windows = cut_windows(records(), horizon, th.device("cpu"))
    # The longest episode has 5 steps
    n_steps = min(horizon, 5)
    assert windows.observations.shape == (12, 2) and windows.actions.shape == (n_steps, 12, 1)
    assert windows.observations.dtype == windows.rewards.dtype == th.float32
    expected = {0: [3, 2, 1, 3, 2, 1], 1: [5, 4, 3, 2, 1, 1]}
    for (t, env), length in zip(windows.observations.int().tolist(), windows.lengths.tolist(), strict=True):
        assert length == min(expected[env][t], horizon)
    for step in range(n_steps):
        is_recorded = windows.lengths > step
        t, env = windows.observations[is_recorded].T
        assert th.equal(windows.rewards[step, is_recorded, 0], t + step)
        assert th.equal(windows.actions[step, is_recorded, 0], 10 * (t + step))
        assert th.equal(windows.next_observations[step, is_recorded], th.stack([t + step + 1, env], dim=1))
    assert th.equal(windows.terminated[:, 0], (windows.observations == th.tensor([2.0, 0.0])).all(dim=1))


def test_windows_can_be_selected():
    windows = cut_windows(records(), 3, th.device("cpu"))
    is_kept = windows.observations[:, 1].numpy() == 1
    selected = windows.select(is_kept)
    assert (selected.observations[:, 1] == 1).all() and len(selected.lengths) == 6
    for name in ("observations", "terminated", "lengths"):
        assert th.equal(getattr(selected, name), getattr(windows, name)[is_kept])
    for name in ("actions", "next_observations", "rewards"):
        assert th.equal(getattr(selected, name), getattr(windows, name)[:, is_kept])


def test_rollouts_follow_the_recorded_actions():
    windows = cut_windows(records(), 3, th.device("cpu"))
    model, states = Known(), windows.observations
    steps = list(rollout_errors(model, windows))
    assert len(steps) == 3
    for index, step in enumerate(steps):
        th.testing.assert_close(step.rewards, model.reward(states, windows.actions[index], states))
        states = model.transition(states, windows.actions[index])
        th.testing.assert_close(step.states, states)
        assert th.equal(step.actual_states, windows.next_observations[index])
        assert th.equal(step.actual_rewards, windows.rewards[index])
        th.testing.assert_close(step.errors, states - windows.next_observations[index])
        assert th.equal(step.is_recorded, windows.lengths > index)
        assert not step.states.requires_grad


def test_rollouts_have_no_gradient():
    windows = cut_windows(records(), 2, th.device("cpu"))
    model = Known()
    model.weight = th.nn.Parameter(th.ones(()))
    model.transition = lambda states, actions: model.weight * states
    for step in rollout_errors(model, windows):
        assert not step.states.requires_grad
        # It is the consumer's to choose again
        assert th.is_grad_enabled()


def test_states_are_compared_as_the_model_does():
    windows = cut_windows({**records(), "actions": np.zeros((6, 2, 1))}, 1, th.device("cpu"))
    windows = windows._replace(
        observations=th.zeros(12, 1), next_observations=th.full((1, 12, 1), 0.5 - 2 * math.pi), actions=th.zeros(1, 12, 1)
    )
    (step,) = rollout_errors(Turntable(), windows)
    th.testing.assert_close(step.errors, th.zeros(12, 1), rtol=0, atol=1e-5)


def test_actual_states_are_those_that_observations_show():
    windows = cut_windows(records(), 2, th.device("cpu"))
    windows = windows._replace(observations=windows.observations[:, :1], next_observations=windows.next_observations[..., :1])
    for step in rollout_errors(HiddenVelocity(), windows):
        assert step.states.shape == (12, 2) and not step.actual_states[:, 1].any()


def test_rounding_errors_grow_with_the_numbers():
    np.testing.assert_allclose(rounding_errors(np.array([[1000.0, 0.0], [-2000.0, 0.0]])), [0.02 + 1e-7, 1e-7])


def test_root_mean_squares_are_infinite_where_a_value_is_not_finite():
    values = np.array([[3.0, np.nan, 1.0, 1e200], [-4.0, 1.0, np.inf, 1e200]])
    np.testing.assert_allclose(rms(values), [np.sqrt(12.5), np.inf, np.inf, np.inf])


def test_numbers_become_double():
    assert to_numpy(th.ones(2, requires_grad=False)).dtype == np.float64


def test_tensors_are_copies_of_one_alignment():
    """BLAS and LAPACK may choose their arithmetic by the alignment, and trainings must be reproducible to the last bit."""
    memory = np.arange(40, dtype=np.float32)
    tensors = [to_tensor(memory[first : first + 20], "cpu") for first in range(16)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    memory[:] = -1
    assert all((tensor >= 0).all() for tensor in tensors)
