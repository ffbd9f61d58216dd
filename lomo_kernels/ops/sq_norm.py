"""``sq_norm_``: the sums of squares of gradients, each added to a float64 slot. Public as
`sq_norm_` and `sq_norm_list_`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import (
    Scalar,
    as_list,
    check_devices,
    check_element_type,
    check_lengths,
    check_served,
    check_slot,
    inv_scale_tensor,
    library,
)
from ._overlap import check_scale_apart

library.define("sq_norm_(Tensor(a!)[] slots, Tensor[] grads, Tensor? inv_scale) -> ()")


def _check(op: str, slot: Tensor, grad: Tensor) -> None:
    check_element_type(op, "grad", grad)
    check_slot(op, "slot", slot, grad.device)


@torch.library.register_fake("lomo_kernels::sq_norm_")
def _(slots: list[Tensor], grads: list[Tensor], inv_scale: Tensor | None) -> None:
    check_lengths("sq_norm_", "grads", len(grads), slots=len(slots))
    for slot, grad in zip(slots, grads, strict=True):
        _check("sq_norm_", slot, grad)
        check_devices("sq_norm_", slot, None, inv_scale)


def sq_norm_(slot: Tensor, grad: Tensor, *, inv_scale: Scalar | None = None) -> None:
    """Adds the sum of ``(grad * inv_scale) ** 2`` to `slot`.

    The sum is within 1e-6 (relative) of the float64 sum for every finite gradient, however large or small its elements.
    It is the same from run to run and for any number of threads. Only a gradient that is not finite makes the slot
    infinite or NaN: this is the overflow check of dynamic loss scaling.

    Args:
        slot: float64, one element, on the gradient's device. Usually a view of a vector with one slot per parameter.
        grad: float32, bfloat16 or float16, any shape and strides.
        inv_scale: one over the loss scale; default 1. The product with `grad` is rounded to float32.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device; the slot is then unchanged.
        RuntimeError: the slot shares memory with the gradient or with `inv_scale`; the slot is then unchanged.
    """
    _check("sq_norm_", slot, grad)
    check_served(slot)
    torch.ops.lomo_kernels.sq_norm_.default([slot], [grad], _inv_scale("sq_norm_", inv_scale, [slot]))


def sq_norm_list_(
    slots: Sequence[Tensor] | Tensor, grads: Sequence[Tensor], *, inv_scale: Scalar | None = None
) -> None:
    """`sq_norm_` for many small gradients in one call.

    Args:
        slots: one float64 tensor of one element per gradient, or one float64 vector with one element per gradient.
        grads: as in `sq_norm_`; dtypes may differ.
        inv_scale: as in `sq_norm_`, the same for all.

    Raises:
        TypeError, ValueError: as `sq_norm_`, and lists of different lengths; all slots are then unchanged.
        RuntimeError: a slot shares memory with a gradient or with `inv_scale`; all slots are then unchanged.
    """
    slots, grads = as_list("sq_norm_list_", "slots", slots), as_list("sq_norm_list_", "grads", grads)
    check_lengths("sq_norm_list_", "grads", len(grads), slots=len(slots))
    for slot, grad in zip(slots, grads, strict=True):
        _check("sq_norm_list_", slot, grad)
    if grads:
        check_served(grads[0])
        torch.ops.lomo_kernels.sq_norm_.default(slots, grads, _inv_scale("sq_norm_list_", inv_scale, slots))


def _inv_scale(op: str, value: Scalar | None, slots: Sequence[Tensor]) -> Tensor | None:
    number = inv_scale_tensor(op, value, slots[0].device)
    check_scale_apart(op, value, slots)
    return number
