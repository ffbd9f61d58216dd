"""Gated feed-forward layers (SwiGLU): ``down(silu(gate(x)) * up(x))``. They have no weight of their own. Fused, they
keep less for backward.

torch keeps gate(x), silu(gate(x)) and up(x), and its backward has three more tensors of their size at one time. Here
backward computes silu(gate(x)) again, and has two tensors less at one time: in a checkpoint four in place of six. The
numbers are the same, bit for bit.

A class is known by the bytecode of its `forward`: one of `_FORMS`, whatever its layers are called. So this serves
Llama, Mistral, Qwen and some hundred other models of Transformers. A class with another formula stays as it is.
"""

from __future__ import annotations

import typing
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import FusedLayer, is_plain_call, register_by_form

#: Bodies of `forward(self, x)`. The numbers stand for names, in the order in which bytecode first has them.
_FORMS = (
    "return self.{0}(self.{1}(self.{2}(x)) * self.{3}(x))",  # Transformers
    "y = self.{0}(self.{1}(self.{2}(x)) * self.{3}(x)); return y",
    "return self.{0}({1}.{2}(self.{3}(x)) * self.{4}(x))",  # F.silu
    "return {0}({1}.{2}, self.{3}({4}.{5}(self.{6}(x)) * self.{7}(x)))",  # the same in cast(torch.Tensor, …)
)
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
    if code.co_argcount != 2 or code.co_freevars or not 4 <= len(code.co_names) <= 8:
        return None
    for form in _FORMS:
        names = code.co_names
        if form.count("{") != len(names):
            continue
        *before, gate, up = names
        imported = names[0] if len(before) == 2 else before[-2]
        if code.co_code != _code_of(form.format(*names), imported):
            continue
        if len(before) == 2:
            down, activation = before
            return _Names(gate, up, down, activation)
        down, module, silu = before[-3:]
        has_cast = len(before) > 3
        if getattr(forward.__globals__.get(module), silu, None) is F.silu and (
            not has_cast or forward.__globals__.get(names[0]) is typing.cast
        ):
            return _Names(gate, up, down, None)
    return None


def _code_of(body: str, imported: str) -> bytes:
    # Python compiles a call of a function of an imported module in another way than a method call.
    module = compile(f"import {imported}\ndef forward(self, x): {body}", "<form>", "exec")
    (code,) = (constant for constant in module.co_consts if isinstance(constant, CodeType))
    return code.co_code


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
