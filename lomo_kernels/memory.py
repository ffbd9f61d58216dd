"""Bytes of tensors alive, measured while ordinary torch code runs.

`torch.cuda` counts its own allocations, the CPU allocator does not.  `LiveBytes` fills that gap: a dispatch mode sees
every operator, also those the autograd engine calls inside backward, and a weak reference to each new storage tells
when it dies, also when that happens inside a gradient hook.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

__all__ = ["Event", "LiveBytes"]


class Event(NamedTuple):
    """One storage came to life or died.

    `key` numbers the storages of one recorder (an allocation and its free share it), `nbytes` is the storage's size in
    bytes, `operator` the operator that made it, such as "aten.mm.default".
    """

    kind: Literal["alloc", "free"]
    key: int
    nbytes: int
    operator: str


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of the strided tensors in a nest of lists, tuples and dicts (sparse tensors have none).

    torch's pytree does the same in three times the time, which was a quarter of a simulated step's."""
    if isinstance(values, torch.Tensor):
        if values.layout is torch.strided:
            yield values.untyped_storage()
    elif isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _storages(value)


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of all tensors made inside it that are still alive.

    What was alive at entry counts as zero throughout, also if it dies inside.  A storage is counted once, however many
    views it has, with the size it has when an operator last returned it; `current` keeps falling after exit as storages
    die.  Exact for CPU tensors and device-independent: requested bytes, before an allocator rounds them up.

    Not seen: workspace that a kernel takes and returns within one operator, and memory made by other means than an
    operator (`torch.from_numpy`, `copy.deepcopy` of a tensor).  Each operator costs some 10 microseconds more, so
    measure time on other steps than memory.

    Args:
        events: a list that gets an `Event` for each allocation and free, in order.

    Example:
        >>> with LiveBytes() as live:
        ...     a = torch.ones(1000)
        ...     b = a[:10]
        ...     del a, b
        >>> live.peak, live.current
        (4000, 0)
    """

    def __init__(self, events: list[Event] | None = None) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.events = events
        self._made = 0
        # By id of the storage's Python object: torch keeps that object, and weak references to it, for as long as the
        # storage lives, even while no Python name holds it.
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], Event]] = {}

    def reset_peak(self) -> None:
        """Sets `peak` to the bytes alive now."""
        self.peak = self.current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):  # a DTensor: first becomes operators on what it wraps
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # what device a simulated tensor has: as often as all operators together
            return result
        # An output in an input's storage is a view or an in-place result, of something older than this recorder unless
        # the input is being recorded.  `lift_fresh` is how `torch.tensor([...])` presents what it has just made.
        fresh = func is torch.ops.aten.lift_fresh.default
        older = set() if fresh else {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            entry = self._live.get(id(storage))
            if entry is not None:
                if entry[1].nbytes != storage.nbytes():  # resized in place, as `out=` arguments are
                    self._free(id(storage))
                    self._allocate(storage, str(func))
            elif id(storage) not in older:
                self._allocate(storage, str(func))
        return result

    def _allocate(self, storage: torch.UntypedStorage, operator: str) -> None:
        event = Event("alloc", self._made, storage.nbytes(), operator)
        self._made += 1
        self._live[id(storage)] = (weakref.ref(storage, self._on_death(id(storage))), event)
        self.current += event.nbytes
        self.peak = max(self.peak, self.current)
        if self.events is not None:
            self.events.append(event)

    def _on_death(self, storage_id: int) -> Callable[[weakref.ref[torch.UntypedStorage]], None]:
        # The recorder is held weakly: storages must not keep it alive, nor a dead recorder's callbacks fail.
        recorder = weakref.ref(self)

        def free(_: weakref.ref[torch.UntypedStorage]) -> None:
            alive = recorder()
            if alive is not None:
                alive._free(storage_id)

        return free

    def _free(self, storage_id: int) -> None:
        event = self._live.pop(storage_id)[1]
        self.current -= event.nbytes
        if self.events is not None:
            self.events.append(event._replace(kind="free"))
