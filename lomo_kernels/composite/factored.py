"""The factored operators (`lomo_kernels.ops.factored`) in torch's own operators, tile by tile: for GPUs if there is
no Triton. Nothing is read from a GPU by the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.factored import check_factors
from ..ops.scalars import CLIPPING, POSITIONS, check_vector, without_clipping
from . import tiled


def _clipped_tiles(grad: Tensor, matrices: int, scalars: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(matrices, rows, g of these rows) of each tile: whole matrices, or some rows of one. g is NaN if the scaled
    gradient is not finite."""
    numbers = scalars.to(grad.device).float()
    inv_scale, limit, coef = (numbers[POSITIONS[name]] for name in CLIPPING)
    rows, columns = grad.shape
    if not rows * columns:
        return
    of_matrix = rows // matrices
    height = tiled.tile_rows(rows, columns, grad.device.type)
    together = max(1, height // of_matrix)  # a convolution has thousands of matrices
    for matrix in range(0, matrices, together):
        last = min(matrix + together, matrices)
        for first in range(matrix * of_matrix, last * of_matrix, height):
            here = slice(first, min(first + height, last * of_matrix))
            scaled = grad[here].detach().float() * inv_scale
            clipped = torch.maximum(torch.minimum(scaled, limit), -limit) * coef
            yield slice(matrix, last), here, torch.where(scaled.isfinite(), clipped, torch.nan)


def _tiles(grad: Tensor, row_factors: Tensor, column_factors: Tensor, scalars: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, factored gradient of some rows) of each tile."""
    matrices = len(column_factors) if column_factors.numel() else 1
    for matrix, here, tile in _clipped_tiles(grad, matrices, scalars):
        if row_factors.numel():
            tile = tile * row_factors[here, None]
        if column_factors.numel():
            of_columns = column_factors[matrix, None]
            tile = (tile.unflatten(0, (len(of_columns), -1)) * of_columns).flatten(0, 1)
        yield here.start, tile


def factor_sums_(row_sums: Tensor, column_sums: Tensor, grad: Tensor, scalars: Tensor) -> None:
    check_factors("factor_sums_", grad, row_sums, column_sums, torch.float64)
    check_vector("factor_sums_", scalars, grad.device)
    for matrix, here, tile in _clipped_tiles(grad, len(column_sums), scalars):
        squares = tile.double().square_()
        row_sums[here] += squares.sum(1)
        column_sums[matrix] += squares.unflatten(0, (matrix.stop - matrix.start, -1)).sum(1)


def factored_sq_norm_(slot: Tensor, grad: Tensor, row_factors: Tensor, column_factors: Tensor, scalars: Tensor) -> None:
    check_factors("factored_sq_norm_", grad, row_factors, column_factors, torch.float32)
    check_vector("factored_sq_norm_", scalars, grad.device)
    for _, tile in _tiles(grad, row_factors, column_factors, scalars):
        torch.ops.lomo_kernels.sq_norm_.default([slot], [tile], None)


def factored_update_(
    param: Tensor,
    grad: Tensor,
    row_factors: Tensor,
    column_factors: Tensor,
    scalars: Tensor,
    *update_arguments: Any,
) -> None:
    check_factors("factored_update_", grad, row_factors, column_factors, torch.float32)
    check_vector("factored_update_", scalars, param.device)
    tiles = _tiles(grad, row_factors, column_factors, scalars)
    tiled.update_by_tiles(param, tiles, without_clipping(scalars), None, *update_arguments)


IMPLEMENTATIONS = {function.__name__: function for function in (factor_sums_, factored_sq_norm_, factored_update_)}
