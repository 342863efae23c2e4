"""What is replaced after an algorithm was set up: by a callback, or between two trainings. Training follows."""

import copy

import pytest
import torch as th
from helpers import assert_same_parameters
from learner_runs import small_model, when_learning
from lq import LinearEnv
from models import KnowsNothing

from sb3_mpg.common.learners import MultiprocessLearners
from sb3_mpg.common.models.residual import ResidualModel
from sb3_mpg.common.trust.weighting import make_weighting_rule
from sb3_mpg.common.value_targets import ReplayTarget

OTHER = LinearEnv().prior_model(0.1)


def assert_is_trained(policy, before):
    assert any(not th.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("n_learners", [0, 1])
def test_a_policy_of_a_callback_is_trained(n_learners):
    model, other = small_model(n_learners=n_learners), small_model(seed=5).policy
    first, before, states = model.policy, copy.deepcopy(other.state_dict()), []

    def replace(model):
        model.policy = other
        states.append(copy.deepcopy(first.state_dict()))

    model.learn(70, callback=when_learning(replace))
    assert model.policy is other is model.update.policy and model._n_updates == 30
    assert_is_trained(other, before)
    assert all(th.equal(value, states[0][name]) for name, value in first.state_dict().items())


def test_learners_go_on_with_another_policy():
    seen = []

    def replace(model):
        model.policy = copy.deepcopy(model.policy)

    model = small_model(n_learners=1)
    model.learn(70, callback=[when_learning(replace), when_learning(lambda model: seen.append(model.learners), at=20)])
    assert isinstance(seen[0], MultiprocessLearners) and seen[0].update.policy is model.policy


def test_settings_of_the_model_between_two_trainings():
    model = small_model().learn(45)
    model.prior_model = OTHER
    assert model.learn(45, reset_num_timesteps=False).rollout_model is OTHER
    model.prior_model, model.prior_model_kwargs = "auto", {"bias": 0.2}
    model.learn(45, reset_num_timesteps=False)
    assert th.allclose(model.rollout_model.a, LinearEnv().prior_model(0.2).a)
    model.residual = True
    assert isinstance(model.learn(45, reset_num_timesteps=False).rollout_model, ResidualModel)
    assert model.model_fitting.is_prepared
    model.residual_kwargs = {"n_members": 3}
    with pytest.warns(UserWarning, match="learned of another model is forgotten"):
        model.learn(45, reset_num_timesteps=False)
    assert model.rollout_model.n_members == 3
    model.prior_model = KnowsNothing
    with pytest.raises(TypeError, match="bias"):
        model.learn(45, reset_num_timesteps=False)
    assert model.num_timesteps == 5 * 45


def test_a_rule_that_needs_a_model_or_its_errors():
    model = small_model(horizons=(0,)).learn(45)
    model.weighting_rule = make_weighting_rule("constant", (0, 2))
    model.learn(45)
    assert model.rollout_model.transition(th.zeros(1, 2), th.zeros(1, 1)).shape == (1, 2)
    model.weighting_rule = make_weighting_rule("measured", (0, 2))
    assert len(model.learn(45).trust.measurements) > 0


def test_a_model_of_a_callback():
    def replace(model):
        model.prior_model = OTHER

    assert small_model().learn(60, callback=when_learning(replace)).rollout_model is OTHER


def test_value_targets():
    model = small_model()
    model.value_target = "clipped_double_q"
    assert model.learn(45)._n_updates == 5
    model.value_target = ReplayTarget(n_steps=5)
    with pytest.raises(ValueError, match=r"spans 5 recorded steps.*made for n_steps=1"):
        model.learn(45)
    model.value_target = ReplayTarget()

    def replace(model):
        model.value_target = ReplayTarget(n_steps=5)

    with pytest.raises(ValueError, match="spans 5 recorded steps, but the replay buffer samples single ones"):
        model.learn(45, callback=when_learning(replace, at=7))


@pytest.mark.parametrize("seed", [None, 0])
def test_set_random_seed(seed):
    """As of SB3's algorithms: what is random follows it from then on."""
    models = [small_model(seed=seed) for _ in range(3)]
    parameters = copy.deepcopy(models[0].get_parameters())
    for model, new_seed in zip(models, (3, 3, 4), strict=True):
        model.set_parameters(copy.deepcopy(parameters))
        model.set_random_seed(new_seed)
        model.learn(50)
    assert_same_parameters(models[0], models[1])
    with pytest.raises(AssertionError):
        assert_same_parameters(models[0], models[2])
    assert [model.update.seed for model in models] == [3, 3, 4]
