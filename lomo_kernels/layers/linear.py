"""`nn.Linear` whose backward hands ``(input, grad_output)`` to the optimizer in place of the weight's gradient."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factors import Factors, gradient_of, offer_factors
from .fused import FusedLayer, register, takes_part


class _Linear(torch.autograd.Function):
    """``input @ weight.T + bias``; if `transposed`, ``input @ weight + bias``, with a weight [in, out]. Outside the
    optimizer's backward its gradients are those of `F.linear`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool, transposed: bool
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.transposed = transposed
        # As F.linear: the weight is needed for the input's gradient, and only then must not change before backward.
        ctx.save_for_backward(input, weight if input.requires_grad else None)
        ctx.weight, ctx.weight_version = weight, weight._version
        ctx.bias_dtype = None if bias is None else bias.dtype
        if autocast:
            weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
        output = F.linear(input, weight.T if transposed else weight, bias)
        # With a bias and three dimensions it is a view of two; autograd forbids altering a Function's view in place, as
        # nn.ReLU(inplace=True) does.
        return torch.ops.aten._unsafe_view.default(output, output.shape) if output._is_view() else output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:  # a weight without a gradient is not decayed either
            return None, None, None, None, None
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        grad_input = grad_weight = grad_bias = None
        kind = grad_output.device.type
        # To enter a context of autocast, even a disabled one, takes some 3 us.
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            if of_input:
                weight = weight.to(grad_output.dtype)
                grad_input = grad_output @ (weight.T if ctx.transposed else weight)
            if of_bias:
                grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0).to(ctx.bias_dtype)
            if of_weight:
                factors = Factors(input, grad_output, None)
                uses = offer_factors(ctx, ctx.weight, factors.exchanged() if ctx.transposed else factors)
                grad_weight = gradient_of(uses, ctx.weight) if uses else None
        return grad_input, grad_weight, grad_bias, None, None


def fused_linear(input: Tensor, weight: Any, bias: Any, *, transposed: bool = False) -> Tensor:
    """`F.linear` whose backward hands over the factors of the weight's gradient. `transposed`: the weight is [in, out].
    Runs as `F.linear` does under autocast."""
    kind = input.device.type
    if not torch.is_autocast_enabled(kind) or input.dtype is torch.float64 or not input.is_floating_point():
        return _Linear.apply(input, weight, bias, False, transposed)
    # What autocast does to F.linear, but with the weight cast where it is used and not kept: its copy in autocast's
    # cache would have the gradient that is not to exist.
    with torch.autocast(kind, enabled=False):
        return _Linear.apply(input.to(torch.get_autocast_dtype(kind)), weight, bias, True, transposed)


_PLAIN = nn.Linear.forward, F.linear  # who has replaced one of them (a quantiser, say) gets the plain layer


@register
class Linear(FusedLayer, nn.Linear):
    """Stands in for `nn.Linear` while a `Lomo` with ``fused_layers=True`` manages its weight."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        if not takes_part(weight, input) or (nn.Linear.forward, F.linear) != _PLAIN:
            return super().forward(input)
        return fused_linear(input, weight, self.bias)
