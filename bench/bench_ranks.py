"""What do averaging inside the hooks, and gathering less at a time under FSDP2, cost and save?

Whole steps of a small Llama in float32 by two processes over gloo, one thread each. This process is rank 0, and rank 1
takes each step along with it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import SGD

from lomo_kernels.demo.model import ByteLlama, Config
from lomo_kernels.plan.methods import CLIP, LR, lomo, plain
from lomo_kernels.plan.options import GROUPS
from lomo_kernels.plan.sharded import shard

from .measure import Baseline, memory_of
from .methods import LLAMA_107M
from .results import clips

#: By their number of parameters. Matrices are of 1 to 4 MiB, and of 4 to 11.
MODELS = {
    "27M": Config(layers=8, d_model=512, heads=8, kv_heads=8, ffn=1408, vocab=2048),
    "107M": LLAMA_107M,
}
#: Ours, without fused layers, which reduction rules out.
OPTIONS: dict[str, dict[str, Any]] = {
    "Lomo": {},
    "Lomo, clipping, two passes": {"clip_grad_norm": CLIP, "clip_passes": "two"},
    "Lomo, clipping, one pass": {"clip_grad_norm": CLIP, "clip_passes": "one"},
}
AVERAGED = ("DDP, SGD, clip_grad_norm_", "DDP, SGD", *OPTIONS)
SHARDED = ("FSDP2, SGD, clip_grad_norm_", *filter(clips, OPTIONS))


class Trained(NamedTuple):
    """An implementation on one rank: the model, a step on windows of tokens, and bytes that it keeps between steps."""

    model: nn.Module
    step: Callable[[Tensor], object]
    states: int = 0


def build(model: str) -> ByteLlama:
    """The same on every rank."""
    torch.manual_seed(0)
    return ByteLlama(MODELS[model])


def step_of(name: str, model: nn.Module, **options: Any) -> Callable[[Tensor], object]:
    """What follows the loss: `Lomo`'s, or that of SGD as torch has it, but not fused, which DTensor lacks."""
    ours = name in OPTIONS
    attach = lomo(**OPTIONS[name], **options) if ours else plain(SGD, CLIP if clips(name) else None, foreach=True)
    return attach(model, LR).update


def data_parallel(build: Callable[[], Any]) -> dict[str, Trained]:
    """All implementations by name. The first is the baseline."""

    def trained(name: str) -> Trained:
        model = build()
        if name in OPTIONS:
            step = step_of(name, model, process_group=dist.group.WORLD)
            return Trained(model, lambda window: step(model.loss(window)))
        wrapped: Any = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        step = step_of(name, wrapped)
        buckets = sum(param.nbytes for param in wrapped.parameters())  # the gradients are views of them
        return Trained(model, lambda window: step(ByteLlama.loss(wrapped, window)), buckets)

    return {name: trained(name) for name in AVERAGED}


def sharded(build: Callable[[], Any]) -> dict[str, Trained]:
    """All groups at once: what one costs is a ratio to another."""
    mesh = init_device_mesh("cpu", (2,))

    def trained(name: str, group: str) -> Trained:
        model: Any = shard(build, mesh, group)()
        step = step_of(name, model)
        return Trained(model, lambda window: step(model.loss(window)))

    return {f"{name}, by {group}": trained(name, group) for group in GROUPS for name in SHARDED}


def same_step(param: Tensor, expected: Tensor, before: Tensor) -> bool:
    """Whether a parameter has changed as expected: within 1% of the largest change, and the float32 of its weights."""
    limit = 0.01 * (expected - before).abs().max() + 2 * torch.finfo(torch.float32).eps * before.abs().max()
    return bool((param - expected).abs().max() <= limit)


class Rank:
    """One process with all implementations. All that clip take the same first step, and all that do not."""

    def __init__(self, rank: int, store: str, commands: Any, make: Any, model: str, tokens: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        self.commands, self.trained = commands, make(partial(build, model))
        shape, generator = (4, 1, tokens + 1), torch.Generator().manual_seed(rank)
        self.windows = torch.randint(MODELS[model].vocab, shape, generator=generator)
        for name in self.trained:
            self.step(name, 0)
        for name, trained in self.trained.items():
            first = next(other for other in self.trained if clips(other) == clips(name))
            models = trained.model, self.trained[first].model, build(model)
            for params in zip(*(each.parameters() for each in models), strict=True):
                whole = (param.full_tensor() if hasattr(param, "full_tensor") else param for param in params)
                assert same_step(*whole), f"{name}: another step than that of {first}"

    def step(self, name: str, number: int) -> None:
        self.trained[name].step(self.windows[number % 4])

    def take(self, name: str, number: int) -> None:
        """A step of both ranks; called on rank 0."""
        self.commands.put((name, number))
        self.step(name, number)

    def memory(self, name: str) -> dict[str, int]:
        """Bytes of rank 0 above the weights."""
        states = self.trained[name].states
        return {"states": states, "peak": states + memory_of(lambda: self.take(name, 0), "cpu")[1]}

    def measure(self, paired: Callable[..., None], name: str) -> None:
        first = next(iter(self.trained))
        paired(partial(self.take, name), Baseline(first, partial(self.take, first)), memory=self.memory(name))


def follow(_: int, *arguments: Any) -> None:
    """Rank 1, until the command None."""
    rank = Rank(1, *arguments)
    for name, number in iter(rank.commands.get, None):
        rank.step(name, number)
    dist.destroy_process_group()


@contextmanager
def started(make: Any, model: str, tokens: int) -> Iterator[Rank]:
    """Rank 0, while there is a rank 1."""
    commands = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"{folder}/store", commands, make, model, tokens
        follower = torch.multiprocessing.spawn(follow, arguments, join=False, daemon=True)
        try:
            yield Rank(0, *arguments)
            commands.put(None)
            follower.join()
        finally:
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def rank(make, model, tokens, device):
    if device != "cpu":
        pytest.skip("one GPU has no two ranks")
    with started({"data_parallel": data_parallel, "sharded": sharded}[make], model, tokens) as rank:
        yield rank


def cases(device, full):
    columns, tokens, models = "make, model, tokens, ranks", 256 if full else 32, ["27M", "107M"][: 1 + full]
    averaged = {columns: [("data_parallel", model, tokens, 2) for model in models]}
    gathered = {columns: [("sharded", "27M", tokens, 2)]}
    return {
        "data_parallel": averaged | {"implementation": AVERAGED},
        "sharded": gathered | {"implementation": SHARDED, "group": GROUPS},
    }


def test_data_parallel(paired, rank, implementation, ranks):
    rank.measure(paired, implementation)


def test_sharded(paired, rank, implementation, group, ranks):
    rank.measure(paired, f"{implementation}, by {group}")
