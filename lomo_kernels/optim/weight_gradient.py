"""The gradient of one weight, as what it is the sum of: factors from fused layers, and a tensor from any other use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..composite import gram, tiled
from ..composite.head import WeightRows
from ..layers import Factors

_Lists = tuple[list[Tensor], list[Tensor]]


class WeightGradient:
    """One weight's gradient.

    Args:
        pairs: at least one.
        grad: the gradient of what else the weight was used in.
    """

    __slots__ = ("by_tiles", "embedding", "grad", "heads", "linear", "paddings")

    def __init__(self, pairs: Iterable[Factors], grad: Tensor | None) -> None:
        self.grad = grad
        self.linear: _Lists = ([], [])  # inputs, grad_outputs
        self.embedding: _Lists = ([], [])  # indices, grad_outputs
        self.paddings: list[int] = []  # of the embedding's
        self.heads: list[Factors] = []
        for factors in pairs:
            input, grad_output, padding, _, head = factors
            if head is not None:
                self.heads.append(factors)
                continue
            if padding is not None:
                self.paddings.append(padding)
            inputs, grad_outputs = self.linear if padding is None else self.embedding
            inputs.append(input)
            grad_outputs.append(grad_output)
        #: No operator takes all that the gradient is the sum of.
        self.by_tiles = grad is not None or bool(self.heads) or bool(self.paddings and self.linear[0])

    def sq_norm_(self, slot: Tensor, weight: Tensor, inv_scale: Tensor | None) -> None:
        """Adds the sum of squares of the gradient times `inv_scale` to `slot`."""
        if self.by_tiles:
            if self.grad is None and not self.heads and len(self.linear[0]) == 1:
                estimate = gram.tied(*self.linear, *self.embedding, self.paddings)
                if estimate is not None and estimate.add_to(slot, inv_scale, weight.numel()):
                    return
            for _, tile in self.tiles(weight):
                torch.ops.lomo_kernels.sq_norm_.default([slot], [tile], inv_scale)
        elif not self.paddings:
            torch.ops.lomo_kernels.linear_sq_norm_.default(slot, *self.linear, inv_scale)
        else:
            torch.ops.lomo_kernels.embedding_sq_norm_.default(slot, *self.embedding, self.paddings, inv_scale)

    def update_(self, weight: Tensor, *arguments: Any) -> None:
        """Updates `weight`; `arguments` are those of the operator ``linear_update_`` from ``scalars`` on."""
        if self.by_tiles:
            tiled.update_by_tiles(weight, self.tiles(weight), *arguments)
        elif not self.paddings:
            torch.ops.lomo_kernels.linear_update_.default(weight, *self.linear, *arguments)
        else:
            torch.ops.lomo_kernels.embedding_update_.default(weight, *self.embedding, self.paddings, *arguments)

    def tiles(self, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, its gradient) of each tile; a tile is valid until the next is asked for."""
        tiles = (
            tiled.linear_tiles(*self.linear)
            if self.linear[0]
            else tiled.zero_tiles(weight.shape[0], weight.shape[1], weight.device)
        )
        heads = [WeightRows(factors.input, factors.grad_output, factors.head) for factors in self.heads if factors.head]
        for first, tile in tiles:
            for head in heads:
                head.add_to(tile, first)
            for index, grad_output, padding in zip(*self.embedding, self.paddings, strict=True):
                tiled.add_rows(tile, first, index, grad_output, padding)
            if self.grad is not None:
                tile.add_(self.grad[first : first + len(tile)])
            yield first, tile
