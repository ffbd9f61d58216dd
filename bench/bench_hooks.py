"""What does a parameter cost whose gradient is consumed inside backward?

Backward of many small parameters with an optimizer in it, next to bare autograd, which leaves the gradients: what is
above, over the number of parameters.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .buffers import Baseline
from .methods import METHODS, cannot

pytestmark = pytest.mark.timeout(1800)

BARE = "bare backward"
IMPLEMENTATIONS = ("hook, add_", "Lomo", "Lomo, clipping, two passes", "optimi SGD, release", "lomo_optim")
#: Its hook looks through all parameters: at 723 a backward takes 0.8 s on a CPU, at 2000 it would be 6 s.
LOMO_OPTIM_AT_MOST = 723


def parameters(device, full):
    counts = [10, 30, 100, 291, 723, 2000] if full else [100, 291]  # 291 has LLaMA-7B, 723 LLaMA-65B
    cases = {"shape": ["256", "64 x 64"], "dtype": ["float32", "bfloat16"], "parameters": counts}
    return {"implementation": IMPLEMENTATIONS, **cases}


def backward_of(shape, dtype, count, name, device):
    """Backward of a sum over `count` parameters, whose graph keeps no tensor and serves every call."""
    params = nn.ParameterList(nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for _ in range(count))
    backward = Tensor.backward if name == BARE else METHODS[name](params, 1e-6)
    loss = torch.stack([param.sum() for param in params]).sum()

    def call(_):
        backward(loss)
        for param in params:  # 0.1 us each
            param.grad = None

    return call


def test_backward(paired, shape, dtype, parameters, device, implementation):
    if implementation == "lomo_optim" and parameters > LOMO_OPTIM_AT_MOST:
        pytest.skip(f"lomo_optim, {parameters} parameters: left out, its time grows with the square of their number")
    if lacking := cannot(implementation, getattr(torch, dtype), device):
        pytest.skip(lacking)
    sizes = tuple(map(int, shape.split(" x ")))
    call, bare = (
        backward_of(sizes, getattr(torch, dtype), parameters, name, device) for name in (implementation, BARE)
    )
    paired(call, Baseline(BARE, bare))
