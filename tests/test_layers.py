"""Fused layers are the plain ones to everybody but their optimizer, and become so again."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from support.models import Options, assert_same_bits, loss_of, same_bits, transformer, weights_of
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from lomo_kernels import Lomo
from lomo_kernels.layers import FusedLayer, factor_sinks


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def fused(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FusedLayer)]


def test_nothing_shows_while_it_is_on_and_nothing_stays_when_it_is_off() -> None:
    model = transformer(Options(tied=True))
    model.blocks[0].qkv.register_forward_hook(lambda *_: None)
    before, shown, state = kinds(model), repr(model), weights_of(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    optimizer = Lomo(model, lr=0.1, fused_layers=True)
    assert {"embedding", "head", "blocks.0.qkv", "blocks.1.down"} <= set(fused(model))
    assert repr(model) == shown
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert isinstance(model.head, nn.Linear) and isinstance(model.embedding, nn.Embedding)
    assert type(model.head).__name__ == "Linear" and type(model.head).__module__ == nn.Linear.__module__
    optimizer.remove()
    assert kinds(model) == before
    assert_same_bits(weights_of(model), state)
    assert not factor_sinks


@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle", "torch.save"])
def test_copies_are_plain(way: str) -> None:
    model = transformer()
    plain = kinds(model)
    optimizer = Lomo(model, lr=0.1, fused_layers=True)
    optimizer.backward(loss_of(model, 0))
    buffer = io.BytesIO()
    if way == "torch.save":
        torch.save(model, buffer)
    saved = pickle.dumps(model) if way == "pickle" else buffer.getvalue()
    assert b"lomo_kernels" not in saved, "a file must not need this library"
    buffer.seek(0)
    other = {
        "copy": lambda: copy.copy(model.head),
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(saved),
        "torch.save": lambda: torch.load(buffer, weights_only=False),
    }[way]()
    if way == "copy":
        assert type(other) is nn.Linear and other.weight is model.head.weight
        return
    assert kinds(other) == plain
    assert_same_bits(weights_of(other), weights_of(model))
    twin = Lomo(other, lr=0.1, fused_layers=True)
    for net, train in ((model, optimizer), (other, twin)):
        train.backward(loss_of(net, 1))
    assert_same_bits(weights_of(other), weights_of(model))


def test_state_dicts_go_both_ways() -> None:
    model, other = transformer(seed=1), transformer(seed=2)
    optimizer = Lomo(model, lr=0.1, fused_layers=True)
    model.load_state_dict(other.state_dict())
    assert_same_bits(weights_of(model), weights_of(other))
    other.load_state_dict(model.state_dict())
    optimizer.backward(loss_of(model, 0))
    resumed = Lomo(other, lr=0.1, fused_layers=False)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.step_count.item() == 1


def test_an_optimizer_that_is_dropped_leaves_plain_layers() -> None:
    model = transformer()
    plain = kinds(model)
    optimizer = Lomo(model, lr=0.1, fused_layers=True)
    del optimizer
    gc.collect()
    assert kinds(model) == plain and not factor_sinks
    with Lomo(model, lr=0.1, fused_layers=True):
        assert fused(model)
    assert kinds(model) == plain


def test_a_model_that_is_dropped_with_its_optimizer_is_freed() -> None:
    import weakref

    model = transformer()
    optimizer = Lomo(model, lr=0.1, fused_layers=True, clip_grad_norm=1.0, clip_passes="one")
    optimizer.backward(loss_of(model, 0))
    alive = weakref.ref(model.head.weight)
    del model, optimizer
    gc.collect()
    assert alive() is None and not factor_sinks


class Special(nn.Linear):
    pass


def test_what_takes_no_part_and_why() -> None:
    own_forward = nn.Linear(3, 3)
    own_forward.forward = lambda x: x
    parametrized = parametrize.register_parametrization(nn.Linear(3, 3), "weight", nn.Identity())
    shared = nn.Linear(3, 3)
    also = nn.Bilinear(3, 3, 3)
    also.weight = shared.weight
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(3, 3),
            "subclass": Special(3, 3),
            "own_forward": own_forward,
            "parametrized": parametrized,
            "max_norm": nn.Embedding(3, 3, max_norm=1.0),
            "by_freq": nn.Embedding(3, 3, scale_grad_by_freq=True),
            "norm": nn.LayerNorm(3),
            "frozen": nn.Linear(3, 3).requires_grad_(False),
            "shared": shared,
            "also": also,
        }
    )
    optimizer = Lomo(model, lr=0.1, fused_layers=True)
    assert fused(model) == ["plain", "frozen", "shared"]
    rows = {line.split()[0]: line for line in optimizer.summary().splitlines()}
    reasons = {
        "plain.weight": ("never exists", "weight of Linear"),
        "plain.bias": ("freed in its hook", "bias of Linear"),
        "subclass.weight": ("freed in its hook", "weight of Special"),
        "own_forward.weight": ("freed in its hook", "its module has a forward of its own"),
        "parametrized.parametrizations.weight.original": ("freed in its hook", "original of ParametrizationList"),
        "max_norm.weight": ("freed in its hook", "weight of Embedding: max_norm, scale_grad_by_freq or sparse"),
        "by_freq.weight": ("freed in its hook", "weight of Embedding: max_norm, scale_grad_by_freq or sparse"),
        "norm.weight": ("freed in its hook", "weight of LayerNorm"),
        "frozen.weight": ("none", "frozen"),
        "shared.weight": ("never exists", "also in a Bilinear"),
    }
    for name, (gradient, reason) in reasons.items():
        assert gradient in rows[name] and reason in rows[name], rows[name]
    assert "2 of " in optimizer.summary()


def test_summary_says_what_is_kept() -> None:
    model = nn.Sequential(*(nn.Linear(200, 200) for _ in range(3)), nn.Conv1d(200, 200, 1), nn.LayerNorm(200))
    text = Lomo(model, lr=0.1, clip_grad_norm=1.0, clip_passes="one", fused_layers=True).summary()
    assert "3 x *.weight" in text and "its factors are kept, or it, if smaller" in text
    assert "kept, and it is large" in next(line for line in text.splitlines() if line.startswith("3.weight"))
    assert "3 of 10 trained parameters, 74.4% of their elements" in text
    assert "0.16 MiB of other gradients are kept" in text
    model = nn.Linear(2, 2)
    assert "fused_layers=False" in Lomo(model, lr=0.1).summary()


def run(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).square().sum()


WATCHERS: dict[str, Any] = {
    "a hook on the weight": lambda layer, seen: layer.weight.register_hook(lambda grad: seen.append(grad)),
    "a hook after accumulation": lambda layer, seen: layer.weight.register_post_accumulate_grad_hook(
        lambda param: seen.append(param.grad)
    ),
}


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("rule", [{}, {"clip_grad_norm": 0.1, "clip_passes": "one"}], ids=["plain", "one"])
def test_who_watches_the_gradient_sees_it(watcher: str, rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 50)
    x = torch.randn(3, 40)
    (true,) = torch.autograd.grad(run(layer, x), layer.weight)
    seen: list[Tensor | None] = []
    WATCHERS[watcher](layer, seen)  # before the optimizer's own, which takes the gradient away
    optimizer = Lomo(layer, lr=0.1, fused_layers=True, **rule)
    optimizer.backward(run(layer, x))
    assert len(seen) == 1 and seen[0] is not None
    torch.testing.assert_close(seen[0], true)


def test_gradients_asked_for_in_the_middle_of_a_step_are_true() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 50)
    x = torch.randn(3, 40, requires_grad=True)
    true = torch.autograd.grad(run(layer, x), (layer.weight, x))
    found: list[tuple[Tensor, ...]] = []
    optimizer = Lomo(layer, lr=0.1, fused_layers=True)
    before = layer.weight.detach().clone()

    def ask(_: Tensor) -> None:
        with torch.enable_grad():
            found.append(torch.autograd.grad(run(layer, x), (layer.weight, x)))
            found.append((true[0], *torch.autograd.grad(run(layer, x), x)))

    output = layer(x)
    output.register_hook(ask)
    optimizer.backward(output.square().sum())
    for gradients in found:
        for mine, exact in zip(gradients, true, strict=True):
            torch.testing.assert_close(mine, exact)
    torch.testing.assert_close(layer.weight, before - 0.1 * true[0])
    assert len(found) == 2


def test_second_derivatives_are_those_of_the_plain_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    plain = copy.deepcopy(model)
    optimizer = Lomo(model, lr=0.1, fused_layers=True)
    other = Lomo(plain, lr=0.1)
    x = torch.randn(6, 4, requires_grad=True)
    for _ in range(3):
        for net, train in ((model, optimizer), (plain, other)):
            loss = net(x).square().sum()
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            train.backward(loss + slope.square().sum())
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_gradcheck() -> None:
    """Outside the optimizer's backward: first and second derivatives against finite differences, in float64."""
    from lomo_kernels.layers.embedding import _Embedding
    from lomo_kernels.layers.linear import _Linear

    torch.manual_seed(0)
    x, w, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,)))
    for bias, transposed in itertools.product((b, None), (False, True)):

        def linear(x: Tensor, w: Tensor, bias: Tensor | None = bias, transposed: bool = transposed) -> Any:
            return _Linear.apply(x, w.T if transposed else w, bias, False, transposed)

        assert torch.autograd.gradcheck(linear, (x, w))
        assert torch.autograd.gradgradcheck(linear, (x, w))
    indices = torch.tensor([[1, 2, 2], [0, 3, 1]])
    assert torch.autograd.gradcheck(lambda w: _Embedding.apply(indices, w, None), (w,))
    assert torch.autograd.gradgradcheck(lambda w: _Embedding.apply(indices, w, 3), (w,))


def test_a_layer_frozen_and_thawed() -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.1, fused_layers=True)
    for trainable in (False, True):
        model.head.weight.requires_grad_(trainable)
        before = model.head.weight.detach().clone()
        optimizer.backward(loss_of(model, 0))
        assert same_bits(model.head.weight, before) != trainable


def test_an_optimizer_that_goes_leaves_what_another_has_fused() -> None:
    layer = nn.Linear(4, 4)
    first = Lomo(layer, lr=0.1, fused_layers=True)
    layer.weight = nn.Parameter(torch.randn(4, 4))
    second = Lomo([layer.weight], lr=0.1, fused_layers=layer)
    first.remove()
    assert isinstance(layer, FusedLayer) and "never exists" in second.summary()
    second.remove()
    assert type(layer) is nn.Linear


PATCHES: dict[str, Any] = {
    "nn.Linear.forward": (nn.Linear, "forward", lambda old: lambda self, x: old(self, x) * 2),
    "F.linear": (torch.nn.functional, "linear", lambda old: lambda x, weight, bias=None: old(x, weight * 2, bias)),
    "nn.Embedding.forward": (nn.Embedding, "forward", lambda old: lambda self, x: old(self, x) * 2),
    "F.embedding": (torch.nn.functional, "embedding", lambda old: lambda x, weight, *rest: old(x, weight * 2, *rest)),
}


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func in (torch.nn.functional.linear, torch.nn.functional.embedding) else result


@pytest.mark.parametrize("patch", [*PATCHES, "a function mode"])
def test_who_replaces_the_plain_layer_is_heard(patch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 20), nn.Linear(20, 30))
    plain = copy.deepcopy(model)
    one, other = Lomo(model, lr=0.1, fused_layers=True), Lomo(plain, lr=0.1)
    if patch in PATCHES:
        owner, name, new = PATCHES[patch]
        monkeypatch.setattr(owner, name, new(getattr(owner, name)))
    for net, optimizer in ((model, one), (plain, other)):
        with Doubled() if patch not in PATCHES else contextlib.nullcontext():
            loss = net(torch.tensor([1, 2, 2])).square().sum()
        optimizer.backward(loss)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_default_device_keeps_layers_fused() -> None:
    layer = nn.Linear(4, 4)
    with Lomo(layer, lr=0.1, fused_layers=True), torch.device("cpu"):
        assert type(layer(torch.ones(2, 4)).grad_fn).__name__ == "_LinearBackward"
