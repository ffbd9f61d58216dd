"""The seam between the optimizer and the engines that spread a model, or its batches, over several processes.

On one process there is no `Ranks`, and a hook hands the kernels its parameter and the gradient in ``.grad``. Otherwise
the optimizer has one `Ranks`, chosen when it is made (`ranks_of`), which answers two questions:

1. What local tensor and what local gradient does a parameter's hook work on? `place` sets ``record.local`` (what the
   kernels update), ``record.shard`` (where it lies in the whole parameter, as the operators take it; of all records or
   of none) and ``record.weight``. `reduced` takes what autograd left in ``.grad`` and gives pairs of record and local
   gradient, of this parameter or of earlier ones, now or later; `rest` gives those that are left when backward ends.
2. How are norms combined? Each parameter's slot holds the sum of squares of its local gradient; the sum of slot times
   weight goes through `sum_`, after which every rank has the same number, hence the same overflow flag, clip
   coefficient and decision to skip.

Every method is called by all ranks in the same order, and may communicate; what autograd or `step` calls runs under
`no_grad`, what `backward` calls itself as its caller does, on tensors that need no gradient. Nothing here reads a
device tensor on the host, and nothing knows which ranks share a host.

`sharding.Sharded` serves DTensor (FSDP2, tensor parallel), `reduce.Averaged` a process group. A third engine is a
subclass, and a line in `ranks_of`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .records import Record

Kept = list[tuple[Record, Tensor]]


class Ranks:
    """What the processes of one optimizer do together."""

    #: What a local gradient, as `reduced` gives it, is divided by in the kernels.
    divisor = 1
    #: Whether every rank's graph has the same parts, so that what one rank finds in its own, all find.
    same_graphs = True
    #: All ranks, as groups over which something is done in turn to reach everyone: one, or one per mesh dimension.
    groups: Sequence[dist.ProcessGroup] = ()

    def start(self, records: Sequence[Record], model: nn.Module | None) -> None:
        """Called once `records` are known and placed, and again where some were added, before any step."""

    def place(self, record: Record) -> None:
        """Sets ``local``, ``shard`` and ``weight`` of a record; called before every step. Default: the whole parameter,
        counted once on every rank."""
        record.local = record.param

    def begin(self, *, again: bool = False) -> None:
        """A backward begins whose gradients go through `reduced`. What an interrupted one left is forgotten.
        `again`: its graph will be run through once more."""

    def reduced(self, record: Record, grad: Tensor) -> Iterable[tuple[Record, Tensor]]:
        """Local gradients that are ready, now that `grad` has come for `record`. `grad` is the caller's no more."""
        return ((record, grad),)

    def rest(self) -> Iterable[tuple[Record, Tensor]]:
        """The local gradients still missing when backward has ended."""
        return ()

    def kept(self, kept: Kept, *, copy: bool) -> Kept:
        """Local gradients of what plain backwards left in ``.grad``, which stays as it is where `copy`."""
        return [ready for record, grad in kept for ready in self.reduced(record, grad)]

    def end(self) -> None:
        """A step has ended: all its updates, if any, are with the kernels."""

    def sum_(self, total: Tensor) -> None:
        """Adds up `total` (float64: this rank's weighted sum of squares, or one for each parameter) over all ranks, in
        place."""

    def leaves(self) -> Iterable[Tensor]:
        """Parameters, ours and others, that backward gives gradients though the graph has something else for them."""
        return ()

    def unreduced(self) -> bool:
        """Whether the engine holds gradients that it adds to the next backward's only once, then drops."""
        return False

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises ValueError, on every rank, unless all have the same `facts`: otherwise steps would hang or diverge."""
        ours = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in facts.items()}
        seen = {dist.get_rank(): ours}
        for group in self.groups:  # all of them before anything is raised: the next one's others would wait
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


def local_of(param: Tensor) -> Tensor:
    """The part of a parameter that is in this process's memory: the local shard of a DTensor or of DeepSpeed's ZeRO-3
    (padded there), otherwise itself."""
    return getattr(param, "ds_tensor", getattr(param, "_local_tensor", param))


def is_here(param: Tensor) -> bool:
    """Whether this process has a part of the parameter, if only an empty one: whether a DTensor's mesh contains it."""
    mesh = getattr(param, "device_mesh", None)
    return mesh is None or mesh.get_coordinate() is not None


def shape_of(param: Tensor) -> Sequence[int]:
    """The shape of the whole parameter."""
    return getattr(param, "ds_shape", param.shape)


def is_engine(model: Any) -> bool:
    """Whether this is a DeepSpeed engine. Asked by name: DeepSpeed takes seconds to import."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def ranks_of(records: Sequence[Record], process_group: Any, *, stochastic: bool) -> Ranks | None:
    """The engine that `records` and `process_group` (False: none) speak of; None: one process. `stochastic`: how one
    rounds.

    Raises:
        TypeError, ValueError, NotImplementedError: no engine can take these parameters.
    """
    if is_engine(process_group):
        from ..integrations.deepspeed import ZeRO3

        return ZeRO3(process_group, records)
    sharded = [record for record in records if local_of(record.param) is not record.param]
    if any(hasattr(record.param, "ds_tensor") for record in sharded):
        raise ValueError(
            "Lomo: the parameters are cut by DeepSpeed's ZeRO-3; pass the engine that deepspeed.initialize returns, "
            "Lomo(engine, ...), or with parameter groups process_group=engine"
        )
    if process_group is not False:
        from .reduce import Averaged

        if process_group is None:  # torch's functions take it for the default group: not to be trained alone, unasked
            raise TypeError(
                "Lomo: process_group is None, as torch.distributed.group.WORLD is before init_process_group(). Call "
                "that first; on one process leave process_group out"
            )
        if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"Lomo: process_group is a {type(process_group).__name__}, expected a torch.distributed.ProcessGroup "
                "that this process belongs to, such as torch.distributed.group.WORLD"
            )
        if sharded:
            raise ValueError(
                f"Lomo: {sharded[0].name} is a DTensor, whose gradients its engine reduces; leave process_group out. "
                "Data parallel over shards: fully_shard with a mesh of two dimensions"
            )
        return Averaged(process_group, records)
    if not sharded:
        return None
    from .sharding import Sharded

    return Sharded(records, stochastic=stochastic)
