"""`Lomo`'s `clip_memory`: how many bytes kept gradients and factors may take while the norm of all is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch

from ..numbers import bytes_of, shown
from .managed_parameter import ManagedParameter

#: As much as the device has free, and never more than all gradients take.
AUTO = "auto"
#: Share of a GPU's memory that "auto" leaves free: for the allocator's gaps, and for what backward itself takes.
RESERVE = 0.1

# A model's graph may differ in every step. What was kept is remembered of this many.
_GRAPHS = 64

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PASSES = {"one": math.inf, "two": 0.0}


def clip_memory_of(value: Any, passes: Any) -> float | str:
    """Bytes (infinite: all gradients), or `AUTO`, from the options `clip_memory` and `clip_passes`.

    Raises:
        TypeError, ValueError: one of them is not as `Lomo` describes it, or they contradict each other.
    """
    if passes is not None:
        if not isinstance(passes, str) or passes not in _PASSES:
            raise ValueError(f'Lomo: clip_passes is {passes!r}, expected "two" or "one"')
        if value != AUTO:
            raise ValueError(
                f"Lomo: clip_passes is {passes!r} and clip_memory is {value!r}; give one of them: "
                'clip_passes="two" is clip_memory=0, and "one" is clip_memory=None'
            )
        return _PASSES[passes]
    if value is None:
        return math.inf
    if value == AUTO:
        return AUTO
    expected = 'expected "auto", None, a number of bytes >= 0, or a text such as "512MiB" or "2GiB"'
    if isinstance(value, str):
        nbytes = bytes_of(value, _UNITS)
        if nbytes is None:
            raise ValueError(f"Lomo: clip_memory is {value!r}, {expected}")
        return nbytes
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Lomo: clip_memory is a {type(value).__name__}, {expected}")
    if not value >= 0:  # type: ignore[operator]
        raise ValueError(f"Lomo: clip_memory is {shown(value)}, {expected}")
    try:
        return float(value)
    except OverflowError:  # more than any memory
        return math.inf


class Fitting(NamedTuple):
    """What fits of the gradients of a graph."""

    evicted: list[ManagedParameter]  # whose gradients do not fit
    nbytes: int  # of those that do


class ClipBudget:
    """The budget of each step, and what fitted into it.

    Args:
        clip_memory: as `clip_memory_of` gives it.
    """

    def __init__(self, clip_memory: float | str) -> None:
        self.clip_memory = clip_memory
        self._last = math.inf
        self._share = 1.0  # of what is free; halved when memory ran out
        self._fitting: dict[int, Fitting] = {}  # by kind of graph
        self.evicted: list[ManagedParameter] = []  # in the last step

    def fitting(self, kind: int, budget: float) -> Fitting | None:
        """What fitted in the last step with such a graph. None if there was none, or if it took more than `budget`."""
        fitting = self._fitting.get(kind)
        return fitting if fitting is not None and fitting.nbytes <= budget else None

    def remember(self, kind: int, fitting: Fitting) -> None:
        """What fits of the gradients of such a graph."""
        if len(self._fitting) >= _GRAPHS:
            self._fitting.clear()
        self._fitting[kind] = fitting

    def clear(self) -> None:
        """Parameters were moved, cast or added."""
        self._fitting.clear()

    def forget(self, kind: int) -> None:
        """The next step with such a graph finds out anew what fits."""
        self._fitting.pop(kind, None)

    def of_step(self, managed_params: Sequence[ManagedParameter]) -> float:
        """Bytes that may be kept in a step that begins now. Infinite if all gradients fit: one backward will do. Waits
        for no device."""
        if self.clip_memory == math.inf:
            return math.inf
        by_device: dict[torch.device, int] = {}
        for managed in managed_params:
            if managed.supported and managed.param.requires_grad:
                by_device[managed.device] = by_device.get(managed.device, 0) + managed.bytes
        total = sum(by_device.values())
        if self.clip_memory == AUTO:
            if any(device.type == "cuda" for device in by_device) and torch.cuda.is_current_stream_capturing():
                return self._last  # a capture repeats the step before it
            free = {device: _free(device) for device in by_device}
            # Gradients are kept by their distance from the loss. They may all be on the device that has least room.
            lacking = [free[device] for device, need in by_device.items() if free[device] < need]
            limit = min(lacking) if lacking else math.inf
            if self._share < 1.0:
                limit = min(limit, total) * self._share
            limit = max(limit, 1.0)
        else:
            limit = float(self.clip_memory)
        self._last = math.inf if limit >= total else limit
        return self._last

    def halve(self) -> bool:
        """Memory ran out: "auto" takes half as much from the next step on. Returns whether that changes anything."""
        if self.clip_memory != AUTO:
            return False
        self._share /= 2
        return True


def _free(device: torch.device) -> float:
    """Bytes that gradients may take. On a CPU as many as they need: standard training takes as many."""
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(free + unused - RESERVE * total, 0.0)
