"""What does a parameter cost, whose gradient is consumed inside backward?

Backward of many small parameters with an optimizer in it, beside bare autograd, which leaves the gradients: what is
above, over the number of parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .buffers import Probe
from .methods import METHODS, Step, cannot

pytestmark = pytest.mark.timeout(1800)

BARE = "bare backward"
CONTESTANTS = ("hook, add_", "Lomo", "Lomo, clipping, two passes", "optimi SGD, release", "lomo_optim")
COUNTS = {"short": [100, 291], "full": [10, 30, 100, 291, 723, 2000]}  # 291 has LLaMA-7B, 723 LLaMA-65B
SHAPES = [(256,), (64, 64)]
DTYPES = ["float32", "bfloat16"]
#: Its hook looks through all parameters: at 723 a backward takes 0.8 s on a CPU, at 2000 it would be 6 s.
LOMO_OPTIM_AT_MOST = 723
LR = 1e-6


def backward_of(
    shape: tuple[int, ...], dtype: torch.dtype, count: int, name: str, device: str
) -> Callable[[int], None]:
    """Backward of a sum over `count` parameters, whose graph keeps no tensor and serves every call."""
    params = nn.ParameterList(nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for _ in range(count))
    backward: Step = Tensor.backward if name == BARE else METHODS[name](params, LR)
    loss = torch.stack([param.sum() for param in params]).sum()

    def call(_: int) -> None:
        backward(loss)
        for param in params:  # 0.1 us each
            param.grad = None

    return call


def test_backward(paired, missing, shape, dtype, count, device, contestant):
    of = getattr(torch, dtype)
    if contestant == "lomo_optim" and count > LOMO_OPTIM_AT_MOST:
        missing(f"{contestant}, {count} parameters", "left out: its time grows with the square of their number")
    if lacking := cannot(contestant, of, device):
        missing(*lacking)
    case = {"shape": " x ".join(map(str, shape)), "dtype": dtype, "parameters": count}
    call, bare = (backward_of(shape, of, count, name, device) for name in (contestant, BARE))
    paired(contestant, case, call, Probe(BARE, bare))
