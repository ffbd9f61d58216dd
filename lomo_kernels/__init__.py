"""LOMO (arXiv 2306.09782) as a kernel library: full-parameter training whose update happens inside backward."""

from importlib.metadata import PackageNotFoundError, version

from . import backends as backends  # registers the kernels
from . import ops as ops
from .layers import linear_cross_entropy
from .optim import AdaLomo, Lomo

try:
    __version__ = version("lomo_kernels")
except PackageNotFoundError:  # imported from a source folder that was not installed
    __version__ = "0+unknown"

__all__ = ["AdaLomo", "Lomo", "__version__", "linear_cross_entropy", "ops"]
