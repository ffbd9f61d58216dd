"""What does averaging inside the hooks cost, and save, against DistributedDataParallel and SGD?"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from lomo_kernels import Lomo

from . import ranks
from .ranks import CLIP, LR, OPTIONS, Trained

BASE = "DDP, SGD, clip_grad_norm_"


def parameters(device, full):
    cases = [("27M", 256, 2), ("107M", 256, 2)] if full else [("27M", 32, 2)]
    return {"model, tokens, ranks": cases, "implementation": [BASE, "DDP, SGD", *OPTIONS]}


class _WithLoss(nn.Module):
    """DistributedDataParallel sees `forward` only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, window):
        return self.model.loss(window)


def _ddp(model, clip=None):
    wrapped = nn.parallel.DistributedDataParallel(_WithLoss(model), gradient_as_bucket_view=True)
    step = ranks.sgd(wrapped, clip)
    buckets = sum(param.nbytes for param in wrapped.parameters())  # the gradients are views of them
    return Trained(model, lambda window: step(wrapped(window)), buckets)


def _lomo(model, name):
    optimizer = Lomo(model, lr=LR, process_group=dist.group.WORLD, **OPTIONS[name])
    return Trained(model, lambda window: optimizer.backward(model.loss(window)))


def make(build):
    return {BASE: _ddp(build(), CLIP), "DDP, SGD": _ddp(build())} | {name: _lomo(build(), name) for name in OPTIONS}


def test_data_parallel(paired, rank, implementation):
    paired(lambda number: rank.take(implementation, number), rank.baseline(), memory=rank.memory(implementation))
