"""`clip_memory`: the same steps at every budget, bytes that stay within it, and no more backward than it takes."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import Options, assert_same_bits, loss_of, on_gradient_pass, transformer, weights_of
from support.textbook import Textbook
from test_lomo_graphs import Doubled, RandomGraph, instructions, loss_on
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo
from lomo_kernels.memory import LiveBytes
from lomo_kernels.optim import clip_memory
from lomo_kernels.optim.clip_memory import ClipBudget, clip_memory_of
from lomo_kernels.optim.defer_pass import DeferPass, DeferredGradient

BUDGETS = [0, 1000, 6000, 15_000, 30_000, None, "auto"]
WIDTH = 160  # a weight is larger than gradients that wait in lists
LAYERS = 6
LAYER = WIDTH * WIDTH * 4  # bytes of a weight


class Stack(nn.Module):
    """Square layers without biases, of equal cost. Counts the backwards of each."""

    def __init__(self, kind: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.kind = kind
        self.backwards = [0] * LAYERS

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = checkpoint(layer, x, use_reentrant=self.kind == "reentrant") if self.kind != "none" else layer(x)
            x.grad_fn.register_hook(lambda *_, index=index: self.count(index))
            x = x.tanh()
        return x.square().sum()

    def count(self, index: int) -> None:
        self.backwards[index] += 1


def inputs(tokens: int = 8) -> Tensor:
    return torch.linspace(-1, 1, tokens * WIDTH).view(tokens, WIDTH).requires_grad_()


def stepped(optimizer: Lomo, model: Stack, steps: int = 2) -> list[int]:
    """The backwards of each layer in the last of several steps."""
    for _ in range(steps):
        model.backwards = [0] * LAYERS
        optimizer.backward(model(inputs()))
    return model.backwards


def assert_budgets_agree(
    loss_of: Callable[[Any, int], Tensor],
    *,
    make: Callable[[], nn.Module] = Stack,
    layers: Sequence[int | None] = range(LAYERS + 1),
    steps: int = 3,
    **options: Any,
) -> None:
    """Trains a model from `make` with budgets of so many layers (None: all), and compares the weights bit for bit.

    `loss_of`: of the model and the number of the step.
    """
    results = []
    for number in layers:
        model = make()
        memory = None if number is None else number * LAYER
        optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=memory, **options)
        for step in range(steps):
            optimizer.backward(loss_of(model, step))
        results.append(weights_of(model))
    for weights in results[1:]:
        assert_same_bits(weights, results[0])


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Bytes of gradients and of layers' `grad_output`s alive after each gradient. Inputs live in the graph as well."""
    alive: list[weakref.ref[Any]] = []
    seen: list[int] = []

    def observe(deferred: DeferredGradient | None) -> None:
        if deferred is not None:
            kept = [held.factors.grad_output for held in deferred.saved]
            kept += [] if deferred.grad is None else [deferred.grad]
            alive.extend(weakref.ref(tensor.untyped_storage()) for tensor in kept)
            there = {storage._cdata: storage.nbytes() for ref in alive if (storage := ref()) is not None}
            seen.append(sum(there.values()))

    DeferPass.observers.append(observe)
    try:
        yield seen
    finally:
        DeferPass.observers.remove(observe)


# ---- The same steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "sign"])
@pytest.mark.parametrize("fused", [False, True], ids=["hooks", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [Options(), Options(tied=True, frozen=("blocks.0",)), Options(checkpoint="non-reentrant")], ids=str
)
def test_every_budget_gives_the_same_bits(case: Options, dtype: torch.dtype, fused: bool, rule: str) -> None:
    options = Options(**{**vars(case), "dtype": dtype, "layers": 3})
    expected: dict[str, Tensor] = {}
    for budget in BUDGETS[fused:]:  # with 0 a fused layer has no gradient; otherwise it has if its factors are larger
        model = transformer(options)
        optimizer = Lomo(
            model,
            lr=0.1,
            clip_grad_norm=0.5,
            clip_memory=budget,
            weight_decay=0.1,
            rounding="stochastic",
            fused_layers=fused,
            rule=rule,
        )
        for step in range(3):
            optimizer.backward(loss_of(model, step))
        assert all(param.grad is None for param in model.parameters())
        weights = weights_of(model) | {"norm": optimizer.last_grad_norm.clone()}
        expected = expected or weights
        assert_same_bits(weights, expected)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("loss_scale", [None, 64.0, "dynamic"])
def test_steps_are_those_of_torch(loss_scale: Any, budget: Any) -> None:
    model = transformer(Options(tied=True, layers=3))
    textbook = Textbook(model, lr=0.1, clip_grad_norm=0.5, loss_scale=loss_scale)
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=0.5, loss_scale=loss_scale, clip_memory=budget)
    for step in range(4):
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


@settings(max_examples=40, deadline=None)
@given(
    program=st.lists(instructions, min_size=1, max_size=8),
    seed=st.integers(0, 10_000),
    share=st.floats(0.05, 0.95),
    fused=st.booleans(),
)
def test_random_graphs_at_every_budget(
    program: list[tuple[str, int, int, int]], seed: int, share: float, fused: bool
) -> None:
    """With reentrant checkpoints, reuse, unused and frozen parameters, penalties."""
    results = []
    for budget in (0.0, share, None):
        model = RandomGraph(program, seed)
        total = sum(param.nbytes for param in model.parameters())
        memory = budget if not budget else int(budget * total)
        optimizer = Lomo(model, lr=0.05, clip_grad_norm=0.3, clip_memory=memory, fused_layers=fused)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in range(3):
                optimizer.backward(loss_on(step, (2, 3))(model))
        results.append(weights_of(model))
    assert_same_bits(results[1], results[2])
    if fused:  # a gradient that exists rounds differently from one that does not
        torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-6)
    else:
        assert_same_bits(results[0], results[2])


def test_a_weight_that_both_ends_share_is_updated_last() -> None:
    """The head's backward needs the embedding's old weight, and the head's bias is what the second backward is for."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(20, 32), nn.Linear(32, 20)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(32, 32), head)
    twin = copy.deepcopy(model)
    x = torch.arange(12) % 20
    for budget, net in ((20 * 32 * 4 + 100, model), (0, twin)):
        optimizer = Lomo(net, lr=0.3, clip_grad_norm=0.1, clip_memory=budget)
        for _ in range(3):
            optimizer.backward(F.cross_entropy(net(x), x))
    assert_same_bits(weights_of(model), weights_of(twin))


def test_equal_models_in_turn() -> None:
    """Their graphs differ only in their parameters."""
    assert_budgets_agree(
        lambda models, step: models[step % 2](inputs()),
        make=lambda: nn.ModuleList([Stack(), Stack()]),
        layers=(0, 3),
        steps=6,
    )


class Pair(torch.autograd.Function):
    """Two outputs, of which the graph may use one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x * 2, x * 3

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return sum((grad * n for grad, n in ((first, 2), (second, 3)) if grad is not None), start=torch.zeros(()))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_the_part_that_runs_twice_ends_at_a_node_of_several_outputs(used: tuple[int, ...]) -> None:
    def loss(model: Stack, _: int) -> Tensor:
        x = inputs()
        for layer in model.layers:
            outputs = Pair.apply(layer(x))
            x = sum(outputs[which] for which in used).tanh()
        return x.square().sum()

    assert_budgets_agree(loss)


# ---- Bytes and backwards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "non-reentrant"])
@pytest.mark.parametrize("layers", range(LAYERS + 1))
def test_only_layers_that_do_not_fit_run_again(layers: int, kind: str) -> None:
    model = Stack(kind)
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=layers * LAYER)
    with kept_bytes() as kept:
        backwards = stepped(optimizer, model)
    assert backwards == [1] * layers + [2] * (LAYERS - layers)
    assert max(kept, default=0) <= layers * LAYER


@pytest.mark.parametrize("tokens", [8, 400], ids=["factors", "gradients"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_fused_layers_keep_what_is_smaller_within_the_budget(share: float, tokens: int) -> None:
    budget = share * LAYERS * min(LAYER, 2 * 4 * WIDTH * tokens)
    model, twin = Stack(), Stack()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=budget, fused_layers=True)
    whole = Lomo(twin, lr=1e-3, clip_grad_norm=0.1, clip_memory=None, fused_layers=True)
    with kept_bytes() as kept:
        for _ in range(2):
            optimizer.backward(model(inputs(tokens)))
    assert budget / 4 < max(kept) <= (budget / 2 if tokens == 8 else budget)
    for _ in range(2):
        whole.backward(twin(inputs(tokens)))
    assert_same_bits(weights_of(model), weights_of(twin))


def test_factors_that_layers_share_count_once() -> None:
    """As of query, key and value."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(64, 8, bias=False) for _ in range(8))
    x = torch.randn(4, 64)
    optimizer = Lomo(layers, lr=0.1, clip_grad_norm=0.1, clip_memory=4 * 64 * 4 + 8 * 4 * 8 * 4, fused_layers=True)
    backwards: list[int] = []
    for _ in range(2):
        backwards.clear()
        total = sum(layer(x).tanh() for layer in layers)
        total.register_hook(lambda _: backwards.append(1))
        optimizer.backward(total.sum())
    assert backwards == [1], "all fit, so no backward followed the first"


@pytest.mark.parametrize("budget", [2 * LAYER, 5 * LAYER])
def test_with_reentrant_checkpoints_everything_is_kept_or_nothing(budget: int) -> None:
    model = Stack("reentrant")
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=budget)
    assert stepped(optimizer, model)[-1] == 2
    model = Stack("reentrant")
    assert stepped(Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=6 * LAYER), model)[-1] == 1


class Hidden(torch.autograd.Function):
    """A reentrant checkpoint as other libraries have it, under a name of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.x, ctx.block = x.detach(), block
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.x.requires_grad_()
        x.grad = None
        with torch.enable_grad():
            torch.autograd.backward(ctx.block(x), grad)
        return x.grad, None


@pytest.mark.parametrize("hidden", [(0,), (3,), (5,), (0, 3), tuple(range(LAYERS))], ids=str)
def test_layers_that_the_graph_hides(hidden: tuple[int, ...]) -> None:
    assert_budgets_agree(lambda model, _: hiding(model, hidden))


def hiding(model: Stack, hidden: Sequence[int]) -> Tensor:
    """The loss, some of whose layers the graph does not show."""
    x = inputs()
    for index, layer in enumerate(model.layers):
        x = (Hidden.apply(x, layer) if index in hidden else layer(x)).tanh()
    return x.square().sum()


def test_a_hidden_layer_that_is_unfrozen_later() -> None:
    """The graph looks the same, and its layer would be updated twice."""
    model = Stack()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=3 * LAYER)
    hidden = model.layers[4].weight.requires_grad_(False)

    def step() -> None:
        optimizer.backward(hiding(model, [4]))

    for _ in range(3):
        step()
    hidden.requires_grad_(True)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"does not show layers\.4\.weight.*run this batch again"):
        step()
    assert_same_bits(weights_of(model), before)
    twin = copy.deepcopy(model)
    reference = Lomo(twin, lr=1e-3, clip_grad_norm=0.1, clip_memory=0)
    for _ in range(2):
        step()
    model, optimizer, trained = twin, reference, weights_of(model)
    for _ in range(2):
        step()
    assert_same_bits(weights_of(model), trained)


@pytest.mark.parametrize("budget", [2 * LAYER, 10 * LAYER])
def test_the_graph_dies_with_the_step(budget: int) -> None:
    """A part of it was retained and not run again. The loss itself often lives until the next one is there."""
    model = Stack()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=budget)
    stepped(optimizer, model, 1)  # which finds out what fits
    alive: list[weakref.ref[Tensor]] = []
    model.layers[1].register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output.untyped_storage())))
    loss = model(inputs())
    optimizer.backward(loss)
    assert loss.item() > 0
    assert [ref() for ref in alive] == [None]


@pytest.mark.parametrize("which", ["tensor", "node"])
def test_hooks_that_change_gradients_count_once(which: str) -> None:
    """Also if a hook's tensor is where the part that runs again ends: autograd calls it once more there."""

    def loss(model: Stack, _: int) -> Tensor:
        x = inputs()
        for layer in model.layers:
            x = layer(x).tanh()
            if which == "tensor":
                x.register_hook(lambda grad: grad * -0.5)
            else:
                x.grad_fn.register_prehook(lambda grads: (grads[0] * -0.5,))
        return x.square().sum()

    assert_budgets_agree(loss)


class Matmul(torch.autograd.Function):
    """A linear layer that may give no gradient for its input, or none for its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, of_input: bool, of_weight: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gives = of_input, of_weight
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_input, of_weight = ctx.gives
        return grad @ weight if of_input else None, grad.T @ x if of_weight else None, None, None


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.mul_(-0.5)


def hooked(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad.mul_(-0.5))
    return x


def unmanaged_and_frozen(x: Tensor, late: list[Tensor]) -> Tensor:
    late.append(torch.ones(WIDTH, requires_grad=True))
    return x * late[-1]


#: What stands between two layers, and what the upper layer is.
BETWEEN: dict[str, Any] = {
    "a hook that works in place": lambda layer, x, step, late: layer(hooked(x)),
    "a backward that works in place": lambda layer, x, step, late: layer(InPlace.apply(x)),
    "no gradient for the input": lambda layer, x, step, late: Matmul.apply(x, layer.weight, step != 2, True),
    "and zeros in its place": lambda layer, x, step, late: Matmul.apply(
        Doubled.apply(x), layer.weight, step != 2, True
    ),
    "no gradient for the weight": lambda layer, x, step, late: Matmul.apply(
        x, layer.weight, True, step != 2 or not layer.is_upper
    ),
    "a checkpoint": lambda layer, x, step, late: layer(checkpoint(torch.tanh, x, use_reentrant=True)),
    "a leaf": lambda layer, x, step, late: layer(unmanaged_and_frozen(x, late)),
    "a module hook": lambda layer, x, step, late: layer(x),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_stands_where_the_second_backward_ends(between: str) -> None:
    """Between each two layers, so that it is there at every budget. Leaves are frozen before backward begins."""

    def make() -> Stack:
        model = Stack()
        if between == "a module hook":
            for layer in model.layers:
                layer.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * -0.5,))
        return model

    def loss(model: Stack, step: int) -> Tensor:
        x, late = inputs(), []
        for index, layer in enumerate(model.layers):
            layer.is_upper = index > 0
            x = BETWEEN[between](layer, x, step, late).tanh()
        for leaf in late:
            leaf.requires_grad_(False)
        return x.square().sum()

    assert_budgets_agree(loss, make=make, layers=[*range(LAYERS + 1), None], steps=4, weight_decay=0.1)


def test_biases_frozen_after_the_forward() -> None:

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    def loss(model: nn.Sequential, step: int) -> Tensor:
        loss = model(inputs()).square().sum()
        if step == 2:
            model[4].bias.requires_grad_(False)
        return loss

    assert_budgets_agree(loss, make=make, layers=(0, 3, None))


def test_memory_grows_with_the_budget_to_that_of_standard_training() -> None:
    """The part of the graph that runs once is freed as backward goes through it, as ever."""
    peaks = []
    for budget in range(LAYERS + 1):
        model = Stack()
        optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=budget * LAYER)
        for _ in range(2):
            optimizer.backward(model(inputs(64)))
        with LiveBytes() as live:
            loss = model(inputs(64))
            optimizer.backward(loss)
        peaks.append(live.peak)
    model = Stack()
    with LiveBytes() as live:
        loss = model(inputs(64))
        loss.backward()
    assert peaks[0] < live.peak * 2 / 3
    assert all(lower <= higher + LAYER for lower, higher in itertools.pairwise(peaks)), peaks
    assert max(peaks) <= live.peak + LAYER, (peaks, live.peak)


def test_another_gradient_is_as_after_one_backward() -> None:
    """That of an input, and of a parameter that is another optimizer's."""
    for budget in BUDGETS:
        model = Stack()
        managed = [layer.weight for layer in model.layers[1:]]
        optimizer = Lomo(managed, lr=1e-3, clip_grad_norm=0.1, clip_memory=budget, loss_scale=8.0)
        x = inputs()
        stepped(optimizer, model)  # the first one keeps nothing
        x.grad = model.layers[0].weight.grad = None
        expected = torch.autograd.grad(model(x), [x, model.layers[0].weight])
        optimizer.backward(model(x))
        torch.testing.assert_close([x.grad, model.layers[0].weight.grad], list(expected))


# ---- Steps that change nothing, or break off ------------------------------------------------------------------------


def test_batches_of_two_lengths_share_one_budget() -> None:
    """What fits for the longer ones fits for the shorter ones, and is not found out anew in every step."""
    model = Stack()
    budget = 160_000
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=budget, fused_layers=True)
    for tokens in (8, 8, 60, 8, 60, 8, 60):
        model.backwards = [0] * LAYERS
        with kept_bytes() as kept:
            optimizer.backward(model(inputs(tokens)))
    assert 0 < max(kept) <= budget
    assert model.backwards[0] == 1
    assert model.backwards[-1] == 2


def test_parameters_frozen_after_the_forward() -> None:

    def loss(model: Stack, step: int) -> Tensor:
        loss = model(inputs())
        if step == 2:
            model.layers[4].weight.requires_grad_(False)
        return loss

    assert_budgets_agree(loss, layers=(0, 3, None))


def test_a_cast_finds_out_anew_what_fits() -> None:
    model = Stack().bfloat16()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=3 * LAYER)
    for _ in range(2):
        optimizer.backward(model(inputs().bfloat16()))
    model.float()
    for _ in range(3):
        with kept_bytes() as kept:
            optimizer.backward(model(inputs()))
        assert max(kept, default=0) <= 3 * LAYER


def test_summary_is_of_the_last_step() -> None:
    model = Stack()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=0.5 * LAYER)
    stepped(optimizer, model)
    assert "6 gradients did not fit" in optimizer.summary()
    model = Stack("reentrant")
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=3 * LAYER)
    stepped(optimizer, model)
    assert "6 gradients did not fit" in optimizer.summary()


@pytest.mark.parametrize("budget", [0, 3 * LAYER, None], ids=str)
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_gradient_that_is_not_finite_changes_nothing(nonfinite: str, budget: Any) -> None:
    model = Stack()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=budget, nonfinite=nonfinite)
    stepped(optimizer, model)
    before = weights_of(model)
    loss = model(inputs()) * math.inf
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"layers\.0"):
            optimizer.backward(loss)
    else:
        optimizer.backward(loss)
    assert optimizer.skipped_steps.item() == 1
    assert_same_bits(weights_of(model), before)


def test_two_backwards_that_differ_are_refused_if_some_run_twice() -> None:
    model = Stack()
    noisy = iter(range(100))
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=2 * LAYER)
    on_gradient_pass(model.layers[4].weight, lambda _, grad: grad * (1 + next(noisy)))
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"different gradients of layers\.4\.weight"):
        optimizer.backward(model(inputs()))
    assert_same_bits(weights_of(model), before)
    assert optimizer.last_step_outcome == "unchanged"


@pytest.mark.parametrize("number", range(1, 12))
def test_an_interrupt_anywhere_leaves_an_exact_next_step(number: int) -> None:
    model, twin = Stack(), Stack()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=3 * LAYER)
    reference = Lomo(twin, lr=1e-3, clip_grad_norm=0.1, clip_memory=0)
    stepped(optimizer, model)
    calls = iter(range(1, 1000))
    handles = [
        layer.weight.register_hook(
            lambda _: (_ for _ in ()).throw(KeyboardInterrupt) if next(calls) == number else None
        )
        for layer in model.layers
    ]
    before = weights_of(model)
    try:
        optimizer.backward(model(inputs()))
    except KeyboardInterrupt:
        assert optimizer.last_step_outcome == ("unchanged" if number <= 7 else "partial")
    else:
        assert number > LAYERS + 3
    if optimizer.last_step_outcome == "unchanged":
        assert_same_bits(weights_of(model), before)
    for handle in handles:
        handle.remove()
    twin.load_state_dict(model.state_dict())
    stepped(optimizer, model, 1)
    stepped(reference, twin, 1)
    assert_same_bits(weights_of(model), weights_of(twin))


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", "auto"),
        (None, math.inf),
        (0, 0.0),
        (123, 123.0),
        ("2GiB", 2.0**31),
        ("1.5 MiB", 1.5 * 2**20),
        ("10kb", 10_000.0),
        ("7B", 7.0),
        (math.inf, math.inf),
    ],
)
def test_values(given: Any, expected: Any) -> None:
    assert clip_memory_of(given, None) == expected


@pytest.mark.parametrize("given", ["", "GiB", "2", "2XiB", "-1GiB", "two", -1, math.nan, True, [1], torch.tensor(1)])
def test_other_values_are_refused(given: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r'clip_memory is .* expected "auto", None, a number of bytes'):
        Lomo(nn.Linear(2, 2), clip_memory=given)


def test_names_of_both_ends() -> None:
    for passes, budget in (("one", None), ("two", 0)):
        optimizer = Lomo(nn.Linear(2, 2), clip_grad_norm=1.0, clip_passes=passes)
        assert (
            optimizer._training.settings
            == Lomo(nn.Linear(2, 2), clip_grad_norm=1.0, clip_memory=budget)._training.settings
        )
    with pytest.raises(ValueError, match="give one of them"):
        Lomo(nn.Linear(2, 2), clip_passes="one", clip_memory=0)
    with pytest.raises(ValueError, match=r'clip_passes is .three., expected "two" or "one"'):
        Lomo(nn.Linear(2, 2), clip_passes="three")


def test_summary_says_which_gradients_did_not_fit() -> None:
    model = Stack()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=4 * LAYER)
    assert "computed twice" not in optimizer.summary()
    stepped(optimizer, model)
    text = optimizer.summary()
    assert "2 x layers.*.weight" in text
    assert "computed twice" in text
    assert "2 gradients did not fit into clip_memory" in text


def test_copies_keep_the_budget() -> None:
    model = Stack()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=2 * LAYER)
    for twin, other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        assert stepped(other, twin) == [1, 1, 2, 2, 2, 2]


# ---- "auto" on a GPU, whose numbers are pretended -------------------------------------------------------------------


class Managed:
    """What a budget looks at."""

    supported = True

    def __init__(self, device: str, nbytes: int, trained: bool = True) -> None:
        self.device, self.bytes = torch.device(device), nbytes
        self.param = nn.Parameter(torch.zeros(1), requires_grad=trained)


@pytest.mark.parametrize(
    ("free", "sizes", "expected"),
    [
        ({0: 1000}, [("cuda:0", 600), ("cuda:0", 300)], math.inf),
        ({0: 1000}, [("cuda:0", 600), ("cuda:0", 900)], 1000.0),
        ({0: 1000}, [("cuda:0", 600), ("cpu", 9000)], math.inf),
        ({0: 1000, 1: 100}, [("cuda:0", 600), ("cuda:1", 200)], 100.0),  # which may all be of the second one
        ({0: 0}, [("cuda:0", 600)], 1.0),  # not zero, with which fused layers take another way
    ],
)
def test_auto_takes_what_every_gpu_has_free(
    free: dict[int, int], sizes: list[tuple[str, int]], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_memory, "_free", lambda device: free[device.index] if device.type == "cuda" else math.inf)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    managed: Any = [Managed(*size) for size in sizes]
    assert ClipBudget("auto").of_step(managed) == pytest.approx(expected)
    frozen: Any = [*managed, Managed("cuda:0", 10**9, trained=False)]
    assert ClipBudget("auto").of_step(frozen) == pytest.approx(expected), "a frozen parameter has no gradient"


def test_half_of_enough_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_memory, "_free", lambda device: 2000)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    managed: Any = [Managed("cuda:0", 600)]
    budget = ClipBudget("auto")
    assert budget.of_step(managed) == math.inf
    budget.halve()
    assert budget.of_step(managed) == 300


def test_a_capture_has_the_budget_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free then is not asked for."""
    free = [400, 100]
    monkeypatch.setattr(clip_memory, "_free", lambda device: free.pop(0))
    managed: Any = [Managed("cuda:0", 600)]
    budget = ClipBudget("auto")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert budget.of_step(managed) == 400
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert budget.of_step(managed) == 400
    assert free == [100]


def test_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver has, and what torch has of it without using it, less a tenth of all."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 420)
    assert clip_memory._free(torch.device("cuda", 0)) == 300 + 80 - 100
    assert clip_memory._free(torch.device("cpu")) == math.inf


def test_out_of_memory_halves_the_automatic_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_memory, "_free", lambda device: 3 * LAYER)
    model = Stack()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1)
    assert stepped(optimizer, model) == [1, 1, 1, 2, 2, 2]
    before = weights_of(model)
    handle = model.layers[0].weight.register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="keeps half as many bytes"):
        optimizer.backward(model(inputs()))
    handle.remove()
    assert_same_bits(weights_of(model), before)
    assert stepped(optimizer, model) == [1, 2, 2, 2, 2, 2]
