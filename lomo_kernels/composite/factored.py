"""The factored operators (`lomo_kernels.ops.factored`) in torch's own operators, tile by tile: for devices that have no
kernel for them. Nothing is read from a GPU by the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.factored import check_factors
from ..ops.scalars import NAMES, NEUTRAL, check_vector
from . import tiled

_OF_THE_GRADIENT = tuple(NAMES.index(name) for name in ("inv_scale", "clip_value", "clip_coef"))


def _clipped_tiles(grad: Tensor, matrices: int, scalars: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(matrix, first row, g of some of its rows) of each tile; NaN if the scaled gradient is not finite."""
    numbers = scalars.to(grad.device).float()
    inv_scale, limit, coef = (numbers[position] for position in _OF_THE_GRADIENT)
    rows, columns = grad.shape
    if not rows * columns:
        return
    of_matrix = rows // matrices
    height = min(tiled.tile_rows(rows, columns, grad.device.type), of_matrix)
    for first in (begin + more for begin in range(0, rows, of_matrix) for more in range(0, of_matrix, height)):
        matrix = first // of_matrix
        scaled = grad[first : min(first + height, (matrix + 1) * of_matrix)].detach().float() * inv_scale
        clipped = torch.maximum(torch.minimum(scaled, limit), -limit) * coef
        yield matrix, first, torch.where(scaled.isfinite(), clipped, torch.nan)


def _tiles(grad: Tensor, row_factors: Tensor, column_factors: Tensor, scalars: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, factored gradient of some rows) of each tile."""
    matrices = len(column_factors) if column_factors.numel() else 1
    for matrix, first, tile in _clipped_tiles(grad, matrices, scalars):
        if row_factors.numel():
            tile = tile * row_factors[first : first + len(tile), None]
        if column_factors.numel():
            tile = tile * column_factors[matrix]
        yield first, tile


def factor_sums_(row_sums: Tensor, column_sums: Tensor, grad: Tensor, scalars: Tensor) -> None:
    check_factors("factor_sums_", grad, row_sums, column_sums, torch.float64)
    check_vector("factor_sums_", scalars, grad.device)
    for matrix, first, tile in _clipped_tiles(grad, len(column_sums), scalars):
        squares = tile.double().square_()
        row_sums[first : first + len(tile)] += squares.sum(1)
        column_sums[matrix] += squares.sum(0)


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
    *rest: Any,
) -> None:
    check_factors("factored_update_", grad, row_factors, column_factors, torch.float32)
    check_vector("factored_update_", scalars, param.device)
    neutral = scalars.clone()
    for position in _OF_THE_GRADIENT:
        neutral[position].fill_(NEUTRAL[position])

    tiled.update_by_tiles(param, _tiles(grad, row_factors, column_factors, scalars), neutral, None, *rest)


IMPLEMENTATIONS = {function.__name__: function for function in (factor_sums_, factored_sq_norm_, factored_update_)}
