"""What does the device itself reach: a copy, a read, a matrix product?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

BYTES = {"cpu": 2**28, "cuda": 2**31}  # of the copied tensor
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
CONTESTANTS = ("copy", "read", "product")

Ceiling = tuple[Callable[[int], Any], dict[str, Any]]  # call, case with the bytes moved


def copy(device: str) -> Ceiling:
    source, target = (torch.zeros(BYTES[device], dtype=torch.uint8, device=device) for _ in range(2))
    return lambda _: target.copy_(source), {"moved": 2 * source.nbytes}


def read(device: str) -> Ceiling:
    source = torch.zeros(BYTES[device] // 4, device=device)
    return lambda _: source.max(), {"moved": source.nbytes}


def product(device: str) -> Ceiling:
    """Of random numbers: with zeros a GPU draws less power and runs faster."""
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return lambda _: a @ b, {"dtype": "bfloat16", "side": side}


@pytest.mark.parametrize("ceiling", [copy, read, product], ids=CONTESTANTS)
def test_ceiling(paired, ceiling, device):
    call, case = ceiling(device)
    paired(ceiling.__name__, case, call)
