"""Applies gradients: clipping, optimizer steps and target networks."""

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch as th

from sb3_mpg.common.checks import check_count, check_number
from sb3_mpg.common.type_aliases import GradientResult
from sb3_mpg.common.utils import clip_norm, copy_running_stats, optimizer_of, polyak_update_all, trainable_parameters


class OptimizerSteps:
    """
    Clips gradients, steps the optimizers and updates the target networks. An update with a non-finite gradient is skipped and
    counted.

    :param max_grad_norm: largest norm of the gradient of each network, ``None`` for no limit
    :param max_skipped_updates: how many updates in a row may be skipped before training stops
    """

    def __init__(self, max_grad_norm: float | None, max_skipped_updates: int):
        self.max_grad_norm = max_grad_norm
        self.max_skipped_updates = max_skipped_updates
        self.n_skipped_updates = 0
        self.n_skipped_in_a_row = 0

    def check(self) -> None:
        """
        :raises ValueError: for impossible values
        """
        check_count("max_skipped_updates", self.max_skipped_updates, 0)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, 0.0, includes_low=False)

    def check_skipped(self, find_reason: Callable[[], str]) -> None:
        """
        Called after an update was skipped.

        :param find_reason: finds out why, and what to do
        :raises FloatingPointError: when too many updates in a row were skipped
        """
        if self.n_skipped_in_a_row > self.max_skipped_updates:
            raise FloatingPointError(
                f"Training stopped after {self.n_skipped_in_a_row} updates in a row with a non-finite gradient (the weights "
                f"are still finite and can be saved). {find_reason()}"
            )

    def apply(
        self,
        result: GradientResult,
        networks: Mapping[str, th.nn.Module],
        target_networks: Mapping[str, th.nn.Module],
        tau: float,
    ) -> bool:
        """
        :param result: the gradients; their norms are added to its logs
        :param networks: the networks by name, each with its ``optimizer``
        :param target_networks: the target networks, by the name of the network that they follow; they are updated only when
            there are gradients of all networks
        :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
        :return: whether the gradients were applied
        """
        max_norm = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        is_finite = True
        for name, gradients in result.gradients.items():
            for parameter, gradient in zip(trainable_parameters(networks[name]), gradients, strict=True):
                parameter.grad = gradient
            norm = clip_norm(gradients, max_norm)
            is_finite = is_finite and bool(np.isfinite(norm))
            result.logs[f"train/{name}_grad_norm"] = norm
            result.logs[f"train/{name}_grad_norm_clipped"] = min(norm, max_norm)

        if not is_finite:
            if self.n_skipped_updates == 0:
                warnings.warn("An update was skipped because its gradient is not finite; `train/skipped_updates` counts them.")
            self.n_skipped_updates += 1
            self.n_skipped_in_a_row += 1
            return False

        for name in result.gradients:
            optimizer_of(networks[name]).step()
        # Delayed policy updates
        if result.gradients.keys() == networks.keys():
            # Only updates of all networks end a row of failures: the others do not step the model
            self.n_skipped_in_a_row = 0
            for name, target in target_networks.items():
                polyak_update_all(networks[name].parameters(), target.parameters(), tau)
            for name, target in target_networks.items():
                copy_running_stats(networks[name], target)
        return True
