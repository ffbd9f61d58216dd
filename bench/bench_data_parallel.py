"""What does averaging inside the hooks cost, and save, against DistributedDataParallel and SGD?

Whole steps of a small Llama in float32, two processes over gloo with one thread each.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from lomo_kernels import Lomo
from lomo_kernels.demo.model import ByteLlama, Config

from .measure import interleave, memory_of
from .methods import CLIP
from .rivals import clips

LR = 1e-3
BASE = "DDP, SGD, clip_grad_norm_"
WORLD = 2
TOKENS = {"short": [32], "full": [256]}
CONFIG = Config(layers=8, d_model=512, heads=8, kv_heads=8, ffn=1408, vocab=2048)
OPTIONS: dict[str, dict[str, Any]] = {
    "Lomo": {},
    "Lomo, clipping, two passes": {"clip_grad_norm": CLIP},
    "Lomo, clipping, one pass": {"clip_grad_norm": CLIP, "clip_passes": "one"},
}
CONTESTANTS = (BASE, "DDP, SGD", *OPTIONS)


def _model() -> ByteLlama:
    torch.manual_seed(0)
    return ByteLlama(CONFIG)


class _WithLoss(nn.Module):
    """DistributedDataParallel sees `forward` only."""

    def __init__(self, model: ByteLlama) -> None:
        super().__init__()
        self.model = model

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        return self.model.loss(window)


def _ddp(clip: bool) -> tuple[nn.Module, Callable[[torch.Tensor], None]]:
    wrapped = nn.parallel.DistributedDataParallel(_WithLoss(_model()), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=LR, foreach=True)

    def step(window: torch.Tensor) -> None:
        wrapped(window).backward()
        if clip:
            nn.utils.clip_grad_norm_(wrapped.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return wrapped.module.model, step


def _lomo(options: dict[str, Any]) -> tuple[nn.Module, Callable[[torch.Tensor], None]]:
    model = _model()
    optimizer = Lomo(model, lr=LR, process_group=dist.group.WORLD, **options)
    return model, lambda window: optimizer.backward(model.loss(window))


def same_step(param: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a parameter has changed as expected: within 1% of the largest change, and the float32 of its weights."""
    limit = 0.01 * (expected - before).abs().max() + 2 * torch.finfo(torch.float32).eps * before.abs().max()
    return bool((param - expected).abs().max() <= limit)


def _work(rank: int, store: str, tokens: int, rounds: int, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    made = {BASE: _ddp(clip=True), "DDP, SGD": _ddp(clip=False)}
    made |= {name: _lomo(options) for name, options in OPTIONS.items()}
    generator = torch.Generator().manual_seed(rank)
    windows = [torch.randint(CONFIG.vocab, (1, tokens + 1), generator=generator) for _ in range(4)]
    for name, (model, step) in made.items():  # a bench of wrong results is worth nothing
        step(windows[0])
        expected = made[BASE if clips(name) else "DDP, SGD"][0]
        for params in zip(model.parameters(), expected.parameters(), _model().parameters(), strict=True):
            assert same_step(*params), f"{name}: another step than DistributedDataParallel's"

    def timed(step: Callable[[torch.Tensor], None]) -> Callable[[int], float]:
        def run(number: int) -> float:
            dist.barrier()
            start = time.perf_counter()
            step(windows[number % 4])
            return time.perf_counter() - start

        return run

    seconds = interleave({name: timed(step) for name, (_, step) in made.items()}, rounds)
    memory = {}
    for name, (model, step) in made.items():
        weights = sum(param.nbytes for param in model.parameters())
        kept = weights if name.startswith("DDP") else 0  # buckets, which gradients are views of
        peak = memory_of(lambda step=step: step(windows[0]), "cpu")[1]
        memory[name] = {"weights": weights, "states": kept, "peak": kept + peak}
    if rank == 0:
        Path(result).write_text(json.dumps([seconds, memory]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tokens, step_rounds, device):
    """Samples of rank 0, from a barrier on, and bytes, by contestant."""
    if device != "cpu":
        pytest.skip("one GPU has no two ranks")
    with tempfile.TemporaryDirectory() as folder:
        store, result = f"{folder}/store", f"{folder}/result"
        torch.multiprocessing.spawn(_work, (store, tokens, step_rounds, result), nprocs=WORLD)
        return json.loads(Path(result).read_text())


def test_data_parallel(reported, contestant, tokens, measured):
    seconds, memory = measured
    case = {"model": "27M", "tokens": tokens, "ranks": WORLD}
    beside = {"beside": BASE, "beside_seconds": seconds[BASE]}
    reported(contestant, case, seconds[contestant], memory=memory[contestant], **beside)
