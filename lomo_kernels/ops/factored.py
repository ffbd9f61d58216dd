"""Updates with a factor for each row and each column of a gradient, and the sums that such factors are made of.

A gradient is a matrix [rows, columns] here. Let g be an element of it after `update_`'s scaling, clamping and
multiplication by ``clip_coef``. The *factored gradient* is ``f = g * row_factor * column_factor``, in float32, in this
order, each product rounded. An element whose scaled gradient is not finite has f = NaN.

- ``factor_sums_`` adds the sums of g² along rows and along columns; one read of the gradient.
- ``factored_sq_norm_`` adds the sum of f²; one read.
- ``factored_update_`` updates the parameter with f as its gradient; one read. An element whose f is not finite keeps
  its parameter. `low` is as of `sgd_`.

A rule reads a gradient three times if its factors depend on the sums, and its coefficient on the sum of f². All
elements have to be summed before the first factor is known. The coefficient has to be known before the first update.
The factors of one row also depend on its columns' sums, so no order of rows saves a read.

Several matrices may lie below each other, as the slices of a tensor of more than two dimensions do. Then each row of
each matrix has a row factor, and each column of each matrix has a column factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import check_low, check_pair, check_slot, library
from .scalars import check_vector

library.define("factor_sums_(Tensor(a!) row_sums, Tensor(b!) column_sums, Tensor grad, Tensor scalars) -> ()")
library.define(
    "factored_sq_norm_(Tensor(a!) slot, Tensor grad, Tensor row_factors, Tensor column_factors, Tensor scalars) -> ()"
)
library.define(
    "factored_update_(Tensor(a!) param, Tensor grad, Tensor row_factors, Tensor column_factors, Tensor scalars, "
    "int rule, bool stochastic, int seed, int parameter_id, int[] shard, Tensor(b!)? low=None) -> ()"
)


def check_factors(op: str, grad: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError unless `rows` and `columns` fit `grad`, [rows, columns].

    Args:
        rows: [rows]. Factors may be empty: then all are 1.
        columns: [matrices, columns]. Factors may be empty, too.
        dtype: of both: float64 for sums, float32 for factors.
    """
    if grad.dim() != 2:
        raise ValueError(f"{op}: grad has shape {list(grad.shape)}, expected a matrix")
    may_be_empty = dtype is torch.float32
    for name, given, expected in (("rows", rows, grad.shape[0]), ("columns", columns, grad.shape[1])):
        if given.dtype is not dtype or given.device != grad.device or not given.is_contiguous():
            raise ValueError(
                f"{op}: {name} has dtype {given.dtype} on {given.device}, expected contiguous {dtype} on {grad.device}"
            )
        if may_be_empty and given.numel() == 0:
            continue
        fits = given.shape == (expected,) if name == "rows" else given.dim() == 2 and given.shape[1] == expected
        if not fits:
            raise ValueError(f"{op}: {name} has shape {list(given.shape)}, grad has shape {list(grad.shape)}")
    if (columns.numel() or not may_be_empty) and (not len(columns) or grad.shape[0] % len(columns)):
        raise ValueError(f"{op}: {columns.shape[0]} matrices in {grad.shape[0]} rows, expected a divisor")


@torch.library.register_fake("lomo_kernels::factor_sums_")
def _(row_sums: Tensor, column_sums: Tensor, grad: Tensor, scalars: Tensor) -> None:
    check_factors("factor_sums_", grad, row_sums, column_sums, torch.float64)
    check_vector("factor_sums_", scalars, grad.device)


@torch.library.register_fake("lomo_kernels::factored_sq_norm_")
def _(slot: Tensor, grad: Tensor, row_factors: Tensor, column_factors: Tensor, scalars: Tensor) -> None:
    check_slot("factored_sq_norm_", "slot", slot, grad.device)
    check_factors("factored_sq_norm_", grad, row_factors, column_factors, torch.float32)
    check_vector("factored_sq_norm_", scalars, grad.device)


@torch.library.register_fake("lomo_kernels::factored_update_")
def _(
    param: Tensor,
    grad: Tensor,
    row_factors: Tensor,
    column_factors: Tensor,
    scalars: Tensor,
    rule: int,
    stochastic: bool,
    seed: int,
    parameter_id: int,
    shard: Sequence[int],
    low: Tensor | None = None,
) -> None:
    check_pair("factored_update_", param, grad)
    check_low("factored_update_", [param], [] if low is None else [low], stochastic=stochastic)
    check_factors("factored_update_", grad, row_factors, column_factors, torch.float32)
    check_vector("factored_update_", scalars, param.device)
