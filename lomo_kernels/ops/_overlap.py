"""Whether a tensor that a call writes shares memory with another tensor of the call. ``csrc/overlap.h`` has the same in
C++."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


class Access(IntEnum):
    """What a call does with a tensor. ADDED: a slot. Several gradients may have the same slot."""

    READ = 0
    ADDED = 1
    WRITTEN = 2


class Region(NamedTuple):
    """The addresses of a tensor's elements: from `begin` to before `end`; an element has `size` bytes."""

    begin: int
    end: int
    size: int
    dims: tuple[tuple[int, int], ...]  # (stride, elements), largest stride first
    dense: bool  # every byte in between belongs to an element
    access: Access
    name: str


def reach(tensor: Tensor) -> tuple[int, int]:
    """Address of the first byte of the elements, and of the byte after the last. Strides are not negative."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory (as in an expanded tensor)."""
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
    """Regions of the tensors that have elements."""
    return [region(tensor, access, name) for tensor in tensors if tensor.numel()]


def _reaches(dims: list[tuple[int, int]], low: int, high: int, budget: list[int]) -> bool:
    """Whether some element of `dims` has an offset in [low, high]. `dims`: (stride, elements), largest stride first.

    Most strides are larger than what the smaller strides span. Then only one or two multiples have to be tried. The
    answer is yes after `budget` tries.
    """
    most = sum(stride * (n - 1) for stride, n in dims)
    if high < 0 or low > most:
        return False
    if low <= 0 or high >= most:  # the first element, or the last
        return True
    budget[0] -= 1
    if budget[0] < 0:
        return True
    (stride, n), others = dims[0], dims[1:]
    beyond = low - (most - stride * (n - 1))  # what this stride has to add
    multiples = range(max(0, -(-beyond // stride)), min(high // stride, n - 1) + 1)
    if not others:
        return len(multiples) > 0
    return any(_reaches(others, low - i * stride, high - i * stride, budget) for i in multiples)


def share_memory(a: Region, b: Region) -> bool:
    """Exact, with one exception: strided views that take too long to compare count as sharing memory."""
    if a.end <= b.begin or b.end <= a.begin:
        return False
    if a.dense and b.dense:
        return True
    # An element of a and one of b share a byte if their addresses differ by less than an element's size. b's elements
    # are counted from its end: then the difference is a sum.
    merged: dict[int, int] = {}
    for stride, n in sorted((*a.dims, *b.dims), reverse=True):
        if stride and n > 1:
            merged[stride] = merged.get(stride, 1) + n - 1
    distance = b.end - b.size - a.begin
    return _reaches(list(merged.items()), distance - (a.size - 1), distance + (b.size - 1), [10000])


def have_addresses(tensors: Iterable[Tensor]) -> bool:
    """Whether the tensors lie in memory: fake ones, those on "meta" and those of a function being compiled do not."""
    return not torch.compiler.is_compiling() and not any(isinstance(t, FakeTensor) or t.is_meta for t in tensors)


def find_conflict(all_regions: Iterable[Region]) -> tuple[Region, Region] | None:
    """The first two regions that share memory, if the order of reading and writing would change the result.

    Regions are sorted by address. So if no tensors overlap, only neighbours are compared.
    """
    reaching: list[Region] = []  # regions that end after the next one begins
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
        both = f"two {written.name}s" if read.name == written.name else f"{read.name} and {written.name}"
        raise RuntimeError(f"{op}: {both} share memory; it would be updated twice. Nothing was changed")
    raise RuntimeError(
        f"{op}: {written.name} and {read.name} share memory: {read.name} would change before it is read. Nothing was "
        f"changed. Pass a copy of {read.name}"
    )


def check_scale_apart(op: str, inv_scale: object, slots: Sequence[Tensor]) -> None:
    """Raises RuntimeError if a norm's factor is a tensor in memory that the call writes: it could change while elements
    still need it."""
    if isinstance(inv_scale, Tensor) and have_addresses((inv_scale, *slots)):
        check_no_overlap(op, regions(Access.ADDED, "slot", slots), regions(Access.READ, "inv_scale", [inv_scale]))
