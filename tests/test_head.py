"""A language model's head with its loss: the logits never exist whole, the weight's gradient never exists."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import assert_same_bits, weights_of
from support.textbook import Textbook
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lomo_kernels.layers.head as layer
from lomo_kernels import Lomo, linear_cross_entropy
from lomo_kernels.composite import head as blocks
from lomo_kernels.composite import tiled
from lomo_kernels.layers import factor_sinks
from lomo_kernels.memory import LiveBytes

HAS_MODULE = hasattr(nn, "LinearCrossEntropyLoss")
CLIP = {"clip_grad_norm": 0.05}
WAYS: dict[str, dict[str, Any]] = {
    "hook": {},
    "two passes": CLIP | {"clip_passes": "two"},
    "one pass": CLIP | {"clip_passes": "one"},
    "a budget": CLIP | {"clip_memory": 6000},
    "loss scale": CLIP | {"clip_passes": "two", "loss_scale": 1024.0},
    "dynamic": {"loss_scale": "dynamic"},
    "by element": {"clip_grad_value": 1e-3, "weight_decay": 0.01},
}


class Model(nn.Module):
    """`kind`: "tied", "linear" or "module". `plain`: by the logits, whole."""

    def __init__(self, kind: str = "linear", *, bias: bool = False, checkpoints: str = "none", **options: Any) -> None:
        super().__init__()
        vocab, width = options.pop("vocab", 700), options.pop("width", 16)
        self.kind, self.plain, self.checkpoints, self.options = kind, False, checkpoints, options
        self.embedding = nn.Embedding(vocab, width)
        self.inner = nn.Linear(width, width)
        if kind == "module":
            self.head: nn.Module = nn.LinearCrossEntropyLoss(width, vocab, bias=bias, **options)
        else:
            self.head = nn.Linear(width, vocab, bias=bias)
        if kind == "tied":
            self.head.weight = self.embedding.weight
        self.to(torch.float32)
        with torch.no_grad():
            for param in self.parameters():
                param.normal_(std=0.3)

    def hidden(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        return x + torch.tanh(self.inner(x))

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        options = self.options
        linear = self.head.linear if self.kind == "module" else self.head
        if self.plain:
            return F.cross_entropy(F.linear(x, linear.weight, linear.bias), targets, **options)
        if self.kind == "module":
            loss: Tensor = self.head(x, targets)
            return loss
        return linear_cross_entropy(x, linear.weight, targets, linear_bias=linear.bias, **options)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if self.checkpoints == "none":
            loss = self.loss(self.hidden(tokens), targets)
        else:
            x = self.hidden(tokens)
            loss = checkpoint(self.loss, x, targets, use_reentrant=self.checkpoints == "reentrant")
        return loss.sum() if loss.dim() else loss


def batch(seed: int, tokens: int = 37, vocab: int = 700) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(vocab, (2, tokens), generator=generator)
    y[::7] = -100
    return x, y


def model_of(kind: str = "linear", seed: int = 0, **options: Any) -> Model:
    if kind == "module" and not HAS_MODULE:
        pytest.skip("nn.LinearCrossEntropyLoss came with torch 2.13")
    torch.manual_seed(seed)
    return Model(kind, **options)


class Formed:
    """Counts gradients of the weight that were formed whole."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def counted(*arguments: Any) -> Tensor:
            self.count += 1
            return blocks.weight_gradient(*arguments)

        patch.setattr("lomo_kernels.layers.factors.weight_gradient", counted)


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> Formed:
    return Formed(monkeypatch)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors take several blocks, and the last one is smaller."""
    monkeypatch.setattr(tiled, "TILE_BYTES", 4096)
    monkeypatch.setattr(tiled, "LEAST_ROWS", 48)
    monkeypatch.setattr(blocks, "LEAST_TOKENS", 10)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["linear", "tied", "module"])
def test_equals_the_textbook(kind: str, way: str, formed: Formed) -> None:
    model = model_of(kind, bias=kind != "linear")
    textbook = Textbook(
        model,
        lr=0.2,
        weight_decay=WAYS[way].get("weight_decay", 0.0),
        clip_grad_norm=WAYS[way].get("clip_grad_norm"),
        clip_grad_value=WAYS[way].get("clip_grad_value"),
    )
    textbook.model.plain = True
    optimizer = Lomo(model, lr=0.2, fused_layers=True, **WAYS[way])
    for step in range(5):
        optimizer.backward(model(*batch(step)))
        textbook.step(textbook.model(*batch(step)))
    for (name, ours), theirs in zip(model.named_parameters(), textbook.model.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-5, atol=2e-6, msg=name)
    assert formed.count == 0
