"""What is compiled gives the same numbers, and what cannot be compiled runs as it is."""

import gc

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import assert_same_parameters, drawn_batch, policy_gradient_of
from lq import LinearEnv
from settings import SMALL

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.compilation import step_compiler
from sb3_mpg.common.compilation.compiled_loop import StepGraph
from sb3_mpg.common.compilation.blocks import Blocks
from sb3_mpg.common.compilation.step_compiler import AT_ONCE, NEVER, StepCompiler, act
from sb3_mpg.common.compilation.torch_compile import BiasBehindProduct, PartsOneByOne, compiling
from sb3_mpg.common.models.ensemble import values_of_rows
from sb3_mpg.common.models.trainable import members_of
from sb3_mpg.common.rollouts.exploration import ModelExploration, explore_in_model
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.rollouts.policy_gradient import mixed_policy_gradient
from sb3_mpg.common.rollouts.steps import EagerSteps
from sb3_mpg.common.value_targets import SimulatorTarget

pytestmark = pytest.mark.usefixtures("models_are_fitted_once")


@pytest.fixture
def compiled(monkeypatch):
    """The loops of steps, and the functions, that are compiled in a test."""
    loops, functions = [], []
    compile_loop, compile_function = step_compiler.compile_loop, step_compiler.compile_function

    def compile_and_record(*args):
        loops.append(compile_loop(*args))
        return loops[-1]

    def record_and_compile(function, *args):
        functions.append(function)
        return compile_function(function, *args)

    monkeypatch.setattr(step_compiler, "compile_loop", compile_and_record)
    monkeypatch.setattr(step_compiler, "compile_function", record_and_compile)
    return loops, functions


class CustomTarget(SimulatorTarget):
    """A target that needs the policy itself, and not only what it does."""

    def __call__(self, replay_data, context, *args):
        assert context.actor.training and list(context.actor.parameters())
        return super().__call__(replay_data, context, *args)


def gradient(model, observations, weights, balance=0.0):
    return th.cat([g.flatten() for g in policy_gradient_of(model, observations, weights, balance).gradients])


class RandomLinearEnv(LinearEnv):
    """``LinearEnv`` with random dynamics; its prior model has the same."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.a, self.b = 0.5 * rng.normal(size=(2, 2)), 0.5 * rng.normal(size=(2, 1))


@pytest.mark.parametrize(
    "env",
    [
        pytest.param(RandomLinearEnv(), id="lq"),
        pytest.param("PathTracking-v0", id="path"),
        pytest.param("InvertedPendulumConti-v0", id="pendulum", marks=pytest.mark.expensive),
    ],
)
def test_compiled_gradient_equals_the_eager_one(env, monkeypatch, compiled):
    model = MPG("MlpPolicy", env, compile=False, horizons=(0, 3), **SMALL).learn(44)
    assert isinstance(model.update.steps, EagerSteps)
    observations = th.as_tensor(model.replay_buffer.observations[:32, 0])
    weights = {0: 0.2, 3: 0.8}
    activations, kept = [], []
    hook = model.actor.mu[1].register_forward_hook(lambda module, inputs, output: activations.append(output.detach()))
    expected = gradient(model, observations, weights)
    hook.remove()

    def forward(graph, inputs, forward=StepGraph.forward):
        results = forward(graph, inputs)
        kept.append(results[1])
        return results

    monkeypatch.setattr(StepGraph, "forward", forward)
    model.update.steps = StepCompiler()
    result = gradient(model, observations, weights)
    assert not model.update.steps.has_failed
    # Steps are taken in a row: torch's compiler works as it is expected to
    (loop,), _ = compiled
    assert all(graph.loops for graph in loop.graphs)
    # What the backward pass needs of the policy is kept and not computed once more
    assert any(tensor.shape == activations[-1].shape and tensor.allclose(activations[-1], atol=1e-4) for tensor in kept[-1])
    scale = expected.abs().max()
    th.testing.assert_close(result / scale, expected / scale, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("n_rows", "n_members"), [(31, 2), pytest.param(32, 3, marks=pytest.mark.expensive)])
def test_batches_that_cannot_be_dealt_in_equal_parts(n_rows, n_members):
    settings = {**SMALL, "residual_kwargs": {"n_members": n_members, "net_arch": (16,)}, "learning_starts": 80}
    model = MPG("MlpPolicy", LinearEnv(), compile=False, horizons=(0, 3), **settings).learn(82)
    observations = th.as_tensor(model.replay_buffer.observations[:n_rows, 0])
    expected = gradient(model, observations, {0: 0.2, 3: 0.8})
    n_steps, low, high = th.full((n_rows, 1), 3), observations.amin(dim=0) - 1, observations.amax(dim=0) + 1

    def explored():
        context = model.update.context(model.units(), model.gamma)
        with members_of(model.rollout_model, "dealt"):
            actions = model.actor(context.units.normalize_observations(observations))
            return explore_in_model(observations, actions, context, n_steps, low, high, 4)

    explored_eagerly = explored()
    model.update.steps = StepCompiler()
    compiled = gradient(model, observations, {0: 0.2, 3: 0.8})
    assert not model.update.steps.has_failed
    scale = expected.abs().max()
    th.testing.assert_close(compiled / scale, expected / scale, rtol=0, atol=5e-6)
    th.testing.assert_close(explored(), explored_eagerly)
    assert not model.update.steps.has_failed


@pytest.mark.parametrize("n_rows", [4, 5, 6, 13, 24])
@pytest.mark.parametrize("n_members", [1, 2, 3])
def test_members_have_the_same_rows_in_blocks(n_rows, n_members):
    blocks = Blocks(n_rows, n_members, 2)
    batch = th.arange(2.0 * n_rows).reshape(n_rows, 2).requires_grad_()
    parts = blocks.split(batch)
    assert all(part.shape == (2 * n_members, 2) and part.is_contiguous() for part in parts)
    assert len(parts) == -(-n_rows // (2 * n_members))
    members = values_of_rows(th.arange(float(n_members)).reshape(-1, 1, 1), 2 * n_members, "dealt")
    joined = blocks.join([part + 1000 * members for part in parts])
    expected = batch + 1000 * values_of_rows(th.arange(float(n_members)).reshape(-1, 1, 1), n_rows, "dealt")
    assert th.equal(joined, expected)
    # The rows that were added have no gradient
    (gradients,) = th.autograd.grad(joined.sum(), batch)
    assert th.equal(gradients, th.ones_like(batch))
    # In the second dimension, as the rewards of steps
    assert th.equal(blocks.join([th.stack([part, -part]) for part in parts], dim=1), th.stack([batch, -batch]))


def test_batches_of_all_sizes_share_a_graph(compiled):
    """With and without gradient, and whatever was done in between."""
    model = MPG("MlpPolicy", RandomLinearEnv(), compile=False, horizons=(0, 3), **SMALL).learn(44)
    observations = th.as_tensor(model.replay_buffer.observations[:32, 0])

    def results(steps):
        context = model.update.context(model.units(), model.gamma)._replace(steps=steps)
        with members_of(model.rollout_model, "dealt"):
            for n_rows in (8, 32, 3):
                yield mixed_policy_gradient(observations[:n_rows], context, {0: 0.2, 3: 0.8}).gradients
                with th.no_grad():
                    yield [model_rollout(observations[:n_rows], context, [2])[2]]
                with model.rollout_model.extrapolating():
                    pass

    expected, compiler = list(results(EagerSteps())), StepCompiler(n_rows=8)
    found = list(results(compiler))
    (loop,), _ = compiled
    (graph,) = loop.graphs
    assert graph.loops and not compiler.has_failed
    for one, other in zip(found, expected, strict=True):
        for tensor, wanted in zip(one, other, strict=True):
            assert not tensor.requires_grad
            scale = wanted.abs().max()
            th.testing.assert_close(tensor / scale, wanted / scale, rtol=0, atol=5e-6)


class RandomGains(PriorModel):
    """The gradient depends on its noise, which is drawn by several functions of torch."""

    def transition(self, states, actions):
        gains = th.normal(th.ones_like(states), 0.3) + th.rand(states.shape) + th.bernoulli(th.full_like(states, 0.5))
        return (gains * states).sin() + (th.randn(actions.shape) * actions).sin().sum(1, keepdim=True)

    def reward(self, states, actions, next_states):
        return -(states**2).sum(1, keepdim=True)


def test_the_backward_pass_has_the_noise_of_the_forward_pass():
    kwargs = {"prior_model": RandomGains(), "residual": False, "weighting": "constant"}
    model = MPG("MlpPolicy", LinearEnv(), compile=False, horizons=(0, 2), **kwargs, **SMALL).learn(44)
    observations = th.as_tensor(model.replay_buffer.observations[:32, 0])
    expected = gradient(model, observations, {2: 1.0})
    model.update.steps = StepCompiler()
    compiled = gradient(model, observations, {2: 1.0})
    assert not model.update.steps.has_failed
    scale = expected.abs().max()
    th.testing.assert_close(compiled / scale, expected / scale, rtol=0, atol=5e-6)


def test_the_graph_follows_what_it_depends_on():
    """When a number in the model or the size of the batch changes, steps are compiled anew."""
    model = MPG("MlpPolicy", "PathTracking-v0", compile=False, **SMALL).learn(44)
    observations = th.as_tensor(model.replay_buffer.observations[:32, 0])
    weights = {0: 0.2, 3: 0.8}

    compiler = StepCompiler(backend="eager")

    def check():
        model.update.steps = compiler
        compiled = gradient(model, observations, weights)
        assert not compiler.has_failed
        model.update.steps = EagerSteps()
        expected = gradient(model, observations, weights)
        th.testing.assert_close(compiled, expected)
        return expected

    before = check()
    model.rollout_model.prior.steering_gain = -1.0
    assert not th.allclose(before, check())
    observations = observations[:20]
    check()


def test_compiled_exploration_equals_the_eager_one(compiled):
    env = gym.make("InvertedPendulumConti-v0", early_reset_terminates=True)
    model = MPG("MlpPolicy", env, compile=False, horizons=(0, 3), **SMALL).learn(60)
    observations = th.as_tensor(model.replay_buffer.observations[:32, 0])
    explored = []
    for steps in (EagerSteps(), StepCompiler()):
        context = model.update.context(model.units(), model.gamma)._replace(steps=steps)
        th.manual_seed(0)
        with members_of(model.rollout_model, "dealt"):
            explored.append(ModelExploration(0.5, 10).perturb(observations, context, 0.9))
    (loop,), _ = compiled
    assert not steps.has_failed and all(graph.loops for graph in loop.graphs)
    th.testing.assert_close(*explored, rtol=1e-5, atol=1e-5)
    assert (explored[0] != observations).any()


class NumpyOnly:
    """A simulator without an exact model."""

    def __init__(self, simulator):
        self.num_agents, self.set_state, self.step = simulator.num_agents, simulator.set_state, simulator.step


def test_compiled_policies_give_the_same_value_targets(compiled):
    """Also when some of the agents have terminated: fewer rows run eagerly."""
    env = gym.make("InvertedPendulumConti-v0", max_episode_steps=2, early_reset_terminates=True)
    model = MPG("MlpPolicy", env, compile=False, value_target="n_step_simulator", horizons=(0, 2), **SMALL).learn(50)
    model.update.simulator = NumpyOnly(model.update.simulator)
    compiler = StepCompiler()
    for seed in range(2):
        targets = []
        for steps in (compiler, EagerSteps()):
            model.update.steps = steps
            np.random.seed(seed)
            targets.append(drawn_batch(model, 32, model._n_updates).target_q_values)
        assert not compiler.has_failed
        th.testing.assert_close(*targets, rtol=1e-4, atol=1e-4)
        # The actor learns meanwhile
        with th.no_grad():
            for parameter in model.actor.parameters():
                parameter.add_(0.1 * th.randn_like(parameter))
    assert compiled == ([], [act])
    acted = []
    model.actor.register_forward_hook(lambda actor, inputs, actions: acted.append(len(actions)))
    drawn_batch(model, 32, model._n_updates)
    assert 32 in acted and min(acted) < 32


def test_policies_that_cannot_be_compiled_run_eagerly(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(th, "compile", fail)
    compiler, actor, inputs = StepCompiler(), th.nn.Linear(3, 2), th.randn(5, 3)
    with pytest.warns(UserWarning, match=r"Policies could not be compiled.*RuntimeError: no C\+\+ compiler"):
        assert th.equal(compiler.policy(actor, 5)(inputs), actor(inputs))
    # Warnings are errors
    assert th.equal(compiler.policy(actor, 5)(inputs), actor(inputs))


@pytest.mark.parametrize("target_class", [SimulatorTarget, CustomTarget])
def test_errors_of_a_simulator_are_not_those_of_the_compiler(monkeypatch, target_class):
    model = MPG("MlpPolicy", LinearEnv(), compile=False, value_target=target_class(2), horizons=(0, 2), **SMALL).learn(44)
    model.update.steps = compiler = StepCompiler(backend="eager")

    def disconnected(actions, indices):
        raise ConnectionError("lost the simulator")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError, match="lost"):
        patch.setattr(model.update.simulator, "step", disconnected)
        drawn_batch(model)
    assert not compiler.has_failed
    assert drawn_batch(model).target_q_values.shape == (32, 1)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_garbage_is_collected_again(is_enabled):
    was_enabled = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        with compiling():
            assert not gc.isenabled()
        assert gc.isenabled() == is_enabled
        with pytest.raises(KeyboardInterrupt), compiling():
            raise KeyboardInterrupt
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_biases_behind_products_change_nothing_else():
    linear, inputs = th.nn.Linear(5, 3), th.randn(7, 5)
    narrow, wide, back = th.nn.Linear(5, 20), th.nn.Linear(20, 17), th.nn.Linear(17, 3)
    weight, bias = th.randn(2, 5, 3), th.randn(2, 1, 3)
    functions = [
        lambda: linear(inputs),
        lambda: linear(inputs.expand(4, 7, 5)),
        lambda: back(wide(narrow(inputs))),
        lambda: th.nn.functional.linear(inputs, linear.weight),
        lambda: th.nn.functional.linear(inputs, linear.weight, bias=linear.bias),
        lambda: th.baddbmm(bias, inputs.expand(2, 7, 5), weight),
        lambda: th.baddbmm(bias, inputs.expand(2, 7, 5), weight, beta=0.5),
    ]
    for function in functions:
        expected = function()
        with BiasBehindProduct():
            th.testing.assert_close(function(), expected)


def test_tensors_in_parts_are_the_same():
    tensor = th.randn(4, 5, requires_grad=True)
    functions = {
        lambda: tensor.unbind(): "SelectBackward0",
        lambda: tensor.unbind(-1): "SelectBackward0",
        lambda: th.unbind(tensor, dim=1): "SelectBackward0",
        lambda: tensor.split([1, 4], dim=1): "SliceBackward0",
        lambda: th.split(tensor, (3, 1)): "SliceBackward0",
        lambda: tensor.split(2, dim=-1): "SplitBackward0",
        lambda: th.split(tensor, split_size_or_sections=[2, 2]): "SliceBackward0",
    }
    for function, derivative in functions.items():
        expected = function()
        with PartsOneByOne():
            parts = function()
        assert len(parts) == len(expected)
        for part, other in zip(parts, expected, strict=True):
            th.testing.assert_close(part, other, rtol=0, atol=0)
            assert part.grad_fn.name() == derivative


class CannotBeCompiled(PriorModel):
    def transition(self, states, actions):
        if states.sum().item() > 1e9:  # a branch on data breaks the graph
            raise OverflowError
        return states + 0.1 * actions

    def reward(self, states, actions, next_states):
        return -(states**2).sum(1, keepdim=True)


def test_what_cannot_be_compiled_runs_with_one_warning():
    kwargs = {**SMALL, "prior_model": CannotBeCompiled(), "horizons": (0, 2)}
    model = MPG("MlpPolicy", LinearEnv(), compile=True, **kwargs)
    with pytest.warns(UserWarning, match="CannotBeCompiled and the policy could not be compiled") as record:
        model.learn(60)
    assert len([w for w in record if "compiled" in str(w.message)]) == 1
    reference = MPG("MlpPolicy", LinearEnv(), compile=False, **kwargs).learn(60)
    assert_same_parameters(model, reference)


def test_an_error_of_the_model_is_not_hidden():
    class Fails(CannotBeCompiled):
        def reward(self, states, actions, next_states):
            if self.training:
                raise ZeroDivisionError("mine")
            return super().reward(states, actions, next_states)

    with pytest.raises(ZeroDivisionError, match="mine"):
        MPG(
            "MlpPolicy",
            LinearEnv(),
            prior_model=Fails(),
            compile=True,
            residual=False,
            weighting="rule_based",
            horizons=(0, 2),
            **SMALL,
        ).learn(60)


def test_auto_compiles_long_runs_only():
    def compiled_after(total_timesteps, **kwargs):
        model._setup_learn(total_timesteps, **kwargs)
        steps, after = model.update.steps, model.training_state.compiled_after
        assert isinstance(steps, EagerSteps if after == NEVER else StepCompiler)
        assert after == NEVER or steps.after_update == after
        return after

    model = MPG("MlpPolicy", LinearEnv(), learning_starts=1000)
    assert model.compile == "auto"
    assert compiled_after(1500) == NEVER
    assert compiled_after(100_000) == 0
    # A continued training does as it did before, though few steps are left
    model.num_timesteps, model._n_updates = 99_000, 98_000
    assert compiled_after(1000, reset_num_timesteps=False) == 0
    model.update.steps.begin_update(98_001)
    assert model.update.steps.is_compiled
    model.training_state.compiled_after = None
    assert compiled_after(500, reset_num_timesteps=False) == NEVER
    model.gradient_steps = -1
    assert compiled_after(100_000) == 98_000
    assert not model.update.steps.is_compiled
    model = MPG("MlpPolicy", LinearEnv(), learning_starts=1000, horizons=(0,), weighting="constant")
    assert compiled_after(100_000) == NEVER
    model = MPG("MlpPolicy", LinearEnv(), learning_starts=1000, compile=True)
    assert compiled_after(1) == AT_ONCE and model.update.steps.is_compiled
    with pytest.raises(ValueError, match="`compile` must be"):
        MPG("MlpPolicy", LinearEnv(), compile="yes")


def test_what_was_compiled_is_not_saved(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), compile=False, horizons=(0, 2), **SMALL).learn(44)
    model.update.steps = StepCompiler()
    precision = th.get_float32_matmul_precision()
    model.save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip")
    assert isinstance(loaded.update.steps, EagerSteps)
    assert_same_parameters(loaded, model)
    assert th.get_float32_matmul_precision() == precision


def test_each_horizon_passes_back_through_the_steps_that_it_shares_with_longer_ones():
    """Also where the compiler's cache holds what was compiled for a single horizon."""
    observations = th.randn(32, 2, generator=th.Generator().manual_seed(0))
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2, 6), **SMALL).learn(50)
    for weights in ({0: 0.5, 6: 0.5}, {0: 0.2, 2: 0.3, 6: 0.5}):
        gradients = []
        for steps in (EagerSteps(), StepCompiler()):
            model.update.steps = steps
            gradients.append(gradient(model, observations, weights, 0.8))
        assert not steps.has_failed
        th.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
