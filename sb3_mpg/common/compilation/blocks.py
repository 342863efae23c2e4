"""Batches of all sizes as blocks of one size."""

from collections.abc import Sequence
from typing import NamedTuple

import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.ensemble import even_rows
from sb3_mpg.common.models.trainable import TrainableModel


class Blocks(NamedTuple):
    """
    Parts of a batch that have the same number of rows, so that steps are compiled once for batches of all sizes. Each member
    of an ensemble has as many rows in each block as the others. Where a batch cannot be dealt in equal parts, rows are
    repeated: torch's compiler (2.13, on a CPU) would not write the last rows of a batch that is not divisible by the number of
    members.

    :param n_rows: number of rows of the batch :math:`B`
    :param n_members: number of members of the model :math:`E`, 1 for a model without members
    :param n_each: number of rows of each member in a block :math:`R`
    """

    n_rows: int
    n_members: int
    n_each: int

    @classmethod
    def of(cls, n_rows: int, model: PriorModel, n_rows_of_block: int | None) -> "Blocks":
        """
        :param n_rows: number of rows of a batch
        :param model: the model
        :param n_rows_of_block: number of rows of a block, rounded up to a multiple of the number of members; ``None`` for one
            block
        :return: the blocks of the batch
        """
        n_members = model.n_members if isinstance(model, TrainableModel) else 1
        return cls(n_rows, n_members, -(-(n_rows_of_block or n_rows) // n_members))

    def split(self, tensor: th.Tensor) -> list[th.Tensor]:
        """
        :param tensor: a batch, ``(B, F)``
        :return: its blocks, contiguous, ``(E * R, F)`` each; the last row of each member is repeated in the last one
        """
        if self.n_rows == self.n_members * self.n_each:
            return [tensor.contiguous()]
        rows = even_rows(tensor, self.n_members).reshape(self.n_members, -1, tensor.shape[1])
        rows = even_rows(rows.transpose(0, 1), self.n_each)
        blocks = rows.reshape(-1, self.n_each, self.n_members, tensor.shape[1]).transpose(1, 2)
        return [block.flatten(0, 1).contiguous() for block in blocks.unbind()]

    def join(self, blocks: Sequence[th.Tensor], dim: int = 0) -> th.Tensor:
        """
        :param blocks: results of the blocks, with their rows in dimension ``dim``
        :param dim: a dimension
        :return: results of the batch
        """
        if self.n_rows == self.n_members * self.n_each:
            return blocks[0]
        # Of each member the rows of all blocks, without those that were added
        shaped = [block.unflatten(dim, (self.n_members, self.n_each)) for block in blocks]
        rows = th.cat(shaped, dim=dim + 1).narrow(dim + 1, 0, -(-self.n_rows // self.n_members))
        return rows.flatten(dim, dim + 1).narrow(dim, 0, self.n_rows)
