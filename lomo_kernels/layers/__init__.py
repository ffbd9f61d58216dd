"""Layers whose weight gradient never exists: linear layers and embeddings that hand over its factors instead."""

from .fused import FusedLayer
from .pairs import Pair, gradient_of, takers
from .swap import fuse, layers_of, unfuse

__all__ = ["FusedLayer", "Pair", "fuse", "gradient_of", "layers_of", "takers", "unfuse"]
