"""The kernels' contestants at 4096 x 4096: ours, torch's, and a probe of memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lomo_kernels_testing as probe
import torch

from lomo_kernels import ops, reference

SIDE = 4096
PAIRS = 6  # 384 MiB of bfloat16: no call finds its buffers in a cache
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LR = 1e-3


def buffers(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters and gradients."""
    torch.manual_seed(0)
    return tuple([torch.randn(SIDE, SIDE).to(dtype) for _ in range(PAIRS)] for _ in range(2))  # type: ignore[return-value]


def update_contestants(dtype: torch.dtype) -> dict[str, Callable[[int], Any]]:
    """Each reads a parameter and a gradient and writes the parameter (mul_+add_ does it twice)."""
    params, grads = buffers(dtype)
    lr = torch.tensor(LR, dtype=torch.float64)
    for rounding in ("nearest", "stochastic"):  # a bench of wrong results is worth nothing
        param, grad = params[0][:64].clone(), grads[0][:64]
        expected = reference.updated(param, grad, lr=LR, stochastic=rounding == "stochastic")
        ops.sgd_(param, grad, lr=LR, rounding=rounding)
        assert torch.equal(param, expected)
    held = [torch.nn.Parameter(param) for param in params]
    for param, grad in zip(held, grads, strict=True):
        param.grad = grad
    foreach = [torch.optim.SGD([param], lr=LR, foreach=True) for param in held]  # fused=True is wrong on 16 bits
    every = {"weight_decay": 0.01, "inv_scale": 0.5, "clip_value": 3.0, "clip_coef": 0.5}
    return {
        "probe": lambda n: probe.read_2_write_1(
            params[n % PAIRS].data_ptr(), grads[n % PAIRS].data_ptr(), grads[0].nbytes
        ),
        "sgd_ nearest": lambda n: ops.sgd_(params[n % PAIRS], grads[n % PAIRS], lr=lr),
        "sgd_ nearest, every scalar": lambda n: ops.sgd_(params[n % PAIRS], grads[n % PAIRS], lr=lr, **every),
        "sgd_ stochastic": lambda n: ops.sgd_(params[n % PAIRS], grads[n % PAIRS], lr=lr, rounding="stochastic"),
        "add_": lambda n: params[n % PAIRS].add_(grads[n % PAIRS], alpha=-LR),
        "mul_, add_": lambda n: params[n % PAIRS].mul_(1 - 1e-5).add_(grads[n % PAIRS], alpha=-LR),
        "SGD foreach": lambda n: foreach[n % PAIRS].step(),
    }


def norm_contestants(dtype: torch.dtype) -> dict[str, Callable[[int], Any]]:
    """Each reads a gradient."""
    _, grads = buffers(dtype)
    slot = torch.zeros(1, dtype=torch.float64)
    return {
        "probe": lambda n: probe.read_1(grads[n % PAIRS].data_ptr(), grads[0].nbytes),
        "sq_norm_": lambda n: ops.sq_norm_(slot, grads[n % PAIRS]),
        "vector_norm": lambda n: torch.linalg.vector_norm(grads[n % PAIRS]),
    }


def norm_errors(dtype: torch.dtype, numel: int = 2**25) -> dict[str, float]:
    """Relative error of the norm of 33,554,432 elements, against float64."""
    torch.manual_seed(0)
    grad = torch.randn(numel).to(dtype)
    exact = grad.double().norm().item()
    slot = torch.zeros(1, dtype=torch.float64)
    ops.sq_norm_(slot, grad)
    mine, torchs = slot.sqrt().item(), torch.linalg.vector_norm(grad).item()
    return {"sq_norm_": abs(mine / exact - 1), "vector_norm": abs(torchs / exact - 1)}
