"""`linear_cross_entropy` and `nn.LinearCrossEntropyLoss`, fused: their numbers, and what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.heads import HAS_MODULE, KINDS, WAYS, Model, batch, error, model_of, small_blocks, textbook_of  # noqa: F401
from torch import Tensor, nn

import lomo_kernels.layers.losses as losses
from lomo_kernels import Lomo, linear_cross_entropy
from lomo_kernels.layers import factor_sinks
from lomo_kernels.memory import LiveBytes

# ---- what exists -----------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("small_blocks")


def peak_of(model: Model, way: dict[str, Any], data: tuple[Tensor, Tensor]) -> int:
    """Of live bytes in the second step, less those before it."""
    with Lomo(model, lr=1e-3, fused_layers=True, **way) as optimizer:
        optimizer.backward(model(*data))
        with LiveBytes() as live:
            optimizer.backward(model(*data))
        return live.peak


@pytest.mark.parametrize("way", ["hook", "two passes", "one pass", "a budget"])
@pytest.mark.parametrize("kind", KINDS)
def test_neither_logits_nor_the_gradient_exist(kind: str, way: str) -> None:
    vocab, tokens = 5000, 64
    model = model_of(kind, vocab=vocab, width=8)
    weight, logits = vocab * 8 * 4, vocab * tokens * 4
    assert peak_of(model, WAYS[way], batch(0, tokens, vocab)) < weight / 4 < logits / 4


@pytest.mark.skipif(not HAS_MODULE, reason="nn.LinearCrossEntropyLoss came with torch 2.13")
def test_the_module_is_swapped_and_swapped_back() -> None:
    model = model_of("module")
    shown = repr(model)
    with Lomo(model, lr=0.1, fused_layers=True) as optimizer:
        assert type(model.head) is losses.LinearCrossEntropyLoss and repr(model) == shown
        line = next(line for line in optimizer.summary().splitlines() if line.startswith("head.linear.weight"))
        assert "never exists" in line
        assert type(copy.deepcopy(model).head) is nn.LinearCrossEntropyLoss
    assert type(model.head) is nn.LinearCrossEntropyLoss and not factor_sinks
    k_dimensional = nn.LinearCrossEntropyLoss(4, 5, out_features=(2,))
    with Lomo(k_dimensional, lr=0.1, fused_layers=True):
        assert type(k_dimensional) is nn.LinearCrossEntropyLoss


@pytest.mark.skipif(not HAS_MODULE, reason="nn.LinearCrossEntropyLoss came with torch 2.13")
def test_what_the_module_does_not_take_is_torchs() -> None:
    """Probabilities as targets, one sample, and what torch refuses."""
    torch.manual_seed(0)
    model = nn.LinearCrossEntropyLoss(4, 5)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 4)
    with Lomo(model, lr=0.1, fused_layers=True) as optimizer:
        for input, target in ((x, torch.rand(3, 5)), (x[0], torch.tensor(2)), (x, torch.tensor([0, 1, 4]))):
            loss, expected = model(input, target), twin(input, target)
            torch.testing.assert_close(loss, expected)
            optimizer.backward(loss)
            expected.backward()
            with torch.no_grad():
                twin.linear.weight.sub_(0.1 * twin.linear.weight.grad)
                twin.linear.weight.grad = None
            torch.testing.assert_close(model.linear.weight, twin.linear.weight)
        for wrong in (torch.tensor([0, 1]), torch.zeros(3, dtype=torch.int32)):
            with pytest.raises((ValueError, RuntimeError)):
                model(x, wrong)


# ---- the numbers -----------------------------------------------------------------------------------------------------


def gradients(loss: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    wanted = [tensor for tensor in tensors if tensor is not None]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), wanted)]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    classes=st.integers(1, 300),
    width=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignored=st.sampled_from(["none", "some", "all"]),
    seed=st.integers(0, 2**31),
)
def test_is_as_exact_as_torchs(
    tokens: int,
    classes: int,
    width: int,
    dtype: torch.dtype,
    bias: bool,
    weighted: bool,
    reduction: str,
    smoothing: float,
    ignored: str,
    seed: int,
) -> None:
    """Against float64: the error is no more than that of the logits, whole, in the same dtype. Backward makes float32
    logits again, with sums in another order, so a logit's last bits may differ from those of its token's sum."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight, b = normal(tokens, width), normal(classes, width), normal(classes) if bias else None
    of_class = torch.rand(classes, generator=generator).to(dtype) + 0.1 if weighted else None
    target = torch.randint(classes, (tokens,), generator=generator)
    if ignored != "none":
        target[:: 3 if ignored == "some" else 1] = -100
    options = {"reduction": reduction, "label_smoothing": smoothing}

    def whole(to: torch.dtype) -> list[Tensor]:
        a, w, c = (None if t is None else t.to(to).requires_grad_() for t in (x, weight, b))
        of = None if of_class is None else of_class.to(to)
        return gradients(F.cross_entropy(F.linear(a, w, c), target, of, **options), a, w, c)

    a, w, c = (None if t is None else nn.Parameter(t.clone()) for t in (x, weight, b))
    loss = linear_cross_entropy(a, w, target, linear_bias=c, weight=of_class, **options)
    assert loss.dtype is dtype and type(loss.grad_fn).__name__ == "_HeadLossBackward"
    unit = torch.finfo(dtype).eps
    logits = F.linear(x.double(), weight.double(), None if b is None else b.double())
    again = unit * logits.abs().max() if dtype is torch.float32 and logits.numel() else 0.0
    for ours, theirs, exact in zip(gradients(loss, a, w, c), whole(dtype), whole(torch.float64), strict=True):
        assert ours.dtype is theirs.dtype and ours.shape == exact.shape
        if not exact.isfinite().all() or dtype is torch.float16:  # float16 lacks range in both
            assert ours.isnan().equal(exact.isnan())
            continue
        off, theirs_off = ((some.double() - exact).norm() for some in (ours, theirs))
        assert off <= 1.5 * theirs_off + (4 * unit + again) * (exact.norm() + 0.1)


def test_large_logits_are_exact() -> None:
    """The sum of exponentials is found relative to the largest logit, which may come in any block."""
    x = torch.full((3, 2), 100.0, requires_grad=True)
    weight = nn.Parameter(torch.linspace(-3, 3, 20000).reshape(-1, 2)[torch.randperm(10000)])
    target = torch.tensor([5, 0, 9999])
    ours = gradients(linear_cross_entropy(x, weight, target), x, weight)
    for got, exact in zip(
        ours, gradients(F.cross_entropy(F.linear(x.double(), weight.double()), target), x, weight), strict=True
    ):
        torch.testing.assert_close(got.double(), exact.double(), rtol=1e-4, atol=1e-4)  # a logit of 600 has 6e-5


@pytest.mark.parametrize("first", [0, 100, 950])
def test_classes_that_a_bias_rules_out(first: int) -> None:
    """By minus infinity, as of tokens that nobody may write: more than a block of them, and before any other."""
    x, weight = torch.randn(5, 3, requires_grad=True), nn.Parameter(torch.randn(1000, 3))
    bias = torch.zeros(1000)
    bias[first : first + 800] = float("-inf")
    target = torch.tensor([0, 999, 901, -100, 930]) if first else torch.tensor([801, 999, 901, -100, 930])
    target = target.where(bias[target.clamp(min=0)].isfinite() | (target < 0), 5)
    ours = gradients(linear_cross_entropy(x, weight, target, linear_bias=bias), x, weight)
    theirs = gradients(F.cross_entropy(F.linear(x, weight, bias), target), x, weight)
    assert all(each.isfinite().all() for each in theirs)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


# ---- edges -----------------------------------------------------------------------------------------------------------


def test_a_weight_of_one_class() -> None:
    x, weight = torch.randn(4, 3, requires_grad=True), nn.Parameter(torch.randn(1, 3))
    loss, *grads = gradients(linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.int64)), x, weight)
    assert loss == 0 and not any(grad.any() for grad in grads)


def test_leading_dimensions_and_ignore_index() -> None:
    x, weight = torch.randn(2, 5, 3, requires_grad=True), nn.Parameter(torch.randn(7, 3))
    target = torch.randint(7, (2, 5))
    ours = linear_cross_entropy(x, weight, target, reduction="none", ignore_index=3)
    expected = F.cross_entropy((x @ weight.T).movedim(-1, 1), target, reduction="none", ignore_index=3)
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(x, weight, target, reduction="none", ignore_index=3), expected)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"target": torch.zeros(4)}, TypeError, "torch.int64"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected"),
        ({"linear_weight": nn.Parameter(torch.randn(5, 2))}, ValueError, "expected"),
        ({"linear_bias": torch.zeros(4)}, ValueError, "linear_bias"),
        ({"weight": torch.ones(4)}, ValueError, "weight"),
        ({"reduction": "average"}, ValueError, "average"),
        ({"label_smoothing": 1.5}, ValueError, "1.5"),
        ({"input": None}, TypeError, "input is a NoneType, expected a tensor"),
        ({"linear_weight": [1.0]}, TypeError, "linear_weight is a list, expected a tensor"),
        ({"target": 3}, TypeError, "target is a int, expected a tensor"),
        ({"linear_bias": 1.0}, TypeError, "linear_bias is a float, expected a tensor"),
        ({"weight": "balanced"}, TypeError, "weight is a str, expected a tensor"),
        ({"weight": torch.ones(5, dtype=torch.int64)}, TypeError, "weight is torch.int64, expected a floating point"),
        ({"input": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "input is torch.int64, expected a floating"),
        ({"input": torch.zeros(4, 3, dtype=torch.bfloat16)}, TypeError, "linear_weight is torch.float32 and input"),
        ({"linear_bias": torch.zeros(5).double()}, TypeError, "linear_bias is torch.float64 and input torch.float32"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index is 0.5, expected an int or None"),
        ({"ignore_index": True}, TypeError, "ignore_index is True"),
        ({"label_smoothing": "some"}, TypeError, "label_smoothing is 'some', expected a number"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing is nan"),
        ({"reduction": None}, ValueError, "reduction is None"),
        ({"target": torch.tensor([0, 5, 1, 1])}, IndexError, "out of range"),
        ({"target": torch.tensor([0, -1, 1, 1])}, IndexError, "out of range"),
    ],
)
def test_what_is_refused(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    arguments = {
        "input": torch.randn(4, 3),
        "linear_weight": nn.Parameter(torch.randn(5, 3)),
        "target": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(kind, match=words):
        linear_cross_entropy(**(arguments | change))


def test_second_derivatives() -> None:
    x = torch.randn(5, 3, dtype=torch.float32, requires_grad=True)
    weight, target = nn.Parameter(torch.randn(7, 3)), torch.tensor([0, 1, -100, 6, 6])

    def second(loss: Tensor) -> list[Tensor]:
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), [x, weight]))

    for ours, theirs in zip(
        second(linear_cross_entropy(x, weight, target)), second(F.cross_entropy(x @ weight.T, target)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
