"""The gradient of one weight, as what it is the sum of: factors from fused layers, and a tensor from any other use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..composite import gram, tiled
from ..layers import Factors

_Lists = tuple[list[Tensor], list[Tensor]]


class WeightGradient:
    """One weight's gradient.

    Args:
        pairs: at least one.
        grad: the gradient of what else the weight was used in.
    """

    __slots__ = ("embedding", "grad", "linear", "paddings")

    def __init__(self, pairs: Iterable[Factors], grad: Tensor | None) -> None:
        self.grad = grad
        self.linear: _Lists = ([], [])  # inputs, grad_outputs
        self.embedding: _Lists = ([], [])  # indices, grad_outputs
        self.paddings: list[int] = []  # of the embedding's
        for input, grad_output, padding, _ in pairs:
            if padding is not None:
                self.paddings.append(padding)
            inputs, grad_outputs = self.linear if padding is None else self.embedding
            inputs.append(input)
            grad_outputs.append(grad_output)

    def sq_norm_(self, slot: Tensor, weight: Tensor, inv_scale: Tensor | None) -> None:
        """Adds the sum of squares of the gradient times `inv_scale` to `slot`."""
        if self.grad is None and not self.paddings:
            torch.ops.lomo_kernels.linear_sq_norm_.default(slot, *self.linear, inv_scale)
        elif self.grad is None and not self.linear[0]:
            torch.ops.lomo_kernels.embedding_sq_norm_.default(slot, *self.embedding, self.paddings, inv_scale)
        else:
            if self.grad is None and len(self.linear[0]) == 1:
                estimate = gram.tied(*self.linear, *self.embedding, self.paddings)
                if estimate is not None and estimate.add_to(slot, inv_scale, weight.numel()):
                    return
            for _, tile in self.tiles(weight):
                torch.ops.lomo_kernels.sq_norm_.default([slot], [tile], inv_scale)

    def update_(self, weight: Tensor, *arguments: Any) -> None:
        """Updates `weight`; `arguments` are those of the operator ``linear_update_`` from ``scalars`` on."""
        if self.grad is None and not self.paddings:
            torch.ops.lomo_kernels.linear_update_.default(weight, *self.linear, *arguments)
        elif self.grad is None and not self.linear[0]:
            torch.ops.lomo_kernels.embedding_update_.default(weight, *self.embedding, self.paddings, *arguments)
        else:
            tiled.update_by_tiles(weight, self.tiles(weight), *arguments)

    def tiles(self, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, its gradient) of each tile; a tile is valid until the next is asked for."""
        tiles = (
            tiled.linear_tiles(*self.linear)
            if self.linear[0]
            else tiled.zero_tiles(weight.shape[0], weight.shape[1], weight.device)
        )
        for first, tile in tiles:
            for index, grad_output, padding in zip(*self.embedding, self.paddings, strict=True):
                tiled.add_rows(tile, first, index, grad_output, padding)
            if self.grad is not None:
                tile.add_(self.grad[first : first + len(tile)])
            yield first, tile
