"""What a fused layer hands over in place of its weight's gradient: the gradient's factors, for each use of the layer.

The layer's backward asks, with `take`, whether the optimizer that manages the weight takes the factors. It does while
its own `backward` runs; otherwise the layer returns the true gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """One use of a weight. Its gradient is ``grad_output.T @ input`` or, of an embedding, summed by index."""

    input: Tensor  # [..., in_features]; or the indices [...] of an embedding
    grad_output: Tensor  # [..., out_features or embedding_dim]
    padding_idx: int | None  # None: of a linear layer. An embedding's, negative for none
    names: tuple[str, str] = ("input", "grad_output")  # what the two are to the layer

    def exchanged(self) -> Pair:
        """Of a linear layer whose weight is [in, out]: that gradient is ``input.T @ grad_output``."""
        return Pair(self.grad_output, self.input, self.padding_idx, self.names[::-1])


#: Takes a pair, or returns the pairs (this one, and any taken before) whose gradient backward has to return.
Taker = Callable[[Pair], Sequence[Pair]]

#: By id of the weight; set and removed by the optimizer that manages it, which keeps it alive.
takers: dict[int, Taker] = {}


def take(node: Any, weight: Tensor, pair: Pair) -> Sequence[Pair]:
    """The pairs whose gradient the node's backward has to return; none where the optimizer took this one.

    Args:
        node: the autograd node, whose input 1 is the weight.
    """
    taker = takers.get(id(weight))
    if taker is None or torch.is_grad_enabled():
        return (pair,)
    after = weight._post_accumulate_grad_hooks
    if weight._backward_hooks or (after is not None and len(after) > 1):  # one is the optimizer's own
        return (pair,)  # somebody else's hook is to see the gradient
    try:
        # Whether this backward ends in the weight's .grad, so that its hook will be called. autograd.grad does not.
        accumulated = torch._C._will_engine_execute_node(node.next_functions[1][0])
    except RuntimeError:  # "A leaf node was passed ...": autograd.grad was asked for this very weight's gradient
        return (pair,)
    return taker(pair) if accumulated else (pair,)


def gradient_of(pairs: Sequence[Pair], weight: Tensor) -> Tensor:
    """The gradient of `weight` that the pairs stand for, in its dtype, as autograd has it."""
    total: Tensor | None = None
    with torch.autocast(weight.device.type, enabled=False):  # in force where backward is called inside autocast
        for pair in pairs:
            if pair.padding_idx is None:
                part = _matrix(pair.grad_output).T @ _matrix(pair.input)
            else:
                part = torch.ops.aten.embedding_dense_backward(
                    pair.grad_output, pair.input, weight.shape[0], pair.padding_idx, False
                )
            part = part.to(weight.dtype)  # before they are added: one use may be under autocast and another not
            # Pairs are only added up inside the optimizer's backward, which is never differentiated.
            total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
