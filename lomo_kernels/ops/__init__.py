"""The operators, with argument checks and documentation. Registered in ``torch.ops.lomo_kernels``."""

from . import factored as factored  # for their schemas: they have no public function
from . import rule_factors as rule_factors
from ._lazy_views import resolve_lazy_views
from .embedding import embedding_sgd_, embedding_sq_norm_
from .linear import linear_sgd_, linear_sq_norm_
from .sq_norm import sq_norm_, sq_norm_list_
from .update import sgd_, sgd_list_

__all__ = [
    "embedding_sgd_",
    "embedding_sq_norm_",
    "linear_sgd_",
    "linear_sq_norm_",
    "sgd_",
    "sgd_list_",
    "sq_norm_",
    "sq_norm_list_",
]

#: Those of ``torch.ops.lomo_kernels`` that backends implement. The functions above call them.
OPERATORS = (
    "update_",
    "sq_norm_",
    "linear_update_",
    "linear_sq_norm_",
    "embedding_update_",
    "embedding_sq_norm_",
    "factor_sums_",
    "factored_sq_norm_",
    "factored_update_",
    "factor_sums_total_",
    "inverse_rms",
    "adalomo_factors",
    "adalomo_scale_",
    "replace_states_",
)

resolve_lazy_views(OPERATORS)
