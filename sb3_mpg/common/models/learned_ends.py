"""Where episodes terminate, learned from the recorded terminations."""

import math

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.ensemble import Members, NetworkEnsemble, even_rows

# With fewer recorded terminations, the model's own are used
MIN_ENDS = 10
# Number of steps of the optimizer before learned terminations are judged
N_FITS = 500
# Share of the terminated steps in the loss, whatever their share of the recorded steps is
SHARE_IN_LOSS = 0.25
# Number of steps by which terminated episodes are continued
N_STEPS_BEYOND = 2
# Probabilities are rounded to 0 and 1 by so much, so that many safe steps do not add up to a termination
ROUNDING = 0.02


class LearnedEnds(nn.Module):
    r"""
    The probability that an episode terminates in a state: a small ensemble of networks, fitted to recorded terminations.

    The derivative of a rollout with respect to its actions sees the end of an episode only if the probability changes over
    about as wide a range of states as one step crosses; otherwise all its steps lie on one side or the other. So the networks
    are fitted to states that are blurred by the step that led there, see :func:`blurred`.

    :param n_states: number of dimensions of a state
    :param n_members: number of networks
    :param learning_rate: learning rate of Adam
    :param net_arch: sizes of the hidden layers of each network, with ELU
    """

    log_odds: th.Tensor
    is_on: th.Tensor

    def __init__(self, n_states: int, n_members: int, learning_rate: float, net_arch: tuple[int, ...] = (32, 32)):
        super().__init__()
        self.networks = NetworkEnsemble(n_members, n_states, 1, net_arch, learning_rate)
        # Added to the outputs of the networks, because the loss contains more terminated steps than were recorded
        self.register_buffer("log_odds", th.zeros(()))
        self.register_buffer("is_on", th.zeros((), dtype=th.bool))
        #: Whether they replace the terminations of the prior model. A plain attribute, so that nothing is compiled for models
        #: that do without; a copy of the buffer, see :meth:`refresh`
        self.is_used = False

    def refresh(self) -> None:
        """After ``is_on`` was written to."""
        self.is_used = bool(self.is_on)

    def use(self, is_used: bool) -> None:
        """
        :param is_used: whether they replace the terminations of the prior model
        """
        self.is_on.fill_(is_used)
        self.refresh()

    def forward(self, scaled: th.Tensor, members: Members) -> th.Tensor:
        """
        :param scaled: scaled states, ``(B, S)``
        :param members: which members predict
        :return: probabilities that an episode terminates there, ``(B, 1)``
        """
        probabilities = th.sigmoid(self.networks(scaled, members) + self.log_odds)
        return ((probabilities - ROUNDING) / (1 - 2 * ROUNDING)).clamp(0, 1)

    def reset(self) -> None:
        """Forget what was learned, because states are scaled otherwise from now on."""
        self.networks.reset_outputs()

    def fit(self, others: th.Tensor, ends: th.Tensor, rate: float) -> float:
        """
        One step of the optimizer. The rows are dealt to the members.

        :param others: blurred states in which no episode terminated, scaled and finite, ``(B, S)``
        :param ends: the same of terminated steps, see :func:`blurred`, ``(N, S)``
        :param rate: terminations for each recorded step
        :return: the loss
        """
        n_members = self.networks.n_members
        # Each termination stands for several states
        odds = (1 + N_STEPS_BEYOND) * rate / (1 - rate)
        self.log_odds.fill_(math.log(odds * (1 - SHARE_IN_LOSS) / SHARE_IN_LOSS))
        inputs, labels, weights = [], [], []
        for states, label, share in ((others, 0.0, 1 - SHARE_IN_LOSS), (ends, 1.0, SHARE_IN_LOSS)):
            rows = even_rows(states, n_members).reshape(n_members, -1, states.shape[1])
            inputs.append(rows)
            labels.append(th.full_like(rows[..., :1], label))
            weights.append(th.full_like(rows[..., :1], share / rows.shape[1]))
        outputs = self.networks(th.cat(inputs, dim=1).flatten(0, 1), "dealt", is_fitting=True)
        targets, shares = (th.cat(parts, dim=1).flatten(0, 1) for parts in (labels, weights))
        loss = F.binary_cross_entropy_with_logits(outputs, targets, shares, reduction="sum") / n_members
        self.networks.descend(loss)
        return loss.item()


def blurred(prior: PriorModel, states: th.Tensor, next_states: th.Tensor, is_end: bool) -> th.Tensor:
    """
    :param prior: the model whose states they are
    :param states: states before a step, ``(B, S)``
    :param next_states: states after it, ``(B, S)``
    :param is_end: whether the step terminated. The same step is then repeated up to ``N_STEPS_BEYOND`` times, because all
        states beyond an end are ends as well, but none of them was recorded
    :return: next states blurred by the step, ``(B, S)``
    """
    step = prior.state_difference(next_states, states)
    factors = th.randn_like(step[:, :1])
    if is_end:
        factors = factors + th.randint(1 + N_STEPS_BEYOND, factors.shape, device=factors.device)
    return prior.state_add(next_states, factors * step)
