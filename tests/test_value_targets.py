"""Value targets: a contract for all of them, and each against closed forms."""

import cloudpickle
import numpy as np
import pytest
import settings
import torch as th
from lq import LIMIT, LinearEnv
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mpg import MPG
from sb3_mpg.common.trust.weighting import ConstantWeighting, MeasuredWeighting
from sb3_mpg.common.value_targets import (
    VALUE_TARGETS,
    ReplayTarget,
    SimulatorTarget,
    make_value_target,
    target_values_of,
)

SMALL = {**settings.SMALL, "policy_kwargs": {"net_arch": [8]}, "buffer_size": 500}


def make_model(env, **kwargs):
    """Networks, targets that differ from them, and a filled buffer; the papers' weights."""
    model = MPG("MlpPolicy", env, **{**SMALL, "weighting": "rule_based", "horizons": (0, 2), **kwargs}).learn(80)
    with th.no_grad():
        for parameter in (*model.actor_target.parameters(), *model.critic_target.parameters()):
            parameter.add_(0.1 * th.randn_like(parameter))
    return model


@th.no_grad()
def targets(model, replay_data, value_target=None):
    """Of the algorithm's own value target by default."""
    inputs = model.training_inputs(len(replay_data.observations))
    target_networks = model.update.targets(inputs.settings_of(1))
    context = model.update.context(inputs.units, model.gamma)
    value_target = value_target or model.value_target
    return value_target(replay_data, context, target_networks, model.update.simulator)


def test_clipped_double_q():
    no_noise = {"noise_std": 0.0}
    model = make_model(LinearEnv(noise=0.15, ends="terminated"), reward_scale=0.3, value_target_kwargs=no_noise)
    data = model.replay_buffer.sample(64)
    assert 0 < data.dones.sum() < 64
    with th.no_grad():
        next_actions = model.actor_target(data.next_observations)
        q1, q2 = model.critic_target(data.next_observations, next_actions)
    expected = 0.3 * data.rewards + (1 - data.dones) * model.gamma * th.minimum(q1, q2)
    th.testing.assert_close(targets(model, data), expected)


def test_the_minimum_of_the_critics_counts_as_much_as_horizon_0():
    model = make_model(LinearEnv(), horizons=(0, 3), value_target_kwargs={"noise_std": 0.0})
    model.weighting_rule = MeasuredWeighting((0, 3))
    model.weighting_rule.observe(np.array([3.0, 1.0]))
    data = model.replay_buffer.sample(64)
    with th.no_grad():
        q1, q2 = model.critic_target(data.next_observations, model.actor_target(data.next_observations))
    # Horizon 0 weighs a quarter
    values = 0.25 * th.minimum(q1, q2) + 0.75 * (q1 + q2) / 2
    assert not th.allclose(q1, q2)
    th.testing.assert_close(targets(model, data), data.rewards + model.gamma * values)
    # Without measured errors it is the clipped double Q of the papers, whatever the weights
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
    """Rollouts end at terminations, and go on after truncations."""
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
    """SB3's buffer adds up the recorded rewards; the value after them is discounted by gamma ** n_steps."""
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


@pytest.mark.parametrize("pessimism", [0.0, 0.25, 1.0])
def test_several_critics_as_one(pessimism):
    values = [th.randn(6, 1), th.randn(6, 1), th.randn(6, 1)]
    together = target_values_of(lambda network_inputs, actions: values, pessimism)(None, None)
    least = th.minimum(th.minimum(values[0], values[1]), values[2])
    th.testing.assert_close(together, pessimism * least + (1 - pessimism) * sum(values) / 3)


@pytest.mark.parametrize("n_steps", [0, -3, 2.5, True])
def test_bad_numbers_of_steps_are_refused(n_steps):
    for target in (ReplayTarget, SimulatorTarget):
        with pytest.raises(ValueError, match="positive whole number of steps"):
            target(n_steps=n_steps)


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="Unknown value target 'magic'"):
        make_value_target("magic")


def test_arguments_do_not_go_with_a_target_that_is_made():
    target = ReplayTarget()
    assert make_value_target(target) is target
    with pytest.raises(ValueError, match="goes with the name of a target"):
        make_value_target(target, {"n_steps": 2})


def test_target_noise_counts_as_much_as_horizon_0():
    """Of four times the noise and a quarter of the weight, as much is left as of the noise without trust."""
    model = make_model(LinearEnv(), horizons=(0, 3))
    data = model.replay_buffer.sample(64)
    with th.no_grad():
        next_actions = model.actor_target(data.next_observations)

    def noises(target):
        """What was added to the actions of the target policy."""
        seen = []

        def values(network_inputs, actions):
            seen.append(actions - next_actions)
            return actions

        networks = model.update.targets(model.update_settings(1))._replace(values=values)
        th.manual_seed(0)
        with th.no_grad():
            target(data, model.update.context(model.units(), model.gamma), networks, None)
        return seen[0]

    def trust(weight):
        model.weighting_rule = MeasuredWeighting((0, 3))
        model.weighting_rule.observe(np.array([weight, 1 - weight]))

    # Without measured errors there is all of it
    untrusted = noises(ReplayTarget(noise_std=0.05))
    assert 0.03 < untrusted.std() < 0.07
    trust(0.75)
    assert model.update_settings(1).trust == pytest.approx(0.75)
    th.testing.assert_close(noises(ReplayTarget(noise_std=0.2)), untrusted)
    trust(1.0)
    assert (noises(ReplayTarget(noise_std=0.2)) == 0).all()


class WithoutSimulator(LinearEnv):
    make_simulator = property()


# Arguments that change a target
KWARGS = {"clipped_double_q": {"noise_std": 0.1}, "n_step_replay": {"n_steps": 4}, "n_step_simulator": {"n_steps": 4}}


@pytest.mark.parametrize("name", VALUE_TARGETS)
class TestContract:
    """What holds for every value target."""

    def test_values(self, name):
        model = make_model(LinearEnv(noise=0.15, ends="terminated"), value_target=name, value_target_kwargs=KWARGS[name])
        data, parameters = model.replay_buffer.sample(48), [p.clone() for p in model.policy.parameters()]
        th.manual_seed(0)
        values = targets(model, data)
        assert values.shape == (48, 1) and values.dtype == th.float32
        assert th.isfinite(values).all() and not values.requires_grad
        assert all(th.equal(*pair) for pair in zip(parameters, model.policy.parameters(), strict=True))
        # A learner process gets a copy with each update
        th.manual_seed(0)
        copied = cloudpickle.loads(cloudpickle.dumps(model.value_target))
        assert th.equal(targets(model, data, copied), values)

    def test_termination_is_followed_by_nothing(self, name):
        """Whatever the target critics say."""
        model = make_model(LinearEnv(ends="terminated"), value_target=name, value_target_kwargs={"n_steps": 1})
        data = model.replay_buffer.sample(64)
        values = targets(model, data)
        with th.no_grad():
            for parameter in model.critic_target.parameters():
                parameter.add_(1.0)
        is_unchanged = targets(model, data) == values
        assert 0 < data.dones.sum() < 64
        assert th.equal(is_unchanged, data.dones.bool())

    def test_length_of_samples(self, name):
        """A target that follows recorded steps needs samples that span them, and gets such a replay buffer."""
        target = make_value_target(name, KWARGS[name])
        assert target.replay_n_steps == (4 if name == "n_step_replay" else 1)
        model = MPG("MlpPolicy", LinearEnv(), value_target=target, **SMALL)
        assert getattr(model.replay_buffer, "n_steps", 1) == target.replay_n_steps

    def test_unknown_arguments_are_refused(self, name):
        with pytest.raises(ValueError, match=r"`value_target_kwargs` got \['n_steeps'\], expected some of \['n_steps'"):
            make_value_target(name, {"n_steeps": 3})

    def test_environments_that_cannot_do_what_is_needed_are_refused(self, name):
        target, env = make_value_target(name), DummyVecEnv([WithoutSimulator])
        if target.needs_simulator:
            with pytest.raises(ValueError, match=r"no method `make_simulator\(num_agents\)`"):
                target.check_env(env)
        else:
            target.check_env(env)
