"""The last layer of a language model and its cross entropy, by blocks of logits: the logits never exist whole, nor does
the gradient of the layer's weight.

A block is the logits of some classes for some tokens, in float32. Blocks go through the classes first: then each part
of the weight is read once in a sweep, and its gradient is complete before the next part's. Forward sweeps once for the
logarithm of each token's sum of exponentials (`forward_sums`). Backward makes the logits again, once for the input's
gradient (`input_gradient`), and again for the weight's, when that is asked for (`WeightRows`). These are five products
of the weight's size in place of three; a norm that comes before the update takes four more, in place of two.

The gradient of token t's logit of class c is ``a_t softmax(logits_t)_c - b_t [c is t's target] - e_t class_weight_c``,
see `Coefficients`. Of 16-bit inputs it is rounded to their dtype before a product, as autograd has it, but logits are
not rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import tiled
from .gram import flat

#: Tokens of a block at least, if there are as many: fewer make slow products.
LEAST_TOKENS = 256
#: Tokens by which the classes of a block are counted: with more, a block has fewer tokens than there are.
_TOKENS = 1024


class Head(NamedTuple):
    """What logits and their loss are made from, beside the layer's input."""

    weight: Tensor  # [classes, features], 16-bit or float32; read again when its gradient is asked for
    version: int  # of the weight
    bias: Tensor | None  # float32 [classes]; a copy, because the bias may be updated first
    target: Tensor  # int64 [tokens], below `classes` also if a token is ignored
    class_weight: Tensor | None  # float32 [classes], if labels are smoothed

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that nobody else keeps."""
        return tuple(tensor for tensor in (self.bias, self.target, self.class_weight) if tensor is not None)


class Coefficients(NamedTuple):
    """The rows of a float32 [4, tokens], from which the gradient of each logit is made."""

    lse: Tensor  # the logarithm of the sum of exponentials of a token's logits
    a: Tensor  # of the softmax
    b: Tensor  # of the target
    e: Tensor  # of all classes, from label smoothing; zero without


scratch = tiled.new_buffer()


class _Operands:
    """An input [tokens, features] and a head as products need them.

    `tiled.add_product` multiplies ``left.T @ right``, and on a CPU wants rows of 16-bit matrices contiguous.
    """

    def __init__(self, input: Tensor, head: Head) -> None:
        self.input = tiled.operand(flat(input))
        self.input_t = tiled.operand(self.input.T)
        self.head = head
        tokens, features = self.input.shape
        device = input.device.type
        #: Classes, and tokens, of a block.
        self.rows = tiled.tile_rows(len(head.weight), max(features, min(tokens, _TOKENS)), device)
        self.tokens = max(1, min(tokens, max(LEAST_TOKENS, tiled.tile_bytes(device) // (4 * self.rows))))

    def classes(self, first: int, last: int) -> Iterator[slice]:
        """Of each block, from `first` to before `last`."""
        return (slice(begin, min(begin + self.rows, last)) for begin in range(first, last, self.rows))

    def chunks(self, most: int | None = None) -> Iterator[slice]:
        """The tokens of each block."""
        count, step = len(self.input), self.tokens if most is None else min(most, self.tokens)
        return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))

    def weight(self, classes: slice) -> tuple[Tensor, Tensor]:
        """Some rows of the weight in the input's dtype, and their transpose."""
        rows = tiled.operand(self.head.weight.detach()[classes].to(self.input.dtype))
        return rows, tiled.operand(rows.T)

    def logits(self, weight_t: Tensor, classes: slice, tokens: slice, *, by_class: bool = False) -> Tensor:
        """float32 [tokens, classes], valid until the next is asked for. `by_class`: it is the transpose of a contiguous
        matrix."""
        x = self.input_t[:, tokens]
        left, right = (weight_t, x) if by_class else (x, weight_t)
        height, width = left.shape[1], right.shape[1]
        block = scratch.get(height * width, x.device).view(height, width)
        tiled.add_product(block, left, right, fresh=True)
        block = block.T if by_class else block
        return block if self.head.bias is None else block.add_(self.head.bias[classes])

    def gradient(self, logits: Tensor, coefficients: Coefficients, classes: slice, tokens: slice) -> Tensor:
        """The gradient of a block of logits, in the input's dtype. The logits are used up."""
        lse, a, b, e = (row[tokens] for row in coefficients)
        block = logits.sub_(lse[:, None]).exp_().mul_(a[:, None])
        if self.head.class_weight is not None:
            block.addr_(e, self.head.class_weight[classes], alpha=-1)
        inside, column = self._targets(classes, tokens)
        block.scatter_add_(1, column[:, None], torch.where(inside, -b, 0.0)[:, None])
        return block.to(self.input.dtype)

    def _targets(self, classes: slice, tokens: slice) -> tuple[Tensor, Tensor]:
        """Whether each token's target is among the classes, and at which of them; some number if it is not."""
        target = self.head.target[tokens]
        inside = (target >= classes.start) & (target < classes.stop)
        return inside, (target - classes.start).clamp_(0, classes.stop - classes.start - 1)

    def picked(self, logits: Tensor, classes: slice, tokens: slice) -> Tensor:
        """The targets' logits, or zero if the target is not among the classes: float32 [tokens]."""
        inside, column = self._targets(classes, tokens)
        return torch.where(inside, logits.gather(1, column[:, None])[:, 0], 0.0)


def forward_sums(input: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each token: the logarithm of the sum of exponentials, the target's logit, and, if labels are smoothed, the sum
    of all logits times their class weights. float64 [tokens] each.

    Args:
        input: [..., features], of the dtype in which to multiply.
    """
    operands = _Operands(input, head)
    tokens = len(operands.input)
    # Not minus infinity: a bias of minus infinity (of tokens that nobody may write) may give a whole block such logits.
    largest = input.new_full((tokens,), torch.finfo(torch.float32).min, dtype=torch.float64)
    total, target_logit = (input.new_zeros(tokens, dtype=torch.float64) for _ in range(2))
    smooth = None if head.class_weight is None else torch.zeros_like(total)
    for classes in operands.classes(0, len(head.weight)):
        _, weight_t = operands.weight(classes)
        for some in operands.chunks():
            logits = operands.logits(weight_t, classes, some)
            target_logit[some] += operands.picked(logits, classes, some)
            if smooth is not None and head.class_weight is not None:
                smooth[some] += logits @ head.class_weight[classes]
            before = largest[some]
            after = torch.maximum(before, logits.amax(1))
            exponentials = logits.sub_(after.float()[:, None]).exp_().sum(1)
            total[some] = total[some] * (before - after).exp() + exponentials
            largest[some] = after
    return total.log_().add_(largest), target_logit, smooth


def input_gradient(
    input: Tensor, coefficients: Tensor, head: Head, *, of_input: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input, float32 [tokens, features], and of the bias, float32 [classes]; None if it is not
    asked for."""
    operands, numbers = _Operands(input, head), Coefficients(*coefficients)
    grad_input = torch.empty_like(operands.input, dtype=torch.float32) if of_input else None
    grad_bias = coefficients.new_zeros(len(head.weight)) if of_bias else None
    # A GPU adds a product to a matrix by way of another one.
    most = None if input.is_cpu else max(LEAST_TOKENS, tiled.tile_bytes(input.device.type) // (4 * input.shape[-1]))
    for classes in operands.classes(0, len(head.weight)):
        weight, weight_t = operands.weight(classes)
        for some in operands.chunks(most):
            logits = operands.logits(weight_t, classes, some, by_class=True)
            grad = operands.gradient(logits, numbers, classes, some)
            if grad_bias is not None:
                grad_bias[classes] += grad.sum(0, dtype=torch.float32)
            if grad_input is not None:
                tiled.add_product(grad_input[some], grad.T, weight, fresh=classes.start == 0)
    return grad_input, grad_bias


class WeightRows:
    """The rows of the weight's gradient, on demand."""

    def __init__(self, input: Tensor, coefficients: Tensor, head: Head) -> None:
        self._operands = _Operands(input, head)
        self._coefficients = Coefficients(*coefficients)

    def add_to(self, tile: Tensor, first: int) -> None:
        """Adds the gradient to a tile of rows, which begins with class `first`."""
        operands = self._operands
        for classes in operands.classes(first, first + len(tile)):
            _, weight_t = operands.weight(classes)
            rows = tile[classes.start - first : classes.stop - first]
            for some in operands.chunks():
                logits = operands.logits(weight_t, classes, some)
                grad = operands.gradient(logits, self._coefficients, classes, some)
                tiled.add_product(rows, grad, operands.input[some], fresh=False)


def weight_gradient(input: Tensor, coefficients: Tensor, head: Head) -> Tensor:
    """All of the weight's gradient, in the weight's dtype: what backward returns if no optimizer takes it by tiles."""
    gradient = torch.empty_like(head.weight, memory_format=torch.contiguous_format).detach()
    rows = WeightRows(input, coefficients, head)
    for first, tile in tiled.zero_tiles(head.weight.shape[0], head.weight.shape[1], head.weight.device):
        rows.add_to(tile, first)
        gradient[first : first + len(tile)] = tile
    return gradient
