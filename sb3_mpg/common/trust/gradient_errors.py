r"""
Errors of the gradients: estimates, during training, of the errors that Theorem 2 of the papers bounds.

The unified policy gradient (eq. 6) is :math:`\nabla_\theta \pi(s) \, \nabla_a X_n(s, a)`, and only the second factor depends
on model and critic. So errors are estimated for the action gradients :math:`g_n(s) = \nabla_a X_n(s, a)|_{a = \pi(s)}`.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mpg.common.models.trainable import CorrectedModel, TrainableModel
from sb3_mpg.common.models.windows import Transitions
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.rollouts.steps import QFunction, RolloutContext
from sb3_mpg.common.trust.terminations import LITTLE_TRUST
from sb3_mpg.common.trust.variation import BLIND, PERTURBATION, Perturbed, Variation, measure_variation

# A cross-validated model is excluded when its squared error is more than this multiple of the squared gradient
USELESS_ERROR = 3.0
# It is also excluded when its squared gradient is less than this share of the squared gradient of the corrected model
SILENT_GRADIENT = 0.01
# A model is reported as blind at this measurement of it: a correction that has not learned much may be blind for a while
REPORTED_BLIND = 3


class GradientErrors(NamedTuple):
    """
    Squared errors of the action gradients of each horizon. They are medians over states, which a few diverging rollouts do
    not change.

    :param horizons: numbers of model steps
    :param errors: error of each horizon, ``(n_horizons,)``
    :param standard_errors: standard errors of these medians, ``(n_horizons,)``
    :param gradient_norm: median of the squared norm of the action gradient, for the model horizon of the smallest error
    :param is_useless: whether the gradient of a horizon is wrong or nearly zero, see :func:`gradient_errors`,
        ``(n_horizons,)``
    :param variation: how much of the variation of the returns the derivatives explain; ``None`` if that is not known
    :param trust_in_returns: trust in the returns of the longest rollouts, from 0 to 1, see :func:`trust_in_returns`
    :param trust_in_ends: trust in the model's terminations, from 0 to 1, see
        :func:`~sb3_mpg.common.trust.terminations.trust_in_ends`
    """

    horizons: tuple[int, ...]
    errors: np.ndarray
    standard_errors: np.ndarray
    gradient_norm: float
    is_useless: np.ndarray
    variation: Variation | None = None
    trust_in_returns: float = 0.0
    trust_in_ends: float = 1.0

    @property
    def misjudges_ends(self) -> bool:
        """Whether the model is wrong about terminations."""
        return self.trust_in_ends < LITTLE_TRUST

    @property
    def is_blind(self) -> np.ndarray:
        """
        Whether a model horizon has a derivative that does not explain how its returns vary, ``(n_horizons,)``. Rollouts that
        overflow are not blind.
        """
        if self.variation is None:
            return np.zeros(len(self.horizons), dtype=bool)
        return (self.variation.explained < BLIND) & (np.array(self.horizons) > 0) & np.isfinite(self.errors)

    @property
    def misses_jumps(self) -> bool:
        """Whether all model horizons are blind although returns vary."""
        models = np.array(self.horizons) > 0
        if self.variation is None or not models.any():
            return False
        return bool(self.is_blind[models].all() and self.variation.varies[models].any())

    @property
    def is_excluded(self) -> np.ndarray:
        """Whether a horizon is excluded regardless of its measured error, ``(n_horizons,)``."""
        return self.is_useless | self.is_blind | ((self.trust_in_ends == 0) & (np.array(self.horizons) > 0))


class ActionGradients(NamedTuple):
    """
    Independent estimates of the action gradient at the same states, and what shows whether they can be believed.

    :param gradients: NaN where the return is not finite, ``(n_horizons, E, B, A)``
    :param perturbed: returns and their changes when the first action is perturbed, ``(n_horizons, E, B)``
    """

    gradients: np.ndarray
    perturbed: Perturbed


def action_gradients(
    observations: th.Tensor, context: RolloutContext, q_functions: Sequence[QFunction], horizons: Sequence[int]
) -> ActionGradients:
    r"""
    Independent estimates of :math:`\nabla_a X_n(s, a)` at the same states. The rows of the batch are repeated once for each
    critic. An ensemble deals rows to its members in equal parts, so that each member is paired with one critic.

    The first actions are perturbed as well, by ``PERTURBATION`` in a random direction of each state.

    :param observations: raw observations, ``(B, O)``
    :param context: policy, model with dealt members, units, discount factor and steps
    :param q_functions: :math:`E` critics
    :param horizons: numbers of model steps
    :return: the action gradients
    """
    n_critics, n_states = len(q_functions), len(observations)
    repeated = observations.repeat(n_critics, 1)

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
        gradients.append(gradient.reshape(n_critics, n_states, -1))
    stacked = th.stack(gradients)
    with th.no_grad():
        chosen = actions.detach().reshape(n_critics, n_states, -1)
        signs = 2.0 * th.randint_like(chosen[0], 2) - 1.0
        # Both directions in the part of the batch of the same member
        pairs = th.stack([(chosen + step * signs).clamp(-1, 1) for step in (PERTURBATION, -PERTURBATION)], dim=1)
        rollouts = model_rollout(observations.repeat(2 * n_critics, 1), paired, horizons, first_actions=pairs.flatten(0, 2))
        before = th.stack([returns[horizon].detach().reshape(n_critics, n_states) for horizon in horizons])
        after = th.stack([rollouts[horizon].reshape(n_critics, 2, n_states) for horizon in horizons])
        linear = (stacked * (pairs[:, 0] - pairs[:, 1]) / 2).sum(dim=-1)
        changes = (after - before.unsqueeze(2)).cpu().numpy()
    perturbed = Perturbed(before.cpu().numpy(), changes[:, :, 0], changes[:, :, 1], linear.cpu().numpy())
    return ActionGradients(stacked.cpu().numpy(), perturbed)


def _median(values: np.ndarray) -> tuple[float, float]:
    """
    :param values: ``(B,)``; non-finite values count as infinite
    :return: the median, and its standard error from the distance between the order statistics around it
    """
    values = np.sort(np.where(np.isfinite(values), values, np.inf))
    n_values = len(values)
    half_width = np.sqrt(n_values) / 2  # of one standard deviation, in ranks
    low, high = values[max(int(n_values / 2 - half_width), 0)], values[min(int(n_values / 2 + half_width), n_values - 1)]
    return float(np.median(values)), float((high - low) / 2) if np.isfinite(high) else float("inf")


def gradient_errors(gradients: np.ndarray, horizons: Sequence[int], with_judge: bool = False) -> GradientErrors:
    r"""
    Estimate errors by comparing estimates of the action gradient.

    The error of a horizon is first estimated from two members of the ensemble, each with its own critic:
    :math:`d_n = \mathrm{median}_s |g_n^1 - g_n^2|^2 / 2`. Critics share data and targets, so their errors are correlated and
    their difference is too small. The shorter a horizon, the more of its gradient comes from the critic. So it is also
    compared with all longer ones, the errors of which are subtracted:
    :math:`e_n = \max(d_n, \; \max_{m > n} \mathrm{median}_s |\bar g_n - \bar g_m|^2 - e_m)`.

    With a judge, the first member is the model that is used, and the second is a better one, which only judges. Their whole
    difference is the error of the first (no factor 1/2), and the critics are compared with the second. This error of the model
    is a bias, which more updates do not average out, unlike the noise of the critics. A horizon is therefore useless

    - if its error is more than ``USELESS_ERROR`` times the squared gradient. The ratio is 4 for a gradient of the opposite
      direction, and larger for a gradient that is much too large. Noise alone gives 2 where the gradient vanishes.
    - if its gradient is nearly zero (``SILENT_GRADIENT``), as in a model without an effect of the actions. The ratio is then
      only 1, as for critics that have not learned yet; but the critics will learn.

    :param gradients: what :func:`action_gradients` returned, ``(n_horizons, 2, B, A)``
    :param horizons: numbers of model steps, ascending
    :param with_judge: whether the second member judges the first
    :return: the errors
    """
    with np.errstate(all="ignore"):
        # Compare the two members at each horizon
        differences = ((gradients[:, 0] - gradients[:, -1]) ** 2).sum(-1)  # (n_horizons, B)
        shares = [1.0 if with_judge and horizon > 0 else 0.5 for horizon in horizons]
        medians = [_median(share * values) for share, values in zip(shares, differences, strict=True)]
        errors, standard_errors = (np.array(column) for column in zip(*medians, strict=True))
        means = gradients.mean(axis=1)  # (n_horizons, B, A)
        references = gradients[:, -1] if with_judge else means
        models = [index for index, horizon in enumerate(horizons) if horizon > 0]
        best = min(models, key=lambda index: errors[index]) if models else 0
        # Compare each horizon with longer ones. A judge has compared all model horizons already: only the critics are left
        n_compared = len(horizons) - 1 if not with_judge else int(horizons[0] == 0 and len(models) > 0)
        for index in reversed(range(n_compared)):
            for other in [best] if with_judge else range(index + 1, len(horizons)):
                distance, distance_error = _median(((means[index] - references[other]) ** 2).sum(-1))
                if not with_judge:
                    distance -= errors[other]
                    distance_error = float(np.hypot(distance_error, standard_errors[other]))
                if distance > errors[index]:
                    errors[index], standard_errors[index] = distance, distance_error
        best = min(models, key=lambda index: errors[index]) if models else 0
        gradient_norm, _ = _median((references[best] ** 2).sum(-1))
        norms = np.array([_median((gradient**2).sum(-1))[0] for gradient in gradients[:, 0]])
    # Find useless horizons
    is_judged = np.array([with_judge and horizon > 0 for horizon in horizons])
    is_wrong, is_silent = errors > USELESS_ERROR * gradient_norm, norms < SILENT_GRADIENT * gradient_norm
    is_useless = is_judged & np.isfinite(errors) & (is_wrong | is_silent)
    return GradientErrors(tuple(horizons), errors, standard_errors, gradient_norm, is_useless)


def measure_gradient_errors(
    gradients: Callable[[], ActionGradients],
    model: TrainableModel,
    horizons: Sequence[int],
    judges_prior: bool,
    held_out_steps: Callable[[], Transitions | None],
) -> GradientErrors:
    """
    Measure the errors of the action gradients of a model, or of the prior model in it.

    :param gradients: computes the action gradients with the present state of the model, see :func:`action_gradients`
    :param model: the model, in training mode
    :param horizons: numbers of model steps, ascending
    :param judges_prior: whether rollouts use the prior model; a ``CorrectedModel`` then only judges it
    :param held_out_steps: returns held-out transitions, ``None`` while there are none
    :return: the errors
    """
    judged = model if judges_prior and isinstance(model, CorrectedModel) else None
    with nullcontext() if judged is None else judged.compared_with_prior():
        compared = gradients()
    measured = gradient_errors(compared.gradients, horizons, with_judge=judged is not None)
    if judged is not None and measured.is_useless.any():
        # The corrected model may only judge the prior model if it predicts held-out transitions better
        held_out = held_out_steps()
        if held_out is None or not judged.improves_on_prior(held_out):
            measured = measured._replace(is_useless=np.zeros_like(measured.is_useless))
    perturbed = compared.perturbed
    if judged is not None:
        # Rollouts use the first member only
        perturbed = Perturbed(*(values[:, :1] for values in perturbed))
    return measured._replace(
        variation=measure_variation(perturbed),
        trust_in_returns=trust_in_returns(compared.perturbed.returns[-1]),
    )


def trust_in_returns(returns: np.ndarray) -> float:
    """
    :param returns: returns of the same states with each member and its critic, ``(E, B)``
    :return: share of the variance over states that the first and the last member agree on, from 0 to 1
    """
    is_finite = np.isfinite(returns).all(axis=0)
    if 2 * is_finite.sum() < is_finite.size:
        return 0.0
    first, last = returns[0, is_finite], returns[-1, is_finite]
    disagreement = ((first - last) ** 2).mean() / 2
    variance = ((first + last) / 2).var()
    return float(np.clip(1 - disagreement / variance, 0.0, 1.0)) if variance > 0 else 0.0


def warn_of_errors(measured: GradientErrors, model_name: str, earlier: Sequence[GradientErrors]) -> None:
    """
    Warn of an excluded or overflowing model, once for each reason.

    :param measured: the errors
    :param model_name: the user's name of the model
    :param earlier: earlier measurements
    """
    if measured.misjudges_ends and not any(before.misjudges_ends for before in earlier):
        warnings.warn(
            f"`{model_name}.terminal` does not know where episodes terminate: it misses recorded terminations, or is true at "
            f"other steps. That spoils {1 - measured.trust_in_ends:.0%} of the rollouts, and their weight is as much less: "
            "horizon 0 takes their place, if it is among the horizons. `terminal` must be true where the environment returns "
            "terminated=True; `check_prior_model` compares the two. Terminations are learned once enough are recorded."
        )
    if measured.is_useless.any() and not any(before.is_useless.any() for before in earlier):
        warnings.warn(
            f"{model_name} is excluded: its gradient is far from that of the model corrected by what was recorded. Until it "
            "is closer, horizon 0 takes its place, if it is among the horizons. `residual=True` corrects the model, "
            "`check_prior_model` finds out what is wrong."
        )
    # A model that is useless for another reason was reported above
    is_new_reason = measured.misses_jumps and not any(each.is_useless.any() for each in (*earlier, measured))
    if is_new_reason and sum(before.misses_jumps for before in earlier) == REPORTED_BLIND - 1:
        warnings.warn(
            f"The derivative of the returns of {model_name} does not show how they vary: rewards or terminations jump. "
            "The gradient of the model gets no weight until that changes. If the model is corrected (`residual=True`), the "
            "critics learn from rollouts with perturbed actions instead. Smooth the reward near the jump, or let it fall "
            "before an episode ends, so that the gradient counts."
        )
    if not np.isfinite(measured.errors).all() and all(np.isfinite(before.errors).all() for before in earlier):
        pairs = zip(measured.horizons, measured.errors, strict=True)
        overflowing = ", ".join(str(horizon) for horizon, error in pairs if not np.isfinite(error))
        warnings.warn(
            f"The gradient of {model_name} over {overflowing} steps is not finite at most states; its weight is 0 "
            "until it is. Add a shorter horizon, as in horizons=(0, 5, 25), and look for what overflows with "
            "`check_prior_model`."
        )
