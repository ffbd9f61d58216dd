"""The gradient of one weight, as what it is the sum of: factors from fused layers, and a tensor from any other use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tiled
from ..layers import Pair

# Tokens whose inner products are taken at a time.
_TOKENS = 256
# Error of a float32 inner product, as a part of the vectors' lengths, and of a sum of squares.
_ERROR = 2.0**-22


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
            found = _tied(linear, embedding) if self.grad is None and len(linear) == 1 else None
            total = None if found is None else found.accepted(inv_scale, weight.numel())
            if total is not None:
                slot += total
                return
            for _, tile in self._tiles(weight):
                torch.ops.lomo_kernels.sq_norm_.default(slot, tile, inv_scale)

    def sgd_(self, weight: Tensor, *arguments: Any) -> None:
        """Updates `weight`; `arguments` are those of the operator ``linear_sgd_`` from ``lr`` on."""
        linear, embedding = self._by_kind()
        if self.grad is None and not embedding:
            torch.ops.lomo_kernels.linear_sgd_.default(weight, *_factors(linear), *arguments)
        elif self.grad is None and not linear:
            torch.ops.lomo_kernels.embedding_sgd_.default(
                weight, *_factors(embedding), _paddings(embedding), *arguments
            )
        else:
            tiled.update(weight, self._tiles(weight), *arguments)

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


def _tied(linear: Sequence[Pair], embedding: Sequence[Pair]) -> tiled.Estimate | None:
    """Of the gradient of a head tied to an embedding: the squares of both parts, and twice their product, which is
    ``sum_ij grad_output[i, index_j] (input_i . row_j)`` over the head's tokens i and the embedding's j."""
    (head,) = linear
    own = tiled.estimate(head.input, head.grad_output)
    if own is None:
        return None
    squares = torch.zeros(1, dtype=torch.float64)
    torch.ops.lomo_kernels.embedding_sq_norm_.default(squares, *_factors(embedding), _paddings(embedding), None)
    x, gy = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (head.input, head.grad_output))
    product, variance = 0.0, 0.0
    for pair, padding in zip(embedding, _paddings(embedding), strict=True):
        index, rows = pair.input.reshape(-1), pair.grad_output.reshape(-1, x.shape[1])
        for some in range(0, len(index), _TOKENS):
            here, row = index[some : some + _TOKENS], rows[some : some + _TOKENS].float()
            row = row * (here != padding)[:, None]
            for few in range(0, len(x), _TOKENS):
                token, weight = x[few : few + _TOKENS].float(), gy[few : few + _TOKENS].index_select(1, here).double()
                product += ((token @ row.T).double() * weight).sum().item()
                lengths = torch.outer(token.double().square().sum(1), row.double().square().sum(1))
                variance += (lengths * weight.square()).sum().item()
    error = own.error + _ERROR * (squares.item() + 2 * variance**0.5)
    return tiled.Estimate(own.total + squares.item() + 2 * product, error)


def _factors(pairs: Sequence[Pair]) -> tuple[list[Tensor], list[Tensor]]:
    return [pair.input for pair in pairs], [pair.grad_output for pair in pairs]


def _paddings(pairs: Sequence[Pair]) -> list[int]:
    return [-1 if pair.padding_idx is None else pair.padding_idx for pair in pairs]
