"""The optimizer: hooks, groups, scaling, clipping. The arithmetic is in the kernels."""

from .adalomo import AdaLomo
from .lomo import Lomo

__all__ = ["AdaLomo", "Lomo"]
