"""Whether tensors of one call share memory, of which one is written. ``csrc/overlap.h`` states the same in C++."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Access(IntEnum):
    """What a call does with a tensor. Slots are added to, and two gradients may have one slot."""

    READ = 0
    ADDED = 1
    WRITTEN = 2


class Region(NamedTuple):
    """Where a tensor's elements lie, in bytes: `size` of them each, from `begin` to before `end`."""

    begin: int
    end: int
    size: int
    dims: tuple[tuple[int, int], ...]  # (stride, elements), largest stride first
    dense: bool  # every byte in between is an element's
    access: Access
    name: str


def reach(tensor: Tensor) -> tuple[int, int]:
    """First and one past the last byte that the elements lie in. Strides of tensors are not negative."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may lie in the same place (an expanded tensor, say)."""
    far = 0
    for stride, n in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= far:
            return True
        far += stride * (n - 1)
    return False


def region(tensor: Tensor, access: Access, name: str) -> Region:
    size = tensor.element_size()
    if tensor.is_contiguous():
        begin, numel = tensor.data_ptr(), tensor.numel()
        return Region(begin, begin + numel * size, size, ((size, numel),), True, access, name)
    begin, end = reach(tensor)
    dense = end - begin == tensor.numel() * size and not overlaps_itself(tensor)
    if dense:
        return Region(begin, end, size, ((size, tensor.numel()),), True, access, name)
    shape = zip(tensor.stride(), tensor.shape, strict=True)
    dims = tuple(sorted(((stride * size, n) for stride, n in shape if n > 1), reverse=True))
    return Region(begin, end, size, dims, False, access, name)


def regions(access: Access, name: str, tensors: Iterable[Tensor]) -> list[Region]:
    """Those of tensors that have elements."""
    return [region(tensor, access, name) for tensor in tensors if tensor.numel()]


def _reaches(dims: list[tuple[int, int]], low: int, high: int, budget: list[int]) -> bool:
    """Whether a sum of `dims`, each stride times 0, 1, ... elements - 1, largest stride first, is in [low, high].

    Most strides span what the smaller ones reach, so there are one or two multiples to try; after `budget` tries the
    answer is yes.
    """
    most = sum(stride * (n - 1) for stride, n in dims)
    if high < 0 or low > most:
        return False
    if low <= 0 or high >= most:  # none of them, or all
        return True
    budget[0] -= 1
    if budget[0] < 0:
        return True
    (stride, n), others = dims[0], dims[1:]
    beyond = low - (most - stride * (n - 1))  # what this one has to bring
    multiples = range(max(0, -(-beyond // stride)), min(high // stride, n - 1) + 1)
    if not others:
        return len(multiples) > 0
    return any(_reaches(others, low - i * stride, high - i * stride, budget) for i in multiples)


def share_memory(a: Region, b: Region) -> bool:
    """Exact, except that strided views which would take long to tell apart count as sharing memory."""
    if a.end <= b.begin or b.end <= a.begin:
        return False
    if a.dense and b.dense:
        return True
    # An element of a and one of b share a byte if their addresses differ by less than a size. Counting b's elements
    # from its end makes the difference a sum.
    merged: dict[int, int] = {}
    for stride, n in sorted((*a.dims, *b.dims), reverse=True):
        if stride and n > 1:
            merged[stride] = merged.get(stride, 1) + n - 1
    distance = b.end - b.size - a.begin
    return _reaches(list(merged.items()), distance - (a.size - 1), distance + (b.size - 1), [10000])


def find_conflict(all_regions: Iterable[Region]) -> tuple[Region, Region] | None:
    """The first two that share memory so that the order of reading and writing would decide the result.

    Sorted by address: of lists whose tensors lie apart, neighbours are compared.
    """
    reaching: list[Region] = []  # beyond the beginning of the next
    for new in sorted(all_regions, key=lambda region: region.begin):
        reaching = [old for old in reaching if old.end > new.begin]
        for old in reaching:
            harmless = new.access == old.access != Access.WRITTEN
            if not harmless and share_memory(old, new):
                return old, new
        reaching.append(new)
    return None


def check_no_overlap(op: str, *lists: Iterable[Region]) -> None:
    """Raises RuntimeError if a tensor that is written shares memory with another one of the call."""
    conflict = find_conflict(itertools.chain(*lists))
    if conflict is None:
        return
    read, written = sorted(conflict, key=lambda region: region.access)
    if read.access == written.access:
        raise RuntimeError(f"{op}: two {written.name}s share memory; it would be updated twice")
    raise RuntimeError(
        f"{op}: {written.name} and {read.name} share memory: one would change before it is read. Pass a copy of "
        f"{read.name}"
    )
