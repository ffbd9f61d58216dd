"""``linear_update_`` and ``linear_sq_norm_``: `sgd_` and `sq_norm_` for a linear layer whose gradient never exists.

The gradient of ``weight`` in ``y = x @ weight.T`` is ``grad_output.T @ x`` over all tokens. These operators take the
two factors in place of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._arguments import (
    Scalar,
    check_devices,
    check_low,
    check_served,
    check_shard,
    check_slot,
    integer,
    inv_scale_tensor,
    library,
)
from ._overlap import check_scale_apart
from ._pairs import check_factors_apart, check_linear, check_linear_update, pair_lists
from .scalars import check_vector
from .update import Step, increment_version, update_arguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

library.define("linear_sq_norm_(Tensor(a!) slot, Tensor[] inputs, Tensor[] grad_outputs, Tensor? inv_scale) -> ()")
library.define(
    "linear_update_(Tensor(a!) weight, Tensor[] inputs, Tensor[] grad_outputs, Tensor scalars, Tensor(b!)? sq_norm, "
    "int rule, bool stochastic, int seed, int parameter_id, int[] shard, Tensor(c!)? low=None) -> ()"
)


@torch.library.register_fake("lomo_kernels::linear_sq_norm_")
def _(slot: Tensor, inputs: list[Tensor], grad_outputs: list[Tensor], inv_scale: Tensor | None) -> None:
    check_linear("linear_sq_norm_", inputs, grad_outputs, slot)
    check_devices("linear_sq_norm_", slot, None, inv_scale)


@torch.library.register_fake("lomo_kernels::linear_update_")
def _(
    weight: Tensor,
    inputs: list[Tensor],
    grad_outputs: list[Tensor],
    scalars: Tensor,
    sq_norm: Tensor | None,
    rule: int,
    stochastic: bool,
    seed: int,
    parameter_id: int,
    shard: list[int],
    low: Tensor | None = None,
) -> None:
    check_linear_update("linear_update_", weight, inputs, grad_outputs)
    check_vector("linear_update_", scalars, weight.device)
    check_devices("linear_update_", weight, sq_norm, None)
    check_low("linear_update_", [weight], [] if low is None else [low], stochastic=stochastic)


def linear_sq_norm_(
    slot: Tensor,
    input: Tensor | Sequence[Tensor],
    grad_output: Tensor | Sequence[Tensor],
    *,
    inv_scale: Scalar | None = None,
) -> None:
    """Adds the sum of ``(gradient * inv_scale) ** 2`` to `slot`. The gradient is ``grad_output.T @ input``.

    Products are added up in float32. The sum is formed from the tokens' inner products (Gram matrices),
    ``sum_ij (grad_output @ grad_output.T)_ij (input @ input.T)_ij``, if there are few tokens and an estimate of the
    error allows this. The norm is within 1e-5 of float64's, unless the gradient's own float32 sums cancel to less than
    that. On a GPU, matrix units may cut off what lies below the largest product's last bits: norms of 16-bit factors
    came out up to 2.6e-5 too small on an H100.

    Args:
        slot: float64, one element, on the gradient's device.
        input: [..., in_features], float32, bfloat16 or float16; or a list, one tensor per use of the layer: their
            gradients are summed before they are squared.
        grad_output: [..., out_features], the same leading dimensions and dtype; a list where `input` is one.
        inv_scale: one over the loss scale; default 1.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device; the slot is then unchanged.
    """
    op = "linear_sq_norm_"
    inputs, grad_outputs = pair_lists(op, "input", input, grad_output)
    check_slot(op, "slot", slot, slot.device if isinstance(slot, Tensor) else torch.device("cpu"))
    check_linear(op, inputs, grad_outputs, slot)
    check_served(slot)
    check_factors_apart(op, [*inputs, *grad_outputs], None, slot)
    number = inv_scale_tensor(op, inv_scale, slot.device)
    check_scale_apart(op, inv_scale, [slot])
    torch.ops.lomo_kernels.linear_sq_norm_.default(slot, inputs, grad_outputs, number)


def linear_sgd_(
    weight: Tensor,
    input: Tensor | Sequence[Tensor],
    grad_output: Tensor | Sequence[Tensor],
    *,
    sq_norm: Tensor | None = None,
    parameter_id: int = 0,
    shard: Sequence[int] | None = None,
    low: Tensor | None = None,
    **step: Unpack[Step],
) -> None:
    """`sgd_` on a linear layer's weight. The gradient, ``grad_output.T @ input``, is formed tile by tile.

    Products are added up in float32, and the result is rounded once, to the weight's dtype. The result agrees with
    `sgd_` on the float32 gradient within the error of a float32 sum.

    Args:
        weight: [out_features, in_features], float32, bfloat16 or float16. Its autograd version counter is increased.
        input: [..., in_features], float32, bfloat16 or float16, not necessarily the weight's dtype; or a list, one
            tensor per use of the layer: the gradient is the sum.
        grad_output: [..., out_features], the same leading dimensions and dtype; a list where `input` is one.
        sq_norm: float64, one element: what `linear_sq_norm_` adds is added to it.
        shard: ``(offset, row_length, row_stride)`` if `weight` is a part of a larger parameter, as in `sgd_`.
        lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, step, rule, rounding, seed, parameter_id, low: as
            in `sgd_`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout, device or range; nothing is changed then.
        RuntimeError: elements of `weight` or `low` share memory with each other, with a factor or with `sq_norm`; a
            factor shares memory with `sq_norm`. Nothing is changed then.
    """
    op = "linear_sgd_"
    inputs, grad_outputs = pair_lists(op, "input", input, grad_output)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight is a {type(weight).__name__}, expected a tensor")
    check_linear_update(op, weight, inputs, grad_outputs)
    check_served(weight)
    slots = [] if sq_norm is None else [sq_norm]
    scalars, settings, lows = update_arguments(op, slots, [weight], [low], step)
    check_factors_apart(op, [*inputs, *grad_outputs], weight, sq_norm, lows)
    torch.ops.lomo_kernels.linear_update_.default(
        weight,
        inputs,
        grad_outputs,
        scalars,
        sq_norm,
        *settings,
        integer(op, "parameter_id", parameter_id),
        [] if shard is None else check_shard(op, shard, weight.numel()),
        low,
    )
    increment_version([weight])
