"""Gradients of fused layers for the rules with row and column factors (`factored_rules`), which need a gradient's sums.

- A rule whose row factors depend on their own rows only ("rows") takes the gradient tile by tile, some rows at a time.
  The gradient never exists: `update_by_row`.
- An embedding's gradient is its rows that tokens looked up: `LookedUpRows`. If they take more memory than the gradient,
  it is formed.
- Otherwise the gradient is formed when the last layer has handed over its factors (`formed`), and freed at once.

Formed again for each of a rule's reads, tile by tile, AdaLomo's gradient takes two to three times as long. The sums
could come from inner products of tokens. This is faster up to 16 tokens, or 64 if the weight is large:
`docs/benchmarks.md` has both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..composite import tiled
from ..layers import Factors as LayerFactors
from ..layers import gradient_of
from ..ops.scalars import CLIPPING, POSITIONS, without_clipping
from .factored_part import Matrices
from .factored_rules import Factors, Sums
from .managed_parameter import ManagedParameter
from .rule_state import RuleState


def update_by_row(
    managed: ManagedParameter,
    tiles: Iterable[tuple[int, Tensor]],
    rule_state: RuleState,
    add_norm: Callable[[Tensor], None] | None,
    draws: tuple[Any, ...],
) -> None:
    """Updates some rows of a weight after the other. A row whose gradient is not finite stays as it is; the others
    change.

    Args:
        tiles: (first row, gradient of some rows) of each tile, which is used up when the next is asked for.
        add_norm: adds the norm of some rows to the parameter's; None: it is known.
        draws: arguments of `factored_update_` after ``scalars`` and before ``shard``.
    """
    weight, scalars = managed.param.detach(), managed.scalars.vector
    vector, of_step = rule_state.scalars.vector(managed), rule_state.of_step(managed.device)
    of_columns = torch.zeros(1, weight.shape[1], dtype=torch.float64, device=weight.device)  # not used
    for first, tile in tiles:
        here = slice(first, first + len(tile))
        of_rows = torch.zeros(len(tile), dtype=torch.float64, device=weight.device)
        torch.ops.lomo_kernels.factor_sums_.default(of_rows, of_columns, tile, scalars)
        total = of_rows.sum()
        if add_norm is not None and managed.scalars.clamps:
            add_norm(tile)
        elif add_norm is not None:
            managed.slot.add_(total)
        factors = rule_state.rule.factors(managed, Sums(of_rows, of_columns, total), (), of_step)
        low = None if managed.low is None else managed.low[here]
        shard = [first * weight.shape[1], tile.numel(), tile.numel()]
        torch.ops.lomo_kernels.factored_update_.default(
            weight[here], tile, factors.rows, factors.columns, vector, *draws, shard, low
        )
    torch.autograd.graph.increment_version(managed.param)


def formed(uses: Sequence[LayerFactors], grad: Tensor | None, weight: Tensor) -> Tensor:
    """The gradient of `weight`, in its dtype: the sum of what its uses in layers give, and of `grad`.

    It takes no more memory than autograd: two tensors of the weight's size if there are several uses.
    """
    linear = [factors for factors in uses if factors.padding_idx is None]
    embedding = [factors for factors in uses if factors.padding_idx is not None]
    if linear and LookedUpRows.suit(embedding, weight):
        total = gradient_of(linear, weight)
        if embedding:
            rows = LookedUpRows(embedding, weight)
            total.index_add_(0, rows.index, rows.grad.to(total.dtype))
    else:
        total = gradient_of(uses, weight)
    return total if grad is None else total.add_(grad)


class LookedUpRows(Matrices):
    """The rows of an embedding's gradient that tokens looked up, each once, in float32: [tokens, columns].

    Nothing is read by the host, so there are as many rows as tokens. Rows of zeros fill up the others.

    Args:
        uses: of embeddings.
        weight: [rows, columns], all of it.
        low: of a weight that is split, the same.
    """

    def __init__(self, uses: Sequence[LayerFactors], weight: Tensor, low: Tensor | None = None) -> None:
        rows_of_uses = tiled.rows_of([use.input for use in uses], [use.padding_idx or 0 for use in uses])
        row = torch.cat(rows_of_uses)
        number, tokens = tiled.numbered(row), len(row)
        numbers = number.split([len(rows) for rows in rows_of_uses])
        total = tiled.sum_tokens(tokens + 1, numbers, [use.grad_output for use in uses])[:-1]
        super().__init__(total, weight, None, low=low)
        #: Each row's index: int64 [tokens]. A row of zeros has some index.
        self.index = row.new_zeros(tokens + 1).scatter_(0, number, row.clamp(min=0))[:-1]

    @staticmethod
    def suit(uses: Sequence[LayerFactors], weight: Tensor) -> bool:
        """Whether all uses are of embeddings, and their rows, and a float32 copy of the tokens that the rows are summed
        from, are no larger than the gradient."""
        tokens = sum(use.input.numel() for use in uses)
        return all(use.padding_idx is not None for use in uses) and 8 * tokens <= weight.element_size() * len(weight)

    def add_sums(self, row_sums: Tensor, column_sums: Tensor, scalars: Tensor) -> None:
        of_rows = row_sums.new_zeros(len(self.grad))
        torch.ops.lomo_kernels.factor_sums_.default(of_rows, column_sums, self.grad, scalars)
        row_sums.index_add_(0, self.index, of_rows)

    def factors(self, factors: Factors) -> tuple[Tensor, Tensor]:
        return factors.rows[self.index] if factors.rows.numel() else factors.rows, factors.columns

    def update(self, factors: Factors, vector: Tensor, rule: int, stochastic: bool, seed: int, index: int) -> None:
        """Updates the weight. The rows are used up.

        Elements that are not finite are not looked for: `vector` says then that the parameter is not updated.
        """
        numbers = vector.float()
        inv_scale, limit, coef = (numbers[POSITIONS[name]] for name in CLIPPING)
        f = self.grad.mul_(inv_scale).clamp_(-limit, limit).mul_(coef)
        of_rows, of_columns = self.factors(factors)
        if of_rows.numel():
            f.mul_(of_rows[:, None])
        if of_columns.numel():
            f.mul_(of_columns)
        torch.ops.lomo_kernels.embedding_update_.default(
            self.weight,
            [self.index],
            [f],
            [-1],
            without_clipping(vector),
            None,
            rule,
            stochastic,
            seed,
            index,
            [],
            self.low,
        )
