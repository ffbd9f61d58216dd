"""A gradient as the matrices that rules with row and column factors work on, or this rank's part of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .factored_rules import Factors, Sums, shape_of_matrices
from .managed_parameter import ManagedParameter
from .placement import Block


class Matrices:
    """Matrices below each other: a block of a parameter, or all of it.

    Args:
        grad, weight: [rows, columns], views if memory allows.
        shard: where their elements lie in the whole parameter, as the operators take it.
        block: which elements they are; None: all. At least two dimensions, as the others.
        whole: the shape of the whole parameter.
        low: the low parts of a weight that is split, as `weight`.
    """

    def __init__(
        self,
        grad: Tensor,
        weight: Tensor,
        shard: tuple[int, ...] | None,
        block: Block | None = None,
        whole: tuple[int, ...] = (),
        low: Tensor | None = None,
    ) -> None:
        self.grad, self.weight, self.low, self.shard = grad, weight, low, list(shard or ())
        self._block = block if block is not None and block.shape != whole else None
        if self._block is not None:
            within = [slice(first, first + length) for first, length in zip(*self._block, strict=True)]
            self._whole, self._rows, self._columns = whole, tuple(within[:-1]), (*within[:-2], within[-1])

    def add_sums(self, row_sums: Tensor, column_sums: Tensor, scalars: Tensor) -> None:
        """Adds the gradient's sums of squares to those of the whole gradient, as `Sums` has them."""
        if self._block is None:
            torch.ops.lomo_kernels.factor_sums_.default(row_sums, column_sums, self.grad, scalars)
            return
        *matrices, rows, columns = self._block.shape
        count = math.prod(matrices)
        of_rows, of_columns = row_sums.new_zeros(count * rows), row_sums.new_zeros(count, columns)
        torch.ops.lomo_kernels.factor_sums_.default(of_rows, of_columns, self.grad, scalars)
        self._of_rows(row_sums).add_(of_rows.view(*matrices, rows))
        self._of_columns(column_sums).add_(of_columns.view(*matrices, columns))

    def factors(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """Row factors and column factors, as the operators take them."""
        rows, columns = factors.rows, factors.columns
        if self._block is not None and rows.numel():
            rows = self._of_rows(rows).reshape(-1).contiguous()
        if self._block is not None and columns.numel():
            columns = self._of_columns(columns).reshape(-1, self._block.shape[-1]).contiguous()
        return rows, columns

    def update(self, factors: Factors, vector: Tensor, rule: int, stochastic: bool, seed: int, index: int) -> None:
        """Updates the weight; see `factored_update_`."""
        torch.ops.lomo_kernels.factored_update_.default(
            self.weight, self.grad, *self.factors(factors), vector, rule, stochastic, seed, index, self.shard, self.low
        )

    def _of_rows(self, of_whole: Tensor) -> Tensor:
        return of_whole.view(self._whole[:-1])[self._rows]

    def _of_columns(self, of_whole: Tensor) -> Tensor:
        return of_whole.view(*self._whole[:-2], self._whole[-1])[self._columns]


class FactoredPart:
    """A gradient of one parameter, or this rank's part of it, and the whole gradient's sums.

    Args:
        grad: of the shape of ``managed.local``; or as matrices.
    """

    def __init__(self, managed: ManagedParameter, grad: Tensor | Matrices) -> None:
        self.managed = managed
        shape = managed.shape
        matrices, rows, columns = shape_of_matrices(shape)
        self._matrices, self._columns = matrices, columns
        self.elements = matrices * rows * columns  # of the whole parameter
        #: Numbers of elements of the tensors that `add_sums` takes.
        self.lengths = [matrices * rows, matrices * columns, 1]
        self._local = managed.local.detach()
        self._blocks: list[Matrices] = []
        if isinstance(grad, Matrices):
            self._blocks = [grad]
        elif self.elements and managed.blocks is not None:
            self._blocks = list(self._cut(grad, managed.blocks, tuple(shape)))
        elif self.elements:
            of_all = matrices * rows, columns
            low = None if managed.low is None else managed.low.reshape(of_all)
            self._blocks = [Matrices(grad.reshape(of_all), self._local.reshape(of_all), managed.shard, low=low)]

    def _cut(self, grad: Tensor, blocks: Sequence[Block], whole: tuple[int, ...]) -> Iterable[Matrices]:
        added = max(2 - len(whole), 0)  # dimensions that make a vector a matrix of one row
        begin = 0
        for block in blocks:
            size, shard = math.prod(block.shape), self.managed.shard
            block = Block((0,) * added + block.start, (1,) * added + block.shape)
            piece, weight, low = grad, self._local, self.managed.low
            if size != grad.numel():  # a flat part, of several blocks or with padding
                assert shard is not None
                piece, weight = (tensor.view(-1)[begin : begin + size] for tensor in (grad, self._local))
                low = None if low is None else low.view(-1)[begin : begin + size]
                shard = shard[0] + begin, size, size
            matrix = size // block.shape[-1], block.shape[-1]
            low = None if low is None else low.reshape(matrix)
            yield Matrices(piece.reshape(matrix), weight.reshape(matrix), shard, block, (1,) * added + whole, low)
            begin += size

    def add_sums(self, row_sums: Tensor, column_sums: Tensor, param_squares: Tensor, *, of_param: bool) -> None:
        """Adds up the squares of the gradient, and of the parameter if `of_param`.

        Args:
            row_sums, column_sums, param_squares: zeros, float64, of `lengths`. They hold the sums. If other ranks have
                parts, their sums have to be added before `add_total`.
        """
        self.row_sums, self.param_squares = row_sums, param_squares
        self.column_sums = column_sums.view(self._matrices, self._columns)
        for block in self._blocks:
            block.add_sums(row_sums, self.column_sums, self.managed.scalars.vector)
            if of_param:
                # Not what the last update could have added up: ``.data`` may have changed the parameter since, unseen,
                # and a resumed run would add up in another order.
                torch.ops.lomo_kernels.sq_norm_.default([param_squares], [block.weight], None)

    def add_total(self, slot: Tensor | None, found_inf: Tensor) -> None:
        """Forms the total, adds it to `slot`, and notes in `found_inf` if it is not finite."""
        total, self.is_finite = torch.ops.lomo_kernels.factor_sums_total_.default(self.row_sums, slot, found_inf)
        self.sums = Sums(self.row_sums, self.column_sums, total)

    def add_sq_norm(self, factors: Factors, slot: Tensor) -> None:
        """Adds the sum of squares of the factored gradient to `slot`, float64 [1]."""
        for block in self._blocks:
            torch.ops.lomo_kernels.factored_sq_norm_.default(
                slot, block.grad, *block.factors(factors), self.managed.scalars.vector
            )

    def update(self, factors: Factors, vector: Tensor, *, rule: int, stochastic: bool, seed: int) -> None:
        """Updates the parameter. `vector`: the scalars of its update."""
        local, managed = self._local, self.managed
        for block in self._blocks:
            block.update(factors, vector, rule, stochastic, seed, managed.index)
        if len(self._blocks) == 1:
            _bring_back(self._blocks[0].weight, local)
            if managed.low is not None and self._blocks[0].low is not None:
                _bring_back(self._blocks[0].low, managed.low)
        torch.autograd.graph.increment_version(managed.local)
        if managed.shard is not None:
            torch.autograd.graph.increment_version(managed.param)


def _bring_back(matrix: Tensor, tensor: Tensor) -> None:
    """Copies a matrix back to the tensor that `reshape` made it of, if it is a copy: then the rows do not follow each
    other in memory."""
    if matrix.untyped_storage()._cdata != tensor.untyped_storage()._cdata:
        tensor.copy_(matrix.view(tensor.shape))
