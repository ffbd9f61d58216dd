"""``adalomo_factors`` (`lomo_kernels.ops.adalomo`) in torch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.adalomo import check_adalomo

_FLOAT32 = torch.finfo(torch.float32)


def adalomo_factors(
    row_sums: Tensor, column_sums: Tensor, row: Tensor, column: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_adalomo(row_sums, column_sums, row, column, beta)

    def moved(mean: Tensor, squares: Tensor, elements: int) -> Tensor:
        bounded = (squares / max(elements, 1) + eps).clamp(_FLOAT32.tiny, _FLOAT32.max)
        return torch.lerp(bounded.float(), mean, beta)

    rows = row_sums.numel() // len(column)  # of each matrix
    column = moved(column, column_sums, rows)
    if not row.numel():
        return row.new_empty(0), column.rsqrt(), row.new_empty(row.shape), column
    row = moved(row, row_sums.view(row.shape), column.shape[1])
    wide = row.double()  # the ratio of a row of zeros to large rows is too small for float32
    of_rows = (wide / wide.mean(dim=1, keepdim=True)).rsqrt().float()
    return of_rows.view(-1), column.rsqrt(), row, column


IMPLEMENTATIONS = {"adalomo_factors": adalomo_factors}
