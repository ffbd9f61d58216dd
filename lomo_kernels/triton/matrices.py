# mypy: disable-error-code="no-untyped-def"
"""How the kernels with row and column factors divide gradients, and read them.

A program takes a tile [M, R, C]: M matrices, R rows and C columns. Either M is 1, or whole matrices fit into a tile, as
the thousands of a convolution do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.factored import check_factors
from . import launch
from .numerics import BLOCK, widen
from .sgd import SCALARS

SIZES = ("matrices", "rows", "columns")

# ---- In kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def corner_of(program, rows, columns, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """First matrix, row and column of a program's tile, int64. Neighbours in a row of tiles run together."""
    across, down = tl.cdiv(columns, C), tl.cdiv(rows, R)
    group = program // (across * down)
    within = program - group * across * down
    return group * M, within // across * R, within % across * C


@triton.jit
def element_of(rows, stride, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr = 1):
    """Distance of each element of a tile from its first one, int32 [M, R, C / STEP]: of every STEP-th column.

    stride: elements from one row to the next. `tile_of` sees that the distances fit.
    """
    m, r = tl.arange(0, M)[:, None, None], tl.arange(0, R)[None, :, None]
    c = (tl.arange(0, C // STEP) * STEP)[None, None, :]
    return (m * rows.to(tl.int32) + r) * stride.to(tl.int32) + c


@triton.jit
def inside_of(matrix, row, column, matrices, rows, columns, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Which elements of a tile are in the gradient."""
    m, r, c = tl.arange(0, M)[:, None, None], tl.arange(0, R)[None, :, None], tl.arange(0, C)[None, None, :]
    return (m < matrices - matrix) & (r < rows - row) & (c < columns - column)


@triton.jit
def clipped(bits, unscale, limit, coef, G: tl.constexpr, CLAMP: tl.constexpr):
    """The clipped gradient in float32, NaN if the scaled gradient is not finite."""
    scaled = widen(bits, G) * unscale
    g = scaled
    if CLAMP:
        g = tl.minimum(tl.maximum(g, -limit), limit)
    return tl.where(tl.abs(scaled) < float("inf"), g * coef, float("nan"))


# ---- In launchers ----------------------------------------------------------------------------------------------------

#: Elements of a tile's row. A warp's vectors of a 16-bit dtype have so many.
WIDTH = 256


class Tile(NamedTuple):
    """How a gradient is cut: M matrices by R rows by C columns for each program."""

    M: int
    R: int
    C: int

    def programs(self, matrices: int, rows: int, columns: int) -> int:
        return launch.cdiv(matrices, self.M) * launch.cdiv(rows, self.R) * launch.cdiv(columns, self.C)


def tile_of(matrices: int, rows: int, columns: int) -> Tile:
    """By shape alone, and few of them: each is a kernel of its own.

    Args:
        rows: of one matrix.
    """
    height, width = (1 << max(size - 1, 0).bit_length() for size in (rows, columns))  # the next power of two
    if matrices > 1 and height * width <= BLOCK // 4:
        return Tile(BLOCK // (height * width), height, width)
    width = min(width, WIDTH)
    if columns * (BLOCK // width) >= 2**31:  # distances in a tile are int32
        return Tile(1, 1, BLOCK)
    return Tile(1, BLOCK // width, width)


def shape_of(grad: Tensor, column_factors: Tensor) -> tuple[int, int, int]:
    """Matrices, rows of one, columns."""
    matrices = len(column_factors) if column_factors.numel() else 1
    return matrices, grad.shape[0] // matrices, grad.shape[1]


def is_aligned(columns: int, *tensors: Tensor | None) -> bool:
    """Whether rows begin where vectors do."""
    return columns % 16 == 0 and not any(t.data_ptr() % 16 for t in tensors if t is not None)


def clipping_arguments(scalars: launch.StepScalars) -> list[int]:
    """Arguments of a kernel that only clips: inv_scale, clip_value, clip_coef, and whether they are addresses."""
    at = SCALARS.index("inv_scale")
    return [*scalars.arguments[at : at + 3], scalars.on_device]


def check(op: str, grad: Tensor, rows: Tensor, columns: Tensor, scalars: Tensor, dtype: torch.dtype) -> Any:
    check_factors(op, grad, rows, columns, dtype)
    launch.check_element_type(op, "grad", grad, grad.device)
    return launch.step_scalars(op, scalars, grad.device)
