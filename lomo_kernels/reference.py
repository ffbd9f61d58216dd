"""The numerics contract in plain torch: what every kernel computes, bit for bit.

This file is written for reading. It is the oracle of every test and bench, and the backend of
``LOMO_KERNELS_BACKEND=reference``. ``csrc/numerics.h`` states the same for C++ and CUDA.

One step does this to each element, in IEEE float32, every operation rounded to nearest even, subnormals kept, nothing
contracted into a fused multiply-add::

    g = float32(grad) * inv_scale
    an element whose g is not finite keeps its parameter
    g = min(max(g, -clip_value), clip_value)
    g = g * clip_coef
    p = float32(param) * decay             decay = float32(1 - lr * weight_decay), computed in float64
    p = p - float32(lr) * direction(g)     two roundings; direction: the rule's
    param = round(p)                       to the parameter's dtype, or split(p)

A factor that is not given is 1 and a clip value that is not given is infinite; both change no bit.
The update is LOMO's, arXiv 2306.09782, Algorithm 1: a rule without momentum, applied inside backward. A rule is one
function of an element, `DIRECTIONS`: of SGD ``direction(g) = g``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .numbers import mix64, stream_key
from .ops import scalars as vectors
from .ops._arguments import check_low
from .ops._overlap import Access, check_no_overlap, regions
from .ops.factored import check_factors
from .rules import RULES

MASK32 = 0xFFFFFFFF


# ---- Random bits: a counter through a hash --------------------------------------------------------------------------


def random_bits(stream: int, counter: Tensor) -> Tensor:
    """32 random bits for each 64-bit counter.

    Args:
        stream: from `numbers.stream_key`.
        counter: int64, any shape.

    Returns:
        int64 tensor of the same shape with values in [0, 2**32).
    """
    bits = torch.empty_like(counter)
    high = counter >> 32
    for block in high.unique().tolist():  # a key of its own for every 2**32 counters
        here = high == block
        bits[here] = _hash32(mix64(stream ^ block), counter[here] & MASK32)
    return bits


def _hash32(block_key: int, x: Tensor) -> Tensor:
    """Two multiply-xorshift rounds (multipliers: github.com/skeeto/hash-prospector), keyed before and between them."""
    x = x ^ (block_key & MASK32)
    x = ((x ^ (x >> 7) ^ (x >> 16)) * 0x21F0AAAD) & MASK32
    x = ((x ^ (x >> 15)) + (block_key >> 32)) & MASK32
    x = (x * 0xD35A2D97) & MASK32
    return x ^ (x >> 15)


def element_index(numel: int, shard: Sequence[int] | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Index of each local element in the whole parameter (row-major), int64 [numel] on `device`.

    Args:
        shard: ``(offset, row_length, row_stride)``: element i has index
            ``offset + (i // row_length) * row_stride + i % row_length``. None: the tensor is the whole parameter.
    """
    i = torch.arange(numel, dtype=torch.int64, device=device)
    if shard is None:
        return i
    offset, row_length, row_stride = shard
    return offset + i // row_length * row_stride + i % row_length


# ---- Rounding float32 to the parameter's dtype ----------------------------------------------------------------------


def _bits(x: Tensor) -> Tensor:
    """The bits of a float32 tensor as int64 in [0, 2**32)."""
    return x.contiguous().view(torch.int32).to(torch.int64) & MASK32


def _from_bits16(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(torch.int32).to(torch.int16).view(dtype)  # int32 to int16 keeps the low 16 bits


def _bfloat16_bits(x: Tensor, bias: Tensor) -> Tensor:
    u = _bits(x)
    return torch.where(x.isnan(), (u >> 16) | 0x40, (u + bias) >> 16)


def round_bfloat16(x: Tensor, random: Tensor | None = None) -> Tensor:
    """float32 to bfloat16, to nearest even, or up with probability (bits cut off) / 2**16.

    Args:
        x: float32.
        random: None, or int64 of x's shape in [0, 2**16).
    """
    nearest = _bfloat16_bits(x, 0x7FFF + ((_bits(x) >> 16) & 1))
    if random is None:
        return _from_bits16(nearest, torch.bfloat16)
    stochastic = _bfloat16_bits(x, random)
    overflowed = (stochastic & 0x7FFF) == 0x7F80
    return _from_bits16(torch.where(overflowed, nearest, stochastic), torch.bfloat16)


def _float16_bits(x: Tensor, random: Tensor | None) -> Tensor:
    u = _bits(x)
    exponent = (u >> 23) & 0xFF
    significand = (u & 0x7FFFFF) | 0x800000  # 24 bits; x is normal wherever it matters
    cut = torch.where(exponent >= 113, 13, 126 - exponent)  # how many of them go: more below 2**-14
    shift = cut.clamp(max=40)  # any shift above 32 gives zero
    if random is None:
        bias = (1 << (shift - 1)) - 1 + ((significand >> shift) & 1)
    else:
        bias = torch.where(cut <= 32, random >> (32 - shift).clamp(min=0), 0)
    kept = (significand + bias) >> shift  # holds the leading one, which counts as one step of the exponent
    magnitude = (((exponent - 113).clamp(min=0) << 10) + kept).clamp(max=0x7C00)
    magnitude = torch.where(x.isnan(), 0x7E00 | ((u >> 13) & 0x3FF), magnitude)
    return ((u >> 16) & 0x8000) | magnitude


def round_float16(x: Tensor, random: Tensor | None = None) -> Tensor:
    """float32 to float16, to nearest even, or up with probability (bits cut off) / 2**s.

    s is 13, and 126 - E where the float32 exponent field E is below 113 (the result is subnormal).

    Args:
        x: float32.
        random: None, or int64 of x's shape in [0, 2**32); the top s bits are used.
    """
    nearest = _float16_bits(x, None)
    if random is None:
        return _from_bits16(nearest, torch.float16)
    stochastic = _float16_bits(x, random)
    overflowed = (stochastic & 0x7FFF) == 0x7C00
    return _from_bits16(torch.where(overflowed, nearest, stochastic), torch.float16)


# ---- Split weights: a bfloat16 and a low part that together are a float32 -------------------------------------------


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 whose bits are ``(bits of high << 16) + low``.

    `split` makes no pair of which this is NaN, unless `high` is. Such a pair has a low part that is older than its
    `high`: then `low` counts as zero.

    Args:
        high: bfloat16.
        low: int16, of the same shape.
    """
    u = (_bits(high.to(torch.float32)) + low.to(torch.int64)) & MASK32
    x = u.to(torch.int32).view(torch.float32)  # int64 to int32 keeps the low 32 bits
    return torch.where(x.isnan(), high.to(torch.float32), x)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 to a pair (bfloat16, int16) of which `join` makes the same bits.

    The first is the nearest bfloat16; a tie goes away from zero, so that the second, the difference of the bits, has 16
    bits. NaN becomes quiet, and has zero as its second part.
    """
    u = _bits(x)
    high = _bfloat16_bits(x, torch.full_like(u, 0x8000))
    low = torch.where(x.isnan(), 0, u - (high << 16))
    return _from_bits16(high, torch.bfloat16), low.to(torch.int16)


def round_to(x: Tensor, dtype: torch.dtype, stream: int | None, index: Tensor) -> Tensor:
    """float32 to `dtype`: stochastically with the random bits of `stream`, or to nearest where it is None.

    One hash serves two bfloat16 elements (the even one takes its low half), or one float16 element.
    """
    if dtype == torch.float32:
        return x
    if dtype == torch.bfloat16:
        if stream is None:
            return round_bfloat16(x)
        return round_bfloat16(x, (random_bits(stream, index // 2) >> (16 * (index % 2))) & 0xFFFF)
    return round_float16(x, None if stream is None else random_bits(stream, index))


# ---- The operators --------------------------------------------------------------------------------------------------


def scaled_gradient(grad: Tensor, inv_scale: float) -> Tensor:
    """float32(grad) * inv_scale, as float32."""
    return grad.to(torch.float32) * _float32(inv_scale)


def clipped(scaled: Tensor, clip_value: float, clip_coef: float) -> Tensor:
    """A scaled gradient, clamped to ``[-clip_value, clip_value]``, times `clip_coef`, as float32."""
    limit = _float32(clip_value)
    g = torch.where(scaled < -limit, -limit, scaled)
    return torch.where(g > limit, limit, g) * _float32(clip_coef)


def sum_of_squares(grad: Tensor, inv_scale: float = 1.0) -> Tensor:
    """The float64 sum of ``scaled_gradient(grad)`` squared, a tensor with no dimensions."""
    return scaled_gradient(grad, inv_scale).double().square().sum()


def linear_gradient(inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]) -> Tensor:
    """The gradient of a linear layer's weight, ``sum(gy.T @ x)`` over its uses: float64 sums, rounded once to float32.

    Args:
        inputs: x [..., in_features], one per use.
        grad_outputs: gy [..., out_features].

    Returns:
        float32 [out_features, in_features].
    """
    total = torch.zeros(grad_outputs[0].shape[-1], inputs[0].shape[-1], dtype=torch.float64, device=inputs[0].device)
    for x, gy in zip(inputs, grad_outputs, strict=True):
        total += gy[None].flatten(0, -2).double().T @ x[None].flatten(0, -2).double()
    return total.float()


def embedding_gradient(
    rows: int, indices: Sequence[Tensor], grad_outputs: Sequence[Tensor], padding_idx: Sequence[int]
) -> Tensor:
    """The gradient of an embedding's weight: float64 sums per row, rounded once to float32.

    Args:
        rows: num_embeddings.
        indices: [...], one per use.
        grad_outputs: [..., embedding_dim].
        padding_idx: one per use: tokens that count nothing; negative for none.

    Returns:
        float32 [rows, embedding_dim].
    """
    total = torch.zeros(rows, grad_outputs[0].shape[-1], dtype=torch.float64, device=grad_outputs[0].device)
    for index, gy, padding in zip(indices, grad_outputs, padding_idx, strict=True):
        index, gy = index.reshape(-1).long(), gy.reshape(index.numel(), gy.shape[-1]).double()
        counts = (index != padding) | (padding < 0)
        total.index_add_(0, index[counts], gy[counts])
    return total.float()


#: By rule: what an element's scaled and clipped gradient becomes. The sign of zero is +0.
DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sgd": lambda g: g,
    "sign": lambda g: (g > 0).float() - (g < 0).float(),
}


def factored_gradient(
    grad: Tensor,
    row_factors: Tensor,
    column_factors: Tensor,
    *,
    inv_scale: float = 1.0,
    clip_value: float = float("inf"),
    clip_coef: float = 1.0,
) -> Tensor:
    """The factored gradient of `lomo_kernels.ops.factored`: float32 [rows, columns].

    Args:
        grad: [rows, columns].
        row_factors: float32 [rows], or empty.
        column_factors: float32 [matrices, columns], or empty.
    """
    scaled = scaled_gradient(grad, inv_scale)
    f = clipped(scaled, clip_value, clip_coef)
    if row_factors.numel():
        f = f * row_factors[:, None]
    if column_factors.numel():
        f = f * column_factors.repeat_interleave(len(grad) // len(column_factors), dim=0)
    return torch.where(scaled.isfinite(), f, torch.nan)


def updated(
    param: Tensor,
    grad: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.0,
    inv_scale: float = 1.0,
    clip_value: float = float("inf"),
    clip_coef: float = 1.0,
    rule: str = "sgd",
    stochastic: bool = False,
    seed: int = 0,
    parameter_id: int = 0,
    step: int = 0,
    shard: Sequence[int] | None = None,
) -> Tensor:
    """What `lomo_kernels.ops.sgd_` makes of `param`, as a new tensor. Arguments as there, numbers only."""
    p, finite = _stepped(param.to(torch.float32), grad, lr, weight_decay, inv_scale, clip_value, clip_coef, rule)
    stream = stream_key(seed, parameter_id, step) if stochastic else None
    index = element_index(param.numel(), shard, param.device).view(param.shape)
    return torch.where(finite, round_to(p, param.dtype, stream, index), param)


def updated_split(
    param: Tensor,
    low: Tensor,
    grad: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.0,
    inv_scale: float = 1.0,
    clip_value: float = float("inf"),
    clip_coef: float = 1.0,
    rule: str = "sgd",
) -> tuple[Tensor, Tensor]:
    """`updated` of a bfloat16 parameter and its low part, both as new tensors."""
    p, finite = _stepped(join(param, low), grad, lr, weight_decay, inv_scale, clip_value, clip_coef, rule)
    new_param, new_low = split(p)
    return torch.where(finite, new_param, param), torch.where(finite, new_low, low)


def _stepped(
    p: Tensor,
    grad: Tensor,
    lr: float,
    weight_decay: float,
    inv_scale: float,
    clip_value: float,
    clip_coef: float,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """The float32 parameter `p` after a step, before it is rounded, and whether each element's gradient is finite."""
    g = scaled_gradient(grad, inv_scale)
    direction = DIRECTIONS[rule](clipped(g, clip_value, clip_coef))
    return p * _float32(1.0 - lr * weight_decay) - _float32(lr) * direction, g.isfinite()


def _float32(value: float) -> Tensor:
    """A float64 number rounded once to float32."""
    return torch.tensor(value, dtype=torch.float64, device="cpu").to(torch.float32)


# ---- As a backend ---------------------------------------------------------------------------------------------------


def _check_no_overlap(
    op: str, params: list[Tensor], grads: list[Tensor], slots: list[Tensor], slot: str, low: Sequence[Tensor] = ()
) -> None:
    written = [*regions(Access.WRITTEN, "param", params), *regions(Access.WRITTEN, "low", low)]
    check_no_overlap(op, written, regions(Access.ADDED, slot, slots), regions(Access.READ, "grad", grads))


def _sq_norm_(slots: list[Tensor], grads: list[Tensor], inv_scale: Tensor | None) -> None:
    _check_no_overlap("sq_norm_", [], grads, slots, "slot")
    number = 1.0 if inv_scale is None else float(inv_scale.item())
    for slot, grad in zip(slots, grads, strict=True):
        slot.add_(sum_of_squares(grad, number))


def _update_(
    params: list[Tensor],
    grads: list[Tensor],
    scalars: Tensor,
    sq_norm: list[Tensor],
    rule: int,
    stochastic: bool,
    seed: int,
    parameter_id: list[int],
    shard: list[int],
    low: list[Tensor],
) -> None:
    op = "update_"
    check_low(op, params, low, stochastic=stochastic)
    _check_no_overlap(op, params, grads, sq_norm, "sq_norm", low)
    for param in params:
        vectors.check_vector(op, scalars, param.device)
    numbers = vectors.numbers_of(scalars)
    found_inf, step = numbers.pop("found_inf"), numbers.pop("step")
    name = {number: name for name, number in RULES.items()}[rule]
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if sq_norm:
            sq_norm[i].add_(sum_of_squares(grad, numbers["inv_scale"]))
        if found_inf != 0.0:
            continue
        if low and low[i].numel():
            new_param, new_low = updated_split(param, low[i], grad, **numbers, rule=name)
            param.detach().copy_(new_param)
            low[i].copy_(new_low)
            continue
        local = shard[3 * i : 3 * i + 3] or None
        keys: dict[str, Any] = {"seed": seed, "parameter_id": parameter_id[i], "shard": local}
        param.detach().copy_(updated(param, grad, **numbers, step=step, rule=name, stochastic=stochastic, **keys))


def _clipping_of(scalars: Tensor) -> dict[str, float]:
    numbers = vectors.numbers_of(scalars)
    return {name: numbers[name] for name in vectors.CLIPPING}


def _factor_sums_(row_sums: Tensor, column_sums: Tensor, grad: Tensor, scalars: Tensor) -> None:
    check_factors("factor_sums_", grad, row_sums, column_sums, torch.float64)
    none = torch.empty(0, dtype=torch.float32, device=grad.device)
    squares = factored_gradient(grad, none, none, **_clipping_of(scalars)).double().square()
    row_sums += squares.sum(1)
    column_sums += squares.unflatten(0, (len(column_sums), -1)).sum(1)


def _factored_sq_norm_(
    slot: Tensor, grad: Tensor, row_factors: Tensor, column_factors: Tensor, scalars: Tensor
) -> None:
    check_factors("factored_sq_norm_", grad, row_factors, column_factors, torch.float32)
    f = factored_gradient(grad, row_factors, column_factors, **_clipping_of(scalars))
    _sq_norm_([slot], [f], None)


def _factored_update_(
    param: Tensor,
    grad: Tensor,
    row_factors: Tensor,
    column_factors: Tensor,
    scalars: Tensor,
    *update_arguments: Any,
) -> None:
    check_factors("factored_update_", grad, row_factors, column_factors, torch.float32)
    f = factored_gradient(grad, row_factors, column_factors, **_clipping_of(scalars))
    _update_layer(param, f, vectors.without_clipping(scalars), None, *update_arguments)


def _linear_sq_norm_(slot: Tensor, inputs: list[Tensor], grad_outputs: list[Tensor], inv_scale: Tensor | None) -> None:
    _sq_norm_([slot], [linear_gradient(inputs, grad_outputs)], inv_scale)


def _linear_update_(
    weight: Tensor, inputs: list[Tensor], grad_outputs: list[Tensor], scalars: Tensor, *update_arguments: Any
) -> None:
    _update_layer(weight, linear_gradient(inputs, grad_outputs), scalars, *update_arguments)


def _embedding_sq_norm_(
    slot: Tensor,
    indices: list[Tensor],
    grad_outputs: list[Tensor],
    padding_idx: list[int],
    inv_scale: Tensor | None,
) -> None:
    rows = max((int(index.max().item()) + 1 for index in indices if index.numel()), default=0)
    _sq_norm_([slot], [embedding_gradient(rows, indices, grad_outputs, padding_idx)], inv_scale)


def _embedding_update_(
    weight: Tensor,
    indices: list[Tensor],
    grad_outputs: list[Tensor],
    padding_idx: list[int],
    scalars: Tensor,
    *update_arguments: Any,
) -> None:
    _update_layer(
        weight, embedding_gradient(weight.shape[0], indices, grad_outputs, padding_idx), scalars, *update_arguments
    )


def _update_layer(
    weight: Tensor,
    grad: Tensor,
    scalars: Tensor,
    sq_norm: Tensor | None,
    rule: int,
    stochastic: bool,
    seed: int,
    parameter_id: int,
    shard: list[int],
    low: Tensor | None = None,
) -> None:
    slots, lows = ([] if tensor is None else [tensor] for tensor in (sq_norm, low))
    _update_([weight], [grad], scalars, slots, rule, stochastic, seed, [parameter_id], shard, lows)


IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    "sq_norm_": _sq_norm_,
    "update_": _update_,
    "factor_sums_": _factor_sums_,
    "factored_sq_norm_": _factored_sq_norm_,
    "factored_update_": _factored_update_,
    "linear_sq_norm_": _linear_sq_norm_,
    "linear_update_": _linear_update_,
    "embedding_sq_norm_": _embedding_sq_norm_,
    "embedding_update_": _embedding_update_,
}
