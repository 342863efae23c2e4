"""Terminations that are learned from recorded ones, and the trust in terminations."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import assert_same_parameters, rollout_context
from models import Known
from settings import SMALL

from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.models.judged_ends import MisjudgedEnds, misjudged_ends
from sb3_mpg.common.models.residual import ResidualModel
from sb3_mpg.common.models.windows import Transitions
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.trust.terminations import discounted_by_trust

END, PENALTY = 1.0, -50.0


class Rail(PriorModel):
    """A cart that is pushed along a rail with an end."""

    def __init__(self, end=END, knows_penalty=True, knows_end=True):
        super().__init__()
        self.end, self.knows_penalty, self.knows_end = end, knows_penalty, knows_end

    @property
    def may_terminate(self):
        return self.knows_end

    def transition(self, states, actions):
        position, velocity = states.split(1, dim=1)
        velocity = velocity + 0.5 * actions
        return th.cat([position + 0.1 * velocity, velocity], dim=1)

    def reward(self, states, actions, next_states):
        rewards = 1 - 0.1 * next_states[:, :1] ** 2
        return rewards + PENALTY * self.terminal(next_states) if self.knows_penalty else rewards

    def terminal(self, states):
        return states[:, :1] > self.end if self.knows_end else super().terminal(states)


def recorded(n_steps=1500, seed=0):
    """Steps that follow each other until the cart leaves the rail."""
    rng, system = th.Generator().manual_seed(seed), Rail()
    n_carts = n_steps // 50

    def start():
        uniform = th.rand(n_carts, 2, generator=rng)
        return th.cat([1.5 * uniform[:, :1] - 0.6, uniform[:, 1:]], dim=1)

    states, steps = start(), []
    for _ in range(50):
        actions = 2 * th.rand(n_carts, 1, generator=rng) - 1
        next_states = system.transition(states, actions)
        ends = system.terminal(next_states)
        steps.append((states, actions, system.reward(states, actions, next_states), next_states, ends.float()))
        states = th.where(ends | (next_states[:, :1] < -1), start(), next_states)
    return Transitions(*(th.cat(column) for column in zip(*steps, strict=True)))


def corrected(prior, data, n_fits=300):
    th.manual_seed(0)
    model = ResidualModel(prior, 2, 1)
    model.rescale(data)
    ends, rate = data.select(data.terminated[:, 0] > 0), data.terminated.mean().item()
    for _ in range(n_fits):
        rows = th.randint(len(data.rewards), (512,))
        model.fit_ends(data.select(rows), ends.select(th.randint(len(ends.rewards), (128,))), rate)
    model.use_learned_ends(n_fits > 0)
    model.solve_end_rewards(data)
    return model


@pytest.mark.parametrize("knows_penalty", [True, False])
@pytest.mark.parametrize("end", [END + 0.05, END + 1.0, END - 0.05])
def test_a_wrong_end_does_not_spoil_the_rewards_of_other_steps(end, knows_penalty):
    """Least squares and networks would take the penalties for the rewards of ordinary steps."""
    prior, held_out = Rail(end, knows_penalty), recorded(seed=1)
    data = recorded()
    model = corrected(prior, data, n_fits=0)
    for _ in range(50):
        model.fit(data)
    goes_on = held_out.select((held_out.terminated == 0)[:, 0])

    def error(model, steps):
        predicted = model.reward(steps.observations, steps.actions, steps.next_observations)
        return (predicted - steps.rewards).abs().mean().item()

    assert error(model, held_out) <= error(prior, held_out) + 1e-3
    if end > END:
        assert error(model, goes_on) <= error(prior, goes_on) + 1e-3
    assert model.target_scale[2] < 0.1


@pytest.mark.parametrize("prior", [Rail(), Rail(END + 0.3), Rail(knows_penalty=False), Rail(knows_end=False)])
def test_ends_and_their_rewards_are_learned_from_recorded_ones(prior):
    held_out = recorded(seed=1)
    model = corrected(prior, recorded())
    assert model.may_terminate
    with th.no_grad():
        probabilities = model.termination_probability(held_out.next_observations)
        predicted = model.reward(held_out.observations, held_out.actions, held_out.next_observations)
    distances = held_out.next_observations[:, :1] - END
    # It rises from 0 to 1 within a few steps, of 0.05 or so
    assert probabilities[distances < -0.3].max() < 0.05 and abs(probabilities[distances.abs() < 0.02].mean() - 0.5) < 0.2
    assert th.equal(model.terminal(held_out.next_observations), probabilities > 0.5)
    safe = distances < -0.3
    th.testing.assert_close(predicted[safe], held_out.rewards[safe], rtol=0, atol=3)
    assert (predicted[safe] - held_out.rewards[safe]).abs().mean() < 0.02
    assert model.end_rewards.jump.item() == pytest.approx(PENALTY, abs=1)
    ends = held_out.select(held_out.terminated[:, 0] > 0)
    missed, invented = misjudged_ends(model, ends, held_out.select(held_out.terminated[:, 0] == 0))
    assert missed < 0.1 and invented < 0.1
    # Without the correction, it is the user's model
    model.use_correction(False)
    expected = prior.terminal(held_out.next_observations).float()
    assert th.equal(model.termination_probability(held_out.next_observations), expected)
    th.testing.assert_close(
        model.reward(held_out.observations, held_out.actions, held_out.next_observations),
        prior.reward(held_out.observations, held_out.actions, held_out.next_observations),
    )


def test_the_derivative_of_a_rollout_sees_its_end():
    data = recorded()
    model = corrected(Rail(), data)

    class Coasts(th.nn.Module):
        def forward(self, observations):
            return 0 * observations[:, :1]

    starts = data.observations[(data.observations[:, 0] > 0.2) & (data.terminated[:, 0] == 0)][:200]
    context = rollout_context(Coasts(), model, q_function=lambda observations, actions: 0 * actions, gamma=0.98)

    def returns(actions):
        return model_rollout(starts, context, [10], first_actions=actions)[10]

    actions = th.zeros(len(starts), 1, requires_grad=True)
    (gradient,) = th.autograd.grad(returns(actions).sum(), actions)
    with th.no_grad():
        quotients = (returns(actions + 0.2) - returns(actions - 0.2)) / 0.4
        model.use_learned_ends(False)
        hard = (returns(actions + 0.2) - returns(actions - 0.2)) / 0.4
    assert np.corrcoef(gradient[:, 0], quotients[:, 0])[0, 1] > 0.9
    assert np.corrcoef(gradient[:, 0], hard[:, 0])[0, 1] > 0.6
    # The user's own jumps, which the derivative does not see
    model.use_correction(False)
    (blind,) = th.autograd.grad(returns(actions).sum(), actions)
    assert blind.abs().mean() < 0.05 * gradient.abs().mean()


def test_an_output_of_the_networks_is_not_used_if_it_is_worse_than_none():
    data = recorded()
    model = corrected(Known(), data, n_fits=0)
    scales = model.target_scale.clone()
    with th.no_grad():
        model.networks.average[-1].bias[:, :, 2] = 10.0
    model.choose_outputs(data)
    assert th.equal(model.output_scale, scales * th.tensor([1.0, 1.0, 0.0]))
    with th.no_grad():
        model.networks.average[-1].bias.zero_()
    model.choose_outputs(data)
    assert th.equal(model.output_scale, scales)


def test_a_step_too_late_is_no_missed_termination():
    data = recorded()
    ends, others = (data.select((data.terminated == value)[:, 0]) for value in (1, 0))
    assert misjudged_ends(Rail(), ends, others) == (0, 0)
    assert misjudged_ends(Rail(END + 0.02), ends, others).missed < 0.02
    assert misjudged_ends(Rail(END + 1), ends, None) == (1, 0)
    assert misjudged_ends(Rail(-10), ends, others) == (0, 1)
    assert MisjudgedEnds(0.05, 0.01).is_as_good_as(MisjudgedEnds(0, 0))
    assert not MisjudgedEnds(0.2, 0).is_as_good_as(MisjudgedEnds(0, 0))


@pytest.mark.parametrize("trust", [1.0, 0.9, 0.3, 0.0])
def test_trust_is_a_factor_of_the_weight_of_all_model_horizons(trust):
    errors, horizons = np.array([2.0, 0.5, 0.1]), (0, 5, 25)

    def weights(errors):
        return (1 / errors) / (1 / errors).sum()

    expected = trust * weights(errors)
    expected[0] = 1 - expected[1:].sum()
    np.testing.assert_allclose(weights(discounted_by_trust(errors, horizons, trust)), expected)
    # Without horizon 0, nothing else could get the weight
    assert discounted_by_trust(errors[1:], horizons[1:], trust).tolist() == [0.5, 0.1]


class RailEnv(gym.Env):
    """The rail as an environment. With a limit, all episodes terminate after so many steps, and in no state."""

    def __init__(self, limit=None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.limit = limit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_steps = 0
        self.state = th.tensor([[self.np_random.uniform(0, 0.9), self.np_random.uniform(0, 1)]], dtype=th.float32)
        return self.state[0].numpy(), {}

    def step(self, action):
        self.n_steps += 1
        actions, before = th.as_tensor(action).reshape(1, 1), self.state
        system = Rail(knows_end=self.limit is None)
        self.state = system.transition(before, actions)
        ends = bool(system.terminal(self.state)) if self.limit is None else self.n_steps == self.limit
        is_truncated = self.limit is None and self.n_steps == 20
        return self.state[0].numpy(), system.reward(before, actions, self.state).item(), ends, is_truncated, {}


def trained(env, prior, n_steps, **settings):
    settings = {**SMALL, "learning_starts": 150, "horizons": (0, 5), "prior_model": prior, **settings}
    return MPG("MlpPolicy", env, **settings).learn(n_steps)


def test_ends_are_learned_in_training_and_saved(tmp_path):
    blind = Rail(knows_end=False, knows_penalty=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = trained(RailEnv(), blind, 170)
    states = th.tensor([[0.5, 0.0], [1.3, 1.0]])
    assert model.rollout_model.learns_ends and model.rollout_model.terminal(states).flatten().tolist() == [False, True]
    assert model.trust.measurements[-1].gradients.trust_in_ends > 0.8
    expected = model.rollout_model.termination_probability(states)

    def second_half(algorithm):
        algorithm.env.seed(7)
        algorithm._last_obs = None
        return algorithm.learn(20, reset_num_timesteps=False)

    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    model = second_half(model)
    loaded = MPG.load(tmp_path / "model", env=RailEnv(), custom_objects={"prior_model": blind})
    assert loaded.rollout_model.learns_ends and th.equal(loaded.rollout_model.termination_probability(states), expected)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert_same_parameters(model, second_half(loaded))
    # The user's model is compared and used as it is
    with pytest.warns(UserWarning, match="does not know where episodes terminate"):
        trained(RailEnv(), blind, 160, residual=False, horizons=(0, 25))


def test_a_time_limit_is_named_and_not_learned():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = trained(RailEnv(limit=8), Rail(knows_end=False), 310)
    messages = [str(warning.message) for warning in caught]
    assert sum("Episodes terminate after 8 steps" in message for message in messages) == 1
    assert not any("does not know where" in message for message in messages)
    assert not model.rollout_model.learns_ends and model.trust.measurements[-1].gradients.trust_in_ends == 1
