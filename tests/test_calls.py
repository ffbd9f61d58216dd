"""How many Python functions of this package one further parameter costs: a slope, from two models of different depth.

On small layers the optimizer's time is these calls: some 0.1 us each on one thread of Zen 4, where a kernel takes 1 us.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import Processes
from torch import Tensor, nn

import lomo_kernels
from lomo_kernels import Lomo

PACKAGE = os.path.dirname(lomo_kernels.__file__) + os.sep
FEW, MANY = 4, 20
#: Above `SMALL_BYTES` in bfloat16: smaller gradients wait for a list call, and cost less.
WIDTH = 192

OPTIONS: dict[str, dict[str, Any]] = {
    "hook": {},
    "two passes": {"clip_grad_norm": 1.0, "clip_passes": "two"},
    "fused, one pass": {"clip_grad_norm": 1.0, "clip_passes": "one", "fused_layers": True},
    "data parallel": {},  # with a process group
}
#: Calls per further parameter that each way may take.
LIMITS = {"hook": 6, "two passes": 10, "fused, one pass": 40, "data parallel": 25}


def calls_of(work: Callable[[], Any]) -> Counter[str]:
    """How often each function of the package was entered: comprehensions and resumed generators count."""
    counts: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            counts[f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_qualname}"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return counts


def step_calls(layers: int, dtype: torch.dtype, options: dict[str, Any]) -> Counter[str]:
    """The calls of a step's backward, in a step like all but the first."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(layers)))
    data = torch.randn(8, WIDTH, dtype=dtype)

    def loss() -> Tensor:
        result: Tensor = model(data).square().mean()
        return result

    with Lomo(model, lr=1e-3, **options) as optimizer:
        for _ in range(3):  # the first checks the graph, the next ones know it
            optimizer.backward(loss())
        value = loss()
        return calls_of(lambda: optimizer.backward(value))


def per_parameter(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, float]:
    """Calls of each function for one further parameter."""
    few, many = step_calls(FEW, dtype, options), step_calls(MANY, dtype, options)
    return {name: count / (MANY - FEW) for name in many if (count := many[name] - few[name])}


def on_rank(rank: int, dtype: torch.dtype) -> dict[str, float]:
    return per_parameter(dtype, {"process_group": dist.group.WORLD})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", OPTIONS)
def test_a_further_parameter_takes_few_calls(way: str, dtype: torch.dtype, ranks: Callable[[int], Processes]) -> None:
    calls = ranks(2).call(on_rank, dtype)[0] if way == "data parallel" else per_parameter(dtype, OPTIONS[way])
    assert 0 < sum(calls.values()) <= LIMITS[way], "\n".join(f"{count:6.2f} {name}" for name, count in calls.items())
