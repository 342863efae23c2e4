"""How functions are given to torch's compiler."""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch as th
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sb3_mpg.common.compilation.compiled_loop import CompiledLoop, Direction, Record

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
