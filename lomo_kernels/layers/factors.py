"""What a fused layer hands over in place of its weight's gradient: the gradient's factors, for each use of the layer.

The layer's backward asks, with `offer_factors`, whether the optimizer that manages the weight takes the factors. It
does while its own `backward` runs; otherwise the layer returns the true gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..composite.head import Head, weight_gradient


class Factors(NamedTuple):
    """One use of a weight. Its gradient is ``grad_output.T @ input`` or, of an embedding, summed by index."""

    input: Tensor  # [..., in_features]; or the indices [...] of an embedding
    grad_output: Tensor  # [..., out_features or embedding_dim]; of a head: see `composite.head.Coefficients`
    padding_idx: int | None  # None: of a linear layer or a head. An embedding's, negative for none
    names: tuple[str, str] = ("input", "grad_output")  # what the two are to the layer
    head: Head | None = None  # of a layer with its loss: grad_output is made from it, by blocks

    def exchanged(self) -> Factors:
        """Of a linear layer whose weight is [in, out]: that gradient is ``input.T @ grad_output``."""
        return Factors(self.grad_output, self.input, self.padding_idx, self.names[::-1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All whose memory they keep."""
        return self[:2] if self.head is None else (*self[:2], *self.head.tensors)


#: Takes the factors of one use, or returns those (these, and any taken before) whose gradient backward has to return.
FactorSink = Callable[[Factors], Sequence[Factors]]

#: By id of the weight; set and removed by the optimizer that manages it, which keeps it alive.
factor_sinks: dict[int, FactorSink] = {}


def offer_factors(node: Any, weight: Tensor, factors: Factors) -> Sequence[Factors]:
    """The factors, by use, whose gradient the node's backward has to return; none if the optimizer took these.

    Args:
        node: the autograd node, whose input 1 is the weight.
    """
    factor_sink = factor_sinks.get(id(weight))
    if factor_sink is None or torch.is_grad_enabled():
        return (factors,)
    after = weight._post_accumulate_grad_hooks
    if weight._backward_hooks or (after is not None and len(after) > 1):  # one is the optimizer's own
        return (factors,)  # somebody else's hook is to see the gradient
    try:
        # Whether this backward ends in the weight's .grad, so that its hook will be called. Otherwise it drops the
        # gradient: autograd.grad and backward(inputs=...) want those of other tensors.
        accumulated = torch._C._will_engine_execute_node(node.next_functions[1][0])
    except RuntimeError:  # "A leaf node was passed ...": autograd.grad was asked for this very weight's gradient
        return (factors,)
    return factor_sink(factors) if accumulated else ()


def gradient_of(uses: Sequence[Factors], weight: Tensor) -> Tensor:
    """The gradient of `weight` that the factors of its uses stand for, in its dtype, as autograd has it."""
    total: Tensor | None = None
    with torch.autocast(weight.device.type, enabled=False):  # in force where backward is called inside autocast
        for factors in uses:
            if factors.head is not None:
                part = weight_gradient(factors.input, factors.grad_output, factors.head)
            elif factors.padding_idx is None:
                part = _matrix(factors.grad_output).T @ _matrix(factors.input)
            else:
                part = torch.ops.aten.embedding_dense_backward(
                    factors.grad_output, factors.input, weight.shape[0], factors.padding_idx, False
                )
            part = part.to(weight.dtype)  # before they are added: one use may be under autocast and another not
            # Pairs are only added up inside the optimizer's backward, which is never differentiated.
            total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
