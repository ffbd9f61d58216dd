"""The blocks of a model: layers that repeat."""

from __future__ import annotations

from torch import nn


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The model's longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())
