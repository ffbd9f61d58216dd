"""A language model's head with its loss, in every way of `Lomo`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.heads import HAS_MODULE, KINDS, WAYS, Model, batch, error, model_of, small_blocks, textbook_of  # noqa: F401
from support.models import assert_same_bits, weights_of
from torch import Tensor

from lomo_kernels import Lomo
from lomo_kernels.composite import head as blocks

pytestmark = pytest.mark.usefixtures("small_blocks")


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_textbook(kind: str, way: str, formed: Formed) -> None:
    model = model_of(kind, bias=kind != "linear")
    textbook = textbook_of(model, way)
    optimizer = Lomo(model, lr=0.2, fused_layers=True, **WAYS[way])
    for step in range(5):
        optimizer.backward(model(*batch(step)))
        textbook.step(textbook.model(*batch(step)))
    for (name, ours), theirs in zip(model.named_parameters(), textbook.model.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-5, atol=2e-6, msg=name)
    assert formed.count == 0


def test_a_bias_that_is_updated_before_the_weight() -> None:
    """A large one does not wait for others. The weight's update makes the logits of the bias before."""
    model = model_of("tied", bias=True, vocab=20000, width=3, reduction="sum")
    textbook = textbook_of(model, "hook")
    tokens, targets = batch(0, 6, 20000)
    targets[:] = 5
    with Lomo(model, lr=0.2, fused_layers=True) as optimizer:
        optimizer.backward(model(tokens, targets))
        textbook.step(textbook.model(tokens, targets))
    for ours, theirs in zip(model.parameters(), textbook.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


# ---- every way of Lomo -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "stochastic", "dtype": torch.bfloat16},
        {"rounding": "split", "dtype": torch.bfloat16},
        {"rule": "sign"},
        {"rule": "rows"},
        {"rule": "tensor"},
        {"rule": "adalomo"},
        {"clip_tensor": 1.04},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_rules_and_roundings(kind: str, options: dict[str, Any]) -> None:
    """As without fused layers, whose gradients are formed of the same tiles."""
    dtype = options.get("dtype", torch.float32)
    options = {name: value for name, value in options.items() if name != "dtype"}
    models = [model_of(kind, bias=True).to(dtype) for _ in range(2)]
    models[0].plain = kind == "liger"  # whose kernels need a GPU
    for model, fused in zip(models, (False, True), strict=True):
        with Lomo(model, lr=0.02, fused_layers=fused, **options) as optimizer:
            for step in range(3):
                optimizer.backward(model(*batch(step)))
    rough = {"rtol": 2e-2, "atol": 4e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for (name, ours), theirs in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        if options.get("rule") == "sign":  # a gradient near zero may have either sign
            assert (ours - theirs).abs().gt(1e-6).double().mean() < 1e-2, name
        else:
            torch.testing.assert_close(ours, theirs, **rough, msg=name)


@pytest.mark.parametrize("way", ["hook", "two passes", "one pass"])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation(kind: str, way: str) -> None:
    model = model_of(kind)
    textbook = textbook_of(model, way)
    with Lomo(model, lr=0.2, fused_layers=True, **WAYS[way]) as optimizer:
        for step in range(3):
            with optimizer.accumulate():
                optimizer.backward(model(*batch(step)))
            optimizer.backward(model(*batch(step + 10)))
            textbook.backward(textbook.model(*batch(step)))
            textbook.step(textbook.model(*batch(step + 10)))
    for ours, theirs in zip(model.parameters(), textbook.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "kind,checkpoints",
    # A tied weight has a use outside a reentrant checkpoint, and Liger's forward without gradients needs a GPU.
    [*((kind, "non-reentrant") for kind in KINDS), ("linear", "reentrant"), ("module", "reentrant")],
)
def test_checkpoints(kind: str, checkpoints: str, way: str) -> None:
    model = model_of(kind, bias=True, checkpoints=checkpoints)
    textbook = textbook_of(model, way)
    with Lomo(model, lr=0.2, fused_layers=True, **WAYS[way]) as optimizer:
        for step in range(3):
            optimizer.backward(model(*batch(step)))
            textbook.step(textbook.model(*batch(step)))
    for ours, theirs in zip(model.parameters(), textbook.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


class Twice(Model):
    """Two losses through one weight, as of multi-token prediction."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.hidden(tokens)
        return self.loss(x, targets) + self.loss(x.flip(0) * 0.5, targets)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_used_twice(kind: str, way: str) -> None:
    torch.manual_seed(0)
    model = Twice(kind)
    textbook = textbook_of(model, way)
    with Lomo(model, lr=0.2, fused_layers=True, **WAYS[way]) as optimizer:
        for step in range(3):
            optimizer.backward(model(*batch(step)))
            textbook.step(textbook.model(*batch(step)))
    for ours, theirs in zip(model.parameters(), textbook.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("way", ["two passes", "one pass", "dynamic"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_changes_nothing(kind: str, way: str, bad: float) -> None:
    model = model_of(kind, bias=True)
    with Lomo(model, lr=0.2, fused_layers=True, **WAYS[way]) as optimizer:
        optimizer.backward(model(*batch(0)))
        before = weights_of(model)
        optimizer.backward(model(*batch(1)) * bad)
        assert_same_bits(weights_of(model), before)
        assert optimizer.skipped_steps.item() == 1
        optimizer.backward(model(*batch(2)))
        assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("way", ["hook", "two passes", "one pass"])
def test_a_step_that_breaks_off_and_the_next_one(way: str) -> None:
    """An error in a hook below the head: no weight has changed if the norm comes first, and nothing is left over."""
    model = model_of("tied")
    with Lomo(model, lr=0.2, fused_layers=True, **WAYS[way]) as optimizer:
        optimizer.backward(model(*batch(0)))
        before = weights_of(model)

        def interrupt(_: Tensor) -> None:
            raise KeyboardInterrupt

        handle = model.inner.weight.register_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.backward(model(*batch(1)))
        handle.remove()
        assert_same_bits(weights_of(model), before)
        twin = copy.deepcopy(model)
        optimizer.backward(model(*batch(2)))
    with Lomo(twin, lr=0.2, fused_layers=True, **WAYS[way]) as optimizer:
        optimizer.backward(twin(*batch(2)))
    assert_same_bits(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_for_bit(kind: str) -> None:
    options = {"lr": 0.05, "fused_layers": True, "rounding": "stochastic", **WAYS["one pass"]}
    model = model_of(kind).to(torch.bfloat16)
    optimizer = Lomo(model, **options)
    optimizer.backward(model(*batch(0)))
    for start in (1, 3):  # saved and resumed twice
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for step in range(start, start + 2):
            optimizer.backward(model(*batch(step)))
        other = model_of(kind, seed=9).to(torch.bfloat16)
        resumed = Lomo(other, **options)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        for step in range(start, start + 2):
            resumed.backward(other(*batch(step)))
        assert_same_bits(weights_of(other), weights_of(model))
        optimizer.remove()
        model, optimizer = other, resumed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_reproducible(dtype: torch.dtype) -> None:
    def run(threads: int) -> dict[str, Tensor]:
        model = model_of("tied").to(dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with Lomo(model, lr=0.1, fused_layers=True, **WAYS["two passes"]) as optimizer:
                for step in range(3):
                    optimizer.backward(model(*batch(step)))
        finally:
            torch.set_num_threads(before)
        return weights_of(model)

    assert_same_bits(run(1), run(1))
    if dtype is torch.bfloat16:  # as in other fused layers: float32 products are torch's
        assert_same_bits(run(1), run(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_the_norm_is_exact(kind: str, scale: float) -> None:
    model = model_of(kind, bias=True)
    with Lomo(model, lr=0.0, fused_layers=True, clip_grad_norm=1.0, clip_passes="two") as optimizer:
        optimizer.backward(model(*batch(0)) * scale)
        norm = optimizer.last_grad_norm
    twin = copy.deepcopy(model).double()
    twin.plain = True
    (twin(*batch(0)) * scale).backward()
    exact = torch.stack([param.grad.norm() for param in twin.parameters()]).norm()
    torch.testing.assert_close(norm.double(), exact, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind, bias=True).to(dtype)
    plain = copy.deepcopy(model)
    plain.plain = True
    exact = copy.deepcopy(model).double()
    exact.plain = True
    with Lomo(model, lr=1.0, fused_layers=True, loss_scale=None) as optimizer:
        with torch.autocast("cpu", torch.bfloat16):
            loss, expected = model(*batch(0)), plain(*batch(0))
        assert loss.dtype is expected.dtype is torch.float32
        before = weights_of(model)
        optimizer.backward(loss)
        expected.backward()
        exact(*batch(0)).backward()
    if dtype is torch.bfloat16:
        return  # rounding hides the gradient
    grads = {name: before[name].double() - param.double() for name, param in model.named_parameters()}
    for (name, theirs), right in zip(plain.named_parameters(), exact.parameters(), strict=True):
        assert error(grads[name], right.grad) <= 1.5 * error(theirs.grad, right.grad) + 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_counts(kind: str) -> None:
    """The mean of none is NaN, as torch's, or 0, as Liger's; no weight becomes NaN."""
    model = model_of(kind, bias=True)
    before = weights_of(model)
    with Lomo(model, lr=0.2, fused_layers=True) as optimizer:
        tokens, targets = batch(0)
        loss = model(tokens, torch.full_like(targets, -100))
        assert loss == 0 if kind == "liger" else loss.isnan()
        optimizer.backward(loss)
        loss = model(tokens[:0], targets[:0])
        assert loss == 0 if kind == "liger" else loss.isnan()
        optimizer.backward(loss)
        assert optimizer.skipped_steps.item() == 0  # the gradient is zero, not NaN
    assert_same_bits(weights_of(model), before)


@pytest.mark.parametrize("way", ["hook", "two passes", "one pass"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_weight_that_was_changed_is_refused(when: str, way: str) -> None:
    """Between forward and backward; and in backward before its own update, for which the logits are made again."""
    model = model_of("tied")

    def change(_: Tensor | None = None) -> None:
        with torch.no_grad():
            model.head.weight.mul_(1.0)

    with Lomo(model, lr=0.2, fused_layers=True, **WAYS[way]) as optimizer:
        optimizer.backward(model(*batch(0)))
        loss, before = model(*batch(0)), weights_of(model)
        if when == "before":
            change()
        else:
            model.inner.weight.register_hook(change)
        with pytest.raises(RuntimeError, match="changed in place"):
            optimizer.backward(loss)
        if when == "before" or way != "hook":
            assert_same_bits(weights_of(model), before)


@pytest.mark.parametrize("way", ["hook", "two passes", "one pass"])
def test_saved_tensors_that_are_copies(way: str) -> None:
    """As of `save_on_cpu` on a GPU: they have other versions."""
    model = model_of("tied", bias=True)
    textbook = textbook_of(model, way)
    with Lomo(model, lr=0.2, fused_layers=True, **WAYS[way]) as optimizer:
        for step in range(3):
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
                loss = model(*batch(step))
            optimizer.backward(loss)
            textbook.step(textbook.model(*batch(step)))
        for ours, theirs in zip(model.parameters(), textbook.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            losses = [model(*batch(step)) for step in range(2)]
        with torch.no_grad():
            model.head.weight.mul_(1.0)
        before = weights_of(model)
        for backward in (losses[0].backward, lambda: optimizer.backward(losses[1])):
            with pytest.raises(RuntimeError, match="changed in place after the forward"):
                backward()
        assert_same_bits(weights_of(model), before)


def test_a_frozen_weight_or_input() -> None:
    model = model_of("linear", bias=True)
    model.embedding.requires_grad_(False)
    model.inner.requires_grad_(False)
    textbook = textbook_of(model, "hook")
    with Lomo(model, lr=0.2, fused_layers=True) as optimizer:
        optimizer.backward(model(*batch(0)))
        textbook.step(textbook.model(*batch(0)))
        torch.testing.assert_close(model.head.weight, textbook.model.head.weight)
        model.requires_grad_(True)
        model.head.weight.requires_grad_(False)
        before = model.head.weight.clone()
        optimizer.backward(model(*batch(1)))
        assert torch.equal(before, model.head.weight)


def test_plain_backwards_give_true_gradients() -> None:
    model = model_of("tied")
    twin = copy.deepcopy(model)
    twin.plain = True
    with Lomo(model, lr=0.2, fused_layers=True):
        model(*batch(0)).backward()
        twin(*batch(0)).backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
