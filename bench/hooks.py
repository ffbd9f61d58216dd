"""Backward of many small parameters: what does consuming each gradient inside it cost?"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from lomo_kernels import Lomo

COUNTS = (291, 723)  # parameters of LLaMA-7B and 65B
SHAPES = {"256 elements": (256,), "64 x 64": (64, 64)}
LR = 1e-3


def timed_backward(shape: tuple[int, ...], dtype: torch.dtype, count: int, attach: str) -> Callable[[int], float]:
    """Seconds of one backward of a sum over `count` parameters with an optimizer in it, the forward not counted."""
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(count)]
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
    if attach == "Lomo":
        backward = Lomo(params, lr=LR).backward
    elif attach == "torch hook":
        for param in params:
            param.register_post_accumulate_grad_hook(_plain_step)

    def run(_: int) -> float:
        loss = torch.stack([param.sum() for param in params]).sum()
        start = time.perf_counter()
        backward(loss)
        spent = time.perf_counter() - start
        for param in params:
            param.grad = None
        return spent

    return run


@torch.no_grad()
def _plain_step(param: torch.Tensor) -> None:
    assert param.grad is not None
    param.add_(param.grad, alpha=-LR)
    param.grad = None


def contestants(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> dict[str, Callable[[int], float]]:
    """Bare autograd (gradients stay), torch's own way (a hook with add_), and Lomo (with the norm of all)."""
    return {name: timed_backward(shape, dtype, count, name) for name in ("bare", "torch hook", "Lomo")}
