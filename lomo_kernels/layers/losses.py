"""torch's and Liger's names for a head with its loss: `nn.LinearCrossEntropyLoss` and `F.linear_cross_entropy` (torch
2.13), and Liger's fused linear cross entropy. A model goes on calling these; see `head` for what runs.

The functions get a weight and know no layer. So functions of ours stand in for them while some `Lomo` fuses layers.
Ours takes a call whose weight belongs to a fused layer. The plain function has every other call, and those with an
option that ours lacks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from .factors import factor_sinks
from .fused import FusedLayer, register
from .head import loss_by_blocks

#: What ours has, of torch and of Liger.
_KNOWN = ("input", "weight", "target", "bias", "class_weight", "reduction", "ignore_index", "label_smoothing")
#: How a plain function uses memory, and in which dtype it adds up. Ours adds up in float32.
_OF_NO_EFFECT = ("options", "accum_dtype", "chunk_mem_const", "ce_impl", "ce_mode")
_TORCHS = {"linear_weight": "weight", "linear_bias": "bias", "weight": "class_weight"}
_LIGERS = {"_input": "input", "ce_weight": "class_weight"}

_PLAIN = F.linear, F.cross_entropy  # see linear.py
_stand_ins: list[tuple[Any, str, Any, partial[None]]] = []  # what has the function, its name, ours, what undoes it


def stand_in() -> None:
    """Exchanges the functions if some weight belongs to a fused layer, and puts the plain ones back if none does.

    Liger's is exchanged once somebody has imported it.
    """
    if factor_sinks:
        for owner, name, make in _functions():
            if all(owner is not other for other, *_ in _stand_ins):
                plain = inspect.getattr_static(owner, name)
                own = name in vars(owner)  # not inherited
                undo = partial(setattr, owner, name, plain) if own else partial(delattr, owner, name)
                _stand_ins.append((owner, name, make(plain), undo))
                setattr(owner, name, _stand_ins[-1][2])
    with contextlib.suppress(IndexError):  # until the list is empty: another thread may empty it, too
        while not factor_sinks:
            owner, name, ours, undo = _stand_ins.pop()
            if vars(owner).get(name) is ours:  # else somebody has exchanged it since
                undo()


def _functions() -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
    if hasattr(F, "linear_cross_entropy"):
        yield F, "linear_cross_entropy", _torchs
    liger = sys.modules.get("liger_kernel.ops")
    function = getattr(liger, "LigerFusedLinearCrossEntropyFunction", None)
    if function is not None:
        yield function, "apply", _ligers


def _torchs(plain: Any) -> Any:
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Any:
        if _is_fused(linear_weight) and (F.linear, F.cross_entropy) == _PLAIN:
            loss = _loss(signature, _TORCHS, (input, linear_weight, target), options)
            if loss is not None:
                return loss
        tensors = input, linear_weight, target, options.get("linear_bias"), options.get("weight")
        if has_torch_function(tensors):  # the plain one would name us as what was called
            return handle_torch_function(plain, tensors, input, linear_weight, target, **options)
        return plain(input, linear_weight, target, **options)

    return linear_cross_entropy


def _ligers(plain: Any) -> Any:
    """`apply` of Liger's `torch.autograd.Function`, which its functions and modules call."""

    def apply(cls: Any, *args: Any) -> Any:
        if len(args) > 2 and _is_fused(args[1]):
            signature = _signature(cls.forward)
            loss = _loss(signature, _LIGERS, args, {}, of_liger=True)
            if loss is not None:
                return loss, *(None for name in signature.parameters if name.startswith("return_"))
        return plain.__func__(cls, *args)

    return classmethod(apply)


@functools.lru_cache(maxsize=8)
def _signature(forward: Any) -> inspect.Signature:
    """That of `apply`, from a Function's `forward`: without the context. Kept, because each step asks."""
    _, *parameters = inspect.signature(forward).parameters.values()
    return inspect.Signature(parameters)


def _is_fused(weight: Any) -> bool:
    return not torch.compiler.is_compiling() and id(weight) in factor_sinks


def _loss(
    signature: inspect.Signature,
    names: dict[str, str],
    args: tuple[Any, ...],
    options: dict[str, Any],
    *,
    of_liger: bool = False,
) -> Tensor | None:
    """What a call of a plain function returns, by blocks; None if ours cannot.

    Args:
        names: our names of its arguments, if they differ.
        of_liger: the loss is float32, and the mean of no token is 0 in place of NaN.
    """
    try:
        bound = signature.bind(*args, **options)
    except TypeError:
        return None
    bound.apply_defaults()
    given = {names.get(name, name): value for name, value in bound.arguments.items()}
    if not given.keys() >= set(_KNOWN):
        return None
    for name, parameter in signature.parameters.items():
        if names.get(name, name) not in (*_KNOWN, *_OF_NO_EFFECT) and bound.arguments[name] != parameter.default:
            return None
    dtype = torch.float32 if of_liger else None
    loss = loss_by_blocks(**{name: given[name] for name in _KNOWN}, dtype=dtype)
    if of_liger and loss is not None and given["reduction"] == "mean":
        loss = torch.where((given["target"] != given["ignore_index"]).any(), loss, 0.0)
    return loss


if hasattr(nn, "LinearCrossEntropyLoss"):
    _PLAIN_FORWARD = nn.LinearCrossEntropyLoss.forward

    @register
    class LinearCrossEntropyLoss(FusedLayer, nn.LinearCrossEntropyLoss):
        """Stands in for `nn.LinearCrossEntropyLoss` while a `Lomo` with ``fused_layers=True`` manages its weight."""

        plain = nn.LinearCrossEntropyLoss

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            if self.out_features or nn.LinearCrossEntropyLoss.forward is not _PLAIN_FORWARD:
                return super().forward(input, target)
            return F.linear_cross_entropy(  # as torch's, which hands over views of weight and bias
                input,
                self.linear.weight,
                target,
                linear_bias=self.linear.bias,
                weight=self.weight,
                reduction=self.reduction,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                options=self.options,
            )

        @staticmethod
        def weight_of(module: nn.Module) -> Any:
            linear = module.linear
            return linear._parameters.get("weight") if isinstance(linear, nn.Module) else None

        @staticmethod
        def reason_to_keep(module: nn.Module) -> str | None:
            return "out_features" if module.out_features else None
