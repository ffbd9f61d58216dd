"""A language model's last linear layer with its cross entropy: `linear_cross_entropy`. The logits never exist whole;
backward hands the input and four numbers of each token to the optimizer in place of the weight's gradient, which makes
it by tiles: see `composite.head`. `losses` has torch's and Liger's names for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..composite.head import Head, forward_sums, input_gradient
from .factors import Factors, gradient_of, offer_factors
from .fused import PLAIN, takes_part

_REDUCTIONS = ("mean", "sum", "none")
_NAMES = "input", "softmax"
_DTYPES = torch.float32, torch.bfloat16, torch.float16


class _HeadLoss(torch.autograd.Function):
    """The loss of each token, or their sum or weighted mean. Outside the optimizer's backward its gradients are those
    of `F.cross_entropy` of `F.linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # [tokens, features], of the dtype in which to multiply
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,  # [tokens]
        class_weight: Tensor | None,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        dtype: torch.dtype,  # of the loss
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        classes = len(weight)
        of_class = input.new_ones(1, dtype=torch.float32).expand(classes) if class_weight is None else class_weight
        of_class = of_class.detach().float()
        counts = target != ignore_index
        counted = counts.double()
        target = torch.where(counts, target, 0)
        # Indexing reports a target that is no class, on a GPU without waiting for it.
        of_target = of_class.index_select(0, target).double().mul_(counted)
        smooth = of_class if label_smoothing else None
        head = Head(weight, weight._version, None if bias is None else bias.detach().float(), target, smooth)
        lse, picked, weighted = forward_sums(input, head)
        b = of_target * (1 - label_smoothing)
        e = counted * (label_smoothing / classes)
        a = b + e * of_class.sum() if label_smoothing else b
        loss = torch.where(counts, a * lse - b * picked, 0.0)
        if weighted is not None:
            loss -= torch.where(counts, e * weighted, 0.0)
        # exp(logit - lse) is wrong by what float32 takes from lse: up to 5e-7, which its factor makes good.
        rounded = lse.float().double()
        coefficients = torch.stack([rounded, a * (rounded - lse).exp(), b, e])
        if reduction == "mean":
            total = of_target.sum()
            loss = loss.sum() / total
            coefficients[1:] /= torch.where(counts.any(), total, 1.0)  # no token counts: the gradient is zero
        elif reduction == "sum":
            loss = loss.sum()
        ctx.weight, ctx.weight_version = weight, weight._version
        ctx.options = class_weight, reduction, ignore_index, label_smoothing, dtype
        ctx.save_for_backward(input, bias, target, smooth, coefficients.float(), counts)
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:  # a weight without a gradient is not decayed either
            return (None,) * 9
        input, bias, target, smooth, coefficients, _ = ctx.saved_tensors
        weight = ctx.weight  # not saved: hooks would copy it (save_on_cpu)
        if weight._version != ctx.weight_version:
            raise RuntimeError(
                "linear_cross_entropy: linear_weight was changed in place after the forward (version "
                f"{weight._version}, expected {ctx.weight_version}). Backward makes the logits again. Change weights "
                "before the forward or after backward"
            )
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _differentiable(ctx, grad_output)
        grad_input = grad_weight = grad_bias = None
        with torch.autocast(input.device.type, enabled=False):
            coefficients = coefficients.clone()
            coefficients[1:] *= grad_output.float()
            bias_now = None if bias is None else bias.detach().to(torch.float32, copy=True)
            head = Head(weight, ctx.weight_version, bias_now, target, smooth)
            if of_input or of_bias:
                grad_input, grad_bias = input_gradient(input, coefficients, head, of_input=of_input, of_bias=of_bias)
            if grad_input is not None:
                grad_input = grad_input.to(input.dtype)
            if grad_bias is not None:
                grad_bias = grad_bias.to(bias.dtype)
            if of_weight:
                uses = offer_factors(ctx, ctx.weight, Factors(input, coefficients, None, _NAMES, head))
                grad_weight = gradient_of(uses, ctx.weight) if uses else None
        return grad_input, grad_weight, grad_bias, *(None,) * 6


def _differentiable(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of a backward that is to be differentiated, from the logits themselves."""
    input, bias, target, _, _, counts = ctx.saved_tensors
    weight = ctx.weight
    class_weight, reduction, ignore_index, label_smoothing, dtype = ctx.options
    inputs = [tensor for tensor, wanted in zip((input, weight, bias), ctx.needs_input_grad[:3], strict=True) if wanted]
    target = torch.where(counts, target, ignore_index)
    with torch.enable_grad():
        logits = F.linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype)).float()
        weight_of_class = None if class_weight is None else class_weight.float()
        loss = F.cross_entropy(
            logits,
            target,
            weight_of_class,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        ).to(dtype)
    grads = iter(torch.autograd.grad(loss, inputs, grad_output, create_graph=True))
    return *(next(grads) if wanted else None for wanted in ctx.needs_input_grad[:3]), *(None,) * 6


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross entropy of ``F.linear(input, linear_weight, linear_bias)``, whose logits never exist whole.

    If a `Lomo` with ``fused_layers`` manages `linear_weight`, as a weight of an `nn.Linear` or `nn.Embedding`, its
    gradient never exists in ``optimizer.backward``; else backward returns it. Called as torch's
    `F.linear_cross_entropy` (2.13), it works with every supported torch, and with any leading dimensions. Sums of
    logits are float32, those of their exponentials and of losses float64. Backward makes the logits again, twice.

    Args:
        input: [..., features], float32, bfloat16 or float16.
        linear_weight: [classes, features], of the input's dtype; under autocast any.
        target: int64 [...], the classes' indices.
        linear_bias: [classes].
        weight: [classes]: a factor of each class's loss. It gets no gradient.
        reduction: "mean" (by the targets' weights), "sum" or "none".
        ignore_index: tokens with this target count nothing. None: -100.
        label_smoothing: from 0.0 to 1.0.

    Returns:
        A scalar, or [...] with ``reduction="none"``, of the input's dtype; under autocast float32.

    Raises:
        TypeError: the target is not int64, dtypes differ without autocast, or the weight alone is a DTensor.
        ValueError: shapes do not belong together, or an option has another value.
        IndexError: a target is no class (on a GPU a device-side assertion).
    """
    _check_kinds(input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing)
    if hasattr(linear_weight, "placements") and not hasattr(input, "placements"):
        raise TypeError(
            "linear_cross_entropy: linear_weight is a DTensor and input is not. Call it in the forward of the module "
            "that FSDP2 gathers with the weight (the model itself, if fully_shard was not applied to the head)"
        )
    if linear_weight.dim() != 2 or input.shape[-1:] != linear_weight.shape[1:] or input.shape[:-1] != target.shape:
        raise ValueError(
            f"linear_cross_entropy: input is {list(input.shape)}, linear_weight {list(linear_weight.shape)} and target "
            f"{list(target.shape)}, expected [..., features], [classes, features] and [...]"
        )
    for name, tensor in (("linear_bias", linear_bias), ("weight", weight)):
        if tensor is not None and tensor.shape != linear_weight.shape[:1]:
            raise ValueError(
                f"linear_cross_entropy: {name} is {list(tensor.shape)}, expected [{linear_weight.shape[0]}]"
            )
    if reduction not in _REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}, expected one of {', '.join(_REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing is {label_smoothing}, expected 0.0 to 1.0")
    ignored = _ignored(ignore_index)
    if not _takes_part(input, linear_weight, target, linear_bias, weight):
        loss = F.cross_entropy(
            F.linear(input, linear_weight, linear_bias).reshape(-1, len(linear_weight)),
            target.reshape(-1),
            weight,
            reduction=reduction,
            ignore_index=ignored,
            label_smoothing=label_smoothing,
        )
    else:
        loss = _by_blocks(input, linear_weight, linear_bias, target, weight, reduction, ignored, label_smoothing)
    return loss.view(target.shape) if reduction == "none" and target.dim() != 1 else loss


def _check_kinds(
    input: Any, weight: Any, target: Any, bias: Any, class_weight: Any, ignore_index: Any, label_smoothing: Any
) -> None:
    """Raises TypeError if an argument of `linear_cross_entropy` is of a wrong type or dtype."""
    said = "linear_cross_entropy: "
    tensors = {"input": input, "linear_weight": weight, "target": target}
    tensors |= {name: each for name, each in (("linear_bias", bias), ("weight", class_weight)) if each is not None}
    for name, each in tensors.items():
        if not isinstance(each, Tensor):
            raise TypeError(f"{said}{name} is a {type(each).__name__}, expected a tensor")
        if name != "target" and not each.is_floating_point():
            raise TypeError(f"{said}{name} is {each.dtype}, expected a floating point dtype")
    if target.dtype is not torch.int64:
        raise TypeError(f"{said}target is {target.dtype}, expected torch.int64")
    if not torch.is_autocast_enabled(input.device.type):
        for name in ("linear_weight", "linear_bias"):
            if name in tensors and tensors[name].dtype is not input.dtype:
                raise TypeError(
                    f"{said}{name} is {tensors[name].dtype} and input {input.dtype}, expected the same dtype. Cast the "
                    "input, or call it under torch.autocast"
                )
    if not _is_index(ignore_index):
        raise TypeError(f"{said}ignore_index is {ignore_index!r}, expected an int or None")
    if not _is_number(label_smoothing):
        raise TypeError(f"{said}label_smoothing is {label_smoothing!r}, expected a number")


def _is_index(ignore_index: Any) -> bool:
    return ignore_index is None or (isinstance(ignore_index, int) and not isinstance(ignore_index, bool))


def _is_number(label_smoothing: Any) -> bool:
    return isinstance(label_smoothing, float | int)


def _ignored(ignore_index: int | None) -> int:
    return -100 if ignore_index is None else ignore_index


def _takes_part(input: Any, weight: Any, target: Any, bias: Any, class_weight: Any) -> bool:
    others = [target, *(each for each in (bias, class_weight) if each is not None)]
    if not takes_part(weight, input) or any(type(each) not in PLAIN for each in others):
        return False
    kind = input.device.type
    autocast = torch.is_autocast_enabled(kind)
    return (
        weight.numel() > 0
        and input.dtype in _DTYPES
        and weight.dtype in _DTYPES
        and (autocast or (weight.dtype is input.dtype and (bias is None or bias.dtype is input.dtype)))
        and not (autocast and torch.get_autocast_dtype(kind) not in _DTYPES)
        and (class_weight is None or (class_weight.is_floating_point() and not class_weight.requires_grad))
        and all(each.device == input.device for each in (weight, *others))
    )


def loss_by_blocks(
    input: Any,
    weight: Any,
    target: Any,
    bias: Any,
    class_weight: Any,
    reduction: Any,
    ignore_index: Any,
    label_smoothing: Any,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """`linear_cross_entropy` of an input [tokens, features]. None if this call has to be a plain function's, which also
    says what is wrong with it.

    Args:
        dtype: of the loss; None: the input's, under autocast float32.
    """
    if (
        not _takes_part(input, weight, target, bias, class_weight)
        or reduction not in _REDUCTIONS
        or target.dtype is not torch.int64
        or input.dim() != 2
        or weight.dim() != 2
        or input.shape[1] != weight.shape[1]
        or target.shape != input.shape[:1]
        or any(each is not None and each.shape != weight.shape[:1] for each in (bias, class_weight))
        or not _is_index(ignore_index)
        or not _is_number(label_smoothing)
        or not 0.0 <= label_smoothing <= 1.0
    ):
        return None
    options = reduction, _ignored(ignore_index), label_smoothing
    return _by_blocks(input, weight, bias, target, class_weight, *options, dtype=dtype)


def _by_blocks(
    input: Tensor,
    weight: Any,
    bias: Any,
    target: Tensor,
    class_weight: Any,
    *options: Any,
    dtype: torch.dtype | None = None,
) -> Tensor:
    kind = input.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = dtype or (torch.float32 if autocast else input.dtype)
    if autocast:
        input = input.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        x = input.reshape(-1, weight.shape[1])
        loss: Tensor = _HeadLoss.apply(x, weight, bias, target.reshape(-1), class_weight, *options, dtype)
    return loss
