"""What fused layers have in common."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

#: Plain tensors and parameters; those of a simulation (`lomo_kernels.plan`) are FakeTensors, both.
PLAIN = (Tensor, nn.Parameter, FakeTensor)
PLAIN_PARAMETER = (nn.Parameter, FakeTensor)


class FusedLayer(nn.Module):
    """A layer that hands its weight's gradient over in factors, or one without a weight that keeps less for backward.
    Copied and pickled, it is the plain one."""

    #: The class that it stands in for.
    plain: ClassVar[type[nn.Module]]
    #: Whether it has no weight of its own, and only keeps less for backward than the plain one.
    keeps_less: ClassVar[bool] = False

    @staticmethod
    def weight_of(module: nn.Module) -> Any:
        """The parameter of a module of the plain class whose gradient is handed over in factors; None if it has
        none."""
        return module._parameters.get("weight")

    @staticmethod
    def reason_to_keep(module: nn.Module) -> str | None:
        """Why a module of the plain class keeps its weight's gradient, in words for `Lomo.summary`; None if it need
        not."""
        return None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = super().__reduce_ex__(2)[2]
        # Nothing of this library is in a pickle; pickle refuses the usual copyreg.__newobj__ for another class.
        return copyreg._reconstructor, (self.plain, object, None), state  # type: ignore[attr-defined]


_Fused = TypeVar("_Fused", bound=type[FusedLayer])
_Maker = Callable[[type[nn.Module]], type[FusedLayer]]

_by_class: dict[type[nn.Module], type[FusedLayer]] = {}
_by_name: dict[str, _Maker] = {}
_by_form: list[Callable[[type[nn.Module]], type[FusedLayer] | None]] = []


def register(fused_class: _Fused) -> _Fused:
    """Lets `fused_class` stand in for modules whose type is exactly its `plain`. A class decorator."""
    # What shows the class to people and tools (repr, summaries, graph tracers) shows the plain one.
    for name in ("__module__", "__name__", "__qualname__"):
        setattr(fused_class, name, getattr(fused_class.plain, name))
    _by_class[fused_class.plain] = fused_class
    return fused_class


def register_by_name(plain_name: str) -> Callable[[_Maker], _Maker]:
    """`register` for a class of a package that may not be installed: what is decorated makes the fused class from the
    plain one, "module.Class", when a model first has such a layer."""

    def decorate(make: _Maker) -> _Maker:
        _by_name[plain_name] = make
        return make

    return decorate


def register_by_form(
    make: Callable[[type[nn.Module]], type[FusedLayer] | None],
) -> Callable[[type[nn.Module]], type[FusedLayer] | None]:
    """`register` for classes of any name: what is decorated makes the fused class from the plain one, or returns None
    if it is no such layer."""
    _by_form.append(make)
    return make


def fused_class_of(module: nn.Module) -> type[FusedLayer] | None:
    """The class that stands in for the module's; None if there is none, as for a subclass."""
    kind = type(module)
    if "plain" in vars(kind) and issubclass(kind, FusedLayer):
        return kind
    if kind not in _by_class:
        make = _by_name.get(f"{kind.__module__}.{kind.__qualname__}")
        made = [make(kind)] if make else [of_form for each in _by_form if (of_form := each(kind))]
        for fused_class in made:
            register(fused_class)
    return _by_class.get(kind)


def weight_of(module: nn.Module) -> Any:
    """The module's weight as a fused layer has it: see `FusedLayer.weight_of`."""
    fused_class = fused_class_of(module)
    return module._parameters.get("weight") if fused_class is None else fused_class.weight_of(module)


def takes_part(weight: Any, input: Tensor) -> bool:
    """Whether this call can be one whose backward is ours; else it has to be the plain layer's.

    Not with a weight exchanged for something that is no plain parameter (a DTensor, a parametrization), nor if there is
    no gradient; see also `is_plain_call`.
    """
    return type(weight) in PLAIN_PARAMETER and weight.requires_grad and is_plain_call(input)


def is_plain_call(input: Any) -> bool:
    """Whether ordinary torch code calls a layer with this input, to be differentiated by autograd.

    Not under torch.compile, torch.func, forward-mode differentiation or tracing, which cannot see through our backward;
    not with an input that is no plain tensor (nested, or without storage); not without gradients, nor if somebody's
    function mode is to see `F.linear` (one that only sets the default device does not).
    """
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and type(input) in PLAIN
        and input.layout is torch.strided
        and not input.is_nested
        and not input.is_meta
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._is_tracing()
        and all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )
