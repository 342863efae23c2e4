"""Model and policy compiled for rollouts: the same numbers, sooner."""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch as th
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_mpg.common.model_rollout import Advance, HeldStep, RolloutState, advance, held_step
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.trainable import TrainableModel
from sb3_mpg.common.type_aliases import Policy

# At most so many steps are compiled into one graph, and no more than make about so many operations: a hundred of them take a
# second or more to compile
MAX_CHUNK = 5
MAX_OPERATIONS = 1000
# Of what is known to be cheap. Not `aggressive_recomputation`, which also draws random numbers a second time
RECOMPUTE_WHAT_IS_CHEAP: dict[str, Any] = {
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
}


class BiasBehindProduct(TorchFunctionMode):
    """
    Linear layers as a product and, apart from it, the bias. The products of the CPU's libraries begin with a copy of the bias
    to each row; a compiler adds it for nothing where it computes the activation.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As in ``TorchFunctionMode``."""
        bias, product = None, None
        if func is F.linear and not kwargs and len(args) == 3:
            bias, product = args[2], args[0] @ args[1].t()
        elif func is th.baddbmm and not kwargs:
            bias, product = args[0], th.bmm(args[1], args[2])
        if bias is None or product is None:
            return func(*args, **(kwargs or {}))
        # Not a sum, which the compiler would put together with the product again
        return product - (-bias)


class PartsOneByOne(TorchFunctionMode):
    """
    Tensors that are taken apart, part by part. The backward pass of what is compiled may take a part once more from the whole;
    of what came out of one ``unbind`` or ``split`` into given sizes it is handed over each part, and all that follows from it.
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
    :param error: of the compiler, which can be of many lines
    :return: its beginning, for a warning
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def compile_function(function: Callable[..., Any], device: th.device, backend: str) -> Callable[..., Any]:
    """
    A call is checked by ``torch.compile``'s guards against everything that the graph depends on, the attributes of
    the user's model included. Random numbers are drawn as without compilation.

    :param function: a function of tensors, modules and numbers
    :param device: where it runs
    :param backend: of ``torch.compile``
    :return: the function, to be compiled by its first call
    """
    on_cpu = device.type == "cpu"
    options: dict[str, Any] | None = None
    if backend == "inductor":
        # One C++ file for each direction: with one for each kernel, the compiler spends most of its time on the headers,
        # and the kernels are called from Python. Not on a GPU, where the kernels are not C++
        # The guards have checked the sizes already; and to build and load a library for each set of vector instructions,
        # only to see that the C++ compiler knows those of this processor, takes as long as all the rest. To compile the
        # headers beforehand takes longer than it saves in two or three files
        options = {"fallback_random": True, "size_asserts": False, "cpp.vec_isa_ok": True, "cpp_wrapper": on_cpu}
        # Not in old versions of torch
        if hasattr(inductor_config, "cpp_cache_precompile_headers"):
            options["cpp_cache_precompile_headers"] = False

    def rewritten(*args: Any) -> Any:
        with PartsOneByOne(), BiasBehindProduct() if on_cpu else nullcontext():
            return function(*args)

    # A code object of its own: torch counts recompilations for each, and gives up after a few. Several algorithms in
    # one process, as in a search for hyperparameters, must not use up each other's.
    code = rewritten.__code__.replace()
    own = FunctionType(code, rewritten.__globals__, rewritten.__name__, None, rewritten.__closure__)
    # fullgraph: a model that breaks the graph would run slower than without compilation
    return th.compile(own, fullgraph=True, dynamic=False, backend=backend, options=options)


class OperationCounter(TorchDispatchMode):
    """Counts the operations of torch that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.n_operations = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As in ``TorchDispatchMode``."""
        self.n_operations += 1
        return func(*args, **(kwargs or {}))


@th.no_grad()
def operations_of_step(rollout: RolloutState, *args: Any) -> int:
    """
    :param rollout: where a rollout stands
    :param args: the other arguments of :func:`advance`, without the number of steps
    :return: of how many operations of torch a step consists; no random numbers are used up
    """
    device = rollout.states.device
    with th.random.fork_rng([device] if device.type == "cuda" else []), OperationCounter() as counter:
        advance(rollout, 1, *args)
    return counter.n_operations


def like_a_middle(rollout: RolloutState) -> RolloutState:
    """
    :param rollout: where a rollout stands
    :return: the same, with a gradient in all that has one in the middle of a rollout: steps from a start without would be
        compiled a second time
    """
    states, network_inputs = (tensor if tensor.requires_grad else tensor.detach().requires_grad_() for tensor in rollout[:2])
    return rollout._replace(states=states, network_inputs=network_inputs)


def even_rows(tensors: Iterable[th.Tensor], model: PriorModel) -> list[th.Tensor]:
    """
    An ensemble deals out the rows of a batch in equal parts. When they do not come out even, torch's compiler (2.13, on a CPU)
    takes a loop over the batch for one over the whole parts in it, and leaves the rest unwritten.

    :param tensors: each ``(B, ...)``
    :param model: the model
    :return: the same, if need be with more rows, so that they come out even
    """
    return [model.even_rows(tensor) if isinstance(model, TrainableModel) else tensor for tensor in tensors]


def act(network_inputs: th.Tensor, actor: th.nn.Module) -> th.Tensor:
    """
    :param network_inputs: normalised observations, ``(B, *obs_shape)``
    :param actor: the policy
    :return: its actions, in [-1, 1], ``(B, A)``
    """
    return actor(network_inputs)


class StepCompiler:
    """
    Compiles :func:`advance`, a few steps at a time: with one step for each call, the calls cost a tenth of the gradient,
    and each further step in the graph takes seconds to compile, or minutes, if a model makes many small steps in one. Steps
    that are left over run as they are: a graph of their own would be compiled for them. :meth:`held_step` is compiled, too.

    :param chunk: how many steps are compiled into one graph; ``None`` for as many as make a graph of up to
        ``MAX_OPERATIONS``, but not more than ``MAX_CHUNK``
    :param backend: of ``torch.compile``
    """

    def __init__(self, chunk: int | None = None, backend: str = "inductor"):
        self.chunk = chunk
        self.backend = backend
        # Compiled at the first call, because that is where failures are dealt with
        self._advance: Advance | None = None
        self._held_step: HeldStep | None = None
        self._act: Callable[..., th.Tensor] | None = None

    def __call__(self, rollout: RolloutState, n_steps: int, *args: Any) -> tuple[RolloutState, th.Tensor]:
        """As :func:`advance`."""
        _, _, model, _, gamma = args
        if self._advance is None:
            self._advance = compile_function(advance, rollout.states.device, self.backend)
        if self.chunk is None:
            self.chunk = max(1, min(MAX_CHUNK, MAX_OPERATIONS // operations_of_step(rollout, *args)))
        n_rows = len(rollout.states)
        rollout = RolloutState(*even_rows(rollout, model))
        chunk = min(self.chunk, n_steps)
        n_chunks, n_left = divmod(n_steps, chunk)
        rollout, rewards = self._advance(like_a_middle(rollout), chunk, *args)
        parts = [rewards]
        # What the guards checked for the first of these calls holds for the others
        with th.compiler.set_stance(skip_guard_eval_unsafe=True):
            for _ in range(1, n_chunks):
                rollout, rewards = self._advance(like_a_middle(rollout), chunk, *args)
                parts.append(rewards)
        if n_left > 0:
            rollout, rewards = advance(rollout, n_left, *args)
            parts.append(rewards)
        # All at once: between two graphs, an operation on some numbers takes as long as one on a layer
        discounts = th.tensor([gamma ** (chunk * index) for index in range(len(parts))], device=rewards.device)
        total = (discounts * th.cat(parts, dim=1)).sum(dim=1, keepdim=True)
        if len(total) > n_rows:
            rollout, total = RolloutState(*(tensor[:n_rows] for tensor in rollout)), total[:n_rows]
        return rollout, total

    def held_step(
        self, states: th.Tensor, env_actions: th.Tensor, n_left: th.Tensor, model: PriorModel, *args: Any
    ) -> tuple[th.Tensor, th.Tensor]:
        """As :func:`~sb3_mpg.common.model_rollout.held_step`."""
        if self._held_step is None:
            self._held_step = compile_function(held_step, states.device, self.backend)
        next_states, n_left = self._held_step(*even_rows((states, env_actions, n_left), model), model, *args)
        return next_states[: len(states)], n_left[: len(states)]

    def policy(self, actor: th.nn.Module, n_rows: int) -> Policy:
        """
        :param actor: the policy
        :param n_rows: for which number of rows it is compiled; it acts as it is for others
        :return: the same, for one rollout: as long as nothing of it changes but its inputs. What cannot be compiled acts as it
            is, with a warning
        """
        is_checked = False

        def compiled(network_inputs: th.Tensor) -> th.Tensor:
            nonlocal is_checked
            if len(network_inputs) != n_rows:
                return actor(network_inputs)
            if is_checked:
                with th.compiler.set_stance(skip_guard_eval_unsafe=True):
                    return self._act(network_inputs, actor)  # type: ignore[misc]
            try:
                with compiling():
                    if self._act is None:
                        self._act = compile_function(act, network_inputs.device, self.backend)
                    actions = self._act(network_inputs, actor)
            except Exception as error:
                warnings.warn(f"The policy could not be compiled and acts as it is ({in_a_line(error)}).")
                self._act, actions = act, actor(network_inputs)
            is_checked = True
            return actions

        return compiled


@contextmanager
def compiling() -> Iterator[None]:
    """
    What compiled steps are run and differentiated in. Keeps torch's remarks about its own compiler from the user, who can do
    nothing about them; buffers that the backward pass would overwrite are kept, because each horizon passes back through
    the steps that it shares with longer ones; and the backward pass computes the small quantities of the model once more:
    to hand over hundreds of small tensors takes longer. No garbage is collected meanwhile: the compiler makes millions of
    objects, and to look for garbage among them takes a twentieth of its time.
    """
    collects_garbage = gc.isenabled()
    try:
        gc.disable()
        with warnings.catch_warnings(), functorch_config.patch(donated_buffer=False, **RECOMPUTE_WHAT_IS_CHEAP):
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=r".*torch\.jit")
            yield
    finally:
        if collects_garbage:
            gc.enable()
