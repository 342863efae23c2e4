"""Calls the methods of prior models, and checks what they return."""

from collections.abc import Iterator
from typing import NamedTuple

import torch as th

from sb3_mpg.common.models.base import PriorModel


class Method(NamedTuple):
    """
    A method of a model, for messages.

    :param name: name of the method
    :param inputs: what its inputs are, in the singular
    :param output: what its output is, in the singular
    """

    name: str
    inputs: tuple[str, ...]
    output: str


STATE_FROM_OBSERVATION = Method("state_from_observation", ("observation",), "state")
OBSERVATION = Method("observation", ("state",), "observation")
TRANSITION = Method("transition", ("state", "action"), "next_state")
REWARD = Method("reward", ("state", "action", "next_state"), "reward")
TERMINAL = Method("terminal", ("state",), "terminal")
STATE_DIFFERENCE = Method("state_difference", ("state", "other"), "difference")
STATE_ADD = Method("state_add", ("state", "difference"), "state")


class NotFiniteError(ValueError):
    """Raised where outputs or gradients of a model are not finite. They may be finite elsewhere."""


class Call(NamedTuple):
    """
    A method and arguments to check it with.

    :param method: the method
    :param inputs: its arguments, each with ``B`` rows
    """

    method: Method
    inputs: tuple[th.Tensor, ...]


def checked_calls(
    model: PriorModel, observations: th.Tensor, actions: th.Tensor, allow_some_non_finite: bool = False
) -> Iterator[Call]:
    """
    Call all methods of a model, each on outputs of the previous ones, and check what they return.

    :param model: the model, in evaluation mode
    :param observations: ``(B, O)``
    :param actions: ``(B, A)``
    :param allow_some_non_finite: accept outputs that are finite in some rows only
    :return: yields the calls that passed; not ``terminal``, which has no gradient
    :raises ValueError: when a method returns what it must not
    """
    n_rows = len(observations)

    def run(method: Method, inputs: tuple[th.Tensor, ...], shape: tuple[int, ...], dtype: th.dtype) -> th.Tensor:
        output = call_unmodified(model, method, inputs)
        _check_output(model, method, inputs, output, shape, dtype, allow_some_non_finite)
        return output

    dtype = observations.dtype
    states = call_unmodified(model, STATE_FROM_OBSERVATION, (observations,))
    _check_states(model, observations, states)
    n_dims = states.shape[1]
    _check_output(model, STATE_FROM_OBSERVATION, (observations,), states, (n_rows, n_dims), dtype, allow_some_non_finite)
    yield Call(STATE_FROM_OBSERVATION, (observations,))
    run(OBSERVATION, (states,), tuple(observations.shape), dtype)
    yield Call(OBSERVATION, (states,))
    next_states = run(TRANSITION, (states, actions), (n_rows, n_dims), dtype)
    yield Call(TRANSITION, (states, actions))
    rewards = run(REWARD, (states, actions, next_states), (n_rows, 1), dtype)
    yield Call(REWARD, (states, actions, next_states))
    is_terminal = run(TERMINAL, (states,), (n_rows, 1), th.bool)
    if is_terminal.any() and not model.may_terminate:
        raise ValueError(
            f"{where_of(model, TERMINAL)} says that states are terminal while `may_terminate` is False, expected True: "
            "rollouts would not call `terminal`; leave `may_terminate` to PriorModel, or return True where any state can be "
            "terminal."
        )
    if _overrides(model, "step"):
        _check_step(model, states, actions, (next_states, rewards))
    if _overrides(model, STATE_DIFFERENCE.name) or _overrides(model, STATE_ADD.name):
        differences = run(STATE_DIFFERENCE, (next_states, states), (n_rows, n_dims), dtype)
        yield Call(STATE_DIFFERENCE, (next_states, states))
        sums = run(STATE_ADD, (states, differences), (n_rows, n_dims), dtype)
        yield Call(STATE_ADD, (states, differences))
        _check_inverse(model, next_states, sums)


def _overrides(model: PriorModel, name: str) -> bool:
    return getattr(type(model), name) is not getattr(PriorModel, name)


def _check_step(model: PriorModel, states: th.Tensor, actions: th.Tensor, expected: tuple[th.Tensor, th.Tensor]) -> None:
    """
    Check that a ``step`` of the user's own does what ``transition`` and ``reward`` do, and is as differentiable.

    :param model: the model
    :param states: ``(B, S)``
    :param actions: ``(B, A)``
    :param expected: the next states and rewards of ``transition`` and ``reward``
    """
    advice = "return what `transition` and `reward` do; leave it to PriorModel, which calls both, unless they share work"
    inputs = (states.detach().clone().requires_grad_(), actions.detach().clone().requires_grad_())
    with th.enable_grad():
        output = model.step(*inputs)
        if not isinstance(output, tuple) or len(output) != 2 or not all(isinstance(part, th.Tensor) for part in output):
            raise TypeError(f"{type(model).__name__}.step returned {type(output).__name__}, expected two tensors: {advice}.")
        reference = model.transition(*inputs)
        references = (reference, model.reward(*inputs, reference))
    for name, got, wanted, of in zip(("next states", "rewards"), output, expected, references, strict=True):
        kind, wanted_kind = (f"{tuple(part.shape)} {part.dtype} on {part.device}" for part in (got, wanted))
        if kind != wanted_kind:
            raise ValueError(f"{type(model).__name__}.step returned {name} {kind}, expected {wanted_kind}: {advice}.")
        # Rounding errors are relative to the terms of a sum, not to the sum
        rounding = 1e-6 * (1 + wanted.nan_to_num().abs().amax(dim=0))
        is_same = (got - wanted).abs() <= 1e-4 * wanted.abs() + rounding
        if not (is_same | (th.isfinite(got) == th.isfinite(wanted)) & ~th.isfinite(wanted)).all():
            raise ValueError(f"{type(model).__name__}.step returned other {name} than expected: {advice}.")
        if of.requires_grad and not got.requires_grad:
            raise ValueError(
                f"{type(model).__name__}.step is not differentiable: its {name} carry no gradient; remove `.detach()`, "
                "`th.no_grad`, `.item()` and NumPy from it."
            )


def _check_inverse(model: PriorModel, states: th.Tensor, sums: th.Tensor) -> None:
    """
    :param model: the model
    :param states: ``(B, S)``
    :param sums: what ``state_add`` makes of other states and the differences to them: these states again, ``(B, S)``
    """
    with th.no_grad():
        # Not the plain difference, because angles may differ by whole turns
        rest = model.state_difference(sums, states).abs().nan_to_num().amax(dim=0)
    scales = states.abs().nan_to_num().amax(dim=0)
    dim = int((rest - 1e-4 * (scales + 1e-2)).argmax())
    if rest[dim] > 1e-4 * (scales[dim] + 1e-2):
        raise ValueError(
            f"{type(model).__name__}: `state_add(y, state_difference(x, y))` is {rest[dim]:.3g} away from x in state[{dim}], "
            "expected x itself (or one that `state_difference` takes for the same): write the two as inverses of each other."
        )


def where_of(model: PriorModel, method: Method) -> str:
    return f"{type(model).__name__}.{method.name}"


def call_unmodified(model: PriorModel, method: Method, inputs: tuple[th.Tensor, ...]) -> th.Tensor:
    """
    Call a method without gradients.

    :param model: the model
    :param method: the method
    :param inputs: its arguments
    :return: its output
    :raises ValueError: when it fails, returns no tensor, or changes its arguments
    """
    arguments = tuple(tensor.detach().clone() for tensor in inputs)
    with th.no_grad():
        output = call_method(model, method, arguments)
    for name, argument, original in zip(method.inputs, arguments, inputs, strict=True):
        if not th.equal(argument.nan_to_num(), original.nan_to_num()):
            raise ValueError(
                f"{where_of(model, method)} modifies its argument {name}s in place: build a new tensor instead "
                "(`th.cat`, `th.stack`, or `.clone()` first)."
            )
    return output


def call_method(model: PriorModel, method: Method, inputs: tuple[th.Tensor, ...]) -> th.Tensor:
    try:
        output = getattr(model, method.name)(*inputs)
    except NotImplementedError:
        raise
    except Exception as error:
        arguments = ", ".join(f"{name}s {tuple(tensor.shape)}" for name, tensor in zip(method.inputs, inputs, strict=True))
        raise ValueError(
            f"{where_of(model, method)} failed for {arguments} ({inputs[0].dtype} on {inputs[0].device}) with "
            f"{type(error).__name__}: {error}; it must take such batches of torch tensors and stay in torch all the way. "
            "A state is an observation, unless the model has an `observation` and a `state_from_observation` of its own, and "
            "an observation is one flat row, also that of a Dict: one key after the other."
        ) from error
    if not isinstance(output, th.Tensor):
        advice = "put the parts into one tensor, `th.cat([...], dim=1)`, in the order of the states"
        if not isinstance(output, (dict, list, tuple)):
            advice = "write it with torch functions instead of NumPy"
        raise TypeError(f"{where_of(model, method)} returned {type(output).__name__}, expected a torch.Tensor: {advice}.")
    return output


def _check_states(model: PriorModel, observations: th.Tensor, states: th.Tensor) -> None:
    if states.ndim != 2 or len(states) != len(observations):
        raise ValueError(
            f"{where_of(model, STATE_FROM_OBSERVATION)} returned shape {tuple(states.shape)} for observations of shape "
            f"{tuple(observations.shape)}, expected (B, S) with B={len(observations)}: return one row of states for each "
            "observation."
        )


def _check_output(
    model: PriorModel,
    method: Method,
    inputs: tuple[th.Tensor, ...],
    output: th.Tensor,
    shape: tuple[int, ...],
    dtype: th.dtype,
    allow_some_non_finite: bool,
) -> None:
    where = where_of(model, method)
    if tuple(output.shape) != shape:
        hint = _shape_hint(method, output, shape)
        raise ValueError(
            f"{where} returned shape {tuple(output.shape)}, expected {shape} for {method.inputs[0]}s of shape "
            f"{tuple(inputs[0].shape)}: {hint}."
        )
    if output.device != inputs[0].device:
        raise ValueError(
            f"{where} returned a tensor on device {output.device} for arguments on {inputs[0].device}, expected the same "
            f"device: create tensors with `device={method.inputs[0]}s.device` and constants with `self.register_buffer`."
        )
    if output.dtype != dtype:
        if dtype == th.bool:
            hint = "return the result of a comparison, or `.bool()`"
        else:
            hint = f"create tensors with `dtype={method.inputs[0]}s.dtype`, and avoid `.float()`, `.double()` and NumPy arrays"
        raise ValueError(f"{where} returned {output.dtype} for {inputs[0].dtype} arguments, expected {dtype}: {hint}.")
    _check_finite(where, method, output, allow_some_non_finite)


def _shape_hint(method: Method, output: th.Tensor, shape: tuple[int, ...]) -> str:
    if len(shape) == 2 and shape[1] == 1 and output.ndim <= 1:
        return "use `keepdim=True` in sums or `.unsqueeze(1)`, since (B,) meets (B, 1) silently as (B, B)"
    if output.ndim == 0:
        return "keep the batch dimension"
    if method is OBSERVATION:
        return "it must show a state as the environment does, the inverse of `state_from_observation`"
    return "return one row for each row of the batch (`th.cat` or `th.stack` with dim=1)"


def _check_finite(where: str, method: Method, values: th.Tensor, allow_some: bool) -> None:
    is_broken = ~th.isfinite(values)
    is_broken = is_broken.all(dim=0) if allow_some else is_broken.any(dim=0)
    if is_broken.any():
        dim = int(is_broken.nonzero()[0])
        raise NotFiniteError(
            f"{where} returned values that are not finite in {method.output}[{dim}], expected finite numbers: look for "
            "divisions by zero, roots and logarithms of negative numbers, and clamp what goes in."
        )
