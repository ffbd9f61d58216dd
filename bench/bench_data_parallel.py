"""What does averaging inside the hooks cost, and save, against DistributedDataParallel and SGD?"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from lomo_kernels import Lomo
from lomo_kernels.demo.model import ByteLlama

from . import ranks
from .ranks import CLIP, LR, OPTIONS, Build, Case, Trained
from .results import clips

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


def _ddp(build: Build, clip: float | None = None) -> Trained:
    wrapped = nn.parallel.DistributedDataParallel(_WithLoss(build()), gradient_as_bucket_view=True)
    step = ranks.sgd(wrapped, clip)
    buckets = sum(param.nbytes for param in wrapped.parameters())  # the gradients are views of them
    return Trained(wrapped.module.model, lambda window: step(wrapped(window)), kept=buckets)


def _lomo(build: Build, name: str) -> Trained:
    model = build()
    optimizer = Lomo(model, lr=LR, process_group=dist.group.WORLD, **OPTIONS[name])
    return Trained(model, lambda window: optimizer.backward(model.loss(window)))


def made(build: Build) -> dict[str, Trained]:
    return {BASE: _ddp(build, CLIP), "DDP, SGD": _ddp(build)} | {name: _lomo(build, name) for name in OPTIONS}


def expected(name: str) -> str:
    return BASE if clips(name) else "DDP, SGD"


def test_data_parallel(record, contestant, case, ranked):
    seconds, memory = ranked
    beside = {"beside": BASE, "beside_seconds": seconds[BASE]}
    record(contestant, case._asdict(), seconds=seconds[contestant], memory=memory[contestant], **beside)
