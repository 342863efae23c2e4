"""Checks prior models: what ``check_env`` is to environments."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.prediction_errors import (
    MIN_WINDOWS,
    PriorModelReport,
    Windows,
    as_vec_env,
    check_box,
    measure_prediction_errors,
    record_windows,
    sample_box,
    to_tensor,
)

# Rows of the interface checks: few, because the finite differences need two calls per dimension
N_CHECKED_ROWS = 8
FINITE_DIFFERENCE_STEP = 1e-5


class _Method(NamedTuple):
    """A method of the model, and what its inputs and its output are called in messages."""

    name: str
    inputs: tuple[str, ...]
    output: str


STATE_FROM_OBSERVATION = _Method("state_from_observation", ("observation",), "state")
OBSERVATION = _Method("observation", ("state",), "observation")
TRANSITION = _Method("transition", ("state", "action"), "next_state")
REWARD = _Method("reward", ("state", "action", "next_state"), "reward")
TERMINAL = _Method("terminal", ("state",), "terminal")
STATE_DIFFERENCE = _Method("state_difference", ("state", "other"), "difference")
STATE_ADD = _Method("state_add", ("state", "difference"), "state")


class _Call(NamedTuple):
    """A method with arguments to check it with."""

    method: _Method
    inputs: tuple[th.Tensor, ...]


def check_prior_model(
    model: PriorModel,
    env: gym.Env | VecEnv | str,
    *,
    horizon: int = 25,
    n_samples: int = 1024,
    seed: int = 0,
    device: th.device | str | None = None,
    verbose: bool = True,
) -> PriorModelReport:
    """
    Check that a prior model can be trained on, and measure how well it predicts its environment.

    First the interface: shapes, dtypes, device, finite values, gradients (against finite differences, in double
    precision), a batch equals a loop over its rows, and nothing is remembered between calls. Then the errors of one-step
    and k-step predictions against recorded steps, for each observation dimension, as a table.

    The model is checked in evaluation mode, on copies: its mode, dtype and buffers stay as they are, and so do the global
    random number generators. The environment is reset, stepped with uniformly random actions, and reset at the end.

    :param model: the model
    :param env: the environment: Gymnasium environment, its id, or ``VecEnv`` (the raw one below a ``VecNormalize`` is used)
    :param horizon: largest number of steps to predict
    :param n_samples: number of environment steps to record
    :param seed: of the environment and the actions
    :param device: where to check; ``None`` for where the model's parameters are (the CPU when it has none)
    :param verbose: print the table
    :return: the errors
    :raises TypeError: when the model or the environment is of the wrong kind
    :raises ValueError: when the model breaks the rules of the interface; the message says which, and what to do
    """
    if horizon < 1 or n_samples < 2 * MIN_WINDOWS:
        raise ValueError(f"Expected horizon >= 1 and n_samples >= {2 * MIN_WINDOWS}, got {horizon} and {n_samples}.")
    _check_is_prior_model(model)
    if device is None:
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), th.device("cpu"))
    with _preserved_rng(device):
        venv = as_vec_env(env)
        try:
            validate_prior_model(model, venv.observation_space, venv.action_space, device)
            windows = record_windows(venv, horizon, n_samples, seed, th.device(device))
        finally:
            if isinstance(env, str):
                venv.close()
        _check_thoroughly(model, windows)
        report = measure_prediction_errors(_copy_in_eval_mode(model), windows, horizon)
    if verbose:
        print(report)
    return report


def validate_prior_model(
    model: PriorModel, observation_space: spaces.Space, action_space: spaces.Space, device: th.device | str
) -> None:
    """
    The cheap part of :func:`check_prior_model`, without environment: one forward and backward pass on a few invented
    observations and actions. Since some of the observations may be impossible, the model may answer a part of them with
    values that are not finite, but not all of them.

    :param model: the model; neither its mode nor the global random number generators change
    :param observation_space: a ``Box``
    :param action_space: a ``Box``, in the units of the environment
    :param device: where the model will be used
    :raises TypeError: when the model or a space is of the wrong kind
    :raises ValueError: when the model breaks the rules of the interface
    """
    _check_is_prior_model(model)
    observation_box, action_box = check_box(observation_space, "observation"), check_box(action_space, "action")
    rng = np.random.default_rng(0)
    observations = to_tensor(sample_box(observation_box, N_CHECKED_ROWS, rng), device)
    actions = to_tensor(sample_box(action_box, N_CHECKED_ROWS, rng), device)
    with _preserved_rng(device):
        model = _copy_in_eval_mode(model)
        for call in _checked_calls(model, observations, actions, allow_some_non_finite=True):
            _check_gradient_flow(model, call, allow_some_non_finite=True)


def _check_is_prior_model(model: PriorModel) -> None:
    if isinstance(model, type) and issubclass(model, PriorModel):
        raise TypeError(f"Expected a prior model, got the class {model.__name__}: pass an instance, `{model.__name__}()`.")
    if not isinstance(model, PriorModel):
        raise TypeError(
            f"Expected an instance of a subclass of PriorModel, got {type(model).__name__}: derive your model from "
            "`sb3_mpg.PriorModel` and write `transition` and `reward`."
        )


def _copy_in_eval_mode(model: PriorModel) -> PriorModel:
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied with copy.deepcopy ({error}): keep tensors that are part of a graph, "
            "files and processes out of its attributes."
        ) from error


@contextlib.contextmanager
def _preserved_rng(device: th.device | str) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    device = th.device(device)
    with th.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _seed_global_rng(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    th.manual_seed(seed)


def _checked_calls(
    model: PriorModel, observations: th.Tensor, actions: th.Tensor, allow_some_non_finite: bool = False
) -> Iterator[_Call]:
    """
    Call all methods of a model, each on the outputs of those before, and check what they return.

    :param model: the model, in evaluation mode
    :param observations: ``(B, *obs_shape)``
    :param actions: ``(B, A)``
    :param allow_some_non_finite: complain only about outputs that are not finite in any row
    :return: yields the calls that were found right, without ``terminal``, which has no gradient
    """
    n_rows = len(observations)

    def run(method: _Method, inputs: tuple[th.Tensor, ...], shape: tuple[int, ...], dtype: th.dtype) -> th.Tensor:
        output = _call_unmodified(model, method, inputs)
        _check_output(model, method, inputs, output, shape, dtype, allow_some_non_finite)
        return output

    dtype = observations.dtype
    states = _call_unmodified(model, STATE_FROM_OBSERVATION, (observations,))
    _check_states(model, observations, states)
    n_dims = states.shape[1]
    _check_output(model, STATE_FROM_OBSERVATION, (observations,), states, (n_rows, n_dims), dtype, allow_some_non_finite)
    yield _Call(STATE_FROM_OBSERVATION, (observations,))
    run(OBSERVATION, (states,), tuple(observations.shape), dtype)
    yield _Call(OBSERVATION, (states,))
    next_states = run(TRANSITION, (states, actions), (n_rows, n_dims), dtype)
    yield _Call(TRANSITION, (states, actions))
    rewards = run(REWARD, (states, actions, next_states), (n_rows, 1), dtype)
    yield _Call(REWARD, (states, actions, next_states))
    is_terminal = run(TERMINAL, (states,), (n_rows, 1), th.bool)
    if is_terminal.any() and not model.may_terminate:
        raise ValueError(
            f"{_where(model, TERMINAL)} says that states are terminal while `may_terminate` is False, expected True: rollouts "
            "would not ask `terminal`; leave `may_terminate` to PriorModel, or return True where any state can be terminal."
        )
    if _overrides(model, "step"):
        _check_step(model, states, actions, (next_states, rewards))
    if _overrides(model, STATE_DIFFERENCE.name) or _overrides(model, STATE_ADD.name):
        differences = run(STATE_DIFFERENCE, (next_states, states), (n_rows, n_dims), dtype)
        yield _Call(STATE_DIFFERENCE, (next_states, states))
        sums = run(STATE_ADD, (states, differences), (n_rows, n_dims), dtype)
        yield _Call(STATE_ADD, (states, differences))
        _check_inverse(model, next_states, sums)


def _overrides(model: PriorModel, name: str) -> bool:
    return getattr(type(model), name) is not getattr(PriorModel, name)


def _check_step(model: PriorModel, states: th.Tensor, actions: th.Tensor, expected: tuple[th.Tensor, th.Tensor]) -> None:
    """
    A ``step`` of the user's must be ``transition`` and ``reward``, and just as differentiable.

    :param model: the model
    :param states: ``(B, S)``
    :param actions: ``(B, A)``
    :param expected: what ``transition`` and ``reward`` returned
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
        if not th.allclose(got, wanted, rtol=1e-4, atol=1e-6, equal_nan=True):
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
    :param sums: the states that ``state_add`` made of others and the differences to them, ``(B, S)``
    """
    with th.no_grad():
        # Not their plain difference: angles may differ by whole turns
        rest = model.state_difference(sums, states).abs().nan_to_num().amax(dim=0)
    scales = states.abs().nan_to_num().amax(dim=0)
    dim = int((rest - 1e-4 * (scales + 1e-2)).argmax())
    if rest[dim] > 1e-4 * (scales[dim] + 1e-2):
        raise ValueError(
            f"{type(model).__name__}: `state_add(y, state_difference(x, y))` is {rest[dim]:.3g} away from x in state[{dim}], "
            "expected x itself (or one that `state_difference` takes for the same): write the two as inverses of each other."
        )


def _where(model: PriorModel, method: _Method) -> str:
    return f"{type(model).__name__}.{method.name}"


def _call_unmodified(model: PriorModel, method: _Method, inputs: tuple[th.Tensor, ...]) -> th.Tensor:
    """Call a method without gradients; complain when it fails, returns no tensor, or changes its arguments."""
    arguments = tuple(tensor.detach().clone() for tensor in inputs)
    with th.no_grad():
        output = _call(model, method, arguments)
    for name, argument, original in zip(method.inputs, arguments, inputs, strict=True):
        if not th.equal(argument.nan_to_num(), original.nan_to_num()):
            raise ValueError(
                f"{_where(model, method)} modifies its argument {name}s in place: build a new tensor instead "
                "(`th.cat`, `th.stack`, or `.clone()` first)."
            )
    return output


def _call(model: PriorModel, method: _Method, inputs: tuple[th.Tensor, ...]) -> th.Tensor:
    try:
        output = getattr(model, method.name)(*inputs)
    except NotImplementedError:
        raise
    except Exception as error:
        arguments = ", ".join(f"{name}s {tuple(tensor.shape)}" for name, tensor in zip(method.inputs, inputs, strict=True))
        raise ValueError(
            f"{_where(model, method)} failed for {arguments} ({inputs[0].dtype} on {inputs[0].device}) with "
            f"{type(error).__name__}: {error}; it must take such batches of torch tensors and stay in torch all the way. "
            "A state is an observation, unless the model has an `observation` and a `state_from_observation` of its own."
        ) from error
    if not isinstance(output, th.Tensor):
        raise TypeError(
            f"{_where(model, method)} returned {type(output).__name__}, expected a torch.Tensor: write it with torch "
            "functions instead of NumPy."
        )
    return output


def _check_states(model: PriorModel, observations: th.Tensor, states: th.Tensor) -> None:
    if states.ndim != 2 or len(states) != len(observations):
        raise ValueError(
            f"{_where(model, STATE_FROM_OBSERVATION)} returned shape {tuple(states.shape)} for observations of shape "
            f"{tuple(observations.shape)}, expected (B, S) with B={len(observations)}: write `state_from_observation` (for "
            "example `observations.flatten(1)`) and its inverse `observation`."
        )


def _check_output(
    model: PriorModel,
    method: _Method,
    inputs: tuple[th.Tensor, ...],
    output: th.Tensor,
    shape: tuple[int, ...],
    dtype: th.dtype,
    allow_some_non_finite: bool,
) -> None:
    where = _where(model, method)
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


def _shape_hint(method: _Method, output: th.Tensor, shape: tuple[int, ...]) -> str:
    if len(shape) == 2 and shape[1] == 1 and output.ndim <= 1:
        return "use `keepdim=True` in sums or `.unsqueeze(1)`, since (B,) meets (B, 1) silently as (B, B)"
    if output.ndim == 0:
        return "keep the batch dimension"
    if method is OBSERVATION:
        return "it must show a state as the environment does, the inverse of `state_from_observation`"
    return "return one row for each row of the batch (`th.cat` or `th.stack` with dim=1)"


def _check_finite(where: str, method: _Method, values: th.Tensor, allow_some: bool) -> None:
    is_broken = ~th.isfinite(values.flatten(1))
    is_broken = is_broken.all(dim=0) if allow_some else is_broken.any(dim=0)
    if is_broken.any():
        dim = int(is_broken.nonzero()[0])
        raise ValueError(
            f"{where} returned values that are not finite in {method.output}[{dim}], expected finite numbers: look for "
            "divisions by zero, roots and logarithms of negative numbers, and clamp what goes in."
        )


def _gradients(
    model: PriorModel, call: _Call, select: Callable[[th.Tensor], th.Tensor]
) -> tuple[th.Tensor, list[th.Tensor | None]]:
    """
    :param model: the model
    :param call: the call
    :param select: maps the output of the call to a scalar
    :return: the output, and the gradient of the scalar for each input, ``None`` without connection
    """
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in call.inputs)
    with th.enable_grad():
        output = _call(model, call.method, inputs)
        scalar = select(output)
        if not scalar.requires_grad:
            return output.detach(), [None] * len(inputs)
        try:
            return output.detach(), list(th.autograd.grad(scalar, inputs, allow_unused=True))
        except RuntimeError as error:
            raise ValueError(
                f"{_where(model, call.method)} cannot be differentiated: {error} If it changes tensors in place, as "
                "`x += 1` and `x[:, 0] = y` do, write `x = x + 1` and `th.cat` or `th.where`."
            ) from error


def _check_gradient_flow(model: PriorModel, call: _Call, allow_some_non_finite: bool = False) -> None:
    """
    An output that follows an input must be connected to it; a constant (no reward, no motion, a penalty for a terminal state)
    need not be.
    """
    output, gradients = _gradients(model, call, th.sum)
    for idx, (name, gradient) in enumerate(zip(call.method.inputs, gradients, strict=True)):
        if gradient is None:
            moved = list(call.inputs)
            # Another row's values are as plausible as this row's
            moved[idx] = moved[idx].roll(1, dims=0)
            differs = _call_unmodified(model, call.method, tuple(moved)).nan_to_num() != output.nan_to_num()
            if call.method is REWARD and model.may_terminate and name != "action":
                before, after = (_call_unmodified(model, TERMINAL, (inputs[idx],)) for inputs in (call.inputs, moved))
                differs = differs & (before == after)
            if differs.any():
                raise ValueError(
                    f"{_where(model, call.method)} is not differentiable with respect to {name}s: its output depends on them "
                    "but carries no gradient; remove `.detach()`, `th.no_grad`, `.item()` and NumPy from it."
                )
            continue
        is_finite = th.isfinite(gradient.flatten(1)).all(dim=1)
        if not (is_finite.any() if allow_some_non_finite else is_finite.all()):
            raise ValueError(
                f"{_where(model, call.method)} has gradients with respect to {name}s that are not finite, expected finite "
                "numbers: look for roots, norms and divisions at zero, and add a small constant inside."
            )


def _check_thoroughly(model: PriorModel, windows: Windows) -> None:
    """The checks that need real data or take longer, in single and in double precision."""
    # The first row is a start state, where zeros are common
    rows = th.linspace(0, len(windows.observations) - 1, N_CHECKED_ROWS).long()
    observations, actions = windows.observations[rows], windows.actions[0, rows]
    model = _copy_in_eval_mode(model)
    for _ in _checked_calls(model, windows.observations, windows.actions[0]):
        pass
    _check_round_trip(model, windows.observations)
    double_model = _copy_in_eval_mode(model).double()
    calls = list(_checked_calls(double_model, observations.double(), actions.double()))
    terminal = _Call(TERMINAL, calls[1].inputs)
    for call in [*calls, terminal]:
        _check_stateless(double_model, call)
        _check_batch_equals_loop(double_model, call)
    for call in calls:
        _check_gradient_flow(double_model, call)
        _check_finite_differences(double_model, call)


def _check_round_trip(model: PriorModel, observations: th.Tensor) -> None:
    with th.no_grad():
        restored = _call(model, OBSERVATION, (_call(model, STATE_FROM_OBSERVATION, (observations,)),))
    errors = (restored - observations).abs().flatten(1).amax(dim=0)
    scales = observations.abs().flatten(1).amax(dim=0)
    excess = errors - 1e-4 * (scales + 1e-2)
    dim = int(excess.argmax())
    if excess[dim] > 0:
        raise ValueError(
            f"{type(model).__name__}: `observation(state_from_observation(x))` differs from x by {errors[dim]:.3g} in "
            f"observation[{dim}], expected x itself: the two methods must be inverse to each other on the environment's "
            "observations."
        )


def _check_stateless(model: PriorModel, call: _Call) -> None:
    def run(seed: int, inputs: tuple[th.Tensor, ...]) -> th.Tensor:
        _seed_global_rng(seed)
        return _call_unmodified(model, call.method, inputs)

    first = run(0, call.inputs)
    # A call with other arguments in between, which a memory would remember
    run(0, tuple(tensor.roll(1, dims=0) for tensor in call.inputs))
    if not th.equal(first, run(0, call.inputs)):
        raise ValueError(
            f"{_where(model, call.method)} returned different values for the same arguments, expected the same: it has a "
            "hidden state; put everything that changes into the states."
        )
    if not th.equal(first, run(1, call.inputs)):
        raise ValueError(
            f"{_where(model, call.method)} is random in evaluation mode, expected its mean: draw noise only "
            "`if self.training`."
        )


def _check_batch_equals_loop(model: PriorModel, call: _Call) -> None:
    batch = _call_unmodified(model, call.method, call.inputs).double()
    for row in range(len(batch)):
        single = _call_unmodified(model, call.method, tuple(tensor[row : row + 1] for tensor in call.inputs)).double()
        if single.shape != batch[row : row + 1].shape or not th.allclose(single[0], batch[row], rtol=1e-6, atol=1e-8):
            raise ValueError(
                f"{_where(model, call.method)} returned other values for a batch of {len(batch)} than for its row {row} "
                "alone, expected the same: rows must not see each other; reduce over dim=1 only, and do without batch "
                "normalisation."
            )


def _check_finite_differences(model: PriorModel, call: _Call) -> None:
    """Compare the Jacobian with central differences where the function is smooth, row by row."""
    jacobians = _jacobians(model, call)
    for name, inputs, jacobian in zip(call.method.inputs, call.inputs, jacobians, strict=True):
        position = call.method.inputs.index(name)
        for dim in range(inputs[0].numel()):
            expected, is_smooth, noise = _finite_difference(model, call, position, dim)
            got = jacobian[:, :, dim]
            is_wrong = is_smooth & ((got - expected).abs() > 1e-3 * th.maximum(got.abs(), expected.abs()) + noise)
            if is_wrong.any():
                row, output_dim = is_wrong.nonzero()[0].tolist()
                derivative = f"d {call.method.output}[{output_dim}] / d {name}[{dim}]"
                raise ValueError(
                    f"{_where(model, call.method)} has a wrong gradient: {derivative} is {got[row, output_dim]:.6g} by "
                    f"back-propagation, expected {expected[row, output_dim]:.6g} from finite differences; remove "
                    "`.detach()`, `.item()`, NumPy and rounding from this term."
                )


def _jacobians(model: PriorModel, call: _Call) -> list[th.Tensor]:
    """
    :param model: the model
    :param call: the call
    :return: for each input, the derivatives of each row of the output by the same row of the input, ``(B, n_out, n_in)``
    """
    n_rows = len(call.inputs[0])
    n_outputs = _call_unmodified(model, call.method, call.inputs)[0].numel()
    columns: list[list[th.Tensor]] = [[] for _ in call.inputs]
    for dim in range(n_outputs):
        _, gradients = _gradients(model, call, lambda output, dim=dim: output.flatten(1)[:, dim].sum())  # type: ignore[misc]
        for column, gradient, inputs in zip(columns, gradients, call.inputs, strict=True):
            column.append(th.zeros_like(inputs) if gradient is None else gradient)
    return [th.stack([gradient.reshape(n_rows, -1) for gradient in column], dim=1) for column in columns]


def _finite_difference(model: PriorModel, call: _Call, position: int, dim: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    :param model: the model
    :param call: the call
    :param position: which of the inputs is moved
    :param dim: which of its dimensions
    :return: central differences, whether the one-sided differences agree (no kink, no jump), and what rounding may
        do to the differences, each ``(B, n_out)``
    """
    step = FINITE_DIFFERENCE_STEP * call.inputs[position].flatten(1)[:, dim].abs().clamp(min=1.0)

    def run(sign: float) -> th.Tensor:
        moved = call.inputs[position].clone().flatten(1)
        moved[:, dim] += sign * step
        inputs = list(call.inputs)
        inputs[position] = moved.reshape(call.inputs[position].shape)
        return _call_unmodified(model, call.method, tuple(inputs)).flatten(1)

    here, ahead, behind = run(0.0), run(1.0), run(-1.0)
    step = step.unsqueeze(1)
    forward, backward = (ahead - here) / step, (here - behind) / step
    noise = 1e-6 + 1e-14 * here.abs() / step
    is_smooth = (forward - backward).abs() <= 1e-2 * (forward.abs() + backward.abs()) + 10 * noise
    return (forward + backward) / 2, is_smooth & th.isfinite(forward + backward), noise
