"""The optimizer: hooks, groups, scaling, clipping. The arithmetic is in the kernels."""

from .lomo import Lomo

__all__ = ["Lomo"]
