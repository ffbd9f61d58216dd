"""What does averaging inside the hooks cost, and save, against DistributedDataParallel and SGD?

``python -m bench.bench_data_parallel`` measures whole steps of a small Llama in float32, two processes over gloo with
one thread each, interleaved round by round: seconds on rank 0 from a barrier on, the peak of live bytes in a step above
what is alive between steps, and what that is beyond the weights (DistributedDataParallel's buckets). Writes
``bench/results/data_parallel-<instruction set>-<date>.json``.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from lomo_kernels import Lomo
from lomo_kernels.demo.model import ByteLlama, Config

from .measure import allocations, interleave, peak_of, ratios, write

LR = 1e-3
CLIP = 1.0
BASE = "DDP, SGD, clip_grad_norm_"


class Case(NamedTuple):
    config: Config
    tokens: int
    rounds: int


CASE = Case(Config(layers=8, d_model=512, heads=8, kv_heads=8, ffn=1408, vocab=2048), tokens=256, rounds=15)
SMALL = Case(Config(layers=2, d_model=256, heads=4, kv_heads=4, ffn=704, vocab=512), tokens=32, rounds=2)

#: Ours.
MODES: dict[str, dict[str, Any]] = {
    "Lomo": {},
    "Lomo, clip_grad_norm": {"clip_grad_norm": CLIP},
    "Lomo, clip_grad_norm, one backward": {"clip_grad_norm": CLIP, "clip_passes": "one"},
}


def _model(case: Case) -> ByteLlama:
    torch.manual_seed(0)
    return ByteLlama(case.config)


class _WithLoss(nn.Module):
    """DistributedDataParallel sees `forward` only."""

    def __init__(self, model: ByteLlama) -> None:
        super().__init__()
        self.model = model

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        return self.model.loss(window)


def _ddp(case: Case, clip: bool) -> tuple[nn.Module, Callable[[torch.Tensor], None]]:
    wrapped = nn.parallel.DistributedDataParallel(_WithLoss(_model(case)), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=LR, foreach=True)

    def step(window: torch.Tensor) -> None:
        wrapped(window).backward()
        if clip:
            nn.utils.clip_grad_norm_(wrapped.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return wrapped.module.model, step


def _lomo(case: Case, options: dict[str, Any]) -> tuple[nn.Module, Callable[[torch.Tensor], None]]:
    model = _model(case)
    optimizer = Lomo(model, lr=LR, process_group=dist.group.WORLD, **options)
    return model, lambda window: optimizer.backward(model.loss(window))


def _work(rank: int, world: int, store: str, case: Case, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    made = {BASE: _ddp(case, clip=True), "DDP, SGD": _ddp(case, clip=False)}
    made |= {name: _lomo(case, options) for name, options in MODES.items()}
    generator = torch.Generator().manual_seed(rank)
    windows = [torch.randint(case.config.vocab, (1, case.tokens + 1), generator=generator) for _ in range(4)]
    for name, (model, step) in made.items():  # a bench of wrong results is worth nothing
        step(windows[0])
        clipped = "clip" in name
        for ours, theirs in zip(model.parameters(), made[BASE if clipped else "DDP, SGD"][0].parameters(), strict=True):
            if name != "DDP, SGD":
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    def timed(step: Callable[[torch.Tensor], None]) -> Callable[[int], float]:
        def run(number: int) -> float:
            dist.barrier()
            start = time.perf_counter()
            step(windows[number % 4])
            return time.perf_counter() - start

        return run

    seconds = interleave({name: timed(step) for name, (_, step) in made.items()}, rounds=case.rounds)
    section = {}
    for name, (model, step) in made.items():
        gc.collect()
        weights = sum(param.nbytes for param in model.parameters())
        section[name] = {
            "seconds": seconds[name],
            "ratio_to_ddp_and_clip": ratios(seconds[name], seconds[BASE]),
            "peak_bytes": peak_of(allocations(lambda step=step: step(windows[0]))),
            "kept_bytes": weights if name.startswith("DDP") else 0,  # buckets, which gradients are views of
        }
    if rank == 0:
        Path(result).write_text(json.dumps(section))
    dist.barrier()
    dist.destroy_process_group()


def measured(case: Case, world: int = 2) -> dict[str, Any]:
    """By contestant: seconds of each step, their ratio to `BASE`, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        store, result = f"{folder}/store", f"{folder}/result"
        torch.multiprocessing.spawn(_work, (world, store, case, result), nprocs=world)
        return json.loads(Path(result).read_text())


def test_data_parallel(benchmark):
    """One short run of everything; figures come from ``python -m bench.bench_data_parallel``."""
    section = benchmark.pedantic(measured, args=(SMALL,), rounds=1)
    benchmark.extra_info.update({name: statistics.median(one["seconds"]) for name, one in section.items()})
    assert section["Lomo"]["peak_bytes"] < section["DDP, SGD"]["peak_bytes"] + section["DDP, SGD"]["kept_bytes"]


def main() -> None:
    """Some two minutes."""
    section = measured(CASE)
    weights = sum(param.nbytes for param in _model(CASE).parameters())
    print(f"{weights / 2**20:.0f} MiB of weights; ms, ratio to {BASE} (quartiles), MiB: peak in a step, kept between")
    for name, one in section.items():
        ratio = one["ratio_to_ddp_and_clip"]
        spread = f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"
        memory = f"{one['peak_bytes'] / 2**20:8.1f} {one['kept_bytes'] / 2**20:8.1f}"
        print(f"{name:38} {statistics.median(one['seconds']) * 1e3:8.1f}  {spread}  {memory}")
    sections = {"model": CASE.config.__dict__ | {"weight_bytes": weights, "tokens": CASE.tokens}, "steps": section}
    print(f"written to {write(sections, 'data_parallel').name}")


if __name__ == "__main__":
    main()
