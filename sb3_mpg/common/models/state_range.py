"""The range of recorded states."""

import torch as th
from torch import nn

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.windows import Transitions

# Predictions may leave the range of the data by this share of its width
MARGIN = 0.5
# The same for predictions of the prior model, before they are corrected
PRIOR_MARGIN = 10.0


class StateRange(nn.Module):
    """
    Keeps predicted states within the range of recorded ones and a margin. A rollout that leaves it is a guess, and one that
    explodes would dominate the gradient.

    There is no margin beyond states in which episodes ended, because no recorded transition starts there.

    :param n_states: number of dimensions of a state
    """

    start_low: th.Tensor
    start_high: th.Tensor
    next_low: th.Tensor
    next_high: th.Tensor
    low: th.Tensor
    high: th.Tensor
    middle: th.Tensor

    def __init__(self, n_states: int):
        super().__init__()
        for name, value in (
            # Of the states in which recorded transitions start
            ("start_low", float("inf")),
            ("start_high", -float("inf")),
            # Of their next states
            ("next_low", float("inf")),
            ("next_high", -float("inf")),
            # Where predictions are clipped
            ("low", -float("inf")),
            ("high", float("inf")),
            ("middle", 0.0),
        ):
            self.register_buffer(name, th.full((n_states,), value))

    @th.no_grad()
    def extend(self, prior: PriorModel, transitions: Transitions, is_observed: th.Tensor | None = None) -> None:
        """
        Extend the range, so that it contains some transitions.

        :param prior: the model whose states they are
        :param transitions: recorded transitions; values that are not finite are ignored
        :param is_observed: dimensions that have a range, bool ``(S,)``; the others are never clipped. All by default
        """
        for observations, low, high in (
            (transitions.observations, self.start_low, self.start_high),
            (transitions.next_observations, self.next_low, self.next_high),
        ):
            states = prior.state_from_observation(observations)
            is_finite = th.isfinite(states)
            low.copy_(th.minimum(low, th.where(is_finite, states, th.inf).amin(dim=0)))
            high.copy_(th.maximum(high, th.where(is_finite, states, -th.inf).amax(dim=0)))
        margin = MARGIN * (self.start_high - self.start_low)
        low = th.minimum(self.start_low - margin, self.next_low)
        high = th.maximum(self.start_high + margin, self.next_high)
        if is_observed is not None:
            low, high = th.where(is_observed, low, -float("inf")), th.where(is_observed, high, float("inf"))
        self.low.copy_(low)
        self.high.copy_(high)
        self.middle.copy_(0.5 * (self.start_low + self.start_high))

    def clip(self, prior: PriorModel, states: th.Tensor, is_wide: bool = False) -> th.Tensor:
        """
        :param prior: the model whose states they are
        :param states: ``(B, S)``
        :param is_wide: whether the range is as wide as that of :meth:`clip_prior`
        :return: the states within the range, ``(B, S)``
        """
        if type(prior).state_difference is not PriorModel.state_difference:
            # A periodic state may be whole turns away from the range
            middle = self.middle.expand_as(states)
            wrapped = prior.state_add(middle, prior.state_difference(states, middle))
            states = th.where((states < self.low) | (states > self.high), wrapped, states)
        return self.clip_prior(states) if is_wide else states.clamp(self.low, self.high)

    def clip_prior(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: predictions of the prior model, ``(B, S)``
        :return: the states within a much wider range, ``(B, S)``, so that a few extreme predictions do not dominate the fit
        """
        more = (PRIOR_MARGIN - MARGIN) / (1 + 2 * MARGIN) * (self.high - self.low)
        return states.clamp(self.low - more, self.high + more)
