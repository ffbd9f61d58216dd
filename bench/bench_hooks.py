"""What does a parameter's hook cost? (`python -m bench` subtracts bare autograd.)"""

import pytest
import torch

from .hooks import COUNTS, SHAPES, timed_backward


@pytest.mark.parametrize("name", ["bare", "torch hook", "Lomo"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", COUNTS)
def test_backward(benchmark, count, shape, name):
    torch.set_num_threads(1)
    run = timed_backward(SHAPES[shape], torch.float32, count, name)
    benchmark.pedantic(run, args=(0,), rounds=15, warmup_rounds=1)
