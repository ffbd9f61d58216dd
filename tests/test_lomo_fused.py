"""Fused layers and clipping in one backward against SGD as a textbook has it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import Options, assert_same_bits, loss_of, same_bits, transformer, weights_of
from support.textbook import Textbook, Textbook64
from test_lomo import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo, numbers, reference
from lomo_kernels.layers import FusedLayer

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "two": {"clip_grad_norm": 0.3, "clip_passes": "two"},
    "one": {"clip_grad_norm": 0.3, "clip_passes": "one"},
    "all, two": {"clip_grad_norm": 0.3, "clip_grad_value": 0.02, "weight_decay": 0.1, "clip_passes": "two"},
    "all, one": {"clip_grad_norm": 0.3, "clip_grad_value": 0.02, "weight_decay": 0.1, "clip_passes": "one"},
}
STEPS = 5


def assert_close(model: nn.Module, textbook: Textbook64, optimizer: Lomo, clips: bool = False) -> None:
    """Within 2e-6 of float64, the norm within 1e-6, and no gradient left."""
    for (name, param), exact in zip(model.named_parameters(), textbook.model.parameters(), strict=True):
        difference = (param.double() - exact).abs().max().item() if param.numel() else 0.0
        assert difference <= 2e-6, f"{name} is off by {difference:.1e}"
        assert param.grad is None, f"{name} has a gradient"
    assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6)
    if clips:
        assert textbook.norm > 0.3, "the clipping under test must be in force"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_stays_with_float64(options: Options, rule: str) -> None:
    model = transformer(options)
    textbook = Textbook64(model, lr=0.1, **RULES[rule])
    start = weights_of(model)
    optimizer = Lomo(model, lr=0.1, fused_layers=True, **RULES[rule])
    for step in range(STEPS):
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step))
        assert_close(model, textbook, optimizer, clips="clip_grad_norm" in RULES[rule])
    changed = {name for name, param in model.named_parameters() if not torch.equal(param, start[name])}
    assert {"head.weight", "embedding.weight", "blocks.1.qkv.weight"} & start.keys() <= changed
    assert not any(name.startswith((*options.frozen, "spare")) for name in changed)


@pytest.mark.parametrize("rule", RULES)
def test_what_happens_between_steps_changes_nothing(rule: str) -> None:
    model = transformer(Options(tied=True))
    textbook = Textbook64(model, lr=0.1, **RULES[rule])
    optimizer = Lomo(model, lr=0.1, fused_layers=True, **RULES[rule])
    for step in range(STEPS):
        before = weights_of(model)
        with torch.no_grad():
            loss_of(model, 50)
        params = list(model.parameters())
        true = torch.autograd.grad(loss_of(textbook.model, 51), list(textbook.model.parameters()))
        for gradient, exact in zip(torch.autograd.grad(loss_of(model, 51), params), true, strict=True):
            torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-6)
        assert all(param.grad is None for param in params)
        loss_of(model, 53)  # a forward whose backward never comes
        loss_of(model, 54).backward()
        assert model.head.weight.grad is not None
        optimizer.zero_grad()
        assert_same_bits(weights_of(model), before)
        optimizer.backward(loss_of(model, step) + 0.5 * loss_of(model, step + 1))
        textbook.step(loss_of(textbook.model, step) + 0.5 * loss_of(textbook.model, step + 1))
        assert_close(model, textbook, optimizer)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_accumulation_and_step(rule: str) -> None:
    model = transformer(Options(tied=True))
    textbook = Textbook64(model, lr=0.1, **RULES[rule])
    optimizer = Lomo(model, lr=0.1, fused_layers=True, **RULES[rule])
    for step in range(3):
        with optimizer.accumulate():
            optimizer.backward(loss_of(model, step))
        optimizer.backward(loss_of(model, step + 10))
        textbook.step(loss_of(textbook.model, step) + loss_of(textbook.model, step + 10))
        assert_close(model, textbook, optimizer)
        loss_of(model, step + 20).backward()
        optimizer.step()
        optimizer.zero_grad()
        textbook.step(loss_of(textbook.model, step + 20))
        assert_close(model, textbook, optimizer)
        norm = optimizer.grad_norm(loss_of(model, step + 30)).item()
        optimizer.fused_backward(loss_of(model, step + 30), lr=0.1)
        textbook.step(loss_of(textbook.model, step + 30))
        assert norm == pytest.approx(textbook.norm, rel=1e-6)
        assert_close(model, textbook, optimizer)


class Reuse(nn.Module):
    """One weight in every way at once: used twice with a layer above, as a matrix, in the loss, and as an embedding."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self.program = program
        self.first = nn.Linear(6, 6)
        self.layer = nn.Linear(6, 6)
        self.table = nn.Embedding(6, 6, padding_idx=2)
        self.positions = nn.Parameter(torch.randn(9, 6) * 0.3)
        self.last = nn.Linear(6, 6, bias=False)
        if "tied" in program:
            self.layer.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if "twice" in self.program:
            x = torch.tanh(self.layer(torch.tanh(self.layer(x)) + x))
        if "many" in self.program:
            for _ in range(12):  # more factors than the gradient has elements
                x = 0.7 * x + 0.3 * torch.tanh(self.layer(x))
        if "checkpoint" in self.program:
            x = checkpoint(lambda z: torch.tanh(self.layer(z)), x, use_reentrant=False)
        if "tied" in self.program:
            x = x + self.table(torch.tensor([1, 2, 2, 5, 1, 0, 0, 3, 1]))
        if "parameter" in self.program:
            x = x + self.last(self.positions) + self.last(self.positions[2]) + self.layer(self.positions.T[:, :6])[0]
        if "matrix" in self.program:
            x = torch.tanh(x @ self.layer.weight)
        loss = self.last(x).square().mean()
        return loss + self.layer.weight.square().sum() * 0.1 if "loss" in self.program else loss


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "program",
    ["twice", "many", "matrix", "loss", "tied", "tied twice", "tied many loss matrix", "twice checkpoint", "parameter"],
)
def test_every_use_of_a_weight_counts(program: str, rule: str) -> None:
    torch.manual_seed(1)
    model = Reuse(program)
    textbook = Textbook64(model, lr=0.1, **RULES[rule])
    optimizer = Lomo(model, lr=0.1, fused_layers=True, **RULES[rule])
    for step in range(STEPS):
        x = torch.randn(9, 6, generator=torch.Generator().manual_seed(step)) + 0.5
        optimizer.backward(model(x))
        textbook.step(textbook.model(x.double()))
        assert_close(model, textbook, optimizer)


@pytest.mark.parametrize("rule", ["plain", "one", "two"])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (1, 6), (2, 3, 4, 6)], ids=str)
def test_inputs_of_any_rank_and_empty_ones(shape: tuple[int, ...], rule: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6, bias=False))
    textbook = Textbook64(model, lr=0.2, weight_decay=0.5, **RULES[rule])
    optimizer = Lomo(model, lr=0.2, weight_decay=0.5, fused_layers=True, **RULES[rule])
    for step in range(2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        optimizer.backward(model(x).square().sum() / 50)
        textbook.step(textbook.model(x.double()).square().sum() / 50)
        assert_close(model, textbook, optimizer)


@pytest.mark.parametrize("rule", ["plain", "one", "two"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, :1],
        lambda x: x[:, 0] if x.dim() == 3 else x,
        lambda x: x.expand(3, *x.shape),
        lambda x: x[::2],
    ],
    ids=["transposed", "narrowed", "selected", "expanded", "strided"],
)
def test_inputs_of_any_layout(view: Callable[[Tensor], Tensor], rule: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 5)])
    textbook = Textbook64(model, lr=0.2, **RULES[rule])
    optimizer = Lomo(model, lr=0.2, fused_layers=True, **RULES[rule])
    for step in range(3):
        x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(step))
        optimizer.backward(model[1](view(torch.tanh(model[0](view(x))))).sum() / 40)  # an expanded gradient, too
        textbook.step(textbook.model[1](view(torch.tanh(textbook.model[0](view(x.double()))))).sum() / 40)
        assert_close(model, textbook, optimizer)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rule", RULES)
def test_embeddings(rule: str, index_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(11, 6, padding_idx=3), nn.Embedding(5, 6), nn.Linear(6, 3)])
    textbook = Textbook64(model, lr=0.2, **RULES[rule])
    optimizer = Lomo(model, lr=0.2, fused_layers=True, **RULES[rule])
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        a, b = (torch.randint(n, (2, 7), generator=generator).to(index_dtype) for n in (11, 5))
        for net, train in ((model, optimizer.backward), (textbook.model, textbook.step)):
            train(net[2](torch.tanh(net[0](a) + net[1](b))).square().mean())
        assert_close(model, textbook, optimizer)


@pytest.mark.parametrize("rule", RULES)
def test_groups(rule: str) -> None:
    model = transformer(Options(tied=True))
    names = [name for name, _ in model.named_parameters()]
    first = [name for name in names if "blocks.0" in name]
    rest = [name for name in names if name not in first]
    params = dict(model.named_parameters())
    options = {"lr": 0.3, "weight_decay": 0.2}
    textbook = Textbook(model, lr=0.1, groups=[(first, options), (rest, {})], **RULES[rule])
    groups = [{"params": [params[name] for name in first], **options}, {"params": [params[name] for name in rest]}]
    optimizer = Lomo(groups, lr=0.1, fused_layers=model, **RULES[rule])
    for step in range(STEPS):
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
        assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6)
    for name, exact in textbook.model.named_parameters():
        torch.testing.assert_close(params[name], exact, rtol=0, atol=2e-6)


def test_a_group_added_later_is_fused_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = Lomo(list(model[0].parameters()), lr=0.1, fused_layers=model)
    assert isinstance(model[0], FusedLayer) and type(model[1]) is nn.Linear
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert type(model[1]) is not nn.Linear
    optimizer.remove()
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


# ---- 16 bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("rule", ["plain", "one", "two", "all, one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_are_rounded_once(dtype: torch.dtype, rule: str, rounding: str) -> None:
    """From the layer's own input and output gradient, what the reference makes of the float32 gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 24), nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 70)).to(dtype)
    optimizer = Lomo(model, lr=0.5, fused_layers=True, loss_scale=256.0, seed=9, rounding=rounding, **RULES[rule])
    seen: dict[nn.Module, list[Tensor]] = {}
    for layer in (model[0], model[1], model[3]):
        layer.register_forward_hook(lambda layer, args, _: seen.__setitem__(layer, [args[0].detach()]))
        layer.register_full_backward_hook(lambda layer, _, grads: seen[layer].append(grads[0]))
    for step in range(3):
        before = weights_of(model)
        tokens = torch.randint(20, (8,), generator=torch.Generator().manual_seed(step))
        optimizer.backward(model(tokens).float().square().mean())
        clip = RULES[rule].get("clip_grad_norm")
        norm = optimizer.last_grad_norm
        for index, (layer, name) in {
            0: (model[0], "0.weight"),
            1: (model[1], "1.weight"),
            3: (model[3], "3.weight"),
        }.items():
            x, gy = seen[layer][0], seen[layer][1]
            gradient = (
                reference.embedding_gradient(20, [x], [gy], [-1])
                if index == 0
                else reference.linear_gradient([x], [gy])
            )
            expected = reference.updated(
                before[name],
                gradient,
                lr=0.5,
                weight_decay=RULES[rule].get("weight_decay", 0.0),
                inv_scale=1 / 256.0,
                clip_value=RULES[rule].get("clip_grad_value", float("inf")),
                clip_coef=1.0 if clip is None else numbers.clip_coefficient(norm.square(), clip).item(),
                stochastic=rounding == "stochastic",
                seed=9,
                parameter_id={0: 0, 1: 1, 3: 3}[index],
                step=step,
            )
            param = layer.weight
            different = (param != expected).float().mean().item()
            assert different <= 0.01, f"{different:.1%} of {name}"  # a float32 sum in another order, at a tie
            torch.testing.assert_close(param, expected, rtol=2**-7, atol=1e-3)
            assert not same_bits(param, before[name])


@pytest.mark.parametrize("rule", ["plain", "one", "two"])
def test_float32_weights_under_autocast(rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 5))
    plain = copy.deepcopy(model)
    optimizer = Lomo(model, lr=0.1, fused_layers=True, **RULES[rule])
    other = Lomo(plain, lr=0.1, **RULES[rule])
    for step in range(3):
        tokens = torch.randint(20, (30,), generator=torch.Generator().manual_seed(step))
        losses = []
        for net, train in ((model, optimizer), (plain, other)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = net(tokens)
                assert output.dtype is torch.bfloat16
                losses.append(output.float().square().mean())
            train.backward(losses[-1])
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-2)
        assert optimizer.last_grad_norm.item() == pytest.approx(other.last_grad_norm.item(), rel=1e-2)
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert mine.dtype is torch.float32 and mine.grad is None
            torch.testing.assert_close(mine, theirs, rtol=0.02, atol=2e-3)


def test_autocast_gives_the_same_forward_bits_and_takes_its_copy_of_no_other_use() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(x)
    with Lomo(model, lr=0.1, fused_layers=True), torch.autocast("cpu", dtype=torch.bfloat16):
        fused = model(x)
        other = F.linear(x, model.weight)
    assert same_bits(plain, fused)
    assert torch.autograd.grad(other.float().sum(), model.weight)[0].abs().sum() > 0


# ---- Steps that overflow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["two", "one"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_step_that_overflows_changes_nothing(rule: str, where: str) -> None:
    model = transformer(Options(dtype=torch.float16, tied=True))
    optimizer = Lomo(model, lr=0.1, fused_layers=True, **RULES[rule])
    optimizer.backward(loss_of(model, 0))
    skipped, scale, before = optimizer.skipped_steps.item(), optimizer.loss_scale.item(), weights_of(model)
    layer = model.blocks[0].qkv if where == "first" else model.head
    handle = layer.register_full_backward_pre_hook(lambda _, grads: (grads[0] * float("inf"),))
    optimizer.backward(loss_of(model, 1))
    assert_same_bits(weights_of(model), before)
    assert optimizer.skipped_steps.item() == skipped + 1
    assert optimizer.loss_scale.item() == scale / 2
    handle.remove()
    optimizer.backward(loss_of(model, 1))
    assert not same_bits(model.head.weight, before["embedding.weight"])


@pytest.mark.parametrize("rule", ["two", "one"])
def test_raise_names_the_fused_weight(rule: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = Lomo(model, lr=0.1, fused_layers=True, nonfinite="raise", **RULES[rule])
    before = weights_of(model)
    with pytest.raises(FloatingPointError, match=r"not finite in 0\.weight"):
        optimizer.backward(model(torch.full((2, 3), float("inf"))).tanh().sum() * float("inf"))
    assert_same_bits(weights_of(model), before)


def test_without_clipping_elements_that_are_not_finite_keep_their_weight() -> None:
    layer = nn.Linear(3, 2, bias=False)
    optimizer = Lomo(layer, lr=0.1, fused_layers=True)
    before = layer.weight.detach().clone()
    handle = layer.register_full_backward_pre_hook(lambda _, grads: (grads[0] * torch.tensor([1.0, float("nan")]),))
    optimizer.backward(layer(torch.ones(4, 3)).sum())
    assert same_bits(layer.weight[1], before[1])
    torch.testing.assert_close(layer.weight[0], before[0] - 0.4)
    assert optimizer.skipped_steps.item() == 1
    handle.remove()


# ---- Misuse: raised before any weight changed -----------------------------------------------------------------------


def doubles(tensors: list[Tensor]) -> Callable[..., None]:
    """A hook that works in place on a tensor it should leave alone."""

    def hook(*_: object) -> None:
        tensors[0].detach().mul_(2.0)

    return hook


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        *((kind, rule) for kind in ("weight changed", "backward twice") for rule in ("one", "two", "plain")),
        *((kind, "one") for kind in ("input altered", "grad_output altered")),  # the others keep nothing
    ],
)
def test_misuse_raises_before_any_weight_changed(kind: str, rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))  # factors smaller than the gradient
    optimizer = Lomo(model, lr=0.1, fused_layers=True, **RULES[rule])
    seen: list[Tensor] = []
    if kind == "input altered":
        model[2].register_forward_hook(lambda _, args, __: seen.append(args[0]))
    else:
        model[2].register_full_backward_hook(lambda _, __, grads: seen.append(grads[0]))
    x = torch.randn(5, 32, requires_grad=True)
    loss = model(x).square().sum()
    handle = None
    if kind == "weight changed":  # of the layer that backward comes to last
        with torch.no_grad():
            model[0].weight.mul_(1.01)
    elif kind == "backward twice":
        loss.backward()
        model.zero_grad()
    else:
        handle = model[0].register_full_backward_hook(doubles(seen))
        loss = model(x).square().sum()
        seen[:-1] = []
    before = weights_of(model)
    message = {
        "weight changed": r"changed in place|modified by an inplace",
        "backward twice": "second time",
        "input altered": r"the input of the layer of 2\.weight.*altered in place.*No weight was changed",
        "grad_output altered": r"the grad_output of the layer of 2\.weight.*altered in place.*No weight was changed",
    }
    with pytest.raises(RuntimeError, match=message[kind]):
        optimizer.backward(loss)
    assert_same_bits(weights_of(model), before)
    if handle is not None:
        handle.remove()
    optimizer.backward(model(torch.randn(5, 32)).square().sum())  # and it goes on
    assert not same_bits(model[0].weight, before["0.weight"])


# ---- What somebody else has in the same graph ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["one", "two", "plain"])
def test_a_leaf_of_others_that_got_the_memory_of_a_factor(rule: str) -> None:
    """Autograd gives the leaf a view of the layer's output gradient, which is kept."""
    torch.manual_seed(0)
    model = nn.Linear(60, 40)
    textbook = Textbook64(model, lr=0.1, **RULES[rule])
    optimizer = Lomo(model, lr=0.1, loss_scale=128.0, fused_layers=True, **RULES[rule])
    x, factor = torch.randn(5, 60), torch.randn(5, 40)
    leaf, other = torch.randn(200, requires_grad=True), torch.zeros(200, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        leaf.grad = None
        optimizer.backward(((model(x) + leaf.view(5, 40)) * factor).sum())
        textbook.step(((textbook.model(x.double()) + other.view(5, 40)) * factor).sum())
        assert_close(model, textbook, optimizer)
        torch.testing.assert_close(leaf.grad.view(5, 40), factor)


@pytest.mark.parametrize("rule", ["one", "two", "plain"])
def test_backward_inside_autocast(rule: str) -> None:
    """A tied head, few tokens: the norm comes from inner products, which autocast would round."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(600, 120), nn.Linear(120, 600, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(tokens))).square().mean()

    torch.manual_seed(0)
    model = Tied()
    textbook = Textbook64(model, lr=0.1, **RULES[rule])
    optimizer = Lomo(model, lr=0.1, fused_layers=True, **RULES[rule])
    tokens = torch.arange(40) % 13
    for _ in range(3):
        loss = model(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.backward(loss)
        textbook.step(textbook.model(tokens))
        assert_close(model, textbook, optimizer)
