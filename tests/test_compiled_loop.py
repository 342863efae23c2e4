"""Steps in a row, of graphs that torch divides into a forward and a backward pass without compiling them."""

import copy
import gc
import random
import weakref

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import drawn_batch, policy_gradient_of
from lq import LinearEnv, LinearSimulator
from settings import SMALL
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.td3.policies import Actor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, PriorModel
from sb3_mpg.common.compilation import step_compiler
from sb3_mpg.common.compilation.compiled_loop import CompiledLoop, Direction, StepGraph, copy_of
from sb3_mpg.common.compilation.step_compiler import StepCompiler
from sb3_mpg.common.compilation.torch_compile import rewritten
from sb3_mpg.common.rollouts.steps import EagerSteps
from sb3_mpg.mpg.policies import MPGPolicy
from sb3_mpg_envs.path_tracking import PathTrackingModel, PathTrackingSimulator

pytestmark = pytest.mark.usefixtures("models_are_fitted_once")


def compile_nothing(graph, example_inputs, record):
    def taken_apart(is_backward):
        def compile_direction(graph, example_inputs):
            direction = Direction.of(graph, lambda: make_boxed_func(graph.forward))
            record(direction, is_backward)
            return direction.function

        return compile_direction

    return aot_autograd(fw_compiler=taken_apart(False), bw_compiler=taken_apart(True))(graph, list(example_inputs))


@pytest.fixture
def loops(monkeypatch):
    """Weak references to the loops of steps that are made in a test."""
    made = []

    def compile_loop(step, device, backend):
        loop = CompiledLoop(rewritten(step, device), compile_nothing)
        made.append(weakref.ref(loop))
        return loop

    monkeypatch.setattr(step_compiler, "compile_loop", compile_loop)
    return made


@pytest.fixture
def compiler(loops):
    return StepCompiler()


def graphs_of(loops):
    return [graph for loop in loops for graph in loop().graphs]


class Turning(PriorModel):
    """Observations are a part of the state. The model has a parameter and noise, and terminates if asked to."""

    def __init__(self, terminates=False):
        super().__init__()
        self.terminates = terminates
        self.rate = th.nn.Parameter(th.tensor(0.3))

    def transition(self, states, actions):
        position, velocity, age = states.split(1, dim=1)
        noise = 0.1 * th.randn_like(position) if self.training else 0.0
        return th.cat([position + self.rate * velocity + noise, velocity.cos() + actions, age + 1], dim=1)

    def reward(self, states, actions, next_states):
        return -(next_states**2).sum(1, keepdim=True) - actions**2

    def observation(self, states):
        return states[:, :2]

    def state_from_observation(self, observations):
        return th.cat([observations, th.zeros_like(observations[:, :1])], dim=1)

    def terminal(self, states):
        return (states[:, :1] > 0.5) & self.terminates

    @property
    def may_terminate(self):
        return self.terminates


def make_model(prior_model, env=None, **kwargs):
    settings = {"residual": False, "weighting": "constant", "horizons": (0, 1, 4), "compile": False, **SMALL, **kwargs}
    return MPG("MlpPolicy", LinearEnv() if env is None else env, prior_model=prior_model, **settings).learn(44)


def gradients(model, steps, weights, balance=0.0):
    """Gradients, the other results of the rollout, and the next random number."""
    model.update.steps = steps
    observations = th.as_tensor(model.replay_buffer.observations[:32, 0])
    result = policy_gradient_of(model, observations, weights, balance)
    return [*result.gradients, result.loss, result.actions, *result.returns.values(), th.rand(1)]


class Slanted(Turning):
    """States that are not contiguous in memory: one layout at the start, another after a step."""

    def transition(self, states, actions):
        return super().transition(states, actions).t().contiguous().t()

    def state_from_observation(self, observations):
        return th.cat([observations, th.zeros_like(observations)], dim=1)[:, :3]


class Observed(Turning):
    """Observations are all of the state."""

    def transition(self, states, actions):
        position, velocity = states.split(1, dim=1)
        return th.cat([position + self.rate * velocity, velocity.cos() + actions], dim=1)

    def observation(self, states):
        return states

    def state_from_observation(self, observations):
        return observations


class Reshaped(Observed):
    """... but a view of it."""

    def observation(self, states):
        return states.reshape(len(states), 2, 1).reshape(len(states), 2)


class Copied(Observed):
    """... but a tensor of their own, which is not computed twice."""

    def observation(self, states):
        return states.clone()


@pytest.mark.parametrize("balance", [0.0, 0.5], ids=["mixed", "balanced"])
@pytest.mark.parametrize("normalises", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("terminates", [False, True], ids=["goes_on", "terminates"])
def test_steps_in_a_row_are_the_same(compiler, loops, terminates, normalises, balance):
    env = VecNormalize(DummyVecEnv([LinearEnv])) if normalises else None
    model = make_model(Turning(terminates), env)
    weights = {0: 0.1, 1: 0.3, 4: 0.6}
    expected = gradients(model, EagerSteps(), weights, balance)
    # In the first call it is found out whether steps can be taken in a row
    for _ in range(2):
        th.testing.assert_close(gradients(model, compiler, weights, balance), expected)
    assert not compiler.has_failed
    (graph,) = graphs_of(loops)
    assert graph.loops


def test_horizons_a_step_apart(compiler):
    """Two steps in a row are never taken, and the backward pass goes through some of them more than once."""
    model = make_model(Turning(), horizons=(0, 1, 2, 3))
    weights = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}
    expected = gradients(model, EagerSteps(), weights, 0.5)
    for _ in range(2):
        th.testing.assert_close(gradients(model, compiler, weights, 0.5), expected)
    assert not compiler.has_failed


@pytest.mark.parametrize("model_class", [Slanted, Observed, Reshaped, Copied])
def test_observations_may_be_parts_views_or_copies_of_states(compiler, loops, model_class):
    model = make_model(model_class())
    weights = {1: 0.2, 2: 0.3, 4: 0.5}
    expected = gradients(model, EagerSteps(), weights)
    for _ in range(2):
        th.testing.assert_close(gradients(model, compiler, weights), expected)
    (graph,) = graphs_of(loops)
    assert graph.loops


def test_all_actions_share_the_parameters(compiler, loops):
    model = make_model(Turning(), differentiate="all_actions")
    expected = gradients(model, EagerSteps(), {4: 1.0})
    for _ in range(2):
        th.testing.assert_close(gradients(model, compiler, {4: 1.0}), expected)
    (graph,) = graphs_of(loops)
    assert graph.loops


def test_nothing_is_kept_in_memory(compiler):
    model = make_model(Turning())
    gradients(model, compiler, {4: 1.0})

    def n_tensors():
        return sum(issubclass(type(thing), th.Tensor) for thing in gc.get_objects())

    gradients(model, compiler, {4: 1.0})
    gc.collect()
    gc.disable()
    try:
        before = n_tensors()
        for _ in range(3):
            gradients(model, compiler, {4: 1.0})
        assert n_tensors() == before
    finally:
        gc.enable()


class Drawing(Turning):
    """Noise from Python's generator, which is sometimes the same in two steps."""

    def transition(self, states, actions):
        return super().transition(states, actions) + 0.1 * random.randint(0, 1)


class Storing(Turning):
    """Stores a tensor in each step."""

    def __init__(self):
        super().__init__()
        self.latest = th.zeros(3)

    def transition(self, states, actions):
        next_states = super().transition(states, actions)
        self.latest = next_states.detach().mean(0)
        return next_states


class Ageing(Turning):
    """Depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.age = th.full((), 100.0)

    def transition(self, states, actions):
        self.age = self.age + 1e-4
        return super().transition(states, actions) + 1e-3 * self.age


@pytest.mark.parametrize("model_class", [Drawing, Storing, Ageing])
def test_what_cannot_be_taken_in_a_row_is_taken_one_by_one(compiler, loops, model_class):
    model = make_model(model_class())

    def set_back():
        if model_class is Ageing:
            model.rollout_model.age = th.full((), 100.0)

    set_back()
    expected = gradients(model, EagerSteps(), {4: 1.0})
    for _ in range(3):
        set_back()
        th.testing.assert_close(gradients(model, compiler, {4: 1.0}), expected)
    if model_class is Storing:
        assert not model.rollout_model.latest.requires_grad
    assert not compiler.has_failed
    assert not any(graph.loops for graph in graphs_of(loops))


class Counting(Turning):
    def __init__(self):
        super().__init__()
        self.register_buffer("n_calls", th.zeros(()))

    def transition(self, states, actions):
        self.n_calls += 1
        return super().transition(states, actions)


def test_what_changes_in_place_is_not_compiled():
    """With torch's C++ compiler. The failure is noticed before anything is changed."""
    model = make_model(Counting())
    model.rollout_model.n_calls.zero_()
    expected = gradients(model, EagerSteps(), {4: 1.0})
    assert model.rollout_model.n_calls == 4
    compiler = StepCompiler()
    with pytest.warns(UserWarning, match="Counting and the policy could not be compiled.*in place, as batch normalisation"):
        th.testing.assert_close(gradients(model, compiler, {4: 1.0}), expected)
    assert model.rollout_model.n_calls == 8
    assert compiler.has_failed


def test_batch_normalisation_in_the_policy():
    class NormalisedActor(Actor):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.mu.insert(1, th.nn.BatchNorm1d(16))

    class Policy(MPGPolicy):
        def make_actor(self, features_extractor=None):
            kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
            return NormalisedActor(**kwargs).to(self.device)

    kwargs = {"prior_model": Turning(), "horizons": (0, 2), "weighting": "constant", "residual": False}
    with pytest.warns(UserWarning, match="Turning and the policy could not be compiled"):
        MPG(Policy, LinearEnv(), compile=True, **kwargs, **SMALL).learn(44)


def test_copies_compile_for_themselves(compiler, loops):
    model = make_model(Turning())
    gradients(model, compiler, {4: 1.0})
    copied = copy.deepcopy(compiler)
    expected = gradients(model, EagerSteps(), {4: 1.0})
    for used in (copied, compiler, copied):
        th.testing.assert_close(gradients(model, used, {4: 1.0}), expected)
    assert len(loops) == 2


def test_what_was_compiled_goes_with_its_owner(loops):
    model = make_model(Turning())
    gradients(model, StepCompiler(), {4: 1.0})
    (loop,) = loops
    assert loop() is not None
    model.update.steps = EagerSteps()
    gc.collect()
    assert loop() is None


@pytest.mark.parametrize("is_forward", [True, False])
def test_plain_functions_that_do_something_else_are_not_used(compiler, loops, monkeypatch, is_forward):
    name = "forward" if is_forward else "backward"
    other = getattr(StepGraph, name)

    def double(results):
        return [None if result is None else 2 * result for result in results]

    def wrong(self, *args):
        results = other(self, *args)
        return (double(results[0]), results[1]) if is_forward else double(results)

    model = make_model(Turning())
    expected = gradients(model, EagerSteps(), {4: 1.0})
    monkeypatch.setattr(StepGraph, name, wrong)
    th.testing.assert_close(gradients(model, compiler, {4: 1.0}), expected)
    (graph,) = graphs_of(loops)
    assert graph.loops is False


def test_a_graph_that_changed_is_tried_out_again(compiler, loops):
    model = make_model(Turning())
    gradients(model, compiler, {4: 1.0})
    model.rollout_model.terminates = True
    expected = gradients(model, EagerSteps(), {4: 1.0})
    th.testing.assert_close(gradients(model, compiler, {4: 1.0}), expected)
    assert [graph.loops for graph in graphs_of(loops)] == [True, True]


TASKS = {"path": "PathTracking-v0", "pendulum": "InvertedPendulumConti-v0"}


@pytest.mark.parametrize(
    ("task", "normalises"),
    [
        ("path", True),
        ("pendulum", False),
        pytest.param("path", False, marks=pytest.mark.expensive),
        pytest.param("pendulum", True, marks=pytest.mark.expensive),
    ],
)
def test_exact_models_give_the_value_targets_of_simulators(compiler, loops, task, normalises, monkeypatch):
    """Terminated rollouts included."""
    env = DummyVecEnv([lambda: gym.make(TASKS[task], early_reset_terminates=True, early_reset_penalty=3.0)])
    target = {"value_target": "n_step_simulator", "value_target_kwargs": {"n_steps": 5}}
    model = MPG("MlpPolicy", VecNormalize(env) if normalises else env, compile=False, horizons=(0, 2), **target, **SMALL)
    model.learn(100).training_inputs(128)
    step, n_terminated = model.update.simulator.step, []

    def observed(*args):
        result = step(*args)
        n_terminated.append(result[2].sum())
        return result

    monkeypatch.setattr(model.update.simulator, "step", observed)
    results = []
    for used in (EagerSteps(), compiler, compiler):
        model.update.steps = used
        np.random.seed(0)
        results.append(drawn_batch(model, 128).target_q_values)
    assert not compiler.has_failed
    (graph,) = graphs_of(loops)
    assert graph.loops
    for result in results[1:]:
        th.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)
    # The simulator is used once, without compilation
    assert len(n_terminated) == 5 and 0 < sum(n_terminated) < 128


def test_exact_models_of_users_are_run_in_double_precision(compiler, loops, monkeypatch):
    monkeypatch.setattr(LinearSimulator, "exact_model", lambda self: LinearEnv().prior_model(), raising=False)
    target = {"value_target": "n_step_simulator", "value_target_kwargs": {"n_steps": 4}}
    model = MPG("MlpPolicy", LinearEnv(), compile=False, horizons=(0, 2), **target, **SMALL).learn(44)
    results = []
    for used in (EagerSteps(), compiler):
        model.update.steps = used
        np.random.seed(0)
        results.append(drawn_batch(model).target_q_values)
    assert not compiler.has_failed and graphs_of(loops)[0].loops
    th.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_simulators_that_change_what_a_step_does_have_no_exact_model():
    class Slippery(PathTrackingSimulator):
        def _transition(self, states, controls, columns):
            return super()._transition(states, 0.5 * controls, columns)

    class Known(Slippery):
        def _exact_model(self):
            return Turning()

    class Wider(PathTrackingSimulator):
        def _start_states(self, n_starts):
            return 2 * super()._start_states(n_starts)

    assert Slippery(2).exact_model() is None
    assert isinstance(Known(2).exact_model(), Turning)
    assert isinstance(Wider(2).exact_model(), PathTrackingModel)


def test_without_a_compiler_simulators_are_used(monkeypatch):
    target = {"value_target": "n_step_simulator", "value_target_kwargs": {"n_steps": 3}}
    model = MPG("MlpPolicy", "PathTracking-v0", compile=False, horizons=(0, 2), **target, **SMALL).learn(44)

    def batch():
        np.random.seed(0)
        return drawn_batch(model).target_q_values

    expected = batch()

    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(th, "compile", fail)
    model.update.steps = StepCompiler()
    with pytest.warns(
        UserWarning, match=r"PathTrackingModel and the policy could not be compiled.*RuntimeError: no C\+\+ compiler"
    ):
        th.testing.assert_close(batch(), expected, rtol=1e-5, atol=1e-5)
    # Warnings are errors, and numbers are those of the simulator again
    assert th.equal(batch(), expected)


TABLE = th.arange(24.0).reshape(4, 6)


@pytest.mark.parametrize(
    "tensor",
    [TABLE, TABLE.t(), TABLE[:, 1], TABLE[1:, ::2], TABLE[::3].t(), TABLE[:1].expand(5, 6), TABLE[:0], TABLE[2, 3]],
    ids=["whole", "transposed", "column", "gaps", "rows", "expanded", "empty", "number"],
)
def test_copies_lie_in_memory_as_what_they_are_of(tensor):
    """What is compiled for a tensor reads where that one is, whatever it is given."""
    copied = copy_of(tensor)
    assert (copied.stride(), copied.dtype) == (tensor.stride(), tensor.dtype)
    assert th.equal(copied, tensor)
    assert copied.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
