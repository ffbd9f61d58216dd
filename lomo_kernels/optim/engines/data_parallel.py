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

from ..managed_parameter import ManagedParameter
from ..streams import current, here
from .base import ParallelEngine, StoredGrads
from .in_flight import BUCKET_BYTES, IN_FLIGHT_BYTES, InFlight


class DataParallel(ParallelEngine):
    """A process group whose ranks have different batches.

    Raises:
        ValueError: the parameters lie on several devices.
    """

    same_graphs = False
    has_whole_grads = True
    # No module has hooks. Reductions begin in the parameters' hooks, and `drain` ends them when a pass has ended.
    may_skip_loss = True

    def __init__(self, group: dist.ProcessGroup, managed_params: Sequence[ManagedParameter]) -> None:
        devices = {managed.param.device for managed in managed_params if managed.supported}
        if len(devices) > 1:
            raise ValueError(
                f"Lomo: with process_group every rank's parameters lie on one device, these are on "
                f"{', '.join(sorted(str(device) for device in devices))}; autograd runs the hooks of each device in a "
                "thread of its own, among which reductions have no order"
            )
        self.groups = [group]
        self.grad_divisor = dist.get_world_size(group)
        self._group = group
        self._order = list(range(len(managed_params) - 1, -1, -1))
        self._agreed = False
        self._planned: list[ManagedParameter] = []
        self._messages: list[list[ManagedParameter]] = []
        self._message_of: dict[int, int] = {}

    def begin_training(self, managed_params: Sequence[ManagedParameter], model: nn.Module | None) -> None:
        self._managed_params = list(managed_params)
        tensors: list[Tensor] = [managed.param for managed in managed_params]
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
        ordered = [self._managed_params[index] for index in self._order]
        self._plan([managed for managed in ordered if managed.param.requires_grad or managed.index in also])
        self._came: list[int] = []
        self._waiting: list[dict[int, tuple[Tensor, torch.cuda.Stream | None]]] = [{} for _ in self._messages]
        self._next = 0
        self._in_flight = InFlight()

    def reduce_grad(self, managed: ManagedParameter, grad: Tensor) -> Iterator[tuple[ManagedParameter, Tensor]]:
        if grad.layout is not torch.strided:
            raise managed.not_dense(grad)
        self._came.append(managed.index)
        self._waiting[self._message_of[managed.index]][managed.index] = grad, current(grad)
        del grad
        while self._next < len(self._messages) and len(self._waiting[self._next]) == len(self._messages[self._next]):
            self._send()
        yield from self._received(IN_FLIGHT_BYTES)

    def drain(self) -> Iterator[tuple[ManagedParameter, Tensor]]:
        yield from self._left()
        if not self._agreed:
            self._agree_on_order()

    def reduce_stored_grads(self, kept: StoredGrads, *, copy: bool) -> StoredGrads:
        self._begin({managed.index for managed, _ in kept})
        ready: StoredGrads = []
        for managed, grad in kept:
            ready += self.reduce_grad(managed, grad.clone() if copy else grad)
        return [*ready, *self._left()]  # and no agreement: the order of .grad says nothing

    def _left(self) -> Iterator[tuple[ManagedParameter, Tensor]]:
        while self._next < len(self._messages):
            for managed in self._messages[self._next]:
                if managed.index not in self._waiting[self._next]:
                    zeros = torch.zeros_like(managed.param)
                    self._waiting[self._next][managed.index] = zeros, current(zeros)
            self._send()
            yield from self._received(IN_FLIGHT_BYTES)
        yield from self._received(-1)

    def _plan(self, managed_params: Sequence[ManagedParameter]) -> None:
        """Which gradients travel together: each large one alone, small ones of one dtype up to `BUCKET_BYTES`."""
        if managed_params == self._planned:
            return
        self._planned = list(managed_params)
        self._messages = []
        open_: dict[torch.dtype, list[ManagedParameter]] = {}
        for managed in managed_params:
            if not managed.small:
                self._messages.append([managed])
                continue
            bucket = open_.setdefault(managed.param.dtype, [])
            bucket.append(managed)
            if sum(member.bytes for member in bucket) >= BUCKET_BYTES:
                self._messages.append(open_.pop(managed.param.dtype))
        self._messages += open_.values()
        self._message_of = {managed.index: position for position, some in enumerate(self._messages) for managed in some}

    def _send(self) -> None:
        """Starts the next reduction, whose gradients are all there."""
        managed_params, waiting = self._messages[self._next], self._waiting[self._next]
        self._next += 1
        grads = [here(*waiting.pop(managed.index)) for managed in managed_params]
        tensor = torch.cat([grad.reshape(-1) for grad in grads]) if len(grads) > 1 else _own(grads[0])
        work = dist.all_reduce(tensor, group=self._group, async_op=True)
        self._in_flight.put(managed_params, tensor, tensor, work)

    def _received(self, limit: int) -> Iterator[tuple[ManagedParameter, Tensor]]:
        for managed_params, tensor in self._in_flight.take(limit):
            if len(managed_params) == 1:
                yield managed_params[0], tensor.view(managed_params[0].param.shape)
                continue
            parts = tensor.split([managed.param.numel() for managed in managed_params])
            for managed, part in zip(managed_params, parts, strict=True):
                yield managed, part.view(managed.param.shape)

    def _agree_on_order(self) -> None:
        """Takes the order of gradients on rank 0, then parameters without one. Once: the host reads the order."""
        came = list(dict.fromkeys(self._came))
        order = torch.tensor(
            [*came, *(index for index in self._order if index not in set(came))],
            dtype=torch.int64,
            device=self._managed_params[0].param.device,
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
