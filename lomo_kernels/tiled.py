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

#: A tile's memory: it should stay in the second-level cache, and be high enough for a matrix product to be fast. A GPU
#: has more of both, and needs some hundred tiles of its own for a product to use all of it.
TILE_BYTES = 2 * 1024 * 1024
GPU_TILE_BYTES = 16 * 1024 * 1024
#: Rows of a tile at least, however wide the weight is: below, matrix products are slow.
LEAST_ROWS = 64


class _Buffers(threading.local):
    """One buffer for each thread, as large as the largest tile so far. On GPUs torch keeps freed memory, and minds
    streams and graphs, as a buffer of our own would have to."""

    def __init__(self) -> None:
        self.of: dict[torch.device, Tensor] = {}

    def get(self, rows: int, columns: int, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return torch.empty(rows, columns, dtype=torch.float32, device=device)
        numel = rows * columns
        buffer = self.of.get(device)
        if buffer is None or buffer.numel() < numel:
            buffer = self.of[device] = torch.empty(numel, dtype=torch.float32, device=device)
        return buffer[:numel].view(rows, columns)


_buffers = _Buffers()


def tile_rows(rows: int, columns: int, size: int = TILE_BYTES) -> int:
    """Rows of one tile of `size` bytes of a gradient [rows, columns]."""
    return min(rows, max(LEAST_ROWS, size // (4 * max(columns, 1))))


def _tiles(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, buffer for the tile's rows) of each tile."""
    height = tile_rows(rows, columns, TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES)
    for first in range(0, rows, height):
        yield first, _buffers.get(min(height, rows - first), columns, device)


def _add_product(tile: Tensor, grad_output: Tensor, input: Tensor, *, fresh: bool) -> None:
    """``tile (fresh: =, else +=) grad_output.T @ input``, float32."""
    if _has_mixed_products(input):
        if fresh:
            torch.ops.aten.mm.dtype_out(grad_output.T, input, torch.float32, out=tile)
        else:  # addmm.dtype would add, but torch 2.8 to 2.11 refuse it a first summand of float32
            tile += torch.ops.aten.mm.dtype(grad_output.T, input, torch.float32)
        return
    if input.dtype is not torch.float32:
        grad_output, input = grad_output.float(), input.float()
    if fresh:
        torch.mm(grad_output.T, input, out=tile)
    else:
        tile.addmm_(grad_output.T, input)


def _has_mixed_products(input: Tensor) -> bool:
    """Whether torch multiplies 16-bit matrices with a float32 result: for NVIDIA's GPUs, and not where it was told to
    add float16 up in float16. For AMD's it may refuse (torch 2.9, ROCm 7.0): there the factors are converted."""
    if not input.is_cuda or input.dtype is torch.float32 or torch.version.hip:
        return False
    return not (input.dtype is torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation)


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in tensors]


def _linear_tiles(inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(first row, gradient of the tile's rows) of each tile. A tile is valid until the next is asked for."""
    xs, gys = _flat(inputs), _flat(grad_outputs)
    for first, tile in _tiles(gys[0].shape[1], xs[0].shape[1], xs[0].device):
        for use, (x, gy) in enumerate(zip(xs, gys, strict=True)):
            _add_product(tile, gy[:, first : first + len(tile)], x, fresh=use == 0)
        yield first, tile


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
