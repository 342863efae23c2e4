"""Measures how well a prior model predicts an environment."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_mpg.common.models.base import PriorModel

# Bounds beyond this mean "unbounded" to most people who write environments
LARGEST_BOUND = 1e6
# A number from fewer windows than that says nothing
MIN_WINDOWS = 8
# Below this share of the actual change, an error is not worth a remark
GOOD_RELATIVE_ERROR = 0.1
# An action with a gain between this and its opposite is without effect rather than of the wrong sign
WRONG_SIGN_GAIN = 0.25
# How much stronger or weaker an action may act than in the model
WRONG_GAIN = 1.3
# An action that moves something by that share of its change, and does not in the model, is missed
MISSED_EFFECT = 0.05
# Errors of which recorded observations and actions explain no more than that look random
RANDOM_SHARE = 0.1
# Lines of the printed table; the dimensions with the largest errors are shown
MAX_TABLE_ROWS = 30
MAX_HINTS = 10


@dataclass(frozen=True)
class PriorModelReport:
    """
    How well a prior model predicts an environment under uniformly random actions. ``O`` is the number of observation
    dimensions, ``H`` the number of prediction steps; row ``k - 1`` is about predictions ``k`` steps ahead, open loop,
    along the recorded actions. Printing the report prints a table.

    :param dimensions: names of the observation dimensions
    :param n_windows: number of recorded windows behind each row, ``(H,)``
    :param rms_errors: RMS prediction errors, ``(H, O)``; infinite when a prediction is not finite
    :param biases: mean of predicted minus actual, ``(H, O)``
    :param rms_changes: RMS of the actual change over as many steps: the error of predicting no change, ``(H, O)``
    :param action_gains: effect of each action in the environment, in units of its effect in the model, on each
        observation dimension after one step, ``(A, O)``: 1 is right, negative is the wrong sign, infinite is an effect that
        the model does not have, NaN cannot be told
    :param verdicts: one for each dimension
    :param reward_rms_error: RMS error of the reward of recorded transitions
    :param reward_bias: mean of predicted minus actual reward
    :param reward_std: standard deviation of the actual reward
    :param reward_verdict: the same in words
    :param terminal_errors: steps that terminated where the model says otherwise, and the other way around
    :param requested_horizon: number of steps that should have been checked; ``H`` is smaller when episodes are short
    :param supported_horizon: the largest horizon up to which the model beats predicting no change, all dimensions together
    :param hints: how to fix what is wrong
    """

    dimensions: tuple[str, ...]
    n_windows: np.ndarray
    rms_errors: np.ndarray
    biases: np.ndarray
    rms_changes: np.ndarray
    action_gains: np.ndarray
    verdicts: tuple[str, ...]
    reward_rms_error: float
    reward_bias: float
    reward_std: float
    reward_verdict: str
    terminal_errors: tuple[int, int]
    requested_horizon: int
    supported_horizon: int
    hints: tuple[str, ...]

    @property
    def relative_errors(self) -> np.ndarray:
        """RMS errors in units of the RMS of the actual change over as many steps, ``(H, O)``."""
        return _relative(self.rms_errors, self.rms_changes)

    def __str__(self) -> str:
        horizon = len(self.n_windows)
        steps = sorted({step for step in (5, horizon) if 1 < step <= horizon})
        header = ["dimension", "1-step error", "bias", "of change"]
        for step in steps:
            header += [f"{step}-step error", "of change"]
        relative_errors = self.relative_errors
        shown = np.sort(np.argsort(-relative_errors[0], kind="stable")[:MAX_TABLE_ROWS])
        rows = [[*header, "verdict"]]
        for idx in shown:
            row = [self.dimensions[idx]]
            for step in [1, *steps]:
                row += [f"{self.rms_errors[step - 1, idx]:.3g}"]
                row += [f"{self.biases[0, idx]:+.2g}"] if step == 1 else []
                row += [f"{relative_errors[step - 1, idx]:.1%}"]
            rows.append([*row, self.verdicts[idx]])
        relative_reward_error = float(_relative(np.array(self.reward_rms_error), np.array(self.reward_std)))
        reward_row = ["reward", f"{self.reward_rms_error:.3g}", f"{self.reward_bias:+.2g}", f"{relative_reward_error:.1%} *"]
        rows.append([*reward_row, *[""] * (2 * len(steps)), self.reward_verdict])
        limit = ""
        if self.supported_horizon < horizon:
            limit = f", limited by {self.dimensions[relative_errors[self.supported_horizon].argmax()]}"
        n_hidden = len(self.dimensions) - len(shown)
        windows = ", ".join(f"{self.n_windows[step - 1]} of {step}" for step in [1, *steps])
        return "\n".join(
            [
                "Errors of the prior model under random actions (RMS, open loop)",
                *format_table(rows),
                *([f"... and {n_hidden} dimensions with smaller errors"] if n_hidden > 0 else []),
                f"of change: in units of the actual change over as many steps (* of the reward's standard deviation); "
                f"100% is as bad as predicting no change. Recorded windows: {windows} steps.",
                f"Missed terminations: {self.terminal_errors[0]}, false terminations: {self.terminal_errors[1]}",
                f"The model beats predicting no change for horizons up to {self.supported_horizon}{limit} "
                f"({horizon} steps were checked"
                + (", the episodes were too short for more)" if horizon < self.requested_horizon else ")"),
                *(f"How to fix: {hint}" for hint in self.hints[:MAX_HINTS]),
                *([f"... and {len(self.hints) - MAX_HINTS} more hints"] if len(self.hints) > MAX_HINTS else []),
            ]
        )


def _relative(errors: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Errors in units of scales: zero without error, infinite when only the scale is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(errors == 0, 0.0, np.where(scales == 0, np.inf, errors / scales))


def format_table(rows: list[list[str]]) -> list[str]:
    """
    :param rows: cells, the header first; the first and the last column are text, the others numbers
    :return: aligned lines, with a ruler below the header
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *numbers, last = [
            cell.ljust(width) if column in (0, len(widths) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join([first, *numbers, last]).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return lines


class Windows(NamedTuple):
    """
    Recorded transitions, each followed by the rest of its episode, at most ``horizon`` steps in all.

    :param observations: ``(B, *obs_shape)``
    :param actions: in the units of the environment, ``(horizon, B, A)``
    :param next_observations: ``(horizon, B, *obs_shape)``
    :param rewards: ``(horizon, B, 1)``
    :param terminated: whether the first step terminated the episode, ``(B, 1)``
    :param lengths: number of recorded steps, ``(B,)``; what lies behind them is filled up
    """

    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    rewards: th.Tensor
    terminated: th.Tensor
    lengths: th.Tensor

    def select(self, is_kept: np.ndarray) -> "Windows":
        """
        :param is_kept: which windows, bool ``(B,)``
        :return: these
        """
        kept = th.as_tensor(is_kept, device=self.lengths.device)
        return Windows(
            self.observations[kept],
            self.actions[:, kept],
            self.next_observations[:, kept],
            self.rewards[:, kept],
            self.terminated[kept],
            self.lengths[kept],
        )


def check_box(space: spaces.Space, name: str) -> spaces.Box:
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise TypeError(f"Prior models need {name} spaces that are a Box of floats, got {space}.")
    return space


def sample_box(box: spaces.Box, n_rows: int, rng: np.random.Generator) -> np.ndarray:
    """
    :param box: a box; its dimensions may be unbounded
    :param n_rows: number of samples
    :param rng: random number generator
    :return: uniform where there are two bounds, standard normal otherwise, ``(n_rows, *box.shape)``
    """
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)
    is_bounded = (low > -LARGEST_BOUND) & (high < LARGEST_BOUND)
    uniform = rng.uniform(np.where(is_bounded, low, 0.0), np.where(is_bounded, high, 1.0), size=(n_rows, *box.shape))
    normal = np.clip(rng.standard_normal((n_rows, *box.shape)), low, high)
    return np.where(is_bounded, uniform, normal)


def to_tensor(array: np.ndarray, device: th.device | str) -> th.Tensor:
    return th.as_tensor(array, dtype=th.float32, device=device)


def as_vec_env(env: gym.Env | VecEnv | str) -> VecEnv:
    if isinstance(env, str):
        made = gym.make(env)
        return DummyVecEnv([lambda: made])
    if isinstance(env, gym.Env):
        return DummyVecEnv([lambda: env])
    if not isinstance(env, VecEnv):
        raise TypeError(
            f"Expected a Gymnasium environment, its id or a VecEnv of Stable-Baselines3, got {type(env).__name__}."
        )
    inner: VecEnv | None = env
    while inner is not None:
        if isinstance(inner, VecNormalize):
            # Models speak raw observations and rewards, and checking must not move the statistics
            return inner.venv
        inner = getattr(inner, "venv", None)
    return env


def record_windows(venv: VecEnv, horizon: int, n_samples: int, seed: int, device: th.device) -> Windows:
    """
    Step the environment with uniformly random actions.

    :param venv: the environment
    :param horizon: number of steps of a window
    :param n_samples: number of steps to record
    :param seed: of the environment and the actions
    :param device: where the windows go
    :return: one window for each step
    """
    action_box = check_box(venv.action_space, "action")
    rng = np.random.default_rng(seed)
    n_steps = max(-(-n_samples // venv.num_envs), 2)
    # Long episodes are cut, so that several starts are seen
    max_segment = min(4 * horizon, max(n_steps // 4, 2 * horizon))
    venv.seed(seed)
    observations = np.array(venv.reset())
    records: dict[str, list[np.ndarray]] = {
        name: [] for name in ("observations", "actions", "next_observations", "rewards", "terminated", "ends")
    }
    for step in range(1, n_steps + 1):
        actions = sample_box(action_box, venv.num_envs, rng).astype(action_box.dtype)
        next_observations, rewards, dones, infos = venv.step(actions)
        final_observations, ends = np.array(next_observations), np.array(dones)
        for idx in np.flatnonzero(dones):
            final_observations[idx] = infos[idx]["terminal_observation"]
        terminated = np.array(
            [done and not info.get("TimeLimit.truncated", False) for done, info in zip(dones, infos, strict=True)]
        )
        if step % max_segment == 0 or step == n_steps:
            next_observations, ends = venv.reset(), np.ones_like(ends)
        for name, values in zip(records, (observations, actions, final_observations, rewards, terminated, ends), strict=True):
            records[name].append(np.array(values))
        observations = np.array(next_observations)
    return cut_windows({name: np.stack(values) for name, values in records.items()}, horizon, device)


def cut_windows(records: dict[str, np.ndarray], horizon: int, device: th.device) -> Windows:
    """
    :param records: arrays ``(n_steps, n_envs, ...)``; the last step is marked as an end
    :param horizon: number of steps of a window
    :param device: where the windows go
    :return: the windows, ``B = n_steps * n_envs``
    """
    ends = records["ends"]
    n_steps, n_envs = ends.shape
    lengths = np.ones((n_steps, n_envs), dtype=np.int64)
    for step in range(n_steps - 2, -1, -1):
        lengths[step] = np.where(ends[step], 1, lengths[step + 1] + 1)
    horizon = min(horizon, int(lengths.max()))
    # (horizon, n_steps, n_envs); behind the end of an episode its last step is repeated
    steps = np.arange(n_steps)[None, :, None] + np.minimum(np.arange(horizon)[:, None, None], lengths[None] - 1)
    envs = np.broadcast_to(np.arange(n_envs), steps.shape)
    n_windows = n_steps * n_envs

    def gather(name: str) -> th.Tensor:
        array = records[name]
        return to_tensor(array[steps, envs].reshape(horizon, n_windows, *array.shape[2:]), device)

    def first(name: str) -> th.Tensor:
        array = records[name]
        return to_tensor(array.reshape(n_windows, *array.shape[2:]), device)

    return Windows(
        observations=first("observations"),
        actions=gather("actions"),
        next_observations=gather("next_observations"),
        rewards=gather("rewards").reshape(horizon, n_windows, 1),
        terminated=first("terminated").reshape(n_windows, 1).bool(),
        lengths=th.as_tensor(np.minimum(lengths, horizon).reshape(n_windows), device=device),
    )


def to_numpy(tensor: th.Tensor) -> np.ndarray:
    """
    :param tensor: any shape, on any device
    :return: the same numbers in double precision
    """
    return tensor.double().cpu().numpy()


class _Residuals(NamedTuple):
    """
    Predictions against records.

    :param n_windows: ``(H,)``
    :param rms_errors: ``(H, O)``
    :param biases: ``(H, O)``
    :param rms_changes: ``(H, O)``
    :param rounding: errors and changes below that are those of single precision, ``(O,)``
    :param changes: actual changes in one step, ``(B, O)``
    :param predicted_changes: predicted ones, ``(B, O)``
    """

    n_windows: np.ndarray
    rms_errors: np.ndarray
    biases: np.ndarray
    rms_changes: np.ndarray
    rounding: np.ndarray
    changes: np.ndarray
    predicted_changes: np.ndarray

    def relative_errors(self) -> np.ndarray:
        """
        :return: errors in units of the actual changes, rounding taken for zero, ``(H, O)``
        """
        errors = np.where(self.rms_errors <= self.rounding, 0.0, self.rms_errors)
        return _relative(errors, np.where(self.rms_changes <= self.rounding, 0.0, self.rms_changes))


def rms(values: np.ndarray) -> np.ndarray:
    """
    :param values: ``(B, ...)``
    :return: the root of the mean square over the first axis, infinite where a value is not finite, ``(...)``
    """
    with np.errstate(all="ignore"):
        roots = np.sqrt(np.mean(values**2, axis=0))
    return np.where(np.isfinite(roots), roots, np.inf)


def measure_prediction_errors(model: PriorModel, windows: Windows, horizon: int) -> PriorModelReport:
    """
    :param model: the model, in evaluation mode
    :param windows: the records
    :param horizon: largest number of steps that was asked for
    :return: the errors
    """
    residuals = _compare_predictions(model, windows)
    gains = _action_gains(model, windows, residuals)
    relative_errors = residuals.relative_errors()
    # All dimensions together; those that hardly move must not decide
    together = rms(np.minimum(relative_errors, 1e3).T)
    judgements = [_judge_dimension(residuals, gains[:, dim], dim) for dim in range(relative_errors.shape[1])]
    rough_hint = _rough_hint(judgements, relative_errors[0], residuals, windows)
    reward_error, reward_bias, reward_std, reward_verdict, reward_hint = _judge_reward(model, windows)
    terminal_errors, terminal_hint = _judge_terminal(model, windows)
    hints = [_silent_actions_hint(model, windows), *(hint for _, hint in judgements), rough_hint, reward_hint, terminal_hint]
    return PriorModelReport(
        dimensions=tuple(_name(dim) for dim in range(len(judgements))),
        n_windows=residuals.n_windows,
        rms_errors=residuals.rms_errors,
        biases=residuals.biases,
        rms_changes=residuals.rms_changes,
        action_gains=gains,
        verdicts=tuple(verdict for verdict, _ in judgements),
        reward_rms_error=reward_error,
        reward_bias=reward_bias,
        reward_std=reward_std,
        reward_verdict=reward_verdict,
        terminal_errors=terminal_errors,
        requested_horizon=horizon,
        supported_horizon=_n_better_than_no_change(together),
        hints=tuple(hint for hint in hints if hint),
    )


def _name(dim: int) -> str:
    return f"observation[{dim}]"


def _n_better_than_no_change(relative_errors: np.ndarray) -> int:
    """
    :param relative_errors: one for each number of steps, ``(H,)``
    :return: the number of steps before the first relative error of one or more
    """
    is_worse = relative_errors >= 1
    return int(is_worse.argmax()) if is_worse.any() else len(is_worse)


@th.no_grad()
def _predict(model: PriorModel, observations: th.Tensor, actions: th.Tensor) -> np.ndarray:
    """
    :param model: the model, in evaluation mode
    :param observations: ``(B, *obs_shape)``
    :param actions: ``(H, B, A)``
    :return: predicted observations, ``(H, B, O)``
    """
    states = model.state_from_observation(observations)
    predictions = []
    for step_actions in actions:
        states = model.transition(states, step_actions)
        predictions.append(to_numpy(model.observation(states).flatten(1)))
    return np.stack(predictions)


@th.no_grad()
def _differences(model: PriorModel, device: th.device, observations: np.ndarray, others: np.ndarray) -> np.ndarray:
    """
    :param model: the model; if it shows its states as they are, it says how far they lie from each other
    :param device: where it is
    :param observations: ``(B, O)``
    :param others: ``(B, O)``
    :return: differences, ``(B, O)``
    """
    if type(model).observation is not PriorModel.observation:
        return observations - others
    states, other_states = (th.as_tensor(array, device=device) for array in (observations, others))
    return to_numpy(model.state_difference(states, other_states))


def _compare_predictions(model: PriorModel, windows: Windows) -> _Residuals:
    differences = partial(_differences, model, windows.observations.device)
    observations = to_numpy(windows.observations.flatten(1))
    actual = to_numpy(windows.next_observations.flatten(2))
    predicted = _predict(model, windows.observations, windows.actions)
    lengths = windows.lengths.cpu().numpy()
    n_windows, rms_errors, biases, rms_changes = [], [], [], []
    for step in range(len(actual)):
        is_recorded = lengths > step
        if step > 0 and is_recorded.sum() < MIN_WINDOWS:
            break
        with np.errstate(all="ignore"):
            errors = differences(predicted[step, is_recorded], actual[step, is_recorded])
            bias = errors.mean(axis=0)
        n_windows.append(int(is_recorded.sum()))
        rms_errors.append(rms(errors))
        biases.append(np.where(np.isfinite(bias), bias, np.inf))
        rms_changes.append(rms(differences(actual[step, is_recorded], observations[is_recorded])))
    return _Residuals(
        n_windows=np.array(n_windows),
        rms_errors=np.stack(rms_errors),
        biases=np.stack(biases),
        rms_changes=np.stack(rms_changes),
        rounding=1e-5 * np.abs(observations).max(axis=0) + 1e-7,
        changes=differences(actual[0], observations),
        predicted_changes=differences(predicted[0], observations),
    )


def _regress(targets: np.ndarray, inputs: np.ndarray) -> tuple[float, float]:
    """
    :param targets: ``(B,)``
    :param inputs: ``(B,)``, not constant
    :return: the slope of the targets over the inputs and its standard error
    """
    targets, inputs = targets - targets.mean(), inputs - inputs.mean()
    power = float(inputs @ inputs)
    slope = float(inputs @ targets) / power
    rest = targets - slope * inputs
    return slope, float(np.sqrt(rest @ rest / max(len(rest) - 2, 1) / power))


def _action_gains(model: PriorModel, windows: Windows, residuals: _Residuals) -> np.ndarray:
    """
    How strongly each action acts in the environment, in units of its effect in the model. Random actions are independent
    of everything else, so that other errors of the model do not matter.

    :param model: the model, in evaluation mode
    :param windows: the records
    :param residuals: the predictions with the recorded actions
    :return: regression coefficients, infinite where the model does not know the effect, NaN where there is none or they are
        too uncertain, ``(A, O)``
    """
    actions = windows.actions[0]
    gains = np.full((actions.shape[1], residuals.changes.shape[1]), np.nan)
    observations = to_numpy(windows.observations.flatten(1))
    smallest_effects = np.maximum(1e-3 * residuals.rms_changes[0], residuals.rounding)
    for action_dim in range(actions.shape[1]):
        neutral_actions = actions.clone()
        neutral_actions[:, action_dim] = actions[:, action_dim].mean()
        neutral = _predict(model, windows.observations, neutral_actions.unsqueeze(0))[0]
        neutral_changes = _differences(model, windows.observations.device, neutral, observations)
        effects, targets = residuals.predicted_changes - neutral_changes, residuals.changes - neutral_changes
        taken = to_numpy(actions[:, action_dim])
        for dim in np.flatnonzero(np.isfinite(effects).all(axis=0)):
            if rms(effects[:, dim]) > smallest_effects[dim]:
                gain, standard_error = _regress(targets[:, dim], effects[:, dim])
                if 4 * standard_error < max(abs(gain), WRONG_SIGN_GAIN):
                    gains[action_dim, dim] = gain
            elif taken.std() > 0:
                slope, standard_error = _regress(targets[:, dim], taken)
                least = max(MISSED_EFFECT * residuals.rms_changes[0, dim], residuals.rounding[dim]) / taken.std()
                if abs(slope) > max(6 * standard_error, least):
                    gains[action_dim, dim] = np.inf
    return gains


def _silent_actions_hint(model: PriorModel, windows: Windows) -> str | None:
    """A hint when an action has effects in the model but without a gradient, which is all that a policy learns from."""
    with th.no_grad():
        states = model.state_from_observation(windows.observations)
    actions = windows.actions[0].clone().requires_grad_()
    with th.enable_grad():
        next_states = model.transition(states, actions)
    if not next_states.requires_grad:
        return None
    (gradient,) = th.autograd.grad(next_states.sum(), actions, allow_unused=True)
    for action_dim in range(actions.shape[1]):
        others = actions.detach().clone()
        others[:, action_dim] = others[:, action_dim].roll(1)
        with th.no_grad():
            is_moved = bool((model.transition(states, others) != next_states).any())
        if is_moved and gradient is not None and not bool(gradient[:, action_dim].any()):
            return (
                f"action {action_dim} moves states in the model, but the gradient of `transition` by it is zero everywhere, "
                "and a policy learns from that alone: signs, rounding and comparisons have none."
            )
    return None


def _judge_dimension(residuals: _Residuals, gains: np.ndarray, dim: int) -> tuple[str, str | None]:
    """
    :param residuals: predictions against records
    :param gains: of all actions on this dimension, ``(A,)``
    :param dim: the dimension
    :return: verdict, and how to fix it
    """
    name = _name(dim)
    relative_errors = residuals.relative_errors()[:, dim]
    error, bias = residuals.rms_errors[0, dim], residuals.biases[0, dim]
    if not np.isfinite(error):
        return "not finite", f"{name} is not finite after one step: clamp the inputs of roots, logarithms and divisions."
    n_good_steps = _n_better_than_no_change(relative_errors)
    drift = f", worse than no change after step {n_good_steps}" if 0 < n_good_steps < len(relative_errors) else ""
    wrong_actions = np.flatnonzero(gains < -WRONG_SIGN_GAIN)
    if len(wrong_actions) > 0:
        return f"wrong sign of action {wrong_actions[0]}", (
            f"action {wrong_actions[0]} seems to act with the opposite sign on {name} (its effect is "
            f"{gains[wrong_actions[0]]:.2g} times the model's): check the sign of its term in `transition`."
        )
    if relative_errors[0] < GOOD_RELATIVE_ERROR:
        cause = (
            f"its bias of {bias:+.2g} adds up" if bias**2 > 0.5 * error**2 else "its small error adds up, or those of others"
        )
        return f"good{drift}", f"{name} is good in one step but drifts: {cause}." if drift else None
    changes, predicted_changes = residuals.changes[:, dim], residuals.predicted_changes[:, dim]
    if rms(changes + predicted_changes) < 0.5 * error:
        return "wrong sign", f"{name} seems to change in the opposite direction: check the sign of its derivative."
    worse = relative_errors[0] >= 1
    if bias**2 > 0.5 * error**2:
        verdict = "biased, worse than no change" if worse else f"biased{drift}"
        direction = "high" if bias > 0 else "low"
        return verdict, f"{name} is predicted too {direction} by {abs(bias):.3g} in each step: look for a constant term in it."
    errors = np.sort(np.abs(predicted_changes - changes))
    if rms(errors[: -max(len(errors) // 20, 1)]) < 0.2 * error:
        return (
            "rare jumps",
            f"{name} is right in 95% of the steps and far off in others: is it an angle that wraps, or a contact?",
        )
    gain_verdict, hint = _judge_gains(name, gains)
    hint = hint or _scale_hint(f"the change of {name}", changes, predicted_changes)
    if worse:
        default = (
            f"{name} is worse than predicting no change: check units, and that a model step is as long as an environment step."
        )
        return "worse than no change", hint or default
    return gain_verdict or f"rough{drift}", hint


def _judge_gains(name: str, gains: np.ndarray) -> tuple[str | None, str | None]:
    """
    :param name: of the dimension
    :param gains: of all actions on it, ``(A,)``
    :return: verdict and how to fix it, ``None`` where actions act as they should
    """
    missed_actions = np.flatnonzero(np.isinf(gains))
    if len(missed_actions) > 0:
        return f"misses action {missed_actions[0]}", (
            f"action {missed_actions[0]} moves {name}, but not in the model: its term in `transition` is missing."
        )
    is_off = np.isfinite(gains) & ~((gains > 1 / WRONG_GAIN) & (gains < WRONG_GAIN))
    if is_off.any():
        action = int(is_off.argmax())
        return f"wrong gain of action {action}", (
            f"action {action} acts {gains[action]:.2g} times as strongly on {name} as in the model: check its factor in "
            "`transition`, and its units: a model gets actions as the environment does, not scaled to [-1, 1]."
        )
    return None, None


def _explained_share(errors: np.ndarray, windows: Windows) -> float:
    """
    :param errors: of one dimension after one step, ``(B,)``
    :param windows: the records
    :return: how much of their variance a quadratic function of observation and action explains, which is fitted to one half
        of the records and judged by the other
    """
    inputs = np.concatenate([to_numpy(windows.observations.flatten(1)), to_numpy(windows.actions[0])], axis=1)
    inputs = (inputs - inputs.mean(axis=0)) / np.maximum(inputs.std(axis=0), 1e-12)
    first, second = np.triu_indices(inputs.shape[1])
    features = np.concatenate([np.ones((len(inputs), 1)), inputs, inputs[:, first] * inputs[:, second]], axis=1)
    if len(features) < 4 * features.shape[1]:
        return 1.0  # too few to tell
    factors = np.linalg.lstsq(features[::2], errors[::2], rcond=1e-6)[0]
    rest, other = errors[1::2] - features[1::2] @ factors, errors[1::2]
    return float(1 - rest.var() / max(other.var(), 1e-300))


def _rough_hint(
    judgements: list[tuple[str, str | None]], relative_errors: np.ndarray, residuals: _Residuals, windows: Windows
) -> str | None:
    """One hint for all the dimensions that are merely rough, which may well be good enough."""
    rough = [dim for dim, (verdict, hint) in enumerate(judgements) if verdict.startswith("rough") and hint is None]
    if not rough:
        return None
    worst = max(rough, key=lambda dim: relative_errors[dim])
    cause = "a term or a parameter is off; this can be good enough to train with."
    if _explained_share((residuals.predicted_changes - residuals.changes)[:, worst], windows) < RANDOM_SHARE:
        cause = (
            "hardly any of its error follows from observation and action. It may be noise, or of something that is not "
            "observed, and no mistake of the model."
        )
    others = f", {len(rough) - 1} others less so" if len(rough) > 1 else ""
    return f"{_name(worst)} is rough ({relative_errors[worst]:.0%} of its change){others}: {cause}"


def _scale_hint(name: str, actual: np.ndarray, predicted: np.ndarray) -> str | None:
    """A hint when the actual values are those predicted times a constant, or ``None``."""
    if np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return None
    factor, _ = _regress(actual, predicted)
    correlation = np.corrcoef(actual, predicted)[0, 1]
    if correlation**2 < 0.95 or 0.8 < factor < 1.25:
        return None
    return f"{name} is {factor:.3g} times what the model predicts: check units, signs and the length of a step."


@th.no_grad()
def _judge_reward(model: PriorModel, windows: Windows) -> tuple[float, float, float, str, str | None]:
    """
    :param model: the model, in evaluation mode
    :param windows: the records
    :return: RMS error, bias, standard deviation of the actual reward, verdict, and how to fix it
    """
    states = model.state_from_observation(windows.observations)
    next_states = model.state_from_observation(windows.next_observations[0])
    predicted = to_numpy(model.reward(states, windows.actions[0], next_states))[:, 0]
    actual = to_numpy(windows.rewards[0])[:, 0]
    error, bias, std = float(rms(predicted - actual)), float((predicted - actual).mean()), float(actual.std())

    def judgement(verdict: str, hint: str | None = None) -> tuple[float, float, float, str, str | None]:
        return error, bias, std, verdict, hint

    rounding = 1e-5 * np.abs(actual).max() + 1e-7
    if error <= max(GOOD_RELATIVE_ERROR * std, rounding):
        return judgement("good")
    if not np.isfinite(error):
        return judgement("not finite", "the reward is not finite: clamp the inputs of roots, logarithms and divisions.")
    if np.ptp(predicted) == 0:
        return judgement("constant", f"the predicted reward is {predicted[0]:.3g} everywhere, the actual one is not.")
    hint = _scale_hint("the reward", actual, predicted)
    if float(rms(actual + predicted)) < 0.5 * error:
        return judgement("wrong sign", "the reward seems to have the opposite sign: a cost is a negative reward.")
    if hint is not None:
        return judgement("wrong scale", hint)
    if bias**2 > 0.5 * error**2:
        return judgement(
            "biased", f"the reward is predicted {bias:+.3g} off on average: a constant term is missing or too much."
        )
    verdict = "worse than a constant" if error >= std else "rough"
    return judgement(verdict, "check the terms of the reward, and whether it is of the state before or after the step.")


@th.no_grad()
def _judge_terminal(model: PriorModel, windows: Windows) -> tuple[tuple[int, int], str | None]:
    """
    :param model: the model, in evaluation mode
    :param windows: the records
    :return: numbers of missed and of false terminations, and how to fix them
    """
    predicted = model.terminal(model.state_from_observation(windows.next_observations[0]))
    n_missed = int((windows.terminated & ~predicted).sum())
    n_false = int((predicted & ~windows.terminated).sum())
    if n_missed == n_false == 0:
        return (0, 0), None
    return (n_missed, n_false), (
        f"`terminal` misses {n_missed} of {int(windows.terminated.sum())} recorded terminations and reports {n_false} that "
        "were none: it must be true in the states where the environment returns terminated=True, and nowhere else."
    )
