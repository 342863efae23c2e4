"""Dimensions of a model's state that observations do not show."""

from collections.abc import Callable, Sequence

import torch as th
from torch import nn

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.windows import Windows, rollout_errors


class HiddenStates(nn.Module):
    """
    Decides what happens in a rollout to hidden dimensions: those of which observations tell nothing. Latent state is either
    kept, as the prior model predicts it, or re-encoded: computed in each step from the observation of the predicted state,
    as it is at the start of a rollout.

    :param n_states: number of dimensions of a state
    """

    is_observed: th.Tensor
    is_kept: th.Tensor

    def __init__(self, n_states: int):
        super().__init__()
        self.register_buffer("is_observed", th.ones(n_states, dtype=th.bool))
        self.register_buffer("is_kept", th.ones(n_states, dtype=th.bool))
        # A plain attribute, so that no encoding is compiled where none is needed
        self.re_encodes = False

    def refresh(self) -> None:
        """After ``is_kept`` was written to."""
        self.re_encodes = not bool(self.is_kept.all())

    def keep_all_but(self, dimensions: Sequence[int] = ()) -> None:
        """
        :param dimensions: the dimensions that are re-encoded in each step; all others are kept
        """
        self.is_kept.fill_(True)
        self.is_kept[list(dimensions)] = False
        self.refresh()

    def find(self, prior: PriorModel, states: th.Tensor, actions: th.Tensor) -> None:
        """
        Find the hidden dimensions: those that change when a predicted state is re-encoded. All dimensions are kept then.

        :param prior: the prior model
        :param states: ``(B, S)``
        :param actions: ``(B, A)``
        """
        predicted = prior.transition(states, actions)
        gaps = prior.state_difference(prior.state_from_observation(prior.observation(predicted)), predicted).abs()
        is_same = gaps <= 1e-3 * (1 + predicted.abs())
        is_finite = th.isfinite(gaps)
        self.is_observed.copy_(2 * (is_same & is_finite).sum(dim=0) >= is_finite.sum(dim=0))
        self.keep_all_but()

    def re_encode(self, prior: PriorModel, states: th.Tensor) -> th.Tensor:
        """
        :param prior: the prior model
        :param states: predicted states, ``(B, S)``
        :return: the same, with re-encoded dimensions where latent state is not kept, ``(B, S)``
        """
        if not self.re_encodes:
            return states
        return th.where(self.is_kept, states, prior.state_from_observation(prior.observation(states)))

    def choose(self, error: Callable[[], float]) -> None:
        """
        Choose which hidden dimensions are re-encoded: greedily, as long as rollouts become better, the dimension first that
        improves them most alone. All hidden dimensions together are tried, too.

        :param error: measures the error of rollouts for the present choice
        """
        self.keep_all_but()
        hidden = th.nonzero(~self.is_observed).flatten().tolist()
        if len(hidden) in (0, len(self.is_observed)):
            return  # nothing to re-encode, or no observed dimension to judge by
        errors: dict[frozenset[int], float] = {}

        def error_of(dimensions: Sequence[int]) -> float:
            key = frozenset(dimensions)
            if key not in errors:
                self.keep_all_but(dimensions)
                errors[key] = error()
            return errors[key]

        chosen: list[int] = []
        least = error_of(chosen)
        errors_alone = {dimension: error_of([dimension]) for dimension in hidden}
        for dimension in sorted(hidden, key=lambda dimension: errors_alone[dimension]):
            candidate = error_of([*chosen, dimension])
            if candidate < least:
                chosen, least = [*chosen, dimension], candidate
        self.keep_all_but(hidden if error_of(hidden) < least else chosen)


def clipped_rollout_error(model: PriorModel, windows: Windows, dimensions: th.Tensor, scales: th.Tensor) -> float:
    """
    :param model: the model
    :param windows: recorded trajectory segments
    :param dimensions: which dimensions of the state count, bool ``(S,)``
    :param scales: one for each dimension, ``(S,)``
    :return: mean squared error of scaled predictions of open-loop rollouts; each squared error is clipped to 1, so that a few
        diverging rollouts do not dominate
    """
    total = 0.0
    for step in rollout_errors(model, windows):
        errors = (step.errors / scales)[:, dimensions].square().nan_to_num(nan=1.0).clamp(max=1.0).mean(dim=1)
        total += float(errors[step.is_recorded].sum())
    return total / float(windows.lengths.sum())
