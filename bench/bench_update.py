"""How near is ``sgd_`` to the memory's bandwidth, and how does it compare with torch's own updates?

Every contestant is charged with the same bytes, those the work needs: parameter and gradient read once, the parameter
written once. What makes several passes over them comes out slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from measure import DTYPES, Contestant, bandwidth_rows, bandwidth_under_pytest, race, ring, short, update_probe
from torch import Tensor

from lomo_kernels import ops, reference

SHAPE = (4096, 4096)
LR, WEIGHT_DECAY = 0.5, 0.01
DECAY = 1 - LR * WEIGHT_DECAY
SCALARS = {"weight_decay": WEIGHT_DECAY, "inv_scale": 0.5, "clip_value": 0.03, "clip_coef": 0.7}
SCALAR_TENSORS = {name: torch.tensor([value], dtype=torch.float64) for name, value in SCALARS.items()}
SCALAR_TENSORS["found_inf"] = torch.zeros(1, dtype=torch.float64)
SLOT = torch.zeros(1, dtype=torch.float64)
LR_TENSOR = torch.tensor([LR], dtype=torch.float64)  # as the optimizer hands it over


class Item(NamedTuple):
    param: Tensor
    grad: Tensor
    sgd: torch.optim.SGD


class Way(NamedTuple):
    """One way to update; `expected` are the arguments of `reference.updated`, `exact` asks for equal bits."""

    update: Callable[[Item], object]
    expected: dict[str, Any]
    exact: bool


def _ours(expected: dict[str, Any], **arguments: Any) -> Way:
    return Way(lambda item: ops.sgd_(item.param, item.grad, lr=LR_TENSOR, **arguments), expected, exact=True)


WAYS = {
    "sgd_": _ours({}),
    "sgd_ stochastic": _ours({"stochastic": True}, rounding="stochastic"),
    "sgd_ every scalar": _ours(SCALARS, **SCALAR_TENSORS),
    "sgd_ and its norm": _ours({}, sq_norm=SLOT),
    "torch add_": Way(lambda item: item.param.add_(item.grad, alpha=-LR), {}, exact=False),
    "torch mul_, add_": Way(
        lambda item: item.param.mul_(DECAY).add_(item.grad, alpha=-LR), {"weight_decay": WEIGHT_DECAY}, exact=False
    ),
    # Not fused=True: on CPU it is broken for 16-bit parameters in torch 2.13.
    "torch SGD foreach": Way(lambda item: item.sgd.step(), {}, exact=False),
}


def make_item(dtype: torch.dtype, shape: tuple[int, int] = SHAPE) -> Item:
    param, grad = (torch.empty(shape).normal_(std=0.02).to(dtype) for _ in range(2))
    param.grad = grad
    return Item(param, grad, torch.optim.SGD([param], lr=LR, foreach=True))


def validate(way: Way, dtype: torch.dtype) -> None:
    """Raises AssertionError unless `way` gives the reference's bits, or torch's are within two roundings of them."""
    item = make_item(dtype, (1023, 1025))
    wanted = reference.updated(item.param, item.grad, lr=LR, **way.expected)
    way.update(item)
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": 0, "atol": 0} if way.exact else {"rtol": 2 * eps, "atol": 0.1 * eps}
    torch.testing.assert_close(item.param, wanted, **tolerance)


def nbytes(dtype: torch.dtype) -> int:
    return SHAPE[0] * SHAPE[1] * dtype.itemsize


@lru_cache(maxsize=1)  # one dtype's buffers at a time
def contestants(dtype: torch.dtype) -> list[Contestant]:
    """The probe, then every way."""
    items = ring(lambda: make_item(dtype), 2 * nbytes(dtype))
    return [update_probe(nbytes(dtype)), *(Contestant(name, items, way.update) for name, way in WAYS.items())]


def run(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in DTYPES:
        for way in WAYS.values():
            validate(way, dtype)
        probe, *others = contestants(dtype)
        times = race([probe, *others], rounds)
        rows += bandwidth_rows(times, probe.name, 3 * nbytes(dtype), dtype=short(dtype))
    contestants.cache_clear()
    return rows


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def bench_update(benchmark, dtype, name):
    validate(WAYS[name], dtype)
    probe, *others = contestants(dtype)
    contestant = next(other for other in others if other.name == name)
    bandwidth_under_pytest(benchmark, contestant, probe, 3 * nbytes(dtype))
