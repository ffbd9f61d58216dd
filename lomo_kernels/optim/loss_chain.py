"""The part of a graph from the loss down to the first node with several successors. A step runs it once.

Typically these are the loss function's nodes: nll_loss, log_softmax, a cast. The head's matmul comes next. The
gradient at the end of this part is kept, and every backward of the step begins there. This has three effects. A loss
kernel that overwrites what it saved gives the right gradients in a step of two backwards. What the loss saved is freed
before the first of them. The loss function's backward takes its time once.
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


class LossChain(NamedTuple):
    """Nodes in a row. Each one gives a gradient to the next one only, and the last one to the rest of the graph."""

    nodes: list[Any]
    number: int  # of the last node's gradient that is not None
    end: GradientEdge  # to the rest of the graph

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name() for node in self.nodes)

    def run(self, start: Start, *, retain_graph: bool) -> Tensor | None:
        """The gradient at the end. Tensor hooks of this edge are not applied to it: each backward from there calls
        them."""
        taken: list[Tensor] = []

        def take(grads: tuple[Tensor | None, ...], _: Any) -> None:
            grad = grads[self.number]
            if grad is not None:
                taken.append(grad.clone())  # a tensor hook or the next backward may change `grad` in place

        handle = self.nodes[-1].register_hook(take)
        try:
            with errors_explained():
                # This reaches the edge without calling its node. Tensor hooks there are called once more than in a
                # plain backward. What they return here is dropped.
                torch.autograd.grad(start.root, self.end, start.grad, retain_graph=retain_graph, allow_unused=True)
        finally:
            handle.remove()
        return taken.pop() if taken else None


def loss_chain_of(loss: Tensor) -> LossChain | None:
    """The chain of a loss. None if the loss's first node has several successors, has a leaf as its successor, or has
    to run in every backward."""
    edge = get_gradient_edge(loss)
    nodes: list[Any] = []
    number = 0
    while len(nodes) < _MAX_NODES and not _keeps_state(edge.node):
        after = [(index, node, output) for index, (node, output) in enumerate(edge.node.next_functions) if node]
        if len(after) != 1 or hasattr(after[0][1], "variable"):
            break
        nodes.append(edge.node)
        number, node, output = after[0]
        edge = GradientEdge(node, output)
    return LossChain(nodes, number, edge) if nodes else None


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
