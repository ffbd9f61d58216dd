"""Will it fit? Training steps simulated without their memory, and what the peak consists of."""

from .methods import METHODS, Attached, Method
from .models import SHAPES, llama, loss_of
from .recorder import CATEGORIES, Peak
from .simulate import default_dtype, record, simulate, simulate_blocks

__all__ = [
    "CATEGORIES",
    "METHODS",
    "SHAPES",
    "Attached",
    "Method",
    "Peak",
    "default_dtype",
    "llama",
    "loss_of",
    "record",
    "simulate",
    "simulate_blocks",
]
