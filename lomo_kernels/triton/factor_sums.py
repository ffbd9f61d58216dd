# mypy: disable-error-code="no-untyped-def"
"""`factor_sums_` in Triton. `lomo_kernels/ops/factored.py` documents what it does.

Either a program has whole matrices, as of a convolution. Or it goes down a strip of columns, and a second kernel adds
the strips' sums. The gradient is read once. The order of the additions depends on the shape, and in a strip on the
GPU's layout of a tile, so the sums have the same bits from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._overlap import Access, check_no_overlap, regions
from . import launch
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
from .numerics import PROGRAMS, clipping, elements

#: Sums that a program of `add_strips_kernel` adds up.
SUMS = 256


@triton.jit
def squares_of(bits, unscale, limit, coef, G: tl.constexpr, CLAMP: tl.constexpr):
    """Squares of clipped gradients in float64: none overflows, and none is lost."""
    g = clipped(bits, unscale, limit, coef, G, CLAMP).to(tl.float64)
    return g * g


@triton.jit(do_not_specialize=[*SIZES, "inv_scale", "clip_value", "clip_coef", "on_device"])
def sums_of_matrices_kernel(
    row_sums,
    column_sums,
    grad,
    matrices: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    inv_scale: tl.int64,
    clip_value: tl.int64,
    clip_coef: tl.int64,
    on_device: tl.int32,
    G: tl.constexpr,
    CLAMP: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A program adds the sums of M whole matrices."""
    matrices, rows, columns = matrices.to(tl.int64), rows.to(tl.int64), columns.to(tl.int64)
    matrix = tl.program_id(0).to(tl.int64) * M
    inside = inside_of(matrix, 0, 0, matrices, rows, columns, M, R, C)
    grad = elements(grad, G) + matrix * rows * columns
    bits = tl.load(grad + element_of(rows, columns, M, R, C), mask=inside, other=0)
    unscale, limit, coef = clipping(inv_scale, clip_value, clip_coef, on_device, CLAMP)
    squares = squares_of(bits, unscale, limit, coef, G, CLAMP)
    m = matrix + tl.arange(0, M)[:, None]
    r, c = tl.arange(0, R)[None, :], tl.arange(0, C)[None, :]
    of_row, row_mask = row_sums + m * rows + r, (m < matrices) & (r < rows)
    tl.store(of_row, tl.load(of_row, mask=row_mask, other=0.0) + tl.sum(squares, axis=2), mask=row_mask)
    of_column, column_mask = column_sums + m * columns + c, (m < matrices) & (c < columns)
    tl.store(of_column, tl.load(of_column, mask=column_mask, other=0.0) + tl.sum(squares, axis=1), mask=column_mask)


@triton.jit(do_not_specialize=[*SIZES, "chunk", "inv_scale", "clip_value", "clip_coef", "on_device"])
def sums_of_strips_kernel(
    of_rows,
    of_columns,
    grad,
    matrices: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    chunk: tl.int64,
    inv_scale: tl.int64,
    clip_value: tl.int64,
    clip_coef: tl.int64,
    on_device: tl.int32,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLAMP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A program goes down a strip of C columns and `chunk` rows of a matrix. It stores the strip's part of each row's
    sum in `of_rows` [strips across, all rows], and of each column's sum in `of_columns` [chunks, all columns].

    Column sums stay in registers. A row's 256 elements are one warp's, so its sum needs no other warp.
    """
    matrices, rows, columns = matrices.to(tl.int64), rows.to(tl.int64), columns.to(tl.int64)
    if ALIGNED:
        columns = columns // 16 * 16
    program, chunk = tl.program_id(0).to(tl.int64), chunk.to(tl.int64)
    matrix, row, column = corner_of(program, rows, columns, 1, chunk, C)
    end = tl.minimum(row + chunk, rows)
    r, c = tl.arange(0, R), tl.arange(0, C)
    in_column = (c < columns - column)[None, :]
    of_columns += row // chunk * (matrices * columns) + matrix * columns + column
    of_rows += column // C * (matrices * rows) + matrix * rows
    grad = elements(grad, G) + (matrix * rows + row) * columns + column
    place = r[:, None] * columns.to(tl.int32) + c[None, :]
    bits = tl.load(grad + place, mask=(r < end - row)[:, None] & in_column, other=0)
    unscale, limit, coef = clipping(inv_scale, clip_value, clip_coef, on_device, CLAMP)
    sums = tl.zeros((R, C), tl.float64)
    while row < end:
        grad += R * columns  # of the next rows, which are under way while these are added up
        next_bits = tl.load(grad + place, mask=(r < end - row - R)[:, None] & in_column, other=0)
        squares = squares_of(bits, unscale, limit, coef, G, CLAMP)
        sums += squares
        tl.store(of_rows + row + r, tl.sum(squares, axis=1), mask=r < end - row)
        bits = next_bits
        row += R
    tl.store(of_columns + c, tl.sum(sums, axis=0), mask=c < columns - column)


@triton.jit(do_not_specialize=["rows", "columns", "of_row", "of_column"])
def add_strips_kernel(
    row_sums,
    column_sums,
    partials,
    rows: tl.int64,
    columns: tl.int64,
    of_row: tl.int64,
    of_column: tl.int64,
    N: tl.constexpr,
):
    """A program adds the parts of N rows' or columns' sums, one after the other. `of_row` and `of_column`: how many
    parts a sum has. rows, columns: of all matrices. partials: [of_row, rows], then [of_column, columns]."""
    rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    program, of_rows = tl.program_id(0).to(tl.int64), tl.cdiv(rows, N)
    is_rows = program < of_rows
    first = tl.where(is_rows, program, program - of_rows) * N
    length, parts = tl.where(is_rows, rows, columns), tl.where(is_rows, of_row.to(tl.int64), of_column.to(tl.int64))
    place = tl.arange(0, N)
    inside = place < length - first
    sums = (row_sums if is_rows else column_sums) + first
    partials += tl.where(is_rows, 0, of_row.to(tl.int64) * rows) + first
    total = tl.load(sums + place, mask=inside, other=0.0)
    part = parts * 0
    while part < parts:
        for k in tl.static_range(4):  # loads that are under way together
            limit = tl.where(part + k < parts, length - first, 0)
            total += tl.load(partials + (part + k) * length + place, mask=place < limit, other=0.0)
        part += 4
    tl.store(sums + place, total, mask=inside)


def factor_sums_(row_sums: Tensor, column_sums: Tensor, grad: Tensor, scalars: Tensor) -> None:
    op, device = "factor_sums_", grad.device
    step = check(op, grad, row_sums, column_sums, scalars, torch.float64)
    check_no_overlap(
        op,
        regions(Access.WRITTEN, "row_sums", [row_sums]),
        regions(Access.WRITTEN, "column_sums", [column_sums]),
        regions(Access.READ, "grad", [grad]),
        regions(Access.READ, "scalars", [scalars]),
    )
    if not grad.numel():
        return
    shape = matrices, rows, columns = shape_of(grad, column_sums)
    tile = tile_of(*shape)
    with launch.on(device):
        grad = grad.detach().contiguous()
        constants = {"G": TYPES[grad.dtype], "CLAMP": step.clamps, **launch.options()}
        if tile.M > 1:
            sums_of_matrices_kernel[(tile.programs(*shape),)](
                row_sums, column_sums, grad, *shape, *clipping_arguments(step), **tile._asdict(), **constants
            )
            return
        # The order of the additions depends on the shape alone.
        chunk = tile.R * launch.cdiv(tile.programs(*shape), PROGRAMS.value)
        chunks, strips = launch.cdiv(rows, chunk), launch.cdiv(columns, tile.C)
        partials = launch.partials.get(device, strips * matrices * rows + chunks * matrices * columns)
        sums_of_strips_kernel[(matrices * chunks * strips,)](
            partials,
            partials[strips * matrices * rows :],
            grad,
            *shape,
            chunk,
            *clipping_arguments(step),
            ALIGNED=is_aligned(columns, grad),
            R=tile.R,
            C=tile.C,
            **constants,
        )
        programs = launch.cdiv(matrices * rows, SUMS) + launch.cdiv(matrices * columns, SUMS)
        add_strips_kernel[(programs,)](
            row_sums,
            column_sums,
            partials,
            matrices * rows,
            matrices * columns,
            strips,
            chunks,
            N=SUMS,
            **launch.options(launch.WARPS // 2),
        )
