"""The part of a graph from the loss down to the first node with several successors. A step runs it once.

Typically these are the loss function's nodes: nll_loss, log_softmax, a cast. The head's matmul comes next. The
gradient at the end of this part is kept, and every backward of the step begins there. This has three effects. A loss
kernel that overwrites what it saved gives the right gradients in a step of two backwards. What the loss saved is freed
before the first of them. The loss function's backward takes its time once.

A fused loss of Liger, which has the head's weight as a second successor, ends such a part, too. Its forward has made
the gradients of input and weight, and its backward multiplies them in place. They are kept in place of what it saved.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules._functions import BackwardHookFunction

from .autograd import Start, errors_explained

_MAX_NODES = 64
#: Names of torch's own nodes, which hide no layer. A node written in Python may run a layer's backward inside.
_OF_TORCH = re.compile(r"\w+Backward\d+")
#: Nodes that have saved the gradients of their input and of parameters.
_HAS_GRADS = ("LigerFusedLinearCrossEntropyFunctionBackward",)


class LossChain(NamedTuple):
    """Nodes in a row. Each one gives a gradient to the next one only, and the last one to the rest of the graph and,
    perhaps, to parameters."""

    nodes: list[Any]
    number: int  # of the last node's gradient that goes on
    end: GradientEdge  # to the rest of the graph
    params: list[tuple[int, GradientEdge]]  # the numbers of the last node's other gradients, and where they go

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name() for node in self.nodes)

    def run(self, start: Start, *, retain_graph: bool) -> Start:
        """Where a backward goes on: at the end. Tensor hooks of this edge are not applied to the gradient there: each
        backward from there calls them."""
        taken: list[Start] = []

        def take(grads: tuple[Tensor | None, ...], _: Any) -> None:
            grad = grads[self.number]
            if grad is not None:
                grad = grad.clone()  # a tensor hook or the next backward may change `grad` in place
            others = [(edge, other) for number, edge in self.params if (other := grads[number]) is not None]
            taken.append(Start(self.end, grad, frees_grad=False, others=others))

        handle = self.nodes[-1].register_hook(take)
        try:
            with errors_explained():
                # This reaches the edge without calling its node. Tensor hooks there are called once more than in a
                # plain backward. What they return here is dropped.
                torch.autograd.grad(start.root, self.end, start.grad, retain_graph=retain_graph, allow_unused=True)
        finally:
            handle.remove()
        return taken.pop() if taken else Start(self.end, None, frees_grad=False)


def loss_chain_of(loss: Tensor) -> LossChain | None:
    """The chain of a loss. None if the loss's first node has several successors, has a leaf as its successor, or has
    to run in every backward."""
    edge = get_gradient_edge(loss)
    nodes: list[Any] = []
    params: list[tuple[int, GradientEdge]] = []
    number = 0
    while len(nodes) < _MAX_NODES and not (params or _keeps_state(edge.node)):
        after = [
            (index, GradientEdge(node, output))
            for index, (node, output) in enumerate(edge.node.next_functions)
            if node is not None
        ]
        leaves = [each for each in after if hasattr(each[1].node, "variable")]
        if len(after) - len(leaves) != 1 or (leaves and edge.node.name() not in _HAS_GRADS):
            break
        nodes.append(edge.node)
        params = leaves
        ((number, edge),) = (each for each in after if each not in leaves)
    return LossChain(nodes, number, edge, params) if nodes else None


def _keeps_state(node: Any) -> bool:
    """Whether a node has to run in every backward: a module's full backward hooks, or a checkpoint."""
    return getattr(node, "_forward_cls", None) is BackwardHookFunction or "Checkpoint" in node.name()


class LossChains:
    """What an optimizer knows of chains with nodes that are not torch's own. Such a node may hide a layer: then a
    parameter gets a gradient from inside the node, and the graph does not show it."""

    def __init__(self) -> None:
        self._trusted: set[tuple[str, ...]] = set()
        self._hiding: set[tuple[str, ...]] = set()

    def may_run_once(self, chain: LossChain) -> bool:
        """Whether a chain hid nothing so far."""
        return chain.names not in self._hiding

    def is_trusted(self, chain: LossChain) -> bool:
        """Whether a chain is known to hide nothing."""
        return chain.names in self._trusted or all(map(_OF_TORCH.fullmatch, chain.names))

    def trust(self, chain: LossChain) -> None:
        self._trusted.add(chain.names)

    def distrust(self, chain: LossChain) -> None:
        """A gradient came from inside a chain."""
        self._trusted.discard(chain.names)
        self._hiding.add(chain.names)
