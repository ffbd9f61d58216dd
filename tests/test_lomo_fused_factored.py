"""Fused layers with the rules "tensor", "rows" and "adalomo": against float64, and against the same rule without."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.factored import RULES, FactoredTextbook
from support.models import assert_same_bits, same_bits, weights_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import AdaLomo, Lomo
from lomo_kernels.composite import tiled
from lomo_kernels.layers import Factors
from lomo_kernels.optim.factored_rules import Factors as RowAndColumnFactors
from lomo_kernels.optim.factored_rules import RowsRule, Sums
from lomo_kernels.optim.fused_factored import LookedUpRows, formed
from lomo_kernels.optim.managed_parameter import ManagedParameter

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "two": {"clip_grad_norm": 0.05, "clip_memory": 0},
    "one": {"clip_grad_norm": 0.05, "clip_memory": None},
    "budget": {"clip_grad_norm": 0.05, "clip_memory": 4000},
    "value": {"clip_grad_value": 0.002},
    "scaled": {"loss_scale": 256.0},
    "dynamic": {"loss_scale": "dynamic", "clip_grad_norm": 0.05, "clip_grad_value": 0.002},
}
STEPS = 5


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few rows, so that small weights have many."""
    monkeypatch.setattr(tiled, "TILE_BYTES", 1000)
    monkeypatch.setattr(tiled, "LEAST_ROWS", 5)


class Words(nn.Module):
    """Embedding, a block that is used twice, a head. `words` tells whether an embedding's rows are fewer than it has.

    Its vectors have no gradients that are zero but for rounding: AdaLomo would make large updates of them.
    """

    def __init__(self, *, tied: bool = False, kind: str = "none", words: int = 150, loss: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(words, 20, padding_idx=3)
        self.up, self.down = nn.Linear(20, 33), nn.Linear(33, 20, bias=False)
        self.head = nn.Linear(20, words, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.kind, self.loss = kind, loss

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(2):

            def block(x: Tensor) -> Tensor:
                return x + self.down(torch.tanh(self.up(x)))

            x = block(x) if self.kind == "none" else checkpoint(block, x, use_reentrant=self.kind == "reentrant")
        result = F.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(1).flatten())
        return (
            result + self.down.weight.square().mean() + self.embedding.weight.square().mean() if self.loss else result
        )


def batch(step: int, words: int = 150) -> Tensor:
    """Some words more than once, and the one that counts nothing."""
    return torch.randint(min(words, 40), (3, 7), generator=torch.Generator().manual_seed(step))


def assert_near(model: nn.Module, book: FactoredTextbook) -> None:
    for (name, param), exact in zip(model.named_parameters(), book.model.parameters(), strict=True):
        assert (param.double() - exact).abs().max().item() <= 2e-6, name
        assert param.grad is None, name


# ---- Equal to the rule ----------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "few words": {"words": 40},
    "tied, few words": {"tied": True, "words": 40},
    "also in the loss": {"tied": True, "loss": True},
    "non-reentrant": {"kind": "non-reentrant", "tied": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", MODELS)
def test_steps_are_those_of_the_rule(kind: str, rule: str, options: str) -> None:
    model = Words(**MODELS[kind])
    given = OPTIONS[options]
    shared = {name: value for name, value in given.items() if name not in ("loss_scale", "clip_memory")}
    book = FactoredTextbook(model, rule, lr=0.003, **shared)
    optimizer = Lomo(model, lr=0.003, rule=rule, fused_layers=True, **given)
    before = weights_of(model)
    for step in range(STEPS):
        tokens = batch(step, model.embedding.num_embeddings)
        optimizer.backward(model(tokens))
        book.step(book.model(tokens))
        assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=1e-6)
        assert book.norm > 2 * given.get("clip_grad_norm", 0.0), "the clipping under test must be in force"
    assert_near(model, book)
    assert all(not torch.equal(param, before[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize("options", ["plain", "one", "two"])
@pytest.mark.parametrize("rule", RULES)
def test_reentrant_checkpoints(rule: str, options: str) -> None:
    """A weight that two of them share is refused, so the block is used once."""

    class Model(Words):
        def forward(self, tokens: Tensor) -> Tensor:
            x = checkpoint(lambda x: self.down(torch.tanh(self.up(x))), self.embedding(tokens), use_reentrant=True)
            return F.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(1).flatten())

    model = Model(tied=True)
    shared = {name: value for name, value in OPTIONS[options].items() if name != "clip_memory"}
    book = FactoredTextbook(model, rule, lr=0.003, **shared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the second backward
        optimizer = Lomo(model, lr=0.003, rule=rule, fused_layers=True, **OPTIONS[options])
        for step in range(STEPS):
            optimizer.backward(model(batch(step)))
            book.step(book.model(batch(step)))
    assert_near(model, book)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_accumulated_gradients(rule: str, tied: bool) -> None:
    model = Words(tied=tied)
    book = FactoredTextbook(model, rule, lr=0.003)
    optimizer = Lomo(model, lr=0.003, rule=rule, fused_layers=True)
    for step in range(3):
        with optimizer.accumulate():
            optimizer.backward(model(batch(step)))
        optimizer.backward(model(batch(step + 10)))
        book.step(book.model(batch(step)) + book.model(batch(step + 10)))
        model(batch(step + 20)).backward()
        optimizer.step()
        optimizer.zero_grad()
        book.step(book.model(batch(step + 20)))
        value = model(batch(step + 30))
        optimizer.grad_norm(value)
        optimizer.fused_backward(value, lr=0.003)
        book.step(book.model(batch(step + 30)))
    assert_near(model, book)


@pytest.mark.parametrize("rule", RULES)
def test_a_model_beside_its_parameters_tells_what_is_an_embedding(rule: str) -> None:
    model, twin = Words(), Words()
    optimizer = Lomo(list(model.named_parameters()), lr=0.01, rule=rule, fused_layers=model)
    whole = Lomo(twin, lr=0.01, rule=rule, fused_layers=True)
    for step in range(2):
        optimizer.backward(model(batch(step)))
        whole.backward(twin(batch(step)))
    assert_same_bits(weights_of(model), weights_of(twin))


def test_a_users_rule_is_not_taken_for_one_that_needs_a_row_only() -> None:
    class Halves(RowsRule):
        def factors(
            self, managed: ManagedParameter, sums: Sums, state: tuple[Tensor, ...], step: Tensor
        ) -> RowAndColumnFactors:
            of_rows = torch.full_like(sums.rows, 0.5 / sums.rows.numel(), dtype=torch.float32)
            return RowAndColumnFactors(of_rows, of_rows.new_empty(0))

    layer = nn.Linear(4, 12, bias=False)
    before = layer.weight.detach().clone()
    optimizer = Lomo(layer, lr=1.0, rule=Halves(), fused_layers=True)
    optimizer.backward(layer(torch.ones(4)).sum())
    torch.testing.assert_close(before - layer.weight, torch.full((12, 4), 0.5 / 12))
    assert "formed once, and freed" in optimizer.summary()


# ---- Dtypes and roundings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["tensor", "adalomo"])
def test_a_layer_used_once_has_the_bits_that_it_has_without(rule: str, dtype: torch.dtype, rounding: str) -> None:
    """Its gradient is formed as autograd forms it."""
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 50), nn.Tanh(), nn.Linear(50, 30, bias=False)).to(dtype)
        optimizer = Lomo(model, lr=0.01, rule=rule, rounding=rounding, fused_layers=fused, loss_scale=256.0)
        for step in range(4):
            x = torch.randn(9, 24, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimizer.backward(model(x).float().square().mean())
        weights.append(weights_of(model))
    assert_same_bits(*weights)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("rule", RULES)
def test_bits_of_the_float32_gradient(rule: str, kind: str, dtype: torch.dtype, rounding: str) -> None:
    """Sums of small integers are exact, so that the order of a sum shows in no bit: what a float32 gradient gives
    without fused layers, with tiles and an embedding's rows rounded by the same random bits."""
    generator = torch.Generator().manual_seed(0)
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer: nn.Module = nn.Linear(20, 150, bias=False) if kind == "linear" else nn.Embedding(150, 20, padding_idx=3)
        layer.to(dtype)
        optimizer = Lomo(
            layer, lr=0.01, rule=rule, rounding=rounding, seed=5, weight_decay=0.1, fused_layers=fused, loss_scale=None
        )
        generator.manual_seed(0)
        for _ in range(3):
            if kind == "linear":
                x = torch.randint(-2, 3, (6, 20), generator=generator).to(dtype)
                gy = torch.randint(-2, 3, (6, 150), generator=generator).to(dtype)
            else:
                x = torch.randint(2, 14, (2, 9), generator=generator)
                gy = torch.randint(-2, 3, (2, 9, 20), generator=generator).to(dtype)
            optimizer.backward((layer(x) * gy).sum())
        weights.append(weights_of(layer))
    assert_same_bits(*weights)


@pytest.mark.parametrize("rule", RULES)
def test_float32_weights_under_autocast(rule: str) -> None:
    model, twin = Words(tied=True), Words(tied=True)
    start = weights_of(model)
    optimizer = Lomo(model, lr=0.003, rule=rule, fused_layers=True)
    other = Lomo(twin, lr=0.003, rule=rule)
    for net, train in ((model, optimizer), (twin, other)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(batch(0))
        train.backward(loss)
    for name, param in model.named_parameters():
        moved, expected = (net.get_parameter(name) - start[name] for net in (model, twin))
        assert (moved - expected).norm() < 0.02 * expected.norm(), name
        assert param.dtype is torch.float32


# ---- Embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rule", ["tensor", "rows"])
def test_only_rows_that_are_looked_up_are_touched(rule: str, index_dtype: torch.dtype) -> None:
    layer = nn.Embedding(100, 8, padding_idx=7)
    with torch.no_grad():
        layer.weight[11] = math.nan
    before = layer.weight.detach().clone()
    optimizer = Lomo(layer, lr=0.1, rule=rule, fused_layers=True)
    optimizer.backward(layer(torch.tensor([5, 9, 5, 7], dtype=index_dtype)).square().sum())
    changed = [row for row in range(100) if not same_bits(layer.weight[row], before[row])]
    assert changed == [5, 9]


def test_no_tokens() -> None:
    layer, linear = nn.Embedding(10, 8), nn.Linear(8, 6)
    before = layer.weight.detach().clone()
    optimizer = Lomo(nn.ModuleList([layer, linear]), lr=0.1, rule="adalomo", weight_decay=0.5, fused_layers=True)
    optimizer.backward(linear(layer(torch.zeros(0, dtype=torch.int64))).sum())
    torch.testing.assert_close(layer.weight, before * 0.95)


def test_the_rows_of_a_gradient() -> None:
    weight = torch.zeros(50, 3)
    uses = [
        Factors(torch.tensor([[4, 9, 4]]), torch.tensor([[[1.0], [2.0], [3.0]]]).expand(1, 3, 3), 9),
        Factors(torch.tensor([0, 4], dtype=torch.int32), torch.tensor([[5.0], [7.0]]).expand(2, 3), -1),
    ]
    rows = LookedUpRows(uses, weight)
    gradient = torch.zeros(50, 3).index_add_(0, rows.index, rows.grad)
    assert gradient[:, 0].nonzero().flatten().tolist() == [0, 4]
    assert gradient[[0, 4]].tolist() == [[5.0] * 3, [11.0] * 3]
    assert rows.grad.any(1).sum() == 2, "each row once"
    assert LookedUpRows.suit(uses, weight) and not LookedUpRows.suit(uses, weight[:9].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [300, 20])
def test_a_gradient_is_formed_of_all_its_parts(words: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def randint(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    weight = torch.zeros(words, 6, dtype=dtype)
    tokens = torch.randint(20, (2, 7), generator=generator)
    uses = [
        Factors(tokens, randint(2, 7, 6), 3),
        Factors(randint(5, 6), randint(5, words), None),
        Factors(randint(1, 2, 6), randint(1, 2, words), None),
    ]
    grad = randint(words, 6)
    kept = grad.clone()
    expected = grad.float() + sum(
        use.grad_output.flatten(0, -2).float().T @ use.input.flatten(0, -2).float() for use in uses[1:]
    )
    rows = uses[0].grad_output.flatten(0, 1).float() * (tokens != 3).flatten()[:, None]
    expected.index_add_(0, tokens.flatten(), rows)
    assert torch.equal(formed(uses, grad, weight).float(), expected)
    assert torch.equal(grad, kept)


# ---- Gradients that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_overflows_changes_nothing(rule: str) -> None:
    """Not the state either, so that the next step has the bits that it has without the one that overflowed."""
    model, twin = Words(tied=True), Words(tied=True)
    optimizer, other = (Lomo(m, lr=0.01, rule=rule, fused_layers=True, loss_scale="dynamic") for m in (model, twin))
    for step in range(4):
        if step == 2:
            optimizer.backward(model(batch(step)) * math.inf)
            other.state_dict()
        optimizer.backward(model(batch(step)))
        other.backward(twin(batch(step)))
    assert optimizer.skipped_steps.item() == 1
    for (name, param), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=2e-6, msg=name)  # another loss scale


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_kept_if_no_norm_is_known(rule: str, nonfinite: str) -> None:
    """With "rows" the rows of a linear layer are each others' strangers; otherwise it is the whole parameter."""
    layer = nn.Linear(3, 12, bias=False)
    optimizer = Lomo(layer, lr=0.1, rule=rule, fused_layers=True, nonfinite=nonfinite)
    before = layer.weight.detach().clone()
    gy = torch.ones(4, 12)
    gy[2, 7] = math.nan
    loss = (layer(torch.ones(4, 3)) * gy).sum()
    if nonfinite == "raise":
        kept = r"parameters \(in fused layers, rows\)" if rule == "rows" else "parameters"
        with pytest.raises(FloatingPointError, match=f"{kept} whose gradient is not finite were kept"):
            optimizer.backward(loss)
    else:
        optimizer.backward(loss)
    changed = [row for row in range(12) if not same_bits(layer.weight[row], before[row])]
    assert changed == ([row for row in range(12) if row != 7] if rule == "rows" else [])
    assert optimizer.skipped_steps.item() == 1
    assert layer.weight.isfinite().all()


# ---- State ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_resumed_twice_it_goes_on_bit_for_bit(rule: str, tied: bool) -> None:
    model, twin = Words(tied=tied).bfloat16(), Words(tied=tied).bfloat16()
    optimizer, other = (
        Lomo(net, lr=0.01, rule=rule, rounding="stochastic", fused_layers=True) for net in (model, twin)
    )
    for step in range(6):
        if step in (2, 4):
            twin.load_state_dict(model.state_dict())
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.backward(model(batch(step)))
        if step >= 2:
            other.backward(twin(batch(step)))
    assert_same_bits(weights_of(twin), weights_of(model))


def test_the_state_is_that_of_the_rule_without_fused_layers() -> None:
    model, twin = Words(), Words()
    optimizer, other = AdaLomo(model, lr=0.01, fused_layers=True), AdaLomo(twin, lr=0.01)
    for step in range(3):
        optimizer.backward(model(batch(step)))
        other.backward(twin(batch(step)))
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        for name in ("row", "column"):
            torch.testing.assert_close(optimizer.state[param][name], other.state[expected][name], rtol=1e-5, atol=1e-30)


# ---- What the summary says, and what is refused ---------------------------------------------------------------------


def test_summary_says_what_becomes_of_each_gradient() -> None:
    said = {}
    for rule in RULES:
        for tied in (False, True):
            model = Words(tied=tied)
            with Lomo(model, rule=rule, fused_layers=True) as optimizer:
                lines = optimizer.summary().splitlines()
            said[rule, tied] = {line.split()[0]: line for line in lines}
    for rule in RULES:
        expected = "never exists" if rule == "rows" else "formed once, and freed"
        assert expected in said[rule, False]["up.weight"] and expected in said[rule, False]["head.weight"]
        assert "its tokens' rows, or it, if smaller" in said[rule, False]["embedding.weight"]
        assert "formed once, and freed" in said[rule, True]["embedding.weight"], "its head is a linear layer"
        assert "freed in its hook" in said[rule, True]["up.bias"]
    with Lomo(model, rule="adalomo", fused_layers=True, **OPTIONS["one"]) as optimizer:
        assert "its factors are kept, or it, if smaller" in optimizer.summary()


def test_clip_tensor_stays_refused() -> None:
    with pytest.raises(ValueError, match="clip_tensor bounds a gradient"):
        Lomo(Words(), rule="rows", clip_tensor=1.04, fused_layers=True)


@pytest.mark.parametrize("rule", RULES)
def test_autograd_sees_the_update(rule: str) -> None:
    layer = nn.Linear(3, 4)
    optimizer = Lomo(layer, rule=rule, fused_layers=True)
    stale = layer.weight.square().sum()
    optimizer.backward(layer(torch.ones(2, 3)).sum())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
