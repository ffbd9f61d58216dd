"""What does the device itself reach: a copy, a read, a matrix product?"""

from __future__ import annotations

import torch

BYTES = {"cpu": 2**28, "cuda": 2**31}  # of the copied tensor
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices


def copy(device):
    source, target = (torch.zeros(BYTES[device], dtype=torch.uint8, device=device) for _ in range(2))
    return lambda _: target.copy_(source), {"moved": 2 * source.nbytes}


def read(device):
    source = torch.zeros(BYTES[device] // 4, device=device)
    return lambda _: source.max(), {"moved": source.nbytes}


def product(device):
    """Of random numbers: with zeros a GPU draws less power and runs faster."""
    a, b = (torch.randn(SIDE[device], SIDE[device], device=device).bfloat16() for _ in range(2))
    return lambda _: a @ b, {"operations": 2 * SIDE[device] ** 3}


IMPLEMENTATIONS = {call.__name__: call for call in (copy, read, product)}


def parameters(device, full):
    return {"implementation": IMPLEMENTATIONS}


def test_ceiling(paired, implementation, device):
    call, work = IMPLEMENTATIONS[implementation](device)
    paired(call, **work)
