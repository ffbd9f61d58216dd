"""A step of `Lomo` with a budget of `clip_memory`: bytes kept, peak and floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .kernels import KERNELS
from .methods import CLIP, Method, lomo
from .products import formulas
from .recorder import Peak
from .simulate import simulation

#: How many steps run; the last one is recorded. The first step of a graph keeps nothing: it finds out what fits. The
#: third one is like all later ones: it also has what earlier graphs left in memory.
STEPS = 3


class BudgetStep(NamedTuple):
    """A step with one budget."""

    kept: int  # bytes of gradients and factors that wait for the norm
    peak: Peak
    flops: int  # of matrix products and attention, forward included


def method_of(clip_memory: float | None, *, fused: bool) -> Method:
    """`Lomo` that clips by the norm with this budget. None: it keeps all gradients."""
    steps = STEPS if clip_memory else 1
    return Method(lomo(clip_grad_norm=CLIP, clip_memory=clip_memory, fused_layers=fused), steps)


def simulate_budget(
    build: Callable[[], nn.Module],
    loss: Callable[[Any], Tensor],
    clip_memory: float | None,
    *,
    fused: bool,
    kernels: str = "gpu",
) -> BudgetStep:
    """A simulated step of `Lomo` that clips by the norm.

    The whole model runs. The place at which backward is cut in two depends on the block, so few blocks do not stand
    for many.

    Args:
        build, loss, kernels: as in `simulate`.
        clip_memory: bytes; None: all gradients are kept.
        fused: `fused_layers`.
    """
    method = method_of(clip_memory, fused=fused)
    recorder = simulation(build, loss, method, kernels, formulas(KERNELS[kernels].device))
    return BudgetStep(recorder.kept, recorder.peak_of_parts(), recorder.flops)
