"""Layers whose weight gradient never exists: they hand over its factors instead. And gated layers, which keep less for
backward. A file for each kind of layer, which registers itself; see `fused.register`."""

from . import conv1d, embedding, gated, linear, losses  # noqa: F401
from .factors import Factors, factor_sinks, gradient_of
from .fused import FusedLayer, fused_class_of, weight_of
from .head import linear_cross_entropy
from .losses import stand_in
from .swap import fuse, gated_layers_of, layers_of, unfuse

__all__ = [
    "Factors",
    "FusedLayer",
    "factor_sinks",
    "fuse",
    "fused_class_of",
    "gated_layers_of",
    "gradient_of",
    "layers_of",
    "linear_cross_entropy",
    "stand_in",
    "unfuse",
    "weight_of",
]
