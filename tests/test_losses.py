"""torch's `F.linear_cross_entropy` and Liger's fused loss, called with a fused layer's weight: what serves them, what
does not, and what is left of it afterwards. `test_lomo_head` has the numbers."""

from __future__ import annotations

import functools
import gc
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heads import HAS_MODULE, batch, liger, model_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lomo_kernels import Lomo
from lomo_kernels.layers import factor_sinks, losses

needs_torch = pytest.mark.skipif(not HAS_MODULE, reason="F.linear_cross_entropy came with torch 2.13")
OTHER = "a call that is not fused"


def is_ours(loss: Tensor) -> bool:
    """Whether the loss was made by blocks."""
    node: Any = loss.grad_fn
    while node is not None and node.name() != "_HeadLossBackward":
        node = next((after for after, _ in node.next_functions if after is not None), None)
    return node is not None


def ligers_function() -> Any:
    pytest.importorskip("triton", reason="liger-kernel runs on Triton")
    pytest.importorskip("liger_kernel.ops", reason="liger-kernel is not installed: it is in the extra 'test'")
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction


# ---- standing in ----------------------------------------------------------------------------------------------------


@needs_torch
def test_functions_are_exchanged_while_layers_are_fused() -> None:
    plain, function = F.linear_cross_entropy, ligers_function()
    first = Lomo(model_of(), lr=0.1)
    assert F.linear_cross_entropy is plain and "apply" not in vars(function)
    models = [model_of() for _ in range(2)]
    optimizers: list[Any] = [Lomo(model, lr=0.1, fused_layers=True) for model in models]
    ours = F.linear_cross_entropy
    assert ours is not plain and "apply" in vars(function)
    assert ours.__name__ == plain.__name__ and ours.__doc__ == plain.__doc__
    optimizers.pop().remove()
    assert F.linear_cross_entropy is ours
    optimizers.clear()  # dropped without `remove`
    gc.collect()
    assert F.linear_cross_entropy is plain and "apply" not in vars(function) and not factor_sinks
    first.remove()


@needs_torch
def test_somebody_elses_function_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was there before is called for what ours does not take. One that comes later is not removed."""
    plain, calls = F.linear_cross_entropy, []

    def counted(of: Any) -> Any:
        @functools.wraps(of)
        def function(*args: Any, **options: Any) -> Any:
            calls.append(of)
            return of(*args, **options)

        return function

    monkeypatch.setattr(F, "linear_cross_entropy", counted(plain))
    model = model_of("function")
    with Lomo(model, lr=0.1, fused_layers=True) as optimizer:
        ours = F.linear_cross_entropy
        later = counted(ours)
        monkeypatch.setattr(F, "linear_cross_entropy", later)
        optimizer.backward(model(*batch(0)))
        assert calls == [ours]
        model(*batch(0)).detach()
    assert F.linear_cross_entropy is later
    calls.clear()
    assert not is_ours(model(*batch(0))) and calls == [ours, plain]


def test_a_package_that_is_imported_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known from the next step on."""
    function = ligers_function()
    model = model_of("liger")
    ops = sys.modules.pop("liger_kernel.ops")
    with Lomo(model, lr=0.1, fused_layers=True) as optimizer:
        monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
        assert "apply" not in vars(function)
        optimizer.backward(model.hidden(batch(0)[0]).sum())
        assert is_ours(model(*batch(0)))


# ---- what is served -------------------------------------------------------------------------------------------------


@needs_torch
def test_any_weight_of_a_fused_layer_and_no_other() -> None:
    model, other = model_of("function"), model_of("function")
    other.head.bias = None
    with Lomo(model, lr=0.1, fused_layers=True):
        assert is_ours(model(*batch(0))) and not is_ours(other(*batch(0)))
        with torch.no_grad():
            assert model(*batch(0)).grad_fn is None
        assert torch.equal(model(*batch(0)), model.loss(model.hidden(batch(0)[0]), batch(0)[1]))
        model.embedding.weight.requires_grad_(False)
        assert not is_ours(model(*batch(0)))


@needs_torch
@pytest.mark.parametrize("options", [None, "chunks"])
def test_options_of_torch(options: Any) -> None:
    """How torch goes by chunks is of no effect: these are ours."""
    x, target = torch.randn(9, 4, requires_grad=True), torch.arange(9) % 5
    layer = nn.Linear(4, 5)
    chunks = None if options is None else nn.LinearCrossEntropyOptions()
    with Lomo(layer, lr=0.1, fused_layers=True):
        for more in ({}, {"weight": torch.rand(5)}, {"ignore_index": 3}, {"reduction": "none"}, {"reduction": "sum"}):
            got = F.linear_cross_entropy(x, layer.weight, target, linear_bias=layer.bias, options=chunks, **more)
            assert is_ours(got)
            torch.testing.assert_close(got, F.cross_entropy(layer(x), target, **more))


@needs_torch
def test_what_ours_lacks_is_torchs() -> None:
    layer, x = nn.Linear(4, 6, bias=False), torch.randn(3, 4, requires_grad=True)
    target, weight = torch.tensor([0, 1, 4]), layer.weight
    with Lomo(layer, lr=0.1, fused_layers=True) as optimizer:
        plain = losses._stand_ins[0][2].__wrapped__
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((x, weight, torch.rand(3, 6)), {}),  # probabilities
            ((x[0], weight, torch.tensor(2)), {}),  # one sample
            ((x, weight.view(3, 2, 4), target.clamp(max=2)[:, None].repeat(1, 2)), {}),  # several losses a sample
            ((x, weight.t().contiguous().t(), target), {}),  # no parameter
            ((x.double(), weight.double(), target), {}),
        ]
        for args, options in calls:
            got = F.linear_cross_entropy(*args, **options)
            assert not is_ours(got)
            torch.testing.assert_close(got, plain(*args, **options))
            optimizer.backward(got)
            assert OTHER in optimizer.summary()


@needs_torch
@pytest.mark.parametrize(
    "args,options",
    [
        ((torch.zeros(3, 4), torch.tensor([0, 1])), {}),
        ((torch.zeros(3, 5), torch.tensor([0, 1, 2])), {}),
        ((torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32)), {}),
        ((torch.zeros(3, 4), torch.tensor([0, 1, 6])), {}),
        ((torch.zeros(3, 4), torch.tensor([0, 1, 2])), {"reduction": "average"}),
        ((torch.zeros(3, 4), torch.tensor([0, 1, 2])), {"label_smoothing": 2.0}),
        ((torch.zeros(3, 4), torch.tensor([0, 1, 2])), {"label_smoothing": "much"}),
        ((torch.zeros(3, 4), torch.tensor([0, 1, 2])), {"ignore_index": 0.5}),
        ((torch.zeros(3, 4), torch.tensor([0, 1, 2])), {"linear_bias": torch.zeros(5)}),
        ((torch.zeros(3, 4), torch.tensor([0, 1, 2])), {"weight": torch.zeros(5)}),
        ((torch.zeros(3, 4), torch.tensor([0, 1, 2])), {"temperature": 2.0}),
        ((torch.zeros(3, 4), None), {}),
        ((None, torch.tensor([0, 1, 2])), {}),
        ((torch.zeros(3, 4),), {}),
    ],
    ids=str,
)
def test_what_torch_refuses(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Ours refuses the same, with torch's words except for a target that is no class."""
    layer = nn.Linear(4, 6, bias=False)
    input, *target = args

    def refusal() -> str:
        with pytest.raises((RuntimeError, TypeError, ValueError, IndexError, AttributeError)) as caught:
            F.linear_cross_entropy(input, layer.weight, *target, **options)
        return f"{caught.type.__name__}: {caught.value}"

    theirs = refusal()
    with Lomo(layer, lr=0.1, fused_layers=True):
        ours = refusal()
    if "IndexError" in theirs:
        assert "IndexError" in ours and "out of range" in ours
    else:
        assert ours == theirs


def test_what_ours_lacks_is_ligers(monkeypatch: pytest.MonkeyPatch) -> None:
    function, calls = ligers_function(), []

    def forward(_: Any, *args: Any) -> Any:  # in place of kernels that need a GPU
        calls.append(args)
        return args[0].sum(), None, None, None

    monkeypatch.setattr(function, "forward", staticmethod(functools.wraps(function.forward)(forward)))
    layer, x = nn.Linear(4, 6), torch.randn(3, 4, requires_grad=True)
    target = torch.tensor([0, -100, 4])
    with Lomo(layer, lr=0.1, fused_layers=True):
        for options in (
            {"softcap": 30.0},
            {"lse_square_scale": 1e-4},
            {"return_z_loss": True},
            {"use_token_scaling": True},
            {"return_token_accuracy": True},
            {"return_predicted_tokens": True},
        ):
            assert not is_ours(liger(x, layer.weight, target, layer.bias, **options)) and calls.pop()[0] is x
        assert not is_ours(liger(x.double(), layer.weight, target)) and calls.pop()
        assert not is_ours(liger(x, layer.weight, target.int())) and calls.pop()
        for options in (
            {"accum_dtype": torch.float32},
            {"chunk_mem_const": 2},
            {"weight": torch.rand(6)},
            {"label_smoothing": 0.1},
            {"reduction": "none"},
            {"reduction": "sum", "ignore_index": -100},
        ):
            given = {name: options[name] for name in options if name not in ("accum_dtype", "chunk_mem_const")}
            loss = liger(x, layer.weight, target, layer.bias, **options)
            torch.testing.assert_close(loss, F.cross_entropy(layer(x), target, **given))
            assert is_ours(loss) and not calls

        class Derived(function):
            @staticmethod
            def forward(_: Any, *args: Any) -> Any:
                return args[0].sum() + 1

        assert Derived.apply(x, layer.weight, target) == x.sum() + 1
        calls.clear()
        for too_few_or_many in ((x, layer.weight), (x, layer.weight, target, *[None] * 20)):
            assert function.apply(*too_few_or_many)[0] == x.sum() and calls.pop() == too_few_or_many


def test_the_loss_of_liger_is_float32() -> None:
    ligers_function()
    model = model_of("liger", bias=True).to(torch.bfloat16)
    x, target = batch(0)
    with Lomo(model, lr=0.1, fused_layers=True) as optimizer:
        loss = model(x, target)
        assert is_ours(loss) and loss.dtype is torch.float32
        optimizer.backward(loss)


class Mode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@needs_torch
def test_function_modes_and_functorch_see_torchs() -> None:
    layer, x, target = nn.Linear(4, 6), torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 4])
    plain = F.linear_cross_entropy
    with Lomo(layer, lr=0.1, fused_layers=True):
        with Mode() as mode:
            assert not is_ours(F.linear_cross_entropy(x, layer.weight, target, linear_bias=layer.bias))
        assert mode.seen.count(plain) == 1
        by_func = torch.func.grad(lambda x: F.linear_cross_entropy(x, layer.weight, target))(x)
        (expected,) = torch.autograd.grad(F.linear_cross_entropy(x, layer.weight, target), x)
        torch.testing.assert_close(by_func, expected)


@needs_torch
def test_a_compiled_function_is_torchs() -> None:
    layer, x, target = nn.Linear(4, 6), torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 4])

    @torch.compile(backend="eager", fullgraph=True)
    def call(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, weight, target)

    with Lomo(layer, lr=0.1, fused_layers=True):
        loss, expected = call(x, layer.weight, target), F.linear_cross_entropy(x, layer.weight, target)
        torch.testing.assert_close(loss, expected)
        assert is_ours(expected) and not is_ours(loss)


# ---- what the summary says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1.0, "clip_passes": "one"}], ids=["plain", "clipped"])
@pytest.mark.parametrize("tied", [False, True])
def test_summary_says_that_a_gradient_was_formed(tied: bool, options: dict[str, Any]) -> None:
    """By a call that nothing serves, in the last backward."""
    model = model_of("linear", tied=tied, width=200)

    def by_hand(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(model.hidden(tokens), model.head.weight), targets)

    with Lomo(model, lr=0.1, fused_layers=True, **options) as optimizer:
        before = optimizer.summary()
        assert OTHER not in before
        for ask in (by_hand, model):
            optimizer.backward(ask(*batch(0)))
            text = optimizer.summary()
            if ask is model:
                assert text == before
            else:
                column = "kept, and it is large" if options else "freed in its hook"
                assert OTHER in head_line_of(text, tied) and column in head_line_of(text, tied)
                assert text.count(OTHER) == 1 and "lomo_kernels.linear_cross_entropy(hidden" in text


def head_line_of(text: str, tied: bool) -> str:
    return next(line for line in text.splitlines() if line.startswith("embedding" if tied else "head"))


def test_summary_says_that_factors_were_larger() -> None:
    """A loss in chunks uses the head many times."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 10, bias=False)
    with Lomo(layer, lr=0.1, fused_layers=True) as optimizer:
        for _ in range(2):
            optimizer.backward(torch.stack([layer(torch.randn(20, 8)).square().sum() for _ in range(3)]).sum())
        assert "freed in its hook" in optimizer.summary() and "its factors were larger" in optimizer.summary()
        optimizer.backward(layer(torch.randn(2, 8)).sum())
        assert "never exists" in optimizer.summary()
