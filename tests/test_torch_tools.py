"""Tools of torch that users apply to the networks of a policy: tracing, export, transformations, state dictionaries."""

import copy
import io

import pytest
import torch as th
from helpers import assert_same_parameters
from lq import LinearEnv
from settings import SMALL
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from sb3_mpg import MPG, NStepADP, NStepDPG, check_prior_model

# torch announces that torch.export will replace them; SB3's documentation uses them
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def model():
    """A policy whose observations are scaled and extended by Fourier features."""
    return MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), compile=False, **SMALL).learn(50)


@pytest.fixture(params=[True, False], ids=["with_gradient", "without_gradient"])
def policy(request, model):
    with th.set_grad_enabled(request.param):
        yield model.policy


def random_inputs(n_rows):
    return 2 * th.randn(n_rows, 2), 2 * th.rand(n_rows, 1) - 1


def through_a_file(module):
    file = io.BytesIO()
    th.jit.save(module, file)
    file.seek(0)
    return th.jit.load(file)


def test_traced_networks(policy):
    observations, actions = random_inputs(7)
    for network in (policy.actor, policy):
        traced = through_a_file(th.jit.trace(network, random_inputs(5)[0]))
        th.testing.assert_close(traced(observations), network(observations))
    traced = th.jit.trace_module(policy.critic, {"q1_forward": random_inputs(5), "forward": random_inputs(5)})
    th.testing.assert_close(traced.q1_forward(observations, actions), policy.critic.q1_forward(observations, actions))
    th.testing.assert_close(traced(observations, actions), policy.critic(observations, actions))


def test_scripted_network(policy):
    features = th.randn(7, policy.actor.features_dim)
    scripted = through_a_file(th.jit.script(policy.actor.mu))
    th.testing.assert_close(scripted(features), policy.actor.mu(features))


def test_traced_actor_has_the_gradient_of_the_actor(model):
    actor, (observations, _) = model.actor, random_inputs(7)
    traced = th.jit.trace(actor, random_inputs(5)[0])
    gradients = [th.autograd.grad(network(observations).sum(), list(network.parameters())) for network in (actor, traced)]
    th.testing.assert_close(*gradients)


def test_exported_programs(policy):
    observations, actions = random_inputs(7)
    for network, inputs in ((policy.actor, (observations,)), (policy.critic, (observations, actions))):
        batch = th.export.Dim("batch")
        exported = th.export.export(network, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs)).module()
        fewer = tuple(tensor[:3] for tensor in inputs)
        th.testing.assert_close(exported(*fewer), network(*fewer))


def test_ensemble_of_stacked_policies(policy):
    """Each member has parameters and scales of its own."""
    members, observations = [copy.deepcopy(policy.actor) for _ in range(3)], random_inputs(5)[0]
    for number, member in enumerate(members):
        member.load_state_dict({name: tensor + 0.1 * number for name, tensor in member.state_dict().items()})
    stacked = stack_module_state(members)

    def act(parameters, buffers):
        return functional_call(policy.actor, (parameters, buffers), (observations,))

    actions = vmap(act)(*stacked)
    th.testing.assert_close(actions, th.stack([member(observations) for member in members]))


def test_derivatives_of_the_policy(policy):
    observations = random_inputs(5)[0]

    def act(observation):
        return policy.actor(observation.unsqueeze(0)).squeeze(0)

    jacobians = vmap(jacrev(act))(observations)
    th.testing.assert_close(vmap(jacfwd(act))(observations), jacobians)
    actions, changes = jvp(policy.actor, (observations,), (th.ones_like(observations),))
    th.testing.assert_close(actions, policy.actor(observations))
    th.testing.assert_close(changes, jacobians.sum(dim=2))
    curvature = vmap(hessian(act))(observations)
    th.testing.assert_close(curvature, curvature.transpose(2, 3))
    assert (curvature != 0).all()


@pytest.mark.parametrize("algorithm", [MPG, NStepDPG, NStepADP])
def test_parameters_are_averaged_and_drawn_at_random(algorithm):
    """As evolution strategies and weight averaging do, which treat all tensors of a state dictionary alike."""
    models = [algorithm("MlpPolicy", LinearEnv(), **{**SMALL, "seed": seed}) for seed in (0, 1)]
    states = [model.policy.state_dict() for model in models]
    assert all(tensor.is_floating_point() for tensor in states[0].values())
    mean = {name: th.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}
    drawn = {name: th.rand_like(tensor) for name, tensor in states[0].items()}
    for state in (mean, drawn):
        models[0].set_parameters({"policy": state}, exact_match=False)
        for name, tensor in models[0].policy.state_dict().items():
            assert th.equal(tensor, state[name])
        assert models[0].learn(42)._n_updates > 0


@pytest.mark.parametrize("mode", [th.no_grad, th.inference_mode])
def test_gradients_are_computed_in_every_mode(mode):
    """Of a program that only predicts, as far as it knows."""

    def train():
        model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), compile=False, **SMALL).learn(45)
        env = LinearEnv()
        env.reset(seed=0)
        model.set_env(env)
        model.learn(45)
        check_prior_model(LinearEnv().prior_model(), LinearEnv(), n_samples=64, verbose=False)
        return model, model.policy_gradient(th.ones(3, 2), 2)

    expected, expected_gradient = train()
    with mode():
        model, gradient = train()
    assert_same_parameters(model, expected)
    assert th.equal(gradient, expected_gradient)
