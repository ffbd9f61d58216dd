"""The seam between the optimizer and the engines that spread a model, or its batches, over several processes.

On one process there is no engine. A hook then hands the kernels its parameter and the gradient in ``.grad``. Otherwise
the optimizer has one `ParallelEngine`, which `choose.choose_engine` makes, and which answers two questions:

1. What local tensor and what local gradient does a parameter's hook work on? `localize` says which part of the
   parameter the kernels update (`Placement`). `reduce_grad` takes what autograd left in ``.grad`` and gives pairs of
   parameter and local gradient, of this parameter or of earlier ones, now or later. `drain` gives the others when
   backward ends.
2. How are norms combined? Each parameter's slot holds the sum of squares of its local gradient. The sum of slot times
   weight goes through `sum_`, after which every rank has the same number, hence the same overflow flag, clip
   coefficient and decision to skip. Sums of one parameter, which rules with row and column factors need, go
   through `sum_parts_`, over the ranks that have its other parts.

Every method is called by all ranks in the same order, and may communicate. What autograd or `step` calls runs under
`no_grad`; what `backward` calls itself runs as its caller does, on tensors that need no gradient. Nothing here reads a
device tensor on the host, and nothing knows which ranks share a host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..managed_parameter import ManagedParameter
from ..placement import Placement
from .sums import sum_in_order

StoredGrads = list[tuple[ManagedParameter, Tensor]]


class ParallelEngine:
    """What the processes of one optimizer do together. Subclasses overwrite what they do otherwise."""

    #: What a local gradient, as `reduce_grad` gives it, is divided by in the kernels.
    grad_divisor = 1
    #: Whether every rank's graph has the same parts, so that what one rank finds in its own, all find.
    same_graphs = True
    #: Whether a local gradient is the whole one, so that its norm is known without the other ranks.
    has_whole_grads = False
    #: Whether a backward may begin after the loss's own nodes, which then run in a backward of their own. It may not if
    #: module hooks have something called when a backward ends.
    may_skip_loss = False
    #: The type of device on which `groups` communicate; None: that of the parameters.
    device_type: str | None = None
    #: All ranks, as groups over which something is done in turn to reach everyone: one, or one per mesh dimension.
    groups: Sequence[dist.ProcessGroup] = ()

    def begin_training(self, managed_params: Sequence[ManagedParameter], model: nn.Module | None) -> None:
        """Called once `managed_params` are known and placed, and again where some were added, before any step."""

    def localize(self, managed: ManagedParameter) -> Placement:
        """This rank's part of a parameter; called before every step. Default: all of it, counted on every rank.
        ``shard`` is given for all parameters or for none."""
        return Placement(managed.param)

    def begin_backward(self, *, again: bool = False) -> None:
        """A backward begins whose gradients go through `reduce_grad`. What an interrupted one left is forgotten.
        `again`: its graph will be run through once more."""

    def reduce_grad(self, managed: ManagedParameter, grad: Tensor) -> Iterable[tuple[ManagedParameter, Tensor]]:
        """Local gradients that are ready, now that `grad` has come for `managed`. `grad` is the caller's no more."""
        return ((managed, grad),)

    def drain(self) -> Iterable[tuple[ManagedParameter, Tensor]]:
        """The local gradients still missing when backward has ended."""
        return ()

    def reduce_stored_grads(self, kept: StoredGrads, *, copy: bool) -> StoredGrads:
        """Local gradients of what plain backwards left in ``.grad``, which stays as it is where `copy`."""
        return [ready for managed, grad in kept for ready in self.reduce_grad(managed, grad)]

    def end(self) -> None:
        """A step has ended: all its updates, if any, are with the kernels."""

    def sum_(self, total: Tensor) -> None:
        """Adds up `total` (float64: this rank's weighted sum of squares, or one for each parameter) over all ranks, in
        place."""

    def sum_parts_(self, total: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
        """Adds up `total` (float64, one dimension) over each of `groups` in turn, in place: the same bits everywhere.
        With a parameter's own groups (`Placement.groups`) that is the sum over its parts, each counted once."""
        numbers = self._where_ranks_meet(total)
        for group in groups:
            numbers = sum_in_order(numbers, group)
        total.copy_(numbers)

    def _all_reduce(self, total: Tensor, group: dist.ProcessGroup) -> None:
        """Adds up `total` over the ranks of a group, in place."""
        on_group_device = self._where_ranks_meet(total)
        dist.all_reduce(on_group_device, group=group)
        if on_group_device is not total:
            total.copy_(on_group_device)

    def _where_ranks_meet(self, total: Tensor) -> Tensor:
        """`total` on the device of `groups`: itself if it is there."""
        return total if self.device_type in (None, total.device.type) else total.to(self.device_type)

    def graph_leaves(self) -> Iterable[Tensor]:
        """Parameters, ours and others, that backward gives gradients though the graph has something else for them."""
        return ()

    def has_unreduced_grads(self) -> bool:
        """Whether the engine holds gradients that it adds to the next backward's only once, then drops."""
        return False

    def check_consistent(self, facts: dict[str, Any]) -> None:
        """Raises ValueError, on every rank, unless all have the same `facts`: otherwise steps would hang or diverge."""
        ours = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in facts.items()}
        seen = {dist.get_rank(): ours}
        for group in self.groups:  # all of them before anything is raised: the next one's others would wait
            if dist.get_backend(group) == "fake":  # a simulation (`lomo_kernels.plan`), which has one rank
                continue
            theirs: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(theirs, seen, group=group)
            seen = {rank: other for some in theirs for rank, other in some.items()}
        first = min(seen)
        for rank in sorted(seen):
            different = [name for name in ours if seen[rank][name] != seen[first][name]]
            if different:
                raise ValueError(
                    f"Lomo: {' and '.join(different)} on rank {rank} and on rank {first} differ; make the same "
                    "optimizer of the same model everywhere"
                )
