"""GPT-2's `Conv1D` (Transformers): a linear layer whose weight is [in, out]. Its weight's gradient is
``input.T @ grad_output``: that of a linear layer whose two factors are exchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fused import FusedLayer, register_by_name, takes_part
from .linear import fused_linear


@register_by_name("transformers.pytorch_utils.Conv1D")
def conv1d(plain_class: type[nn.Module]) -> type[FusedLayer]:
    """The fused class. Transformers is not imported here: `plain_class` comes from a model that has such a layer."""
    untouched = plain_class.forward, torch.addmm  # see linear.py

    class Conv1D(FusedLayer, plain_class):  # type: ignore[misc, valid-type]
        """Stands in for `Conv1D` while a `Lomo` with ``fused_layers=True`` manages its weight."""

        plain = plain_class

        def forward(self, x: Tensor) -> Tensor:
            weight = self._parameters.get("weight")
            if not takes_part(weight, x) or (plain_class.forward, torch.addmm) != untouched:
                return super().forward(x)
            return fused_linear(x, weight, self.bias, transposed=True)

    return Conv1D
