"""A small model with a head and its loss, and the ways of `Lomo` that train it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import linear_cross_entropy
from lomo_kernels.composite import head as blocks
from lomo_kernels.composite import tiled
from support.textbook import Textbook

HAS_MODULE = hasattr(nn, "LinearCrossEntropyLoss")
#: Ways to call a head with its loss: ours with a tied weight or not, torch's module and function, Liger's function.
KINDS = ["linear", "tied", "module", "function", "liger"]
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
    """`kind`: one of `KINDS`. `tied`: whether the embedding has the head's weight. `plain`: by the logits, whole."""

    def __init__(self, kind: str = "linear", *, bias: bool = False, checkpoints: str = "none", **options: Any) -> None:
        super().__init__()
        vocab, width = options.pop("vocab", 700), options.pop("width", 16)
        tied = options.pop("tied", kind in ("tied", "function"))
        self.kind, self.plain, self.checkpoints, self.options = kind, False, checkpoints, options
        self.embedding = nn.Embedding(vocab, width)
        self.inner = nn.Linear(width, width)
        if kind == "module":
            self.head: nn.Module = nn.LinearCrossEntropyLoss(width, vocab, bias=bias, **options)
        else:
            self.head = nn.Linear(width, vocab, bias=bias)
        if tied:
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
        if self.kind == "function":
            return F.linear_cross_entropy(x, linear.weight, targets, linear_bias=linear.bias, **options)
        if self.kind == "liger":
            return liger(x, linear.weight, targets, linear.bias, **options)
        return linear_cross_entropy(x, linear.weight, targets, linear_bias=linear.bias, **options)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if self.checkpoints == "none":
            loss = self.loss(self.hidden(tokens), targets)
        else:
            x = self.hidden(tokens)
            loss = checkpoint(self.loss, x, targets, use_reentrant=self.checkpoints == "reentrant")
        return loss.sum() if loss.dim() else loss


def liger(*args: Any, **options: Any) -> Tensor:
    """As `liger_fused_linear_cross_entropy`, whose module takes long to import."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    named = {"weight": "ce_weight"}
    bound = inspect.signature(Function.forward).bind(None, *args, **{named.get(k, k): v for k, v in options.items()})
    bound.apply_defaults()
    loss: Tensor = Function.apply(*bound.args[1:])[0]
    return loss


def batch(seed: int, tokens: int = 37, vocab: int = 700) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(vocab, (2, tokens), generator=generator)
    y[::7] = -100
    return x, y


def model_of(kind: str = "linear", seed: int = 0, **options: Any) -> Model:
    if kind in ("module", "function") and not HAS_MODULE:
        pytest.skip("nn.LinearCrossEntropyLoss came with torch 2.13")
    if kind == "liger":
        pytest.importorskip("triton", reason="liger-kernel runs on Triton")
        pytest.importorskip("liger_kernel.ops", reason="liger-kernel is not installed: it is in the extra 'test'")
    torch.manual_seed(seed)
    return Model(kind, **options)


def error(got: Tensor, exact: Tensor) -> float:
    """Relative, of the whole tensor."""
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def textbook_of(model: Model, way: str) -> Textbook:
    """It makes the logits whole."""
    options = {name: WAYS[way][name] for name in ("clip_grad_norm", "clip_grad_value") if name in WAYS[way]}
    textbook = Textbook(model, lr=0.2, weight_decay=WAYS[way].get("weight_decay", 0.0), **options)
    textbook.model.plain, textbook.model.checkpoints = True, "none"
    return textbook


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """So that small tensors take several blocks, and the last one is smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILE_BYTES", 4096)
        patch.setattr(tiled, "LEAST_ROWS", 48)
        patch.setattr(blocks, "LEAST_TOKENS", 10)
        yield
