r"""
How wrong the gradients are: estimates of what Theorem 2 of the papers bounds, from what is at hand while training.

The unified policy gradient (eq. 6) is :math:`\nabla_\theta \pi(s) \, \nabla_a X_n(s, a)`; only the second factor depends on
model and critic. So the errors are those of the action gradients :math:`g_n(s) = \nabla_a X_n(s, a)|_{a = \pi(s)}`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mpg.common.buffers import RecordedSteps
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.rollouts.steps import QFunction, RolloutContext
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.trainable import CorrectedModel, TrainableModel
from sb3_mpg.common.models.windows import Transitions

# How large the error of a judged model must be, over the square of the gradient, for it to be left out
USELESS_ERROR = 3.0
# A judged model whose squared gradient is less than this share of what it should be says nothing
SILENT_GRADIENT = 0.01
# Where episodes terminate is looked up at so many steps; a model that is wrong at more than this share does not know
N_JUDGED_ENDS = 256
MAX_MISJUDGED_ENDS = 0.5
# Terminations that fewer rollouts than this share would come to do not matter
MATTERING_ENDS = 0.1


class GradientErrors(NamedTuple):
    """
    Squared errors of the action gradients of some horizons, medians over states: a few rollouts that explode must not
    decide.

    :param horizons: numbers of model steps
    :param errors: one for each horizon, ``(n_horizons,)``
    :param standard_errors: of these medians, ``(n_horizons,)``
    :param gradient_norm: median of the squared norm of the gradient of the best horizon of a model
    :param is_useless: whether the gradient of a horizon is further from what it should be than none at all, or next to none,
        ``(n_horizons,)``
    :param misjudges_ends: whether the model does not know where episodes terminate, see :func:`misjudges_ends`
    """

    horizons: tuple[int, ...]
    errors: np.ndarray
    standard_errors: np.ndarray
    gradient_norm: float
    is_useless: np.ndarray
    misjudges_ends: bool = False

    @property
    def is_excluded(self) -> np.ndarray:
        """Whether a horizon is excluded, whatever its measured error, ``(n_horizons,)``."""
        return self.is_useless | (self.misjudges_ends & (np.array(self.horizons) > 0))


@th.no_grad()
def misjudges_ends(model: PriorModel, recorded: RecordedSteps, horizon: int) -> bool:
    """
    Whether a model does not know where episodes terminate. Its errors would not show that: the members of an ensemble agree
    on what none of them knows, and no correction of the next state and the reward makes up for it.

    :param model: the model
    :param recorded: the recorded steps
    :param horizon: number of model steps of its rollouts
    :return: whether it misses most of the terminations that were recorded, if there are enough of them to matter, or says that
        most of the steps terminated that did not
    """

    def share_misjudged(terminated: bool) -> float:
        observations = recorded.observed_last(N_JUDGED_ENDS, terminated)
        if observations is None:
            return 0.0
        predicted = model.terminal(model.state_from_observation(observations))
        return (predicted != terminated).float().mean().item()

    if recorded.termination_rate() * horizon > MATTERING_ENDS and share_misjudged(True) > MAX_MISJUDGED_ENDS:
        return True
    return model.may_terminate and share_misjudged(False) > MAX_MISJUDGED_ENDS


def action_gradients(
    observations: th.Tensor, context: RolloutContext, q_functions: Sequence[QFunction], horizons: Sequence[int]
) -> th.Tensor:
    r"""
    Several estimates of :math:`\nabla_a X_n(s, a)` at the same states. The rows of the batch are repeated once for each
    critic. An ensemble deals rows to its members in equal parts, so that each member is paired with a critic of its own.

    :param observations: raw observations, ``(B, *obs_shape)``
    :param context: policy, model with dealt members, units, discount factor and steps
    :param q_functions: :math:`E` critics
    :param horizons: numbers of model steps
    :return: ``(n_horizons, E, B, A)``
    """
    n_critics = len(q_functions)
    repeated = observations.repeat(n_critics, *[1] * (observations.ndim - 1))

    def q_function(network_inputs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        parts = zip(q_functions, network_inputs.chunk(n_critics), actions.chunk(n_critics), strict=True)
        return th.cat([q(inputs, action) for q, inputs, action in parts])

    with th.no_grad():
        actions = context.actor(context.units.normalize_observations(repeated))
    actions.requires_grad_()
    paired = context._replace(q_function=q_function)
    returns = model_rollout(repeated, paired, horizons, "first_action", first_actions=actions)
    gradients = []
    for index, horizon in enumerate(horizons):
        keep = index + 1 < len(horizons)
        (gradient,) = th.autograd.grad(returns[horizon].sum(), actions, retain_graph=keep)
        # A non-finite return has no meaningful gradient
        gradient = th.where(th.isfinite(returns[horizon].detach()), gradient, th.nan)
        gradients.append(gradient.reshape(n_critics, observations.shape[0], -1))
    return th.stack(gradients)


def _median(values: np.ndarray) -> tuple[float, float]:
    """
    :param values: ``(B,)``, some perhaps not finite, which count as infinite
    :return: the median and its standard error, from the distance of the order statistics around it
    """
    values = np.sort(np.where(np.isfinite(values), values, np.inf))
    n_values = len(values)
    half_width = np.sqrt(n_values) / 2  # of one standard deviation, in ranks
    low, high = values[max(int(n_values / 2 - half_width), 0)], values[min(int(n_values / 2 + half_width), n_values - 1)]
    return float(np.median(values)), float((high - low) / 2) if np.isfinite(high) else float("inf")


def gradient_errors(gradients: np.ndarray, horizons: Sequence[int], with_judge: bool = False) -> GradientErrors:
    r"""
    Judge estimates of the action gradient by one another.

    A model horizon is judged by the difference of two members of the ensemble, each with its own critic:
    :math:`e_n = \mathrm{median}_s |g_n^1 - g_n^2|^2 / 2`. The critics share data and targets, so that their errors agree and
    their difference says too little; their gradient is judged against the best model horizon too, as far as that one
    agrees with itself:
    :math:`e_0 = \max(\mathrm{median}_s |g_0^1 - g_0^2|^2 / 2, \; \mathrm{median}_s |\bar g_0 - \bar g_n|^2 - e_n)`.

    With a judge, the second member is better than the first, which alone is used: all of their difference is the error of
    the first, and the critics are judged by the second. What that tells of the model is a bias, which no number of updates
    averages out, as they do the noise of the critics. A horizon is of no use when its error is ``USELESS_ERROR`` times the
    square of the gradient itself, as it is of the opposite direction (4) or much too large: noise alone gives 2, where the
    gradient vanishes. Nor is it when it is silent, as that of a model that knows of no effect of the actions: its error is 1,
    no more than that of critics that know as little, but they learn.

    :param gradients: of :func:`action_gradients`, ``(n_horizons, 2, B, A)``
    :param horizons: numbers of model steps, ascending
    :param with_judge: whether the last member is there to judge the first
    :return: the errors
    """
    with np.errstate(all="ignore"):
        differences = ((gradients[:, 0] - gradients[:, -1]) ** 2).sum(-1)  # (n_horizons, B)
        shares = [1.0 if with_judge and horizon > 0 else 0.5 for horizon in horizons]
        medians = [_median(share * values) for share, values in zip(shares, differences, strict=True)]
        errors, standard_errors = (np.array(column) for column in zip(*medians, strict=True))
        means = gradients.mean(axis=1)  # (n_horizons, B, A)
        references = gradients[:, -1] if with_judge else means
        models = [index for index, horizon in enumerate(horizons) if horizon > 0]
        best = min(models, key=lambda index: errors[index]) if models else 0
        if 0 in horizons and models:
            critic = list(horizons).index(0)
            distance, distance_error = _median(((means[critic] - references[best]) ** 2).sum(-1))
            if not with_judge:
                distance -= errors[best]
                distance_error = float(np.hypot(distance_error, standard_errors[best]))
            if distance > errors[critic]:
                errors[critic], standard_errors[critic] = distance, distance_error
        gradient_norm, _ = _median((references[best] ** 2).sum(-1))
        norms = np.array([_median((gradient**2).sum(-1))[0] for gradient in gradients[:, 0]])
    is_judged = np.array([with_judge and horizon > 0 for horizon in horizons])
    is_wrong, is_silent = errors > USELESS_ERROR * gradient_norm, norms < SILENT_GRADIENT * gradient_norm
    is_useless = is_judged & np.isfinite(errors) & (is_wrong | is_silent)
    return GradientErrors(tuple(horizons), errors, standard_errors, gradient_norm, is_useless)


def measure_gradient_errors(
    gradients: Callable[[], th.Tensor],
    model: TrainableModel,
    horizons: Sequence[int],
    judges_prior: bool,
    held_out_steps: Callable[[], Transitions | None],
) -> GradientErrors:
    """
    The errors of the action gradients of a model, or of the prior model in it.

    :param gradients: gives those of the model as it is when it is called, see :func:`action_gradients`
    :param model: the model, in training mode
    :param horizons: numbers of model steps, ascending
    :param judges_prior: whether the rollouts are those of a prior model, which the corrected model, a ``CorrectedModel``,
        only judges
    :param held_out_steps: gives held-out transitions, ``None`` while there are none
    :return: the errors
    """
    if not (judges_prior and isinstance(model, CorrectedModel)):
        return gradient_errors(gradients().cpu().numpy(), horizons)
    with model.compared_with_prior():
        compared = gradients()
    measured = gradient_errors(compared.cpu().numpy(), horizons, with_judge=True)
    if measured.is_useless.any():
        # The corrected model may only judge the prior model if it predicts held-out transitions better
        held_out = held_out_steps()
        if held_out is None or not model.improves_on_prior(held_out):
            measured = measured._replace(is_useless=np.zeros_like(measured.is_useless))
    return measured


def warn_of_errors(measured: GradientErrors, model_name: str, earlier: Sequence[GradientErrors]) -> None:
    """
    Say what is wrong, the first time that it is.

    :param measured: the errors
    :param model_name: what the user calls the model
    :param earlier: what was measured before
    """
    if measured.misjudges_ends and not any(before.misjudges_ends for before in earlier):
        warnings.warn(
            f"`{model_name}.terminal` does not know where episodes terminate: it misses most of the recorded terminations, or "
            "takes most other steps for some. Until it does, horizon 0 takes the place of the model, if it is among the "
            "horizons. It must be true where the environment returns terminated=True; `check_prior_model` compares the two."
        )
    if measured.is_useless.any() and not any(before.is_useless.any() for before in earlier):
        warnings.warn(
            f"{model_name} is of no use: its gradient is far from that of the model corrected by what was recorded. "
            "Until it is not, horizon 0 takes its place, if it is among the horizons. `residual=True` corrects the model, "
            "`check_prior_model` finds out what is wrong."
        )
    if not np.isfinite(measured.errors).all() and all(np.isfinite(before.errors).all() for before in earlier):
        pairs = zip(measured.horizons, measured.errors, strict=True)
        overflowing = ", ".join(str(horizon) for horizon, error in pairs if not np.isfinite(error))
        warnings.warn(
            f"The gradient of {model_name} over {overflowing} steps is not finite at most states; it weighs nothing "
            "until it is. Shorter horizons beside may be of use, such as horizons=(0, 5, 25). Look for what overflows with "
            "`check_prior_model`."
        )
