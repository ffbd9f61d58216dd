"""The low parts of bfloat16 parameters, with ``rounding="split"``: 16 bits that a bfloat16 has no room for.

A parameter and its low part together are a float32 (`docs/numerics.md`). The low part stands in ``optimizer.state``,
because the weights in the model are of no use to its owner without it, and lies beside the parameter on its device. It
begins with zeros: the float32 is then the parameter itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .managed_parameter import ManagedParameter
from .placement import local_of

#: The name of a low part in ``optimizer.state``, and of all of them among exported numbers.
LOW = "low"


def make_low_parts(managed_params: Sequence[ManagedParameter]) -> None:
    """Gives each trained bfloat16 parameter a low part, on its device. Low parts that are there keep their bits.

    Raises:
        TypeError: a trained parameter is float16.
    """
    for managed in managed_params:
        local = managed.local
        if local.dtype is torch.float16 and managed.param.requires_grad:
            raise TypeError(
                f'Lomo: {managed.name} is float16, and rounding="split" is for bfloat16 parameters. Use '
                'model.bfloat16(), or rounding="stochastic"'
            )
        if local.dtype is not torch.bfloat16:
            managed.low = None
        elif managed.low is not None:
            managed.low = managed.low.to(local.device)
        elif managed.param.requires_grad:
            managed.low = torch.zeros_like(local.detach(), dtype=torch.int16)


def lacks_low_part(managed: ManagedParameter) -> bool:
    """Whether `make_low_parts` has something to do, or to refuse, for a parameter that may have been unfrozen."""
    return managed.low is None and managed.param.requires_grad and managed.local.dtype is not torch.float32


def low_parts_of(managed_params: Sequence[ManagedParameter]) -> list[Tensor]:
    """As the operators take them: those of float32 parameters are empty."""
    none = torch.empty(0, dtype=torch.int16, device=managed_params[0].device)
    return [none if managed.low is None else managed.low for managed in managed_params]


def state_of(managed: ManagedParameter) -> dict[str, Tensor]:
    """What ``optimizer.state`` has of a low part: its bytes, uint8 [..., 2], in the same memory. They are a DTensor if
    the parameter is one. So `torch.distributed.checkpoint` can gather them, or cut them in another way. Neither gloo
    nor NCCL sends int16."""
    if managed.low is None:
        return {}
    param: Any = managed.param
    made = managed.low.unsqueeze(-1).view(torch.uint8)
    if hasattr(param, "device_mesh"):
        whole = {"shape": (*param.shape, 2), "stride": (*(2 * stride for stride in param.stride()), 1)}
        made = param.from_local(made, param.device_mesh, param.placements, run_check=False, **whole)
    return {LOW: made}


# ---- Copies and state dicts -----------------------------------------------------------------------------------------


def export(managed_params: Sequence[ManagedParameter]) -> dict[str, list[Tensor | None]]:
    """Copies of all low parts."""
    return {LOW: [None if managed.low is None else managed.low.clone() for managed in managed_params]}


def load(managed_params: Sequence[ManagedParameter], low: Sequence[Tensor | None]) -> None:
    """Takes over the low parts of the first parameters, as `export` or `read` gave them. None: zeros."""
    for managed, given in zip(managed_params, low, strict=False):
        if managed.low is None and given is not None:
            managed.low = torch.zeros_like(managed.local.detach(), dtype=torch.int16)
        if managed.low is not None:
            managed.low.zero_() if given is None else managed.low.copy_(given)


def read(
    state: Mapping[Any, Any], order: Sequence[Any], managed_params: Sequence[ManagedParameter], *, splits: bool
) -> list[Tensor | None]:
    """The low parts in a state dict, checked. A warning says what happens if they are missing, or of no use here.

    Args:
        state: of the state dict.
        order: its keys in the order of `managed_params`.
        splits: whether the optimizer does.

    Raises:
        ValueError: a low part is not of its parameter's shape, or cut over ranks in another way.
    """
    entries = [state.get(key) for key in order]
    parts = [entry.get(LOW) if isinstance(entry, dict) else None for entry in entries]
    pairs = list(zip(parts, managed_params, strict=True))
    saved = [managed for given, managed in pairs if given is not None]
    dropped = [managed for managed in saved if not (splits and managed.local.dtype is torch.bfloat16)]
    if dropped:
        more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
        warnings.warn(
            f'Lomo: the state dict was saved with rounding="split". The low part of {dropped[0].name}{more} is '
            "dropped, because the optimizer that loads it does not split this parameter. The weight continues from the "
            "bfloat16 number that it is",
            stacklevel=8,  # load_state_dict's caller
        )
    if splits and not saved and any(managed.low is not None for managed in managed_params):
        warnings.warn(
            'Lomo: the state dict was saved without rounding="split". The low parts begin with zeros: each weight '
            "continues from the bfloat16 number that it is",
            stacklevel=8,
        )
    return [None if given is None or managed in dropped else _checked(given, managed) for given, managed in pairs]


def _checked(given: Any, managed: ManagedParameter) -> Tensor:
    param, expected = managed.param, [*managed.local.shape, 2]
    if not isinstance(given, Tensor) or given.dtype is not torch.uint8 or given.is_meta:
        was = f"{given.dtype} on {given.device}" if isinstance(given, Tensor) else repr(given)
        raise ValueError(f"Lomo: the state dict's low part of {managed.name} is {was}, expected a uint8 tensor")
    alike = getattr(given, "placements", None) == getattr(param, "placements", None)
    part = local_of(given)
    if not alike or list(part.shape) != expected:
        raise ValueError(
            f"Lomo: the state dict's low part of {managed.name} has shape {list(part.shape)} on this rank, expected "
            f"{expected}, cut as the parameter is. torch.distributed.checkpoint cuts it anew"
        )
    return part.contiguous().view(torch.int16)[..., 0]
