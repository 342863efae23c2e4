"""Checks the gradients of prior models."""

from collections.abc import Callable

import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.interface import Call, NotFiniteError, call_method, call_unmodified, where_of

# Steps of finite differences, relative to inputs of one or more: rounding and curvature cost about the same
STEPS = {th.float32: 1e-3, th.float64: 1e-5}


def _gradients(
    model: PriorModel, call: Call, select: Callable[[th.Tensor], th.Tensor]
) -> tuple[th.Tensor, list[th.Tensor | None]]:
    """
    :param model: the model
    :param call: the call
    :param select: maps the output of the call to a scalar
    :return: the output, and the gradient of the scalar with respect to each input, ``None`` if it is not connected
    """
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in call.inputs)
    with th.enable_grad():
        output = call_method(model, call.method, inputs)
        scalar = select(output)
        if not scalar.requires_grad:
            return output.detach(), [None] * len(inputs)
        try:
            return output.detach(), list(th.autograd.grad(scalar, inputs, allow_unused=True))
        except RuntimeError as error:
            raise ValueError(
                f"{where_of(model, call.method)} cannot be differentiated: {error} If it changes tensors in place, as "
                "`x += 1` and `x[:, 0] = y` do, write `x = x + 1` and `th.cat` or `th.where`."
            ) from error


def check_gradient_flow(model: PriorModel, call: Call, allow_some_non_finite: bool = False) -> None:
    """
    Check that each output that depends smoothly on an input has a gradient with respect to it. A constant output (no reward,
    no motion) needs none, nor does one that only jumps (a reward of 1 at the goal).

    :param model: the model
    :param call: the call
    :param allow_some_non_finite: accept gradients that are finite in some rows only
    :raises ValueError: when a gradient is missing or not finite
    """
    _, gradients = _gradients(model, call, th.sum)
    for idx, (name, gradient) in enumerate(zip(call.method.inputs, gradients, strict=True)):
        if gradient is None:
            if _has_slope(model, call, idx):
                raise ValueError(
                    f"{where_of(model, call.method)} is not differentiable with respect to {name}s: its output depends on "
                    "them but carries no gradient; remove `.detach()`, `th.no_grad`, `.item()` and NumPy from it."
                )
            continue
        is_finite = th.isfinite(gradient).all(dim=1)
        if not (is_finite.any() if allow_some_non_finite else is_finite.all()):
            raise NotFiniteError(
                f"{where_of(model, call.method)} has gradients with respect to {name}s that are not finite, expected finite "
                "numbers: look for roots, norms and divisions at zero, and add a small constant inside."
            )


def check_finite_differences(model: PriorModel, call: Call) -> None:
    """
    Compare the Jacobian with central differences where the function is smooth, row by row.

    :param model: the model, in double precision
    :param call: the call
    :raises ValueError: when they differ
    """
    jacobians = _jacobians(model, call)
    for name, inputs, jacobian in zip(call.method.inputs, call.inputs, jacobians, strict=True):
        position = call.method.inputs.index(name)
        for dim in range(inputs.shape[1]):
            directions = th.zeros_like(inputs)
            directions[:, dim] = 1.0
            expected, is_smooth, noise = _finite_difference(model, call, position, directions)
            got = jacobian[:, :, dim]
            is_wrong = is_smooth & ((got - expected).abs() > 1e-3 * th.maximum(got.abs(), expected.abs()) + noise)
            if is_wrong.any():
                row, output_dim = is_wrong.nonzero()[0].tolist()
                derivative = f"d {call.method.output}[{output_dim}] / d {name}[{dim}]"
                raise ValueError(
                    f"{where_of(model, call.method)} has a wrong gradient: {derivative} is {got[row, output_dim]:.6g} by "
                    f"back-propagation, expected {expected[row, output_dim]:.6g} from finite differences; remove "
                    "`.detach()`, `.item()`, NumPy and rounding from this term."
                )


def _jacobians(model: PriorModel, call: Call) -> list[th.Tensor]:
    """
    :param model: the model
    :param call: the call
    :return: for each input, the derivatives of each output row with respect to the same input row, ``(B, n_out, n_in)``
    """
    n_outputs = call_unmodified(model, call.method, call.inputs).shape[1]
    columns: list[list[th.Tensor]] = [[] for _ in call.inputs]
    for dim in range(n_outputs):
        _, gradients = _gradients(model, call, lambda output, dim=dim: output[:, dim].sum())  # type: ignore[misc]
        for column, gradient, inputs in zip(columns, gradients, call.inputs, strict=True):
            column.append(th.zeros_like(inputs) if gradient is None else gradient)
    return [th.stack(column, dim=1) for column in columns]


def _has_slope(model: PriorModel, call: Call, position: int) -> bool:
    """
    :param model: the model
    :param call: the call
    :param position: index of an input
    :return: whether the output changes smoothly with the input anywhere. Where it is constant or jumps, it does not.
    """
    inputs = call.inputs[position]
    signs = th.randint(2, inputs.shape, generator=th.Generator().manual_seed(0)).to(inputs) * 2 - 1
    difference, is_smooth, noise = _finite_difference(model, call, position, signs)
    return bool((is_smooth & (difference.abs() > noise)).any())


def _finite_difference(
    model: PriorModel, call: Call, position: int, directions: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    :param model: the model
    :param call: the call
    :param position: index of the input that is varied
    :param directions: where to, of the shape of the input
    :return: central differences; whether the one-sided differences agree (no kink, no jump); largest rounding error of the
        differences; each ``(B, n_out)``
    """
    inputs = call.inputs[position]
    # As large a step for all elements of a row that are varied
    sizes = (inputs * directions).abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    step = STEPS[inputs.dtype] * sizes

    def run(sign: float) -> th.Tensor:
        arguments = list(call.inputs)
        arguments[position] = inputs + sign * step * directions
        return call_unmodified(model, call.method, tuple(arguments))

    here, ahead, behind = run(0.0), run(1.0), run(-1.0)
    forward, backward = (ahead - here) / step, (here - behind) / step
    noise = 1e-6 + 50 * th.finfo(inputs.dtype).eps * here.abs() / step
    is_smooth = (forward - backward).abs() <= 1e-2 * (forward.abs() + backward.abs()) + 10 * noise
    return (forward + backward) / 2, is_smooth & th.isfinite(forward + backward), noise
