"""The layers' operators by tiles: a matrix product, or a sum of tokens' gradients, into a small float32 buffer, then
`update_` or `sq_norm_` on the tile.

For what the compiled library does not have, and for CUDA tensors where Triton is not there. A tile is some rows of the
weight's gradient; it is the only part of the gradient that exists, and its memory is used again for the next. Nothing
is read from a GPU by the host, and results are the same from run to run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..ops._arguments import check_low, check_shard, check_slot, library
from ..ops._pairs import check_factors_apart, check_linear, check_linear_update, is_plain_linear
from . import gram
from .gram import flat

# The kernel under the layers' operators for CPU tensors (csrc/cpu/product.cpp). Matrices; rows contiguous, at any
# distance.
#
# _product_: out float32 [rows, in], contiguous, = or (accumulate) += grad_output.T @ input, from grad_output [T, rows]
# and input [T, in], both bfloat16 or float16: torch has no such product with a float32 result on CPUs. Sums are
# float32, in an order that does not depend on the number of threads. Where the processor has bfloat16 instructions
# (AVX512_BF16, AMX) they are used for bfloat16, and they flush: operands, products and sums below 2^-126 count as zero,
# so an element of the gradient may be off by T * 2^-126 in all. A weight notices only where it is itself that small, or
# where inv_scale is large; a norm does not. On one thread of Zen 4 the product runs at oneDNN's bfloat16 speed. On one
# with AMX, whose oneDNN uses it, an update for 1024 tokens takes 1.31 (1024 x 1024) and 1.17 (4096 x 4096) times
# `weight.addmm_`, and 7.4 times with LOMO_KERNELS_ISA=avx512bf16.
library.define("_product_(Tensor(a!) out, Tensor grad_output, Tensor input, bool accumulate) -> ()")


@torch.library.register_fake("lomo_kernels::_product_")
def _(out: Tensor, grad_output: Tensor, input: Tensor, accumulate: bool) -> None:
    devices = [tensor.device if isinstance(tensor, Tensor) else None for tensor in (out, grad_output, input)]
    if len(set(devices)) > 1:
        raise ValueError(f"_product_: out is on {devices[0]}, the factors on {devices[1]} and {devices[2]}")


#: A tile's memory: large enough for products to be fast, small enough for the update to find it in a cache. Update of a
#: bfloat16 weight 1024 x 1024 for 256 tokens, as a multiple of `weight.addmm_`, one thread of Zen 4: 1.27 with 512 KiB,
#: 1.21 with 1 MiB, 1.10 with 2 MiB, 1.14 with 4 MiB; float32: 1.19, 1.12, 1.14, 1.13.
TILE_BYTES = 2 * 1024 * 1024
#: A GPU has larger caches, and needs some hundred blocks of a tile for a product to use all of it. Update of a bfloat16
#: weight 11008 x 4096 on an H200, as a multiple of the product alone: 3.9 with 16 MiB and 3.5 with 64 for 256 tokens,
#: 2.1 and 1.9 for 1024, 1.24 and 1.22 for 4096, 1.04 and 1.04 for 16384. A tile is memory above the weights, so 16.
GPU_TILE_BYTES = 16 * 1024 * 1024
#: Rows of a tile at least, however wide the weight is: one block of `_product_`. bfloat16 4096 x 4096, 2048 tokens:
#: 1.21 with 128 rows, 1.08 with 256.
LEAST_ROWS = 256
#: From so many tokens on, tiles serve 16-bit factors on GPUs that Triton's kernels would serve: cuBLAS is then faster
#: than Triton's `product` by more than the buffer costs. Update of a bfloat16 weight 11008 x 4096 on an H200,
#: milliseconds with tiles of 16 MiB and with tiles in registers: 0.19 and 0.14 for 256 tokens, 0.28 and 0.26 for 1024,
#: 0.70 and 0.74 for 4096, 2.3 and 2.7 for 16384. With the sum of squares in the same pass Triton's kernel took 0.26 for
#: 256 tokens and 0.38 for 1024. Tiles were not measured with it; a tile's sum is read from the cache. They serve that.
#:
#: `weight.addmm_` would need no buffer, but a gradient that is not finite would destroy the weight, and alpha and beta
#: are numbers, which the host would have to read from the device.
CROSSOVER = 2048


class _Buffer(threading.local):
    """One buffer for each thread's tiles on the CPU, as large as the largest tile so far. On GPUs, whose streams would
    have to share it, torch's allocator does as well."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.float32, device="cpu")

    def get(self, numel: int, device: torch.device) -> Tensor:
        if device.type != "cpu" or _simulated_device == "cuda":
            return torch.empty(numel, dtype=torch.float32, device=device)
        if self.memory.numel() < numel:
            self.memory = self.memory.new_empty(0)  # gone before the next is there
            self.memory = torch.empty(max(numel, TILE_BYTES // 4), dtype=torch.float32, device="cpu")
        return self.memory[:numel]


buffer = _Buffer()
_buffers = [buffer]


def new_buffer() -> _Buffer:
    """Another one, for what has to stay while a tile is made."""
    _buffers.append(_Buffer())
    return _buffers[-1]


#: What `simulated` was given, while inside.
_simulated_device: str | None = None


@contextmanager
def simulated(device: str) -> Iterator[None]:
    """While inside, tensors have no values: no shape depends on what one holds, tiles are those of `device` ("cpu",
    "cuda"), and no tile that is made inside is kept."""
    global _simulated_device
    before = _simulated_device, [each.memory for each in _buffers]
    _simulated_device = device
    for each in _buffers:
        each.memory = torch.empty(0, dtype=torch.float32, device="cpu")
    try:
        yield
    finally:
        _simulated_device, memories = before
        for each, memory in zip(_buffers, memories, strict=True):
            each.memory = memory


def tile_rows(rows: int, columns: int, device: str = "cpu") -> int:
    """Rows of one tile of a gradient [rows, columns]."""
    # `tile_bytes`, written out: a call less in the update of each layer.
    memory = TILE_BYTES if (_simulated_device or device) == "cpu" else GPU_TILE_BYTES
    return max(1, min(rows, max(LEAST_ROWS, memory // (4 * max(columns, 1)))))


def tile_bytes(device: str = "cpu") -> int:
    """A tile's memory, unless `LEAST_ROWS` take more."""
    return TILE_BYTES if (_simulated_device or device) == "cpu" else GPU_TILE_BYTES


def operand(matrix: Tensor) -> Tensor:
    """The matrix, or a copy with contiguous rows if `add_product` needs them."""
    if matrix.is_cpu and matrix.dtype is not torch.float32 and _simulated_device != "cuda":
        return flat(matrix, contiguous_rows=True)
    return matrix


def workspace_bytes(rows: int, columns: int, pairs: int, device: str = "cpu") -> int:
    """Most bytes that an update or a norm of a weight [rows, columns] takes beside its arguments, whichever backend
    serves it: a tile, and where a GPU adds up several pairs, the summand of one. (Triton's kernels have their tiles in
    registers: of one pair they take a float64 per tile. What an embedding needs by token is less than a tile.)"""
    tile = 4 * columns * tile_rows(rows, columns, device)
    if device == "cpu":
        return max(tile, TILE_BYTES)
    return tile * (2 if pairs > 1 else 1)


def _tiles(rows: int, columns: int, device: torch.device) -> list[tuple[int, Tensor]]:
    """(first row, buffer for the tile's rows) of each tile; none if the gradient has no element. They share memory."""
    if not rows * columns:
        return []
    height = tile_rows(rows, columns, device.type)
    memory = buffer.get(height * columns, device).view(height, columns)
    if height >= rows:  # the usual case, without the call that a comprehension is
        return [(0, memory)]
    tiles = [(first, memory) for first in range(0, rows, height)]
    last = tiles[-1][0]
    tiles[-1] = last, memory[: rows - last]
    return tiles


def add_product(tile: Tensor, grad_output: Tensor, input: Tensor, *, fresh: bool) -> None:
    """``tile (fresh: =, else +=) grad_output.T @ input``, float32. Of 16-bit factors on a CPU, rows are contiguous."""
    if input.dtype is not torch.float32:
        if input.is_cpu and gram.compiled():
            torch.ops.lomo_kernels._product_.default(tile, grad_output, input, not fresh)
            return
        if has_mixed_products(input):
            if fresh:
                torch.ops.aten.mm.dtype_out(grad_output.T, input, torch.float32, out=tile)
            else:  # addmm.dtype would add, but torch 2.8 to 2.11 refuse it a first summand of float32
                tile += torch.ops.aten.mm.dtype(grad_output.T, input, torch.float32)
            return
        grad_output, input = grad_output.float(), input.float()
    if fresh:
        torch.mm(grad_output.T, input, out=tile)
    else:
        tile.addmm_(grad_output.T, input)


def has_mixed_products(input: Tensor) -> bool:
    """Whether torch multiplies 16-bit matrices with a float32 result: for NVIDIA's GPUs, and not where it was told to
    add float16 up in float16. For AMD's it may refuse (torch 2.9, ROCm 7.0): there the factors are converted."""
    if not input.is_cuda or input.dtype is torch.float32 or torch.version.hip:
        return False
    return not (input.dtype is torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation)


def is_faster_on_gpu(tokens: int, mixed_products: bool, *, with_norm: bool = False) -> bool:
    """Whether tiles serve a linear layer's factors of so many tokens better than Triton's kernels.

    Args:
        mixed_products: `has_mixed_products` of the factors.
        with_norm: an update with its sum of squares in the same pass.
    """
    return mixed_products and (with_norm or tokens >= CROSSOVER)


def linear_tiles(inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(first row, gradient of the tile's rows) of each tile. A tile is valid until the next is asked for."""
    uses = []
    for input, grad_output in zip(inputs, grad_outputs, strict=True):
        contiguous_rows = input.is_cpu and input.dtype is not torch.float32
        x = flat(input, contiguous_rows=contiguous_rows)
        uses.append((x, flat(grad_output, contiguous_rows=contiguous_rows)))
    x, gy = uses[0]
    for first, tile in _tiles(gy.shape[1], x.shape[1], x.device):
        fresh = True
        for x, gy in uses:
            part = gy if tile.shape[0] == gy.shape[1] else gy[:, first : first + len(tile)]
            add_product(tile, part, x, fresh=fresh)
            fresh = False
        yield first, tile


def zero_tiles(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, zeros) of each tile. A tile is valid until the next is asked for."""
    for first, tile in _tiles(rows, columns, device):
        yield first, tile.zero_()


def add_rows(tile: Tensor, first: int, index: Tensor, grad_output: Tensor, padding_idx: int) -> None:
    """Adds an embedding's rows to the tile that begins with row `first`, in a fixed order."""
    (row,), gy = rows_of([index], [padding_idx]), flat(grad_output)
    here = (row >= first) & (row < first + len(tile))
    if _may_be_read(tile.device):
        tile.index_add_(0, row[here] - first, gy[here].float())  # on a CPU one after the other; index_put_ is not
    else:  # the others add zeros, spread over the rows
        spread = torch.arange(len(row), dtype=torch.int64, device=row.device) % len(tile)
        row = torch.where(here, row - first, spread)
        tile.index_put_((row,), torch.where(here[:, None], gy, 0).float(), accumulate=True)  # sorts first


def _may_be_read(device: torch.device) -> bool:
    """Whether how many elements a mask has may decide over a shape; on a GPU the host would have to wait for that."""
    return device.type == "cpu" and _simulated_device is None


def rows_of(indices: Sequence[Tensor], padding_idx: Sequence[int]) -> list[Tensor]:
    """The tokens' rows, int64 [tokens], one per use; -1 where a token counts nothing."""
    flat = [index.reshape(-1).long() for index in indices]
    return [torch.where(row == padding, -1, row) for row, padding in zip(flat, padding_idx, strict=True)]


def _embedding_column_tiles(
    indices: Sequence[Tensor], grad_outputs: Sequence[Tensor], padding_idx: Sequence[int]
) -> Iterator[Tensor]:
    """Some columns of the gradient's rows that tokens looked up, and of zeros: as many rows as there are tokens."""
    rows_of_uses, gys = rows_of(indices, padding_idx), [flat(grad_output) for grad_output in grad_outputs]
    tokens, columns = sum(len(row) for row in rows_of_uses), gys[0].shape[1]
    numbers = numbered(torch.cat(rows_of_uses)).split([len(row) for row in rows_of_uses])
    width = max(1, min(columns, GPU_TILE_BYTES // (4 * (tokens + 1))))
    for first in range(0, columns, width):
        yield sum_tokens(tokens + 1, numbers, [gy[:, first : first + width] for gy in gys])[:-1]


def numbered(row: Tensor) -> Tensor:
    """For each token a number of its row, below the number of tokens. For a token that counts nothing it is the number
    of tokens.

    Args:
        row: as `rows_of` gives it.
    """
    tokens = len(row)
    row, order = row.sort(stable=True)
    number = torch.ones_like(row)  # of a token's row, among those that were looked up, from one
    number[1:] = row[1:] != row[:-1]
    number = torch.where(row >= 0, number.cumsum(0) - 1, tokens)
    return torch.empty_like(order).scatter_(0, order, number)


def sum_tokens(rows: int, numbers: Sequence[Tensor], grad_outputs: Sequence[Tensor]) -> Tensor:
    """The tokens' gradients, summed by the numbers of their rows, in a fixed order: float32 [rows, columns].

    Args:
        numbers: of each use's tokens, below `rows`.
        grad_outputs: [..., columns] of each use.
    """
    gys = [flat(grad_output) for grad_output in grad_outputs]
    total = torch.zeros(rows, gys[0].shape[1], dtype=torch.float32, device=gys[0].device)
    for number, gy in zip(numbers, gys, strict=True):
        if total.is_cpu:
            total.index_add_(0, number, gy.float())  # one after the other; index_put_ is not
        else:
            total.index_put_((number,), gy.float(), accumulate=True)  # sorts first
    return total


def _embedding_tiles(
    rows: int, indices: Sequence[Tensor], grad_outputs: Sequence[Tensor], padding_idx: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    for first, tile in zero_tiles(rows, grad_outputs[0].shape[-1], grad_outputs[0].device):
        for index, gy, padding in zip(indices, grad_outputs, padding_idx, strict=True):
            add_rows(tile, first, index, gy, padding)
        yield first, tile


def linear_sq_norm_(slot: Tensor, inputs: list[Tensor], grad_outputs: list[Tensor], inv_scale: Tensor | None) -> None:
    op = "linear_sq_norm_"
    if not is_plain_linear([slot], inputs, grad_outputs) or slot.numel() != 1 or slot.dtype is not torch.float64:
        check_slot(op, "slot", slot, slot.device if isinstance(slot, Tensor) else torch.device("cpu"))
        check_linear(op, inputs, grad_outputs, slot)
        check_factors_apart(op, [*inputs, *grad_outputs], None, slot)
    if len(inputs) == 1:
        elements = inputs[0].shape[-1] * grad_outputs[0].shape[-1]
        estimate = gram.estimate(inputs[0], grad_outputs[0])
        if estimate is not None and estimate.add_to(slot, inv_scale, elements):
            return
    sq_norm_by_tiles(slot, inputs, grad_outputs, inv_scale)


def sq_norm_by_tiles(
    slot: Tensor, inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor], inv_scale: Tensor | None
) -> None:
    """``linear_sq_norm_`` of arguments that were checked."""
    for _, tile in linear_tiles(inputs, grad_outputs):
        torch.ops.lomo_kernels.sq_norm_.default([slot], [tile], inv_scale)


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
    op = "linear_update_"
    if not is_plain_linear([weight, sq_norm, low], inputs, grad_outputs, weight):
        check_linear_update(op, weight, inputs, grad_outputs)
        check_factors_apart(op, [*inputs, *grad_outputs], weight, sq_norm, [] if low is None else [low])
    if shard:
        check_shard(op, shard, weight.numel())
    arguments = scalars, sq_norm, rule, stochastic, seed, parameter_id, shard, low
    update_by_tiles(weight, linear_tiles(inputs, grad_outputs), *arguments)


def embedding_sq_norm_(
    slot: Tensor,
    indices: list[Tensor],
    grad_outputs: list[Tensor],
    padding_idx: list[int],
    inv_scale: Tensor | None,
) -> None:
    for tile in _embedding_column_tiles(indices, grad_outputs, padding_idx):
        torch.ops.lomo_kernels.sq_norm_.default([slot], [tile], inv_scale)


def embedding_update_(
    weight: Tensor, indices: list[Tensor], grad_outputs: list[Tensor], padding_idx: list[int], *update_arguments: Any
) -> None:
    update_by_tiles(weight, _embedding_tiles(weight.shape[0], indices, grad_outputs, padding_idx), *update_arguments)


def update_by_tiles(
    weight: Tensor,
    tiles: Iterator[tuple[int, Tensor]],
    scalars: Tensor,
    sq_norm: Tensor | None,
    rule: int,
    stochastic: bool,
    seed: int,
    parameter_id: int,
    shard: Sequence[int],
    low: Tensor | None = None,
) -> None:
    """``update_`` on `weight`, tile by tile. Arguments as of ``linear_update_``."""
    weight = weight.detach()
    if low is not None:
        check_low("update_", [weight], [low], stochastic=stochastic)
    columns = weight.shape[1]
    for first, tile in tiles:
        rows = weight if tile.shape == weight.shape else weight[first : first + len(tile)]
        begin, numel = first * columns, tile.numel()
        if shard and stochastic:
            params, grads, shards = _parts(rows, tile, begin, shard)
        else:
            params, grads, shards = [rows], [tile], [begin, numel, numel]
        torch.ops.lomo_kernels.update_.default(
            params,
            grads,
            scalars,
            [] if sq_norm is None else [sq_norm] * len(params),
            rule,
            stochastic,
            seed,
            [parameter_id] * len(params),
            shards,
            [] if low is None else [low[first : first + len(tile)]],
        )


def _parts(
    weight: Tensor, tile: Tensor, begin: int, shard: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Parts of the tile's weight and gradient, and each part's three numbers of a shard.

    Nearly always the tile is one part: the shard's rows end where the weight's do, or beyond the tile. Otherwise a part
    is what a row of the tile has in a row of the shard.

    Args:
        begin: the tile's first element in the weight.
    """
    offset, length, stride = shard
    columns, numel = tile.shape[1], tile.numel()
    if begin % length == 0:
        return [weight], [tile], [offset + begin // length * stride, length, stride]
    if begin // length == (begin + numel - 1) // length:
        return [weight], [tile], [offset + begin // length * stride + begin % length, numel, numel]
    params, grads, shards = [], [], []
    for row in range(len(tile)):
        element = begin + row * columns
        column = 0
        while column < columns:
            count = min(columns - column, length - element % length)
            params.append(weight[row, column : column + count])
            grads.append(tile[row, column : column + count])
            shards += [offset + element // length * stride + element % length, count, count]
            element, column = element + count, column + count
    return params, grads, shards


IMPLEMENTATIONS = {
    function.__name__: function for function in (linear_sq_norm_, linear_update_, embedding_sq_norm_, embedding_update_)
}
