"""`clip_tensor` over several ranks: the norm of a parameter is that of its whole, averaged gradient."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.models import assert_close, loss_of, transformer_of_vectors, whole_weights
from support.processes import Processes, by_world
from test_distributed_sharded import WAYS
from test_lomo_tensor_clip import FACTOR, WARM, AdaGC, means_of
from torch import Tensor, nn

from lomo_kernels import Lomo
from lomo_kernels.optim import tensor_clip


@pytest.fixture(scope="module")
def zero_ranks() -> Iterator[Callable[[int], Processes]]:
    """DeepSpeed exchanges functions of torch, so its processes are its own."""
    yield from by_world()


def spread(model: nn.Module, way: str, **options: Any) -> tuple[nn.Module, Lomo, Callable[[], dict[str, Tensor]]]:
    """What computes the loss, its optimizer, and what gathers its weights."""
    if way == "zero3":
        from test_distributed_deepspeed import initialize
        from test_distributed_deepspeed import whole_weights as gathered

        engine = initialize(model)
        return engine.module, Lomo(engine, **options), lambda: gathered(engine)
    if way == "group":
        options["process_group"] = dist.group.WORLD
    else:
        WAYS[way][1](model)
    return model, Lomo(model, **options), lambda: whole_weights(model)


def train(rank: int, way: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = WAYS[way][0]() if way in WAYS else transformer_of_vectors()
    book = AdaGC(model, lr=0.05, clip_grad_norm=options.get("clip_grad_norm"))
    with mock.patch.object(tensor_clip, "WARM_UP", WARM):
        net, optimizer, weights = spread(model, way, lr=0.05, clip_tensor=FACTOR, **options)
        world = dist.get_world_size()
        count, mine = (1, 0) if way == "tensor" else (world, rank)
        for step in range(7):
            factor = 20.0 if step % 3 == 2 else 1.0
            book.step(sum(loss_of(book.model, count * step + n) for n in range(count)) / count * factor)
            optimizer.backward(loss_of(net, count * step + mine) * factor)
        assert min(book.coefs) < 1.0
        assert means_of(optimizer) == pytest.approx(book.means, rel=1e-4)
        assert_close(weights(), book.model, atol=2e-6)


OPTIONS = [{}, {"clip_grad_norm": 0.4}, {"loss_scale": "dynamic", "clip_memory": 0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", ["fsdp", "fsdp-unused", "fsdp-offload", "tensor", "group"])
def test_two_ranks(ranks: Any, way: str, options: dict[str, Any]) -> None:
    ranks(2).call(train, way, options)


@pytest.mark.parametrize("way", ["fsdp", "hsdp", "group"])
def test_four_ranks(ranks: Any, way: str) -> None:
    ranks(4).call(train, way, {"clip_grad_norm": 0.4})


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_zero3(zero_ranks: Any, options: dict[str, Any]) -> None:
    zero_ranks(2).call(train, "zero3", options)
