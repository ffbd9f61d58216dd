"""GPT-2's `Conv1D`, fused: its weight is [in, out]. tests/test_lomo_architectures.py has it inside GPT-2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.textbook import Textbook
from test_lomo_fused_memory import allocated, scratch_of_products
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo, layers
from lomo_kernels.composite import tiled

transformers = pytest.importorskip("transformers", reason="Conv1D is a layer of Transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

CLIP = {"clip_grad_norm": 0.05, "clip_passes": "two"}
MODES: dict[str, dict[str, Any]] = {"none": {}, "two": CLIP, "one": CLIP | {"clip_passes": "one"}}


class Model(nn.Module):
    """Two layers, the second one used twice."""

    def __init__(self, width: int = 12, inner: int = 20, saved: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.saved = Conv1D(inner, width), Conv1D(width, inner), saved

    def block(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) + self.down(self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.block, x, use_reentrant=False) if self.saved else self.block(x)
        return y.float().square().mean()


def model_of(**options: Any) -> Model:
    torch.manual_seed(0)
    model = Model(**options)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.3)
    return model


@pytest.mark.parametrize("saved", [False, True], ids=["kept", "checkpoint"])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_textbook(mode: str, saved: bool) -> None:
    model = model_of(saved=saved)
    textbook = Textbook(model, lr=0.2, weight_decay=0.01, clip_grad_norm=MODES[mode].get("clip_grad_norm"))
    optimizer = Lomo(model, lr=0.2, weight_decay=0.01, fused_layers=True, **MODES[mode])
    assert "2 of 4 trained parameters" in optimizer.summary()
    for step in range(5):
        x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(step))
        expected = textbook.model(x)
        optimizer.backward(model(x))
        textbook.step(expected)
    for ours, theirs in zip(model.parameters(), textbook.model.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_plain_backward_has_the_plain_layers_gradients(autocast: bool) -> None:
    plain, fused = model_of(), model_of()
    optimizer = Lomo(fused, lr=0.1, fused_layers=True)
    assert isinstance(fused.up, layers.FusedLayer)
    x = torch.randn(7, 12)
    for model in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x)
        loss.backward()
    limits = {"rtol": 2e-2, "atol": 1e-3} if autocast else {}  # autocast adds the two uses of a weight in bfloat16
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **limits)
    optimizer.remove()
    assert type(fused.up) is Conv1D


def test_a_frozen_weight_and_a_subclass_are_left_alone() -> None:
    class Own(Conv1D):  # type: ignore[misc]
        pass

    model = model_of()
    model.up.weight.requires_grad_(False)
    model.down.__class__ = Own
    before = model.up.weight.clone()
    optimizer = Lomo(model, lr=0.1, fused_layers=True)
    assert type(model.down) is Own
    optimizer.backward(model(torch.randn(7, 12)))
    assert torch.equal(model.up.weight, before)


def test_who_replaced_its_forward_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    Lomo(model, lr=0.1, fused_layers=True)
    monkeypatch.setattr(Conv1D, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], self.nf))
    assert not model.up(torch.randn(7, 12)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["none", "two"])
def test_no_tensor_of_a_weights_size_is_ever_made(mode: str, dtype: torch.dtype) -> None:
    width, inner, tokens = 1024, 1280, 16
    model = model_of(width=width, inner=inner).to(dtype)
    optimizer = Lomo(model, lr=1e-3, fused_layers=True, **MODES[mode])
    x = torch.randn(tokens, width).to(dtype)
    record = allocated(lambda: optimizer.backward(model(x)))
    tile = 4 * max(tiled.tile_rows(width, inner) * inner, tiled.tile_rows(inner, width) * width)
    weight = width * inner * dtype.itemsize
    assert max(record.sizes) <= tile < weight
    assert record.peak < tile + scratch_of_products(dtype, tokens)[1] + weight / 2


def test_an_altered_input_is_named() -> None:
    """The factors of Conv1D are exchanged; the message names them as the layer has them."""
    model = nn.Sequential(nn.Linear(12, 12), Conv1D(12, 12))
    optimizer = Lomo(model, lr=0.1, fused_layers=True, **MODES["one"])
    hidden = model[0](torch.randn(3, 12))
    loss = model[1](hidden).square().sum()

    def alter(_: Tensor) -> None:
        hidden.detach().add_(1)

    hidden.register_hook(alter)
    with pytest.raises(RuntimeError, match=r"the input of the layer of 1\.weight.*altered in place"):
        optimizer.backward(loss)
