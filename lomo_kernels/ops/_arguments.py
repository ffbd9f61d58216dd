"""What the operators' files share: the library that they are defined in, and checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..numbers import shown

#: A number, or a one-element float64 or float32 tensor on the parameter's device that the host never reads.
Scalar = float | Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: The definitions live as long as the process.
library = torch.library.Library("lomo_kernels", "FRAGMENT")


FINITE = torch.finfo(torch.float64).max


def is_number_tensor(op: str, name: str, value: Scalar, device: torch.device) -> bool:
    """Whether a scalar is a tensor. Raises TypeError or ValueError if it is one that no operator takes."""
    if not isinstance(value, Tensor):
        return False
    check_dense(op, name, value)
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, expected one element")
    if value.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected float64 or float32")
    if value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, expected {device}, where the parameter or slot is")
    check_memory(op, name, value)
    return True


def check_number(op: str, name: str, value: float, low: float, open_: bool, high: float) -> None:
    """Raises TypeError unless `value` is a number, ValueError unless it is >= low (> low if `open_`) and <= high."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a number or a one-element tensor")
    above = low < value if open_ else low <= value
    if not above or value > high or (value > FINITE and value != math.inf):  # an int may be more than float64 holds
        bounds = f"{'>' if open_ else '>='} {low:g} and {'finite' if high < math.inf else 'not NaN'}"
        raise ValueError(f"{op}: {name} is {shown(value)}, expected a number {bounds}")


def inv_scale_tensor(op: str, value: Scalar | None, device: torch.device) -> Tensor | None:
    """`inv_scale` as the one-element tensor that the norms take: a float64 CPU tensor for a number."""
    if value is None or is_number_tensor(op, "inv_scale", value, device):
        return value  # type: ignore[return-value]
    check_number(op, "inv_scale", value, 0.0, True, FINITE)  # type: ignore[arg-type]
    return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")  # type: ignore[arg-type]


def check_devices(op: str, like: Tensor, sq_norm: Tensor | None, inv_scale: Tensor | None) -> None:
    """Raises ValueError unless the optional tensors of a raw call are on the device of `like`. `inv_scale` may be on
    the CPU. For fake functions: without it a call with a tensor on "meta" would do nothing, without a word."""
    if sq_norm is not None:
        check_slot(op, "sq_norm", sq_norm, like.device)
    if inv_scale is not None and inv_scale.device not in (like.device, torch.device("cpu")):
        raise ValueError(f"{op}: inv_scale is on {inv_scale.device}, expected {like.device} or the CPU")


#: Set by `lomo_kernels.backends`: chooses the kernels for a device if that was not done yet.
choose_kernels: list[Callable[[torch.device], None]] = []


def check_served(tensor: Tensor) -> None:
    """Chooses the kernels for the tensor's device if that was not done yet. Raises NotImplementedError without any.

    Those for CPU tensors were chosen when the library was imported; a fake tensor needs none.
    """
    if tensor.device.type != "cpu" and not isinstance(tensor, FakeTensor):
        for choose in choose_kernels:
            choose(tensor.device)


def integer(op: str, name: str, value: int) -> int:
    """`value`, checked to be an integer of 64 bits."""
    if not isinstance(value, int):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected an int")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: {name} is {shown(value)}, expected an integer of 64 bits")
    return value


def is_step_tensor(op: str, step: int | Tensor, device: torch.device) -> bool:
    """Whether the step is a tensor. Raises TypeError or ValueError unless it is an integer or a good tensor."""
    if not isinstance(step, Tensor):
        integer(op, "step", step)
        return False
    check_dense(op, "step", step)
    if step.numel() != 1 or step.dtype != torch.int64:
        raise ValueError(f"{op}: step has shape {list(step.shape)} and dtype {step.dtype}, expected one int64 element")
    if step.device != device:
        raise ValueError(f"{op}: step is on {step.device}, expected {device}, where the parameter is")
    check_memory(op, "step", step)
    return True


def check_dense(op: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError unless `tensor` has strides."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested one" if tensor.is_nested else tensor.layout
        raise ValueError(f"{op}: {name} has layout {layout}, expected a dense (strided) tensor")


def check_memory(op: str, name: str, tensor: Tensor) -> None:
    """Raises RuntimeError if a tensor's storage was freed (`untyped_storage().resize_(0)`, as FSDP does). The tensor
    keeps its sizes, and torch reads beyond the memory. ``csrc/checks.h`` has the same for what kernels read."""
    if not torch.compiler.is_compiling() and tensor.numel() and not tensor.untyped_storage().nbytes():
        raise RuntimeError(f"{op}: {name} has a storage of 0 bytes; its memory was freed. Nothing was changed")


def check_element_type(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError or ValueError unless `tensor` is a dense tensor of a dtype the kernels take."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected float32, bfloat16 or float16")
    check_dense(op, name, tensor)


def check_pair(op: str, param: Tensor, grad: Tensor) -> None:
    """Raises TypeError or ValueError unless `grad` can update `param`."""
    check_element_type(op, "param", param)
    check_element_type(op, "grad", grad)
    if grad.shape != param.shape:
        raise ValueError(f"{op}: grad has shape {list(grad.shape)}, param has shape {list(param.shape)}")
    if grad.device != param.device:
        raise ValueError(f"{op}: grad is on {grad.device}, param is on {param.device}")


def check_low(op: str, params: Sequence[Tensor], low: Sequence[Tensor], *, stochastic: bool) -> None:
    """Raises TypeError or ValueError unless `low` is empty or has the low part of each parameter: int16, of the
    parameter's shape and device. That of a float32 parameter has no elements."""
    if not low:
        return
    check_lengths(op, "params", len(params), low=len(low))
    if stochastic:
        raise ValueError(f"{op}: low was given, and rounding is stochastic, expected one of the two")
    for param, part in zip(params, low, strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(f"{op}: low is a {type(part).__name__}, expected an int16 tensor of the parameter's shape")
        check_dense(op, "low", part)
        if param.dtype is torch.float16:
            raise TypeError(
                f'{op}: a parameter is float16, and rounding="split" is for bfloat16; make the parameter bfloat16, or '
                'use rounding="stochastic"'
            )
        if param.dtype is torch.float32:
            if part.numel() or part.dtype is not torch.int16:
                raise ValueError(f"{op}: a float32 parameter has a low part, expected it of bfloat16 parameters only")
        elif part.dtype is not torch.int16 or part.shape != param.shape:
            raise ValueError(
                f"{op}: low has shape {list(part.shape)} and dtype {part.dtype}, expected a dense int16 tensor of the "
                f"parameter's shape {list(param.shape)}"
            )
        if part.device != param.device:
            raise ValueError(f"{op}: low is on {part.device}, the parameter is on {param.device}")


def low_parts(op: str, rounding: str, params: Sequence[Tensor], low: Sequence[Tensor | None]) -> list[Tensor]:
    """The low parts as the operators take them, from one or None per parameter. Empty unless `rounding` is "split".

    Raises:
        TypeError, ValueError: as `check_low`; or a bfloat16 parameter to split has none.
    """
    if rounding != "split":
        if any(part is not None for part in low):
            raise ValueError(f'{op}: low was given, and rounding is {shown(rounding)}, expected "split" or no low')
        return []
    parts = []
    for param, part in zip(params, low, strict=True):
        if part is None and param.dtype is torch.bfloat16:
            raise TypeError(
                f'{op}: low is None and rounding is "split", expected an int16 tensor of the shape of the parameter. '
                "It begins with zeros, and each step changes it together with the parameter"
            )
        parts.append(torch.empty(0, dtype=torch.int16, device=param.device) if part is None else part)
    check_low(op, params, parts, stochastic=False)
    return parts


def check_slot(op: str, name: str, slot: Tensor, device: torch.device) -> None:
    """Raises TypeError or ValueError unless `slot` can take a sum of squares."""
    if not isinstance(slot, Tensor):
        raise TypeError(f"{op}: {name} is a {type(slot).__name__}, expected a float64 tensor of one element")
    check_dense(op, name, slot)
    if slot.numel() != 1 or slot.dtype != torch.float64:
        raise ValueError(
            f"{op}: {name} has shape {list(slot.shape)} and dtype {slot.dtype}, expected one float64 element"
        )
    if slot.device != device:
        raise ValueError(f"{op}: {name} is on {slot.device}, the gradient is on {device}")


def check_shard(op: str, shard: Sequence[int], numel: int) -> list[int]:
    """`shard` as a list. Raises TypeError or ValueError unless it is (offset, row_length, row_stride) without overlap,
    and the last of `numel` elements has an index of 64 bits."""
    numbers = [integer(op, "shard", number) for number in as_list(op, "shard", shard)]
    if len(numbers) != 3 or numbers[0] < 0 or numbers[1] <= 0 or numbers[2] < numbers[1]:
        raise ValueError(
            f"{op}: shard is {tuple(shard)}, expected (offset, row_length, row_stride) with offset >= 0, "
            "row_length > 0 and row_stride >= row_length"
        )
    offset, row_length, row_stride = numbers
    last = offset + (numel - 1) // row_length * row_stride + (numel - 1) % row_length
    if numel and last >= 2**63:
        raise ValueError(
            f"{op}: shard is {tuple(shard)}: the last of {numel} elements has index {last}, beyond 64 bits"
        )
    return numbers


def as_list(op: str, name: str, values: Iterable[Any]) -> list[Any]:
    """`values` as a list. Raises TypeError if it is no list and no tensor of one dimension or more."""
    if not isinstance(values, Iterable) or (isinstance(values, Tensor) and values.dim() == 0):
        raise TypeError(f"{op}: {name} is {shown(values)}, expected a list")
    return list(values)


def check_lengths(op: str, expected: str, count: int, **lists: int) -> None:
    """Raises ValueError unless every list has `count` entries."""
    for name, length in lists.items():
        if length != count:
            raise ValueError(f"{op}: {length} {name} for {count} {expected}, expected one each")


def stream_handle(device: torch.device) -> int:
    """CUDA's handle of the stream current on a GPU. `torch.cuda.current_stream` makes an object of it, which took 17 us
    in a profile beside an H200."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))
