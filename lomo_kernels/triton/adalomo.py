# mypy: disable-error-code="no-untyped-def"
"""``adalomo_factors`` in Triton: one launch. `lomo_kernels/composite/rule_factors.py` states the formula.

One program has the rows of a matrix, because all of them are divided by their mean. Others have some columns each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.rule_factors import check_adalomo
from . import launch

#: Numbers that a program has at a time.
BLOCK = 1024

TINY, LARGEST = tl.constexpr(torch.finfo(torch.float32).tiny), tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def moved(mean, squares, elements, beta, eps):
    """A running mean after the mean of so many squares."""
    bounded = squares / elements + eps
    bounded = tl.where(bounded < TINY, TINY, tl.where(bounded > LARGEST, LARGEST, bounded))  # NaN stays
    new = bounded.to(tl.float32)
    change = mean - new
    return tl.where(beta < 0.5, new + beta * change, mean - change * (1.0 - beta))


@triton.jit
def inverse_root(x):
    return (1.0 / tl.sqrt(x.to(tl.float64))).to(tl.float32)


@triton.jit(do_not_specialize=["matrices", "rows", "columns", "eps"])
def adalomo_kernel(
    row_sums,
    column_sums,
    row,
    column,
    beta,
    row_factors,
    column_factors,
    new_row,
    new_column,
    matrices: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    eps: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With ROWS, a program for the rows of each matrix. Then programs for BLOCK columns each, of all matrices.

    eps: the bits of a float64.
    """
    program, own, rate = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.load(beta)
    rows, columns, floor = rows.to(tl.int64), columns.to(tl.int64), eps.to(tl.int64).to(tl.float64, bitcast=True)
    of_rows = matrices.to(tl.int64) if ROWS else 0
    if program >= of_rows:
        at = (program - of_rows) * BLOCK + own
        inside = at < matrices.to(tl.int64) * columns
        squares, mean = tl.load(column_sums + at, mask=inside, other=0.0), tl.load(column + at, mask=inside, other=0.0)
        new = moved(mean, squares, tl.maximum(rows, 1), rate, floor)
        tl.store(new_column + at, new, mask=inside)
        tl.store(column_factors + at, inverse_root(new), mask=inside)
    elif ROWS:
        first, total, begin = program * rows, tl.zeros((BLOCK,), tl.float64), rows * 0
        while begin < rows:
            at, inside = first + begin + own, begin + own < rows
            squares, mean = tl.load(row_sums + at, mask=inside, other=0.0), tl.load(row + at, mask=inside, other=0.0)
            new = moved(mean, squares, tl.maximum(columns, 1), rate, floor)
            tl.store(new_row + at, new, mask=inside)
            total += tl.where(inside, new, 0.0).to(tl.float64)
            begin += BLOCK
        of_all = tl.sum(total, axis=0) / rows
        begin = rows * 0
        while begin < rows:  # each thread reads what it has written
            at, inside = first + begin + own, begin + own < rows
            new = tl.load(new_row + at, mask=inside, other=1.0).to(tl.float64)
            tl.store(row_factors + at, inverse_root(new / of_all), mask=inside)
            begin += BLOCK


def adalomo_factors(
    row_sums: Tensor, column_sums: Tensor, row: Tensor, column: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_adalomo(row_sums, column_sums, row, column, beta)
    matrices, columns = column.shape
    made = row.new_empty(row.numel()), torch.empty_like(column), torch.empty_like(row), torch.empty_like(column)
    programs = (matrices if row.numel() else 0) + launch.cdiv(column.numel(), BLOCK)
    if programs:
        sizes = matrices, row_sums.numel() // matrices, columns
        with launch.on(column.device):
            adalomo_kernel[(programs,)](
                row_sums,
                column_sums,
                row,
                column,
                beta,
                *made,
                *sizes,
                launch.bits(eps),
                ROWS=row.numel() > 0,
                BLOCK=BLOCK,
                **launch.options(),
            )
    return made
