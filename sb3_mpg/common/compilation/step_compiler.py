"""Compiles model and policy for rollouts. The results are the same up to rounding errors."""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import FunctionType
from typing import Any, Literal, TypeVar

import torch as th
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sb3_mpg.common.compilation.compiled_loop import CompiledLoop, Direction, Record
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.loading import name_of
from sb3_mpg.common.models.trainable import TrainableModel
from sb3_mpg.common.rollouts.steps import (
    EagerSteps,
    HeldState,
    PlannedState,
    RolloutContext,
    RolloutState,
    Steps,
    advance,
    hold,
    with_offsets,
)
from sb3_mpg.common.type_aliases import Policy
from sb3_mpg.common.units import Units

Result = TypeVar("Result")

# Compilation takes 10 to 20 seconds and saves 1 to 3 milliseconds for each model step of a batch (benchmarks/speed.py)
COMPILE_FROM_MODEL_STEPS = 15_000

# How the steps are differentiated
OF_STEPS: dict[str, Any] = {
    # Cached graphs are not compiled here, so that their two directions could not be recorded
    "enable_autograd_cache": False,
    # Horizons share steps, so several backward passes use the same activations
    "donated_buffer": False,
    # Recompute small quantities of the model in the backward pass, which is faster than keeping hundreds of small tensors. Not
    # by `aggressive_recomputation`, which also draws random numbers a second time
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
}

# With fewer columns than this, the libraries take up to four times as long for a product as for its transpose
NARROW = 16


def check_compile(choice: Any) -> None:
    """
    :param choice: whether rollouts are compiled
    :raises ValueError: when it is not one of ``True``, ``False`` and ``"auto"``
    """
    if choice not in (True, False, "auto"):
        raise ValueError(f"`compile` must be True, False or 'auto', got {choice!r}.")


def chooses_to_compile(choice: bool | Literal["auto"], n_model_steps: float) -> bool:
    """
    :param choice: whether rollouts are compiled; ``"auto"`` compiles if that repays the compile time
    :param n_model_steps: number of model steps that are to be taken
    :return: whether rollouts are compiled
    """
    return n_model_steps >= COMPILE_FROM_MODEL_STEPS if choice == "auto" else bool(choice)


def product_of(inputs: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """
    :param inputs: ``(..., n_inputs)``
    :param weight: ``(n_outputs, n_inputs)``
    :return: ``inputs @ weight.T``
    """
    if inputs.dim() == 2 and inputs.shape[1] < NARROW:
        # For column-major inputs, the gradient is computed in columns as well. Narrow outputs do not get this treatment: after
        # a transposed view, the compiler would recompute activations in the backward pass
        inputs = inputs.t().contiguous().t()
    return inputs @ weight.t()


class BiasBehindProduct(TorchFunctionMode):
    """
    Splits linear layers into a product and the addition of the bias. The libraries of the CPU copy the bias to each row before
    the product, while the compiler adds it at no cost when it computes the activation.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As in ``TorchFunctionMode``."""
        bias, product = None, None
        if func is F.linear and not kwargs and len(args) == 3:
            bias, product = args[2], product_of(args[0], args[1])
        elif func is th.baddbmm and not kwargs:
            bias, product = args[0], th.bmm(args[1], args[2])
        if bias is None or product is None:
            return func(*args, **(kwargs or {}))
        # A difference, because the compiler would fuse a sum with the product again
        return product - (-bias)


class PartsOneByOne(TorchFunctionMode):
    """
    Replaces ``unbind`` and ``split`` into given sizes by one view for each part. The backward pass can then recompute a part
    from the whole tensor. Otherwise every part, and all that is computed from it, is kept for the backward pass.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As in ``TorchFunctionMode``."""
        kwargs = kwargs or {}
        if func in (th.unbind, th.Tensor.unbind) and kwargs.keys() <= {"dim"}:
            return self._unbind(*args, **kwargs)
        if func in (th.split, th.Tensor.split) and kwargs.keys() <= {"dim"} and isinstance(args[1], (list, tuple)):
            return self._split(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _unbind(tensor: th.Tensor, dim: int = 0) -> tuple[th.Tensor, ...]:
        return tuple(tensor.select(dim, index) for index in range(tensor.shape[dim]))

    @staticmethod
    def _split(tensor: th.Tensor, sizes: Sequence[int], dim: int = 0) -> tuple[th.Tensor, ...]:
        assert sum(sizes) == tensor.shape[dim], (sizes, tensor.shape)
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return tuple(tensor.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))


def in_a_line(error: Exception) -> str:
    """
    :param error: an error of the compiler, whose message may have many lines
    :return: the beginning of the message in one line, for a warning
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def inductor_options(device: th.device) -> dict[str, Any]:
    """
    :param device: device of the compiled code
    :return: options of torch's compiler
    """
    options: dict[str, Any] = {
        # Draw the same random numbers as without compilation
        "fallback_random": True,
        # The guards check the sizes already
        "size_asserts": False,
        # Skip the test of vector instructions, which builds a library for each set and takes as long as all the rest
        "cpp.vec_isa_ok": True,
        # One C++ file for each direction. With one for each kernel, most of the compile time is spent on headers, and the
        # kernels are called from Python. On a GPU the kernels are not C++
        "cpp_wrapper": device.type == "cpu",
    }
    # Precompiled headers take longer than they save in two or three files. Old versions of torch do not have the option
    if hasattr(inductor_config, "cpp_cache_precompile_headers"):
        options["cpp_cache_precompile_headers"] = False
    return options


def rewritten(function: Callable[..., Any], device: th.device) -> Callable[..., Any]:
    """
    :param function: a function of tensors, modules and numbers
    :param device: device of the tensors
    :return: the same function with the operations of this module, which compile to faster code
    """
    bias_behind_product = BiasBehindProduct() if device.type == "cpu" else nullcontext()

    def rewritten(*args: Any) -> Any:
        with PartsOneByOne(), bias_behind_product:
            return function(*args)

    # Copy the code object. torch limits the number of recompilations of each one, and several algorithms in one process, as
    # in a hyperparameter search, must not share this limit
    code = rewritten.__code__.replace()
    return FunctionType(code, rewritten.__globals__, rewritten.__name__, None, rewritten.__closure__)


def compile_function(function: Callable[..., Any], device: th.device, backend: str) -> Callable[..., Any]:
    """
    Compile a function. The guards of ``torch.compile`` check everything that the graph depends on at each call, including
    the attributes of the user's model.

    :param function: a function of tensors, modules and numbers
    :param device: device of the tensors
    :param backend: backend of ``torch.compile``
    :return: the function, which its first call compiles
    """
    options = inductor_options(device) if backend == "inductor" else None
    # fullgraph: with graph breaks, compiled code would be slower than eager code
    return th.compile(rewritten(function, device), fullgraph=True, dynamic=False, backend=backend, options=options)


def compile_loop(step: Callable[..., Any], device: th.device, backend: str) -> CompiledLoop:
    """
    Compile a step that is repeated.

    :param step: see :class:`CompiledLoop`
    :param device: device of the tensors
    :param backend: backend of ``torch.compile``
    :return: function that takes several steps
    """

    def compile_graph(graph: th.fx.GraphModule, example_inputs: Sequence[Any], record: Record) -> Any:
        # Imported late, because the import takes seconds
        from torch._dynamo import lookup_backend
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        if backend != "inductor":
            return lookup_backend(backend)(graph, list(example_inputs))

        def compile_direction(graph: th.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
            direction = Direction.of(graph, lambda: compile_fx_inner(graph, example_inputs, **kwargs))
            record(direction, kwargs.get("is_backward", False))
            return direction.function

        with functorch_config.patch(OF_STEPS):
            return compile_fx(graph, example_inputs, compile_direction, inductor_options(device))

    return CompiledLoop(rewritten(step, device), compile_graph)


def like_a_middle(rollout: RolloutState, model: PriorModel) -> RolloutState:
    """
    :param rollout: state of a rollout
    :param model: the model
    :return: the same, where states and network inputs require a gradient, and so does the survival if the model may terminate.
        They do so in the middle of a rollout; without this, its first step would be compiled separately
    """

    def with_gradient(tensor: th.Tensor) -> th.Tensor:
        return tensor if tensor.requires_grad else tensor.detach().requires_grad_()

    rollout = rollout._replace(states=with_gradient(rollout.states), network_inputs=with_gradient(rollout.network_inputs))
    return rollout._replace(alive=with_gradient(rollout.alive)) if model.may_terminate else rollout


def even_rows(tensors: Iterable[th.Tensor], model: PriorModel) -> list[th.Tensor]:
    """
    Pad a batch for an ensemble, which deals the rows to its members in equal parts. If the number of rows is not divisible by
    the number of members, torch's compiler (2.13, on a CPU) does not write the last rows.

    :param tensors: each ``(B, ...)``
    :param model: the model
    :return: the same tensors, contiguous, padded to a divisible number of rows, ``(B', ...)``
    """
    return [(model.even_rows(tensor) if isinstance(model, TrainableModel) else tensor).contiguous() for tensor in tensors]


def act(network_inputs: th.Tensor, actor: th.nn.Module) -> th.Tensor:
    """
    :param network_inputs: normalised observations, ``(B, O)``
    :param actor: the policy
    :return: its actions, in [-1, 1], ``(B, A)``
    """
    return actor(network_inputs)


def step(
    rollout: RolloutState, actor: th.nn.Module, actor_parameters: dict[str, th.Tensor], model: PriorModel, units: Units
) -> tuple[RolloutState, th.Tensor]:
    """
    :return: the rollout after one step of :func:`advance`, and the reward of this step, ``(1, B, 1)``
    """
    rollout, rewards = advance(rollout, 1, actor, actor_parameters, model, units, gamma=1.0)
    # The next step needs contiguous tensors that are not views of each other
    states, actions, network_inputs = rollout.states.contiguous(), rollout.actions.contiguous(), rollout.network_inputs
    network_inputs = states if network_inputs is rollout.states else network_inputs.clone(memory_format=th.contiguous_format)
    # Not `_replace`, which torch 2.8 cannot compile
    return RolloutState(states, network_inputs, actions, rollout.alive, rollout.start), th.stack([rewards])


def held_step(
    held: HeldState, env_actions: th.Tensor, model: PriorModel, low: th.Tensor, high: th.Tensor
) -> tuple[HeldState, th.Tensor]:
    """
    :return: state after one step of :func:`hold`, and whether each row took it, bool ``(1, B, 1)``
    """
    held, is_taken = hold(held, 1, env_actions, model, low, high)
    # The next step needs contiguous tensors
    return HeldState(*(tensor.contiguous() for tensor in held)), is_taken


def planned_step(
    planned: PlannedState, actor: th.nn.Module, actor_parameters: dict[str, th.Tensor], model: PriorModel, units: Units
) -> tuple[PlannedState, th.Tensor]:
    """
    :return: the rollout after one step of its plan, and the reward of this step, ``(1, B, 1)``
    """
    rollout, offsets = with_offsets(planned)
    rollout, rewards = step(rollout, actor, actor_parameters, model, units)
    return PlannedState(*rollout, offsets.contiguous()), rewards


@lru_cache(maxsize=64)
def discounts_of(gamma: float, n_steps: int, device: th.device) -> th.Tensor:
    """
    :param gamma: discount factor
    :param n_steps: number of steps
    :param device: device of the result
    :return: the discounts of these steps, ``(n_steps, 1, 1)``; a cached tensor, which must not be changed
    """
    return th.tensor([gamma**index for index in range(n_steps)], device=device).reshape(-1, 1, 1)


class StepCompiler(Steps):
    """
    Compiles the steps of rollouts, the steps that perturb start states, and the policy. If something cannot be compiled, all
    steps are eager from then on, with one warning. Copies and pickles compile again.

    :param backend: backend of ``torch.compile``
    """

    def __init__(self, backend: str = "inductor"):
        self.backend = backend
        #: Whether something could not be compiled; all steps are eager from then on
        self.has_failed = False
        self._eager = EagerSteps()
        # Compiled at the first call, where failures are handled; one for steps with and one for steps without gradient
        self._steps: dict[bool, CompiledLoop] = {}
        self._hold_loop: CompiledLoop | None = None
        self._plan_loop: CompiledLoop | None = None
        self._act: Callable[..., th.Tensor] | None = None

    def __reduce__(self) -> tuple[type["StepCompiler"], tuple[str]]:
        # Compiled functions cannot be pickled or shared
        return StepCompiler, (self.backend,)

    @property
    def is_compiled(self) -> bool:  # type: ignore[override]
        return not self.has_failed

    def _attempt(
        self, what: str, compiled: Callable[..., Result], eager: Callable[..., Result], args: tuple[Any, ...]
    ) -> Result:
        """
        Run a function compiled, or eagerly after a failure of the compiler.

        :param what: name of the function, for a warning
        :param compiled: compiles and runs the function
        :param eager: runs the function without compilation
        :param args: arguments of both
        :return: the result
        """
        if self.has_failed:
            return eager(*args)
        try:
            with compiling():
                return compiled(*args)
        except Exception as error:
            # Continue training after any failure of the compiler. An error of the model itself is raised again here
            self.has_failed = True
            result = eager(*args)
            warnings.warn(
                f"{what} could not be compiled and run as they are, more slowly ({in_a_line(error)}). `compile=False` avoids "
                "the attempt."
            )
            return result

    def advance(
        self, rollout: RolloutState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[RolloutState, th.Tensor]:
        args = (rollout, n_steps, actor_parameters, context)
        return self._attempt(f"{name_of(context.model)} and the policy", self._advance, self._eager.advance, args)

    def _advance(
        self, rollout: RolloutState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[RolloutState, th.Tensor]:
        model, units = context.model, context.units
        n_rows, has_gradient = len(rollout.states), th.is_grad_enabled()
        if has_gradient not in self._steps:
            self._steps[has_gradient] = compile_loop(step, rollout.states.device, self.backend)
        rollout = RolloutState(*even_rows(rollout, model))
        if has_gradient:
            rollout = like_a_middle(rollout, model)
        loop = self._steps[has_gradient]
        rollout, rewards = loop(rollout, n_steps, context.actor, actor_parameters, model, units)
        total = (discounts_of(context.gamma, n_steps, rewards.device) * rewards).sum(dim=0)
        if len(total) > n_rows:
            rollout, total = RolloutState(*(tensor[:n_rows] for tensor in rollout)), total[:n_rows]
        return rollout, total

    def hold(
        self, held: HeldState, n_steps: int, env_actions: th.Tensor, model: PriorModel, low: th.Tensor, high: th.Tensor
    ) -> tuple[HeldState, th.Tensor]:
        args = (held, n_steps, env_actions, model, low, high)
        return self._attempt(f"{name_of(model)} and the policy", self._hold, self._eager.hold, args)

    def _hold(
        self, held: HeldState, n_steps: int, env_actions: th.Tensor, model: PriorModel, *bounds: th.Tensor
    ) -> tuple[HeldState, th.Tensor]:
        n_rows = len(env_actions)
        if self._hold_loop is None:
            self._hold_loop = compile_loop(held_step, env_actions.device, self.backend)
        states, n_left, env_actions = even_rows((*held, env_actions), model)
        held, is_taken = self._hold_loop(HeldState(states, n_left), n_steps, env_actions, model, *bounds)
        return HeldState(*(tensor[:n_rows] for tensor in held)), is_taken[:, :n_rows]

    def follow(
        self, planned: PlannedState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[PlannedState, th.Tensor]:
        args = (planned, n_steps, actor_parameters, context)
        return self._attempt(f"{name_of(context.model)} and the policy", self._follow, self._eager.follow, args)

    def _follow(
        self, planned: PlannedState, n_steps: int, actor_parameters: dict[str, th.Tensor], context: RolloutContext
    ) -> tuple[PlannedState, th.Tensor]:
        n_rows = len(planned.states)
        if self._plan_loop is None:
            self._plan_loop = compile_loop(planned_step, planned.states.device, self.backend)
        planned = PlannedState(*even_rows(planned, context.model))
        planned, rewards = self._plan_loop(planned, n_steps, context.actor, actor_parameters, context.model, context.units)
        total = (discounts_of(context.gamma, n_steps, rewards.device) * rewards).sum(dim=0)
        return PlannedState(*(tensor[:n_rows] for tensor in planned)), total[:n_rows]

    def policy(self, actor: th.nn.Module, n_rows: int) -> Policy:
        """
        :param actor: the policy
        :param n_rows: number of rows that it is compiled for; other batches run eagerly
        :return: the same policy, for use without gradient and only in one rollout: its parameters must not change
        """
        is_checked = False

        def act_compiled(network_inputs: th.Tensor, actor: th.nn.Module) -> th.Tensor:
            if self._act is None:
                self._act = compile_function(act, network_inputs.device, self.backend)
            return self._act(network_inputs, actor)

        def compiled(network_inputs: th.Tensor) -> th.Tensor:
            nonlocal is_checked
            if len(network_inputs) != n_rows or self.has_failed:
                return actor(network_inputs)
            if is_checked:
                with th.compiler.set_stance(skip_guard_eval_unsafe=True):
                    return self._act(network_inputs, actor)  # type: ignore[misc]
            is_checked = True
            return self._attempt("Policies", act_compiled, act, (network_inputs, actor))

        return compiled


@contextmanager
def compiling() -> Iterator[None]:
    """
    Context for calls that may compile. It suppresses warnings of torch about its own compiler, which users cannot act on. It
    also suspends garbage collection: the compiler creates millions of objects, and searching them takes a twentieth of its
    time.
    """
    collects_garbage = gc.isenabled()
    try:
        gc.disable()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=r".*torch\.jit")
            yield
    finally:
        if collects_garbage:
            gc.enable()
