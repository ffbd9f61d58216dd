"""The operators of `lomo_kernels.ops.rule_factors` in torch's own operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.rule_factors import check_adalomo, check_scale, check_squares, check_states, check_total

_FLOAT32 = torch.finfo(torch.float32)
_TINY = 1e-12


def factor_sums_total_(row_sums: Tensor, slot: Tensor | None, found_inf: Tensor) -> tuple[Tensor, Tensor]:
    check_total(row_sums, slot, found_inf)
    total = row_sums.sum()
    if slot is not None:
        slot.add_(total)
    found_inf.add_(total, alpha=0.0)  # NaN, which is not zero, of infinity and of NaN
    return total, found_inf == 0


def inverse_rms(squares: Tensor, elements: int, wide: bool) -> Tensor:
    check_squares(squares)
    rms = (squares / max(elements, 1)).sqrt_().add_(_TINY)
    return torch.reciprocal(rms, out=torch.empty_like(rms, dtype=torch.float64 if wide else torch.float32))


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


def adalomo_scale_(
    coef: Tensor, u_squares: Tensor, param_squares: Tensor, elements: int, clip_threshold: float, eps: float
) -> None:
    check_scale(coef, u_squares, param_squares)
    rms = torch._foreach_div([u_squares, param_squares], float(max(elements, 1)))  # one call for both
    torch._foreach_sqrt_(rms)
    torch._foreach_clamp_min_(rms, [clip_threshold, eps])
    scale = rms[1].div_(rms[0])
    coef.mul_((scale if clip_threshold == 1.0 else scale.mul_(clip_threshold)).view(coef.shape))


def replace_states_(states: Sequence[Tensor], new: Sequence[Tensor], is_finite: Tensor) -> None:
    check_states(states, new, is_finite)
    for state, changed in zip(states, new, strict=True):
        torch.where(is_finite, changed, state, out=state)


_FUNCTIONS = (factor_sums_total_, inverse_rms, adalomo_factors, adalomo_scale_, replace_states_)
IMPLEMENTATIONS = {function.__name__: function for function in _FUNCTIONS}
