# mypy: disable-error-code="no-untyped-def"
"""`linear_sgd_` and `linear_sq_norm_` in Triton. What they do is documented in `lomo_kernels/ops/linear.py`.

A program forms one tile of the gradient ``grad_output.T @ input`` in registers and uses it up there: no part of the
gradient is ever in memory.
"""

from __future__ import annotations

import functools
import threading
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..composite import gram, tiled
from ..ops import scalars as vectors
from ..ops._overlap import Access, check_no_overlap, regions
from ..ops._pairs import check_factors_apart, check_linear, check_linear_update, is_plain_linear
from . import launch
from .launch import TYPES, generation
from .numerics import (
    add_to_slot,
    add_up,
    bits_of,
    draw_at,
    elements,
    factor_of,
    float_of,
    mix64,
    nearest,
    scalar,
    slot_at,
    step_scalars,
    stochastic,
    sum_of_squares,
    updated,
    widen,
)
from .sgd import SCALARS

SIZES = ("tokens", "rows", "columns", "gy_stride", "x_stride")


class Tile(NamedTuple):
    """How a product is divided: rows and columns of the gradient per program, tokens per step, and how it is run.

    registers: a thread's limit; None leaves it to the compiler.
    parts: in which an update takes the columns, one after the other.
    """

    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int
    registers: int | None = None
    parts: int = 1

    def options(self) -> dict[str, Any]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_stages": self.stages, **limit, **launch.options(self.warps)}


#: The columns of a wide tile are updated in so many parts, one after the other: a thread has registers for one part at
#: a time. Each part is more to interpret: eight would take 2.7 times as long as one.
PARTS = 2 if launch.INTERPRETED else 8


def tile_of(factors: torch.dtype, gpu: int, aligned: bool) -> Tile:
    """A fixed choice: trying several, as an autotuner does, would take several steps.

    On Hopper and Blackwell 128 registers let two programs share a multiprocessor, one of which multiplies while the
    other updates. Compiled for sm_90, no update then spills registers, in parts of 16 columns; whole tiles would take
    138 to 255 registers.

    Args:
        factors: dtype of the factors.
        gpu: `generation`.
        aligned: whether factors are read in vectors. If not, a thread gets half the elements: else some are spilled.
    """
    if factors == torch.float32 or 0 < gpu < 80:  # multiplied by ordinary instructions; sm_120 spills with 3 stages
        # In one part sm_90 spills registers. Of more than two, a part would be written by less than 16 bytes at a time.
        stages = 3 if aligned and 80 <= gpu < 120 else 2
        return Tile(64, 64 if aligned else 32, 16, 4, stages, parts=min(PARTS, 2))
    if gpu == 0:  # 64 KiB of shared memory. Parts of a narrow tile would spill scalar registers.
        return Tile(128, 128 if aligned else 64, 32, 4, 2, parts=PARTS if aligned else 1)
    two = aligned and gpu in (90, 100, 103)
    # 96 KiB of shared memory, or where there are no more than 99 KiB (sm_86, 89, 120) 48 KiB.
    tokens = 64 if gpu in (80, 90, 100, 103) else 32
    return Tile(128, 128 if aligned else 64, tokens, 8, 3, 128 if two else None, PARTS)


def sums_products(gpu: int, version: str) -> bool:
    """Whether Triton can compile sums over a product: 3.6 fails for sm_100 ("parent layout must have at least rank >=
    2", in its pass TritonNvidiaGPUOptimizeTMemLayouts), 3.9 does not."""
    return not 100 <= gpu < 110 or tuple(map(int, version.split(".")[:2])) >= (3, 9)


def gram_tile_of(dtype: torch.dtype, gpu: int) -> Tile:
    """Tokens by tokens, and elements per step, of `gram_kernel`."""
    if dtype == torch.float32 or 0 < gpu < 80:
        return Tile(32, 32, 16, 4, 2)
    if 120 <= gpu < 130:  # steps of 64 elements that are not aligned would spill registers
        return Tile(64, 64, 32, 4, 3)
    return Tile(64, 64, 64 if gpu else 32, 4, 3 if gpu else 2)


def widened(dtype: torch.dtype, gpu: int) -> bool:
    """Whether the factors are multiplied as float32, which is exact: Triton has no 16-bit products for sm_75, and its
    interpreter multiplies the bits of bfloat16 as integers."""
    return dtype != torch.float32 and (launch.INTERPRETED or 0 < gpu < 80)


@triton.jit
def corner(program, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """First row and column of a program's tile. Programs that run together take tiles of 8 rows of tiles: what they
    read of both factors then fits the second-level cache."""
    down, across = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    first = program // (8 * across) * 8
    height = tl.minimum(down - first, 8)
    within = program % (8 * across)
    return (first + within % height) * BM, within // height * BN


@triton.jit
def product(
    gy,
    x,
    tokens,
    rows,
    columns,
    gy_stride,
    x_stride,
    row,
    column,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The tile [BM, BN] of gy.T @ x whose corner is (row, column), float32. Outside of the gradient it is zero."""
    r, c, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    gy += row + r[:, None] + k[None, :] * gy_stride
    x += column + k[:, None] * x_stride + c[None, :]
    in_row, in_column = (r < rows - row)[:, None], (c < columns - column)[None, :]
    tile = tl.zeros((BM, BN), tl.float32)
    # Tensor descriptors and warp specialization were tried: see "Tried and not used" in docs/backends.md.
    # Known to run once at least: a way round the loop would set the accumulator beside the asynchronous products, and
    # the assembler would then wait for each of them. Without tokens, that one step adds zeros.
    for first in range(0, tl.maximum(tokens, 1) if TOKENS is None else TOKENS, BK):
        in_token = k < tokens - first
        a = tl.load(gy, mask=in_row & in_token[None, :], other=0.0)
        b = tl.load(x, mask=in_token[:, None] & in_column, other=0.0)
        if WIDEN:
            a, b = widen(elements_of(a, G), G), widen(elements_of(b, G), G)
        tile = tl.dot(a, b, tile, input_precision="ieee")
        gy += BK * gy_stride
        x += BK * x_stride
    return tile


@triton.jit
def part_of(tile, part: tl.constexpr, PARTS: tl.constexpr):
    """Columns part * width to (part + 1) * width of the tile, width being 1 / PARTS of it. No element changes its
    thread."""
    if PARTS == 1:
        columns = tile
    else:
        halves = tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        columns = part_of(left if 2 * part < PARTS else right, part % (PARTS // 2), PARTS // 2)
    return columns


@triton.jit
def sum_of_tile(tile, unscale, SIZE: tl.constexpr):
    """The float64 sum of squares of the tile's SIZE numbers times `unscale`: of one half, then the other, for which
    there are registers."""
    total = tl.zeros((), tl.float64)
    for half in tl.static_range(2):
        scaled = part_of(tile, half, 2) * unscale
        total += sum_of_squares(tl.reshape(scaled, (SIZE // 2,)), SIZE // 2)
    return total


@triton.jit
def weights_of(corner, rows, columns, stride, first, BM: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to a part of a tile, and which of them are inside the weight.

    Args:
        corner: pointer to the tile's first element.
        rows, columns: of the weight, from the tile's corner on.
        stride: elements from one row to the next.
        first: the part's first column in the tile.
    """
    r, c = tl.arange(0, BM)[:, None], first + tl.arange(0, WIDTH)[None, :]
    return corner + (r * stride + c), (r < rows) & (c < columns)


@triton.jit
def elements_of(x, dtype: tl.constexpr):
    """The bits of loaded elements."""
    return x.to(tl.uint32 if dtype == tl.float32 else tl.uint16, bitcast=True)


@triton.jit
def multiples_of_16(a, b, c, d):
    """The same four, known to be multiples of 16: rows then begin where vectors do."""
    return a // 16 * 16, b // 16 * 16, c // 16 * 16, d // 16 * 16


@triton.jit(do_not_specialize=[*SIZES, *SCALARS, "on_device", "key", "slot"])
def linear_sgd_kernel(
    weight,
    gy,
    x,
    tokens: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    gy_stride: tl.int32,
    x_stride: tl.int32,
    lr: tl.int64,
    weight_decay: tl.int64,
    inv_scale: tl.int64,
    clip_value: tl.int64,
    clip_coef: tl.int64,
    found_inf: tl.int64,
    step: tl.int64,
    on_device: tl.int32,
    key: tl.int64,
    slot: tl.int64,
    partials,
    counter,
    P: tl.constexpr,
    G: tl.constexpr,
    RULE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLAMP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A program updates one tile of the weight. ALIGNED: sizes and strides are multiples of 16."""
    if ALIGNED:
        rows, columns, gy_stride, x_stride = multiples_of_16(rows, columns, gy_stride, x_stride)
    row, column = corner(tl.program_id(0), rows, columns, BM, BN)
    # A part's weights are under way while the part before, or the product, is computed.
    WIDTH: tl.constexpr = BN // PARTS
    weight = elements(weight, P) + row.to(tl.int64) * columns + column
    next_bits = tl.load(*weights_of(weight, rows - row, columns - column, columns, 0, BM, WIDTH), other=0)
    tile = product(gy, x, tokens, rows, columns, gy_stride, x_stride, row, column, G, BM, BN, BK, WIDEN, TOKENS)

    rate, decay, unscale, limit, coef = step_scalars(
        lr, weight_decay, inv_scale, clip_value, clip_coef, on_device, CLAMP
    )
    skip = scalar(found_inf, on_device, tl.float64) != 0.0
    if STOCHASTIC:
        stream = mix64((key.to(tl.int64) ^ scalar(step, on_device, tl.int64)).to(tl.uint64, bitcast=True))
    STEP: tl.constexpr = 2 if PAIRS and tl.bfloat16 == P else 1
    for part in tl.static_range(PARTS):
        pointer, inside = weights_of(weight, rows - row, columns - column, columns, part * WIDTH, BM, WIDTH)
        p_bits = next_bits
        if part + 1 < PARTS:
            following = weights_of(weight, rows - row, columns - column, columns, (part + 1) * WIDTH, BM, WIDTH)
            next_bits = tl.load(*following, other=0)
        scaled = part_of(tile, part, PARTS) * unscale
        p = updated(widen(p_bits, P), scaled, rate, decay, limit, coef, RULE, CLAMP)
        if STOCHASTIC:
            first = row.to(tl.int64) * columns + column + part * WIDTH
            last = first + (BM - 1) * columns + WIDTH
            position = tl.arange(0, BM)[:, None] * columns + (tl.arange(0, WIDTH // STEP) * STEP)[None, :]
            rounded = stochastic(p, draw_at(stream, first, last, position, P, PAIRS), P)
        else:
            rounded = nearest(p, P)
        if not skip:
            tl.store(pointer, tl.where(tl.abs(scaled) < float("inf"), rounded, p_bits), mask=inside)
    if NORM:
        total = sum_of_tile(tile, unscale, BM * BN)
        add_to_slot(total, slot_at(slot), partials, counter, tl.program_id(0), tl.num_programs(0))


@triton.jit(do_not_specialize=[*SIZES, "inv_scale", "kind", "slot"])
def linear_sq_norm_kernel(
    slot: tl.int64,
    gy,
    x,
    tokens: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    gy_stride: tl.int32,
    x_stride: tl.int32,
    inv_scale: tl.int64,
    kind: tl.int32,
    done,
    partials,
    counter,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A program adds up the squares of one tile. GRAM: but only where `gram_kernel` has not done it."""
    if GRAM:
        needed = tl.load(done) == 0
    else:
        needed = True
    if needed:
        if ALIGNED:
            rows, columns, gy_stride, x_stride = multiples_of_16(rows, columns, gy_stride, x_stride)
        row, column = corner(tl.program_id(0), rows, columns, BM, BN)
        tile = product(gy, x, tokens, rows, columns, gy_stride, x_stride, row, column, G, BM, BN, BK, WIDEN, TOKENS)
        total = sum_of_tile(tile, factor_of(inv_scale, kind), BM * BN)
        add_to_slot(total, slot_at(slot), partials, counter, tl.program_id(0), tl.num_programs(0))


# ---- The norm from inner products of tokens --------------------------------------------------------------------------

#: Rows are never taken to be shorter than this: where products could be subnormal, the estimate is then too large.
SHORTEST = tl.constexpr(2.0**-40)


@triton.jit(do_not_specialize=["size", "stride"])
def lengths_kernel(
    x, size: tl.int32, stride: tl.int32, lengths, G: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr
):
    """A program measures one row of x: its Euclidean length, for the estimate of an error."""
    token = tl.program_id(0)
    x = elements(x, G) + token.to(tl.int64) * stride
    column = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size if SIZE is None else SIZE, BLOCK):
        part = widen(tl.load(x + first + column, mask=column < size - first, other=0), G)
        squares += part * part
    length = tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=0)), SHORTEST)
    tl.store(lengths + token, length)


@triton.jit
def inner_products(
    x,
    stride,
    size,
    tokens,
    i,
    j,
    G: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    WIDEN: tl.constexpr,
    SIZE: tl.constexpr,
):
    """x[i:i+BT] @ x[j:j+BT].T, float32; zero where there is no such token."""
    t, k = tl.arange(0, BT), tl.arange(0, BK)
    a_pointer = x + i.to(tl.int64) * stride + t[:, None] * stride + k[None, :]
    b_pointer = x + j.to(tl.int64) * stride + t[None, :] * stride + k[:, None]
    in_a, in_b = (t < tokens - i)[:, None], (t < tokens - j)[None, :]
    tile = tl.zeros((BT, BT), tl.float32)
    for first in range(0, size if SIZE is None else SIZE, BK):
        in_size = k < size - first
        a = tl.load(a_pointer + first, mask=in_a & in_size[None, :], other=0.0)
        b = tl.load(b_pointer + first, mask=in_b & in_size[:, None], other=0.0)
        if WIDEN:
            a, b = widen(elements_of(a, G), G), widen(elements_of(b, G), G)
        tile = tl.dot(a, b, tile, input_precision="ieee")
    return tile


@triton.jit
def scaled_lengths(lengths, token, tokens):
    """The lengths of some rows times a power of two that brings the longest to [1, 2), and that power."""
    lengths = tl.load(lengths + token, mask=token < tokens, other=0.0)
    scale = float_of((254 << 23) - (bits_of(tl.max(lengths, axis=0)) & 0x7F800000))
    return lengths * scale, scale


@triton.jit(do_not_specialize=[*SIZES, "inv_scale", "kind", "slot"])
def gram_kernel(
    slot: tl.int64,
    gy,
    x,
    tokens: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    gy_stride: tl.int32,
    x_stride: tl.int32,
    inv_scale: tl.int64,
    kind: tl.int32,
    lengths,
    done,
    partials,
    counter,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """S = sum_ij (x x.T)_ij (gy gy.T)_ij is the sum of squares of gy.T @ x. A program adds up the products of BT tokens
    with BT tokens, i <= j, and the squares of what rounding may have done to them, E**2. Where S is finite, larger than
    zero and E is small beside it, the last program adds S to the slot and sets `done`.

    An inner product is taken to be wrong by 2**-24 times both rows' lengths times the root of the number of additions:
    16 products are added at a time, and each addition rounds, or cuts off; at least 16 are counted. Where tokens are
    alike, or the gradient nearly vanishes, S is a small difference of large numbers, and E shows it.
    """
    if ALIGNED:
        rows, columns, gy_stride, x_stride = multiples_of_16(rows, columns, gy_stride, x_stride)
    program = tl.program_id(0)
    j = ((tl.sqrt_rn((8 * program + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > program, j - 1, j)  # a square root in float32 may be one off
    j = tl.where((j + 1) * (j + 2) // 2 <= program, j + 1, j)
    i = program - j * (j + 1) // 2
    twice = tl.where(i == j, 1.0, 2.0)
    i, j = i * BT, j * BT
    a = inner_products(x, x_stride, columns, tokens, i, j, G, BT, BK, WIDEN, COLUMNS)
    b = inner_products(gy, gy_stride, rows, tokens, i, j, G, BT, BK, WIDEN, ROWS)

    # Brought near 1 by powers of two, from the longest rows: nothing of weight overflows or vanishes.
    t = tl.arange(0, BT)
    x_i, x_i_scale = scaled_lengths(lengths, i + t, tokens)
    x_j, x_j_scale = scaled_lengths(lengths, j + t, tokens)
    gy_i, gy_i_scale = scaled_lengths(lengths + tokens, i + t, tokens)
    gy_j, gy_j_scale = scaled_lengths(lengths + tokens, j + t, tokens)
    a = a * x_i_scale * x_j_scale
    b = b * gy_i_scale * gy_j_scale
    of_a = x_i[:, None] * x_j[None, :] * b
    of_b = gy_i[:, None] * gy_j[None, :] * a
    scale = x_i_scale.to(tl.float64) * x_j_scale.to(tl.float64) * gy_i_scale.to(tl.float64) * gy_j_scale.to(tl.float64)
    back = 1.0 / scale  # exact
    s = tl.sum(tl.sum((a * b).to(tl.float64), axis=1), axis=0) * back * twice
    squares = tl.sum(tl.sum(of_a * of_a + of_b * of_b, axis=1), axis=0).to(tl.float64) * back * back * twice

    blocks = tl.num_programs(0)
    tl.store(partials + program, s)
    tl.store(partials + blocks + program, squares)
    if tl.atomic_add(counter, 1, sem="acq_rel") == blocks - 1:
        tl.store(counter, 0)
        s, squares = add_up(partials, blocks), add_up(partials + blocks, blocks)
        unscale = factor_of(inv_scale, kind).to(tl.float64)
        total = s * unscale * unscale
        # Above 2**250 an element of the gradient may not fit float32: the product shows whether it does.
        largest = 1.8092513943330656e75
        wrong = 2.0**-48 * tl.maximum(tl.maximum(rows, columns) // 16, 16).to(tl.float64) * squares
        good = (s > 0.0) & (total < largest) & (s < largest) & (wrong <= (s * s) * 2.5e-11)  # E <= 5e-6 S
        if good:
            tl.store(slot_at(slot), tl.load(slot_at(slot)) + total)
        tl.store(done, good.to(tl.int64))


# ---- Launchers -------------------------------------------------------------------------------------------------------

#: Strides and sizes that kernels multiply by up to 128 in 32 bits; what is larger goes by tiles.
LARGEST = 2**23

_lengths = launch.Workspaces(torch.float32, zeroed=False)
_done = launch.Workspaces(torch.int64, zeroed=False)
_gram_lock = threading.Lock()


class Factors(NamedTuple):
    """One pair, as the kernels take it."""

    gy: Tensor
    x: Tensor
    tokens: int
    rows: int
    columns: int
    gy_stride: int
    x_stride: int

    def is_aligned(self) -> bool:
        addresses = self.gy.data_ptr() | self.x.data_ptr() | self.gy_stride | self.x_stride
        return not (addresses | self.rows | self.columns) % 16


def factors_of(x: Tensor, gy: Tensor) -> Factors:
    x, gy = _rows_of(x), _rows_of(gy)
    tokens, columns = x.shape
    return Factors(gy, x, tokens, gy.shape[1], columns, gy.stride(0), x.stride(0))


def _rows_of(tensor: Tensor) -> Tensor:
    """The tensor as a matrix, or a copy of it, with the elements of a row next to each other."""
    matrix = tensor.detach()
    if matrix.dim() != 2:
        matrix = matrix.reshape(-1, matrix.shape[-1])
    near = matrix.stride(1) == 1 or matrix.shape[1] == 1
    return matrix if near and matrix.stride(0) < LARGEST else matrix.contiguous()


def by_tiles(inputs: list[Tensor], rows: int, columns: int, *, norm: bool, updates: bool) -> bool:
    """Whether `tiled` does the work: several pairs, which are added up first, many tokens, sizes beyond `LARGEST`,
    and norms where Triton cannot compile them. The shapes decide, not what is in the tensors.

    Args:
        norm: the sum of squares is wanted.
        updates: the update is.
    """
    if norm and not sums_products(generation(inputs[0].device), triton.__version__):
        return True
    tokens = inputs[0].numel() // columns
    if len(inputs) > 1 or max(rows, columns) >= LARGEST or tokens >= 2**31 - 128:
        return True
    return tiled.is_faster_on_gpu(tokens, tiled.has_mixed_products(inputs[0]), with_norm=norm and updates)


@functools.cache
def tile_and_constants(factors: torch.dtype, gpu: int, aligned: bool) -> tuple[Tile, dict[str, Any]]:
    """`tile_of`, and what a product's kernel is compiled for, the same dict at each call."""
    tile = tile_of(factors, gpu, aligned)
    return tile, {
        "G": TYPES[factors],
        "ALIGNED": aligned,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.tokens,
        "WIDEN": widened(factors, gpu),
        "TOKENS": None,
        **tile.options(),
    }


def shape_of(factors: Factors, gpu: int) -> tuple[int, Tile, dict[str, Any]]:
    """Programs, their tile, and what their kernel is compiled for."""
    tile, constants = tile_and_constants(factors.x.dtype, gpu, factors.is_aligned())
    if launch.INTERPRETED:  # range() of a tensor fails there, see `add_up`
        constants = constants | {"TOKENS": factors.tokens}
    return launch.cdiv(factors.rows, tile.rows) * launch.cdiv(factors.columns, tile.columns), tile, constants


def linear_sq_norm_(slot: Tensor, inputs: list[Tensor], grad_outputs: list[Tensor], inv_scale: Tensor | None) -> None:
    op, device = "linear_sq_norm_", slot.device
    launch.check_slot(op, "slot", slot, device)
    if not is_plain_linear([slot], inputs, grad_outputs):
        check_linear(op, inputs, grad_outputs, slot)
        check_factors_apart(op, [*inputs, *grad_outputs], None, slot)
    number, kind = launch.inv_scale(op, inv_scale, device)
    rows, columns = grad_outputs[0].shape[-1], inputs[0].shape[-1]
    if rows == 0 or columns == 0:
        return
    if by_tiles(inputs, rows, columns, norm=True, updates=False):
        tiled.sq_norm_by_tiles(slot, inputs, grad_outputs, inv_scale)
        return
    factors = factors_of(inputs[0], grad_outputs[0])
    if factors.tokens == 0:
        return
    gpu = generation(device)
    by_tokens = gram.is_cheaper_on_gpu(factors.tokens, rows, columns)
    blocks, _, constants = shape_of(factors, gpu)
    # Another thread may use the stream, too: no kernel of its own between those of one call, which share memory.
    with launch.on(device), _gram_lock if by_tokens else nullcontext():
        done = _gram(slot, factors, number, kind, gpu) if by_tokens else None
        linear_sq_norm_kernel[(blocks,)](
            slot.data_ptr(),
            *factors,
            number,
            kind,
            done,
            launch.partials.get(device, blocks),
            launch.counters.get(device, 1),
            GRAM=by_tokens,
            **constants,
        )


def _gram(slot: Tensor, factors: Factors, number: int, kind: int, gpu: int) -> Tensor:
    """Launches the sum from inner products. Returns where it says whether that was accurate enough."""
    device, dtype, tokens = slot.device, factors.x.dtype, factors.tokens
    lengths, done = _lengths.get(device, 2 * tokens), _done.get(device, 1)
    known = launch.INTERPRETED
    for part, (matrix, size, stride) in enumerate(
        ((factors.x, factors.columns, factors.x_stride), (factors.gy, factors.rows, factors.gy_stride))
    ):
        lengths_kernel[(tokens,)](
            matrix,
            size,
            stride,
            lengths[part * tokens :],
            G=TYPES[dtype],
            BLOCK=1024,
            SIZE=size if known else None,
            **launch.options(4),
        )
    tile = gram_tile_of(dtype, gpu)
    across = launch.cdiv(tokens, tile.rows)
    blocks = across * (across + 1) // 2
    gram_kernel[(blocks,)](
        slot.data_ptr(),
        *factors,
        number,
        kind,
        lengths,
        done,
        launch.partials.get(device, 2 * blocks),
        launch.counters.get(device, 1),
        G=TYPES[dtype],
        ALIGNED=factors.is_aligned(),
        BT=tile.rows,
        BK=tile.tokens,
        WIDEN=widened(dtype, gpu),
        ROWS=factors.rows if known else None,
        COLUMNS=factors.columns if known else None,
        **tile.options(),
    )
    return done


def linear_update_(
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
    op, device = "linear_update_", weight.device
    lows = [] if low is None else [low]
    contiguous = weight.is_contiguous()
    if not (contiguous and is_plain_linear([weight, sq_norm, low], inputs, grad_outputs, weight)):
        check_linear_update(op, weight, inputs, grad_outputs)
        check_writable(op, weight, lows, [*inputs, *grad_outputs])
    launch.check_rule(op, rule)
    if shard:
        launch.indices_of(op, shard, weight.numel())
    if sq_norm is not None:
        launch.check_slot(op, "sq_norm", sq_norm, device)
    # The kernel knows a whole weight's indices only, and no split weight: its product's tile takes the registers.
    rows, columns = grad_outputs[0].shape[-1], inputs[0].shape[-1]
    if lows or (shard and stochastic) or by_tiles(inputs, rows, columns, norm=sq_norm is not None, updates=True):
        vectors.check_vector(op, scalars, device)
        update_arguments = (sq_norm, rule, stochastic, seed, parameter_id, shard, low)
        tiled.update_by_tiles(weight, tiled.linear_tiles(inputs, grad_outputs), scalars, *update_arguments)
        return
    step = launch.step_scalars(op, scalars, device)
    if not rows * columns:
        return
    stochastic = stochastic and weight.dtype != torch.float32
    factors, gpu = factors_of(inputs[0], grad_outputs[0]), generation(device)
    w = weight.detach() if contiguous else weight.detach().contiguous()
    blocks, tile, constants = shape_of(factors, gpu)
    with launch.on(device):
        slot, partials, counter = 0, None, None
        if sq_norm is not None:
            slot = sq_norm.data_ptr()
            partials, counter = launch.partials.get(device, blocks), launch.counters.get(device, 1)
        linear_sgd_kernel[(blocks,)](
            w,
            *factors,
            *step.arguments,
            step.on_device,
            launch.parameter_key(seed, parameter_id) if stochastic else 0,
            slot,
            partials,
            counter,
            P=TYPES[weight.dtype],
            RULE=rule,
            CLAMP=step.clamps,
            STOCHASTIC=stochastic,
            PAIRS=columns % 2 == 0,
            NORM=sq_norm is not None,
            PARTS=tile.parts,
            **constants,
        )
        if not contiguous:
            weight.detach().copy_(w)


def check_writable(op: str, weight: Tensor, low: list[Tensor], read: list[Tensor]) -> None:
    """Raises RuntimeError where programs would overwrite what others read, or write one place twice."""
    launch.check_apart(op, "weight", weight)
    for part in low:
        launch.check_apart(op, "low", part)
    factors = regions(Access.READ, "a factor of its gradient", read)
    written = [*regions(Access.WRITTEN, "weight", [weight]), *regions(Access.WRITTEN, "low", low)]
    check_no_overlap(op, written, factors)
