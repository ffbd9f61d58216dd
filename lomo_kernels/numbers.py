"""Formulas of numbers, not of elements: the coefficient of clipping by norm, the key of a parameter's random bits, and
sizes in bytes.

``csrc/numerics.h`` states the keys once more for C++.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

MASK64 = 0xFFFFFFFFFFFFFFFF


def clip_coefficient(total_sq_norm: Tensor, clip_grad_norm: float | Tensor) -> Tensor:
    """``min(1, clip_grad_norm / (norm + 1e-6))`` in float64, as `torch.nn.utils.clip_grad_norm_` has it."""
    return (clip_grad_norm / (total_sq_norm.double().sqrt() + 1e-6)).clamp(max=1.0)


def mix64(z: int) -> int:
    """A bijection of 64-bit integers: increment and finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = (z + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def parameter_key(seed: int, parameter_id: int) -> int:
    """The part of `stream_key` that is the same in every step."""
    return mix64(mix64(seed & MASK64) ^ (parameter_id & MASK64))


def stream_key(seed: int, parameter_id: int, step: int) -> int:
    """The 64-bit key of one parameter's random bits in one step."""
    return mix64(parameter_key(seed, parameter_id) ^ (step & MASK64))


def shown(value: object) -> str:
    """A value in a message. Python refuses to write out an int of thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return f"an int of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def bytes_of(text: str, units: Mapping[str, int]) -> float | None:
    """Bytes that a text such as "2GiB" or "1.5 GB" names. None if it names none.

    Args:
        units: bytes of each unit, in capitals. A number without a unit is accepted if ``""`` is one of them.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = units.get(match[2].upper()) if match else None
    return None if match is None or unit is None else float(match[1]) * unit
