"""What rules with row and column factors make of sums of squares: totals, factors, coefficients, states.

The numbers are few: one for each row and column of a gradient, or one in all. So a call's time on a GPU is its launch,
and each operator here is one launch of the CUDA library. `lomo_kernels.optim.factored_rules` states the formulas.

- ``factor_sums_total_`` adds up the sums of all rows. It adds the total to a norm's slot, and NaN to ``found_inf`` if
  the total is not finite. It returns the total and whether ``found_inf`` is zero then: whether the parameter changes.
- ``inverse_rms`` makes ``1 / (RMS + 1e-12)`` of sums of so many squares, in float64, rounded to float32 unless `wide`.
- ``adalomo_factors`` makes AdaLomo's factors and running means.
- ``adalomo_scale_`` multiplies a coefficient by AdaLomo's: ``max(eps, RMS(p)) / max(1, RMS(u) / clip_threshold)``.
- ``replace_states_`` copies new states over the old ones if the parameter changes. It takes no memory on a device, so
  it cannot fail after an update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import library

library.define("factor_sums_total_(Tensor row_sums, Tensor(a!)? slot, Tensor(b!) found_inf) -> (Tensor, Tensor)")
library.define("inverse_rms(Tensor squares, int elements, bool wide) -> Tensor")
library.define(
    "adalomo_factors(Tensor row_sums, Tensor column_sums, Tensor row, Tensor column, Tensor beta, float eps) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "adalomo_scale_(Tensor(a!) coef, Tensor u_squares, Tensor param_squares, int elements, float clip_threshold, "
    "float eps) -> ()"
)
library.define("replace_states_(Tensor(a!)[] states, Tensor[] new, Tensor is_finite) -> ()")


def _check(op: str, device: torch.device, dtype: torch.dtype, one: bool = False, **tensors: Tensor) -> None:
    """Raises ValueError unless the tensors are contiguous, of `dtype` and on `device`; and of one element, if `one`."""
    for name, tensor in tensors.items():
        if tensor.dtype is not dtype or tensor.device != device or not tensor.is_contiguous():
            what = f"dtype {tensor.dtype} on {tensor.device}" + ("" if tensor.is_contiguous() else ", not contiguous")
            raise ValueError(f"{op}: {name} has {what}, expected contiguous {dtype} on {device}")
        if one and tensor.numel() != 1:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected one element")


def check_total(row_sums: Tensor, slot: Tensor | None, found_inf: Tensor) -> None:
    """Raises ValueError unless `row_sums` and, of one element each, `slot` and `found_inf` are float64."""
    op, device = "factor_sums_total_", row_sums.device
    _check(op, device, torch.float64, row_sums=row_sums)
    _check(op, device, torch.float64, one=True, found_inf=found_inf, **({} if slot is None else {"slot": slot}))


def check_squares(squares: Tensor) -> None:
    """Raises ValueError unless `squares` is float64 and contiguous."""
    _check("inverse_rms", squares.device, torch.float64, squares=squares)


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
    _check(op, device, torch.float64, row_sums=row_sums, column_sums=column_sums)
    _check(op, device, torch.float32, row=row, column=column, beta=beta)
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


def check_scale(coef: Tensor, u_squares: Tensor, param_squares: Tensor) -> None:
    """Raises ValueError unless all are one float64 element."""
    tensors = {"coef": coef, "u_squares": u_squares, "param_squares": param_squares}
    _check("adalomo_scale_", coef.device, torch.float64, one=True, **tensors)


def check_states(states: Sequence[Tensor], new: Sequence[Tensor], is_finite: Tensor) -> None:
    """Raises ValueError unless each state has a new one, both float32, and `is_finite` is one bool."""
    op = "replace_states_"
    if len(states) != len(new):
        raise ValueError(f"{op}: {len(new)} new for {len(states)} states, expected one each")
    _check(op, is_finite.device, torch.bool, one=True, is_finite=is_finite)
    for state, changed in zip(states, new, strict=True):
        _check(op, is_finite.device, torch.float32, states=state, new=changed)
        if state.shape != changed.shape:
            raise ValueError(f"{op}: new has shape {list(changed.shape)}, states has shape {list(state.shape)}")


@torch.library.register_fake("lomo_kernels::factor_sums_total_")
def _(row_sums: Tensor, slot: Tensor | None, found_inf: Tensor) -> tuple[Tensor, Tensor]:
    check_total(row_sums, slot, found_inf)
    return row_sums.new_empty(()), torch.empty((), dtype=torch.bool, device=row_sums.device)


@torch.library.register_fake("lomo_kernels::inverse_rms")
def _(squares: Tensor, elements: int, wide: bool) -> Tensor:
    check_squares(squares)
    return torch.empty_like(squares, dtype=torch.float64 if wide else torch.float32)


@torch.library.register_fake("lomo_kernels::adalomo_factors")
def _(
    row_sums: Tensor, column_sums: Tensor, row: Tensor, column: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_adalomo(row_sums, column_sums, row, column, beta)
    return row.new_empty(row.numel()), torch.empty_like(column), torch.empty_like(row), torch.empty_like(column)


@torch.library.register_fake("lomo_kernels::adalomo_scale_")
def _(coef: Tensor, u_squares: Tensor, param_squares: Tensor, elements: int, clip_threshold: float, eps: float) -> None:
    check_scale(coef, u_squares, param_squares)


@torch.library.register_fake("lomo_kernels::replace_states_")
def _(states: Sequence[Tensor], new: Sequence[Tensor], is_finite: Tensor) -> None:
    check_states(states, new, is_finite)
