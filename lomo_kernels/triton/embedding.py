# mypy: disable-error-code="no-untyped-def"
"""`embedding_update_` and `embedding_sq_norm_` in Triton. `lomo_kernels/ops/embedding.py` documents what they do.

Tokens are sorted by their index, and the tokens of one index, a run, are added up in registers and used up in them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..composite import tiled
from ..ops._arguments import check_low
from ..ops._pairs import check_embedding, check_weight
from . import launch
from .launch import TYPES
from .linear import check_writable
from .numerics import (
    add_to_slot,
    draw,
    elements,
    factor_of,
    load,
    mix64,
    nearest,
    scalar,
    slot_at,
    step_scalars,
    stochastic,
    store,
    sum_of_squares,
    updated,
    widen,
)
from .sgd import INDICES, SCALARS

#: The index of tokens that count nothing, where the number of rows is not known.
NOWHERE = 2**63 - 1
#: Elements of a row per program, and tokens of a run that are loaded at a time. 1024 elements of float32 are spilled by
#: sm_120.
BLOCK = 512
TOGETHER = 4


@triton.jit
def sum_of_run(
    keys, order, position, tokens, key, gy, stride, columns, G: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr
):
    """The sum of gy[:columns] over the tokens from `position` on that have this key, float32, in fixed order."""
    column = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    full = True
    while full:
        at = position + tl.arange(0, U)
        in_run = tl.load(keys + at, mask=at < tokens, other=-1) == key
        token = tl.load(order + at, mask=in_run, other=0)
        bits = tl.load(gy + token[:, None] * stride + column, mask=in_run[:, None] & (column < columns), other=0)
        total += tl.sum(widen(bits, G), axis=0)
        position += U
        full = tl.sum(in_run.to(tl.int32), axis=0) == U
    return total


@triton.jit
def is_first(keys, position, key):
    """Whether the token at `position` is the first with its key."""
    return tl.load(keys + position - 1, mask=position > 0, other=-1) != key


@triton.jit(
    do_not_specialize=["tokens", "columns", "stride", "nowhere", *SCALARS, "on_device", "seed_key", *INDICES, "slot"]
)
def embedding_sgd_kernel(
    weight,
    gy,
    keys,
    order,
    tokens: tl.int64,
    columns: tl.int64,
    stride: tl.int64,
    nowhere: tl.int64,
    lr: tl.int64,
    weight_decay: tl.int64,
    inv_scale: tl.int64,
    clip_value: tl.int64,
    clip_coef: tl.int64,
    found_inf: tl.int64,
    step: tl.int64,
    on_device: tl.int32,
    seed_key: tl.int64,
    offset: tl.int64,
    row_length: tl.int64,
    row_stride: tl.int64,
    slot: tl.int64,
    touched,
    partials,
    counter,
    P: tl.constexpr,
    G: tl.constexpr,
    RULE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLAMP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
    U: tl.constexpr,
):
    """A program updates BLOCK elements of the row whose run begins at its position; where none does, nothing.

    DECAY: positions are rows instead, and those that no token has looked up decay, if the weight decays.
    """
    if ALIGNED:
        columns, stride = columns // 16 * 16, stride // 16 * 16
    across = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    position = program // across
    first = program % across * BLOCK
    left = tl.minimum(columns - first, BLOCK).to(tl.int32)
    rate, decay, unscale, limit, coef = step_scalars(
        lr, weight_decay, inv_scale, clip_value, clip_coef, on_device, CLAMP
    )
    if DECAY:
        row = position
        active = (tl.load(touched + row) == 0) & (decay != 1.0)
    else:
        row = tl.load(keys + position)
        active = (row != nowhere) & is_first(keys, position, row)
    total = tl.zeros((), tl.float64)
    if active:
        scaled = tl.zeros((BLOCK,), tl.float32)
        if not DECAY:
            g = sum_of_run(keys, order, position, tokens, row, elements(gy, G) + first, stride, left, G, BLOCK, U)
            scaled = g * unscale
        start = row * columns + first
        pointer = elements(weight, P) + start
        p_bits = load(pointer, left, BLOCK)
        p = updated(widen(p_bits, P), scaled, rate, decay, limit, coef, RULE, CLAMP)
        if STOCHASTIC:
            stream = mix64((seed_key.to(tl.int64) ^ scalar(step, on_device, tl.int64)).to(tl.uint64, bitcast=True))
            random = draw(
                stream,
                start,
                left,
                offset.to(tl.int64),
                row_length.to(tl.int64),
                row_stride.to(tl.int64),
                P,
                ROWS,
                PAIRS,
                BLOCK,
            )
            rounded = stochastic(p, random, P)
        else:
            rounded = nearest(p, P)
        if scalar(found_inf, on_device, tl.float64) == 0.0:
            store(pointer, tl.where(tl.abs(scaled) < float("inf"), rounded, p_bits), left, BLOCK)
        if NORM:
            total = sum_of_squares(scaled, BLOCK)
    if NORM:
        add_to_slot(total, slot_at(slot), partials, counter, program, tl.num_programs(0))


@triton.jit(do_not_specialize=["tokens", "columns", "stride", "nowhere", "inv_scale", "kind", "slot"])
def embedding_sq_norm_kernel(
    slot: tl.int64,
    gy,
    keys,
    order,
    tokens: tl.int64,
    columns: tl.int64,
    stride: tl.int64,
    nowhere: tl.int64,
    inv_scale: tl.int64,
    kind: tl.int32,
    partials,
    counter,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    U: tl.constexpr,
):
    """A program adds up the squares of BLOCK elements of the run that begins at its position, if one does."""
    if ALIGNED:
        columns, stride = columns // 16 * 16, stride // 16 * 16
    across = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    position = program // across
    first = program % across * BLOCK
    row = tl.load(keys + position)
    total = tl.zeros((), tl.float64)
    if (row != nowhere) & is_first(keys, position, row):
        left = tl.minimum(columns - first, BLOCK).to(tl.int32)
        g = sum_of_run(keys, order, position, tokens, row, elements(gy, G) + first, stride, left, G, BLOCK, U)
        total = sum_of_squares(g * factor_of(inv_scale, kind), BLOCK)
    add_to_slot(total, slot_at(slot), partials, counter, program, tl.num_programs(0))


# ---- Launchers -------------------------------------------------------------------------------------------------------


def runs(
    indices: list[Tensor], grad_outputs: list[Tensor], padding_idx: list[int], rows: int | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Sorted indices, the tokens in that order, gradients [tokens, columns], and the index of what counts nothing:
    padding, and indices out of range. It is the largest, and the host reads nothing."""
    nowhere = NOWHERE if rows is None else rows
    keys = []
    for index, padding in zip(indices, padding_idx, strict=True):
        index = index.detach().reshape(-1).long()
        out = (index < 0) | (index == padding)
        keys.append(index.masked_fill(out if rows is None else out | (index >= rows), nowhere))
    columns = grad_outputs[0].shape[-1]
    gys = [gy.detach().reshape(-1, columns) for gy in grad_outputs]
    gy = gys[0] if len(gys) == 1 else torch.cat(gys)
    if gy.stride(1) != 1:
        gy = gy.contiguous()
    sorted_keys, order = torch.sort(keys[0] if len(keys) == 1 else torch.cat(keys), stable=True)
    return sorted_keys, order, gy, nowhere


def embedding_sq_norm_(
    slot: Tensor,
    indices: list[Tensor],
    grad_outputs: list[Tensor],
    padding_idx: list[int],
    inv_scale: Tensor | None,
) -> None:
    op, device = "embedding_sq_norm_", slot.device
    launch.check_slot(op, "slot", slot, device)
    check_embedding(op, indices, grad_outputs, padding_idx, slot)
    number, kind = launch.inv_scale(op, inv_scale, device)
    columns = grad_outputs[0].shape[-1]
    if not any(gy.numel() for gy in grad_outputs):
        return
    with launch.on(device):
        keys, order, gy, nowhere = runs(indices, grad_outputs, padding_idx, None)
        aligned = not (columns | gy.stride(0)) % 16
        blocks = keys.numel() * launch.cdiv(columns, BLOCK)
        embedding_sq_norm_kernel[(blocks,)](
            slot.data_ptr(),
            gy,
            keys,
            order,
            keys.numel(),
            columns,
            gy.stride(0),
            nowhere,
            number,
            kind,
            launch.partials.get(device, blocks),
            launch.counters.get(device, 1),
            G=TYPES[gy.dtype],
            ALIGNED=aligned,
            BLOCK=BLOCK,
            U=TOGETHER,
            **launch.options(4),
        )


def embedding_update_(
    weight: Tensor,
    indices: list[Tensor],
    grad_outputs: list[Tensor],
    padding_idx: list[int],
    scalars: Tensor,
    sq_norm: Tensor | None,
    rule: int,
    stochastic: bool,
    seed: int,
    parameter_id: int,
    shard: list[int],
    low: Tensor | None = None,
) -> None:
    op, device = "embedding_update_", weight.device
    check_embedding(op, indices, grad_outputs, padding_idx, weight)
    check_weight(op, weight, None, grad_outputs[0].shape[-1], "[num_embeddings, embedding_dim]")
    step = launch.step_scalars(op, scalars, device)
    launch.check_rule(op, rule)
    element_indices = launch.indices_of(op, shard, weight.numel())
    lows = [] if low is None else [low]
    check_low(op, [weight], lows, stochastic=stochastic)
    if sq_norm is not None:
        launch.check_slot(op, "sq_norm", sq_norm, device)
    if weight.numel() == 0:
        return
    check_writable(op, weight, lows, [*indices, *grad_outputs])
    if lows:
        update_arguments = (sq_norm, rule, stochastic, seed, parameter_id, shard, low)
        tiled.embedding_update_(weight, indices, grad_outputs, padding_idx, scalars, *update_arguments)
        return
    stochastic = stochastic and weight.dtype != torch.float32
    rows, columns = weight.shape
    decays = step.decays  # if the host does not know, every program of the second kernel sees it, and ends if not
    with launch.on(device):
        w = weight.detach().contiguous()
        keys, order, gy, nowhere = runs(indices, grad_outputs, padding_idx, rows)
        aligned = not (columns | gy.stride(0)) % 16
        across = launch.cdiv(columns, BLOCK)
        touched = None
        if decays:
            touched = torch.zeros(rows + 1, dtype=torch.uint8, device=device)
            touched.index_fill_(0, keys, 1)
        for decay, positions in ((False, keys.numel()), (True, rows if decays else 0)):
            if not positions:
                continue
            slot, partials, counter = 0, None, None
            norm = not decay and sq_norm is not None
            if sq_norm is not None and norm:
                slot = sq_norm.data_ptr()
                partials, counter = launch.partials.get(device, positions * across), launch.counters.get(device, 1)
            embedding_sgd_kernel[(positions * across,)](
                w,
                gy,
                keys,
                order,
                keys.numel(),
                columns,
                gy.stride(0),
                nowhere,
                *step.arguments,
                step.on_device,
                launch.parameter_key(seed, parameter_id) if stochastic else 0,
                element_indices.offset,
                element_indices.row_length,
                element_indices.row_stride,
                slot,
                touched,
                partials,
                counter,
                P=TYPES[weight.dtype],
                G=TYPES[gy.dtype],
                RULE=rule,
                ALIGNED=aligned,
                CLAMP=step.clamps,
                STOCHASTIC=stochastic,
                ROWS=element_indices.rows,
                PAIRS=columns % 2 == 0 and element_indices.pairs,
                NORM=norm,
                DECAY=decay,
                BLOCK=BLOCK,
                U=TOGETHER,
                **launch.options(4),
            )
        if w is not weight and not weight.is_contiguous():
            weight.detach().copy_(w)
