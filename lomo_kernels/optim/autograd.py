"""Runs autograd for the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.graph import GradientEdge

from .placement import local_of


class Start(NamedTuple):
    """Where a backward begins."""

    root: Tensor | GradientEdge
    grad: Tensor | None  # of the root; None: 1 if the root is the loss, otherwise backward reaches nothing
    frees_grad: bool = True  # if the root is an edge, `grad` is freed once it is used
    others: Sequence[tuple[GradientEdge, Tensor]] = ()  # gradients of parameters, and where they go


def start_of(loss: Tensor, scale: Tensor | None) -> Start:
    """The start of ``(loss * scale).backward()``, with the scale (of no dimensions) as the gradient."""
    if scale is None:
        return Start(loss, None)
    grad = torch.ones_like(loss)  # a DTensor if the loss is one, as with loss_parallel()
    local_of(grad).mul_(scale.to(device=loss.device, dtype=loss.dtype))
    return Start(loss, grad)


def run_backward(start: Start, retain_graph: bool, leaves: Sequence[Any] | None = None) -> None:
    """One backward from `start`.

    `leaves`: tensors (or edges of the graph) that get a gradient; backward ends where it needs no more for them.
    """
    root, grad, frees_grad, others = start
    roots, grads = [edge for edge, _ in others], [other for _, other in others]
    with errors_explained():
        if not isinstance(root, GradientEdge):
            torch.autograd.backward(root, grad, retain_graph=retain_graph, inputs=leaves)
        elif grad is None:
            return
        elif not _is_plain(grad):
            torch.autograd.backward([root, *roots], [grad.clone(), *grads], retain_graph=retain_graph, inputs=leaves)
        else:
            # Autograd holds the gradient that a backward starts with until the backward ends. If it gets two gradients,
            # it starts with their sum, which it frees after use, and `grad` can be freed here. A hook may keep the sum
            # or change it in place. The second gradient is -0.0, because adding that changes no bit.
            nothing = grad.new_full((), -0.0).expand(grad.shape)
            with _prehooks([root.node] if frees_grad else [], lambda *_: _free(grad)):
                torch.autograd.backward(
                    [root, root, *roots], [grad, nothing, *grads], retain_graph=retain_graph, inputs=leaves
                )


def _is_plain(grad: Tensor) -> bool:
    return type(grad) in (Tensor, FakeTensor) and grad.layout is torch.strided and grad.is_floating_point()


def _free(grad: Tensor) -> None:
    """Frees the memory of a tensor that autograd holds and no longer reads."""
    grad.data = grad.new_zeros(()).expand(grad.shape)


@contextmanager
def shared_recomputation(wanted: bool) -> Iterator[None]:
    """Inside, if `wanted`, a checkpoint recomputes once for several backwards through different parts of a graph."""
    group: Any = getattr(torch.utils.checkpoint, "GraphExecGroup", None)  # only newer versions of torch have it
    if group is None:
        yield
        return
    # A hook of another optimizer's backward, which has a group of its own, may have called this one.
    around = torch._C._get_graph_exec_group()
    torch._C._set_graph_exec_group(group() if wanted else None)
    try:
        yield
    finally:
        torch._C._set_graph_exec_group(around)


@contextmanager
def errors_explained() -> Iterator[None]:
    """Says what to do about errors of a graph that allows one backward, or none."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffer" in str(error):
            raise RuntimeError(
                "Lomo: backward runs twice here (grad_norm(), several processes, or a compiled block in a reentrant "
                "checkpoint), and torch.compile reuses the memory of saved tensors (donated buffers), which allows one "
                "backward. Set torch._functorch.config.donated_buffer = False before the model is compiled, or use "
                'backward() with clip_memory=None (clip_passes="one"), which runs once. No weight was changed'
            ) from error
        if "under selective activation checkpoint" in str(error):
            raise RuntimeError(
                "Lomo: clip_memory has no room for all gradients, so backward runs twice, and a selective activation "
                'checkpoint (context_fn) allows one backward. Use clip_memory=None (clip_passes="one"). '
                "optimizer.last_step_outcome says whether a weight was changed"
            ) from error
        if "Direct calls to tensor.backward()" in str(error):
            raise RuntimeError(
                "Lomo: the loss comes from calling DeepSpeed's engine, whose backward needs DeepSpeed's own optimizer. "
                "Call engine.module(...) in place of engine(...). No weight was changed"
            ) from error
        raise


Grads = dict[int, tuple[Tensor | None, ...]]


class Cut(NamedTuple):
    """Two parts of a graph. A pass goes through the upper part, then the lower one. Only the upper part is retained for
    the second pass: it is nearest to the loss."""

    leaves: list[Tensor]  # those that get gradients from the upper part
    below: list[Any]  # nodes of the lower part that get gradients from the upper part

    def run_upper(self, start: Start) -> Grads:
        """One backward through the upper part. Returns the gradients of the nodes below it, by their index."""
        grads: Grads = {}
        with _prehooks(self.below, grads.__setitem__):
            # Naming an edge to a node makes autograd call the node, with its gradients, and go no further.
            run_backward(start, True, [*self.leaves, *(GradientEdge(node, 0) for node in self.below)])
        return grads

    def run_lower(self, grads: Grads) -> None:
        """One backward through the lower part, which begins with what `run_upper` has returned."""
        starts = [(index, *_stand_in(self.below[index], given)) for index, given in grads.items()]
        if starts:
            edges = [GradientEdge(self.below[index], number) for index, number, _ in starts]
            # Autograd calls hooks of these tensors again, on copies. The results of their first call count.
            with _prehooks(self.below, lambda index, _: grads.pop(index)):
                torch.autograd.backward(edges, [grad for _, _, grad in starts])


def _stand_in(node: Any, grads: Sequence[Tensor | None]) -> tuple[int, Tensor]:
    """The number of an output of `node`, and a tensor to start a backward with. `grads` take its place in a hook."""
    for number, grad in enumerate(grads):
        if grad is not None:
            return number, grad.clone()
    output = node._input_metadata[0]  # autograd runs a node whose gradients are all undefined
    return 0, torch.zeros(output.shape, dtype=output.dtype, device=output.device)


@contextmanager
def _prehooks(nodes: Sequence[Any], hook: Callable[[int, Any], Any]) -> Iterator[None]:
    """While inside, calls `hook` with each node's index and gradients before the node is run."""
    handles = [node.register_prehook(partial(hook, index)) for index, node in enumerate(nodes)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
