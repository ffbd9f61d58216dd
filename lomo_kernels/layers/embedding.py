"""`nn.Embedding` whose backward hands ``(indices, grad_output)`` to the optimizer in place of the weight's gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factors import Factors, gradient_of, offer_factors
from .fused import FusedLayer, register, takes_part


class _Embedding(torch.autograd.Function):
    """``weight[indices]``. Outside the optimizer's backward its gradient is that of `F.embedding`."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.weight = weight
        ctx.padding_idx = -1 if padding_idx is None else padding_idx % weight.shape[0]
        return F.embedding(indices, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:  # a weight without a gradient is not decayed either
            return None, None, None
        (indices,) = ctx.saved_tensors
        uses = offer_factors(ctx, ctx.weight, Factors(indices, grad_output, ctx.padding_idx))
        return None, gradient_of(uses, ctx.weight) if uses else None, None


_PLAIN = nn.Embedding.forward, F.embedding  # see linear.py


@register
class Embedding(FusedLayer, nn.Embedding):
    """Stands in for `nn.Embedding` while a `Lomo` with ``fused_layers=True`` manages its weight."""

    plain = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        if not takes_part(weight, input) or self.reason_to_keep(self) or (nn.Embedding.forward, F.embedding) != _PLAIN:
            return super().forward(input)
        return _Embedding.apply(input, weight, self.padding_idx)

    @staticmethod
    def reason_to_keep(module: nn.Module) -> str | None:
        special = module.max_norm is not None or module.scale_grad_by_freq or module.sparse
        return "max_norm, scale_grad_by_freq or sparse" if special else None
