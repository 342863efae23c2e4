"""How well a model knows where episodes terminate."""

from typing import NamedTuple

import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.windows import Transitions

# By how much more learned terminations may be wrong than those of the prior model; in return, rollouts have a derivative there
TOLERANCES = (0.1, 0.02)


class MisjudgedEnds(NamedTuple):
    """
    :param missed: share of the recorded terminations that the model predicts neither there nor one step later
    :param invented: share of the other steps at which the model predicts a termination
    """

    missed: float
    invented: float

    def is_as_good_as(self, other: "MisjudgedEnds") -> bool:
        """
        :param other: the same of other terminations
        :return: whether these are wrong at hardly any more steps
        """
        return all(own <= its + tolerance for own, its, tolerance in zip(self, other, TOLERANCES, strict=True))


@th.no_grad()
def misjudged_ends(model: PriorModel, ends: Transitions | None, others: Transitions | None) -> MisjudgedEnds:
    """
    :param model: the model, in evaluation mode
    :param ends: recorded steps that terminated, ``None`` if there are none
    :param others: recorded steps that did not, ``None`` if there are none
    :return: at which of them the model is wrong
    """
    missed = invented = 0.0
    if ends is not None:
        states = model.state_from_observation(ends.next_observations)
        later_states = model.step(states, ends.actions)[0]
        missed = 1 - (model.terminal(states) | model.terminal(later_states)).float().mean().item()
    if others is not None:
        invented = model.terminal(model.state_from_observation(others.next_observations)).float().mean().item()
    return MisjudgedEnds(missed, invented)
