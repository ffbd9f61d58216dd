"""Sums over processes that have the same bits on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Their names since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_all_to_all = dist.all_to_all_single

#: Elements up to which every rank gets all ranks' numbers in one message. It saves a message, which takes longer.
FEW = 1024


def sum_in_order(numbers: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over a group of each number: `numbers`, of one dimension, has as many elements on all ranks.

    It is formed in the order of the ranks. An all-reduce may add up in another order in each group: a last bit that
    differs, in clip coefficients and factors, and replicas that drift apart.
    """
    world = dist.get_world_size(group)
    if numbers.numel() <= FEW:
        everything = numbers.new_empty(world * numbers.numel())
        _all_gather(everything, numbers.contiguous(), group=group)
        return everything.view(world, -1).sum(0)
    # Each rank adds up a part, and then sends it to all: twice the numbers in all, however many ranks there are.
    padded = torch.nn.functional.pad(numbers, (0, -numbers.numel() % world))
    parts = torch.empty_like(padded)
    _all_to_all(parts, padded, group=group)
    _all_gather(padded, parts.view(world, -1).sum(0), group=group)
    return padded[: numbers.numel()]
