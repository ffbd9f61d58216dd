"""Gated feed-forward layers that keep less for backward: the same bits, fewer bytes."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from support.models import assert_same_bits, weights_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo
from lomo_kernels.demo.model import Config, FeedForward
from lomo_kernels.layers import FusedLayer, fused_class_of
from lomo_kernels.memory import LiveBytes


class Layer(nn.Module):
    def __init__(self, width: int = 12, inner: int = 20, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width)
        self.act = nn.SiLU() if activation is None else activation


class Meta(Layer):
    def forward(self, x: Tensor) -> Tensor:
        """A docstring is no difference."""
        return cast(torch.Tensor, self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Module(Layer):
    def forward(self, hidden: Tensor) -> Tensor:
        out = self.w2(self.act(self.w1(hidden)) * self.w3(hidden))
        return out


class OtherFormula(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return cast(torch.Tensor, self.w2(F.silu(self.w1(x)) + self.w3(x)))


class OtherFunction(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return cast(torch.Tensor, self.w2(F.gelu(self.w1(x)) * self.w3(x)))


class Swapped(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return cast(torch.Tensor, self.w2(self.w1(x) * F.silu(self.w3(x))))


def seen(module: nn.Module, *_: Any) -> None:
    pass


def hooked() -> Module:
    layer = Module()
    layer.act.register_forward_hook(seen)
    return layer


def steps_of(layer: nn.Module, fused: bool, dtype: torch.dtype, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    layer = copy.deepcopy(layer).to(dtype)
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    if kind == "frozen":
        (layer.w1 if hasattr(layer, "w1") else layer.gate).requires_grad_(False)
        x.requires_grad_(False)
    with Lomo(layer, lr=0.1, clip_grad_norm=0.05, clip_passes="two", fused_layers=fused) as optimizer:
        assert isinstance(layer, FusedLayer) is fused
        for module in layer.children():  # so that only gated layers differ: updates from factors round otherwise
            if isinstance(module, FusedLayer):
                module.__class__ = module.plain
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                y = checkpoint(layer, x, use_reentrant=False) if kind == "checkpoint" else layer(x)
            optimizer.backward(y.float().square().mean())
    return weights_of(layer), x.grad if x.requires_grad else x


@pytest.mark.parametrize("kind", ["plain", "checkpoint", "autocast", "frozen"])
def test_the_bits_are_the_plain_layers(kind: str) -> None:
    torch.manual_seed(0)
    for layer in (Meta(), Module(), hooked(), FeedForward(Config(1, 12, 1, 1, 20))):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            plain, fused = (steps_of(layer, each, dtype, kind) for each in (False, True))
            assert_same_bits(fused[0], plain[0])
            assert torch.equal(fused[1], plain[1])


def test_which_layers_are_gated() -> None:
    fused = {each: fused_class_of(each()) for each in (Meta, Module, OtherFormula, OtherFunction, Swapped)}
    assert [each.__name__ for each, kind in fused.items() if kind is not None] == ["Meta", "Module"]


def test_transformers_layers_are_gated() -> None:
    pytest.importorskip("transformers")
    from transformers import GemmaConfig, LlamaConfig, Qwen3Config
    from transformers.models.gemma.modeling_gemma import GemmaMLP
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    for kind, config in ((LlamaMLP, LlamaConfig), (Qwen3MLP, Qwen3Config), (GemmaMLP, GemmaConfig)):
        layer = kind(config(hidden_size=12, intermediate_size=20, num_attention_heads=2))
        kept: list[Tensor] = []

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with Lomo(layer, lr=0.1, fused_layers=True), saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(torch.randn(3, 12))
        wide = {id(tensor.untyped_storage()) for tensor in kept if tensor.shape == (3, 20)}
        assert len(wide) == (4 if kind is GemmaMLP else 3), kind  # Gemma's activation is another one


@pytest.mark.parametrize("other", [nn.ReLU(), nn.SiLU(inplace=True)], ids=["ReLU", "inplace"])
def test_another_activation_is_called(other: nn.Module) -> None:
    torch.manual_seed(0)
    layer = Module(activation=other)
    x = torch.randn(3, 12)
    expected = layer(x)
    with Lomo(layer, lr=0.1, fused_layers=True):
        assert torch.equal(layer(x), expected)


def test_backward_has_less_at_one_time() -> None:
    """Two tensors of the inner width less, of six."""
    peaks = []
    for fused in (False, True):
        layer = FeedForward(Config(1, 64, 1, 1, 1024)).bfloat16()
        x = torch.randn(256, 64, dtype=torch.bfloat16, requires_grad=True)
        with Lomo(layer, lr=0.1, fused_layers=fused) as optimizer, LiveBytes() as live:
            optimizer.backward(checkpoint(layer, x, use_reentrant=False).float().sum())
            live.reset_peak()
            optimizer.backward(checkpoint(layer, x, use_reentrant=False).float().sum())
            peaks.append(live.peak)
    wide = 2 * 256 * 1024
    assert peaks[0] - peaks[1] >= 1.9 * wide


def test_gradients_of_gradients_and_plain_again() -> None:
    torch.manual_seed(0)
    layer = Meta()
    x = torch.randn(3, 12, requires_grad=True)
    optimizer = Lomo(layer, lr=0.1, fused_layers=True)

    def second() -> Tensor:
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    ours = second()
    assert isinstance(layer, FusedLayer) and type(pickle.loads(pickle.dumps(layer))) is Meta
    optimizer.remove()
    assert type(layer) is Meta
    torch.testing.assert_close(ours, second())
