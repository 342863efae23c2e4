"""Hidden dimensions of the state: which there are, and which rollouts re-encode."""

import pytest
import torch as th
from lq import LinearEnv
from models import HiddenVelocity, Known, truth
from settings import SMALL

from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.models.hidden_states import HiddenStates, clipped_rollout_error
from sb3_mpg.common.models.residual import ResidualModel
from sb3_mpg.common.models.windows import Transitions, Windows


def test_hidden_dimensions_are_predicted_by_the_prior_model():
    rng = th.Generator().manual_seed(0)
    positions, velocities = 2 * th.rand(300, 1, generator=rng) - 1, th.randn(300, 1, generator=rng)
    actions = 2 * th.rand(300, 1, generator=rng) - 1
    prior = HiddenVelocity()
    rewards = prior.reward(positions, actions, positions)
    data = Transitions(positions, actions, rewards, positions + 0.1 * velocities, th.zeros_like(rewards))
    model = ResidualModel(prior, 2, 1)
    model.rescale(data)
    for _ in range(50):
        model.fit(data)
    assert model.hidden.is_observed.tolist() == [True, False]
    states, expected, ones = th.zeros(1, 2), th.zeros(1, 2), th.ones(1, 1)
    for _ in range(10):
        states, expected = model.transition(states, ones), prior.transition(expected, ones)
    assert states[0, 1] == pytest.approx(expected[0, 1].item())
    # Observed dimensions are corrected by records, in which the hidden velocity is noise
    assert states[0, 0] == pytest.approx(expected[0, 0].item(), abs=0.3)


class LosesItself(PriorModel):
    """Right for some steps, which it counts in a hidden dimension, and then off by a factor of a thousand in each."""

    def __init__(self, model, n_right=2):
        super().__init__()
        self.model, self.n_right = model, n_right

    def transition(self, states, actions):
        next_states, count = self.model.transition(states[:, :-1], actions), states[:, -1:]
        return th.cat([th.where(count < self.n_right, next_states, 1000 * next_states), count + 1], dim=1)

    def reward(self, states, actions, next_states):
        return self.model.reward(states[:, :-1], actions, next_states[:, :-1])

    def observation(self, states):
        return self.model.observation(states[:, :-1])

    def state_from_observation(self, observations):
        return th.cat([self.model.state_from_observation(observations), th.zeros_like(observations[:, :1])], dim=1)


class Sum(PriorModel):
    """Two tanks, whose sum is observed: their encoded states are right for neither."""

    def transition(self, states, actions):
        return states * th.tensor([0.5, 0.9]) + actions

    def reward(self, states, actions, next_states):
        return -states.sum(1, keepdim=True)

    def observation(self, states):
        return states.sum(1, keepdim=True)

    def state_from_observation(self, observations):
        return 0.5 * observations.expand(-1, 2)


def recorded_rollouts(model, states, n_steps=10):
    """Windows of random actions, and what a system does with them that is as the model says."""
    rng = th.Generator().manual_seed(1)
    n_rows, start, reached = len(states), model.observation(states), []
    actions = 2 * th.rand(n_steps, n_rows, start.shape[1], generator=rng) - 1
    for step in range(n_steps):
        states = model.transition(states, actions[step])
        reached.append(model.observation(states))
    never, lengths = th.zeros(n_rows, 1, dtype=th.bool), th.full((n_rows,), n_steps)
    return Windows(start, actions, th.stack(reached), th.zeros(n_steps, n_rows, 1), never, lengths)


@pytest.mark.parametrize("is_used", [True, False])
@pytest.mark.parametrize(
    ("prior", "system", "is_kept"),
    [
        (HiddenVelocity(), HiddenVelocity(), [True, True]),
        (LosesItself(Known()), Known(), [True, True, False]),
        (LosesItself(HiddenVelocity()), HiddenVelocity(), [True, True, False]),
        (LosesItself(LosesItself(Known())), Known(), [True, True, False, False]),
        (Sum(), Sum(), [True, True]),
    ],
)
def test_latent_state_is_kept_where_that_predicts_better(prior, system, is_kept, is_used):
    windows = recorded_rollouts(system, th.rand(300, 2, generator=th.Generator().manual_seed(0)) - 0.5)
    n_states = prior.state_from_observation(windows.observations).shape[1]
    model = ResidualModel(prior, n_states, windows.actions.shape[2])
    # A correction that is only compared with the prior model must choose as well
    model.use_correction(is_used)
    first = windows.actions[0], windows.rewards[0], windows.next_observations[0], windows.terminated.float()
    model.rescale(Transitions(windows.observations, *first))
    # Whatever was chosen before
    hidden = model.hidden
    hidden.keep_all_but(th.nonzero(~hidden.is_observed).flatten().tolist())
    assert not hidden.is_observed.all() and hidden.re_encodes
    with model.using_members("dealt"):
        model.tune_on_rollouts(windows)
        assert model.members == "dealt"
    assert hidden.is_kept.tolist() == is_kept and hidden.re_encodes == (not all(is_kept))
    assert (model.gains == float(is_used)).all()
    described = model.describe_states()
    assert described.is_re_encoded.tolist() == [not kept for kept in is_kept]
    assert described.is_hidden.tolist() == (~hidden.is_observed).tolist()

    other = ResidualModel(prior, n_states, windows.actions.shape[2])
    assert other.load_learned_state(model.learned_state())
    assert other.hidden.is_kept.tolist() == is_kept and other.hidden.re_encodes == hidden.re_encodes
    if system is not prior and hidden.is_observed.sum() > 1:
        states = prior.state_from_observation(windows.observations)
        for actions in windows.actions:
            states = other.transition(states, actions)
        th.testing.assert_close(prior.observation(states), windows.next_observations[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("n_right", "horizon"), [(2, 5), (30, 33)])
def test_misleading_latent_state_is_re_encoded_while_training(n_right, horizon, residual):
    env = LinearEnv()
    settings = {**SMALL, "learning_starts": 200, "horizons": (0, horizon)}
    prior = LosesItself(env.prior_model(), n_right)
    model = MPG("MlpPolicy", env, prior_model=prior, residual=residual, **settings).learn(210)
    assert model.rollout_model.hidden.is_kept.tolist() == [True, True, False]
    report = model.trust_report()
    lines = [line.split("  ")[0] for line in str(report).splitlines() if "hidden" in line]
    if residual:
        assert lines == ["state[2], hidden", "state[2], hidden, re-encoded"]
        assert report.corrected.relative[-1, :-1].max() < 0.1
    else:
        assert lines == ["state[2], hidden"]

    # A learner that started before this was found gets the buffers, and then refreshes the model
    model.rollout_model.hidden.re_encodes = False
    model.rollout_model.refresh()
    assert model.rollout_model.hidden.re_encodes


def test_the_choice_is_kept_when_training_continues_without_the_replay_buffer(tmp_path):
    env = LinearEnv()
    settings = {**SMALL, "learning_starts": 100, "horizons": (0, 33)}
    model = MPG("MlpPolicy", env, prior_model=LosesItself(env.prior_model(), 30), **settings).learn(210)
    assert model.rollout_model.hidden.is_kept.tolist() == [True, True, False]
    model.save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip", env=env)
    loaded.num_timesteps = 2 * loaded.model_fitting.n_prepared_for
    loaded.learn(3, reset_num_timesteps=False)
    assert loaded.replay_buffer.size() == 3 and loaded._n_updates > model._n_updates
    assert loaded.rollout_model.hidden.is_kept.tolist() == [True, True, False]


def test_nothing_is_encoded_where_latent_state_is_kept():
    class Root(Known):
        def observation(self, states):
            return states**3

        def state_from_observation(self, observations):
            return observations.sign() * observations.abs() ** (1 / 3)

    data = truth(300)
    model = ResidualModel(Root(), 2, 2)
    model.rescale(data)
    assert model.hidden.is_observed.all()
    states = th.zeros(4, 2, requires_grad=True)
    (gradient,) = th.autograd.grad(model.transition(states, th.zeros(4, 2)).sum(), states)
    assert th.isfinite(gradient).all()


def test_only_what_is_re_encoded_is_replaced():
    hidden, prior, states = HiddenStates(2), HiddenVelocity(), th.rand(5, 2)
    assert hidden.re_encode(prior, states) is states
    hidden.keep_all_but([1])
    assert th.equal(hidden.re_encode(prior, states), th.cat([states[:, :1], th.zeros(5, 1)], dim=1))
    hidden.keep_all_but()
    assert hidden.re_encode(prior, states) is states


def test_the_choice_is_the_best_of_those_that_are_tried():
    """Two dimensions help only together, and one does harm."""

    def choose(error_of):
        hidden = HiddenStates(4)
        hidden.is_observed.copy_(th.tensor([True, False, False, False]))
        hidden.choose(lambda: error_of({index for index in range(4) if not hidden.is_kept[index]}))
        return [index for index in range(4) if not hidden.is_kept[index]]

    assert choose(lambda dimensions: 1.0) == []
    assert choose(lambda dimensions: 1.0 - 0.1 * len(dimensions & {1, 3}) + 0.5 * (2 in dimensions)) == [1, 3]
    assert choose(lambda dimensions: 0.5 if dimensions == {1, 2, 3} else 1.0 + len(dimensions)) == [1, 2, 3]


def test_diverging_rollouts_do_not_dominate_the_error():
    windows = recorded_rollouts(Known(), th.rand(8, 2) - 0.5, n_steps=2)
    windows.next_observations[0, 0] = 1e9
    windows.next_observations[1, 1] = th.nan
    windows.next_observations[0, 2] += 0.5
    everything, scales = th.ones(2, dtype=th.bool), th.ones(2)
    # Of 8 windows with 2 steps each: two clipped errors, and one of 0.5
    assert clipped_rollout_error(Known(), windows, everything, scales) == pytest.approx(2.25 / 16, rel=1e-4)
    # Steps that were not recorded do not count
    windows = windows._replace(lengths=th.tensor([1, 1, 2, 2, 2, 2, 2, 2]))
    assert clipped_rollout_error(Known(), windows, everything, 2 * scales) == pytest.approx((1 + 0.0625) / 14, rel=1e-4)
