"""DeepSpeed's ZeRO-3, in real processes over gloo, against SGD on one process with a float64 norm."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Options, assert_same_bits, batch, loss_of, same_bits, transformer, weights_of
from processes import Processes
from textbook import Textbook
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lomo_kernels import Lomo
from lomo_kernels.memory import LiveBytes

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip('needs DeepSpeed: pip install "lomo_kernels[deepspeed]"', allow_module_level=True)

LR = 0.3
CLIPPED = {"clip_grad_norm": 0.3, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], Processes]]:
    """As that of conftest.py, with processes of their own: DeepSpeed exchanges functions of torch."""
    running: dict[int, Processes] = {}

    def get(world: int) -> Processes:
        if world not in running or not running[world].usable:
            running[world] = Processes(world)
        return running[world]

    yield get
    for some in running.values():
        some.close()


def initialize(model: nn.Module, threshold: int = 50, config: dict[str, Any] | None = None, **zero: Any) -> Any:
    """A DeepSpeed engine. Parameters of up to `threshold` elements are persistent: always whole on every rank."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # Collectives of its own for CPUs, which take a minute to compile; gloo has all that is needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {"stage": 3, "stage3_param_persistence_threshold": threshold, **zero}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": settings, **(config or {})}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """All parameters, gathered. Persistent ones are freed by this, as by nothing in a step."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: param.detach().clone() for name, param in named.items()}


class Borrowing(nn.Module):
    """Uses a parameter of another module, as tied heads are often written: DeepSpeed calls it external."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(19, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 6)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.out(self.norm(self.embedding(tokens)))
        return F.cross_entropy(F.linear(x, self.embedding.weight).view(-1, 19), targets.view(-1))


def transformer_of_vectors(options: Options) -> nn.Module:
    """DeepSpeed takes no scalar parameters. One of a single element leaves all ranks but one a part of padding only."""
    model = transformer(options)
    model.gain = nn.Parameter(model.gain.detach().reshape(1), requires_grad=model.gain.requires_grad)
    return model


#: Name: (model, or its options; what `initialize` takes).
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (Options(), {}),
    "all persistent": (Options(), {"threshold": 10**6}),
    "none persistent": (Options(), {"threshold": 0}),
    "padded": (Options(width=7), {}),  # no parameter divides by two or four
    "offload": (Options(), {"offload_param": {"device": "cpu"}}),
    "tied": (Options(tied=True), {}),
    "borrowed": (Borrowing, {}),
    "frozen": (Options(frozen=("embedding", "positions", "blocks.0.up", "blocks.1.norm1")), {}),
    "unused": (Options(unused=True), {}),
    "checkpoint": (Options(checkpoint="non-reentrant"), {}),
    "reentrant": (Options(checkpoint="reentrant"), {}),
    "reentrant and frozen": (Options(checkpoint="reentrant", frozen=("blocks.0", "gain")), {}),
}


def model_of(way: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    made, zero = WAYS[way]
    return transformer_of_vectors(made) if isinstance(made, Options) else made(), zero


def train(rank: int, way: str, settings: dict[str, Any]) -> None:
    model, zero = model_of(way)
    book = Textbook(model, lr=LR, **{name: value for name, value in settings.items() if name != "loss_scale"})
    before = weights_of(book.model)
    engine = initialize(model, **zero)
    optimizer = Lomo(engine, lr=LR, **settings)
    world = dist.get_world_size()
    for step in range(5):
        losses = [loss_of(book.model, world * step + n) for n in range(world)]
        loss = engine.module(*batch(world * step + rank))
        assert loss.item() == pytest.approx(losses[rank].item(), abs=2e-6)
        book.step(sum(losses) / world)
        optimizer.backward(loss)
        assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=1e-6)
        assert all(param.grad is None for param in model.parameters())
        with torch.no_grad():  # an evaluation interrupts what DeepSpeed has recorded
            assert engine.module(*batch(7)).item() == pytest.approx(loss_of(book.model, 7).item(), abs=2e-6)
    weights, expected = whole_weights(engine), weights_of(book.model)
    for name, param in model.named_parameters():
        assert (weights[name] - expected[name]).abs().max().item() <= 1e-6, name
        moved = param.requires_grad and not name.startswith("spare")
        assert moved != torch.equal(expected[name], before[name]), name
    assert optimizer.step_count.item() == 5 and optimizer.skipped_steps.item() == 0


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks(ranks: Any, way: str) -> None:
    ranks(2).call(train, way, CLIPPED)


@pytest.mark.parametrize("way", ["plain", "padded"])
def test_four_ranks(ranks: Any, way: str) -> None:
    ranks(4).call(train, way, CLIPPED)


def test_one_rank(ranks: Any) -> None:
    ranks(1).call(train, "plain", CLIPPED)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_grad_norm": 1e6},
        CLIPPED | {"clip_passes": "one"},
        {"clip_grad_value": 1e-2, "clip_grad_norm": 0.1, "loss_scale": "dynamic"},
    ],
    ids=str,
)
def test_settings(ranks: Any, settings: dict[str, Any]) -> None:
    ranks(2).call(train, "plain", settings)
