"""Running autograd for the optimizer, and asking its graph a question."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .ranks import local_of


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


def run_backward(loss: Tensor, scale: Tensor | None, retain_graph: bool) -> None:
    """``(loss * scale).backward()``, with the scale (of no dimensions) as the gradient that backward starts from."""
    start = None
    if scale is not None:
        start = torch.ones_like(loss)  # where the loss is a DTensor, as with loss_parallel(), this is one too
        local_of(start).mul_(scale.to(device=loss.device, dtype=loss.dtype))
    try:
        torch.autograd.backward(loss, start, retain_graph=retain_graph)
    except RuntimeError as error:
        if "donated buffer" in str(error):
            raise RuntimeError(
                "Lomo: clipping or dynamic loss scaling runs backward twice, and torch.compile has given its saved "
                "tensors away to the first (donated buffers). Set torch._functorch.config.donated_buffer = False "
                'before the model is compiled, or use clip_passes="one", one backward'
            ) from error
        if "Direct calls to tensor.backward()" in str(error):
            raise RuntimeError(
                "Lomo: the loss comes from calling DeepSpeed's engine, whose backward needs DeepSpeed's own optimizer. "
                "Call engine.module(...) in place of engine(...). No weight was changed"
            ) from error
        raise


def nodes_of(loss: Tensor) -> Iterator[Any]:
    """The nodes of the graph of `loss`, those near it first; about 1 us each."""
    seen: set[Any] = {loss.grad_fn} - {None}  # a loss that is itself a parameter has no node
    waiting = deque(seen)
    while waiting:
        node = waiting.popleft()
        yield node
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)


def reentrant_checkpoints(loss: Tensor, *, thorough: bool) -> int:
    """How many reentrant checkpoints stand in the graph of `loss`.

    Each hides the graph of its block, so where there are any, one is near the loss and the walk is short. Unless
    `thorough`, a graph without one in its first 64 nodes (some 40 us) counts as having none.
    """
    count = 0
    for place, node in enumerate(nodes_of(loss)):
        count += node.name() == "CheckpointFunctionBackward"
        if place == 64 and not count and not thorough:
            break
    return count


def check_fused_weights(loss: Tensor) -> None:
    """Raises RuntimeError where a fused linear layer's weight was changed since its forward and its backward needs it.

    Autograd would raise as well, but only when it comes to that layer: with others updated already.
    """
    for node in nodes_of(loss):
        version = getattr(node, "weight_version", None)
        if version is not None and node.needs_input_grad[0] and node.weight._version != version:
            raise RuntimeError(
                f"Lomo: a weight of shape {list(node.weight.shape)} was changed in place after the forward that used "
                f"it (version {node.weight._version}, expected {version}). No weight was changed by this step. Change "
                "weights before the forward or after backward"
            )


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The leaves of the graph of `loss` that need a gradient.

    Those used only inside a reentrant checkpoint are not seen: its graph does not exist before backward.
    """
    if loss.grad_fn is None:
        return [loss]
    leaves = (getattr(node, "variable", None) for node in nodes_of(loss))
    return [leaf for leaf in leaves if leaf is not None]


@contextmanager
def gradients_kept_apart(leaves: list[Tensor], scale: Tensor | None, *, wanted: bool) -> Iterator[None]:
    """Keeps a backward that is scaled, or one of two, from leaving its mark on leaves of others.

    Afterwards their ``.grad`` is what a plain backward would have left, or what it was before where this backward is
    not `wanted`.
    """
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    made: list[Tensor | None] = []
    try:
        yield
        made = [leaf.grad for leaf in leaves] if wanted else []
    finally:
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad
    for leaf, grad in zip(leaves, made, strict=bool(made)):
        if grad is not None:
            # Not in place: autograd may have given the leaf the very memory of a gradient that a fused layer keeps.
            if scale is not None:
                grad = grad.clone()
                local_of(grad).div_(scale.to(grad.device))  # a DTensor takes no plain tensor
            leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)
