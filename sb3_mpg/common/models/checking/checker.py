"""Checks prior models: what ``check_env`` is to environments."""

import contextlib
import copy
import random
from collections.abc import Iterator
from itertools import chain

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.couplings import find_couplings
from sb3_mpg.common.models.checking.derivatives import check_finite_differences, check_gradient_flow
from sb3_mpg.common.models.checking.encoding import find_encoding_gaps
from sb3_mpg.common.models.checking.findings import Cost, Finding, hints_of, verdict_of
from sb3_mpg.common.models.checking.gradients import judge_transition_gradient
from sb3_mpg.common.models.checking.interface import TERMINAL, Call, NotFiniteError, call_unmodified, checked_calls, where_of
from sb3_mpg.common.models.checking.prediction_errors import action_gains, compare_predictions, n_better_than_no_change
from sb3_mpg.common.models.checking.recording import Recording, as_vec_env, finite_part, record_steps, sample_box
from sb3_mpg.common.models.checking.report import PriorModelReport
from sb3_mpg.common.models.checking.rewards import judge_reward, judge_terminal
from sb3_mpg.common.models.checking.verdicts import judge_dimensions
from sb3_mpg.common.models.windows import MIN_WINDOWS, Windows, rms, to_tensor
from sb3_mpg.common.spaces import FlatObservations, flat_box

# Rows of the thorough checks: few, because finite differences need two calls per dimension
N_CHECKED_ROWS = 8
# Rows of the cheap check: enough for the model to be finite at some of them
N_INVENTED_ROWS = 64
# Of its invented observations: nothing tells the unit of unbounded ones
SIZES = (1.0, 30.0, 1000.0)


@th.inference_mode(mode=False)
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
    precision), a batch equals a loop over its rows, and calls do not depend on earlier calls. Then the errors of one-step
    and k-step predictions of recorded steps, for each observation dimension, as a table.

    Copies of the model are checked, in evaluation mode: its mode, dtype and buffers do not change, nor do the global
    random number generators. The environment is reset, stepped with uniformly random actions, and reset at the end.

    :param model: the model
    :param env: the environment: Gymnasium environment, its id, or ``VecEnv`` (the raw one below a ``VecNormalize`` is used)
    :param horizon: number of steps to predict
    :param n_samples: number of environment steps to record
    :param seed: of the environment and the actions
    :param device: device of the check; ``None`` is the device of the model's parameters (the CPU when it has none)
    :param verbose: print the table
    :return: the report
    :raises TypeError: when the model or the environment is of the wrong kind
    :raises ValueError: when the spaces of the environment are not supported, or the model breaks the rules of the interface;
        the message says which, and what to do
    """
    if horizon < 1 or n_samples < 2 * MIN_WINDOWS:
        raise ValueError(f"Expected horizon >= 1 and n_samples >= {2 * MIN_WINDOWS}, got {horizon} and {n_samples}.")
    _check_is_prior_model(model)
    if device is None:
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), th.device("cpu"))
    with _preserved_rng(device):
        venv = as_vec_env(env)
        try:
            flat = FlatObservations(venv.observation_space)
            validate_prior_model(model, flat.box, flat_box(venv.action_space), device)
            # Two steps at least, so that consecutive errors can be compared
            recording = record_steps(venv, max(horizon, 2), n_samples, seed, th.device(device))
        finally:
            if isinstance(env, str):
                venv.close()
        finite = finite_part(recording)
        of_env = _judge_records(len(recording.steps), len(finite.steps))
        _check_thoroughly(model, finite.windows)
        report = _make_report(_copy_in_eval_mode(model), finite, flat.names, horizon, of_env)
    if verbose:
        print(report)
    return report


def validate_prior_model(
    model: PriorModel, observation_box: spaces.Box, action_box: spaces.Box, device: th.device | str
) -> None:
    """
    The cheap part of :func:`check_prior_model`, without environment: one forward and backward pass on a few random
    observations and actions. Some of the random observations may be impossible, so the model may return values that are not
    finite for some of them, but not for all.

    :param model: the model; neither its mode nor the global random number generators change
    :param observation_box: the space of flat observations, ``(O,)``
    :param action_box: the space of flat actions, in the units of the environment, ``(A,)``
    :param device: where the model will be used
    :raises TypeError: when the model is of the wrong kind
    :raises ValueError: when the model breaks the rules of the interface
    """
    _check_is_prior_model(model)
    rng = np.random.default_rng(0)
    with _preserved_rng(device):
        model = _copy_in_eval_mode(model)
        actions = to_tensor(sample_box(action_box, N_INVENTED_ROWS, rng), device)
        errors = []
        for size in SIZES:
            observations = to_tensor(sample_box(observation_box, N_INVENTED_ROWS, rng, size), device)
            try:
                return _check_calls(model, observations, actions)
            except NotFiniteError as error:
                errors.append(error)
        raise errors[0]


def _check_calls(model: PriorModel, observations: th.Tensor, actions: th.Tensor) -> None:
    """
    :param model: the model, in evaluation mode
    :param observations: ``(B, O)``
    :param actions: ``(B, A)``
    :raises ValueError: when the model breaks the rules of the interface; a ``NotFiniteError`` if it is finite nowhere
    """
    for call in checked_calls(model, observations, actions, allow_some_non_finite=True):
        check_gradient_flow(model, call, allow_some_non_finite=True)


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


def _check_thoroughly(model: PriorModel, windows: Windows) -> None:
    """
    The checks that need recorded data or take longer, in single and in double precision.

    :param model: the model
    :param windows: recorded windows
    :raises ValueError: when the model breaks the rules of the interface
    """
    model = _copy_in_eval_mode(model)
    _check_calls(model, windows.observations, windows.actions[0])
    observations, actions = _rows_to_check(model, windows)
    double_model = _copy_in_eval_mode(model).double()
    calls = list(checked_calls(double_model, observations.double(), actions.double()))
    terminal = Call(TERMINAL, calls[1].inputs)
    for call in [*calls, terminal]:
        _check_stateless(double_model, call)
        _check_batch_equals_loop(double_model, call)
    for call in calls:
        check_finite_differences(double_model, call)


@th.no_grad()
def _rows_to_check(model: PriorModel, windows: Windows) -> tuple[th.Tensor, th.Tensor]:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :return: some of the observations and actions, at which the model is finite wherever it is finite at all
    """
    states = model.state_from_observation(windows.observations)
    next_states = model.transition(states, windows.actions[0])
    outputs = th.cat([states, next_states, model.reward(states, windows.actions[0], next_states)], dim=1)
    is_finite = th.isfinite(outputs).all(dim=1)
    rows = th.nonzero(is_finite if is_finite.any() else ~is_finite)[:, 0]
    # Include the first row: it is a start state, where zeros are common
    rows = rows[th.linspace(0, len(rows) - 1, N_CHECKED_ROWS, device=rows.device).long()]
    return windows.observations[rows], windows.actions[0, rows]


def _check_stateless(model: PriorModel, call: Call) -> None:
    def run(seed: int, inputs: tuple[th.Tensor, ...]) -> th.Tensor:
        _seed_global_rng(seed)
        return call_unmodified(model, call.method, inputs)

    first = run(0, call.inputs)
    # Other arguments in between, which a hidden state would remember
    run(0, tuple(tensor.roll(1, dims=0) for tensor in call.inputs))
    if not th.equal(first, run(0, call.inputs)):
        raise ValueError(
            f"{where_of(model, call.method)} returned different values for the same arguments, expected the same: it has a "
            "hidden state; put everything that changes into the states."
        )
    if not th.equal(first, run(1, call.inputs)):
        raise ValueError(
            f"{where_of(model, call.method)} is random in evaluation mode, expected its mean: draw noise only "
            "`if self.training`."
        )


def _check_batch_equals_loop(model: PriorModel, call: Call) -> None:
    batch = call_unmodified(model, call.method, call.inputs).double()
    for row in range(len(batch)):
        single = call_unmodified(model, call.method, tuple(tensor[row : row + 1] for tensor in call.inputs)).double()
        if single.shape != batch[row : row + 1].shape or not th.allclose(single[0], batch[row], rtol=1e-6, atol=1e-8):
            raise ValueError(
                f"{where_of(model, call.method)} returned other values for a batch of {len(batch)} than for its row {row} "
                "alone, expected the same: rows must not see each other; reduce over dim=1 only, and do not use batch "
                "normalisation."
            )


def _judge_records(n_windows: int, n_finite: int) -> list[Finding]:
    """
    :param n_windows: number of recorded windows
    :param n_finite: number of those that are finite
    :return: that the environment gave values that are not finite, if it did
    :raises ValueError: when too few are finite
    """
    if n_finite == n_windows:
        return []
    text = (
        f"the environment gave observations or rewards that are not finite: {n_windows - n_finite} of {n_windows} recorded "
        "windows are left out. gymnasium.utils.env_checker.check_env helps to find out why."
    )
    if n_finite < MIN_WINDOWS:
        raise ValueError(f"Too few steps were recorded to check a model: {text}")
    return [Finding(Cost.NOT_FINITE, "", text)]


def _names_of_states(model: PriorModel, names: tuple[str, ...], windows: Windows) -> tuple[str, ...]:
    """
    :param model: the model
    :param names: names of the observation dimensions
    :param windows: recorded windows
    :return: names of the dimensions of the state: those of the observation, if it is the state
    """
    if type(model).observation is PriorModel.observation:
        return names
    return tuple(f"state[{dim}]" for dim in range(model.state_from_observation(windows.observations[:1]).shape[1]))


def _make_report(
    model: PriorModel, recording: Recording, names: tuple[str, ...], horizon: int, of_env: list[Finding]
) -> PriorModelReport:
    """
    :param model: the model, in evaluation mode
    :param recording: recorded windows
    :param names: names of the observation dimensions
    :param horizon: number of steps that should be checked
    :param of_env: what was found about the environment
    :return: the report
    """
    windows = recording.windows
    residuals = compare_predictions(model, windows, horizon)
    gains = action_gains(model, windows, residuals)
    # All dimensions together; clip the relative errors of those that hardly move, which would dominate
    together = rms(np.minimum(residuals.relative_errors(), 1e3).T)
    gaps, encoding = find_encoding_gaps(model, windows, names, residuals.rms_changes[0])
    couplings = find_couplings(model, windows, residuals)
    of_dimensions = judge_dimensions(
        residuals, gains, names, _names_of_states(model, names, windows), couplings, gaps, encoding
    )
    reward = judge_reward(model, windows)
    terminal_errors, of_terminal = judge_terminal(model, recording, horizon)
    of_model = [*of_terminal, *reward.findings, *judge_transition_gradient(model, windows)]
    return PriorModelReport(
        dimensions=names,
        n_windows=residuals.n_windows,
        rms_errors=residuals.rms_errors,
        biases=residuals.biases,
        rms_changes=residuals.rms_changes,
        action_gains=gains,
        verdicts=tuple(verdict_of(findings) for findings in of_dimensions),
        reward_rms_error=reward.rms_error,
        reward_bias=reward.bias,
        reward_std=reward.std,
        reward_verdict=reward.verdict,
        terminal_errors=terminal_errors,
        requested_horizon=horizon,
        supported_horizon=n_better_than_no_change(together),
        hints=hints_of([*of_env, *of_model, *chain(*of_dimensions)]),
    )
