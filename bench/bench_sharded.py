"""What does gathering less at a time cost under FSDP2, and save?"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lomo_kernels import Lomo
from lomo_kernels.demo.model import ByteLlama
from lomo_kernels.plan.options import GROUPS
from lomo_kernels.plan.sharded import shard

from . import ranks
from .ranks import CLIP, LR, OPTIONS, Case, Trained
from .results import clips

CASES = {"short": [Case("27M", 32)], "full": [Case("27M", 256)]}
BASE = "FSDP2, SGD, clip_grad_norm_"
CONTESTANTS = (BASE, *filter(clips, OPTIONS))


def named(contestant: str, group: str) -> str:
    return f"{contestant}, by {group}"


def _trained(build: Callable[[], ByteLlama], contestant: str, group: str) -> Trained:
    model = shard(build, init_device_mesh("cpu", (dist.get_world_size(),)), group)()
    ours = OPTIONS.get(contestant)
    step = Lomo(model, lr=LR, **ours).backward if ours else ranks.sgd(model, CLIP)
    return Trained(model, lambda window: step(model.loss(window)))


def made(build: Callable[[], ByteLlama]) -> dict[str, Trained]:
    """All groups in one go: what one costs is a ratio to another."""
    return {named(name, group): _trained(build, name, group) for group in GROUPS for name in CONTESTANTS}


def test_sharded(ranked, contestant, group, case):
    ranked(contestant, case._asdict() | {"group": group}, named(contestant, group))
