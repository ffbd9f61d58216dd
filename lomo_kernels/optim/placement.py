"""Where the parts of a parameter lie that engines spread over several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Placement(NamedTuple):
    """This process's part of a parameter."""

    local: Tensor  # what the kernels update
    shard: tuple[int, int, int] | None = None  # where it lies in the whole parameter, as the operators take it
    weight: float = 1.0  # of its squared norm in the sum over all ranks: one over the number of copies


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
