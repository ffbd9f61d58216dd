"""DeepSpeed ZeRO-3 (`deepspeed` 0.19): every rank has one part of each parameter, gathered while a module runs.

::

    engine, *_ = deepspeed.initialize(model=model, config=config)  # "zero_optimization": {"stage": 3}, no optimizer
    optimizer = Lomo(engine, lr=0.5, clip_grad_norm=1.0)  # with parameter groups: process_group=engine
    for batch in loader:
        optimizer.backward(engine.module(**batch).loss)  # not engine(...); no engine.backward, no engine.step

The engine is what has to be given, not its module: parameters do not say which DeepSpeed gathers and frees them.

DeepSpeed gathers parameters in forward and backward; gradients are left alone, so a hook has this rank's whole, local
one. It is reduced and scattered at once: what a rank keeps of it is the sum of its own part, to which the kernels apply
the update, in the memory where that part lies: on the CPU under ``offload_param``. No whole gradient is reduced to
every rank, and with ``clip_passes="one"`` only parts are kept for the norm.

As DeepSpeed itself, this takes every rank to run the same modules in the same order: what depends on a rank's data (an
expert not chosen) must still be part of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from packaging.requirements import Requirement
from torch import Tensor

from ..managed_parameter import ManagedParameter
from ..placement import Block, Placement, blocks_of_range
from ..streams import current, here
from .base import ParallelEngine, StoredGrads
from .in_flight import BUCKET_BYTES, IN_FLIGHT_BYTES, InFlight

# Its name since torch 2.13, and before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# How often a module's hooks are still to be called in backward. DeepSpeed counts down from what the forward counted.
_COUNTERS = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")


def check_version(installed: str) -> None:
    """Raises ImportError unless `installed` is a version of DeepSpeed that this package's extra asks for."""
    try:
        required = map(Requirement, requires("lomo_kernels") or ())
    except PackageNotFoundError:  # imported from a source folder that was not installed
        return
    for requirement in required:
        wanted = (
            requirement.name == "deepspeed"
            and requirement.marker is not None
            and requirement.marker.evaluate({"extra": "deepspeed"})
        )
        if wanted and not requirement.specifier.contains(installed, prereleases=True):
            raise ImportError(
                f"Lomo: DeepSpeed is version {installed}, expected {requirement.specifier}: "
                f'pip install "deepspeed{requirement.specifier}"'
            )


check_version(deepspeed.__version__)

_INITIALIZE = (
    'initialize it with "zero_optimization": {"stage": 3} and without an optimizer, in the config or as an argument'
)


class _Come(NamedTuple):
    """One gradient on its way."""

    managed: ManagedParameter
    grad: Tensor
    stream: torch.cuda.Stream | None  # whose memory it is


class ZeRO3(ParallelEngine):
    """The ranks of a DeepSpeed engine, whose batches differ.

    Raises:
        ValueError: the engine is not of stage 3, has an optimizer, or a setting that only its own optimizer heeds; a
            parameter is not one of its own.
        NotImplementedError: parameters on NVMe, or in groups that are not all ranks (hpZ, MiCS, experts, AutoTP).
    """

    def __init__(self, engine: Any, managed_params: Sequence[ManagedParameter]) -> None:
        _check_engine(engine)
        for managed in managed_params:
            _check_parameter(managed)
        self._offload, self._module = engine.optimizer, engine.module
        first: Any = managed_params[0].param
        self._group = first.ds_process_group
        self.groups = [self._group]
        self.grad_divisor = dist.get_world_size(self._group)
        self._rank = dist.get_rank(self._group)
        self.device_type = torch.device(engine.device).type
        self._blocks: dict[int, tuple[Block, ...]] = {}  # of each parameter's part
        self._counted: list[tuple[Any, str, int]] = []
        self._forget()

    def localize(self, managed: ManagedParameter) -> Placement:
        # Parts are of one size; what pads the last of them has gradients of zero and is read by no one.
        param: Any = managed.param
        elements = param.ds_tensor.numel()
        offset = self._rank * elements
        if managed.index not in self._blocks:
            shape = tuple(param.ds_shape)
            self._blocks[managed.index] = blocks_of_range(shape, offset, min(offset + elements, math.prod(shape)))
        return Placement(
            param.ds_tensor, (offset, elements, elements), groups=(self._group,), blocks=self._blocks[managed.index]
        )

    def begin_backward(self, *, again: bool = False) -> None:
        self._forget()
        if again:
            self._counted = [
                (module, name, count)
                for module in self._module.modules()
                for name in _COUNTERS
                if (count := module.__dict__.get(name)) is not None
            ]

    def _forget(self) -> None:
        self._open: list[_Come] = []  # small gradients that will travel together
        self._open_bytes = 0
        self._in_flight = InFlight()
        self._counted = []

    def reduce_grad(self, managed: ManagedParameter, grad: Tensor) -> Iterator[tuple[ManagedParameter, Tensor]]:
        if grad.layout is not torch.strided:
            raise managed.not_dense(grad)
        come = _Come(managed, grad, current(grad))
        del grad
        if not managed.small:
            self._send([come])
        else:
            if self._open and self._open[0].grad.dtype is not come.grad.dtype:
                self._send_open()
            self._open.append(come)
            self._open_bytes += come.grad.nbytes
            if self._open_bytes >= BUCKET_BYTES:
                self._send_open()
        del come
        yield from self._received(IN_FLIGHT_BYTES)

    def drain(self) -> Iterator[tuple[ManagedParameter, Tensor]]:
        yield from self._left()
        self._offload.release_backward_leftovers()
        for module, name, count in self._counted:
            setattr(module, name, count)
        self._counted = []

    def reduce_stored_grads(self, kept: StoredGrads, *, copy: bool) -> StoredGrads:
        self._forget()
        ready: StoredGrads = []
        while kept:  # each whole gradient is freed as its part comes
            ready += self.reduce_grad(*kept.pop())
        return [*ready, *self._left()]

    def end(self) -> None:
        # What is gathered now, the small parameters that DeepSpeed never frees first of all, is from before the update.
        self._offload.release_backward_leftovers()
        self._offload.partition_all_parameters()
        if not get_accelerator().is_synchronized_device():
            # DeepSpeed gathers on a stream of its own, which does not wait for the updates on this one.
            get_accelerator().current_stream().synchronize()
        persistent = self._offload.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def sum_(self, total: Tensor) -> None:
        self._all_reduce(total, self._group)

    def _send_open(self) -> None:
        come, self._open, self._open_bytes = self._open, [], 0
        self._send(come)

    def _send(self, come: list[_Come]) -> None:
        """Starts the reduction of some gradients: side by side, each in one row per rank."""
        managed_params = [managed for managed, _, _ in come]
        rows = [self._rows(managed, here(grad, stream)) for managed, grad, stream in come]
        whole = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        come.clear()
        del rows
        parts = whole.new_empty(whole.shape[1])  # this rank's row of `whole`: its padded parts, side by side
        work = _reduce_scatter(parts, whole.view(-1), group=self._group, async_op=True)
        self._in_flight.put(managed_params, parts, whole, work)

    def _rows(self, managed: ManagedParameter, grad: Tensor) -> Tensor:
        """A whole gradient as [ranks, elements of a part]; a copy only where the last part is padded."""
        padding = managed.local.numel() * self.grad_divisor - grad.numel()
        flat = grad.reshape(-1)
        return (torch.nn.functional.pad(flat, (0, padding)) if padding else flat).view(self.grad_divisor, -1)

    def _received(self, limit: int) -> Iterator[tuple[ManagedParameter, Tensor]]:
        for managed_params, parts in self._in_flight.take(limit):
            # Under offload one copy, which the host waits for, brings them all to the CPU. Parts of parameters that
            # DeepSpeed keeps whole stay on the GPU, so a message may be for both.
            sizes = [managed.local.numel() for managed in managed_params]
            placed = {
                device: parts.to(device).split(sizes) for device in {managed.local.device for managed in managed_params}
            }
            for position, managed in enumerate(managed_params):
                yield managed, placed[managed.local.device][position]

    def _left(self) -> Iterator[tuple[ManagedParameter, Tensor]]:
        if self._open:
            self._send_open()
        yield from self._received(-1)


def _check_engine(engine: Any) -> None:
    """Raises ValueError unless the engine does nothing but gather and free parameters."""
    stage = engine.zero_optimization_stage()
    if stage != 3 or not isinstance(engine.optimizer, DeepSpeedZeRoOffload):
        has = "no optimizer" if engine.optimizer is None else f"a {type(engine.optimizer).__name__}"
        raise ValueError(
            f"Lomo: the DeepSpeed engine has ZeRO stage {stage} and {has}; {_INITIALIZE}. Without stage 3 pass the "
            "plain module, and process_group=torch.distributed.group.WORLD"
        )
    given = engine._config._param_dict  # the accessors have defaults: gradient_clipping() is 1.0
    ignored = {
        "gradient_clipping": (given.get("gradient_clipping"), "Lomo's clip_grad_norm"),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps() > 1, "optimizer.accumulate()"),
        "scheduler": (given.get("scheduler"), "one of torch.optim.lr_scheduler"),
        "communication_data_type": (
            given.get("communication_data_type"),
            "nothing: gradients travel in their own dtype",
        ),
        "torch_autocast": (engine.torch_autocast_enabled(), "torch.autocast around the forward"),
    }
    set_options = [f"{name} (use {instead})" for name, (set_, instead) in ignored.items() if set_]
    if set_options:
        raise ValueError(
            f"Lomo: the DeepSpeed config has {', '.join(set_options)}, which only DeepSpeed's own optimizers heed; "
            "take it out"
        )


def _check_parameter(managed: ManagedParameter) -> None:
    """Raises unless a parameter is in equal parts on all ranks, where the kernels can reach it."""
    param: Any = managed.param
    if not hasattr(param, "ds_tensor"):
        raise ValueError(
            f"Lomo: {managed.name} is none of the DeepSpeed engine's parameters; make the optimizer after "
            "deepspeed.initialize, from the engine or from engine.module's parameters"
        )
    if param.ds_tensor.final_location == "nvme":
        raise NotImplementedError(
            f'Lomo: {managed.name} is kept on NVMe, which no kernel can reach. Use "offload_param": {{"device": "cpu"}}'
        )
    if param.ds_zero_param_process_group is not None:
        raise NotImplementedError(
            f"Lomo: {managed.name} has a second copy (zero_hpz_partition_size) that would be left behind; take it out"
        )
    if param.ds_zero_partition_world_size != dist.get_world_size():
        raise NotImplementedError(
            f"Lomo: {managed.name} is cut over {param.ds_zero_partition_world_size} of {dist.get_world_size()} ranks "
            "(MiCS, experts, tensor parallel); only parameters cut over all of them are served"
        )
