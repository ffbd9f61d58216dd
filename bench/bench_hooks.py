"""What does a parameter cost, whose gradient is consumed inside backward?

Backward of many small parameters with an optimizer in it, beside bare autograd, which leaves the gradients: what is
above, over the number of parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .measure import interleave, rounds_for, synchronize
from .methods import METHODS, Step, cannot

pytestmark = pytest.mark.timeout(1800)  # the first contestant's test runs the rounds of all

BARE = "bare backward"
CONTESTANTS = ("hook, add_", "Lomo", "Lomo, clipping, two passes", "optimi SGD, release", "lomo_optim")
COUNTS = {"short": [100, 291], "full": [10, 30, 100, 291, 723, 2000]}  # 291 has LLaMA-7B, 723 LLaMA-65B
SHAPES = [(256,), (64, 64)]
DTYPES = ["float32", "bfloat16"]
#: Its hook looks through all parameters: at 723 a backward takes 0.8 s on a CPU, at 2000 it would be 6 s.
LOMO_OPTIM_AT_MOST = 723
LR = 1e-6
BUDGET = 2.0  # seconds of rounds per case


def times_of(count: int) -> int:
    """Backwards in one sample: at 10 parameters one takes 50 us."""
    return max(1, 300 // count)


def backward_of(
    shape: tuple[int, ...], dtype: torch.dtype, count: int, name: str, device: str
) -> Callable[[int], float]:
    """Seconds of a backward of a sum over `count` parameters, its forward not counted, on average of some."""
    params = nn.ParameterList(nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for _ in range(count))
    backward: Step = Tensor.backward if name == BARE else METHODS[name].make(params, LR)
    times = times_of(count)

    def run(_: int) -> float:
        spent = 0.0
        for _ in range(times):
            loss = torch.stack([param.sum() for param in params]).sum()
            synchronize(device)
            start = time.perf_counter()
            backward(loss)
            synchronize(device)
            spent += time.perf_counter() - start
            for param in params:
                param.grad = None
        return spent / times

    return run


def lacks(name: str, count: int, dtype: torch.dtype, device: str) -> tuple[str, str] | None:
    """What is missing and why, where the contestant cannot run."""
    if name == "lomo_optim" and count > LOMO_OPTIM_AT_MOST:
        return f"{name}, {count} parameters", "left out: its time grows with the square of their number"
    return cannot(name, dtype, device)


@pytest.fixture(scope="module")
def seconds(shape, dtype, count, device, request):
    """Samples of each contestant that can run."""
    of = getattr(torch, dtype)
    able = [name for name in CONTESTANTS if not lacks(name, count, of, device)]
    contestants = {name: backward_of(shape, of, count, name, device) for name in (BARE, *able)}
    if not request.config.getoption("benchmark_enable"):
        return interleave(contestants, 0)
    first = interleave(contestants, 1)
    round_ = times_of(count) * sum(samples[0] for samples in first.values())
    return interleave(contestants, rounds_for(round_, request.config.getoption("processes"), BUDGET))


def test_backward(reported, missing, shape, dtype, count, device, seconds, contestant):
    if lacking := lacks(contestant, count, getattr(torch, dtype), device):
        if contestant.startswith("Lomo"):
            pytest.fail(": ".join(lacking))
        missing(*lacking)
    case = {"shape": " x ".join(map(str, shape)), "dtype": dtype, "parameters": count}
    reported(contestant, case, seconds[contestant], beside=BARE, beside_seconds=seconds[BARE])
