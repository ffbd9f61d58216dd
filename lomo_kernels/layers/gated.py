"""Gated feed-forward layers (SwiGLU): ``down(silu(gate(x)) * up(x))``. They have no weight of their own. Fused, they
keep less for backward.

torch keeps gate(x), silu(gate(x)) and up(x), and its backward has three more tensors of their size at one time. Here
backward computes silu(gate(x)) again, and has two tensors less at one time: in a checkpoint four in place of six. The
numbers are the same, bit for bit.

A class is known by the bytecode of its `forward`: one of `_FORMS`, whatever its layers are called. So this serves
Llama, Mistral, Qwen and some hundred other models of Transformers. A class with another formula stays as it is.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import FusedLayer, is_plain_call, register_by_form

# Formulas of gated layers. The names of the attributes do not count. `F`, `torch` and `cast` are imported here, because
# Python compiles a call of a function of an imported module in another way than a method call.


def _by_module(self: Any, x: Any) -> Any:  # Transformers
    return self.down(self.activation(self.gate(x)) * self.up(x))


def _by_module_named(self: Any, x: Any) -> Any:
    y = self.down(self.activation(self.gate(x)) * self.up(x))
    return y


def _by_function(self: Any, x: Any) -> Any:
    return self.down(F.silu(self.gate(x)) * self.up(x))


def _by_function_cast(self: Any, x: Any) -> Any:
    return cast(torch.Tensor, self.down(F.silu(self.gate(x)) * self.up(x)))


_FORMS = (_by_module, _by_module_named, _by_function, _by_function_cast)
_SILU = F.silu
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


class _Names(NamedTuple):
    """Of a layer's attributes."""

    gate: str
    up: str
    down: str
    activation: str | None  # None: forward calls F.silu


class _SiluMul(torch.autograd.Function):
    """``silu(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None
        of_gate, of_up = ctx.needs_input_grad
        gate, up = ctx.saved_tensors
        grad_gate = grad_up = None
        if torch.is_grad_enabled():  # to be differentiated
            inputs = [tensor for tensor, wanted in ((gate, of_gate), (up, of_up)) if wanted]
            grads = iter(torch.autograd.grad(F.silu(gate) * up, inputs, grad, create_graph=True))
            return next(grads) if of_gate else None, next(grads) if of_up else None
        if of_gate:
            grad_gate = grad * up
            torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        del up  # a checkpoint's is freed
        if of_up:
            grad_up = F.silu(gate).mul_(grad)
        return grad_gate, grad_up


@register_by_form
def gated(plain_class: type[nn.Module]) -> type[FusedLayer] | None:
    """The fused class; None if `plain_class` is no gated layer."""
    untouched: Any = plain_class.forward
    found = _names_in(untouched)
    if found is None:
        return None
    names = found

    class Gated(FusedLayer, plain_class):  # type: ignore[misc, valid-type]
        """Stands in for a gated layer while a `Lomo` with ``fused_layers=True`` manages a weight in it."""

        plain = plain_class
        keeps_less = True

        def forward(self, x: Tensor) -> Tensor:
            activation = None if names.activation is None else getattr(self, names.activation)
            if not is_plain_call(x) or plain_class.forward is not untouched or not _is_silu(activation):
                return super().forward(x)
            gate, up = getattr(self, names.gate)(x), getattr(self, names.up)(x)
            down = getattr(self, names.down)
            if _can_multiply(gate, up):
                return down(_SiluMul.apply(gate, up))
            return down((F.silu if activation is None else activation)(gate) * up)

    return Gated


def _names_in(forward: Any) -> _Names | None:
    """The names in a `forward` of a gated layer; None if it is another one."""
    if not isinstance(forward, FunctionType):
        return None
    code = forward.__code__
    if code.co_argcount != 2 or code.co_freevars:
        return None
    for form in _FORMS:
        own = form.__code__
        if code.co_code != own.co_code or len(code.co_names) != len(own.co_names):
            continue
        named = dict(zip(own.co_names, code.co_names, strict=True))
        attributes = named["gate"], named["up"], named["down"]
        if "activation" in named:
            return _Names(*attributes, named["activation"])
        called = forward.__globals__
        casts = "cast" not in named or called.get(named["cast"]) is cast
        if casts and getattr(called.get(named["F"]), named["silu"], None) is F.silu:
            return _Names(*attributes, None)
    return None


def _is_silu(activation: Any) -> bool:
    """Whether to call it is to call `F.silu`. Hooks of all modules (`register_module_forward_hook`) do not see it: they
    come and go between a forward and its recomputation in a checkpoint, which have to save the same."""
    if F.silu is not _SILU:
        return False
    if activation is None or activation is F.silu:
        return True
    kind = type(activation)
    silu = kind is nn.SiLU and not activation.inplace
    silu = silu or (kind.__module__, kind.__qualname__) == ("transformers.activations", "SiLUActivation")
    return silu and "forward" not in vars(activation) and not any(getattr(activation, name) for name in _HOOKS)


def _can_multiply(gate: Any, up: Any) -> bool:
    return (
        is_plain_call(gate)
        and is_plain_call(up)
        and gate.dtype is up.dtype
        and gate.is_floating_point()
        and gate.shape == up.shape
        and gate.device == up.device
        and (gate.requires_grad or up.requires_grad)
    )
