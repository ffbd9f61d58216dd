"""DTensor parameters: FSDP2 (`fully_shard`), tensor parallel (`parallelize_module`), and both at once.

The hook of a DTensor sees the gradient after its engine has reduced it. What is left to do here: to bring it to the
parameter's placements where its own differ (row-wise embedding: Replicate for Shard; sequence-parallel norm: Partial,
which must be reduced before squaring), to say where the local shard lies, and to count each element once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from ..managed_parameter import ManagedParameter
from ..placement import Block, Placement
from .base import ParallelEngine

Shard = tuple[int, int, int]


class DTensorEngine(ParallelEngine):
    """Parameters of which some are DTensors. Plain ones beside them are whole, and the same, on every rank.

    Raises:
        ValueError: a placement is Partial.
        NotImplementedError: no parameter's mesh contains all others'; or rounding is stochastic and a shard is cut in a
            way that the random bits' indices cannot follow.
    """

    def __init__(self, managed_params: Sequence[ManagedParameter], *, stochastic: bool) -> None:
        self._stochastic = stochastic
        self._placed: dict[int, tuple[Any, tuple[Any, ...]]] = {}  # by parameter, while its layout stays the same
        meshes = []
        for managed in managed_params:
            if isinstance(managed.param, DTensor):
                if any(placement.is_partial() for placement in managed.param.placements):
                    raise ValueError(
                        f"Lomo: {managed.name} has placements {managed.param.placements}, "
                        "expected Shard and Replicate only"
                    )
                if managed.param.device_mesh not in meshes:
                    meshes.append(managed.param.device_mesh)
        # The largest mesh's ranks hold the model; a parameter on a part of it has copies on the others.
        largest = max(meshes, key=lambda mesh: mesh.size())
        holders = _ranks_of(largest)
        for mesh in meshes:
            if not holders.issuperset(_ranks_of(mesh)):
                raise NotImplementedError(
                    f"Lomo: parameters lie on {mesh} and on {largest}, of which neither contains the other; "
                    "use a mesh of two dimensions and its slices"
                )
        self._size = largest.size()
        # A mesh's own groups reach all of it, one dimension after the other, without a group made for it, which ranks
        # that have no part in this model would have to make too.
        world = dist.group.WORLD
        assert world is not None  # there is a mesh
        self.groups = [world] if self._size == dist.get_world_size() else largest.get_all_groups()
        self.device_type = largest.device_type

    def begin_training(self, managed_params: Sequence[ManagedParameter], model: nn.Module | None) -> None:
        ids = {id(managed.param) for managed in managed_params}
        self._fsdp = [
            group for group in _fsdp_groups() if any(id(param.sharded_param) in ids for param in group.fsdp_params)
        ]
        in_model = model is not None and any(isinstance(module, FSDPModule) for module in model.modules())
        for managed in managed_params if self._fsdp or in_model else ():
            if managed.param.requires_grad and not isinstance(managed.param, DTensor):
                raise ValueError(
                    f"Lomo: {managed.name} is a plain parameter beside FSDP2's, which no one reduces the gradient of. "
                    "Call fully_shard on the whole model too, after its parts, or freeze it"
                )
        if not all(
            hasattr(group, "_partial_reduce_output")
            and all(hasattr(param, "unsharded_accumulated_grad") for param in group.fsdp_params)
            for group in self._fsdp
        ):
            raise RuntimeError(
                f"Lomo: the FSDP2 of torch {torch.__version__} keeps gradients of backwards without synchronisation "
                "elsewhere than that of 2.11 to 2.14, where they are looked for; use one of these"
            )

    def localize(self, managed: ManagedParameter) -> Placement:
        param = managed.param
        if not isinstance(param, DTensor):
            return Placement(param, _whole(param), 1.0 / self._size)
        local = param._local_tensor
        key = param.placements, local.shape
        if self._placed.get(managed.index, (None,))[0] != key:
            mesh = param.device_mesh
            copies = math.prod(n for n, kind in zip(mesh.shape, param.placements, strict=True) if kind.is_replicate())
            weight = mesh.size() / self._size / copies
            block = block_of(param)
            shard = None if block is None else shard_of(block, param.shape)
            if shard is None and self._stochastic:
                raise NotImplementedError(
                    f"Lomo: {managed.name} of shape {list(param.shape)} is cut to {list(local.shape)} by "
                    f"{param.placements}; stochastic rounding needs rows at equal distance. Shard it in at most two "
                    'dimensions, the first one of them, or use rounding="nearest"'
                )
            groups = _groups_of_parts(param)
            blocks = None if block is None or not groups else (block,) if local.numel() else ()
            self._placed[managed.index] = key, (shard or _whole(local), weight, groups, blocks)
        return Placement(local, *self._placed[managed.index][1])

    def reduce_grad(self, managed: ManagedParameter, grad: Tensor) -> Iterable[tuple[ManagedParameter, Tensor]]:
        if not isinstance(grad, DTensor):
            return ((managed, grad),)
        placements = managed.param.placements  # type: ignore[attr-defined]
        if grad.placements != placements:
            grad = grad.redistribute(placements=placements)
        local = grad._local_tensor
        if isinstance(local, AsyncCollectiveTensor):
            local = local.wait()
        if local.device.type != self.device_type:
            # CPU offload: not every version of FSDP2 has waited for its copy, and a kernel on the CPU reads at once.
            torch.get_device_module(self.device_type).current_stream().synchronize()
        if local.is_cuda:
            # With HSDP or FSDPModule.set_all_reduce_hook this hook runs on another stream than the one whose memory the
            # shard is, and FSDP2 counts on .grad to hold it. On its own stream this costs nothing.
            local.record_stream(torch.cuda.current_stream(local.device))
        # FSDP2's gradients are views of one buffer per group of modules: a small one that waits would keep all of it.
        if managed.small and local.untyped_storage().nbytes() > 2 * managed.bytes:
            local = local.clone()
        return ((managed, local),)

    def sum_(self, total: Tensor) -> None:
        if len(self.groups) > 1:
            self.sum_parts_(total.view(-1), self.groups)
            return
        self._all_reduce(total, self.groups[0])

    def graph_leaves(self) -> Iterator[Tensor]:
        # The graph has FSDP2's gathered parameters; the gradients go to the shards, also of another optimizer.
        return (param.sharded_param for group in _fsdp_groups() for param in group.fsdp_params)

    def has_unreduced_grads(self) -> bool:
        return any(
            group._partial_reduce_output is not None
            or any(
                param.unsharded_accumulated_grad is not None
                or getattr(getattr(param, "_unsharded_param", None), "grad", None) is not None
                for param in group.fsdp_params
            )
            for group in self._fsdp
        )


def _ranks_of(mesh: DeviceMesh) -> set[int]:
    with _disable_current_modes():  # in a simulation (`lomo_kernels.plan`) tensors have no values
        return set(mesh.mesh.flatten().tolist())


def _coordinate(mesh: DeviceMesh) -> Sequence[int] | None:
    """Where this rank is in a mesh. None: it is not in it."""
    with _disable_current_modes():  # see `_ranks_of`
        return mesh.get_coordinate()


def _groups_of_parts(param: DTensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of the mesh dimensions that cut a parameter. Others have copies of the same part."""
    mesh = param.device_mesh
    if _coordinate(mesh) is None:  # this rank has no part, and no such group
        return ()
    cutting = (dim for dim, placement in enumerate(param.placements) if not placement.is_replicate())
    return tuple(mesh.get_group(dim) for dim in cutting if mesh.size(dim) > 1)


def block_of(param: DTensor) -> Block | None:
    """The elements that the local shard consists of. None if they are no block of the whole parameter."""
    coordinate = _coordinate(param.device_mesh)
    if coordinate is None:  # this rank has no part
        return Block((0,) * param.dim(), tuple(param._local_tensor.shape))
    block = cut_block(tuple(param.shape), param.device_mesh.shape, coordinate, param.placements)
    return block if block is not None and block.shape == tuple(param._local_tensor.shape) else None


def cut_block(
    shape: tuple[int, ...], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> Block | None:
    """The block of a tensor that the rank at `coordinate` of a mesh has. None if its elements are no block.

    Of two mesh dimensions that cut the same dimension of the tensor, FSDP2's comes first in the mesh but cuts last,
    what tensor parallel has cut before: torch calls that a strided shard, whose split factor is the number of tensor
    parallel's parts.
    """
    start, length = [0] * len(shape), list(shape)
    cuts = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    strided = [dim for dim in cuts if hasattr(placements[dim], "split_factor")]
    for mesh_dim in (*(dim for dim in cuts if dim not in strided), *reversed(strided)):
        placement = placements[mesh_dim]
        dim = placement.dim % len(shape)
        if mesh_dim in strided:
            before = [other for other in cuts if other > mesh_dim and placements[other].dim % len(shape) == dim]
            if math.prod(mesh_shape[other] for other in before) != placement.split_factor:
                return None
        size = -(-length[dim] // mesh_shape[mesh_dim])  # as `torch.chunk`
        first = min(size * coordinate[mesh_dim], length[dim])
        start[dim] += first
        length[dim] = min(size, length[dim] - first)
    return Block(tuple(start), tuple(length))


def shard_of(block: Block, whole: Sequence[int]) -> Shard | None:
    """Where a block's elements lie in the whole parameter: ``(offset, row_length, row_stride)``, as the operators take
    it. None where three numbers cannot say it: a block that is cut in three dimensions or so."""
    shape = block.shape
    if not whole or math.prod(shape) == 0:
        return 0, 1, 1
    # The last dimension that is cut ends a row; those before it count rows, which follow each other at equal distance
    # if, of these dimensions, all before the last cut one have length 1.
    strides = [math.prod(whole[d + 1 :]) for d in range(len(whole))]
    offset = sum(first * stride for first, stride in zip(block.start, strides, strict=True))
    cut = [d for d in range(len(whole)) if shape[d] != whole[d]]
    last = cut[-1] if cut else 0
    before = cut[-2] if len(cut) > 1 else 0
    if math.prod(shape[:before]) != 1:
        return None
    return offset, math.prod(shape[last:]), math.prod(whole[last:])


def _whole(tensor: Tensor) -> Shard:
    elements = max(tensor.numel(), 1)
    return 0, elements, elements


def refuse_gathered(managed_params: Sequence[ManagedParameter]) -> None:
    """Raises ValueError if one is what FSDP2 has gathered for a while, in place of its shard."""
    trained = {id(managed.param): managed.name for managed in managed_params if managed.param.requires_grad}
    for group in _fsdp_groups():
        for param in group.fsdp_params:
            name = trained.get(id(getattr(param, "_unsharded_param", None)))
            if name is not None:
                raise ValueError(
                    f"Lomo: FSDP2 has gathered {name} (after a forward without a backward, or unshard()), and frees it "
                    "later; the optimizer trains its shard. Before you make the optimizer, call reshard() on the "
                    "module that was given to fully_shard (model.reshard() for the whole model)"
                )


def _fsdp_groups() -> Iterator[Any]:
    """FSDP2's own records of the parameters that it gathers together, of all models there are."""
    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            yield from filter(None, [state._fsdp_param_group] if groups is None else groups)
