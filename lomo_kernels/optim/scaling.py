"""Loss scaling without a host synchronisation: the scale lives in a device tensor."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from .graph import nodes_of
from .hyperparameters import check_positive
from .placement import local_of

# As torch.amp.GradScaler.
INITIAL_SCALE = 2.0**16
GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5
GROWTH_INTERVAL = 2000

# 2**16 is infinite in float16; a loss of that dtype starts backward with this much instead.
LARGEST_FLOAT16_SCALE = 2.0**15

# A scale that keeps falling is not what keeps a gradient from being finite; its inverse must stay finite in float32.
SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 2.0**100


# Some 1 ms, once. The loss itself is in float32 and takes a few dozen nodes.
FLOAT16_NODES = 1000

KINDS = ("none", "static", "dynamic")

#: Tensors that the end of a step changes, and what they become. All that needs memory has been done.
Moves = list[tuple[Tensor, Tensor]]


class LossScale:
    """None, a fixed number, or dynamic: halved where a step overflows, doubled after 2000 steps that do not.

    Args:
        wanted: None, a number > 0, or "dynamic".
        device: where the scale lives.
    """

    def __init__(self, wanted: float | str | None, device: torch.device) -> None:
        self.kind = "none" if wanted is None else "dynamic" if wanted == "dynamic" else "static"
        number = INITIAL_SCALE if self.kind == "dynamic" else 1.0 if wanted is None else float(wanted)
        self.scale = torch.full((), number, dtype=torch.float32, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)

    @staticmethod
    def check(wanted: Any) -> None:
        """Raises TypeError or ValueError unless `wanted` is "auto", None, "dynamic" or a number > 0."""
        if isinstance(wanted, str):
            if wanted not in ("auto", "dynamic"):
                raise ValueError(f'Lomo: loss_scale is {wanted!r}, expected "auto", None, a number > 0 or "dynamic"')
        elif wanted is not None:
            check_positive("loss_scale", wanted)
            if not SMALLEST_SCALE <= wanted <= LARGEST_SCALE:
                raise ValueError(
                    f"Lomo: loss_scale is {wanted}, expected a number from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}: "
                    "then float32 holds it and its inverse"
                )

    @property
    def used(self) -> bool:
        return self.kind != "none"

    def export(self) -> dict[str, Any]:
        """Copies of what a resumed run needs."""
        return {
            "scaling": self.kind,
            "loss_scale": self.scale.clone(),
            "growth_tracker": self.growth_tracker.clone(),
        }

    def of(self, loss: Tensor) -> Tensor:
        """The scale that backward from `loss` really starts with: as its dtype can hold it. float32, no dimensions."""
        limit = LARGEST_FLOAT16_SCALE if loss.dtype is torch.float16 else torch.finfo(torch.float32).max
        return self.scale.clamp(max=limit).to(loss.dtype).to(torch.float32)

    def after_step(self, found_inf: Tensor) -> Moves:
        """A dynamic scale is halved or, in time, doubled. `found_inf`: one element, not zero where the step
        overflowed."""
        if self.kind != "dynamic":
            return []
        scale, tracker = self.scale.clone(), self.growth_tracker.clone()
        torch._amp_update_scale_(scale, tracker, found_inf.float(), GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL)
        return [(self.scale, scale.clamp_(min=SMALLEST_SCALE)), (self.growth_tracker, tracker)]

    def after_dropped_norm(self, found_inf: Tensor) -> Moves:
        """As `after_step` where the norm overflowed; otherwise nothing, not even towards the next growth."""
        return [(tensor, torch.where(found_inf != 0, moved, tensor)) for tensor, moved in self.after_step(found_inf)]


def unscaled(grad: Tensor, scale: Tensor) -> Tensor:
    """A copy of a gradient, perhaps a DTensor, that is divided by the loss scale."""
    grad = grad.clone()
    local_of(grad).div_(scale.to(grad.device))  # a DTensor takes no plain tensor
    return grad


def check_no_grad_scaler(loss: Tensor) -> bool:
    """Raises RuntimeError if a `torch.amp.GradScaler` has scaled `loss`.

    Returns:
        Whether it could have: whether `loss` was multiplied by a tensor like a scale.
    """
    factor = _factor_of(loss)
    if factor is None:
        return False
    if _is_of_grad_scaler(factor):
        raise RuntimeError(
            "Lomo: the loss was multiplied by the scale of a torch.amp.GradScaler. The update would be too large "
            'by this factor. Use Lomo(..., loss_scale="dynamic") and optimizer.backward(loss), without the scaler. '
            "No weight was changed"
        )
    return True


def _factor_of(loss: Tensor) -> Tensor | None:
    """The one-element float32 tensor that `loss` was multiplied by last, if any. It may be a GradScaler's scale."""
    node = loss.grad_fn
    for _ in range(4):  # the scaled loss may have been divided by a number of parts, say
        if node is None:
            return None
        if node.name() == "MulBackward0":
            try:
                # What was saved, without calling unpack hooks: a checkpoint would compute its block once more, and some
                # hooks give a tensor up once. Their own kind of object is no factor.
                factor = node._raw_saved_other.data  # type: ignore[attr-defined]
            except RuntimeError:  # the graph was freed, as backward will say
                return None
            if isinstance(factor, Tensor) and factor.dtype is torch.float32 and not factor.dim():
                return None if factor.requires_grad else factor
        before = [after for after, _ in node.next_functions if after is not None]
        node = before[0] if len(before) == 1 else None
    return None


def _is_of_grad_scaler(factor: Tensor) -> bool:
    """Whether a live `torch.amp.GradScaler` has `factor` as its scale. Asks the garbage collector: some 50 ms."""
    for referrer in gc.get_referrers(factor):
        holders = gc.get_referrers(referrer) if isinstance(referrer, dict) else [referrer]
        scalers = [holder for holder in holders if issubclass(type(holder), torch.amp.GradScaler)]
        if any(scaler._scale is factor for scaler in scalers):
            return True
    return False


def computes_in_float16(loss: Tensor) -> bool:
    """Whether the graph of `loss`, near the loss, has a gradient in float16. Under float16 autocast the last layer has
    one. A compiled graph hides it."""
    if loss.dtype is torch.float16:
        return True
    nodes = nodes_of(loss, at_most=FLOAT16_NODES)
    return any(data.dtype is torch.float16 for node in nodes for data in node._input_metadata)
