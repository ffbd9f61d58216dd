"""Which engine serves an optimizer's parameters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ..managed_parameter import ManagedParameter
from ..placement import local_of
from .base import ParallelEngine


def is_engine(model: Any) -> bool:
    """Whether this is a DeepSpeed engine. Asked by name: DeepSpeed takes seconds to import."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def choose_engine(
    managed_params: Sequence[ManagedParameter], process_group: Any, *, stochastic: bool
) -> ParallelEngine | None:
    """The engine for these parameters and `process_group` (False: none); None: one process.

    `stochastic`: whether results are rounded so.

    Raises:
        TypeError, ValueError, NotImplementedError: no engine can take these parameters.
    """
    if is_engine(process_group):
        from .zero3 import ZeRO3

        return ZeRO3(process_group, managed_params)
    if "torch.distributed.fsdp" in sys.modules:  # not imported for this
        from .dtensor import refuse_gathered

        refuse_gathered(managed_params)
    sharded = [managed for managed in managed_params if local_of(managed.param) is not managed.param]
    if any(hasattr(managed.param, "ds_tensor") for managed in sharded):
        raise ValueError(
            "Lomo: the parameters are cut by DeepSpeed's ZeRO-3; pass the engine that deepspeed.initialize returns, "
            "Lomo(engine, ...), or with parameter groups process_group=engine"
        )
    if process_group is not False:
        from .data_parallel import DataParallel

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
        return DataParallel(process_group, managed_params)
    if not sharded:
        return None
    from .dtensor import DTensorEngine

    return DTensorEngine(managed_params, stochastic=stochastic)
