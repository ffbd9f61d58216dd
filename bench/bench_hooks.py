"""What does an update inside backward cost per small parameter, where no kernel's bandwidth matters?

The time of backward with update, minus that of a bare backward of the same graph that leaves its gradients in
``.grad``, over the number of parameters. Half of them have 256 elements, as norms have, half 64 x 64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import ROUNDS, Contestant, race, run_under_pytest, short, spread
from torch import Tensor, nn

from lomo_kernels import Lomo, reference

LR = 0.5
COUNTS = (291, 723)  # of a transformer of 32 layers with nine parameters each, and of one of 80
DTYPES = (torch.float32, torch.bfloat16)
BARE = "bare backward"


class Small(nn.Module):
    """Parameters without layers: the gradient of each is one elementwise product."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = [(256,), (64, 64)]
        new = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shapes[i % 2], generator=new).mul_(0.02).to(dtype)) for i in range(count)
        )
        self.factors = [torch.randn(weight.shape, generator=new).mul_(0.02).to(dtype) for weight in self.weights]

    def forward(self) -> Tensor:
        return torch.stack([(w * x).sum() for w, x in zip(self.weights, self.factors, strict=True)]).sum()


Backward = Callable[[Tensor], object]


def _bare(model: Small) -> Backward:
    return torch.Tensor.backward


def _lomo(model: Small) -> Backward:
    return Lomo(model, lr=LR).backward


def _plain_hook(model: Small) -> Backward:
    """The recipe of torch's tutorial on optimizer steps in backward, without an optimizer."""

    @torch.no_grad()
    def update(param: Tensor) -> None:
        param.add_(param.grad, alpha=-LR)
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(update)
    return torch.Tensor.backward


def _lomo_optim(model: Small) -> Backward:
    from lomo_optim import Lomo as LomoOptim

    optimizer = LomoOptim(model, lr=LR)
    return lambda loss: optimizer.fused_backward(loss, LR)


def _optimi(model: Small) -> Backward:
    import optimi

    # Plain SGD as the others: Kahan summation would be on by default for bfloat16, and needs a second buffer.
    optimizer = optimi.SGD(model.parameters(), lr=LR, kahan_sum=False, gradient_release=True)
    optimi.prepare_for_gradient_release(model, optimizer)
    return torch.Tensor.backward


WAYS: dict[str, Callable[[Small], Backward]] = {
    "lomo_kernels Lomo": _lomo,
    "torch hook, add_": _plain_hook,
    "lomo_optim Lomo": _lomo_optim,
    "optimi SGD": _optimi,
}


def validate(model: Small, backward: Backward, exact: bool) -> None:
    """Raises AssertionError unless one step gives the reference's weights and leaves no gradient."""
    wanted = [reference.updated(w.detach(), x, lr=LR) for w, x in zip(model.weights, model.factors, strict=True)]
    backward(model())
    for weight, value in zip(model.weights, wanted, strict=True):
        eps = torch.finfo(value.dtype).eps
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 2 * eps, "atol": 0.1 * eps}
        torch.testing.assert_close(weight.detach(), value, **tolerance)
        assert weight.grad is None


def make(name: str, count: int, dtype: torch.dtype) -> Contestant:
    """A contestant with a model of its own, validated; raises ImportError where its package is missing."""
    model = Small(count, dtype)
    backward = WAYS.get(name, _bare)(model)
    if name != BARE:
        validate(model, backward, exact=name == "lomo_kernels Lomo")

    def prepare() -> Tensor:
        model.zero_grad()  # drops what the bare backward left
        return model()

    return Contestant(name, prepare, backward)


def row(bare: list[float], times: list[float], count: int) -> dict[str, Any]:
    """Microseconds per parameter beyond the bare backward."""
    beyond = [1e6 * (t - b) / count for b, t in zip(bare, times, strict=True)]
    return {"us_per_parameter": spread(beyond), "us_per_parameter_of_minima": 1e6 * (min(times) - min(bare)) / count}


def run(rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows, and the rivals that are missing with the reason."""
    rows, missing = [], {}
    for count in COUNTS:
        for dtype in DTYPES:
            entrants = [make(BARE, count, dtype)]
            for name in WAYS:
                try:
                    entrants.append(make(name, count, dtype))
                except ImportError as error:
                    missing[name] = str(error)
            times = race(entrants, rounds)
            bare = times[BARE]
            same = {
                "parameters": count,
                "dtype": short(dtype),
                "bare_us_per_parameter": statistics.median(bare) / count * 1e6,
            }
            rows += [{**same, "name": name, **row(bare, t, count)} for name, t in times.items() if name != BARE]
    return rows, missing


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("count", COUNTS)
def bench_hooks(benchmark, count, dtype, name):
    try:
        contestant = make(name, count, dtype)
    except ImportError as error:
        pytest.skip(str(error))
    bare = run_under_pytest(benchmark, contestant, make(BARE, count, dtype), rounds=ROUNDS)
    if bare:
        found = row(bare, benchmark.stats.stats.data, count)
        benchmark.extra_info["us per parameter"] = round(found["us_per_parameter"]["median"], 2)
        benchmark.extra_info["of minima"] = round(found["us_per_parameter_of_minima"], 2)
