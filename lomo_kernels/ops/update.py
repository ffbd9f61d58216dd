"""``update_``: the fused unscale, clip, decay, update and rounding of parameters, in place. Public as `sgd_` and
`sgd_list_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ..numbers import shown
from ..rules import rule_number
from ._arguments import (
    Scalar,
    as_list,
    check_lengths,
    check_low,
    check_pair,
    check_served,
    check_shard,
    check_slot,
    integer,
    library,
    low_parts,
)
from .scalars import check_vector, vector

if TYPE_CHECKING:
    from typing_extensions import Required, Unpack

library.define(
    "update_(Tensor(a!)[] params, Tensor[] grads, Tensor scalars, Tensor(b!)[] sq_norm, int rule, bool stochastic, "
    "int seed, int[] parameter_id, int[] shard, Tensor(c!)[] low) -> ()"
)


@torch.library.register_fake("lomo_kernels::update_")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    scalars: Tensor,
    sq_norm: list[Tensor],
    rule: int,
    stochastic: bool,
    *seed_to_low: Any,
) -> None:
    check_lengths("update_", "params", len(params), grads=len(grads))
    for param, grad in zip(params, grads, strict=True):
        check_pair("update_", param, grad)
    for param, slot in zip(params, sq_norm, strict=False):
        check_slot("update_", "sq_norm", slot, param.device)
    for param in params:
        check_vector("update_", scalars, param.device)
    check_low("update_", params, seed_to_low[-1], stochastic=stochastic)


class Step(TypedDict, total=False):
    """What every update takes by name, besides its tensors. Only `lr` must be given."""

    lr: Required[Scalar]
    weight_decay: Scalar
    inv_scale: Scalar | None
    clip_value: Scalar | None
    clip_coef: Scalar | None
    found_inf: Scalar | None
    step: int | Tensor
    rule: str
    rounding: str
    seed: int


ARGUMENTS = tuple(Step.__annotations__)
ROUNDINGS = ("nearest", "stochastic", "split")


def sgd_(
    param: Tensor,
    grad: Tensor,
    *,
    sq_norm: Tensor | None = None,
    parameter_id: int = 0,
    shard: Sequence[int] | None = None,
    low: Tensor | None = None,
    **step: Unpack[Step],
) -> None:
    """One step of SGD, or of another rule, on `param`, in place, in one pass over memory.

    Computes ``param = round((1 - lr * weight_decay) * param - lr * direction(clip_coef * clamp(grad * inv_scale)))`` in
    float32. `lomo_kernels.reference` states the formula operation by operation, and every backend gives the same bits.
    An element whose ``grad * inv_scale`` is not finite keeps its parameter.

    Scalars are numbers, or one-element float64 or float32 tensors on the parameter's device (never read by the host).
    They are read before anything is written, so they may be elements of what the call writes.

    Args:
        param: float32, bfloat16 or float16, any shape; its elements must not share memory. Its autograd version counter
            is increased.
        grad: the parameter's shape and device; float32, bfloat16 or float16, not necessarily the parameter's dtype.
        sq_norm: float64, one element: the sum of ``(grad * inv_scale) ** 2``, before clamp and coefficient, is added to
            it in the same pass, as `sq_norm_` does.
        shard: ``(offset, row_length, row_stride)`` if `param` is a part of a larger parameter. Element i of the part is
            element ``offset + (i // row_length) * row_stride + i % row_length`` of the whole. So the updates of all
            parts give the same bits as one update of the whole.
        low: with ``rounding="split"``, for a bfloat16 parameter: int16, the parameter's shape and device; zeros before
            the first step. It is changed together with `param`.
        lr: learning rate, >= 0.
        weight_decay: decoupled (``lr * weight_decay`` of the weight is taken off), >= 0; default 0.
        inv_scale: one over the loss scale, > 0; default 1.
        clip_value: bound on the size of each element of ``grad * inv_scale``, > 0; default: none.
        clip_coef: factor on the clamped gradient, as from global norm clipping, >= 0; default 1.
        found_inf: if not zero, the parameter is left untouched, bit for bit (`sq_norm` is added all the same).
        rule: ``"sgd"`` (default): the direction is the gradient. ``"sign"``: its sign, and zero for zero.
        rounding: of bfloat16 and float16 parameters. ``"nearest"`` (default, ties to even). ``"stochastic"``
            (unbiased). ``"split"``: what does not fit into a bfloat16 parameter is kept in `low`; not for float16.
        seed, parameter_id, step: key the random bits of stochastic rounding, with the element's index; default 0.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout, device or range; nothing is changed then.
        RuntimeError: elements of `param` or `low` share memory with each other, with `grad` or with `sq_norm`; `grad`
            shares memory with `sq_norm`. Nothing is changed then.
    """
    op = "sgd_"
    check_pair(op, param, grad)
    check_served(param)
    slots = [] if sq_norm is None else [sq_norm]
    scalars, settings, lows = update_arguments(op, slots, [param], [low], step)
    torch.ops.lomo_kernels.update_.default(
        [param],
        [grad],
        scalars,
        slots,
        *settings,
        [integer(op, "parameter_id", parameter_id)],
        [] if shard is None else check_shard(op, shard, param.numel()),
        lows,
    )
    increment_version([param])


def sgd_list_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    sq_norm: Sequence[Tensor] | Tensor | None = None,
    parameter_id: Sequence[int] | None = None,
    shard: Sequence[Sequence[int]] | None = None,
    low: Sequence[Tensor | None] | None = None,
    **step: Unpack[Step],
) -> None:
    """`sgd_` for many small parameters in one call.

    Args:
        params, grads: lists of equal length, all on one device; dtypes may differ.
        sq_norm: None, or one slot per parameter (a list, or one float64 vector).
        parameter_id: one per parameter; default 0, 1, 2 and so on.
        shard: None, or one ``(offset, row_length, row_stride)`` per parameter.
        low: None, or one per parameter; None for a float32 parameter.
        lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, step, rule, rounding, seed: as in `sgd_`, for
            all.

    Raises:
        TypeError, ValueError: as `sgd_`, lists of different lengths, a parameter twice; nothing is changed then.
        RuntimeError: as `sgd_`, for any two tensors of the lists; nothing is changed then. Several parameters may have
            the same slot. Strided views may interleave if they have no element in common.
    """
    op = "sgd_list_"
    params, grads = as_list(op, "params", params), as_list(op, "grads", grads)
    ids = range(len(params)) if parameter_id is None else as_list(op, "parameter_id", parameter_id)
    slots = [] if sq_norm is None else as_list(op, "sq_norm", sq_norm)
    shards = [] if shard is None else as_list(op, "shard", shard)
    lows = [None] * len(params) if low is None else as_list(op, "low", low)
    check_lengths(op, "params", len(params), grads=len(grads), parameter_id=len(ids), low=len(lows))
    if sq_norm is not None:
        check_lengths(op, "params", len(params), sq_norm=len(slots))
    if shard is not None:
        check_lengths(op, "params", len(params), shard=len(shards))
    if len({id(param) for param in params}) != len(params):
        raise ValueError(f"{op}: a parameter stands twice in params; it would be updated twice")
    if not params:
        return
    for param, grad in zip(params, grads, strict=True):
        check_pair(op, param, grad)
        if param.device != params[0].device:
            raise ValueError(f"{op}: params are on {params[0].device} and {param.device}, expected one device")
    check_served(params[0])
    numbers = [check_shard(op, shard, param.numel()) for shard, param in zip(shards, params, strict=False)]
    scalars, settings, parts = update_arguments(op, slots, params, lows, step)
    torch.ops.lomo_kernels.update_.default(
        params,
        grads,
        scalars,
        slots,
        *settings,
        [integer(op, "parameter_id", i) for i in ids],
        [number for three in numbers for number in three],
        parts,
    )
    increment_version(params)


def update_arguments(
    op: str, slots: Sequence[Tensor], params: Sequence[Tensor], low: Sequence[Tensor | None], step: Step
) -> tuple[Tensor, tuple[int, bool, int], list[Tensor]]:
    """What every update operator takes: the vector of scalars; rule, stochastic, seed; low parts, from one or None per
    parameter. Checks these, and the slots."""
    device = params[0].device
    for given in step:
        if given not in ARGUMENTS:
            raise TypeError(f"{op}: got an unexpected argument {given!r}, expected some of {', '.join(ARGUMENTS)}")
    for slot in slots:
        check_slot(op, "sq_norm", slot, device)
    rounding = check_rounding(op, step.get("rounding", "nearest"))
    parts = low_parts(op, rounding, params, low)
    settings = (
        rule_number(step.get("rule", "sgd"), op),
        rounding == "stochastic",
        integer(op, "seed", step.get("seed", 0)),
    )
    return vector(op, device, step), settings, parts


def check_rounding(op: str, rounding: str) -> str:
    """Returns `rounding`. Raises ValueError unless it is one of the three modes."""
    if rounding not in ROUNDINGS:
        raise ValueError(f'{op}: rounding is {shown(rounding)}, expected "nearest", "stochastic" or "split"')
    return rounding


def increment_version(params: list[Tensor]) -> None:
    """Tells autograd that the parameters changed: a graph that saved one then raises instead of using the new value."""
    if not torch.compiler.is_compiling():  # what dynamo cannot ask
        params = [param for param in params if not param.is_inference()]
    torch.autograd.graph.increment_version(params)
