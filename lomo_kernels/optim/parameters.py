"""Which parameters an optimizer may take: checks and names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..backends import check_device
from ..ops._arguments import DTYPES
from ..ops._overlap import Access, Region, find_conflict, overlaps_itself, region
from .managed_parameter import ManagedParameter
from .placement import local_of


def named_groups(model_or_params: Any) -> list[Any]:
    """What `torch.optim.Optimizer` takes: a model's named parameters, frozen ones included, or the iterable given.

    Raises:
        TypeError: not a model and not an iterable.
        ValueError: nothing to train.
        RuntimeError: the model is wrapped in DistributedDataParallel or FullyShardedDataParallel (version 1).
    """
    if isinstance(model_or_params, nn.Module):
        _refuse_wrappers(model_or_params)
        params: list[Any] = list(model_or_params.named_parameters())
    elif isinstance(model_or_params, Tensor) or not isinstance(model_or_params, Iterable):
        raise TypeError(
            f"Lomo: model_or_params is a {type(model_or_params).__name__}, expected an nn.Module, an iterable of "
            "parameters or parameter groups"
        )
    else:
        params = list(model_or_params)
    if not params:
        raise ValueError("Lomo: model_or_params holds no parameters")
    return params


def model_to_fuse(model_or_params: Any, fused_layers: bool | nn.Module) -> nn.Module | None:
    """The model in which layers are to be fused; None: nowhere."""
    if isinstance(fused_layers, nn.Module):
        return fused_layers
    if not isinstance(fused_layers, bool):
        raise TypeError(f"Lomo: fused_layers is a {type(fused_layers).__name__}, expected True, False or the model")
    if not fused_layers:
        return None
    if not isinstance(model_or_params, nn.Module):
        raise ValueError(
            "Lomo: fused_layers=True needs the model, to find its layers; with parameters or groups pass it there: "
            "fused_layers=model"
        )
    return model_or_params


_INSTEAD = (
    "Pass the plain module, and process_group=torch.distributed.group.WORLD in the wrapper's place",
    "Use FSDP2: torch.distributed.fsdp.fully_shard(model), then Lomo(model)",
)


def _refuse_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        kind = type(module).__name__
        # replicate() has a DistributedDataParallel behind the module, whose class it makes a DDP of its own.
        replicated = any(base.__module__ == "torch.distributed._composable.replicate" for base in type(module).__mro__)
        if replicated or isinstance(module, nn.parallel.DistributedDataParallel) or kind == "FullyShardedDataParallel":
            raise RuntimeError(
                f"Lomo: the model holds a {kind}. The hooks get gradients before {kind} has reduced them, or none. The "
                f"ranks would get different weights. {_INSTEAD[kind == 'FullyShardedDataParallel']}"
            )


def name_of(param: Any, index: int) -> tuple[str, Any]:
    """A parameter group's entry, a parameter or a (name, parameter) pair, as a pair; `index` names a nameless one."""
    if isinstance(param, tuple) and len(param) == 2:
        return str(param[0]), param[1]
    return f"parameter {index}", param


def check_parameter(name: str, param: Any) -> None:
    """Raises unless an optimizer may manage `param`. A frozen one may be of any dtype and layout, on any device.

    Raises:
        TypeError: not a tensor; or trained, and of a dtype the kernels do not take.
        ValueError: not a leaf or uninitialised; or trained, and sparse or with elements that share memory.
        NotImplementedError: trained, and on a device no backend serves.
        RuntimeError: FSDP1's.
    """
    if not isinstance(param, Tensor):
        raise TypeError(f"Lomo: {name} is a {type(param).__name__}, expected a parameter")
    if isinstance(param, torch.nn.parameter.UninitializedParameter):
        raise ValueError(f"Lomo: {name} is not initialised yet; run the lazy module once before making the optimizer")
    if not param.is_leaf:
        raise ValueError(f"Lomo: {name} is not a leaf tensor; pass the parameter it was computed from")
    if getattr(param, "_is_flat_param", False):
        raise RuntimeError(f"Lomo: {name} is FSDP1's, which calls no hooks. {_INSTEAD[True]}")
    if not param.requires_grad:
        return
    param = local_of(param)
    if param.dtype not in DTYPES:
        raise TypeError(f"Lomo: {name} has dtype {param.dtype}, expected float32, bfloat16 or float16 (or frozen)")
    if param.layout != torch.strided:
        raise ValueError(f"Lomo: {name} has layout {param.layout}, expected a dense (strided) tensor (or frozen)")
    if overlaps_itself(param):
        raise ValueError(
            f"Lomo: several elements of {name} share one place in memory (an expanded tensor?). It cannot be updated "
            "in place; pass a contiguous parameter"
        )
    check_device(param.device)


def is_supported(param: Tensor) -> bool:
    """Whether the kernels can update `param`. `check_parameter` accepts frozen ones that they cannot update."""
    if param.requires_grad:
        return True
    local = local_of(param)
    return (
        local.dtype in DTYPES
        and local.layout == torch.strided
        and local.device.type in ("cpu", "cuda")
        and not overlaps_itself(local)
    )


def check_apart(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError if two parameters share memory: each update would change the other parameter."""
    by_device: dict[torch.device, list[Region]] = {}
    for name, param in ((name, local_of(param)) for name, param in named):
        if not (isinstance(param, FakeTensor) or param.is_meta or param.layout != torch.strided) and param.numel():
            by_device.setdefault(param.device, []).append(region(param, Access.WRITTEN, name))
    for regions in by_device.values():
        if conflict := find_conflict(regions):
            first, second = conflict
            raise ValueError(
                f"Lomo: {first.name} and {second.name} share memory but are two parameters. Each update would change "
                "both; make them one parameter (tie the modules to the same nn.Parameter)"
            )


_NOT_ADDED = (
    ", by hand or by an engine that was given this optimizer (DeepSpeed's ZeRO: give it none, see "
    "docs/distributed/README.md). No weight was changed. Use add_param_group(), or make a new optimizer"
)


def check_groups(managed_params: Sequence[ManagedParameter], groups: Sequence[dict[str, Any]]) -> None:
    """Raises RuntimeError if `groups` hold other parameters than `managed_params`, the ones with hooks."""
    params = [param for group in groups for param in group["params"]]
    if len(params) != len(managed_params):
        raise RuntimeError(f"Lomo: parameters were put into or taken out of param_groups{_NOT_ADDED}")
    for managed, param in zip(managed_params, params, strict=True):
        if param is not managed.param:
            raise RuntimeError(f"Lomo: {managed.name} was exchanged in param_groups{_NOT_ADDED}")


def check_unchanged(managed_params: Sequence[ManagedParameter], model: nn.Module | None) -> None:
    """Raises RuntimeError if parameters were cut into parts, or exchanged in `model`, since hooks were put on them.

    Args:
        model: None: not compared, as under FSDP2, which replaces parameters while it runs.
    """
    for managed in managed_params:
        if managed.local is not local_of(managed.param):
            raise RuntimeError(
                f"Lomo: {managed.name} was cut into parts since the optimizer was made. Make the optimizer after "
                "deepspeed.initialize, from the engine. No weight was changed"
            )
    if model is None:
        return
    present = {id(param): param for param in model.parameters()}
    names = {id(managed.param): managed.name for managed in managed_params}
    missing = [name for key, name in names.items() if key not in present]
    if missing and any(param.requires_grad and key not in names for key, param in present.items()):
        raise RuntimeError(
            f"Lomo: the model's {missing[0]} is another parameter than when the optimizer was made, and the new one "
            "has no hook. Make the optimizer after fully_shard, parallelize_module and all else that replaces "
            "parameters. No weight was changed"
        )


def check_adapters(managed_params: Sequence[ManagedParameter], model: nn.Module) -> None:
    """Raises RuntimeError if `model`, which PEFT has adapters in, got trainable parameters since it was given."""
    managed = {id(managed.param) for managed in managed_params}
    for name, param in model.named_parameters():
        if param.requires_grad and id(param) not in managed:
            raise RuntimeError(
                f"Lomo: {name} was added after the optimizer was made (an adapter of PEFT?), and the optimizer would "
                "not train it. Make the optimizer after get_peft_model and add_adapter, or give it the new parameters: "
                "optimizer.add_param_group({'params': [(name, parameter), ...]}). No weight was changed"
            )
