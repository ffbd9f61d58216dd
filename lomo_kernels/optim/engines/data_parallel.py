"""Data parallel over a process group: every rank has the whole model, and gradients are averaged inside the hooks.

A large gradient starts its own all-reduce when it comes, which goes on while later ones are computed, and is then
applied and freed; small ones travel together. What travels is the sum: the kernels divide it, with the loss scale, so
averaging costs no pass over memory.

Ranks must start the same reductions in the same order, but a graph that depends on data (a skipped layer, an expert not
chosen) brings gradients in another order, or not at all. So the order is agreed on: the parameters' own, from the last,
at first, as `DistributedDataParallel` has it; after the first backward that in which they came on rank 0. A gradient
that comes early waits, one that does not come counts as zero.

Two-pass clipping reduces in both backwards: exact, for the second's reductions are the first's again, and only what is
in flight is in memory. ``clip_passes="one"`` reduces once and keeps the reduced gradients: half the traffic, for the
memory of all gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..records import Record
from ..streams import current, here
from .base import Kept, ParallelEngine
from .in_flight import BUCKET_BYTES, IN_FLIGHT_BYTES, InFlight


class DataParallel(ParallelEngine):
    """A process group whose ranks have different batches.

    Raises:
        ValueError: the parameters lie on several devices.
    """

    same_graphs = False

    def __init__(self, group: dist.ProcessGroup, records: Sequence[Record]) -> None:
        places = {record.param.device for record in records if record.served}
        if len(places) > 1:
            raise ValueError(
                f"Lomo: with process_group every rank's parameters lie on one device, these are on "
                f"{', '.join(sorted(str(place) for place in places))}; autograd runs the hooks of each device in a "
                "thread of its own, among which reductions have no order"
            )
        self.groups = [group]
        self.grad_divisor = dist.get_world_size(group)
        self._group = group
        self._order = list(range(len(records) - 1, -1, -1))
        self._agreed = False
        self._planned: list[Record] = []
        self._messages: list[list[Record]] = []
        self._message_of: dict[int, int] = {}

    def begin_training(self, records: Sequence[Record], model: nn.Module | None) -> None:
        self._records = list(records)
        tensors: list[Tensor] = [record.param for record in records]
        for tensor in [*tensors, *(() if model is None else model.buffers())]:
            if tensor.is_meta:
                continue
            if tensor.layout != torch.strided or tensor.is_quantized:
                raise NotImplementedError(
                    f"Lomo: process_group sends parameters and buffers from its first rank. A tensor of dtype "
                    f"{tensor.dtype} and layout {tensor.layout} cannot be sent; leave process_group out"
                )
            sent = tensor.detach().contiguous()
            as_bytes = sent.view(-1).view(torch.uint8)  # backends do not send every dtype
            dist.broadcast(as_bytes, dist.get_global_rank(self._group, 0), group=self._group)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(sent)

    def begin_backward(self, *, again: bool = False) -> None:
        self._begin(set())

    def _begin(self, also: set[int]) -> None:
        """Reductions of all trainable parameters' gradients, and of those with an index in `also`."""
        ordered = [self._records[index] for index in self._order]
        self._plan([record for record in ordered if record.param.requires_grad or record.index in also])
        self._came: list[int] = []
        self._waiting: list[dict[int, tuple[Tensor, torch.cuda.Stream | None]]] = [{} for _ in self._messages]
        self._next = 0
        self._in_flight = InFlight()

    def reduce_grad(self, record: Record, grad: Tensor) -> Iterator[tuple[Record, Tensor]]:
        if grad.layout is not torch.strided:
            raise record.not_dense(grad)
        self._came.append(record.index)
        self._waiting[self._message_of[record.index]][record.index] = grad, current(grad)
        del grad
        while self._next < len(self._messages) and len(self._waiting[self._next]) == len(self._messages[self._next]):
            self._send()
        yield from self._received(IN_FLIGHT_BYTES)

    def drain(self) -> Iterator[tuple[Record, Tensor]]:
        yield from self._left()
        if not self._agreed:
            self._agree_on_order()

    def reduce_stored_grads(self, kept: Kept, *, copy: bool) -> Kept:
        self._begin({record.index for record, _ in kept})
        ready: Kept = []
        for record, grad in kept:
            ready += self.reduce_grad(record, grad.clone() if copy else grad)
        return [*ready, *self._left()]  # and no agreement: the order of .grad says nothing

    def _left(self) -> Iterator[tuple[Record, Tensor]]:
        while self._next < len(self._messages):
            for record in self._messages[self._next]:
                if record.index not in self._waiting[self._next]:
                    zeros = torch.zeros_like(record.param)
                    self._waiting[self._next][record.index] = zeros, current(zeros)
            self._send()
            yield from self._received(IN_FLIGHT_BYTES)
        yield from self._received(-1)

    def _plan(self, records: Sequence[Record]) -> None:
        """Which gradients travel together: each large one alone, small ones of one dtype up to `BUCKET_BYTES`."""
        if records == self._planned:
            return
        self._planned = list(records)
        self._messages = []
        open_: dict[torch.dtype, list[Record]] = {}
        for record in records:
            if not record.small:
                self._messages.append([record])
                continue
            bucket = open_.setdefault(record.param.dtype, [])
            bucket.append(record)
            if sum(one.bytes for one in bucket) >= BUCKET_BYTES:
                self._messages.append(open_.pop(record.param.dtype))
        self._messages += open_.values()
        self._message_of = {record.index: place for place, some in enumerate(self._messages) for record in some}

    def _send(self) -> None:
        """Starts the next reduction, whose gradients are all there."""
        records, waiting = self._messages[self._next], self._waiting[self._next]
        self._next += 1
        grads = [here(*waiting.pop(record.index)) for record in records]
        tensor = torch.cat([grad.reshape(-1) for grad in grads]) if len(grads) > 1 else _own(grads[0])
        work = dist.all_reduce(tensor, group=self._group, async_op=True)
        self._in_flight.put(records, tensor, tensor, work)

    def _received(self, limit: int) -> Iterator[tuple[Record, Tensor]]:
        for records, tensor in self._in_flight.take(limit):
            if len(records) == 1:
                yield records[0], tensor.view(records[0].param.shape)
                continue
            parts = tensor.split([record.param.numel() for record in records])
            for record, part in zip(records, parts, strict=True):
                yield record, part.view(record.param.shape)

    def _agree_on_order(self) -> None:
        """Takes the order of gradients on rank 0, then parameters without one. Once: the host reads the order."""
        came = list(dict.fromkeys(self._came))
        order = torch.tensor(
            [*came, *(index for index in self._order if index not in set(came))],
            dtype=torch.int64,
            device=self._records[0].param.device,
        )
        dist.broadcast(order, dist.get_global_rank(self._group, 0), group=self._group)
        self._order = order.tolist()
        self._agreed = True


def _own(grad: Tensor) -> Tensor:
    """`grad`, or a copy where something else has its memory: autograd may have given the parameter a view of what it
    still needs (of ``x + bias.view(4, 4)``, say), and a reduction works in place. Contiguous."""
    storage = grad.untyped_storage()
    if torch._C._storage_Use_Count(storage._cdata) > 2:  # the tensor and `storage`
        return grad.clone(memory_format=torch.contiguous_format)
    return grad.contiguous()
