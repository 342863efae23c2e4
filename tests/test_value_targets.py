from itertools import pairwise

import numpy as np
import pytest
import settings
import torch as th
from lq import LIMIT, LinearEnv
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mpg import MPG
from sb3_mpg.common.value_targets import ReplayTarget, SimulatorTarget, make_value_target
from sb3_mpg.common.trust.weighting import ConstantWeighting, MeasuredWeighting

SMALL = {**settings.SMALL, "policy_kwargs": {"net_arch": [8]}, "buffer_size": 500}


def make_model(env, **kwargs):
    """Networks, targets that differ from them, and a filled buffer; the papers' weights."""
    model = MPG("MlpPolicy", env, **{**SMALL, "weighting": "rule_based", **kwargs}).learn(80)
    with th.no_grad():
        for parameter in (*model.actor_target.parameters(), *model.critic_target.parameters()):
            parameter.add_(0.1 * th.randn_like(parameter))
    return model


def targets(model, replay_data):
    with th.no_grad():
        return model.value_target(
            replay_data,
            model.actor,
            model.actor_target,
            model._target_values(1),
            model._units(),
            model.gamma,
            model._make_simulator,
        )


def test_clipped_double_q():
    model = make_model(LinearEnv(noise=0.15, ends="terminated"), reward_scale=0.3)
    data = model.replay_buffer.sample(64)
    assert 0 < data.dones.sum() < 64
    with th.no_grad():
        next_actions = model.actor_target(data.next_observations)
        q1, q2 = model.critic_target(data.next_observations, next_actions)
    expected = 0.3 * data.rewards + (1 - data.dones) * model.gamma * th.minimum(q1, q2)
    th.testing.assert_close(targets(model, data), expected)


def test_critics_are_taken_as_pessimistically_as_they_are_climbed():
    model = make_model(LinearEnv(), horizons=(0, 3))
    model.weighting_rule = MeasuredWeighting((0, 3))
    model.weighting_rule.observe(np.array([3.0, 1.0]))
    data = model.replay_buffer.sample(64)
    with th.no_grad():
        q1, q2 = model.critic_target(data.next_observations, model.actor_target(data.next_observations))
    # Horizon 0 weighs a quarter
    values = 0.25 * th.minimum(q1, q2) + 0.75 * (q1 + q2) / 2
    assert not th.allclose(q1, q2)
    th.testing.assert_close(targets(model, data), data.rewards + model.gamma * values)
    # Where nothing is measured it is the clipped double Q of the papers, whatever the weights
    model.weighting_rule = ConstantWeighting((0, 3), (0.25, 0.75))
    th.testing.assert_close(targets(model, data), data.rewards + model.gamma * th.minimum(q1, q2))


def test_target_noise_is_clipped():
    model = make_model(LinearEnv(), value_target_kwargs={"noise_std": 10.0, "noise_clip": 1e-3})
    data = model.replay_buffer.sample(64)
    with th.no_grad():
        next_actions = model.actor_target(data.next_observations)
        exact = (
            data.rewards
            + model.gamma * th.cat(model.critic_target(data.next_observations, next_actions), 1).min(1)[0][:, None]
        )
    difference = (targets(model, data) - exact).abs()
    assert 0 < difference.max() < 1e-2


@pytest.mark.parametrize("ends", [None, "terminated", "truncated"])
@pytest.mark.parametrize("normalize", [False, True])
def test_simulator_target_against_a_python_loop(ends, normalize):
    """Rollouts end at terminations, and run on behind truncations."""
    env = DummyVecEnv([lambda: LinearEnv(noise=0.15, ends=ends)])
    if normalize:
        env = VecNormalize(env, clip_reward=0.5)
    n_steps, reward_scale = 7, 0.5
    model = make_model(
        env,
        value_target="n_step_simulator",
        value_target_kwargs={"n_steps": n_steps},
        batch_reuse=3,
        reward_scale=reward_scale,
    )
    data = model.replay_buffer.sample(32)
    result = targets(model, data)
    assert result.shape == (32, 1)

    reference = LinearEnv(ends=ends)
    n_outside = 0
    for row in range(32):
        state = data.observations[row].numpy().astype(np.float64)
        action = 2.0 * data.actions[row].numpy()
        expected, terminated, was_outside = 0.0, False, False
        for step in range(n_steps):
            reward = -(state @ state + 0.1 * action @ action)
            if normalize:
                reward = np.clip(reward / np.sqrt(env.ret_rms.var + env.epsilon), -0.5, 0.5)
            expected += model.gamma**step * reward_scale * reward
            state = reference.a @ state + reference.b @ action
            is_outside = abs(state[0]) > LIMIT
            was_outside = was_outside or is_outside
            terminated = is_outside and ends == "terminated"
            network_input = env.normalize_obs(state[None]) if normalize else state[None]
            network_input = th.as_tensor(network_input, dtype=th.float32)
            with th.no_grad():
                action = 2.0 * model.actor(network_input)[0].numpy()
            if terminated:
                break
        if not terminated:
            with th.no_grad():
                values = model.critic_target(network_input, model.actor_target(network_input))
                value = min(values)
            expected += model.gamma ** (step + 1) * value.item()
        n_outside += was_outside
        assert result[row].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert n_outside > 0


def test_recorded_n_step_target():
    """SB3's buffer adds the recorded rewards up; the discount behind them is gamma ** n_steps."""
    model = make_model(LinearEnv(), value_target="n_step_replay", value_target_kwargs={"n_steps": 3}, gamma=0.9)
    buffer = model.replay_buffer
    assert isinstance(buffer, NStepReplayBuffer)
    assert (buffer.n_steps, buffer.gamma) == (3, 0.9)
    np.random.seed(5)
    data = buffer.sample(16)
    result = targets(model, data)
    for row in range(16):
        start = np.flatnonzero((buffer.observations[: buffer.pos, 0] == data.observations[row].numpy()).all(1))[0]
        length = min(3, buffer.pos - start)
        rewards = buffer.rewards[start : start + length, 0]
        last = th.as_tensor(buffer.next_observations[start + length - 1])
        with th.no_grad():
            value = th.cat(model.critic_target(last, model.actor_target(last)), 1).min()
        expected = sum(0.9**k * rewards[k] for k in range(length)) + 0.9**length * value
        assert result[row].item() == pytest.approx(expected.item(), rel=1e-5)


def test_sums_of_several_rewards_are_not_clipped():
    """VecNormalize clips single rewards."""
    env = VecNormalize(DummyVecEnv([LinearEnv]), norm_obs=False, clip_reward=0.1)
    model = make_model(env, value_target="n_step_replay", value_target_kwargs={"n_steps": 3}, gamma=0.9)
    data = model.replay_buffer.sample(64)
    with th.no_grad():
        last = data.next_observations
        values = th.cat(model.critic_target(last, model.actor_target(last)), 1).amin(1, keepdim=True)
    rewards = data.rewards / np.sqrt(env.ret_rms.var + env.epsilon)
    assert (rewards < -0.1).any()
    th.testing.assert_close(targets(model, data), (rewards + (1 - data.dones) * data.discounts * values).float())


def test_batches_take_turns_and_serve_equally_often():
    model = MPG("MlpPolicy", LinearEnv(), batch_reuse=3, **SMALL).learn(60)
    units = model._units()
    model._batches.clear()
    model._n_batch_uses = 0
    batches = [model._sample_batch(1, 8, units) for _ in range(60)]
    assert all(first is not second for first, second in pairwise(batches))
    uses = [sum(batch is other for other in batches) for batch in batches]
    # The first ones make room, so that the draws are spread evenly from then on
    assert uses[:3] == [3, 1, 2]
    assert all(n == 3 for n in uses[6:-6])


@pytest.mark.parametrize("n_steps", [0, -3, 2.5, True])
def test_bad_numbers_of_steps_are_refused(n_steps):
    for target in (ReplayTarget, SimulatorTarget):
        with pytest.raises(ValueError, match="positive whole number of steps"):
            target(n_steps=n_steps)


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="Unknown value target 'magic'"):
        make_value_target("magic")
