"""Scalars of each parameter's own update. `clip_tensor` and the rules with row and column factors need them, because
they multiply each parameter's gradient by another number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.scalars import NAMES
from .managed_parameter import DeviceState, ManagedParameter

_COEF, _FOUND_INF = NAMES.index("clip_coef"), NAMES.index("found_inf")


class Cells(NamedTuple):
    """The scalars of one parameter's update, on its device. `clip_coef` and `found_inf` are views of `vector`."""

    vector: Tensor
    clip_coef: Tensor
    found_inf: Tensor


class ParameterScalars:
    """A vector of scalars (`lomo_kernels.ops.scalars`) for each parameter.

    Args:
        managed_params: all parameters.
        group_of: each one's group.
        devices: those of the parameters.
    """

    def __init__(
        self,
        managed_params: Sequence[ManagedParameter],
        group_of: Sequence[int],
        devices: Mapping[torch.device, DeviceState],
    ) -> None:
        self._tables: list[tuple[DeviceState, Tensor, Tensor]] = []
        vectors: dict[torch.device, Tensor] = {}
        for device, device_state in devices.items():
            index = torch.tensor(group_of, dtype=torch.int64, device="cpu").to(device)
            vectors[device] = device_state.vectors.index_select(0, index)
            self._tables.append((device_state, index, vectors[device]))
        first = next(iter(vectors.values()))
        self._cells = []
        for managed in managed_params:
            row = vectors.get(managed.device, first)[managed.index]
            self._cells.append(Cells(row, row[_COEF], row[_FOUND_INF]))

    def begin_update(self) -> None:
        """Gives each parameter the scalars of its group."""
        for device_state, group_of, vectors in self._tables:
            torch.index_select(device_state.vectors, 0, group_of, out=vectors)

    def set_coefs(self, coefs: Tensor) -> None:
        """Sets the coefficients of all parameters: float64 [parameters]."""
        for _, _, vectors in self._tables:
            vectors[:, _COEF].copy_(coefs, non_blocking=vectors.is_cuda)

    def cells(self, managed: ManagedParameter) -> Cells:
        return self._cells[managed.index]

    def vector(self, managed: ManagedParameter) -> Tensor:
        """The scalars of one parameter's update."""
        return self._cells[managed.index].vector
