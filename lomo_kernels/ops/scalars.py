"""The scalars of an update: one float64 vector in a fixed order, which every update operator takes.

The vector lies on the parameter's device, and then the host never reads it. Or it lies on the CPU: then the host reads
it during the call, and kernels get numbers. The step is an int64 whose bits stand in the last element.
"""

from __future__ import annotations

import functools
import math
import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._arguments import FINITE, check_number, is_number_tensor, is_step_tensor, stream_handle


class Field(NamedTuple):
    """A scalar: its neutral value, which changes no bit of an update, and the range of its numbers."""

    neutral: float
    low: float = 0.0
    open_: bool = False  # whether `low` itself is outside the range
    high: float = FINITE

    @property
    def range(self) -> tuple[float, bool, float]:
        return self[1:]


FIELDS = {
    "lr": Field(0.0),
    "weight_decay": Field(0.0),
    "inv_scale": Field(1.0, open_=True),
    "clip_value": Field(math.inf, open_=True, high=math.inf),
    "clip_coef": Field(1.0),
    "found_inf": Field(0.0, high=math.inf),
    "step": Field(0.0),
}
NAMES = tuple(FIELDS)
NEUTRAL = tuple(field.neutral for field in FIELDS.values())
STEP = NAMES.index("step")
#: What makes the clipped gradient of a gradient.
CLIPPING = ("inv_scale", "clip_value", "clip_coef")
#: Of the float64 numbers.
POSITIONS = {name: i for i, name in enumerate(NAMES) if i != STEP}


def vector(op: str, device: torch.device, scalars: Mapping[str, Any]) -> Tensor:
    """The scalars as the vector that an operator takes; on the CPU if all are numbers, else on `device`.

    Args:
        scalars: by name, numbers or one-element tensors on `device`. None, or no entry: the neutral value.

    Raises:
        TypeError, ValueError: no lr; see also `check_number`, `is_number_tensor` and `is_step_tensor`.
    """
    if scalars.get("lr") is None:
        raise TypeError(f"{op}: lr is None, expected a number or a one-element tensor")
    numbers, tensors = list(NEUTRAL), []
    for name, value in scalars.items():
        position = POSITIONS.get(name)
        if position is None or value is None:
            continue
        if is_number_tensor(op, name, value, device):
            tensors.append((position, value))
        else:
            check_number(op, name, value, *FIELDS[name].range)
            numbers[position] = value
    step = scalars.get("step", 0)
    moving = is_step_tensor(op, step, device)
    if not (tensors or moving):
        return _on_host(numbers, step)
    pieces = list(_constants(device, numbers))
    for position, tensor in tensors:
        pieces[position] = tensor.detach().reshape(1).double()
    if moving:
        pieces[STEP] = step.reshape(1).view(torch.float64)
    elif step:
        pieces[STEP] = torch.full((1,), step, dtype=torch.int64, device=device).view(torch.float64)
    # One launch. On an H100's host a launch for each scalar took longer than `sgd_` of 16 million elements.
    return torch.cat(pieces)


def _is_traced() -> bool:
    """Whether somebody must see every call of torch's."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _on_host(numbers: list[float], step: int) -> Tensor:
    if _is_traced():  # else a buffer of Python's takes 1 us, torch.tensor 5
        made = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        if step:
            made.view(torch.int64)[STEP] = step
        return made
    buffer = array("d", numbers)
    if step:
        struct.pack_into("q", buffer, STEP * buffer.itemsize, step)
    return torch.frombuffer(buffer, dtype=torch.float64)


def _constants(device: torch.device, numbers: list[float]) -> tuple[Tensor, ...]:
    """The numbers as tensors of one element on the device. Those on a GPU are kept, each stream's for itself: no other
    stream waits until they are filled."""
    if device.type == "cpu":
        return _on_host(numbers, 0).split(1)
    if device.type != "cuda" or _is_traced() or torch.cuda.is_current_stream_capturing():
        return _filled(device, numbers)
    return _kept(device, stream_handle(device), tuple(numbers))


@functools.lru_cache(maxsize=64)  # a learning rate that is a number, beside a scalar tensor, changes in each step
def _kept(device: torch.device, stream: int, numbers: tuple[float, ...]) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):  # else autograd would refuse them outside of such a mode
        return _filled(device, numbers)


def _filled(device: torch.device, numbers: Sequence[float]) -> tuple[Tensor, ...]:
    """Filled there: a copy from the host's memory would make the host wait."""
    made = torch.zeros(len(NAMES), dtype=torch.float64, device=device)
    for position, number in enumerate(numbers):
        if number:
            made[position].fill_(number)
    return made.split(1)


def check_vector(op: str, scalars: Tensor, device: torch.device) -> None:
    """Raises TypeError or ValueError unless `scalars` is a vector as `vector` makes it, on `device` or the CPU."""
    if not isinstance(scalars, Tensor):
        raise TypeError(f"{op}: scalars is a {type(scalars).__name__}, expected a tensor")
    if scalars.dtype != torch.float64 or scalars.shape != (len(NAMES),) or not scalars.is_contiguous():
        raise ValueError(
            f"{op}: scalars has shape {list(scalars.shape)}, strides {scalars.stride()} and dtype {scalars.dtype}, "
            f"expected {len(NAMES)} contiguous float64 elements: {', '.join(NAMES)}"
        )
    if scalars.device != device and scalars.device.type != "cpu":
        raise ValueError(f"{op}: scalars is on {scalars.device}, expected {device} or the CPU")


def without_clipping(scalars: Tensor) -> Tensor:
    """A copy of a vector for an update whose gradient was clipped already."""
    copy = scalars.clone()
    for name in CLIPPING:
        copy[POSITIONS[name]].fill_(FIELDS[name].neutral)
    return copy


def numbers_of(scalars: Tensor) -> dict[str, Any]:
    """The numbers of a vector by name, for backends that read them."""
    made: dict[str, Any] = dict(zip(NAMES, scalars.tolist(), strict=True))
    made["step"] = int(scalars.view(torch.int64)[STEP].item())
    return made
