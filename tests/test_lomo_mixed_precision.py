"""float16 autocast over float32 weights, torch's GradScaler, and what either would do to a step without a word."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.models import assert_same_bits, gives, vector, weights_of
from support.textbook import Textbook, Textbook64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo
from lomo_kernels.optim import scaling

LR = 0.5
RULES: dict[str, dict[str, Any]] = {
    "hook": {},
    "two": {"clip_grad_norm": 0.05, "clip_passes": "two"},
    "one": {"clip_grad_norm": 0.05, "clip_passes": "one"},
}
BY_RULE = pytest.mark.parametrize("rule", RULES)
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


class Perceptron(nn.Module):
    """Weights below and above 64 KiB; a loss so small that its activations' gradients are zero in float16."""

    def __init__(self, shrink: float = 1e-5, how: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 160), nn.Tanh(), nn.Linear(160, 162), nn.Tanh(), nn.Linear(162, 4))
        self.shrink, self.how = shrink, how

    def forward(self, step: int) -> Tensor:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        y = checkpoint(self.layers[:4], x.requires_grad_(), use_reentrant=True) if self.how != "plain" else None
        return (self.layers(x) if y is None else self.layers[4:](y)).float().square().mean() * self.shrink


def under(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


# ---- float16 autocast -----------------------------------------------------------------------------------------------


@BY_RULE
@FUSED
@pytest.mark.parametrize("how", ["plain", "checkpoint"])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_float16_autocast_is_scaled(rule: str, fused: bool, how: str, inside: bool) -> None:
    """lr makes up for the small loss: what underflows is not learned at all."""
    model = Perceptron(how=how)
    lr = LR / model.shrink
    settings = {k: v * model.shrink if k == "clip_grad_norm" else v for k, v in RULES[rule].items()}
    book = Textbook64(model, lr=lr, **settings)
    before = weights_of(model)
    optimizer = Lomo(model, lr, fused_layers=fused, **settings)
    for step in range(3):
        with under(torch.float16):
            loss = model(step)
            if inside:
                optimizer.backward(loss)
        if not inside:
            optimizer.backward(loss)
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).double()
        book.step(book.model.layers(x).square().mean() * model.shrink)
    assert optimizer.loss_scale.item() == 2.0**16 and optimizer.skipped_steps.item() == 0
    for name, weight in model.named_parameters():
        moved = (book.model.get_parameter(name) - before[name]).norm()
        assert (weight - book.model.get_parameter(name)).norm() < 0.02 * moved, name


@pytest.mark.parametrize("scale", [None, 1.0])
def test_without_a_scale_it_underflows(scale: float | None) -> None:
    """What the test above is there for."""
    model = Perceptron()
    before = weights_of(model)
    optimizer = Lomo(model, LR / model.shrink, loss_scale=scale, clip_passes="two")
    with under(torch.float16):
        optimizer.backward(model(0))
    assert_same_bits(
        weights_of(model.layers[0]), {"weight": before["layers.0.weight"], "bias": before["layers.0.bias"]}
    )


@BY_RULE
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_nothing_else_is_scaled(rule: str, dtype: torch.dtype | None) -> None:
    model = Perceptron(shrink=1.0)
    optimizer, book = Lomo(model, LR, **RULES[rule]), Textbook(model, lr=LR, **RULES[rule])
    for step in range(2):
        with under(dtype):
            optimizer.backward(model(step))
            loss = book.model(step)
        book.step(loss, norm=optimizer.last_grad_norm)
        assert_same_bits(weights_of(model), weights_of(book.model))
    assert optimizer.loss_scale.item() == 1.0
    assert optimizer.state_dict()["lomo"]["scaling"] == "none"


def test_the_graph_is_looked_at_once() -> None:
    model = Perceptron(shrink=1.0)
    optimizer = Lomo(model, LR)
    with mock.patch.object(scaling, "nodes_of", wraps=scaling.nodes_of) as looked:
        for step in range(3):
            optimizer.backward(model(step))
        assert looked.call_count == 1
        with under(torch.float16):  # from the first step on, or loss_scale="dynamic"
            optimizer.backward(model(3))
        assert looked.call_count == 1
    assert optimizer.loss_scale.item() == 1.0


def test_a_loss_far_from_the_last_layer() -> None:
    """Not the whole of a large graph is looked at."""
    model = Perceptron(shrink=1.0)
    optimizer = Lomo(model, LR)
    with under(torch.float16):
        loss = model(0)
    for _ in range(500):
        loss = loss + 0.0
    optimizer.backward(loss)
    assert optimizer.loss_scale.item() == 2.0**16


@BY_RULE
def test_accumulated_from_the_first(rule: str) -> None:
    model = Perceptron()
    lr = LR / model.shrink
    settings = {k: v * model.shrink if k == "clip_grad_norm" else v for k, v in RULES[rule].items()}
    book = Textbook64(model, lr=lr, **settings)
    before = weights_of(model)
    optimizer = Lomo(model, lr, **settings)
    with under(torch.float16):
        with optimizer.accumulate():
            optimizer.backward(model(0))
        optimizer.backward(model(1))
    x = [torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).double() for step in range(2)]
    book.step(sum(book.model.layers(one).square().mean() * model.shrink for one in x))
    for name, weight in model.named_parameters():
        moved = (book.model.get_parameter(name) - before[name]).norm()
        assert (weight - book.model.get_parameter(name)).norm() < 0.02 * moved, name


def test_a_resumed_run_is_scaled_as_the_one_it_continues() -> None:
    model = Perceptron()
    optimizer = Lomo(model, LR)
    for resumed in range(3):
        with under(torch.float16):
            optimizer.backward(model(resumed))
        state = optimizer.state_dict()
        assert state["lomo"]["scaling"] == "dynamic" and state["lomo"]["growth_tracker"].item() == resumed + 1
        optimizer = Lomo(model, LR)
        optimizer.load_state_dict(state)
        assert str(optimizer.state_dict()["lomo"]) == str(state["lomo"])
    explicit = Lomo(model, LR, loss_scale=None)
    with pytest.raises(ValueError, match="dynamic loss scaling, this optimizer has none"):
        explicit.load_state_dict(state)


# ---- GradScaler -----------------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[torch.amp.GradScaler, Tensor], Tensor]] = {
    "scaled": lambda scaler, loss: scaler.scale(loss),
    "a part": lambda scaler, loss: scaler.scale(loss) / 4,
    "scaled part": lambda scaler, loss: scaler.scale(loss / 4),
    "float16": lambda scaler, loss: scaler.scale(loss.half()),
}
USES: dict[str, Callable[[Lomo, Tensor], Any]] = {
    "backward": lambda optimizer, loss: optimizer.backward(loss),
    "fused_backward": lambda optimizer, loss: optimizer.fused_backward(loss, lr=LR),
    "grad_norm": lambda optimizer, loss: optimizer.grad_norm(loss),
}
CASES = [("hook", "scaled", "fused_backward"), ("two", "scaled", "grad_norm"), ("one", "scaled", "backward")]


@pytest.mark.parametrize(("rule", "how", "use"), [*(("hook", how, "backward") for how in LOSSES), *CASES])
def test_a_loss_that_a_grad_scaler_scaled_is_refused(rule: str, how: str, use: str) -> None:
    model = Perceptron(shrink=1.0)
    optimizer, book = Lomo(model, LR, **RULES[rule]), Textbook(model, lr=LR, **RULES[rule])
    scaler = torch.amp.GradScaler("cpu")
    before = weights_of(model)
    loss = LOSSES[how](scaler, model(0))
    with pytest.raises(RuntimeError, match=r'GradScaler.*loss_scale="dynamic"'):
        USES[use](optimizer, loss)
    with optimizer.accumulate(), pytest.raises(RuntimeError, match="GradScaler"):
        USES[use](optimizer, loss)
    assert_same_bits(weights_of(model), before)
    assert all(param.grad is None for param in model.parameters())
    optimizer.backward(model(0))
    book.step(book.model(0), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(book.model))


def test_no_false_alarm() -> None:
    """A disabled scaler, a gone one, factors of the user's own; the garbage collector is asked once."""
    w = vector(0.0)
    optimizer = Lomo([w], 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    living = scaler.scale(torch.ones(()))
    gone = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaled = gone.scale(gives(w, torch.tensor([0.5])))
    del gone
    gc.collect()
    tokens = torch.tensor(2.0)
    loss = gives(w, torch.tensor([0.5]))
    with mock.patch.object(scaling.gc, "get_referrers", wraps=gc.get_referrers) as asked:
        optimizer.backward(torch.amp.GradScaler("cpu", enabled=False).scale(loss))
        assert asked.call_count == 0
        optimizer.backward(gives(w, torch.tensor([0.5])) * tokens)
        count = asked.call_count
        assert count > 0
        optimizer.backward(scaled)
        for _ in range(3):
            optimizer.backward(gives(w, torch.tensor([0.5])) * torch.tensor(2.0))
        assert asked.call_count == count
    assert w.item() == -5.5
    assert living.item() == 2.0


@pytest.mark.parametrize("scaled", [False, True])
def test_looking_for_a_scaler_unpacks_nothing(scaled: bool) -> None:
    """A hook may give a saved tensor up once (offloading), or compute a whole checkpoint again for it."""
    w = vector(2.0)
    optimizer = Lomo([w], 0.5)
    forwards: list[int] = []

    def masked(w: Tensor) -> Tensor:
        forwards.append(1)
        return (w.exp() * torch.ones(1)).sum()

    for _ in range(2):
        forwards.clear()
        optimizer.backward(checkpoint(masked, w, use_reentrant=False))
        assert len(forwards) == 2
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        kept[len(kept)] = tensor
        return len(kept) - 1

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = w.item()
    with torch.autograd.graph.saved_tensors_hooks(pack, kept.pop):
        loss = gives(w, torch.tensor([0.5])) * torch.tensor(2.0)
    if scaled:
        with pytest.raises(RuntimeError, match="GradScaler"):
            optimizer.backward(scaler.scale(loss))
        return
    optimizer.backward(loss)
    assert not kept and w.item() == before - 0.5


@pytest.mark.parametrize("kind", ["freed graph", "leaf", "product of two"])
def test_losses_that_are_products(kind: str) -> None:
    w, v = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(3.0))
    optimizer = Lomo([w, v], 0.5)
    if kind == "leaf":
        optimizer.backward(w)
        assert (w.item(), v.item()) == (0.5, 3.0)
        return
    loss = w * v if kind == "product of two" else w * torch.tensor(2.0)
    optimizer.backward(loss)
    assert (w.item(), v.item()) == ((-0.5, 2.5) if kind == "product of two" else (0.0, 3.0))
    if kind == "freed graph":
        with pytest.raises(RuntimeError, match="second time"):
            optimizer.backward(loss)
