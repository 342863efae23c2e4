"""The recorded transitions that models are fitted to."""

import numpy as np
import pytest
import torch as th
from recorded import filled_buffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer

from sb3_mpg.common.buffers import HELD_OUT_BLOCK


@pytest.mark.parametrize("cls", [ReplayBuffer, NStepReplayBuffer])
def test_recorded_steps_are_single_steps_in_the_units_of_the_environment(cls):
    recorded = filled_buffer(cls)
    data = recorded.sample(500)
    t = data.observations[:, 0]
    assert th.equal(data.rewards[:, 0], t)
    assert th.equal(data.next_observations[:, 0], th.where(t % 7 == 6, -1.0, t + 1))
    assert (data.actions == 5).all()


def test_steps_that_cross_a_reset_are_excluded_with_optimize_memory_usage():
    recorded = filled_buffer(optimize_memory_usage=True, handle_timeout_termination=False, n_steps=250)
    data = recorded.sample(3000)
    t = data.observations[:, 0]
    assert (t % 7 != 6).all() and t.max() == 249 and t.min() == 51
    assert th.equal(data.next_observations[:, 0], t + 1)


def test_held_out_steps_are_never_training_steps():
    recorded = filled_buffer(n_steps=200)

    def blocks(data):
        return {(int(t) // HELD_OUT_BLOCK, int(e)) for t, e in data.observations.tolist()}

    learned, held_out = blocks(recorded.sample(4000)), blocks(recorded.sample(2000, held_out=True))
    assert not learned & held_out
    assert learned | held_out == {(block, env) for block in range(200 // HELD_OUT_BLOCK) for env in range(2)}
    assert len(held_out) == 2
    # Nothing is held out yet
    assert filled_buffer(n_envs=1, n_steps=30).sample(10, held_out=True) is None


def test_steps_are_held_out_early_however_many_environments_there_are():
    for n_envs in range(1, 11):
        recorded = filled_buffer(n_envs=n_envs, n_steps=-(-250 // n_envs), size=250)
        held_out, training = recorded.sample(64, held_out=True), recorded.latest(1000)
        assert held_out is not None, n_envs

        def places(steps):
            return {tuple(row) for row in steps.observations.int().tolist()}

        assert not places(held_out) & places(training)
        assert len(places(training)) >= 0.8 * 250


def test_windows_end_with_their_episodes():
    windows = filled_buffer(n_steps=250).windows(60, horizon=5)
    assert windows.observations.shape == (60, 2)
    t = windows.observations[:, 0].long()
    assert t.min() == 220 and t.max() == 249
    assert th.equal(windows.lengths, th.minimum(th.minimum(7 - t % 7, 250 - t), th.tensor(5)))
    for step in range(5):
        inside = windows.lengths > step
        assert th.equal(windows.rewards[step, inside, 0].long(), t[inside] + step)
    assert th.equal(windows.terminated[:, 0], (t % 7 == 6) & (t % 14 != 13))


def test_windows_are_long_enough_however_many_environments_there_are():
    windows = filled_buffer(n_envs=40, n_steps=60, size=60).windows(100, horizon=5)
    assert 100 <= len(windows.lengths) <= 110
    assert sorted({int(env) for env in windows.observations[:, 1]}) == list(range(0, 40, 4))
    assert windows.observations[:, 0].min() == 50 and (windows.lengths == 5).sum() > 10
    for step in range(5):
        inside = windows.lengths > step
        assert th.equal(windows.rewards[step, inside, 0], windows.observations[inside, 0] + step)


def test_there_are_no_windows_if_every_step_is_an_episode_end():
    recorded = filled_buffer(optimize_memory_usage=True, handle_timeout_termination=False)
    recorded.replay_buffer.dones[:] = 1
    assert recorded.windows(100, horizon=5) is None


def test_windows_do_not_cross_a_reset_between_two_trainings():
    recorded = filled_buffer(n_envs=1, n_steps=6)
    buffer = recorded.replay_buffer
    for t in (100.0, 101.0, 102.0):
        obs, next_obs = np.array([[t, 0.0]]), np.array([[t + 1, 0.0]])
        buffer.add(obs, next_obs, np.zeros((1, 1)), np.zeros(1), np.array([False]), [{}])
    windows = recorded.windows(1000, horizon=5)
    assert windows.observations[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 100, 101, 102]
    assert windows.lengths.tolist() == [5, 5, 4, 3, 2, 1, 3, 2, 1]


def test_windows_stop_before_the_last_observation_with_optimize_memory_usage():
    recorded = filled_buffer(optimize_memory_usage=True, handle_timeout_termination=False, n_steps=250)
    windows = recorded.windows(1000, horizon=5)
    t = windows.observations[:, 0].long()
    assert t.min() == 51 and t.max() == 249 and (t % 7 != 6).all()
    assert th.equal(windows.lengths, th.minimum(th.minimum(6 - t % 7, 250 - t), th.tensor(5)))
    for step in range(5):
        inside = windows.lengths > step
        assert th.equal(windows.next_observations[step, inside, 0].long(), t[inside] + step + 1)


def test_next_observations_of_terminations_and_of_other_steps():
    recorded = filled_buffer(n_steps=250)
    # Of the last 200 steps, those at 62, 76, ... 244; those at 55, 69, ... were truncated
    assert recorded.termination_rate() == pytest.approx(14 / 200)
    ends = recorded.observed_last(100, terminated=True)
    assert ends.next_observations.tolist() == [[-1.0, env] for _ in range(14) for env in range(2)] and ends.terminated.all()
    assert recorded.observed_last(3, terminated=True).next_observations.shape == (3, 2)
    others = recorded.observed_last(12, terminated=False).next_observations.tolist()
    # Step 244 terminated
    assert others == [[t + 1.0, env] for t in (249, 248, 247, 246, 245, 243) for env in range(2)]
    assert filled_buffer(n_steps=6).observed_last(10, terminated=True) is None
    assert filled_buffer(n_steps=6).termination_rate() == 0
    # A buffer that does not handle time limits knows of no termination
    for saves_memory in (True, False):
        ignorant = filled_buffer(optimize_memory_usage=saves_memory, handle_timeout_termination=False, n_steps=250)
        assert ignorant.termination_rate() == 0
        assert ignorant.observed_last(10, terminated=True) is None
        others = ignorant.observed_last(1000, terminated=False).next_observations
        # Steps that are no episode end, of the last 200 or 199
        assert set(others[:, 0].tolist()) == {t + 1.0 for t in range(50 + saves_memory, 250) if t % 7 != 6}


def test_it_is_known_which_steps_terminated():
    for knows in (True, False):
        recorded = filled_buffer(n_steps=250, handle_timeout_termination=knows)
        steps = recorded.sample(500)
        t = steps.observations[:, 0].long()
        assert th.equal(th.isnan(steps.terminated[:, 0]), (t % 7 == 6) & (not knows))
        assert th.equal(steps.terminated[:, 0] == 1, (t % 14 == 6) & knows)


def test_ends_are_sampled_from_the_training_steps_and_judged_on_others():
    recorded = filled_buffer(n_steps=200)
    held_out = recorded.observed_last(100, terminated=True, held_out=True).observations
    sampled = recorded.sample_ends(500).observations
    assert (sampled[:, 0] % 14 == 6).all()
    held_out, sampled = ({tuple(row) for row in rows.tolist()} for rows in (held_out, sampled))
    assert held_out and not held_out & sampled and len(held_out | sampled) == 2 * 14
    assert recorded.n_ends() == len(sampled)
    none = filled_buffer(n_steps=6)
    assert none.n_ends() == 0 and none.sample_ends(10) is None


def test_lengths_of_episodes_that_terminated():
    for n_steps, n_ends in ((6, 0), (130, 9), (250, 14)):
        lengths = filled_buffer(n_steps=n_steps).lengths_of_terminated()
        # The first episode of a full buffer may be incomplete
        assert lengths.tolist() == [7] * (2 * n_ends)
