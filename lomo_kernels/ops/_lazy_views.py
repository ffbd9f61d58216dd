"""Views whose elements torch negates or conjugates when it reads them, such as the imaginary part of a conjugate.

torch gives an operator copies of them. It fails after the update of some operators, and before that of others, if such
a view is to be written. So it is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import library


def resolve_lazy_views(operators: Sequence[str]) -> None:
    """Registers what the operators do with such views."""
    for name in operators:
        for key in ("Negative", "Conjugate"):
            library.impl(name, _call_of(name), key)


def _call_of(name: str) -> Any:
    operator = getattr(torch.ops.lomo_kernels, name).default
    arguments = operator._schema.arguments

    def call(*given: Any) -> Any:
        for argument, value in zip(arguments, given, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in value if isinstance(value, list) else [value]:
                    if tensor is not None and (tensor.is_neg() or tensor.is_conj()):
                        raise ValueError(
                            f"{name}: {argument.name} is a view that negates or conjugates its memory (Tensor.is_neg, "
                            "is_conj), expected one that can be written. Nothing was changed. Pass a copy"
                        )
        return operator(*(_resolved(value) for value in given))

    return call


def _resolved(value: Any) -> Any:
    if isinstance(value, list):
        return [_resolved(each) for each in value]
    return value.resolve_conj().resolve_neg() if isinstance(value, Tensor) else value
