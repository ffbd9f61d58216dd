"""The operators, with argument checks and documentation. Registered in ``torch.ops.lomo_kernels``."""

from .sgd import sgd_, sgd_list_
from .sq_norm import sq_norm_, sq_norm_list_

__all__ = ["sgd_", "sgd_list_", "sq_norm_", "sq_norm_list_"]
