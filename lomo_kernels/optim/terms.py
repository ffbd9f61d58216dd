"""The gradient of one weight, as what it is the sum of: factors from fused layers, and a tensor from any other use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..composite import gram, tiled
from ..layers import Pair


class Terms(NamedTuple):
    """One weight's gradient. At least one pair, and a tensor where the weight was also used in another way."""

    pairs: Sequence[Pair]
    grad: Tensor | None

    def sq_norm_(self, slot: Tensor, weight: Tensor, inv_scale: Tensor | None) -> None:
        """Adds the sum of squares of the gradient times `inv_scale` to `slot`."""
        linear, embedding = self._by_kind()
        if self.grad is None and not embedding:
            torch.ops.lomo_kernels.linear_sq_norm_.default(slot, *_factors(linear), inv_scale)
        elif self.grad is None and not linear:
            torch.ops.lomo_kernels.embedding_sq_norm_.default(
                slot, *_factors(embedding), _paddings(embedding), inv_scale
            )
        else:
            found = (
                gram.tied(linear[0].input, linear[0].grad_output, *_factors(embedding), _paddings(embedding))
                if self.grad is None and len(linear) == 1
                else None
            )
            if gram.add_to(slot, found, inv_scale, weight.numel()):
                return
            for _, tile in self._tiles(weight):
                torch.ops.lomo_kernels.sq_norm_.default([slot], [tile], inv_scale)

    def update_(self, weight: Tensor, *arguments: Any) -> None:
        """Updates `weight`; `arguments` are those of the operator ``linear_update_`` from ``scalars`` on."""
        linear, embedding = self._by_kind()
        if self.grad is None and not embedding:
            torch.ops.lomo_kernels.linear_update_.default(weight, *_factors(linear), *arguments)
        elif self.grad is None and not linear:
            torch.ops.lomo_kernels.embedding_update_.default(
                weight, *_factors(embedding), _paddings(embedding), *arguments
            )
        else:
            tiled.update_by_tiles(weight, self._tiles(weight), *arguments)

    def _by_kind(self) -> tuple[list[Pair], list[Pair]]:
        linear = [pair for pair in self.pairs if pair.of_linear]
        return linear, [pair for pair in self.pairs if not pair.of_linear]

    def _tiles(self, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, its gradient) of each tile; a tile is valid until the next is asked for."""
        linear, embedding = self._by_kind()
        tiles = (
            tiled.linear_tiles(*_factors(linear))
            if linear
            else tiled.zero_tiles(weight.shape[0], weight.shape[1], weight.device)
        )
        for first, tile in tiles:
            for pair, padding in zip(embedding, _paddings(embedding), strict=True):
                tiled.add_rows(tile, first, pair.input, pair.grad_output, padding)
            if self.grad is not None:
                tile.add_(self.grad[first : first + len(tile)])
            yield first, tile


def _factors(pairs: Sequence[Pair]) -> tuple[list[Tensor], list[Tensor]]:
    return [pair.input for pair in pairs], [pair.grad_output for pair in pairs]


def _paddings(pairs: Sequence[Pair]) -> list[int]:
    return [pair.padding_idx for pair in pairs if pair.padding_idx is not None]
