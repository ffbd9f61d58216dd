"""What fused layers have in common."""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

#: Plain tensors and parameters; those of a simulation (`lomo_kernels.plan`) are FakeTensors, both.
PLAIN = (Tensor, nn.Parameter, FakeTensor)
PLAIN_PARAMETER = (nn.Parameter, FakeTensor)


class FusedLayer(nn.Module):
    """A layer that hands its weight's gradient over in factors. Copied and pickled, it is the plain one."""

    plain: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = super().__reduce_ex__(2)[2]
        # Nothing of this library is in a pickle; pickle refuses the usual copyreg.__newobj__ for another class.
        return copyreg._reconstructor, (self.plain, object, None), state  # type: ignore[attr-defined]


def takes_part(weight: Any, input: Tensor) -> bool:
    """Whether this call can be one whose backward is ours; else it has to be the plain layer's.

    Not under torch.compile, torch.func, forward-mode differentiation or tracing, which cannot see through our backward;
    not with a weight exchanged for something that is no plain parameter (a DTensor, a parametrization), nor with an
    input that is no plain tensor (nested, or without storage); not where there is no gradient, nor where somebody's
    function mode is to see `F.linear` (one that only sets the default device does not).
    """
    return (
        not torch.compiler.is_compiling()
        and type(weight) in PLAIN_PARAMETER
        and weight.requires_grad
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
