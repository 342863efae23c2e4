import gc

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import assert_same_parameters
from lq import LinearEnv
from settings import SMALL

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.compilation.step_compiler import BiasBehindProduct, PartsOneByOne, StepCompiler, compiling
from sb3_mpg.common.compilation.compiled_loop import StepGraph
from sb3_mpg.common.models.trainable import members_of
from sb3_mpg.common.rollouts.model_rollout import explore_in_model, hold
from sb3_mpg.common.value_targets import SimulatorTarget


class CustomTarget(SimulatorTarget):
    """Takes the policy for what it is."""

    def __call__(self, replay_data, actor, *args):
        assert actor.training and list(actor.parameters())
        return super().__call__(replay_data, actor, *args)


def gradient(model, observations, weights):
    """With dealt rows, and with the noise of the model, the same one at each call."""
    th.manual_seed(3)
    model.rollout_model.train()
    with members_of(model.rollout_model, "dealt"):
        return th.cat([g.flatten() for g in model._mixed_policy_gradient(observations, model._units(), weights).gradients])


class RandomLinearEnv(LinearEnv):
    """The costs of ``LinearEnv`` and random dynamics, its model's too."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.a, self.b = 0.5 * rng.normal(size=(2, 2)), 0.5 * rng.normal(size=(2, 1))


@pytest.mark.parametrize(
    "env", [RandomLinearEnv(), "PathTracking-v0", "InvertedPendulumConti-v0"], ids=["lq", "path", "pendulum"]
)
def test_compiled_gradient_equals_the_other(env, monkeypatch):
    model = MPG("MlpPolicy", env, compile=False, horizons=(0, 3), **SMALL).learn(44)
    assert model._step_compiler is None
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
    model._step_compiler = StepCompiler()
    compiled = gradient(model, observations, weights)
    assert not model._step_compiler.has_failed
    # What torch compiles with is as it is expected
    assert all(graph.loops for graph in model._step_compiler._steps[True].graphs)
    # What the backward pass needs of the policy is kept, and not computed once more
    assert any(tensor.shape == activations[-1].shape and tensor.allclose(activations[-1], atol=1e-4) for tensor in kept[-1])
    scale = expected.abs().max()
    th.testing.assert_close(compiled / scale, expected / scale, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("n_rows", "n_members"), [(31, 2), (32, 3)])
def test_batches_that_do_not_come_out_even_between_the_members(n_rows, n_members):
    settings = {**SMALL, "residual_kwargs": {"n_members": n_members, "net_arch": (16,)}, "learning_starts": 80}
    model = MPG("MlpPolicy", LinearEnv(), compile=False, horizons=(0, 3), **settings).learn(82)
    observations = th.as_tensor(model.replay_buffer.observations[:n_rows, 0])
    expected = gradient(model, observations, {0: 0.2, 3: 0.8})
    noise, steps = th.zeros(n_rows, 1), th.full((n_rows, 1), 3)
    low, high = observations.amin(dim=0) - 1, observations.amax(dim=0) + 1

    def explored(hold):
        with model.rollout_model.using_members("dealt"):
            return explore_in_model(
                observations, model.actor, model.rollout_model, model._units(), steps, noise, low, high, 4, hold
            )

    explored_as_it_is = explored(hold)
    model._step_compiler = StepCompiler()
    compiled = gradient(model, observations, {0: 0.2, 3: 0.8})
    assert not model._step_compiler.has_failed
    scale = expected.abs().max()
    th.testing.assert_close(compiled / scale, expected / scale, rtol=0, atol=5e-6)
    th.testing.assert_close(explored(model._step_compiler.hold), explored_as_it_is)


class RandomGains(PriorModel):
    """Noise that the gradient depends on, drawn in the ways that torch has."""

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
    model._step_compiler = StepCompiler()
    compiled = gradient(model, observations, {2: 1.0})
    assert not model._step_compiler.has_failed
    scale = expected.abs().max()
    th.testing.assert_close(compiled / scale, expected / scale, rtol=0, atol=5e-6)


def test_the_graph_follows_what_it_depends_on():
    """Numbers that the model holds, other batches: nothing that was compiled goes stale."""
    model = MPG("MlpPolicy", "PathTracking-v0", compile=False, **SMALL).learn(44)
    observations = th.as_tensor(model.replay_buffer.observations[:32, 0])
    weights = {0: 0.2, 3: 0.8}

    compiler = StepCompiler(backend="eager")

    def check():
        model._step_compiler = compiler
        compiled = gradient(model, observations, weights)
        assert compiler is None or not compiler.has_failed
        model._step_compiler = None
        expected = gradient(model, observations, weights)
        th.testing.assert_close(compiled, expected)
        return expected

    before = check()
    model.rollout_model.prior.steering_gain = -1.0
    assert not th.allclose(before, check())
    observations = observations[:20]
    check()


def test_compiled_exploration_equals_the_other():
    kwargs = {"early_reset_terminates": True}
    env = gym.make("InvertedPendulumConti-v0", **kwargs)
    model = MPG("MlpPolicy", env, compile=False, horizons=(0, 3), **SMALL).learn(60)
    observations, units = th.as_tensor(model.replay_buffer.observations[:32, 0]), model._units()
    explored = []
    for compiler in (None, StepCompiler()):
        model._step_compiler = compiler
        th.manual_seed(0)
        explored.append(model._explored(observations, units, 0.9))
        assert compiler is None or (not compiler.has_failed and all(graph.loops for graph in compiler._hold_loop.graphs))
    th.testing.assert_close(*explored, rtol=1e-5, atol=1e-5)
    assert (explored[0] != observations).any()


class NumpyOnly:
    """A simulator that has no model of itself."""

    def __init__(self, simulator):
        self.num_agents, self.set_state, self.step = simulator.num_agents, simulator.set_state, simulator.step


def test_compiled_policies_give_the_same_value_targets():
    """Also when some of the agents have terminated, for which nothing more is compiled."""
    env = gym.make("InvertedPendulumConti-v0", max_episode_steps=2, early_reset_terminates=True)
    model = MPG("MlpPolicy", env, compile=False, value_target="n_step_simulator", horizons=(0, 2), **SMALL).learn(50)
    simulator = NumpyOnly(model._make_simulator(32))
    model._make_simulator = lambda num_agents: simulator
    compilers = StepCompiler(), None
    for seed in range(2):
        targets = []
        for compiler in compilers:
            model._step_compiler = compiler
            np.random.seed(seed)
            targets.append(model._draw_batch(model._n_updates, 32, model._units()).target_q_values)
            assert compiler is None or not compiler.has_failed
        th.testing.assert_close(*targets, rtol=1e-4, atol=1e-4)
        # The actor learns meanwhile
        with th.no_grad():
            for parameter in model.actor.parameters():
                parameter.add_(0.1 * th.randn_like(parameter))
    assert compilers[0]._act is not None
    acted = []
    model.actor.register_forward_hook(lambda actor, inputs, actions: acted.append(len(actions)))
    model._draw_batch(model._n_updates, 32, model._units())
    assert 32 in acted and min(acted) < 32


def test_policies_that_cannot_be_compiled_act_as_they_are(monkeypatch):
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
    model._step_compiler = compiler = StepCompiler(backend="eager")

    def disconnected(n_agents):
        raise ConnectionError("lost the simulator")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError, match="lost"):
        patch.setattr(model, "_make_simulator", disconnected)
        model._draw_batch(1, 32, model._units())
    assert not compiler.has_failed
    assert model._draw_batch(1, 32, model._units()).target_q_values.shape == (32, 1)


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
    model = MPG("MlpPolicy", LinearEnv(), learning_starts=1000)
    assert model.compile == "auto"
    assert not model._is_worth_compiling(2000)
    assert model._is_worth_compiling(100_000)
    # A continued training does as it did before, though little of it is left
    model._setup_learn(100_000)
    assert model._compiles
    model.num_timesteps = 99_000
    model._setup_learn(1000, reset_num_timesteps=False)
    assert model._compiles and not model._is_worth_compiling(100_000)
    model.num_timesteps = 0
    model.gradient_steps = -1
    assert model._is_worth_compiling(100_000)
    model.weighting_rule.horizons = (0,)
    assert not model._is_worth_compiling(100_000)
    with pytest.raises(ValueError, match="`compile` must be"):
        MPG("MlpPolicy", LinearEnv(), compile="yes")


def test_saved_models_do_not_know(tmp_path):
    model = MPG("MlpPolicy", LinearEnv(), compile=False, horizons=(0, 2), **SMALL).learn(44)
    model._step_compiler = StepCompiler()
    precision = th.get_float32_matmul_precision()
    model.save(tmp_path / "model.zip")
    loaded = MPG.load(tmp_path / "model.zip")
    assert loaded._step_compiler is None
    assert list(loaded.policy.state_dict()) == list(model.policy.state_dict())
    assert th.get_float32_matmul_precision() == precision


def test_each_horizon_passes_back_through_the_steps_that_it_shares_with_longer_ones():
    """Also where what was compiled for a single one lies in the compiler's cache."""
    observations = th.randn(32, 2, generator=th.Generator().manual_seed(0))
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2, 6), **SMALL).learn(50)
    gradients = {}
    for weights in ({0: 0.5, 6: 0.5}, {0: 0.2, 2: 0.3, 6: 0.5}):
        for compiler in (None, StepCompiler()):
            model._step_compiler = compiler
            result = model._mixed_policy_gradient(observations, model._units(), weights, 0.8)
            gradients[compiler is None] = th.cat([gradient.flatten() for gradient in result.gradients])
        # Nothing fell back
        assert compiler is None or not compiler.has_failed
        th.testing.assert_close(gradients[False], gradients[True], rtol=1e-4, atol=1e-6)
