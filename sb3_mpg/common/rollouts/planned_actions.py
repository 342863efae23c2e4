"""Imitation of plans."""

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mpg.common.utils import gradient_of

# The policy imitates only what at least so many planned steps say
MIN_PLANNED_STEPS = 50
# Root mean square of the differences to planned actions, in [-1, 1] units, below which the imitation fades
FAR_FROM_PLANS = 0.3


class PlannedActions(nn.Module):
    """
    The latest planned steps that were taken. They are buffers, which reach learner processes with the model.

    :param n_elements: number of elements of an observation
    :param n_actions: number of dimensions of an action
    :param size: number of steps that are kept
    """

    observations: th.Tensor
    actions: th.Tensor
    n_added: th.Tensor

    def __init__(self, n_elements: int, n_actions: int, size: int = 1000):
        super().__init__()
        self.register_buffer("observations", th.zeros(size, n_elements))
        self.register_buffer("actions", th.zeros(size, n_actions))
        self.register_buffer("n_added", th.zeros((), dtype=th.int64))

    def __len__(self) -> int:
        return min(int(self.n_added), len(self.actions))

    def add(self, observation: th.Tensor, action: th.Tensor) -> None:
        """
        :param observation: raw observation, ``(O,)``
        :param action: in [-1, 1], ``(A,)``
        """
        row = int(self.n_added) % len(self.actions)
        self.observations[row], self.actions[row] = observation, action
        self.n_added += 1

    def restore(self, state: dict[str, th.Tensor] | None) -> None:
        """
        :param state: state dictionary of an earlier object, or ``None``; ignored if it is of other spaces
        """
        own = self.state_dict()
        if state is not None and all(state[name].shape == tensor.shape for name, tensor in own.items()):
            self.load_state_dict(state)

    def sample(self, n_steps: int) -> tuple[th.Tensor, th.Tensor]:
        """
        :param n_steps: number of steps, drawn with replacement
        :return: raw observations, ``(n_steps, O)``, and actions in [-1, 1], ``(n_steps, A)``
        """
        rows = th.randint(len(self), (n_steps,), device=self.actions.device)
        return self.observations[rows], self.actions[rows]


def with_imitation(
    gradients: list[th.Tensor], actor: nn.Module, network_inputs: th.Tensor, planned: th.Tensor, share: float
) -> list[th.Tensor]:
    r"""
    Mix a policy gradient :math:`g` with the gradient :math:`b` of the mean squared difference to planned actions,

    .. math:: (1 - \beta) \, g + \beta \, \min(d / d_0, 1) \, \frac{|g|}{|b|} \, b.

    Both have the same norm, because only their directions can be compared. As the policy comes close to the plans, so that the
    difference :math:`d` falls below ``FAR_FROM_PLANS``, the second part fades.

    :param gradients: the policy gradient, one tensor for each trainable parameter of the actor
    :param actor: the policy
    :param network_inputs: normalised observations of planned steps, ``(B, O)``
    :param planned: the planned actions, in [-1, 1], ``(B, A)``
    :param share: share of the imitation :math:`\beta`, from 0 to 1
    :return: the mixed gradient
    """
    loss = F.mse_loss(actor(network_inputs), planned)
    imitation = gradient_of(loss, actor)
    norm, norm_of_imitation = (th.stack(th._foreach_norm(part)).norm() for part in (gradients, imitation))
    if norm_of_imitation == 0:
        return gradients
    # Where the policy gradient is silent, the imitation has its own norm
    scale = norm / norm_of_imitation if norm > 0 else th.ones_like(norm)
    scale = scale * (loss.detach().sqrt() / FAR_FROM_PLANS).clamp(max=1)
    return [(1 - share) * gradient + share * scale * part for gradient, part in zip(gradients, imitation, strict=True)]
