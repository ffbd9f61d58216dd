"""How near is ``sq_norm_`` to the memory's bandwidth, and how right is it on large tensors?"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from measure import DTYPES, Contestant, bandwidth_rows, bandwidth_under_pytest, race, read_probe, ring, short
from torch import Tensor

from lomo_kernels import ops, reference

SHAPE = (4096, 4096)
LARGE = 33_554_432


def _sq_norm(grad: Tensor) -> Tensor:
    slot = torch.zeros(1, dtype=torch.float64)
    ops.sq_norm_(slot, grad)
    return slot


def _as_norm(way: Callable[[Tensor], Tensor], grad: Tensor) -> float:
    value = way(grad).double().item()
    return value**0.5 if way is _sq_norm else value


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "sq_norm_": _sq_norm,
    "torch vector_norm": torch.linalg.vector_norm,
    "torch vector_norm, float32": lambda grad: torch.linalg.vector_norm(grad, dtype=torch.float32),
}


def error(way: Callable[[Tensor], Tensor], grad: Tensor) -> float:
    """Relative error of the norm against float64."""
    wanted = reference.sum_of_squares(grad).sqrt().item()
    return abs(_as_norm(way, grad) / wanted - 1)


def validate(dtype: torch.dtype) -> None:
    """Raises AssertionError unless ``sq_norm_`` is within 1e-6 of the reference (half of that for its root)."""
    found = error(_sq_norm, make_grad(dtype))
    assert found < 0.5e-6, f"sq_norm_ of {short(dtype)} is off by {found}"


def make_grad(dtype: torch.dtype) -> Tensor:
    return torch.empty(SHAPE).normal_(std=0.02).to(dtype)


def nbytes(dtype: torch.dtype) -> int:
    return SHAPE[0] * SHAPE[1] * dtype.itemsize


@lru_cache(maxsize=1)  # one dtype's buffers at a time
def contestants(dtype: torch.dtype) -> list[Contestant]:
    """The probe, then every way."""
    grads = ring(lambda: make_grad(dtype), nbytes(dtype))
    return [read_probe(grads, nbytes(dtype)), *(Contestant(name, grads, way) for name, way in WAYS.items())]


def run(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in DTYPES:
        validate(dtype)
        probe, *others = contestants(dtype)
        times = race([probe, *others], rounds)
        rows += bandwidth_rows(times, probe.name, nbytes(dtype), dtype=short(dtype))
    contestants.cache_clear()
    return rows


def run_accuracy() -> list[dict[str, Any]]:
    rows = []
    for dtype in DTYPES:
        grad = torch.empty(LARGE).normal_(generator=torch.Generator().manual_seed(0)).to(dtype)
        for name, way in WAYS.items():
            rows.append({"dtype": short(dtype), "elements": LARGE, "name": name, "relative_error": error(way, grad)})
    return rows


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def bench_norm(benchmark, dtype, name):
    validate(dtype)
    probe, *others = contestants(dtype)
    contestant = next(other for other in others if other.name == name)
    bandwidth_under_pytest(benchmark, contestant, probe, nbytes(dtype))
    if benchmark.stats:
        grad = torch.empty(LARGE).normal_(generator=torch.Generator().manual_seed(0)).to(dtype)
        benchmark.extra_info["relative error"] = error(WAYS[name], grad)
