"""``sgd_``: the fused unscale, clip, decay, update and rounding of one parameter, in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import (
    FINITE,
    Scalar,
    as_list,
    check_lengths,
    check_pair,
    check_served,
    check_shard,
    check_slot,
    integer,
    library,
    scalar,
    step_tensor,
)
from ._overlap import check_scalars_apart

SCALARS = "Tensor lr, Tensor? weight_decay, Tensor? inv_scale, Tensor? clip_value, Tensor? clip_coef, Tensor? found_inf"
SCALAR_NAMES = ("lr", "weight_decay", "inv_scale", "clip_value", "clip_coef", "found_inf", "step")
library.define(
    f"sgd_(Tensor(a!) param, Tensor grad, {SCALARS}, Tensor(b!)? sq_norm, bool stochastic, int seed, "
    "int parameter_id, Tensor? step, int[]? shard) -> ()"
)
library.define(
    f"sgd_list_(Tensor(a!)[] params, Tensor[] grads, {SCALARS}, Tensor(b!)[] sq_norm, bool stochastic, int seed, "
    "int[] parameter_id, Tensor? step, int[] shard) -> ()"
)


@torch.library.register_fake("lomo_kernels::sgd_")
def _(param: Tensor, grad: Tensor, *rest: Any) -> None:
    check_pair("sgd_", param, grad)


@torch.library.register_fake("lomo_kernels::sgd_list_")
def _(params: list[Tensor], grads: list[Tensor], *rest: Any) -> None:
    check_lengths("sgd_list_", "params", len(params), grads=len(grads))
    for param, grad in zip(params, grads, strict=True):
        check_pair("sgd_list_", param, grad)


def sgd_(
    param: Tensor,
    grad: Tensor,
    *,
    lr: Scalar,
    weight_decay: Scalar = 0.0,
    inv_scale: Scalar | None = None,
    clip_value: Scalar | None = None,
    clip_coef: Scalar | None = None,
    found_inf: Scalar | None = None,
    sq_norm: Tensor | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    parameter_id: int = 0,
    step: int | Tensor = 0,
    shard: Sequence[int] | None = None,
) -> None:
    """One step of SGD on `param`, in place, in one pass over memory.

    Computes ``param = round((1 - lr * weight_decay) * param - lr * clip_coef * clamp(grad * inv_scale))`` in float32;
    `lomo_kernels.reference` states it operation by operation, and every backend gives the same bits. An element whose
    ``grad * inv_scale`` is not finite keeps its parameter.

    Scalars are numbers, or one-element float64 or float32 tensors on the parameter's device (never read by the host).

    Args:
        param: float32, bfloat16 or float16, any shape; its elements must not share memory. Its autograd version counter
            is increased.
        grad: the parameter's shape and device; float32, bfloat16 or float16, not necessarily the parameter's dtype.
        lr: learning rate, >= 0.
        weight_decay: decoupled (``lr * weight_decay`` of the weight is taken off), >= 0.
        inv_scale: one over the loss scale, > 0; default 1.
        clip_value: each element of ``grad * inv_scale`` is clamped to ``[-clip_value, clip_value]``, > 0; default: not.
        clip_coef: factor on the clamped gradient, as from global norm clipping, >= 0; default 1.
        found_inf: where not zero, the parameter is left untouched, bit for bit (`sq_norm` is added all the same).
        sq_norm: float64, one element: the sum of ``(grad * inv_scale) ** 2``, before clamp and coefficient, is added to
            it in the same pass, as `sq_norm_` does.
        rounding: ``"nearest"`` (ties to even) or ``"stochastic"`` (unbiased); float32 parameters are not rounded.
        seed, parameter_id, step: key the random bits of stochastic rounding, with the element's index.
        shard: ``(offset, row_length, row_stride)`` where `param` is a part of a larger parameter: element i of the part
            is element ``offset + (i // row_length) * row_stride + i % row_length`` of the whole, so a sharded update
            equals the whole one.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout, device or range; nothing is changed then.
        RuntimeError: elements of `param` share memory with each other, with `grad` or with `sq_norm`, or `grad` shares
            memory with `sq_norm`, or a scalar does with `param` or `sq_norm`; nothing is changed then.
    """
    check_pair("sgd_", param, grad)
    check_served(param)
    scalars = (lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf)
    torch.ops.lomo_kernels.sgd_.default(
        param,
        grad,
        *sgd_arguments("sgd_", "param", param, scalars, sq_norm, rounding, seed, parameter_id, step),
        None if shard is None else check_shard("sgd_", shard, param.numel()),
    )
    increment_version([param])


def sgd_list_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    lr: Scalar,
    weight_decay: Scalar = 0.0,
    inv_scale: Scalar | None = None,
    clip_value: Scalar | None = None,
    clip_coef: Scalar | None = None,
    found_inf: Scalar | None = None,
    sq_norm: Sequence[Tensor] | Tensor | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    parameter_id: Sequence[int] | None = None,
    step: int | Tensor = 0,
    shard: Sequence[Sequence[int]] | None = None,
) -> None:
    """`sgd_` for many small parameters in one call.

    Args:
        params, grads: lists of equal length, all on one device; dtypes may differ.
        sq_norm: None, or one slot per parameter (a list, or one float64 vector).
        parameter_id: one per parameter; default 0, 1, 2 and so on.
        shard: None, or one ``(offset, row_length, row_stride)`` per parameter.
        lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, rounding, seed, step: as in `sgd_`, for all.

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
    check_lengths(op, "params", len(params), grads=len(grads), parameter_id=len(ids))
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
    device = params[0].device
    check_served(params[0])
    numbers = [check_shard(op, one, param.numel()) for one, param in zip(shards, params, strict=False)]
    for slot in slots:
        check_slot(op, "sq_norm", slot, device)
    scalars = (lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf)
    given = dict(zip(SCALAR_NAMES, (*scalars, step), strict=True))
    check_scalars_apart(op, given, ("sq_norm", slots), ("param", params))
    torch.ops.lomo_kernels.sgd_list_.default(
        params,
        grads,
        *sgd_scalars(op, device, *scalars),
        slots,
        is_stochastic(op, rounding),
        integer(op, "seed", seed),
        [integer(op, "parameter_id", i) for i in ids],
        step_tensor(op, step, device),
        [number for three in numbers for number in three],
    )
    increment_version(params)


def is_stochastic(op: str, rounding: str) -> bool:
    """Raises ValueError unless `rounding` is one of the two modes."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f'{op}: rounding is {rounding!r}, expected "nearest" or "stochastic"')
    return rounding == "stochastic"


def sgd_scalars(
    op: str,
    device: torch.device,
    lr: Scalar,
    weight_decay: Scalar,
    inv_scale: Scalar | None,
    clip_value: Scalar | None,
    clip_coef: Scalar | None,
    found_inf: Scalar | None,
) -> list[Tensor | None]:
    """The checked scalars of an update, in the order of the operators' schemas."""
    if lr is None:
        raise TypeError(f"{op}: lr is None, expected a number or a one-element tensor")
    no_decay = not isinstance(weight_decay, Tensor) and weight_decay == 0  # saves the making of a tensor
    return [
        scalar(op, "lr", lr, device, high=FINITE),
        None if no_decay else scalar(op, "weight_decay", weight_decay, device, high=FINITE),
        scalar(op, "inv_scale", inv_scale, device, open_=True, high=FINITE),
        scalar(op, "clip_value", clip_value, device, open_=True, high=math.inf),
        scalar(op, "clip_coef", clip_coef, device, high=FINITE),
        scalar(op, "found_inf", found_inf, device, high=math.inf),
    ]


def sgd_arguments(
    op: str,
    name: str,
    param: Tensor,
    scalars: tuple[Any, ...],
    sq_norm: Tensor | None,
    rounding: str,
    seed: int,
    parameter_id: int,
    step: int | Tensor,
) -> list[Any]:
    """What every update of one parameter takes after its tensors, from ``lr`` to ``step``, checked. `scalars`: those of
    `sgd_scalars`. `name`: the operator's for `param`."""
    device = param.device
    slots = [] if sq_norm is None else [sq_norm]
    for slot in slots:
        check_slot(op, "sq_norm", slot, device)
    given = dict(zip(SCALAR_NAMES, (*scalars, step), strict=True))
    check_scalars_apart(op, given, ("sq_norm", slots), (name, [param]))
    return [
        *sgd_scalars(op, device, *scalars),
        sq_norm,
        is_stochastic(op, rounding),
        integer(op, "seed", seed),
        integer(op, "parameter_id", parameter_id),
        step_tensor(op, step, device),
    ]


def increment_version(params: list[Tensor]) -> None:
    """Tells autograd that the parameters changed: a graph that saved one then raises instead of using the new value."""
    if not torch.compiler.is_compiling():  # what dynamo cannot ask
        params = [param for param in params if not param.is_inference()]
    torch.autograd.graph.increment_version(params)
