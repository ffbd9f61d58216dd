"""Sharded runs: FSDP2's own `fully_shard`, over ranks of which only the first exists. Collectives return at once.

Rank 0 has the largest shards, so its memory is the largest. Buffers of the collectives that FSDP2 makes are counted,
those inside NCCL are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.profiler import record_function
from torch.utils._python_dispatch import _disable_current_modes

from .blocks import blocks_of
from .recorder import GATHERED, GRADIENTS, Recorder


@contextmanager
def ranks(number: int) -> Iterator[DeviceMesh]:
    """A mesh of `number` ranks, while inside, for `shard`; this process is rank 0, and there are no others.

    Raises:
        RuntimeError: torch.distributed is in use.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if dist.is_initialized():
        raise RuntimeError("plan: this process is in a process group already; simulate in one that is not")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield init_device_mesh("cpu", (number,))
    finally:
        dist.destroy_process_group()


def shard(build: Callable[[], nn.Module], mesh: DeviceMesh, group: str) -> Callable[[], nn.Module]:
    """`build`, then `fully_shard`.

    What stands outside of blocks, embedding, last norm and head, are groups of their own: the norm's reduce-scatter
    lets the buffer of the head's go before the last block needs the memory (0.5 GiB of 65B).

    Args:
        group: "block", "attention-mlp" or "linear": what of a block is gathered together.
    """

    def built() -> nn.Module:
        model = build()
        for block in blocks_of(model):
            for part in _parts(block, group):
                fully_shard(part, mesh=mesh)
            fully_shard(block, mesh=mesh)
        inside = {id(module) for module in blocks_of(model).modules()}
        for module in list(model.modules())[1:]:
            if id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    return built


def _parts(block: nn.Module, group: str) -> list[nn.Module]:
    """What of a block is gathered apart."""
    if group == "block":
        return []
    if group == "linear":
        return [module for module in block.modules() if isinstance(module, nn.Linear)]
    if group != "attention-mlp":
        raise ValueError(f"plan: group is {group!r}, expected block, attention-mlp or linear")
    return [child for child in block.children() if any(isinstance(module, nn.Linear) for module in child.modules())]


@contextmanager
def observe_sharding(recorder: Recorder) -> Iterator[None]:
    """Tells the recorder what FSDP2 gathers, and which gradients it reduces."""

    def within(name: str, category: str) -> Any:
        original = getattr(FSDPParamGroup, name)

        def method(group: Any, *args: Any, **kwargs: Any) -> Any:
            if category == GRADIENTS:
                params = (getattr(param, "_unsharded_param", None) for param in group.fsdp_params)
                grads = (param.grad for param in params if param is not None and param.grad is not None)
                recorder.is_(grads, GRADIENTS)
            with recorder.making(category):
                return original(group, *args, **kwargs)

        return patch.object(FSDPParamGroup, name, method)

    def unseen(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return original(*args, **kwargs)

        return patch.object(owner, name, method)

    with ExitStack() as stack:
        for name, category in (("unshard", GATHERED), ("wait_for_unshard", GATHERED), ("post_backward", GRADIENTS)):
            stack.enter_context(within(name, category))
        # To find an operator's output, DTensor runs it on simulated tensors of the whole size.
        stack.enter_context(unseen(ShardingPropagator, "_propagate_tensor_meta_non_cached"))
        # FSDP2 names what it does for the profiler, which costs a tenth of a simulation.
        unnamed = patch.multiple(record_function, __enter__=lambda self: self, __exit__=lambda self, *_: None)
        stack.enter_context(unnamed)
        yield
