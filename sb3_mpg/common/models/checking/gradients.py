"""Where the gradients of a model vanish, along recorded steps: what is flat teaches a policy nothing."""

from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.findings import Cost, Finding
from sb3_mpg.common.models.windows import MIN_WINDOWS, Windows, rounding_errors, to_numpy

# Each recorded state is also visited with this many actions of other records
N_OTHER_ACTIONS = 3
# A gradient vanishes if it is below this share of a typical one
VANISHING = 1e-6
# A reward, or an action, without gradient at this share of the records deserves a hint
FLAT_SHARE = 0.1
# Rewards jump if their gradient leaves this share of their variation unexplained
JUMP_SHARE = 0.5
# Points of the quadrature between two consecutive steps
N_NODES = 8

SMOOTH_REWARD = (
    "Reward something smooth, such as minus the squared distance to the goal, or replace comparisons by `th.sigmoid`; in the "
    "environment too, because the correction learns the reward of the environment."
)
ENDS_ARE_JUMPS = "Returns differ by when episodes terminate, and a derivative does not see that either."


class _Points(NamedTuple):
    """
    Arguments of ``reward``.

    :param states: ``(B, S)``
    :param actions: ``(B, A)``
    :param next_states: ``(B, S)``
    """

    states: th.Tensor
    actions: th.Tensor
    next_states: th.Tensor


class _Gradients(NamedTuple):
    """
    :param outputs: one for each row, ``(B,)``
    :param inputs: gradients with respect to each input, zero where the output does not depend on it, each ``(B, n)``
    """

    outputs: np.ndarray
    inputs: tuple[np.ndarray, ...]

    @property
    def is_broken(self) -> np.ndarray:
        """Which rows have a finite output and a gradient that is not finite, ``(B,)``."""
        return np.isfinite(self.outputs) & ~np.isfinite(np.concatenate(self.inputs, axis=1)).all(axis=1)

    @property
    def is_finite(self) -> np.ndarray:
        """Which rows are finite, ``(B,)``."""
        return np.isfinite(self.outputs) & ~self.is_broken

    def select(self, is_kept: np.ndarray) -> "_Gradients":
        """
        :param is_kept: which rows, bool ``(B,)``
        :return: these rows
        """
        return _Gradients(self.outputs[is_kept], tuple(part[is_kept] for part in self.inputs))


def _gradients(outputs: th.Tensor, inputs: tuple[th.Tensor, ...]) -> _Gradients:
    """
    :param outputs: computed row by row from the inputs, ``(B, 1)``
    :param inputs: each ``(B, n)``
    :return: the outputs and their gradients
    """
    gradients: list[th.Tensor | None] = [None] * len(inputs)
    if outputs.requires_grad:
        gradients = list(th.autograd.grad(outputs.sum(), inputs, allow_unused=True))
    return _Gradients(
        to_numpy(outputs.detach())[:, 0],
        tuple(to_numpy(th.zeros_like(part) if grad is None else grad) for part, grad in zip(inputs, gradients, strict=True)),
    )


@th.enable_grad()
def _reward_gradients(model: PriorModel, points: _Points) -> _Gradients:
    """
    :param model: the model, in evaluation mode
    :param points: ``B`` of them
    :return: rewards and their gradients with respect to states, actions and next states
    """
    points = _Points(*(part.detach().clone().requires_grad_() for part in points))
    return _gradients(model.reward(*points), points)


@th.no_grad()
def _visited_points(model: PriorModel, windows: Windows) -> _Points:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :return: the recorded steps, and steps of the model from the same states with other actions
    """
    states, actions = model.state_from_observation(windows.observations), windows.actions[0]
    parts = [_Points(states, actions, model.state_from_observation(windows.next_observations[0]))]
    for number in range(1, N_OTHER_ACTIONS + 1):
        others = actions.roll(number * len(actions) // (N_OTHER_ACTIONS + 1), dims=0)
        parts.append(_Points(states, others, model.transition(states, others)))
    return _Points(*(th.cat(tensors) for tensors in zip(*parts, strict=True)))


@th.no_grad()
def _jumping_share(model: PriorModel, windows: Windows) -> float:
    """
    The integral of the gradient from one step to the next one is the difference of their rewards, unless the reward jumps in
    between.

    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :return: share of the mean squared difference that the gradient misses. Steps to terminal states do not count.
    """
    recorded = [windows.observations, *windows.next_observations[:2]]
    if len(recorded) < 3:
        return 0.0
    states, next_states, later_states = (model.state_from_observation(observations) for observations in recorded)
    starts = _Points(states, windows.actions[0], next_states)
    ends = _Points(next_states, windows.actions[1], later_states)
    goes_on = ~(model.terminal(next_states) | model.terminal(later_states))[:, 0] & (windows.lengths > 1)
    if int(goes_on.sum()) < MIN_WINDOWS:
        return 0.0
    starts, ends = (_Points(*(part[goes_on] for part in points)) for points in (starts, ends))
    differences = to_numpy(model.reward(*ends) - model.reward(*starts))[:, 0]
    integrals = np.zeros_like(differences)
    for node, weight in zip(*np.polynomial.legendre.leggauss(N_NODES), strict=True):
        points = _Points(*(start + (1 + node) / 2 * (end - start) for start, end in zip(starts, ends, strict=True)))
        slopes = _reward_gradients(model, points).inputs
        paths = (to_numpy(end - start) for start, end in zip(starts, ends, strict=True))
        integrals += weight / 2 * sum((slope * path).sum(axis=1) for slope, path in zip(slopes, paths, strict=True))
    is_finite = np.isfinite(differences) & np.isfinite(integrals)
    power = (differences[is_finite] ** 2).mean() if is_finite.any() else 0.0
    return float(((differences - integrals)[is_finite] ** 2).mean() / power) if power > 0 else 0.0


def _vanishing(*gradients: np.ndarray) -> np.ndarray:
    """
    :param gradients: with respect to different inputs, each ``(B, n)``
    :return: where all of them are zero, or next to zero, ``(B,)``
    """
    sizes = np.linalg.norm(np.concatenate(gradients, axis=1), axis=1)
    return sizes <= (VANISHING * np.median(sizes[sizes > 0]) if sizes.any() else 0.0)


def _not_finite(method: str, gradients: _Gradients) -> Finding:
    """
    :param method: name of a method
    :param gradients: its gradients, some of which are not finite
    :return: the finding
    """
    hint = (
        f"the gradient of `{method}` is not finite at {100 * gradients.is_broken.mean():.2g}% of the checked steps, which "
        "training masks: look for roots, norms and divisions at zero, and add a small constant inside."
    )
    return Finding(Cost.NOT_FINITE, "gradient not finite", hint)


def judge_reward_gradient(model: PriorModel, windows: Windows) -> list[Finding]:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :return: what is wrong with the gradient of the reward
    """
    points = _visited_points(model, windows)
    gradients = _reward_gradients(model, points)
    is_finite = gradients.is_finite
    findings = [_not_finite("reward", gradients)] if gradients.is_broken.any() else []
    if is_finite.any():
        points = _Points(*(part[th.as_tensor(is_finite, device=part.device)] for part in points))
        flat = _judge_flat_reward(model, points, gradients.select(is_finite)) or _judge_jumps(model, windows)
        findings += [] if flat is None else [flat]
    return findings


def _judge_flat_reward(model: PriorModel, points: _Points, gradients: _Gradients) -> Finding | None:
    """
    :param model: the model, in evaluation mode
    :param points: ``B`` of them
    :param gradients: rewards at these points, and their gradients
    :return: where the gradient vanishes, if it does
    """
    is_flat, is_flat_in_actions = _vanishing(gradients.inputs[0], gradients.inputs[2]), _vanishing(gradients.inputs[1])
    everywhere = f"at all {len(is_flat)} checked steps"
    if not is_flat.all():
        if is_flat.mean() < FLAT_SHARE:
            return None
        percent = 100 * is_flat.mean()
        nothing = "nothing there" if is_flat_in_actions[is_flat].all() else "nothing there but which actions are cheap"
        hint = (
            f"the gradient of the reward with respect to states vanishes at {percent:.0f}% of the checked steps, as if it "
            f"were clipped or had a dead zone: the rewards of the model teach the policy {nothing}. {SMOOTH_REWARD}"
        )
        return Finding(Cost.FLAT, f"flat at {percent:.0f}%", hint)
    with th.no_grad():
        ends = model.may_terminate and bool(model.terminal(points.next_states).any())
        moved = model.reward(points.states.roll(1, dims=0), points.actions, points.next_states.roll(1, dims=0))
    rounding = rounding_errors(gradients.outputs)
    remedy = f"{ENDS_ARE_JUMPS} {SMOOTH_REWARD}" if ends else SMOOTH_REWARD
    if not is_flat_in_actions.all():
        cause = (
            f"the reward depends on actions alone {everywhere}, and not on states (does it have a goal that random actions do "
            "not reach?)"
        )
        if (np.abs(to_numpy(moved)[:, 0] - gradients.outputs) > rounding).any():
            cause = f"the reward is piecewise constant in the states: its gradient with respect to them is zero {everywhere}"
        hint = f"{cause}, so the rewards of the model teach the policy nothing but which actions are cheap. {remedy}"
        return Finding(Cost.SILENT, "flat in states", hint)
    verdict, cause = "constant", f"the reward is {gradients.outputs[0] + 0.0:.3g} {everywhere}"
    if np.ptp(gradients.outputs) > rounding:
        verdict = "piecewise constant"
        cause = f"the reward is piecewise constant: its gradient is zero almost everywhere ({everywhere})"
    return Finding(Cost.SILENT, verdict, f"{cause}, so the rewards of the model add nothing to the policy gradient. {remedy}")


def _judge_jumps(model: PriorModel, windows: Windows) -> Finding | None:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :return: that the reward jumps more than it changes smoothly, if it does
    """
    share = _jumping_share(model, windows)
    if share < JUMP_SHARE:
        return None
    hint = (
        f"{100 * share:.0f}% of the variation of the reward from step to step is in jumps, which its gradient does not show: "
        f"the policy gradient of the model knows the rest alone. {SMOOTH_REWARD}"
    )
    return Finding(Cost.FLAT, "jumps", hint)


def judge_transition_gradient(model: PriorModel, windows: Windows) -> list[Finding]:
    """
    :param model: the model, in evaluation mode
    :param windows: recorded windows
    :return: actions that move states in the model without a gradient, or with none in many states; and gradients that are
        not finite
    """
    with th.no_grad():
        states = model.state_from_observation(windows.observations)
    inputs = (states.detach().clone().requires_grad_(), windows.actions[0].detach().clone().requires_grad_())
    with th.enable_grad():
        next_states = model.transition(*inputs)
    # Random factors, so that opposite effects on two dimensions do not cancel
    factors = th.as_tensor(np.random.default_rng(0).normal(size=next_states.shape[1]), dtype=next_states.dtype)
    gradients = _gradients((next_states * factors.to(next_states.device)).sum(dim=1, keepdim=True), inputs)
    is_finite = gradients.is_finite
    findings = [_not_finite("transition", gradients)] if gradients.is_broken.any() else []
    for action_dim in range(inputs[1].shape[1]):
        others = windows.actions[0].clone()
        others[:, action_dim] = others[:, action_dim].roll(1)
        with th.no_grad():
            is_moved = (model.transition(states, others) != next_states).any(dim=1).cpu().numpy()[is_finite]
        is_flat = _vanishing(gradients.inputs[1][is_finite, action_dim : action_dim + 1])
        if not is_finite.any() or (is_flat & is_moved).mean() < FLAT_SHARE:
            continue
        where = "everywhere" if is_flat.all() else f"at {100 * is_flat.mean():.0f}% of the recorded steps"
        hint = (
            f"action {action_dim} moves states in the model, but the gradient of `transition` with respect to it is zero "
            f"{where}, and a policy learns from the gradient alone: replace signs, rounding, clipping and comparisons."
        )
        findings.append(Finding(Cost.SILENT if is_flat.all() else Cost.FLAT, "", hint))
    return findings
