"""One sweep over gradients: adding up their norms, or consuming them. A pass is what a hook hands its gradient to."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .hyperparameters import GroupScalars
from .records import Record
from .streams import Streams

# Bound on the small gradients that wait for a list call.
BUFFER_BYTES = 1024 * 1024

_serials = itertools.count()


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
        scaled: whether the gradients carry the loss scale.
    """

    #: Whether a gradient that comes a second time can still be refused before a weight has changed.
    changes_weights = False

    def __init__(self, devices: Iterable[torch.device], *, scaled: bool) -> None:
        self.scaled = scaled
        self.serial = next(_serials)
        self._streams = Streams(devices)
        self._buffers: dict[tuple[GroupScalars, torch.cuda.Stream | None], _Buffer] = {}
        self._lock = threading.Lock()  # backward runs the hooks of each device in a thread of its own

    def take(self, record: Record) -> None:
        """Consumes the gradient in ``record.param.grad``. None there (a layer that keeps it to itself) is left alone.

        Raises:
            RuntimeError: the gradient comes a second time in this pass.
        """
        param = record.param
        grad = param.grad
        if grad is None:
            return
        param.grad = None
        if record.fired == self.serial:
            raise RuntimeError(self._second_time(record.name))
        record.fired = self.serial
        self.add(record, grad)

    def add(self, record: Record, grad: Tensor) -> None:
        """Hands one gradient to the kernels, now or with others. Raises RuntimeError unless it is dense."""
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"Lomo: the gradient of {record.name} has layout {grad.layout}, expected a dense one; "
                "build the layer with sparse=False"
            )
        stream = self._streams.join(record.device) if record.on_gpu else None
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
        while self._buffers:
            (_, stream), buffer = self._buffers.popitem()
            Streams.lend(buffer.grads, buffer.records[0].device, stream)
            self._list(buffer.records, buffer.grads)

    def _one(self, record: Record, grad: Tensor) -> None:
        raise NotImplementedError

    def _list(self, records: Sequence[Record], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def _second_time(self, name: str) -> str:
        changed = "Some weights of this step have changed already" if self.changes_weights else "No weight was changed"
        return (
            f"Lomo: the gradient of {name} came twice in one backward, as when two reentrant checkpoints share a "
            f"parameter; each part alone is not its gradient. {changed}. Use torch.utils.checkpoint with "
            "use_reentrant=False"
        )


class NormPass(Pass):
    """Adds every gradient's sum of squares to its parameter's slot, and drops the gradient."""

    def _one(self, record: Record, grad: Tensor) -> None:
        inv_scale = record.home.inv_scale if self.scaled else None
        torch.ops.lomo_kernels.sq_norm_.default(record.slot, grad, inv_scale)

    def _list(self, records: Sequence[Record], grads: list[Tensor]) -> None:
        inv_scale = records[0].home.inv_scale if self.scaled else None
        torch.ops.lomo_kernels.sq_norm_list_.default([record.slot for record in records], grads, inv_scale)


class UpdatePass(Pass):
    """Applies every gradient to its parameter, and drops the gradient.

    Args:
        decided: clip coefficient and overflow flag are known (a norm pass came before); otherwise the norms are added
            up on the way.
        stochastic, seed: of the rounding.
    """

    changes_weights = True

    def __init__(
        self, devices: Iterable[torch.device], *, scaled: bool, decided: bool, stochastic: bool, seed: int
    ) -> None:
        super().__init__(devices, scaled=scaled)
        self.decided = decided
        self.stochastic = stochastic
        self.seed = seed

    def _one(self, record: Record, grad: Tensor) -> None:
        param, home, scalars = record.param, record.home, record.scalars
        torch.ops.lomo_kernels.sgd_.default(
            param,
            grad,
            scalars.lr.tensor,
            scalars.weight_decay.tensor,
            home.inv_scale if self.scaled else None,
            scalars.clip_value.tensor,
            home.clip_coef if self.decided else None,
            home.found_inf if self.decided else None,
            None if self.decided else record.slot,
            self.stochastic,
            self.seed,
            record.index,
            home.step,
            None,
        )
        torch.autograd.graph.increment_version(param)

    def _list(self, records: Sequence[Record], grads: list[Tensor]) -> None:
        home, scalars = records[0].home, records[0].scalars
        params: list[Tensor] = [record.param for record in records]
        torch.ops.lomo_kernels.sgd_list_.default(
            params,
            grads,
            scalars.lr.tensor,
            scalars.weight_decay.tensor,
            home.inv_scale if self.scaled else None,
            scalars.clip_value.tensor,
            home.clip_coef if self.decided else None,
            home.found_inf if self.decided else None,
            [] if self.decided else [record.slot for record in records],
            self.stochastic,
            self.seed,
            [record.index for record in records],
            home.step,
            [],
        )
        torch.autograd.graph.increment_version(params)
