"""Which layers can do without a weight gradient, and turning them into such layers and back.

A module is turned by exchanging its class for a subclass of the same name: a ``forward`` set on the instance would
break `copy.deepcopy` and pickle. Nothing else of the module changes: parameters, buffers, hooks, state dict, repr.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Iterator

from torch import nn

from .factors import factor_sinks
from .fused import PLAIN_PARAMETER, FusedLayer, fused_class_of, weight_of


def why_not(module: nn.Module) -> str | None:
    """Why a module with a weight keeps its gradient; None where it need not."""
    fused_class = fused_class_of(module)
    if fused_class is None:
        return f"in a {type(module).__name__}"
    if reason := fused_class.reason_to_keep(module):
        return reason
    if "forward" in vars(module):
        return "its module has a forward of its own"
    weight = weight_of(module)
    if weight is None or type(weight) not in PLAIN_PARAMETER:
        return "not a plain parameter"
    if weight.dim() != 2 or not weight.numel():
        return "not a matrix, or without elements"
    return None


def layers_of(model: nn.Module, weights: Container[int]) -> Iterator[tuple[nn.Module, str | None]]:
    """The modules that have one of `weights` (ids), each with the reason that it keeps its gradient, if any."""
    for module in model.modules():
        if id(weight_of(module)) in weights:
            yield module, why_not(module)


def gated_layers_of(model: nn.Module, weights: Container[int]) -> Iterator[nn.Module]:
    """The modules that can keep less for backward, and have a layer with one of `weights` (ids)."""
    for module in model.modules():
        fused_class = fused_class_of(module)
        if fused_class is None or not fused_class.keeps_less or "forward" in vars(module):
            continue
        if any(id(weight_of(child)) in weights for child in module.children()):
            yield module


def fuse(module: nn.Module) -> None:
    """Makes the module a fused one."""
    fused_class = fused_class_of(module)
    assert fused_class is not None
    module.__class__ = fused_class


def unfuse(modules: Iterable[weakref.ref[nn.Module]]) -> None:
    """Makes fused modules plain ones again, but for those whose weight another optimizer manages by now.

    One whose class was exchanged once more since then is left alone: without an optimizer it returns true gradients.
    """
    for reference in modules:
        module = reference()
        if module is None or not isinstance(module, FusedLayer) or id(weight_of(module)) in factor_sinks:
            continue
        if "plain" in vars(type(module)):
            module.__class__ = module.plain  # type: ignore[assignment]
