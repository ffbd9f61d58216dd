"""Whole steps of a small Llama in float32 by two processes over gloo, one thread each. This process is rank 0, and rank
1 takes each step along with it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from lomo_kernels.demo.model import ByteLlama, Config
from lomo_kernels.optim.placement import local_of
from lomo_kernels.plan.methods import CLIP, plain

from .buffers import Baseline
from .measure import memory_of
from .methods import LLAMA_107M
from .results import clips

LR = 1e-3
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


class Trained(NamedTuple):
    """An implementation on one rank: the model, a step on windows of tokens, and bytes that it keeps between steps."""

    model: nn.Module
    step: Callable[[Tensor], object]
    states: int = 0


#: Makes all implementations from a function that makes their models. The first is the baseline.
Make = Callable[[Callable[[], ByteLlama]], dict[str, Trained]]


def build(model: str) -> ByteLlama:
    """The same on every rank."""
    torch.manual_seed(0)
    return ByteLlama(MODELS[model])


def sgd(model: nn.Module, clip: float | None = None) -> Callable[[Tensor], object]:
    """SGD as torch has it, but not fused, which DTensor lacks: a step from the loss."""
    return plain(torch.optim.SGD, LR, clip, foreach=True)(model).update


def same_step(param: Tensor, expected: Tensor, before: Tensor) -> bool:
    """Whether a parameter has changed as expected: within 1% of the largest change, and the float32 of its weights."""
    limit = 0.01 * (expected - before).abs().max() + 2 * torch.finfo(torch.float32).eps * before.abs().max()
    return bool((param - expected).abs().max() <= limit)


class Rank:
    """One process with all implementations. All that clip take the same first step, and all that do not."""

    def __init__(self, rank: int, store: str, make: Make, model: str, tokens: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        self.trained = make(partial(build, model))
        shape, generator = (4, 1, tokens + 1), torch.Generator().manual_seed(rank)
        self.windows = torch.randint(MODELS[model].vocab, shape, generator=generator)
        for trained in self.trained.values():
            trained.step(self.windows[0])
        for name, trained in self.trained.items():
            first = next(other for other in self.trained if clips(other) == clips(name))
            models = trained.model, self.trained[first].model, build(model)
            for params in zip(*(each.parameters() for each in models), strict=True):
                assert same_step(*map(_whole, params)), f"{name}: another step than that of {first}"

    def take(self, name: str, number: int) -> None:
        """A step of both ranks; called on rank 0."""
        dist.broadcast(torch.tensor([list(self.trained).index(name), number]), 0)
        self.trained[name].step(self.windows[number % 4])

    def follow(self) -> None:
        """On rank 1, until `end`."""
        steps, command = [trained.step for trained in self.trained.values()], torch.zeros(2, dtype=torch.int64)
        while True:
            dist.broadcast(command, 0)
            index, number = command.tolist()
            if number < 0:
                return
            steps[index](self.windows[number % 4])

    def end(self) -> None:
        dist.broadcast(torch.tensor([0, -1]), 0)

    def memory(self, name: str) -> dict[str, int]:
        """Bytes of rank 0."""
        trained = self.trained[name]
        weights = sum(local_of(param).nbytes for param in trained.model.parameters())
        peak = memory_of(lambda: self.take(name, 0), "cpu")[1]
        return {"weights": weights, "states": trained.states, "peak": trained.states + peak}

    def baseline(self) -> Baseline:
        name = next(iter(self.trained))
        return Baseline(name, partial(self.take, name))


def _whole(param: Tensor) -> Tensor:
    return param.full_tensor() if hasattr(param, "full_tensor") else param


def _follow(_: int, *arguments: Any) -> None:
    Rank(1, *arguments).follow()
    dist.destroy_process_group()


@contextlib.contextmanager
def started(make: Make, model: str, tokens: int) -> Iterator[Rank]:
    """Rank 0, while there is a rank 1. `make` is a function of a module, which each process calls."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"{folder}/store", make, model, tokens
        follower = torch.multiprocessing.spawn(_follow, arguments, join=False, daemon=True)
        rank = Rank(0, *arguments)
        yield rank
        rank.end()
        dist.destroy_process_group()
        follower.join()
