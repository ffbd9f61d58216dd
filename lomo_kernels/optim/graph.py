"""Answers questions about the graph of a loss."""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from .autograd import Cut


def check_loss(loss: Tensor) -> None:
    """Raises TypeError, ValueError or RuntimeError unless `loss` is one number that depends on a parameter."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"Lomo: loss is a {type(loss).__name__}, expected a tensor")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"Lomo: loss has shape {list(loss.shape)} and dtype {loss.dtype}, expected one floating-point element"
        )
    if not loss.requires_grad:
        raise RuntimeError(
            "Lomo: loss does not depend on any trainable parameter; was it computed under torch.no_grad(), or detached?"
        )


class Graph:
    """What a step asks about the graph of its loss. The graph is walked once, at the first question that needs it."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss

    @cached_property
    def _walk(self) -> _Walk:
        leaves: list[Tensor] = []
        kinds: set[str] = set()
        custom: set[str] = set()
        shape = 0
        donates_buffers = False
        for node in nodes_of(self.loss):
            name = node.name()
            shape = hash((shape, name))
            kinds.add(name)
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves.append(leaf)
            function = getattr(node, "_forward_cls", None)  # the torch.autograd.Function, if it is one's
            if function is not None:
                donates_buffers = donates_buffers or _donates_buffers(function)
                if not function.__module__.startswith(_OWN_BACKWARDS):
                    custom.add(name)
        return _Walk(leaves, shape, frozenset(kinds), frozenset(custom), donates_buffers)

    @property
    def leaves(self) -> list[Tensor]:
        """The leaves that need a gradient: parameters, inputs. Leaves that only a reentrant checkpoint uses are
        missing: its graph does not exist before backward."""
        return self._walk.leaves

    @property
    def shape(self) -> int:
        """A hash of the kinds of nodes, in order: equal for two graphs with the same kinds in the same order."""
        return self._walk.shape

    @property
    def kinds(self) -> frozenset[str]:
        """Names of its nodes."""
        return self._walk.kinds

    @property
    def custom(self) -> frozenset[str]:
        """Names of its nodes whose backward is neither torch's nor this library's."""
        return self._walk.custom

    @property
    def donates_buffers(self) -> bool:
        """Whether `torch.compile` has compiled a part of it for one backward, which writes over saved tensors."""
        return self._walk.donates_buffers

    @property
    def has_reentrant_checkpoints(self) -> bool:
        """Whether blocks of it do not exist before backward."""
        return _REENTRANT in self._walk.kinds

    def cut(self, leaves: Sequence[Tensor]) -> Cut:
        """Divides the graph in two. The upper part has all nodes that lead to `leaves`. What the lower part takes over
        has its whole gradient from the upper part. So a skip connection belongs to one part. The lower part begins with
        nodes of torch's own, which may be called twice."""
        above: dict[int, list[Any]] = {}  # by id of a node: those that give it a gradient
        nodes = nodes_of(self.loss)
        for node in nodes:
            for after, _ in node.next_functions:
                if after is not None:
                    above.setdefault(id(after), []).append(node)
        wanted = {id(leaf) for leaf in leaves}
        upper: dict[int, Any] = {}
        border: dict[int, Any] = {}
        waiting = [node for node in nodes if id(getattr(node, "variable", None)) in wanted]
        while waiting:
            node = waiting.pop()
            if id(node) in upper:
                continue
            upper[id(node)] = node
            border.pop(id(node), None)
            waiting.extend(above.get(id(node), ()))
            for after, _ in node.next_functions:
                if after is None or id(after) in upper or id(after) in border:
                    continue
                border[id(after)] = after
                waiting.extend(above[id(after)])
                if isinstance(after, BackwardCFunction):  # its backward is somebody's, and must not be called twice
                    waiting.append(after)
        leaf_of = {key: getattr(node, "variable", None) for key, node in border.items()}
        ends = [leaf for leaf in leaf_of.values() if leaf is not None and leaf.requires_grad]
        below = [node for key, node in border.items() if leaf_of[key] is None]
        return Cut([*leaves, *ends], below)

    @property
    def sequence_number(self) -> int:
        """How many nodes this thread had made before the loss's own."""
        return int(get_gradient_edge(self.loss).node._sequence_nr())


class _Walk(NamedTuple):
    leaves: list[Tensor]
    shape: int
    kinds: frozenset[str]
    custom: frozenset[str]
    donates_buffers: bool


def _donates_buffers(function: Any) -> bool:
    """Whether this class is a compiled backward that writes over saved tensors. A backward that is not compiled yet
    will not, if backward then retains the graph. Both attributes are the same in torch 2.11 to 2.15."""
    donated = getattr(getattr(function, "metadata", None), "bw_donated_idxs", None)
    return bool(donated) and getattr(function, "compiled_bw", None) is not None


_REENTRANT = "CheckpointFunctionBackward"
_OWN_BACKWARDS = ("torch.", "lomo_kernels.")


def nodes_of(loss: Tensor, *, at_most: int | None = None) -> list[Any]:
    """The nodes of the graph of `loss`, nearest first, or the first `at_most` of them; about 1 us each."""
    release_deep_graphs()
    first = get_gradient_edge(loss).node  # also of a leaf, which has no grad_fn
    nodes: dict[int, Any] = {id(first): first}  # by id, which only living objects have for themselves
    nodes_seen = [first]  # in the order in which they were seen: it grows while the loop goes through it
    try:
        for node in nodes_seen:
            if at_most is not None and len(nodes_seen) >= at_most:
                break
            for after, _ in node.next_functions:
                if after is not None and id(after) not in nodes:
                    nodes[id(after)] = after
                    nodes_seen.append(after)
    finally:
        if len(nodes) > DEEP:
            # Without the nodes of leaves. They end every chain, and every graph of a parameter shares them.
            _deep_graphs.append({key: node for key, node in nodes.items() if node.next_functions})
            release_deep_graphs()  # joins it with an earlier walk of the same graph
    return nodes_seen[:at_most]


# Since torch 2.13, a node that Python has seen is freed through its Python object. A chain of nodes is then freed by
# recursion, with some 220 bytes of stack per node: 40,000 nodes overflow a stack of 8 MiB, 2,400 a stack of 512 KiB. So
# this module holds a graph of more nodes than this until nothing else holds it, and then frees it node by node.
DEEP = 1000

_deep_graphs: list[dict[int, Any]] = []
_releasing = threading.Lock()


def release_deep_graphs() -> None:
    """Joins graphs that share nodes, and frees nodes that only this module holds. A node is freed after the nodes that
    give it a gradient."""
    if not _deep_graphs or not _releasing.acquire(blocking=False):
        return
    try:
        for nodes in list(_deep_graphs):
            for other in list(_deep_graphs):
                # Of two graphs that hold the same nodes, each would wait for the other.
                if other is not nodes and not nodes.keys().isdisjoint(other):
                    nodes.update(other)
                    other.clear()
            waiting = list(reversed(nodes))
            while waiting:
                key = waiting.pop()
                if key not in nodes or _is_held(nodes, key):
                    continue
                try:
                    after = nodes[key].next_functions
                except RuntimeError:  # before torch 2.13 an autograd.Function's node may die before its Python object
                    after = ()
                del nodes[key]
                waiting.extend(id(node) for node, _ in after if node is not None)
                del after
            if not nodes:
                _deep_graphs.remove(nodes)
    finally:
        _releasing.release()


def _is_held(nodes: dict[int, Any], key: int) -> bool:
    """Whether a graph or a tensor holds a node, besides `nodes` and this call."""
    return sys.getrefcount(nodes[key]) > 2


@atexit.register
def _keep_deep_graphs() -> None:
    """Graphs that are held when Python ends are never freed: the program's losses may be freed after this module."""
    if _deep_graphs:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_deep_graphs))


def check_fused_weights(loss: Tensor) -> None:
    """Raises RuntimeError if a fused linear layer's weight was changed since its forward and its backward needs it.

    Autograd would raise too, but only when it reaches that layer. Other weights are updated by then.
    """
    for node in nodes_of(loss):
        version = getattr(node, "weight_version", None)
        if version is not None and node.needs_input_grad[0] and node.weight._version != version:
            raise RuntimeError(
                f"Lomo: a weight of shape {list(node.weight.shape)} was changed in place after the forward that used "
                f"it (version {node.weight._version}, expected {version}). No weight was changed by this step. Change "
                "weights before the forward or after backward"
            )
