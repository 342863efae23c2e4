"""What ``check_prior_model`` reports."""

from dataclasses import dataclass

import numpy as np

from sb3_mpg.common.tables import format_number, format_share, format_table

# Rows of the printed table; the dimensions with the largest errors are shown
MAX_TABLE_ROWS = 30
MAX_HINTS = 10


@dataclass(frozen=True)
class PriorModelReport:
    """
    How well a prior model predicts an environment under uniformly random actions. ``O`` is the number of observation
    dimensions, ``H`` the number of prediction steps. Row ``k - 1`` is about predictions ``k`` steps ahead, open loop,
    along the recorded actions. Printing the report prints a table.

    :param dimensions: names of the observation dimensions
    :param n_windows: number of recorded windows behind each row, ``(H,)``
    :param rms_errors: RMS prediction errors, ``(H, O)``; infinite when a prediction is not finite
    :param biases: mean of predicted minus actual, ``(H, O)``
    :param rms_changes: RMS of the actual change over as many steps, which is the error of predicting no change, ``(H, O)``
    :param action_gains: effect of each action in the environment, divided by its effect in the model, on each
        observation dimension after one step, ``(A, O)``: 1 is right, a negative gain is the wrong sign, an infinite one an
        effect that the model does not have; NaN is unknown
    :param verdicts: one for each dimension: what costs most of what was found
    :param reward_rms_error: RMS error of the reward of recorded transitions
    :param reward_bias: mean of predicted minus actual reward
    :param reward_std: standard deviation of the actual reward
    :param reward_verdict: verdict on the reward, and on its gradient if that vanishes
    :param terminal_errors: number of terminations that the model misses, and number of steps that it terminates wrongly
    :param requested_horizon: number of steps that should have been checked; ``H`` is smaller when episodes are short
    :param supported_horizon: the largest horizon up to which the model beats predicting no change, all dimensions together
    :param hints: how to fix what is wrong, the most costly first, in the order of ``Cost``. Dimensions with the same cause
        share a hint.
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
        """RMS errors divided by the RMS of the actual change over as many steps, ``(H, O)``."""
        return relative(self.rms_errors, self.rms_changes)

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
                row += [format_number(self.rms_errors[step - 1, idx])]
                row += [format_number(self.biases[0, idx], "+.2g")] if step == 1 else []
                row += [format_share(relative_errors[step - 1, idx])]
            rows.append([*row, self.verdicts[idx]])
        relative_reward_error = float(relative(np.array(self.reward_rms_error), np.array(self.reward_std)))
        reward_row = ["reward", format_number(self.reward_rms_error), format_number(self.reward_bias, "+.2g")]
        reward_row.append(f"{format_share(relative_reward_error)} *")
        rows.append([*reward_row, *[""] * (2 * len(steps)), self.reward_verdict])
        limit = ""
        if self.supported_horizon < horizon:
            limit = f", limited by {self.dimensions[relative_errors[self.supported_horizon].argmax()]}"
        n_omitted = len(self.dimensions) - len(shown)
        windows = ", ".join(f"{self.n_windows[step - 1]} of {step}" for step in [1, *steps])
        return "\n".join(
            [
                "Errors of the prior model under random actions (RMS, open loop)",
                *format_table(rows),
                *([f"... and {n_omitted} dimensions with smaller errors"] if n_omitted > 0 else []),
                f"of change: divided by the actual change over as many steps (* by the reward's standard deviation); "
                f"100% is as bad as predicting no change. Recorded windows: {windows} steps.",
                f"Missed terminations: {self.terminal_errors[0]}, false terminations: {self.terminal_errors[1]}",
                f"The model beats predicting no change for horizons up to {self.supported_horizon}{limit} "
                f"({horizon} steps were checked"
                + (", the episodes were too short for more)" if horizon < self.requested_horizon else ")"),
                *(f"How to fix: {hint}" for hint in self.hints[:MAX_HINTS]),
                *([f"... and {len(self.hints) - MAX_HINTS} more hints"] if len(self.hints) > MAX_HINTS else []),
            ]
        )


def relative(errors: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """
    :param errors: any shape
    :param scales: what they are divided by, of the same shape
    :return: the quotients: zero without error, infinite when only the scale is zero
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(errors == 0, 0.0, np.where(scales == 0, np.inf, errors / scales))
