"""Running autograd for the optimizer, and asking its graph a question."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """``(loss * scale).backward()``, with the scale as the gradient that backward starts from."""
    start = None if scale is None else scale.to(device=loss.device, dtype=loss.dtype).expand(loss.shape)
    try:
        torch.autograd.backward(loss, start, retain_graph=retain_graph)
    except RuntimeError as error:
        if "donated buffer" in str(error):
            raise RuntimeError(
                "Lomo: clipping or dynamic loss scaling runs backward twice, and torch.compile has given its saved "
                "tensors away to the first (donated buffers). Set torch._functorch.config.donated_buffer = False "
                'before the model is compiled. (clip_passes="one", one backward, is not in this version.)'
            ) from error
        raise


def has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether a reentrant checkpoint stands in the graph of `loss`. Walks the graph: about 1 us per node."""
    seen = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        stack.extend(next_node for next_node, _ in node.next_functions)
    return False
