"""Hyperparameters: checked on the host, handed to the kernels in vectors on the parameters' device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..numbers import shown
from ..ops._arguments import FINITE, check_dense
from ..ops.scalars import NAMES

_NUMBER = "expected a finite number >= 0, or a one-element float64 or float32 tensor"


def check_group(group: dict[str, Any], where: str) -> None:
    """Raises TypeError or ValueError unless a parameter group's options are usable. Tensors are not read."""
    for name in ("lr", "weight_decay"):
        _check(group[name], f"{where}: {name}", _NUMBER, lambda value: 0 <= value <= FINITE)
    if group["clip_grad_value"] is not None:
        _check(
            group["clip_grad_value"],
            f"{where}: clip_grad_value",
            "expected None, a number > 0, or a one-element float64 or float32 tensor",
            lambda value: 0 < value <= FINITE or value == math.inf,
        )


def unused_momentum(groups: Sequence[dict[str, Any]]) -> str:
    """A warning if a group's ``momentum`` is not zero, otherwise "". Does not read tensors."""
    for index, group in enumerate(groups):
        momentum = group.get("momentum", 0.0)
        if isinstance(momentum, Tensor) or momentum:
            return (
                f"Lomo: param_groups[{index}]['momentum'] is {shown(momentum)}, which is not used: Lomo has no "
                "momentum. OneCycleLR and CyclicLR set it; give them cycle_momentum=False"
            )
    return ""


def numbers_of(group: dict[str, Any]) -> list[float | None]:
    """A checked group's options. Reads those that are tensors."""
    return [None if group[name] is None else float(group[name]) for name in ("lr", "weight_decay", "clip_grad_value")]


def check_positive(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a finite number above zero."""
    if isinstance(value, Tensor):
        raise TypeError(f"Lomo: {name} is a tensor, expected a number")
    _check(value, f"Lomo: {name}", "expected a finite number > 0", lambda number: 0 < number <= FINITE)


def check_seed(seed: Any, where: str) -> int:
    """Raises ValueError unless `seed` is an integer of 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"{where} is {shown(seed)}, expected an integer of 64 bits")
    return seed


def _check(value: Any, where: str, expected: str, allowed: Any) -> None:
    if isinstance(value, Tensor):
        check_dense(where, "it", value)
        if value.numel() != 1 or value.dtype not in (torch.float64, torch.float32) or value.is_meta:
            of = f"shape {list(value.shape)} and dtype {value.dtype} on {value.device}"
            raise ValueError(f"{where} has {of}, {expected}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} is {shown(value)}, {expected}")
    elif not allowed(value):
        raise ValueError(f"{where} is {shown(value)}, {expected}")


class LiveScalar:
    """One hyperparameter of one group, in the vector of scalars on one device. It is written when it changes, or, if it
    is a tensor, at every step."""

    def __init__(self, cell: Tensor) -> None:
        self._cell = cell
        self._number: float | None = None

    def set(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            self._number = None
            self._cell.copy_(value.detach().reshape(()), non_blocking=self._cell.is_cuda)
        elif value != self._number:
            self._number = None  # an interrupt may come before the number is set below
            self._cell.fill_(value)
            # A capture fills nothing: the graph fills the number at replay, and the next eager step fills it again.
            captured = self._cell.is_cuda and torch.cuda.is_current_stream_capturing()
            self._number = None if captured else value


class GroupScalars:
    """The scalars of one parameter group on one device.

    Args:
        vector: as the operators take it (`lomo_kernels.ops.scalars`).
    """

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector
        self.lr, self.weight_decay, self.clip_value = (
            LiveScalar(vector[NAMES.index(name)]) for name in ("lr", "weight_decay", "clip_value")
        )
        self.clamps = True  # whether the group has a clip value

    def set(self, group: dict[str, Any], lr: float | Tensor | None) -> None:
        """Takes over a group's present values; `lr`, if given, stands in for the group's."""
        self.lr.set(group["lr"] if lr is None else lr)
        self.weight_decay.set(group["weight_decay"])
        clip_value = group["clip_grad_value"]
        self.clamps = clip_value is not None
        self.clip_value.set(math.inf if clip_value is None else clip_value)
