"""The layers' operators by tiles: a matrix product into a small float32 buffer, then `sgd_` or `sq_norm_` on the tile.

For CPU tensors, and for CUDA tensors where Triton is not there. A tile is some rows of the weight's gradient; it is the
only part of the gradient that exists, and its memory is used again for the next.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops._arguments import library

# The two kernels under the layers' operators, for CPU tensors (csrc/cpu/). Matrices; rows contiguous, at any distance.
#
# _gram: input [T, in], grad_output [T, out], the same dtype -> float64 [2]: ||grad_output.T @ input||^2 from the inner
# products of tokens, and about the standard deviation of that number's error.
#
# _product_: out float32 [rows, in], contiguous, = or (accumulate) += grad_output.T @ input, from grad_output [T, rows]
# and input [T, in], both bfloat16 or float16: torch has no such product with a float32 result on CPUs. Sums are
# float32, in an order that does not depend on the number of threads. Where the processor has bfloat16 instructions
# (AVX512_BF16) they are used for bfloat16, and they flush: operands, products and sums below 2^-126 count as zero, so
# an element of the gradient may be off by T * 2^-126 in all. A weight notices only where it is itself that small, or
# where inv_scale is large; a norm does not. On one thread of Zen 4 the product runs at oneDNN's bfloat16 speed, which
# is why there is no other way by `weight.addmm_`; on processors with AMX that would be the faster one.
library.define("_gram(Tensor input, Tensor grad_output) -> Tensor")
library.define("_product_(Tensor(a!) out, Tensor grad_output, Tensor input, bool accumulate) -> ()")

#: A tile's memory: large enough for products to be fast, small enough for the update to find it in a cache. Update of a
#: bfloat16 weight 1024 x 1024 for 256 tokens, as a multiple of `weight.addmm_`, one thread of Zen 4: 1.27 with 512 KiB,
#: 1.21 with 1 MiB, 1.10 with 2 MiB, 1.14 with 4 MiB; float32: 1.19, 1.12, 1.14, 1.13.
TILE_BYTES = 2 * 1024 * 1024
#: Rows of a tile at least, however wide the weight is: one block of `_product_`. bfloat16 4096 x 4096, 2048 tokens:
#: 1.21 with 128 rows, 1.08 with 256.
LEAST_ROWS = 256

#: Inner products of tokens are taken where they need at most this part of the gradient's multiplications. They run at
#: the same speed, and are worth nothing where the error turns out too large.
GRAM_COST = 0.75
#: Four standard deviations of the sum are then 2e-5 of it, of the norm 1e-5.
GRAM_ERROR = 5e-6
#: Sums of squares of gradients of which no element overflows in float32, and mean squares of those that lose nothing to
#: underflow: for others, tiles find what `sq_norm_` would.
LARGEST, SMALLEST = 1e76, 1e-60


class _Buffers(threading.local):
    """One buffer for each device and thread, as large as the largest tile so far."""

    def __init__(self) -> None:
        self.of: dict[torch.device, Tensor] = {}

    def get(self, rows: int, columns: int, device: torch.device) -> Tensor:
        numel = rows * columns
        buffer = self.of.get(device)
        if buffer is None or buffer.numel() < numel:
            buffer = self.of[device] = torch.empty(numel, dtype=torch.float32, device=device)
        return buffer[:numel].view(rows, columns)


_buffers = _Buffers()


def tile_rows(rows: int, columns: int) -> int:
    """Rows of one tile of a gradient [rows, columns]."""
    return min(rows, max(LEAST_ROWS, TILE_BYTES // (4 * max(columns, 1))))


def _tiles(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, buffer for the tile's rows) of each tile; none where the gradient has no element."""
    if not rows * columns:
        return
    height = tile_rows(rows, columns)
    for first in range(0, rows, height):
        yield first, _buffers.get(min(height, rows - first), columns, device)


def _has_kernels(tensor: Tensor) -> bool:
    """Whether `_product_` serves it. float32 is torch's."""
    return tensor.is_cpu and tensor.dtype is not torch.float32


def _add_product(tile: Tensor, grad_output: Tensor, input: Tensor, *, fresh: bool) -> None:
    """``tile (fresh: =, else +=) grad_output.T @ input``, float32."""
    if _has_kernels(input):
        torch.ops.lomo_kernels._product_.default(tile, grad_output, input, not fresh)
        return
    if input.dtype is not torch.float32:
        grad_output, input = grad_output.float(), input.float()
    if fresh:
        torch.mm(grad_output.T, input, out=tile)
    else:
        tile.addmm_(grad_output.T, input)


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each as a matrix [tokens, features]. reshape(-1, 0) would not know how many tokens there are."""
    return [tensor.detach()[None].flatten(0, -2) for tensor in tensors]


def _with_contiguous_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _linear_tiles(inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(first row, gradient of the tile's rows) of each tile. A tile is valid until the next is asked for."""
    xs, gys = _flat(inputs), _flat(grad_outputs)
    if any(map(_has_kernels, xs)):
        xs, gys = [_with_contiguous_rows(x) for x in xs], [_with_contiguous_rows(gy) for gy in gys]
    for first, tile in _tiles(gys[0].shape[1], xs[0].shape[1], xs[0].device):
        for use, (x, gy) in enumerate(zip(xs, gys, strict=True)):
            _add_product(tile, gy[:, first : first + len(tile)], x, fresh=use == 0)
        yield first, tile


def _sq_norm_by_gram(input: Tensor, grad_output: Tensor, inv_scale: Tensor | None) -> float | None:
    """What `linear_sq_norm_` adds, from inner products of tokens; None where tiles are cheaper or more exact.

    Inner products cancel where tokens have much in common: the error is then large beside the sum.
    """
    tokens, rows, columns = input.shape[0], grad_output.shape[1], input.shape[1]
    if tokens * (rows + columns) > GRAM_COST * 2 * rows * columns:
        return None
    input, grad_output = _with_contiguous_rows(input), _with_contiguous_rows(grad_output)
    total, error = torch.ops.lomo_kernels._gram.default(input, grad_output).tolist()
    if not (0 < total <= LARGEST and error <= GRAM_ERROR * total):
        return None
    scaled = total * (1.0 if inv_scale is None else inv_scale.float().item()) ** 2
    return scaled if SMALLEST * rows * columns <= scaled <= LARGEST else None


def _embedding_tiles(
    rows: int, indices: Sequence[Tensor], grad_outputs: Sequence[Tensor], padding_idx: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    gys = _flat(grad_outputs)
    for first, tile in _tiles(rows, gys[0].shape[1], gys[0].device):
        tile.zero_()
        for index, gy, padding in zip(indices, gys, padding_idx, strict=True):
            index = index.reshape(-1)
            here = (index >= first) & (index < first + len(tile)) & (index != padding)
            tile.index_put_(((index - first)[here].long(),), gy[here].float(), accumulate=True)
        yield first, tile


def linear_sq_norm_(slot: Tensor, inputs: list[Tensor], grad_outputs: list[Tensor], inv_scale: Tensor | None) -> None:
    if len(inputs) == 1 and inputs[0].is_cpu:
        [x], [gy] = _flat(inputs), _flat(grad_outputs)
        total = _sq_norm_by_gram(x, gy, inv_scale)
        if total is not None:
            slot += total
            return
    for _, tile in _linear_tiles(inputs, grad_outputs):
        torch.ops.lomo_kernels.sq_norm_.default(slot, tile, inv_scale)


def linear_sgd_(weight: Tensor, inputs: list[Tensor], grad_outputs: list[Tensor], *rest: Any) -> None:
    _update(weight, _linear_tiles(inputs, grad_outputs), *rest)


def embedding_sq_norm_(
    slot: Tensor,
    indices: list[Tensor],
    grad_outputs: list[Tensor],
    padding_idx: list[int],
    inv_scale: Tensor | None,
) -> None:
    rows = max((int(index.max()) + 1 for index in indices if index.numel()), default=0)
    for _, tile in _embedding_tiles(rows, indices, grad_outputs, padding_idx):
        torch.ops.lomo_kernels.sq_norm_.default(slot, tile, inv_scale)


def embedding_sgd_(
    weight: Tensor, indices: list[Tensor], grad_outputs: list[Tensor], padding_idx: list[int], *rest: Any
) -> None:
    _update(weight, _embedding_tiles(weight.shape[0], indices, grad_outputs, padding_idx), *rest)


def _update(
    weight: Tensor,
    tiles: Iterator[tuple[int, Tensor]],
    lr: Tensor,
    weight_decay: Tensor | None,
    inv_scale: Tensor | None,
    clip_value: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    sq_norm: Tensor | None,
    stochastic: bool,
    seed: int,
    parameter_id: int,
    step: Tensor | None,
) -> None:
    """`sgd_` on `weight`, tile by tile."""
    rows, columns = weight.shape
    weight = weight.detach()
    scalars = (lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, sq_norm, stochastic, seed, parameter_id)
    for first, tile in tiles:
        whole = rows * columns  # one row of the shard: the tile's elements follow one another in the weight
        shard = [first * columns, whole, whole]
        torch.ops.lomo_kernels.sgd_.default(weight[first : first + len(tile)], tile, *scalars, step, shard)


IMPLEMENTATIONS = {
    function.__name__: function for function in (linear_sq_norm_, linear_sgd_, embedding_sq_norm_, embedding_sgd_)
}
