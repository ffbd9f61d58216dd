"""What does gathering less at a time cost under FSDP2, and save?"""

from __future__ import annotations

from torch.distributed.device_mesh import init_device_mesh

from lomo_kernels import Lomo
from lomo_kernels.plan.options import GROUPS
from lomo_kernels.plan.sharded import shard

from . import ranks
from .ranks import CLIP, LR, OPTIONS, Trained
from .results import clips

IMPLEMENTATIONS = ("FSDP2, SGD, clip_grad_norm_", *filter(clips, OPTIONS))


def parameters(device, full):
    cases = [("27M", 256 if full else 32, 2)]
    return {"model, tokens, ranks": cases, "implementation": IMPLEMENTATIONS, "group": GROUPS}


def _trained(build, implementation, group):
    model = shard(build, init_device_mesh("cpu", (2,)), group)()
    options = OPTIONS.get(implementation)
    step = Lomo(model, lr=LR, **options).backward if options else ranks.sgd(model, CLIP)
    return Trained(model, lambda window: step(model.loss(window)))


def make(build):
    """All groups at once: what one costs is a ratio to another."""
    return {f"{name}, by {group}": _trained(build, name, group) for group in GROUPS for name in IMPLEMENTATIONS}


def test_sharded(paired, rank, implementation, group):
    name = f"{implementation}, by {group}"
    paired(lambda number: rank.take(name, number), rank.baseline(), memory=rank.memory(name))
