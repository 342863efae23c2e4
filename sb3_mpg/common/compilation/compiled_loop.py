"""One compiled step, taken many times in a row without what torch does around each call of what it compiled."""

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
#: Takes a list of inputs, which it may empty, and gives outputs
ListFunction = Callable[[list[Any]], Sequence[Any]]
#: (what became of a direction, whether it is the backward pass) -> nothing
Record = Callable[["Direction", bool], None]
#: (graph, tensors like its inputs, who is told of each direction) -> a function of the inputs that autograd knows
CompileGraph = Callable[[th.fx.GraphModule, Sequence[Any], Record], Callable[..., Sequence[Any]]]


@dataclass
class Direction:
    """
    What became of a graph for one direction.

    :param function: from inputs to outputs
    :param inputs: names of the inputs
    :param outputs: names of the outputs, ``None`` for what is none
    """

    function: ListFunction
    inputs: list[str]
    outputs: list[str | None]

    @classmethod
    def of(cls, graph: th.fx.GraphModule, compile_direction: Callable[[], ListFunction]) -> "Direction":
        """
        :param graph: of the direction
        :param compile_direction: compiles it, which may change it
        :return: the direction
        """
        inputs = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        outputs = [getattr(node, "name", None) for node in output.args[0]]
        return cls(compile_direction(), inputs, outputs)


def places_of(tensor: th.Tensor, tensors: Sequence[Any]) -> list[int]:
    """
    :param tensor: a tensor
    :param tensors: several
    :return: where the very same one is among them
    """
    return [place for place, other in enumerate(tensors) if other is tensor]


def is_same(one: Any, other: Any) -> bool:
    """
    :param one: a tensor, or anything
    :param other: the same
    :return: whether they are the same, tensors but for rounding errors
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
    :return: the same without a past, in memory of its own and with gaps where it has some, as what is compiled for it expects
    """
    if tensor.numel() == 0:
        return tensor.detach().clone()
    n_spanned = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    spanned = tensor.detach().as_strided((n_spanned,), (1,))
    return spanned.clone().as_strided(tensor.shape, tensor.stride())


def require(condition: bool, reason: str) -> None:
    """
    :param condition: what steps in a row need
    :param reason: why they are not possible without
    :raises ValueError: when it does not hold
    """
    if not condition:
        raise ValueError(reason)


class Trial(NamedTuple):
    """
    A step that the compiler's function took.

    :param inputs: of the step, without a past
    :param outputs: of the same
    :param gradients: of the outputs, ``None`` where there is none
    :param of_inputs: gradients that followed, of the inputs that have one
    """

    inputs: Sequence[Any]
    outputs: Sequence[th.Tensor]
    gradients: Sequence[th.Tensor | None]
    of_inputs: Sequence[th.Tensor | None]


class StepGraph:
    """
    The graph of a step, compiled.

    The compiler gives a function that autograd knows. Within it are two plain functions, one for each direction: what steps in
    a row are made of. How these are called torch says nowhere. It is read off their names, and they are compared with the
    function that was given: if anything is not as expected, steps are taken by that one.

    :param graph: the graph
    :param example_inputs: tensors like its inputs
    :param compile_graph: the compiler
    """

    def __init__(self, graph: th.fx.GraphModule, example_inputs: Sequence[Any], compile_graph: CompileGraph):
        # By whether it is the backward pass
        self._directions: dict[bool, Direction] = {}
        self.step = compile_graph(graph, example_inputs, self._record)
        self.was_tried = False
        #: Whether steps can be taken in a row; ``None`` before that was looked into
        self.loops: bool | None = None
        #: (place of an input, place of the output that takes it in the next step)
        self.carried: list[tuple[int, int]] = []
        #: Place of the output that is collected from all steps, and of those that count behind the last one
        self.collected = 0
        self.last: list[int] = []
        #: Of each output, whether it has a gradient
        self.has_gradient: list[bool] = []
        # Where the inputs of the backward function are: (whether among what was kept, place there or among the gradients)
        self._backward_inputs: list[tuple[bool, int]] = []

    def _record(self, direction: Direction, is_backward: bool) -> None:
        self._directions[is_backward] = direction

    @property
    def n_outputs(self) -> int:
        """Number of outputs of a step."""
        return len(self.last) + 1

    def forward(self, inputs: Sequence[Any]) -> tuple[Sequence[th.Tensor], Sequence[Any]]:
        """
        :param inputs: of a step
        :return: its outputs, and what its backward pass needs
        """
        results = self._directions[False].function(list(inputs))
        return results[: self.n_outputs], results[self.n_outputs :]

    def backward(self, kept: Sequence[Any], gradients: Sequence[th.Tensor | None]) -> Sequence[th.Tensor | None]:
        """
        :param kept: of the forward pass
        :param gradients: of the outputs, contiguous
        :return: gradients of the inputs
        """
        sources = gradients, kept
        return self._directions[True].function([sources[is_kept][place] for is_kept, place in self._backward_inputs])

    def try_out(self, inputs: Sequence[Any]) -> Trial:
        """
        A step and its backward pass, for nothing but to see what comes of it: nothing is changed.

        :param inputs: of a step
        :return: the trial
        :raises RuntimeError: when the step changes its inputs in place
        """
        # Inputs that follow from one another count for themselves here
        leaves = [copy_of(x).requires_grad_(x.requires_grad) if isinstance(x, th.Tensor) else x for x in inputs]
        versions = [x._version for x in leaves if isinstance(x, th.Tensor)]
        with self._same_randomness(inputs):
            outputs = self.step(*leaves)
        if versions != [x._version for x in leaves if isinstance(x, th.Tensor)]:
            raise RuntimeError("a step changes tensors of the model or the policy in place, as batch normalisation does")
        differentiable = [output for output in outputs if output.requires_grad]
        # Any will do
        gradients = [th.cos(output.detach()).contiguous() if output.requires_grad else None for output in outputs]
        of_inputs: Sequence[th.Tensor | None] = []
        if differentiable:
            # The backward pass is compiled when it is first asked for; and to be asked again for, if it was so at first
            of_inputs = th.autograd.grad(
                differentiable,
                [leaf for leaf in leaves if isinstance(leaf, th.Tensor) and leaf.requires_grad],
                [gradient for gradient in gradients if gradient is not None],
                retain_graph=True,
                allow_unused=True,
            )
        self.was_tried = True
        return Trial(leaves, outputs, gradients, of_inputs)

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

    def look_into(
        self,
        earlier_inputs: Sequence[Any],
        inputs: Sequence[Any],
        outputs: Sequence[th.Tensor],
        before: Carried,
        after: Carried,
        collected: th.Tensor,
    ) -> None:
        """
        Find out whether and how steps can be taken in a row.

        :param earlier_inputs: of the step before
        :param inputs: of a step that was taken
        :param outputs: of the same
        :param before: what the step began with
        :param after: what the next one begins with
        :param collected: what is collected from all steps
        """
        self.loops = False
        trial = self.try_out(inputs)
        try:
            self._find_places(inputs, outputs, before, after, collected)
            self._check_the_rest(inputs, earlier_inputs)
            require(self._agrees(trial), "the plain functions do something else")
            self.loops = True
        except Exception as error:
            # Whatever torch makes of it in other versions, there is another way
            logger.debug("Compiled steps are taken one by one: %s: %s", type(error).__name__, error)

    def _check_the_rest(self, inputs: Sequence[Any], earlier_inputs: Sequence[Any]) -> None:
        """
        What is not carried on must stay the same; unlike numbers that Python draws for each step, and what a model replaces.
        """
        carried = {place for place, _ in self.carried}
        for place, (one, other) in enumerate(zip(inputs, earlier_inputs, strict=True)):
            require(isinstance(one, th.Tensor) and isinstance(other, th.Tensor), "an input is no tensor")
            # Arrays of NumPy come as new tensors each time
            is_shared = one is other or (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride())
            require(place in carried or is_shared, "something else changes with each step")

    def _agrees(self, trial: Trial) -> bool:
        """
        :return: whether the plain functions do what the compiler's function did
        """
        self.has_gradient = [gradient is not None for gradient in trial.gradients]
        with self._same_randomness(trial.inputs), th.no_grad():
            outputs, kept = self.forward(trial.inputs)
            pairs: list[tuple[Any, Any]] = [*zip(outputs, trial.outputs, strict=True)]
            if any(self.has_gradient):
                self._find_backward_inputs(trial)
                of_inputs = self.backward(kept, trial.gradients)
                wanted = [isinstance(leaf, th.Tensor) and leaf.requires_grad for leaf in trial.inputs]
                pairs += zip(compress(of_inputs, wanted), trial.of_inputs, strict=True)
        return all(is_same(*pair) for pair in pairs)

    def _find_places(
        self, inputs: Sequence[Any], outputs: Sequence[th.Tensor], before: Carried, after: Carried, collected: th.Tensor
    ) -> None:
        (self.collected,) = places_of(collected, outputs)
        self.last = [place for place in range(len(outputs)) if place != self.collected]
        require(all(places_of(outputs[place], after) for place in self.last), "a step stores something")
        for old, new in zip(before, after, strict=True):
            # What a step does not look at is no input, and what it leaves alone no output
            for place in places_of(old, inputs) if new is not old else []:
                # Outputs that are the same count in each of their places; one of them is enough
                source = places_of(new, outputs)[0]
                is_alike = (new.shape, new.dtype, new.stride()) == (old.shape, old.dtype, old.stride())
                require(is_alike, "it is compiled for other tensors than it gives")
                # Where observations are the states, both are the same tensor
                if (place, source) not in self.carried:
                    self.carried.append((place, source))

    def _find_backward_inputs(self, trial: Trial) -> None:
        differentiable = [place for place, has_gradient in enumerate(self.has_gradient) if has_gradient]
        require(all(trial.outputs[place].is_contiguous() for place in differentiable), "an output is not contiguous")
        names_kept = self._directions[False].outputs[self.n_outputs :]
        places = iter(differentiable)
        for name in self._directions[True].inputs:
            is_kept = not name.startswith("tangents_")
            self._backward_inputs.append((is_kept, names_kept.index(name) if is_kept else next(places)))
        require(next(places, None) is None, "there are gradients that the backward pass does not ask for")


class Loop(th.autograd.Function):
    """Steps in a row, of a :class:`StepGraph` that ``loops``."""

    @staticmethod
    def forward(ctx: Any, graph: StepGraph, n_steps: int, *inputs: Any) -> tuple[th.Tensor, ...]:
        """
        :param graph: of the step
        :param n_steps: number of steps
        :param inputs: of the first step
        :return: outputs of the last step (``graph.last``), and ``graph.collected`` of all, one behind the other
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
        # Aliases: what was kept, too, would hold itself in memory if it came to know where it is from
        results = {place: outputs[place].detach() for place in graph.last} | {graph.collected: th.cat(collected)}
        ctx.mark_non_differentiable(*(result for place, result in results.items() if not graph.has_gradient[place]))
        return tuple(results.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: th.Tensor | None) -> tuple[th.Tensor | None, ...]:
        """
        :param gradients: of what :meth:`forward` returned
        :return: of what it was given
        """
        graph: StepGraph = ctx.graph
        # As the backward pass was compiled for
        *of_last, of_collected = (None if gradient is None else gradient.contiguous() for gradient in gradients)
        of_outputs: list[th.Tensor | None] = [*of_last]
        of_outputs.insert(graph.collected, None)
        # Behind the other steps, outputs count for what is carried on of them
        nothing = [None if gradient is None else th.zeros_like(gradient) for gradient in of_outputs]
        # All steps share the inputs that are not carried on
        carried, needed = {place for place, _ in graph.carried}, ctx.needs_input_grad[2:]
        totals: dict[int, th.Tensor] = {}
        for step in reversed(range(len(ctx.kept))):
            of_outputs[graph.collected] = None if of_collected is None else of_collected[step : step + 1]
            of_inputs = graph.backward(ctx.kept[step], of_outputs)
            for place, gradient in enumerate(of_inputs):
                if gradient is not None and needed[place] and place not in carried:
                    totals[place] = totals[place] + gradient if place in totals else gradient
            of_outputs = list(nothing)
            for place, source in graph.carried:
                gradient, so_far = of_inputs[place], of_outputs[source]
                if gradient is not None:
                    is_sum = so_far is not None and so_far is not nothing[source]
                    of_outputs[source] = so_far + gradient if is_sum else gradient.contiguous()  # type: ignore[operator]
        return None, None, *(of_inputs[place] if place in carried else totals.get(place) for place in range(len(needed)))


class CompiledLoop:
    """
    A step that is compiled, taken many times in a row.

    What torch does around each call of a compiled function (checks of all that it depends on, autograd's bookkeeping) takes a
    fifth of a millisecond: for the 25 steps of a gradient, an eighth of its time. Several steps in one graph save that, and
    take so many times longer to compile. Here it is done once for all steps in a row.

    :param step: ``(carried, *args) -> (carried, output)``, with a named tuple of tensors that each step takes from the one
        before, and an output ``(1, ...)`` that is collected, both in new tensors
    :param compile_graph: the compiler
    """

    def __init__(self, step: Callable[..., tuple[Any, th.Tensor]], compile_graph: CompileGraph):
        #: All graphs so far
        self.graphs: list[StepGraph] = []
        # For the graph that is called, how many steps to take; and from it, how many were taken, and what of if it is new
        self._n_steps = 0
        self._n_taken = 0
        self._new: tuple[StepGraph, Sequence[Any], Sequence[Any]] | None = None
        # torch keeps the backend, and what it gave, for longer than this lives
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

        # fullgraph: what breaks the graph would run slower than without compilation
        self._step = th.compile(step, fullgraph=True, dynamic=False, backend=backend)

    def _run(self, graph: StepGraph, inputs: Sequence[Any]) -> Sequence[Any]:
        """
        :param graph: the graph
        :param inputs: of the first step
        :return: outputs of the last of as many steps as were asked for, or of the first one
        """
        if graph.loops:
            *last, collected = Loop.apply(graph, self._n_steps, *inputs)
            self._n_taken = self._n_steps
            last.insert(graph.collected, collected)
            return last
        if not graph.was_tried:
            graph.try_out(inputs)
        outputs = tuple(graph.step(*inputs))
        self._n_taken = 1
        if graph.loops is None:
            self._new = graph, inputs, outputs
        return outputs

    def __call__(self, carried: Carried, n_steps: int, *args: Any) -> tuple[Carried, th.Tensor]:
        """
        :param carried: what the first step begins with
        :param n_steps: number of steps, at least 1
        :param args: other arguments of all steps
        :return: what the next step would begin with, and the outputs of the steps, ``(n_steps, ...)``
        """
        parts: list[th.Tensor] = []
        earlier: tuple[StepGraph, Sequence[Any]] | None = None
        while n_steps > 0:
            self._n_steps, self._new = n_steps, None
            # What was checked in the middle holds for the other steps
            is_checked = len(parts) > 1
            with th.compiler.set_stance(skip_guard_eval_unsafe=True) if is_checked else nullcontext():
                after, output = self._step(carried, *args)
            parts.append(output)
            if self._new is not None:
                graph, inputs, outputs = self._new
                if earlier is not None and earlier[0] is graph:
                    graph.look_into(earlier[1], inputs, outputs, carried, after, output)
                earlier = graph, inputs
            carried = after
            n_steps -= self._n_taken
        # Nothing of it stays in memory
        self._new = None
        return carried, parts[0] if len(parts) == 1 else th.cat(parts)
