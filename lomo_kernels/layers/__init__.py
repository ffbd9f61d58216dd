"""Layers whose weight gradient never exists: they hand over its factors instead. A file for each kind of layer, which
registers itself; see `fused.register`."""

from . import conv1d, embedding, linear  # noqa: F401
from .fused import FusedLayer, fused_class_of
from .pairs import Pair, gradient_of, takers
from .swap import fuse, layers_of, unfuse

__all__ = ["FusedLayer", "Pair", "fuse", "fused_class_of", "gradient_of", "layers_of", "takers", "unfuse"]
