"""One sweep over gradients: adding up norms, keeping or consuming them. A pass is what a hook hands its gradient to.

A fused layer hands over factors, for each of its uses, while backward runs; its weight's hook, which autograd calls
once after the last use, closes the sum.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import Factors
from .factor_store import FactorStore, SavedFactors
from .hyperparameters import GroupScalars
from .ranks import Ranks
from .records import Record
from .streams import Streams, current
from .terms import Terms

# Bound on the small gradients that wait for a list call.
BUFFER_BYTES = 1024 * 1024

_serials = itertools.count()
_factors = attrgetter("factors")


class _Buffer:
    """Small gradients of one group, device and stream, waiting for one call."""

    __slots__ = ("bytes", "grads", "records")

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.grads: list[Tensor] = []
        self.bytes = 0


class Pass:
    """Takes each parameter's gradient once. Subclasses say what is done with one, and with a list of small ones.

    Args:
        devices: those of the parameters.
        params: in whose memory a fused layer's factors may lie, and change before they are used.
        scaled: whether the gradients carry the loss scale.
        ranks: the processes whose gradients the hooks' have to be combined with; None: what comes is a local gradient.
    """

    #: Whether gradients are kept until backward has ended.
    keeps = False
    #: Whether a gradient that comes a second time can still be refused before a weight has changed.
    changes_weights = False
    #: What an error in this pass leaves behind, for its message.
    outcome = "No weight was changed"

    def __init__(
        self,
        devices: Iterable[torch.device],
        params: Iterable[Tensor] = (),
        *,
        scaled: bool,
        ranks: Ranks | None = None,
    ) -> None:
        self.scaled = scaled
        self._ranks = ranks
        if ranks is not None:
            ranks.begin(again=not (self.keeps or self.changes_weights))
        self.serial = next(_serials)
        self._streams = Streams(devices)
        self._buffers: dict[tuple[GroupScalars, torch.cuda.Stream | None], _Buffer] = {}
        self._lock = threading.Lock()  # backward runs the hooks of each device in a thread of its own
        self._store = FactorStore(params, until_the_end=self.keeps)

    def take(self, record: Record) -> None:
        """Consumes the gradient: what stands in ``record.param.grad`` and what the weight's layers handed over.

        Neither there (a custom layer that keeps it to itself) is left alone.

        Raises:
            RuntimeError: the gradient comes a second time in this pass.
        """
        param = record.param
        grad = param.grad
        saved: Sequence[SavedFactors] = ()
        if record.fused:
            with self._lock:
                saved = self._store.close(record)
        if grad is None and not saved:
            return
        param.grad = None
        if record.fired == self.serial:
            raise self._came_twice(record)
        record.fired = self.serial
        if self._ranks is None:
            self.add(record, grad, saved)
            return
        assert grad is not None  # no layer is fused
        ready = self._ranks.reduced(record, grad)
        del grad
        for one, local in ready:
            self.add(one, local)

    def take_factors(self, record: Record, factors: Factors) -> Sequence[Factors]:
        """Takes what a fused layer has in place of a gradient, until the weight's hook is called.

        Returns:
            The factors, these and any taken before, whose gradient the layer has to return: holding them would take
            more memory than the gradient does. Usually none.
        """
        if not record.param.requires_grad:  # frozen since its forward: autograd drops its gradient
            return ()
        if record.fired == self.serial:
            raise self._came_twice(record)
        with self._lock:
            return self._store.add(record, factors, self.outcome)

    def add(self, record: Record, grad: Tensor | None, saved: Sequence[SavedFactors] = ()) -> None:
        """Hands one gradient to the kernels, now or with others. Raises RuntimeError unless it is dense."""
        if grad is not None and grad.layout is not torch.strided:
            raise record.not_dense(grad)
        stream = self._streams.join(record.device) if record.on_gpu else None
        if saved:
            for held in saved:
                held.check(record.name, self.outcome)
                if held.made is not None:
                    held.join()
            self._terms(record, grad, saved)
            return
        assert grad is not None
        if not record.small:
            self._one(record, grad)
            return
        key = record.scalars, stream
        with self._lock:
            buffer = self._buffers.get(key)
            if buffer is None:
                buffer = self._buffers[key] = _Buffer()
            buffer.records.append(record)
            buffer.grads.append(grad)
            buffer.bytes += record.bytes
            if buffer.bytes < BUFFER_BYTES:
                return
            del self._buffers[key]
        self._list(buffer.records, buffer.grads)

    def flush(self) -> None:
        """Hands on what still waits. Called when backward has ended, on the caller's streams."""
        self._streams.leave()
        if self._ranks is not None:
            for record, grad in self._ranks.rest():
                self.add(record, grad)
        while self._buffers:
            (_, stream), buffer = self._buffers.popitem()
            Streams.lend(buffer.grads, buffer.records[0].device, stream)
            self._list(buffer.records, buffer.grads)

    def _one(self, record: Record, grad: Tensor) -> None:
        raise NotImplementedError

    def _list(self, records: Sequence[Record], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def _terms(self, record: Record, grad: Tensor | None, saved: Sequence[SavedFactors]) -> None:
        raise NotImplementedError

    def _came_twice(self, record: Record) -> RuntimeError:
        return RuntimeError(
            f"Lomo: the gradient of {record.name} came twice in one backward, as when two reentrant checkpoints "
            f"share a parameter; each part alone is not its gradient. {self.outcome}. Use torch.utils.checkpoint "
            "with use_reentrant=False"
        )


class NormPass(Pass):
    """Adds every gradient's sum of squares to its parameter's slot, and drops the gradient."""

    def _one(self, record: Record, grad: Tensor) -> None:
        inv_scale = record.home.inv_scale if self.scaled else None
        torch.ops.lomo_kernels.sq_norm_.default([record.slot], [grad], inv_scale)

    def _list(self, records: Sequence[Record], grads: list[Tensor]) -> None:
        inv_scale = records[0].home.inv_scale if self.scaled else None
        torch.ops.lomo_kernels.sq_norm_.default([record.slot for record in records], grads, inv_scale)

    def _terms(self, record: Record, grad: Tensor | None, saved: Sequence[SavedFactors]) -> None:
        inv_scale = record.home.inv_scale if self.scaled else None
        Terms(map(_factors, saved), grad).sq_norm_(record.slot, record.param, inv_scale)


class DeferredGradient(NamedTuple):
    """One gradient until the end of backward."""

    record: Record
    grad: Tensor | None
    saved: Sequence[SavedFactors]
    stream: torch.cuda.Stream | None  # whose memory it is

    def tensors(self) -> list[Tensor]:
        tensors = [tensor for held in self.saved for tensor in (held.factors.input, held.factors.grad_output)]
        return tensors if self.grad is None else [*tensors, self.grad]


class KeepPass(NormPass):
    """Adds up norms as `NormPass` does and keeps every gradient, or its factors where they are smaller, for `apply`."""

    keeps = True

    def __init__(
        self,
        devices: Iterable[torch.device],
        params: Iterable[Tensor] = (),
        *,
        scaled: bool,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(devices, params, scaled=scaled, ranks=ranks)
        self._kept: list[DeferredGradient] = []

    def add(self, record: Record, grad: Tensor | None, saved: Sequence[SavedFactors] = ()) -> None:
        super().add(record, grad, saved)
        stream = current(record.local) if record.on_gpu else None
        self._kept.append(DeferredGradient(record, grad, saved, stream))

    def check(self) -> None:
        """Raises RuntimeError where a factor was altered since it was kept."""
        for kept in self._kept:
            for held in kept.saved:
                held.check(kept.record.name, "No weight was changed")

    def apply(self, update: UpdatePass) -> None:
        """Hands every gradient to `update`, on the caller's streams, and frees it."""
        while self._kept:
            kept = self._kept.pop()
            if kept.stream is not None:
                Streams.lend(kept.tensors(), kept.record.device, kept.stream)
            update.add(kept.record, kept.grad, kept.saved)
        update.flush()


class UpdatePass(Pass):
    """Applies every gradient to its parameter, and drops the gradient.

    Args:
        decided: clip coefficient and overflow flag are known (a norm pass came before); otherwise the norms are added
            up on the way.
        rule: its number in `lomo_kernels.rules.RULES`.
        stochastic, seed: of the rounding.
    """

    changes_weights = True
    outcome = "Some weights of this step may have changed already"
    #: Whether a kernel was called that may have changed one.
    changed = False

    def __init__(
        self,
        devices: Iterable[torch.device],
        params: Iterable[Tensor] = (),
        *,
        scaled: bool,
        decided: bool,
        rule: int,
        stochastic: bool,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(devices, params, scaled=scaled, ranks=ranks)
        self.decided = decided
        self.rule = rule
        self.stochastic = stochastic
        self.seed = seed

    def _one(self, record: Record, grad: Tensor) -> None:
        self.changed = True
        torch.ops.lomo_kernels.update_.default(
            [record.local],
            [grad],
            record.scalars.vector,
            [] if self.decided else [record.slot],
            self.rule,
            self.stochastic,
            self.seed,
            [record.index],
            [] if record.shard is None else list(record.shard),
        )
        torch.autograd.graph.increment_version(record.local)
        if record.shard is not None:
            torch.autograd.graph.increment_version(record.param)

    def _terms(self, record: Record, grad: Tensor | None, saved: Sequence[SavedFactors]) -> None:
        param = record.param
        self.changed = True
        Terms(map(_factors, saved), grad).update_(
            param,
            record.scalars.vector,
            None if self.decided else record.slot,
            self.rule,
            self.stochastic,
            self.seed,
            record.index,
            [],
        )
        torch.autograd.graph.increment_version(param)

    def _list(self, records: Sequence[Record], grads: list[Tensor]) -> None:
        params = [record.local for record in records]
        sharded = records[0].shard is not None
        self.changed = True
        torch.ops.lomo_kernels.update_.default(
            params,
            grads,
            records[0].scalars.vector,
            [] if self.decided else [record.slot for record in records],
            self.rule,
            self.stochastic,
            self.seed,
            [record.index for record in records],
            [number for record in records for number in record.shard or ()] if sharded else [],
        )
        torch.autograd.graph.increment_version(params)
        if sharded:
            torch.autograd.graph.increment_version([record.param for record in records])
