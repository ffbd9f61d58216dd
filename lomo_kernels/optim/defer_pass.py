"""The passes of a step that keeps gradients until their norm is known.

`MeasurePass` finds out which gradients fit into a budget of bytes. `DeferPass` keeps them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .engines.base import ParallelEngine
from .factor_store import SavedFactors
from .managed_parameter import ManagedParameter
from .passes import NormPass, UpdatePass
from .streams import Streams


class DeferredGradient(NamedTuple):
    """One gradient until the end of backward."""

    managed: ManagedParameter
    grad: Tensor | None
    saved: Sequence[SavedFactors]
    stream: torch.cuda.Stream | None  # whose memory it is

    def tensors(self) -> list[Tensor]:
        return _tensors(self.grad, self.saved)


class _Window:
    """The last gradients of a backward, as many as fit into a budget of bytes. Layers that share an input share its
    memory. Nothing is kept alive.

    `evicted`: the parameters whose gradients do not fit. `nbytes`: of those that do.
    """

    def __init__(self, budget: float) -> None:
        self.evicted: list[ManagedParameter] = []
        self.nbytes = 0
        self._budget = budget
        self._entries: deque[tuple[ManagedParameter, list[tuple[int, int]]]] = deque()
        self._users: Counter[int] = Counter()  # by address of the storage
        self._weak: dict[int, StorageWeakRef] = {}  # so that no new storage gets the address of one that was freed

    def add(self, managed: ManagedParameter, tensors: Iterable[Tensor]) -> None:
        pieces = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._weak.setdefault(storage._cdata, StorageWeakRef(storage))
            pieces.append((storage._cdata, storage.nbytes()))
        self._entries.append((managed, pieces))
        for address, nbytes in pieces:
            self.nbytes += 0 if self._users[address] else nbytes
            self._users[address] += 1
        while self.nbytes > self._budget:
            evicted, pieces = self._entries.popleft()
            self.evicted.append(evicted)
            for address, nbytes in pieces:
                self._users[address] -= 1
                self.nbytes -= 0 if self._users[address] else nbytes


class MeasurePass(NormPass):
    """Adds up norms as `NormPass` does, and finds out which gradients a pass that keeps them could keep.

    Args:
        budget: bytes that may be kept. Gradients that came first, of the layers nearest to the loss, make room for
            later ones.
    """

    keeps = True  # takes the same factors as a pass that does

    def __init__(
        self, devices: Iterable[torch.device], params: Iterable[Tensor] = (), *, scaled: bool, budget: float
    ) -> None:
        super().__init__(devices, params, scaled=scaled)
        self._window = _Window(budget)

    @property
    def evicted(self) -> list[ManagedParameter]:
        """The parameters whose gradients do not fit."""
        return self._window.evicted

    @property
    def nbytes(self) -> int:
        """Of the gradients that fit."""
        return self._window.nbytes

    def add(self, managed: ManagedParameter, grad: Tensor | None, saved: Sequence[SavedFactors] = ()) -> None:
        super().add(managed, grad, saved)
        with self._lock:
            self._window.add(managed, _tensors(grad, saved))


def _tensors(grad: Tensor | None, saved: Sequence[SavedFactors]) -> list[Tensor]:
    tensors = [tensor for held in saved for tensor in held.factors.tensors]
    return tensors if grad is None else [*tensors, grad]


class DeferPass(NormPass):
    """Adds up norms as `NormPass` does and keeps gradients, or their factors where they are smaller, for `apply`.

    Args:
        evicted: the parameters whose gradients are not kept.
    """

    keeps = True
    #: Called with each gradient that is kept, and with None when backward has ended and they are applied.
    observers: ClassVar[list[Callable[[DeferredGradient | None], None]]] = []

    def __init__(
        self,
        devices: Iterable[torch.device],
        params: Iterable[Tensor] = (),
        *,
        scaled: bool,
        engine: ParallelEngine | None = None,
        evicted: Iterable[ManagedParameter] = (),
    ) -> None:
        super().__init__(devices, params, scaled=scaled, engine=engine)
        self._deferred: list[DeferredGradient] = []
        self._evicted = {managed.index for managed in evicted}

    def beyond(self, budget: float) -> tuple[list[ManagedParameter], int]:
        """The parameters whose gradients a later pass must not keep, or more than `budget` bytes would be kept, and the
        bytes of the others. None if batches have not grown since it was found out what fits."""
        window = _Window(budget)
        for deferred in self._deferred:
            window.add(deferred.managed, deferred.tensors())
        return window.evicted, window.nbytes

    def add(self, managed: ManagedParameter, grad: Tensor | None, saved: Sequence[SavedFactors] = ()) -> None:
        super().add(managed, grad, saved)
        if managed.index in self._evicted:
            return
        stream = self._streams.join(managed.device) if managed.on_gpu else None
        deferred = DeferredGradient(managed, grad, saved, stream)
        self._deferred.append(deferred)
        for observer in self.observers:
            observer(deferred)

    def check(self, outcome: str) -> None:
        """Raises RuntimeError, which says `outcome`, if a factor was altered since it was kept."""
        for kept in self._deferred:
            for held in kept.saved:
                held.check(kept.managed.name, outcome)

    def apply(self, update: UpdatePass) -> None:
        """Hands every gradient to `update`, on the caller's streams, and frees it."""
        for observer in self.observers:
            observer(None)
        while self._deferred:
            kept = self._deferred.pop()
            if kept.stream is not None:
                Streams.lend(kept.tensors(), kept.managed.device, kept.stream)
            update.add(kept.managed, kept.grad, kept.saved)
        update.flush()
