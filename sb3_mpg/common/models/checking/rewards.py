"""What is wrong with the reward and with the terminations of a model."""

from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.findings import Cost, Finding
from sb3_mpg.common.models.checking.gradients import judge_reward_gradient
from sb3_mpg.common.models.checking.recording import Recording
from sb3_mpg.common.models.checking.verdicts import GOOD_RELATIVE_ERROR, is_wrong_scale, scale_factor
from sb3_mpg.common.models.learned_ends import MIN_ENDS
from sb3_mpg.common.models.terminations import MAX_MISJUDGED_ENDS, ends_matter, looks_like_time_limit
from sb3_mpg.common.models.windows import Windows, rms, rounding_errors, to_numpy
from sb3_mpg.common.tables import format_share


class RewardJudgement(NamedTuple):
    """
    :param rms_error: RMS error of the reward of recorded transitions
    :param bias: mean of predicted minus actual reward
    :param std: standard deviation of the actual reward
    :param verdict: on its errors and its gradient
    :param findings: what is wrong with them
    """

    rms_error: float
    bias: float
    std: float
    verdict: str
    findings: list[Finding]


@th.no_grad()
def judge_reward(model: PriorModel, windows: Windows) -> RewardJudgement:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :return: its errors of the reward
    """
    states = model.state_from_observation(windows.observations)
    next_states = model.state_from_observation(windows.next_observations[0])
    predicted = to_numpy(model.reward(states, windows.actions[0], next_states))[:, 0]
    actual = to_numpy(windows.rewards[0])[:, 0]
    error, bias, std = float(rms(predicted - actual)), float((predicted - actual).mean()), float(actual.std())
    is_right = error <= max(GOOD_RELATIVE_ERROR * std, float(rounding_errors(actual)))
    of_errors = [] if is_right else [_judge_wrong_reward(predicted, actual)]
    # A constant reward has no gradient: that is said already
    of_gradient = [] if any(part.verdict == "constant" for part in of_errors) else judge_reward_gradient(model, windows)
    if not is_right:
        # The correction changes a wrong reward, and so its gradient
        of_gradient = [part._replace(cost=Cost.REWARD) if part.cost is Cost.SILENT else part for part in of_gradient]
    verdicts = [finding.verdict for finding in of_errors] or ["good"]
    verdicts += [finding.verdict for finding in of_gradient if finding.verdict not in verdicts]
    return RewardJudgement(error, bias, std, ", ".join(verdicts), [*of_errors, *of_gradient])


def _judge_wrong_reward(predicted: np.ndarray, actual: np.ndarray) -> Finding:
    """
    :param predicted: predicted rewards, ``(B,)``
    :param actual: recorded rewards, ``(B,)``
    :return: what is wrong with the predicted ones
    """
    error, bias = float(rms(predicted - actual)), float((predicted - actual).mean())
    if not np.isfinite(error):
        percent = 100 * (1 - np.isfinite(predicted).mean())
        hint = f"the reward is not finite at {percent:.2g}% of the recorded steps: "
        return Finding(Cost.NOT_FINITE, "not finite", f"{hint}clamp the inputs of roots, logarithms and divisions.")
    if np.ptp(predicted) == 0 and np.ptp(actual) > 0:
        hint = f"the predicted reward is {predicted[0] + 0.0:.3g} everywhere, the actual one is not: write it in `reward`."
        return Finding(Cost.REWARD, "constant", hint)
    if float(rms(actual + predicted)) < 0.5 * error:
        hint = "the reward seems to have the opposite sign: a cost is a negative reward."
        return Finding(Cost.WRONG_SIGN, "wrong sign", hint)
    factor = scale_factor(actual, predicted)
    if is_wrong_scale(factor):
        hint = f"the reward is {factor:.3g} times what the model predicts: check units, signs and the length of a step."
        return Finding(Cost.REWARD, "wrong scale", hint)
    if bias**2 > 0.5 * error**2:
        hint = f"the reward is predicted {bias:+.3g} off on average: a constant term is missing or too much."
        return Finding(Cost.REWARD, "biased", hint)
    std = float(actual.std())
    size = (
        f"{error:.3g} off ({format_share(error / std, digits=0)} of its standard deviation)" if std > 0 else f"{error:.3g} off"
    )
    hint = f"the reward is {size}: check its terms, and whether it is of the state before or after the step."
    return Finding(Cost.REWARD, "worse than a constant" if error >= std else "rough", hint)


@th.no_grad()
def judge_terminal(model: PriorModel, recording: Recording, horizon: int) -> tuple[tuple[int, int], list[Finding]]:
    """
    :param model: the model, in evaluation mode
    :param recording: recorded windows
    :param horizon: number of model steps of rollouts
    :return: numbers of missed and of false terminations, and what follows
    """
    windows = recording.windows
    predicted = model.terminal(model.state_from_observation(windows.next_observations[0]))
    n_steps, n_ends = windows.terminated.numel(), int(windows.terminated.sum())
    is_missed = (windows.terminated & ~predicted)[:, 0].cpu().numpy()
    n_missed, n_false = int(is_missed.sum()), int((predicted & ~windows.terminated).sum())
    if n_missed == n_false == 0:
        return (0, 0), []
    misses = n_missed > MAX_MISJUDGED_ENDS * n_ends and ends_matter(n_ends / n_steps, horizon)
    spoils = misses or n_false > MAX_MISJUDGED_ENDS * (n_steps - n_ends)
    cost = Cost.SPOILT_ROLLOUTS if spoils else Cost.TERMINATIONS
    time_limit = looks_like_time_limit(recording.steps[is_missed].tolist())
    if time_limit is not None:
        n_limits = int((recording.steps[is_missed] == time_limit).sum())
        hint = (
            f"{n_limits} of {n_ends} recorded terminations come after {time_limit} steps of an episode, and `terminal` misses "
            "them: this looks like a time limit, which states do not show. Behind a time limit the episode would go on: the "
            "environment must return terminated=False and truncated=True there, as gymnasium.wrappers.TimeLimit does. A "
            "wrapper can mend an environment that counts by itself. Training does not learn time limits."
        )
        return (n_missed, n_false), [Finding(cost, "", hint)]
    are_equal = len(set(recording.steps[is_missed].tolist())) == 1
    consequence = "With measured weights, the model weighs less. " if spoils else ""
    consequence += f"A corrected model learns terminations once {MIN_ENDS} of them are recorded"
    advice = "If this is a time limit, the environment must return truncated=True instead." if are_equal else ""
    hint = (
        f"`terminal` misses {n_missed} of {n_ends} recorded terminations and reports {n_false} that were none: it must be "
        f"true in the states where the environment returns terminated=True, and nowhere else. {consequence}. {advice}"
    )
    return (n_missed, n_false), [Finding(cost, "", hint.rstrip())]
