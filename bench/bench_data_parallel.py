"""What does averaging inside the hooks cost, and save, against DistributedDataParallel and SGD?"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from lomo_kernels import Lomo
from lomo_kernels.demo.model import ByteLlama

from . import ranks
from .ranks import CLIP, LR, OPTIONS, Case, Trained

CASES = {"short": [Case("27M", 32)], "full": [Case("27M", 256), Case("107M", 256)]}
BASE = "DDP, SGD, clip_grad_norm_"
CONTESTANTS = (BASE, "DDP, SGD", *OPTIONS)


class _WithLoss(nn.Module):
    """DistributedDataParallel sees `forward` only."""

    def __init__(self, model: ByteLlama) -> None:
        super().__init__()
        self.model = model

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        return self.model.loss(window)


def _ddp(model: ByteLlama, clip: float | None = None) -> Trained:
    wrapped = nn.parallel.DistributedDataParallel(_WithLoss(model), gradient_as_bucket_view=True)
    step = ranks.sgd(wrapped, clip)
    buckets = sum(param.nbytes for param in wrapped.parameters())  # the gradients are views of them
    return Trained(model, lambda window: step(wrapped(window)), kept=buckets)


def _lomo(model: ByteLlama, name: str) -> Trained:
    optimizer = Lomo(model, lr=LR, process_group=dist.group.WORLD, **OPTIONS[name])
    return Trained(model, lambda window: optimizer.backward(model.loss(window)))


def made(build: Callable[[], ByteLlama]) -> dict[str, Trained]:
    return {BASE: _ddp(build(), CLIP), "DDP, SGD": _ddp(build())} | {name: _lomo(build(), name) for name in OPTIONS}


def test_data_parallel(ranked, contestant, case):
    ranked(contestant, case._asdict(), contestant)
