# mypy: disable-error-code="no-untyped-def"
"""`factored_update_` and `factored_sq_norm_` in Triton. `lomo_kernels/ops/factored.py` documents what they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._arguments import check_low
from ..ops._overlap import Access, check_no_overlap, regions
from . import launch, sgd
from .launch import TYPES
from .matrices import (
    SIZES,
    check,
    clipped,
    clipping_arguments,
    corner_of,
    element_of,
    inside_of,
    is_aligned,
    shape_of,
    tile_of,
)
from .numerics import (
    add_to_slot,
    clipping,
    draw_at,
    elements,
    high_part,
    index_of,
    joined,
    low_part,
    mix64,
    nearest,
    random_bits,
    scalar,
    share_of,
    slot_at,
    step_scalars,
    stochastic,
    sum_of_squares,
    updated,
    widen,
)
from .sgd import INDICES, SCALARS


@triton.jit
def times_factors(
    g,
    row_factors,
    column_factors,
    matrix,
    row,
    column,
    matrices,
    rows,
    columns,
    inside,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The factored gradient of a tile. Factors that are None are 1.

    Each element loads its own column factor, of which the first-level cache has all but the first. Loaded once for all
    rows, they would be spread over all threads, and the compiler might spread the tile likewise.
    """
    m = tl.arange(0, M)[:, None, None]
    if row_factors is not None:
        r = tl.arange(0, R)[None, :, None]
        of_row = row_factors + (matrix * rows + row) + (m * rows.to(tl.int32) + r)
        g = g * tl.load(of_row, mask=(m < matrices - matrix) & (r < rows - row), other=0.0)
    if column_factors is not None:
        c = tl.arange(0, C)[None, None, :]
        of_column = column_factors + (matrix * columns + column) + (m * columns.to(tl.int32) + c)
        g = g * tl.load(tl.broadcast_to(of_column, (M, R, C)), mask=inside, other=0.0)
    return g


@triton.jit
def draw_tile(
    stream,
    first,
    rows,
    columns,
    offset,
    row_length,
    row_stride,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The random bits of a tile whose first element is `first`, as `stochastic` takes them."""
    STEP: tl.constexpr = 2 if PAIRS and tl.bfloat16 == P else 1
    position = element_of(rows, columns, M, R, C, STEP)
    if ROWS:
        SHIFT: tl.constexpr = 1 if tl.bfloat16 == P else 0
        index = index_of(first + position, offset, row_length, row_stride)
        begin = index_of(first, offset, row_length, row_stride)
        end = index_of(first + ((M - 1) * rows + R - 1) * columns + C - 1, offset, row_length, row_stride)
        counter = (index >> SHIFT).to(tl.uint32)
        high = begin >> (32 + SHIFT)
        # Keys for all of the elements would be twice the work.
        if end >> (32 + SHIFT) == high:
            bits = random_bits(mix64(stream ^ high.to(tl.uint64)), counter)
        else:
            bits = random_bits(mix64(stream ^ (index >> (32 + SHIFT)).to(tl.uint64)), counter)
        bits = share_of(bits, index.to(tl.uint32) & 1, P, PAIRS)
    else:
        first += offset
        bits = draw_at(stream, first, first + ((M - 1) * rows + R - 1) * columns + C, position, P, PAIRS)
    return bits


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *SCALARS, "on_device", "key", *INDICES])
def factored_update_kernel(
    param,
    low,
    grad,
    row_factors,
    column_factors,
    matrices: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    lr: tl.int64,
    weight_decay: tl.int64,
    inv_scale: tl.int64,
    clip_value: tl.int64,
    clip_coef: tl.int64,
    found_inf: tl.int64,
    step: tl.int64,
    on_device: tl.int32,
    key: tl.int64,
    offset: tl.int64,
    row_length: tl.int64,
    row_stride: tl.int64,
    P: tl.constexpr,
    G: tl.constexpr,
    RULE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLAMP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A program updates one tile. rows: of one matrix. ALIGNED: rows begin where vectors do. `low`: None, or the low
    parts."""
    matrices, rows, columns = matrices.to(tl.int64), rows.to(tl.int64), columns.to(tl.int64)
    if ALIGNED:
        columns = columns // 16 * 16
    matrix, row, column = corner_of(tl.program_id(0).to(tl.int64), rows, columns, M, R, C)
    inside = inside_of(matrix, row, column, matrices, rows, columns, M, R, C)
    first = (matrix * rows + row) * columns + column
    position = element_of(rows, columns, M, R, C)
    # First of all what takes longest. See `sgd_kernel` for TOGETHER.
    TOGETHER: tl.constexpr = 4 if tl.float32 == P else 16
    param = elements(param, P) + first
    p_bits = tl.load(param + position, mask=inside, other=0)
    if low is not None:
        low = elements(low, P) + first
        low_bits = tl.load(low + position, mask=inside, other=0)
    grad_position = tl.max_contiguous(position, (1, 1, TOGETHER)) if ALIGNED else position
    g_bits = tl.load(elements(grad, G) + first + grad_position, mask=inside, other=0)
    rate, decay, unscale, limit, coef = step_scalars(
        lr, weight_decay, inv_scale, clip_value, clip_coef, on_device, CLAMP
    )
    g = clipped(g_bits, unscale, limit, coef, G, CLAMP)
    f = times_factors(g, row_factors, column_factors, matrix, row, column, matrices, rows, columns, inside, M, R, C)
    before = joined(p_bits, low_bits) if low is not None else widen(p_bits, P)
    p = updated(before, f, rate, decay, float("inf"), 1.0, RULE, False)
    if STOCHASTIC:
        stream = mix64((key.to(tl.int64) ^ scalar(step, on_device, tl.int64)).to(tl.uint64, bitcast=True))
        offset, row_length, row_stride = offset.to(tl.int64), row_length.to(tl.int64), row_stride.to(tl.int64)
        random = draw_tile(stream, first, rows, columns, offset, row_length, row_stride, P, ROWS, PAIRS, M, R, C)
        rounded = stochastic(p, random, P)
    elif low is not None:
        rounded = high_part(p)
    else:
        rounded = nearest(p, P)
    if scalar(found_inf, on_device, tl.float64) == 0.0:
        finite = tl.abs(f) < float("inf")
        tl.store(param + position, tl.where(finite, rounded, p_bits), mask=inside)
        if low is not None:
            tl.store(low + position, tl.where(finite, low_part(p), low_bits), mask=inside)


@triton.jit(do_not_specialize=[*SIZES, "inv_scale", "clip_value", "clip_coef", "on_device", "slot"])
def factored_sq_norm_kernel(
    slot: tl.int64,
    grad,
    row_factors,
    column_factors,
    matrices: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    inv_scale: tl.int64,
    clip_value: tl.int64,
    clip_coef: tl.int64,
    on_device: tl.int32,
    partials,
    counter,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLAMP: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A program adds up the squares of one tile of the factored gradient."""
    matrices, rows, columns = matrices.to(tl.int64), rows.to(tl.int64), columns.to(tl.int64)
    if ALIGNED:
        columns = columns // 16 * 16
    program = tl.program_id(0).to(tl.int64)
    matrix, row, column = corner_of(program, rows, columns, M, R, C)
    inside = inside_of(matrix, row, column, matrices, rows, columns, M, R, C)
    grad = elements(grad, G) + ((matrix * rows + row) * columns + column)
    bits = tl.load(grad + element_of(rows, columns, M, R, C), mask=inside, other=0)
    unscale, limit, coef = clipping(inv_scale, clip_value, clip_coef, on_device, CLAMP)
    g = clipped(bits, unscale, limit, coef, G, CLAMP)
    f = times_factors(g, row_factors, column_factors, matrix, row, column, matrices, rows, columns, inside, M, R, C)
    total = sum_of_squares(tl.reshape(f, (M * R * C,)), M * R * C)
    add_to_slot(total, slot_at(slot), partials, counter, program, tl.num_programs(0).to(tl.int64))


# ---- Launchers -------------------------------------------------------------------------------------------------------


def _factors(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def factored_sq_norm_(slot: Tensor, grad: Tensor, row_factors: Tensor, column_factors: Tensor, scalars: Tensor) -> None:
    op, device = "factored_sq_norm_", grad.device
    launch.check_slot(op, "slot", slot, device)
    step = check(op, grad, row_factors, column_factors, scalars, torch.float32)
    check_no_overlap(
        op,
        regions(Access.ADDED, "slot", [slot]),
        regions(Access.READ, "row_factors", [row_factors]),
        regions(Access.READ, "column_factors", [column_factors]),
        regions(Access.READ, "grad", [grad]),
    )
    if not grad.numel():
        return
    shape = shape_of(grad, column_factors)
    tile = tile_of(*shape)
    programs = tile.programs(*shape)
    with launch.on(device):
        grad = grad.detach().contiguous()
        factored_sq_norm_kernel[(programs,)](
            slot.data_ptr(),
            grad,
            _factors(row_factors),
            _factors(column_factors),
            *shape,
            *clipping_arguments(step),
            launch.partials.get(device, programs),
            launch.counters.get(device, 1),
            G=TYPES[grad.dtype],
            ALIGNED=is_aligned(shape[2], grad),
            CLAMP=step.clamps,
            **tile._asdict(),
            **launch.options(),
        )


def factored_update_(
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
    op, device = "factored_update_", param.device
    step = check(op, grad, row_factors, column_factors, scalars, torch.float32)
    sgd.check(op, param, grad, device)
    lows = [] if low is None else [low]
    check_low(op, [param], lows, stochastic=stochastic)
    for of_param in lows:
        launch.check_apart(op, "low", of_param)
    launch.check_rule(op, rule)
    indices = launch.indices_of(op, shard, param.numel())
    check_no_overlap(
        op,
        regions(Access.WRITTEN, "param", [param]),
        regions(Access.WRITTEN, "low", lows),
        regions(Access.READ, "row_factors", [row_factors]),
        regions(Access.READ, "column_factors", [column_factors]),
        regions(Access.READ, "grad", [grad]),
    )
    if not param.numel():
        return
    lows = [of_param for of_param in lows if of_param.numel()]
    stochastic = stochastic and param.dtype != torch.float32
    indices = indices if stochastic else launch.WHOLE
    shape = shape_of(grad, column_factors)
    tile = tile_of(*shape)
    with launch.on(device):
        p, *low_copy, g = sgd.in_order(param, *lows, grad, any_order=False)
        low_parts = low_copy[0] if low_copy else None
        factored_update_kernel[(tile.programs(*shape),)](
            p,
            low_parts,
            g,
            _factors(row_factors),
            _factors(column_factors),
            *shape,
            *step.arguments,
            step.on_device,
            launch.parameter_key(seed, parameter_id) if stochastic else 0,
            *indices[:3],
            P=TYPES[param.dtype],
            G=TYPES[grad.dtype],
            RULE=rule,
            ALIGNED=is_aligned(shape[2], p, g, low_parts),
            CLAMP=step.clamps,
            STOCHASTIC=stochastic,
            ROWS=indices.rows,
            PAIRS=indices.pairs and shape[2] % 2 == 0 and tile.C > 1,
            **tile._asdict(),
            **launch.options(),
        )
        sgd.bring_back((param, *lows), (p, *low_copy))
