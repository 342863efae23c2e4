"""
Repeats one compiled step without the per-call overhead of ``torch.compile``.

Terms: a *graph* is what torch traces of a step. A *plain function* is its compiled forward or backward pass, called without
autograd. A *carried* tensor is an output of a step that is an input of the next one.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple, TypeVar

import torch as th
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

Carried = TypeVar("Carried", bound=tuple[th.Tensor, ...])
#: A plain function: list of inputs, which it may empty -> outputs
ListFunction = Callable[[list[Any]], Sequence[Any]]
#: Callback for each compiled direction: (direction, whether it is the backward pass) -> None
Record = Callable[["Direction", bool], None]
#: (graph, example inputs, callback for each direction) -> differentiable function of the inputs
CompileGraph = Callable[[th.fx.GraphModule, Sequence[Any], Record], Callable[..., Sequence[Any]]]


@dataclass
class Direction:
    """
    The compiled forward or backward pass of a graph.

    :param function: the plain function
    :param inputs: names of the inputs
    :param outputs: names of the outputs, ``None`` for an output that has no name
    """

    function: ListFunction
    inputs: list[str]
    outputs: list[str | None]

    @classmethod
    def of(cls, graph: th.fx.GraphModule, compile_direction: Callable[[], ListFunction]) -> "Direction":
        """
        :param graph: graph of the direction
        :param compile_direction: compiles the graph, which may change it
        :return: the direction
        """
        inputs = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        outputs = [getattr(node, "name", None) for node in output.args[0]]
        return cls(compile_direction(), inputs, outputs)


def places_of(tensor: th.Tensor, tensors: Sequence[Any]) -> list[int]:
    """
    :param tensor: a tensor
    :param tensors: several tensors
    :return: indices at which they are the same object
    """
    return [place for place, other in enumerate(tensors) if other is tensor]


def is_same(one: Any, other: Any) -> bool:
    """
    :param one: a tensor or another object
    :param other: a tensor or another object
    :return: whether they are the same object, or tensors that are equal up to rounding errors
    """
    if one is other or not (isinstance(one, th.Tensor) and isinstance(other, th.Tensor)):
        return one is other
    if not one.is_floating_point():
        return th.equal(one, other)
    size = other.abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    return th.allclose(one, other, rtol=1e-4, atol=1e-5 * size, equal_nan=True)


def copy_of(tensor: th.Tensor) -> th.Tensor:
    """
    :param tensor: a tensor
    :return: a detached copy with the same strides, which the compiled functions require
    """
    if tensor.numel() == 0:
        return tensor.detach().clone()
    n_spanned = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    spanned = tensor.detach().as_strided((n_spanned,), (1,))
    return spanned.clone().as_strided(tensor.shape, tensor.stride())


def require(condition: bool, reason: str) -> None:
    """
    :param condition: condition of repeating a step
    :param reason: why the step cannot be repeated without it
    :raises ValueError: when the condition is false
    """
    if not condition:
        raise ValueError(reason)


class Trial(NamedTuple):
    """
    A step with the differentiable function, and its backward pass.

    :param inputs: detached inputs of the step
    :param outputs: outputs of the step
    :param gradients: gradients of the outputs, ``None`` for outputs without one
    :param input_gradients: resulting gradients of the inputs that require one
    """

    inputs: Sequence[Any]
    outputs: Sequence[th.Tensor]
    gradients: Sequence[th.Tensor | None]
    input_gradients: Sequence[th.Tensor | None]


class StepGraph:
    """
    The compiled graph of a step.

    The compiler returns a differentiable function, which contains two plain functions, one for each direction. A repeated step
    calls the plain functions. Their calling convention is not documented: it is derived from the names of their inputs, and
    their results are compared with those of the differentiable function. If anything differs, the differentiable function is
    used for each step.

    :param graph: the graph
    :param example_inputs: tensors like its inputs
    :param compile_graph: the compiler
    """

    def __init__(self, graph: th.fx.GraphModule, example_inputs: Sequence[Any], compile_graph: CompileGraph):
        # The compiled directions: False for forward, True for backward
        self._directions: dict[bool, Direction] = {}
        #: The differentiable function
        self.step = compile_graph(graph, example_inputs, self._record)
        #: Whether both passes of the differentiable function have run once
        self.was_tried = False
        #: Whether the plain functions can repeat the step; ``None`` before this is known
        self.loops: bool | None = None
        #: (index of an input, index of the output that replaces it in the next step)
        self.carried: list[tuple[int, int]] = []
        #: Index of the output that is collected from all steps
        self.collected = 0
        #: Indices of the outputs that are returned from the last step only
        self.last: list[int] = []
        #: Whether each output has a gradient
        self.has_gradient: list[bool] = []
        # For each input of the backward pass: whether it is an activation (or a gradient), and its index among these
        self._backward_inputs: list[tuple[bool, int]] = []

    def _record(self, direction: Direction, is_backward: bool) -> None:
        self._directions[is_backward] = direction

    @property
    def n_outputs(self) -> int:
        """Number of outputs of a step."""
        return len(self.last) + 1

    def forward(self, inputs: Sequence[Any]) -> tuple[Sequence[th.Tensor], Sequence[Any]]:
        """
        :param inputs: inputs of a step
        :return: its outputs, and the activations that its backward pass needs
        """
        results = self._directions[False].function(list(inputs))
        return results[: self.n_outputs], results[self.n_outputs :]

    def backward(self, kept: Sequence[Any], gradients: Sequence[th.Tensor | None]) -> Sequence[th.Tensor | None]:
        """
        :param kept: activations that :meth:`forward` returned
        :param gradients: gradients of the outputs, contiguous
        :return: gradients of the inputs
        """
        sources = gradients, kept
        return self._directions[True].function([sources[is_kept][place] for is_kept, place in self._backward_inputs])

    def try_step(self, inputs: Sequence[Any]) -> Trial:
        """
        Take a step with the differentiable function, and its backward pass, without side effects.

        :param inputs: inputs of a step
        :return: the trial
        :raises RuntimeError: when the step changes its inputs in place
        """
        # Detach the inputs, so that each has a gradient of its own
        leaves = [copy_of(x).requires_grad_(x.requires_grad) if isinstance(x, th.Tensor) else x for x in inputs]
        versions = [x._version for x in leaves if isinstance(x, th.Tensor)]
        with self._same_randomness(inputs):
            outputs = self.step(*leaves)
        if versions != [x._version for x in leaves if isinstance(x, th.Tensor)]:
            raise RuntimeError("a step changes tensors of the model or the policy in place, as batch normalisation does")
        differentiable = [output for output in outputs if output.requires_grad]
        # Arbitrary gradients
        gradients = [th.cos(output.detach()).contiguous() if output.requires_grad else None for output in outputs]
        input_gradients: Sequence[th.Tensor | None] = []
        if differentiable:
            # The first call compiles the backward pass. It is compiled for a retained graph if the first call retains it
            input_gradients = th.autograd.grad(
                differentiable,
                [leaf for leaf in leaves if isinstance(leaf, th.Tensor) and leaf.requires_grad],
                [gradient for gradient in gradients if gradient is not None],
                retain_graph=True,
                allow_unused=True,
            )
        self.was_tried = True
        return Trial(leaves, outputs, gradients, input_gradients)

    @staticmethod
    @contextmanager
    def _same_randomness(inputs: Sequence[Any]) -> Iterator[None]:
        devices = {x.device for x in inputs if isinstance(x, th.Tensor) and x.device.type == "cuda"}
        with th.random.fork_rng(devices):
            th.default_generator.manual_seed(0)
            for device in devices:
                with th.cuda.device(device):
                    th.cuda.manual_seed(0)
            yield

    def analyse(
        self,
        earlier_inputs: Sequence[Any],
        inputs: Sequence[Any],
        outputs: Sequence[th.Tensor],
        before: Carried,
        after: Carried,
        collected: th.Tensor,
    ) -> None:
        """
        Find out whether the plain functions can repeat the step, and how outputs map to inputs of the next step.

        :param earlier_inputs: inputs of the previous step
        :param inputs: inputs of a step
        :param outputs: outputs of that step
        :param before: tensors that the step took from the previous one
        :param after: tensors that the next step takes from it
        :param collected: output that is collected from all steps
        """
        self.loops = False
        trial = self.try_step(inputs)
        try:
            self._find_places(inputs, outputs, before, after, collected)
            self._check_shared_inputs(inputs, earlier_inputs)
            require(self._agrees(trial), "the plain functions give other results")
            self.loops = True
        except Exception as error:
            # Other versions of torch may fail here in any way. The differentiable function still works
            logger.debug("Compiled steps are taken one by one: %s: %s", type(error).__name__, error)

    def _check_shared_inputs(self, inputs: Sequence[Any], earlier_inputs: Sequence[Any]) -> None:
        """
        Inputs that are not carried must not change, unlike random numbers of Python or tensors that a model replaces.
        """
        carried = {place for place, _ in self.carried}
        for place, (one, other) in enumerate(zip(inputs, earlier_inputs, strict=True)):
            require(isinstance(one, th.Tensor) and isinstance(other, th.Tensor), "an input is no tensor")
            # NumPy arrays become new tensors at each step, which share their memory
            is_shared = one is other or (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride())
            require(place in carried or is_shared, "something else changes with each step")

    def _agrees(self, trial: Trial) -> bool:
        """
        :return: whether the plain functions give the results of the trial
        """
        self.has_gradient = [gradient is not None for gradient in trial.gradients]
        with self._same_randomness(trial.inputs), th.no_grad():
            outputs, kept = self.forward(trial.inputs)
            pairs: list[tuple[Any, Any]] = [*zip(outputs, trial.outputs, strict=True)]
            if any(self.has_gradient):
                self._find_backward_inputs(trial)
                input_gradients = self.backward(kept, trial.gradients)
                wanted = [isinstance(leaf, th.Tensor) and leaf.requires_grad for leaf in trial.inputs]
                pairs += zip(compress(input_gradients, wanted), trial.input_gradients, strict=True)
        return all(is_same(*pair) for pair in pairs)

    def _find_places(
        self, inputs: Sequence[Any], outputs: Sequence[th.Tensor], before: Carried, after: Carried, collected: th.Tensor
    ) -> None:
        (self.collected,) = places_of(collected, outputs)
        self.last = [place for place in range(len(outputs)) if place != self.collected]
        require(all(places_of(outputs[place], after) for place in self.last), "a step stores something")
        for old, new in zip(before, after, strict=True):
            # A tensor that the step does not use is not an input, and one that it does not change is not an output
            for place in places_of(old, inputs) if new is not old else []:
                # A tensor may be several outputs: use the first
                source = places_of(new, outputs)[0]
                is_alike = (new.shape, new.dtype, new.stride()) == (old.shape, old.dtype, old.stride())
                require(is_alike, "a carried tensor changes its shape, type or strides")
                # States and observations may be the same tensor
                if (place, source) not in self.carried:
                    self.carried.append((place, source))

    def _find_backward_inputs(self, trial: Trial) -> None:
        differentiable = [place for place, has_gradient in enumerate(self.has_gradient) if has_gradient]
        require(all(trial.outputs[place].is_contiguous() for place in differentiable), "an output is not contiguous")
        kept_names = self._directions[False].outputs[self.n_outputs :]
        places = iter(differentiable)
        for name in self._directions[True].inputs:
            is_kept = not name.startswith("tangents_")
            self._backward_inputs.append((is_kept, kept_names.index(name) if is_kept else next(places)))
        require(next(places, None) is None, "there are gradients that the backward pass does not ask for")


class Loop(th.autograd.Function):
    """Differentiable repetition of the step of a :class:`StepGraph` that ``loops``."""

    @staticmethod
    def forward(ctx: Any, graph: StepGraph, n_steps: int, *inputs: Any) -> tuple[th.Tensor, ...]:
        """
        :param graph: graph of the step
        :param n_steps: number of steps
        :param inputs: inputs of the first step
        :return: outputs of the last step (``graph.last``), and the concatenated ``graph.collected`` of all steps
        """
        now = list(inputs)
        ctx.graph, ctx.kept = graph, []
        collected = []
        for _ in range(n_steps):
            outputs, kept = graph.forward(now)
            ctx.kept.append(kept)
            collected.append(outputs[graph.collected])
            for place, source in graph.carried:
                now[place] = outputs[source]
        # Return aliases: outputs are also in `ctx.kept`, and with a `grad_fn` they would refer to themselves
        results = {place: outputs[place].detach() for place in graph.last} | {graph.collected: th.cat(collected)}
        ctx.mark_non_differentiable(*(result for place, result in results.items() if not graph.has_gradient[place]))
        return tuple(results.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: th.Tensor | None) -> tuple[th.Tensor | None, ...]:
        """
        :param gradients: gradients of the results of :meth:`forward`
        :return: gradients of its arguments
        """
        graph: StepGraph = ctx.graph
        # The backward pass is compiled for contiguous gradients
        *last_gradients, collected_gradient = (None if gradient is None else gradient.contiguous() for gradient in gradients)
        output_gradients: list[th.Tensor | None] = [*last_gradients]
        output_gradients.insert(graph.collected, None)
        # In all steps but the last, only the carried outputs have a gradient: that of the next step's inputs
        zeros = [None if gradient is None else th.zeros_like(gradient) for gradient in output_gradients]
        # Inputs that are not carried are shared by all steps: sum their gradients
        carried, needed = {place for place, _ in graph.carried}, ctx.needs_input_grad[2:]
        totals: dict[int, th.Tensor] = {}
        for step in reversed(range(len(ctx.kept))):
            output_gradients[graph.collected] = None if collected_gradient is None else collected_gradient[step : step + 1]
            input_gradients = graph.backward(ctx.kept[step], output_gradients)
            for place, gradient in enumerate(input_gradients):
                if gradient is not None and needed[place] and place not in carried:
                    totals[place] = totals[place] + gradient if place in totals else gradient
            output_gradients = list(zeros)
            for place, source in graph.carried:
                gradient, so_far = input_gradients[place], output_gradients[source]
                if gradient is not None:
                    is_sum = so_far is not None and so_far is not zeros[source]
                    output_gradients[source] = so_far + gradient if is_sum else gradient.contiguous()  # type: ignore[operator]
        return None, None, *(input_gradients[place] if place in carried else totals.get(place) for place in range(len(needed)))


class CompiledLoop:
    """
    A compiled step that is repeated.

    The overhead of a call of a compiled function (guards, autograd's bookkeeping) is a fifth of a millisecond: for the 25
    steps of a gradient, an eighth of its time. A graph of several steps would avoid the overhead, but its compile time is
    proportional to their number. Here the overhead occurs once for all steps.

    :param step: ``(carried, *args) -> (carried, output)``, with a named tuple of tensors that each step takes from the
        previous one, and an output ``(1, ...)`` that is collected; both are new tensors
    :param compile_graph: the compiler
    """

    def __init__(self, step: Callable[..., tuple[Any, th.Tensor]], compile_graph: CompileGraph):
        #: All graphs so far
        self.graphs: list[StepGraph] = []
        # Arguments and results of `_run`, which torch calls: steps to take, whether activations are kept, steps taken, and
        # (graph, inputs, outputs) of a step whose graph was not analysed yet
        self._n_steps = 0
        self._is_backward_needed = True
        self._n_taken = 0
        self._new: tuple[StepGraph, Sequence[Any], Sequence[Any]] | None = None
        # A weak reference, because torch keeps the backend and its results in memory
        this = weakref.ref(self)

        def backend(graph: th.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
            step_graph = StepGraph(graph, example_inputs, compile_graph)
            owner = this()
            assert owner is not None
            owner.graphs.append(step_graph)

            def call(*inputs: Any) -> Sequence[Any]:
                loop = this()
                assert loop is not None
                return loop._run(step_graph, inputs)

            return call

        # fullgraph: with graph breaks, compiled code would be slower than eager code
        self._step = th.compile(step, fullgraph=True, dynamic=False, backend=backend)

    def _run(self, graph: StepGraph, inputs: Sequence[Any]) -> Sequence[Any]:
        """
        :param graph: the graph
        :param inputs: inputs of the first step
        :return: outputs of the last step, if the step can be repeated; otherwise outputs of the first step
        """
        if graph.loops:
            self._n_taken = self._n_steps
            if not self._is_backward_needed:
                return self._run_forward(graph, inputs)
            *last, collected = Loop.apply(graph, self._n_steps, *inputs)
            last.insert(graph.collected, collected)
            return last
        if not graph.was_tried:
            graph.try_step(inputs)
        outputs = tuple(graph.step(*inputs))
        self._n_taken = 1
        if graph.loops is None:
            self._new = graph, inputs, outputs
        return outputs

    @th.no_grad()
    def _run_forward(self, graph: StepGraph, inputs: Sequence[Any]) -> Sequence[Any]:
        """
        Repeat a step that needs no backward pass. The parameters and the result are those of :meth:`_run`.
        """
        now, collected = list(inputs), []
        results: list[Any] = []
        for _ in range(self._n_steps):
            outputs, _ = graph.forward(now)
            results = list(outputs)
            collected.append(results[graph.collected])
            for place, source in graph.carried:
                now[place] = results[source]
        results[graph.collected] = th.cat(collected)
        return results

    def __call__(
        self, carried: Carried, n_steps: int, *args: Any, is_backward_needed: bool = True
    ) -> tuple[Carried, th.Tensor]:
        """
        :param carried: tensors that the first step starts from
        :param n_steps: number of steps, at least 1
        :param args: other arguments of all steps
        :param is_backward_needed: whether the results are differentiated; activations are kept for it
        :return: tensors that the next step would start from, and the outputs of the steps, ``(n_steps, ...)``
        """
        parts: list[th.Tensor] = []
        earlier: tuple[StepGraph, Sequence[Any]] | None = None
        while n_steps > 0:
            self._n_steps, self._is_backward_needed, self._new = n_steps, is_backward_needed, None
            # Skip the guards after they have passed in the middle of a rollout: they hold for the other steps too
            is_checked = len(parts) > 1
            with th.compiler.set_stance(skip_guard_eval_unsafe=True) if is_checked else nullcontext():
                after, output = self._step(carried, *args)
            parts.append(output)
            if self._new is not None:
                graph, inputs, outputs = self._new
                if earlier is not None and earlier[0] is graph:
                    graph.analyse(earlier[1], inputs, outputs, carried, after, output)
                earlier = graph, inputs
            carried = after
            n_steps -= self._n_taken
        # Free the memory of the last step
        self._new = None
        return carried, parts[0] if len(parts) == 1 else th.cat(parts)
