"""Helpers."""

from collections.abc import Iterable

import torch as th


@th.no_grad()
def polyak_update_all(parameters: Iterable[th.Tensor], target_parameters: Iterable[th.Tensor], tau: float) -> None:
    """
    SB3's ``polyak_update`` in one call for all tensors, which for small networks costs a tenth.

    :param parameters: what the targets follow
    :param target_parameters: what is moved, in place
    :param tau: by which share, between 0 and 1
    """
    th._foreach_lerp_(list(target_parameters), list(parameters), tau)
