"""The norm of a gradient that does not exist, from inner products of tokens (Gram matrices), for CPU tensors.

``||gy.T @ x||^2 = sum_ij (gy_i . gy_j) (x_i . x_j)``: for few tokens cheaper than the product itself.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..ops._arguments import library

# csrc/cpu/gram.cpp. input [T, in], grad_output [T, out], of one dtype; rows contiguous, at any distance -> float64 [2]:
# ||grad_output.T @ input||^2, and about the standard deviation of that number's error.
library.define("_gram(Tensor input, Tensor grad_output) -> Tensor")

#: Inner products of tokens are taken where they need at most this part of the gradient's multiplications. They run at
#: the same speed, and are worth nothing where the error turns out too large.
GRAM_COST = 0.75
#: On GPUs: how many times cheaper they must be. They come in few programs, each with a long way to go.
GRAM_MARGIN = 4
#: Four standard deviations of the sum are then 2e-5 of it, of the norm 1e-5.
GRAM_ERROR = 5e-6
#: Sums of squares of gradients of which no element overflows in float32, and mean squares of those that lose nothing to
#: underflow: for others, tiles find what `sq_norm_` would.
LARGEST, SMALLEST = 1e76, 1e-60

# Tokens of a tied head whose inner products are taken at a time.
_TOKENS = 256
# Error of a float32 inner product, as a part of the vectors' lengths, and of a sum of squares.
_ERROR = 2.0**-22


@functools.cache
def compiled() -> bool:
    """Whether the compiled library serves CPU tensors; `LOMO_KERNELS_BACKEND` may have chosen another backend."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("lomo_kernels::_gram", "CPU"))


def flat(tensor: Tensor, *, contiguous_rows: bool = False) -> Tensor:
    """The tensor as a matrix [tokens, features]. reshape(-1, 0) would not know how many tokens there are."""
    matrix = tensor.detach()
    if matrix.dim() != 2:
        matrix = matrix[None].flatten(0, -2)
    return matrix.contiguous() if contiguous_rows and matrix.stride(1) != 1 else matrix


class Estimate(NamedTuple):
    """A gradient's sum of squares from inner products of tokens, and about the standard deviation of its error.

    Inner products cancel where tokens have much in common: the error is then large beside the sum.
    """

    total: float
    error: float

    def add_to(self, slot: Tensor, inv_scale: Tensor | None, elements: int) -> bool:
        """Adds to `slot` what `sq_norm_` would add for this gradient, of so many elements, times `inv_scale`.

        Returns:
            Whether it did. The estimate may not be good enough; then tiles have to find the norm.
        """
        if not (0 < self.total <= LARGEST and self.error <= GRAM_ERROR * self.total):
            return False
        scaled = self.total * (1.0 if inv_scale is None else inv_scale.float().item()) ** 2
        if not SMALLEST * elements <= scaled <= LARGEST:
            return False
        slot.detach().add_(scaled)
        return True


def is_cheaper(tokens: int, rows: int, columns: int) -> bool:
    """Whether a CPU takes inner products of so many tokens for a gradient [rows, columns]."""
    return tokens * (rows + columns) <= GRAM_COST * 2 * rows * columns


def is_cheaper_on_gpu(tokens: int, rows: int, columns: int) -> bool:
    """The same for a GPU, whose Triton kernels take them."""
    return GRAM_MARGIN * tokens * (rows + columns) < 2 * rows * columns


def estimate(input: Tensor, grad_output: Tensor) -> Estimate | None:
    """Of ``grad_output.T @ input``, [..., features]; None where product tiles are cheaper, there is no kernel,
    or nothing in the factors to read (a simulation)."""
    if not (input.is_cpu and compiled()) or isinstance(input, FakeTensor):
        return None
    x, gy = flat(input, contiguous_rows=True), flat(grad_output, contiguous_rows=True)
    if not is_cheaper(x.shape[0], gy.shape[1], x.shape[1]):
        return None
    return Estimate(*torch.ops.lomo_kernels._gram.default(x, gy).tolist())


def tied(
    inputs: list[Tensor],
    grad_outputs: list[Tensor],
    indices: list[Tensor],
    rows: list[Tensor],
    paddings: list[int],
) -> Estimate | None:
    """Of the gradient of a head (one input and one grad_output) tied to an embedding (indices, grad_outputs and
    padding_idx of each use): the squares of both parts, and twice their product, which is
    ``sum_ij grad_output[i, index_j] (input_i . row_j)`` over the head's tokens i and the embedding's j. None as
    `estimate`."""
    (input,), (grad_output,) = inputs, grad_outputs
    own = estimate(input, grad_output)
    if own is None:
        return None
    squares = torch.zeros(1, dtype=torch.float64, device="cpu")
    product, variance = 0.0, 0.0
    x, gy = flat(input), flat(grad_output)
    for indices_of_use, rows_of_use, padding in zip(indices, rows, paddings, strict=True):
        index, all_rows = indices_of_use.reshape(-1), flat(rows_of_use)
        for some in range(0, len(index), _TOKENS):
            here, row = index[some : some + _TOKENS], all_rows[some : some + _TOKENS].float()
            row = row * here.ne(padding)[:, None]
            for few in range(0, len(x), _TOKENS):
                token, weight = x[few : few + _TOKENS].float(), gy[few : few + _TOKENS].index_select(1, here).double()
                with torch.autocast("cpu", enabled=False):  # in force where backward is called inside autocast
                    product += ((token @ row.T).double() * weight).sum().item()
                lengths = torch.outer(token.double().square().sum(1), row.double().square().sum(1))
                variance += (lengths * weight.square()).sum().item()
    torch.ops.lomo_kernels.embedding_sq_norm_.default(squares, indices, rows, paddings, None)
    error = own.error + _ERROR * (squares.item() + 2 * variance**0.5)
    return Estimate(own.total + squares.item() + 2 * product, error)
