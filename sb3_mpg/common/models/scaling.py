"""Scales that are taken from data."""

import torch as th
from torch import nn


class Standardizer(nn.Module):
    """
    Subtracts the mean of the data and divides by their standard deviation. Does nothing until it is fitted.

    :param n_inputs: number of inputs
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, n_inputs: int):
        super().__init__()
        self.register_buffer("mean", th.zeros(n_inputs))
        self.register_buffer("std", th.ones(n_inputs))

    def fit(self, inputs: th.Tensor) -> None:
        """
        :param inputs: the data, ``(B, n_inputs)``
        """
        self.mean.copy_(inputs.mean(dim=0))
        # A dimension that never changed keeps its scale, so that small changes later are not blown up
        std = inputs.std(dim=0) if len(inputs) > 1 else th.zeros_like(self.std)
        self.std.copy_(th.where(std > 1e-6 * (1 + inputs.abs().mean(dim=0)), std, 1.0))

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: ``(B, n_inputs)``
        :return: ``(B, n_inputs)``
        """
        return (inputs - self.mean) / self.std
