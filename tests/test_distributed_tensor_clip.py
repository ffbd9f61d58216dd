"""`clip_tensor` over several ranks: the norm of a parameter is that of its whole, averaged gradient."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
from support.adagc import FACTOR, WARM, AdaGC, means_of
from support.engines import ENGINES, mean_loss
from support.models import assert_close, batch
from test_distributed_sharded import WAYS

from lomo_kernels.optim import tensor_clip


def train(rank: int, way: str, options: dict[str, Any], parts: int = 1) -> None:
    """`parts`: backwards of each step, accumulated."""
    engine = (ENGINES | WAYS)[way]
    model = engine.make()
    book = AdaGC(model, lr=0.05, clip_grad_norm=options.get("clip_grad_norm"))
    with mock.patch.object(tensor_clip, "WARM_UP", WARM):
        spread = engine.spread(model)
        optimizer = engine.lomo(spread, lr=0.05, clip_tensor=FACTOR, **options)
        ranks = optimizer._training.engine
        count, mine = engine.batches()
        for step in range(7):
            factor = 20.0 if step % 3 == 2 else 1.0
            book.step(mean_loss(book.model, step, count) * factor)
            for part in range(parts):
                loss = engine.module(spread)(*batch(count * step + mine)) * (factor / parts)
                with (
                    optimizer.accumulate() if part < parts - 1 else nullcontext(),
                    mock.patch.object(ranks, "sum_", wraps=ranks.sum_) as messages,
                ):
                    optimizer.backward(loss)
            if "loss_scale" in options and step > WARM:
                assert messages.call_count == 2, "the norm of all gradients, and the norm of each"
        assert min(book.coefs) < 1.0
        assert means_of(optimizer) == pytest.approx(book.means, rel=1e-4)
        assert_close(engine.weights(spread), book.model, atol=2e-6)


OPTIONS = [{}, {"clip_grad_norm": 0.4}, {"loss_scale": "dynamic", "clip_memory": 0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", ["FSDP2", "fsdp-unused", "fsdp-offload", "tensor parallel", "data parallel"])
def test_two_ranks(ranks: Any, way: str, options: dict[str, Any]) -> None:
    ranks(2).call(train, way, options)


@pytest.mark.parametrize("way", ["FSDP2", "hsdp", "data parallel"])
def test_four_ranks(ranks: Any, way: str) -> None:
    ranks(4).call(train, way, {"clip_grad_norm": 0.4})


@pytest.mark.parametrize("way", ["FSDP2", "tensor parallel", "data parallel"])
def test_accumulated(ranks: Any, way: str) -> None:
    ranks(2).call(train, way, {}, 2)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_zero3(ranks_with_deepspeed: Any, options: dict[str, Any]) -> None:
    ranks_with_deepspeed(2).call(train, "ZeRO-3", options)
    ranks_with_deepspeed(2).call(train, "ZeRO-3", options, 2)
