"""Where the parts of a parameter lie that engines spread over several processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor


class Block(NamedTuple):
    """Elements of a whole parameter: in each dimension `shape` of them, from `start` on."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


class Placement(NamedTuple):
    """This process's part of a parameter."""

    local: Tensor  # what the kernels update
    shard: tuple[int, int, int] | None = None  # where it lies in the whole parameter, as the operators take it
    weight: float = 1.0  # of its squared norm in the sum over all ranks: one over the number of copies
    groups: tuple[dist.ProcessGroup, ...] = ()  # one after the other they reach the ranks that have the other parts
    blocks: tuple[Block, ...] | None = None  # what it consists of, in memory's order; None: all, or (if cut) not known


def local_of(param: Tensor) -> Tensor:
    """The part of a parameter that is in this process's memory: the local shard of a DTensor or of DeepSpeed's ZeRO-3
    (padded there), otherwise itself."""
    return getattr(param, "ds_tensor", getattr(param, "_local_tensor", param))


def is_here(param: Tensor) -> bool:
    """Whether this process has a part of the parameter, if only an empty one: whether a DTensor's mesh contains it."""
    mesh = getattr(param, "device_mesh", None)
    return mesh is None or mesh.get_coordinate() is not None


def shape_of(param: Tensor) -> Sequence[int]:
    """The shape of the whole parameter."""
    return getattr(param, "ds_shape", param.shape)


def blocks_of_range(shape: Sequence[int], begin: int, end: int) -> tuple[Block, ...]:
    """The fewest blocks that elements `begin` to `end` of a flattened tensor consist of, in their order: of a matrix,
    the rest of a row, whole rows, and the beginning of a row."""
    if begin >= end:
        return ()
    if not shape:
        return (Block((), ()),)
    inner = math.prod(shape[1:])

    def within(index: int, first: int, last: int) -> tuple[Block, ...]:
        """A part of the slice with this index."""
        blocks = blocks_of_range(shape[1:], first - index * inner, last - index * inner)
        return tuple(Block((index, *block.start), (1, *block.shape)) for block in blocks)

    first, last = -(-begin // inner), end // inner  # whole slices
    if first > last:
        return within(last, begin, end)
    whole = [Block((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))] if first < last else []
    return (*within(first - 1, begin, first * inner), *whole, *within(last, last * inner, end))
