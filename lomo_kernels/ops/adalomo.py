"""What AdaLomo makes of a gradient's sums: its running means and factors. One launch on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import library

library.define(
    "adalomo_factors(Tensor row_sums, Tensor column_sums, Tensor row, Tensor column, Tensor beta, float eps) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)


def check_adalomo(row_sums: Tensor, column_sums: Tensor, row: Tensor, column: Tensor, beta: Tensor) -> None:
    """Raises ValueError unless the arguments of ``adalomo_factors`` fit each other.

    The operator returns ``(row_factors, column_factors, new row, new column)``, all float32. Nothing is changed. See
    `lomo_kernels.optim.factored_rules.AdaLomoRule` for the formula.

    Args:
        row_sums: float64 [matrices * rows], sums of the squares of a gradient along its rows.
        column_sums: float64 [matrices, columns].
        row: float32 [matrices, rows], the running means before; without elements, the parameter is a vector.
        column: float32 [matrices, columns].
        beta: float32, no dimensions: the weight of the running means before.
    """
    device, op = column.device, "adalomo_factors"
    for name, tensor, dtype in (
        ("row_sums", row_sums, torch.float64),
        ("column_sums", column_sums, torch.float64),
        ("row", row, torch.float32),
        ("column", column, torch.float32),
        ("beta", beta, torch.float32),
    ):
        if tensor.dtype is not dtype or tensor.device != device or not tensor.is_contiguous():
            what = f"dtype {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{op}: {name} has {what}, expected contiguous {dtype} on {device}")
    if column.dim() != 2 or column.shape != column_sums.shape or not len(column) or beta.numel() != 1:
        raise ValueError(
            f"{op}: column has shape {list(column.shape)}, column_sums {list(column_sums.shape)}, beta "
            f"{list(beta.shape)}, expected [matrices, columns] twice and one element"
        )
    if row.numel() and (row.dim() != 2 or len(row) != len(column) or row.numel() != row_sums.numel()):
        raise ValueError(
            f"{op}: row has shape {list(row.shape)}, row_sums {list(row_sums.shape)}, expected [matrices, rows] and "
            f"[matrices * rows] of {len(column)} matrices"
        )


@torch.library.register_fake("lomo_kernels::adalomo_factors")
def _(
    row_sums: Tensor, column_sums: Tensor, row: Tensor, column: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_adalomo(row_sums, column_sums, row, column, beta)
    return row.new_empty(row.numel()), torch.empty_like(column), torch.empty_like(row), torch.empty_like(column)
