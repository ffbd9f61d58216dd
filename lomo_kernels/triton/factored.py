# mypy: disable-error-code="no-untyped-def"
"""`factored_update_` and `factored_sq_norm_` in Triton. `lomo_kernels/ops/factored.py` documents what they do.

A program takes a tile [M, R, C]: M matrices, R rows and C columns. Either M is 1, or whole matrices fit into a tile, as
the thousands of a convolution do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._arguments import check_low
from ..ops._overlap import Access, check_no_overlap, regions
from ..ops.factored import check_factors
from . import launch, sgd
from .launch import TYPES
from .numerics import (
    BLOCK,
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

SIZES = ("matrices", "rows", "columns")

# ---- Tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def corner_of(program, rows, columns, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """First matrix, row and column of a program's tile, int64. Neighbours in a row of tiles run together."""
    across, down = tl.cdiv(columns, C), tl.cdiv(rows, R)
    group = program // (across * down)
    within = program - group * across * down
    return group * M, within // across * R, within % across * C


@triton.jit
def element_of(rows, stride, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr = 1):
    """Distance of each element of a tile from its first one, int32 [M, R, C / STEP]: of every STEP-th column.

    stride: elements from one row to the next. `tile_of` sees that the distances fit.
    """
    m, r = tl.arange(0, M)[:, None, None], tl.arange(0, R)[None, :, None]
    c = (tl.arange(0, C // STEP) * STEP)[None, None, :]
    return (m * rows.to(tl.int32) + r) * stride.to(tl.int32) + c


@triton.jit
def inside_of(matrix, row, column, matrices, rows, columns, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Which elements of a tile are in the gradient."""
    m, r, c = tl.arange(0, M)[:, None, None], tl.arange(0, R)[None, :, None], tl.arange(0, C)[None, None, :]
    return (m < matrices - matrix) & (r < rows - row) & (c < columns - column)


@triton.jit
def clipped(bits, unscale, limit, coef, G: tl.constexpr, CLAMP: tl.constexpr):
    """The clipped gradient in float32, NaN if the scaled gradient is not finite."""
    scaled = widen(bits, G) * unscale
    g = scaled
    if CLAMP:
        g = tl.minimum(tl.maximum(g, -limit), limit)
    return tl.where(tl.abs(scaled) < float("inf"), g * coef, float("nan"))


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
    place = element_of(rows, columns, M, R, C)
    # First of all what takes longest. See `sgd_kernel` for TOGETHER.
    TOGETHER: tl.constexpr = 4 if tl.float32 == P else 16
    param = elements(param, P) + first
    p_bits = tl.load(param + place, mask=inside, other=0)
    if low is not None:
        low = elements(low, P) + first
        low_bits = tl.load(low + place, mask=inside, other=0)
    g_place = tl.max_contiguous(place, (1, 1, TOGETHER)) if ALIGNED else place
    g_bits = tl.load(elements(grad, G) + first + g_place, mask=inside, other=0)
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
        tl.store(param + place, tl.where(finite, rounded, p_bits), mask=inside)
        if low is not None:
            tl.store(low + place, tl.where(finite, low_part(p), low_bits), mask=inside)


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

#: Elements of a tile's row. A warp's vectors of a 16-bit dtype have so many.
WIDTH = 256


class Tile(NamedTuple):
    """How a gradient is cut: M matrices by R rows by C columns for each program."""

    M: int
    R: int
    C: int

    def programs(self, matrices: int, rows: int, columns: int) -> int:
        return -(-matrices // self.M) * -(-rows // self.R) * -(-columns // self.C)


def tile_of(matrices: int, rows: int, columns: int) -> Tile:
    """By shape alone, and few of them: each is a kernel of its own.

    Args:
        rows: of one matrix.
    """
    height, width = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    if matrices > 1 and height * width <= BLOCK // 4:
        return Tile(BLOCK // (height * width), height, width)
    width = min(width, WIDTH)
    if columns * (BLOCK // width) >= 2**31:  # distances in a tile are int32
        return Tile(1, 1, BLOCK)
    return Tile(1, BLOCK // width, width)


def shape_of(grad: Tensor, column_factors: Tensor) -> tuple[int, int, int]:
    """Matrices, rows of one, columns."""
    matrices = len(column_factors) if column_factors.numel() else 1
    return matrices, grad.shape[0] // matrices, grad.shape[1]


def is_aligned(columns: int, *tensors: Tensor | None) -> bool:
    """Whether rows begin where vectors do."""
    return columns % 16 == 0 and not any(t.data_ptr() % 16 for t in tensors if t is not None)


def _factors(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def clipping_arguments(scalars: launch.StepScalars) -> list[int]:
    """Arguments of a kernel that only clips: inv_scale, clip_value, clip_coef, and whether they are addresses."""
    at = SCALARS.index("inv_scale")
    return [*scalars.arguments[at : at + 3], scalars.on_device]


def check(op: str, grad: Tensor, rows: Tensor, columns: Tensor, scalars: Tensor, dtype: torch.dtype) -> Any:
    check_factors(op, grad, rows, columns, dtype)
    launch.check_element_type(op, "grad", grad, grad.device)
    return launch.step_scalars(op, scalars, grad.device)


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
    where = launch.indices_of(op, shard, param.numel())
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
    where = where if stochastic else launch.WHOLE
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
            *where[:3],
            P=TYPES[param.dtype],
            G=TYPES[grad.dtype],
            RULE=rule,
            ALIGNED=is_aligned(shape[2], p, g, low_parts),
            CLAMP=step.clamps,
            STOCHASTIC=stochastic,
            ROWS=where.rows,
            PAIRS=where.pairs and shape[2] % 2 == 0 and tile.C > 1,
            **tile._asdict(),
            **launch.options(),
        )
        sgd.bring_back((param, *lows), (p, *low_copy))
