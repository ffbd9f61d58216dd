"""`Lomo` against SGD as a textbook has it: same weights, same norm, whatever the model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import Options, assert_same_bits, batch, gives, loss_of, transformer, vector, weights_of
from support.textbook import Textbook, Textbook64
from torch import Tensor, nn

from lomo_kernels import Lomo

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = 3

MODELS = [
    Options(),
    Options(tied=True),
    Options(checkpoint="reentrant"),
    Options(checkpoint="non-reentrant"),
    Options(tied=True, checkpoint="reentrant"),
    Options(tied=True, checkpoint="non-reentrant"),
    Options(frozen=("blocks.0", "norm"), unused=True),
]
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"clip_grad_norm": 0.3, "clip_passes": "two"},
    "value": {"clip_grad_value": 0.01},
    "all": {"clip_grad_norm": 0.3, "clip_grad_value": 0.02, "weight_decay": 0.1, "clip_passes": "two"},
    "one": {"clip_grad_norm": 0.3, "clip_grad_value": 0.02, "weight_decay": 0.1, "clip_passes": "one"},
}
COMBINATIONS = [
    ("plain", "nearest"),
    ("norm", "stochastic"),
    ("value", "nearest"),
    ("all", "nearest"),
    ("all", "stochastic"),
    ("one", "stochastic"),
]


def scale_for(dtype: torch.dtype) -> str | None:
    return "dynamic" if dtype is torch.float16 else None


@pytest.mark.parametrize(("rule", "rounding"), COMBINATIONS)
@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_textbook_in_every_bit(dtype: torch.dtype, options: Options, rule: str, rounding: str) -> None:
    model = transformer(Options(**{**options.__dict__, "dtype": dtype}))
    settings_ = {"lr": 0.5, "rounding": rounding, "seed": 11} | RULES[rule]
    textbook = Textbook(model, loss_scale=scale_for(dtype), **settings_)
    start = weights_of(model)
    optimizer = Lomo(model, **settings_)
    for step in range(STEPS):
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
        assert_same_bits(weights_of(model), weights_of(textbook.model))
        assert optimizer.last_grad_norm.isfinite().item() == math.isfinite(textbook.norm)
        if math.isfinite(textbook.norm):
            assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6)
        if "clip_grad_norm" in settings_:
            assert textbook.norm > settings_["clip_grad_norm"], "the clipping under test must be in force"
        assert all(param.grad is None for param in model.parameters())
    assert optimizer.skipped_steps.item() == textbook.skipped < 2
    assert optimizer.loss_scale.item() == textbook.loss_scale
    assert optimizer.step_count.item() == STEPS
    changed = {name for name, param in model.named_parameters() if not torch.equal(param, start[name])}
    assert {"head.weight", "embedding.weight", "blocks.1.qkv.weight"} & start.keys() <= changed
    assert not any(name.startswith((*options.frozen, "spare")) for name in changed)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_float32_stays_with_float64(options: Options, rule: str) -> None:
    model = transformer(options)
    optimizer = Lomo(model, lr=0.1, **RULES[rule])
    textbook = Textbook64(model, lr=0.1, **RULES[rule])
    for step in range(STEPS):
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step))
        assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-5)
    for (name, param), exact in zip(model.named_parameters(), textbook.model.parameters(), strict=True):
        torch.testing.assert_close(param.double(), exact, rtol=0, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip_grad_norm", [None, 0.3])
def test_groups_have_their_own_hyperparameters(dtype: torch.dtype, clip_grad_norm: float | None) -> None:
    model = transformer(Options(dtype=dtype, tied=True))
    names = [name for name, _ in model.named_parameters()]
    split = [
        ([n for n in names if "norm" in n or n.endswith("bias")], {"weight_decay": 0.0, "lr": 0.7}),
        ([n for n in names if "embedding" in n or n == "positions"], {"clip_grad_value": 0.01}),
        ([n for n in names if "norm" not in n and not n.endswith("bias")
          and "embedding" not in n and n != "positions"], {}),
    ]  # fmt: skip
    shared = {
        "lr": 0.3,
        "weight_decay": 0.2,
        "clip_grad_norm": clip_grad_norm,
        "rounding": "stochastic",
        "seed": 5,
        "clip_passes": "two",
    }
    textbook = Textbook(model, groups=split, loss_scale=scale_for(dtype), **shared)
    named = dict(model.named_parameters())
    optimizer = Lomo([{"params": [named[n] for n in group], **options} for group, options in split], **shared)
    for step in range(STEPS):
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["plain", "norm"])
def test_what_happens_between_steps_changes_nothing(dtype: torch.dtype, rule: str) -> None:
    """Evaluation (with and without gradients), gradients of inputs, an abandoned forward, another model's training."""
    model, other = transformer(Options(dtype=dtype)), transformer(Options(), seed=1)
    textbook = Textbook(model, lr=0.3, loss_scale=scale_for(dtype), **RULES[rule])
    optimizer = Lomo(model, lr=0.3, **RULES[rule])
    others_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for step in range(STEPS):
        before = weights_of(model)
        with torch.no_grad():
            loss_of(model, 50)
        torch.autograd.grad(loss_of(model, 51), model.embedding.weight)
        torch.autograd.grad(loss_of(model, 52), list(model.parameters()))
        loss_of(model, 53)
        loss_of(other, step).backward()
        others_optimizer.step()
        assert_same_bits(weights_of(model), before)
        assert all(param.grad is None for param in model.parameters())
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_after_plain_backward_is_the_same_step(dtype: torch.dtype, rule: str, rounding: str) -> None:
    model = transformer(Options(dtype=dtype, unused=True))
    settings_ = {"lr": 0.3, "rounding": rounding} | RULES[rule]
    textbook = Textbook(model, **settings_)
    optimizer = Lomo(model, **settings_)
    with pytest.warns(UserWarning, match="optimizer.backward"):
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
            assert model.head.weight.grad is not None, "step() leaves .grad, as every optimizer of torch does"
            assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


def test_step_and_backward_mix() -> None:
    model = transformer(Options(dtype=torch.bfloat16))
    textbook = Textbook(model, lr=0.3, clip_grad_norm=0.3, rounding="stochastic")
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=0.3, rounding="stochastic", clip_passes="two")
    with pytest.warns(UserWarning):
        for step in range(6):
            if step % 2:
                optimizer.backward(loss_of(model, step))
            else:
                loss_of(model, step).backward()
                optimizer.step()
                optimizer.zero_grad()
            textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


def test_step_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.1)
    for _ in range(3):
        gives(w, torch.ones(1)).backward()
        optimizer.step()
    assert len([warning for warning in recwarn if "Lomo.step()" in str(warning.message)]) == 1
    assert recwarn[0].filename == __file__, "the warning points at the line that called step()"


def test_step_without_gradients_is_no_step() -> None:
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.1)
    optimizer.step()
    assert optimizer.step_count.item() == 0
    assert w.item() == 1.0


def test_parameters_without_a_gradient_do_not_decay() -> None:
    used, unused = vector(1.0), vector(1.0)
    optimizer = Lomo([used, unused], lr=0.5, weight_decay=0.5)
    optimizer.backward(gives(used, torch.zeros(1)))
    assert (used.item(), unused.item()) == (0.75, 1.0)


def test_learning_rate_is_read_at_every_step() -> None:
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0)
    for lr in (1.0, 0.5, 0.25, 0.25, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.backward(gives(w, torch.ones(1)))
    assert w.item() == -2.0


@pytest.mark.parametrize("value", [torch.tensor(0.3), torch.tensor([0.3], dtype=torch.float64)], ids=["f32", "f64"])
def test_hyperparameters_as_tensors(value: Tensor) -> None:
    """A tensor means the number in it, and is read at every step."""
    w = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    numbers = {"weight_decay": 0.25, "clip_grad_value": 0.5}
    optimizer = Lomo([w], lr=value, **{name: torch.tensor(number) for name, number in numbers.items()})
    textbook = Textbook(nn.ParameterList([w]), lr=value.item(), **numbers)
    for step in range(3):
        optimizer.backward(gives(w, torch.linspace(-1, 1, 5)))
        textbook.step(gives(textbook.model[0], torch.linspace(-1, 1, 5)))
        value.mul_(0.5)
        textbook.groups[0]["lr"] = value.item()
        assert torch.equal(w, textbook.model[0]), step


@pytest.mark.parametrize(("lr", "weight_decay"), [(0.3, 1.7), (0.1, 5.3), (0.37, 1.3), (0.6, 0.7)])
@pytest.mark.parametrize("size", [100, 20_000])
def test_decay_is_computed_in_float64_and_rounded_once(size: int, lr: float, weight_decay: float) -> None:
    """float32(1 - lr * weight_decay), which arithmetic in float32 misses by a bit for these numbers."""
    exact = torch.tensor(1 - lr * weight_decay, dtype=torch.float64).float()
    lr32, decay32 = torch.tensor(lr), torch.tensor(weight_decay)
    assert exact != 1 - lr32 * decay32 or exact != 1 - torch.tensor(lr * weight_decay)
    w = nn.Parameter(torch.randn(size))
    expected = w.detach() * exact
    for kind in (float, lambda value: torch.tensor(value, dtype=torch.float64)):
        twin = nn.Parameter(w.detach().clone())
        Lomo([twin], lr=kind(lr), weight_decay=kind(weight_decay)).backward(gives(twin, torch.zeros(size)))
        assert torch.equal(twin, expected)
    twin = nn.Parameter(w.detach().clone())  # a float32 tensor means the number it holds, widened
    Lomo([twin], lr=lr32, weight_decay=decay32).backward(gives(twin, torch.zeros(size)))
    assert torch.equal(twin, w.detach() * torch.tensor(1 - lr32.item() * decay32.item(), dtype=torch.float64).float())


@pytest.mark.parametrize("clip_grad_norm", [None, 0.1])
def test_lr_of_fused_backward_is_for_all_groups_and_one_step(clip_grad_norm: float | None) -> None:
    a, b = vector(0.0), vector(0.0)
    optimizer = Lomo(
        [{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.25, clip_grad_norm=clip_grad_norm, clip_passes="two"
    )
    full = min(1.0, (clip_grad_norm or 9.0) / (2**0.5 + 1e-6))
    optimizer.fused_backward(a + b, lr=1.0)
    assert [a.item(), b.item()] == pytest.approx([-full, -full], rel=1e-6)
    optimizer.backward(a + b)
    assert [a.item(), b.item()] == pytest.approx([-1.5 * full, -1.25 * full], rel=1e-6)


@pytest.mark.parametrize("clip_grad_norm", [None, 0.3])
def test_grad_norm_then_fused_backward_is_one_step(clip_grad_norm: float | None) -> None:
    model = transformer()
    textbook = Textbook(model, lr=0.3, clip_grad_norm=clip_grad_norm)
    optimizer = Lomo(model, lr=9.0, clip_grad_norm=clip_grad_norm, clip_passes="two")
    for step in range(STEPS):
        loss = loss_of(model, step)
        before = weights_of(model)
        norm = optimizer.grad_norm(loss).clone()
        assert_same_bits(weights_of(model), before)
        optimizer.fused_backward(loss, lr=0.3)
        textbook.step(loss_of(textbook.model, step), norm=norm)
        assert norm.item() == pytest.approx(textbook.norm, rel=1e-6)
    assert_same_bits(weights_of(model), weights_of(textbook.model))
    assert optimizer.step_count.item() == STEPS


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("size", [65, 33_001], ids=["in lists", "alone"])
def test_random_bits_are_keyed_by_place_in_the_groups_and_step(size: int, rounding: str) -> None:
    """Frozen and unused parameters keep their number, so the bits of the others do not depend on them."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(size, dtype=torch.bfloat16), requires_grad=i != 1) for i in range(5)]
    grads = [torch.randn(size, dtype=torch.bfloat16) * 1e-3 for _ in params]
    held = nn.ParameterList(params)
    textbook = Textbook(held, lr=0.1, rounding=rounding, seed=-3)
    optimizer = Lomo([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, rounding=rounding, seed=-3)
    for step in range(3):
        used = [i for i in range(5) if i not in (1, step)]
        optimizer.backward(sum(gives(params[i], grads[i]) for i in used))
        textbook.step(sum(gives(textbook.model[i], grads[i]) for i in used))
    assert_same_bits(weights_of(held), weights_of(textbook.model))


def test_seeds_differ() -> None:
    results = []
    for seed in (0, 1, 2**63 - 1, -(2**63)):
        w = nn.Parameter(torch.ones(999, dtype=torch.bfloat16))
        Lomo([w], lr=1e-3, rounding="stochastic", seed=seed).backward(w.float().sum())
        results.append(w.detach())
    for i, result in enumerate(results):
        assert not any(torch.equal(result, other) for other in results[:i])


@pytest.mark.parametrize("sizes", [(0,), (1,), (3, 0, 5), (16384,), (16385,), (40000, 7, 20000)], ids=str)
@pytest.mark.parametrize("clip_grad_norm", [None, 0.5])
def test_large_and_small_and_empty_parameters(sizes: tuple[int, ...], clip_grad_norm: float | None) -> None:
    """Small ones go in lists, large ones alone; 16384 float32 are the border."""
    torch.manual_seed(0)
    held = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes)
    grads = [torch.randn(size) for size in sizes]
    textbook = Textbook(held, lr=0.1, clip_grad_norm=clip_grad_norm)
    optimizer = Lomo(held, lr=0.1, clip_grad_norm=clip_grad_norm, clip_passes="two")
    optimizer.backward(sum(gives(w, g) for w, g in zip(held, grads, strict=True)))
    textbook.step(sum(gives(w, g) for w, g in zip(textbook.model, grads, strict=True)), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(held), weights_of(textbook.model))
    assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6)


def test_more_small_parameters_than_the_buffer_holds() -> None:
    """The buffer is handed on when full and at the end; nothing is lost or applied twice."""
    torch.manual_seed(0)
    held = nn.ParameterList(nn.Parameter(torch.randn(15000)) for _ in range(40))  # 2.3 MB in 60 kB pieces
    grads = [torch.randn(15000) for _ in range(40)]
    textbook = Textbook(held, lr=0.1, clip_grad_norm=1.0)
    optimizer = Lomo(held, lr=0.1, clip_grad_norm=1.0, clip_passes="two")
    optimizer.backward(sum(gives(w, g) for w, g in zip(held, grads, strict=True)))
    textbook.step(sum(gives(w, g) for w, g in zip(textbook.model, grads, strict=True)), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(held), weights_of(textbook.model))


def test_mixed_dtypes_in_one_model() -> None:
    torch.manual_seed(0)
    held = nn.ParameterList(nn.Parameter(torch.randn(33, dtype=dtype)) for dtype in DTYPES * 2)
    grads = [torch.randn(33) for _ in held]
    textbook = Textbook(held, lr=0.1, clip_grad_norm=1.0, loss_scale=2.0**16)
    optimizer = Lomo(held, lr=0.1, clip_grad_norm=1.0, clip_passes="two")
    assert optimizer.loss_scale.item() == 2.0**16, "one float16 parameter is enough for dynamic scaling"
    optimizer.backward(sum(gives(w, g) for w, g in zip(held, grads, strict=True)) / 100)
    textbook.step(
        sum(gives(w, g) for w, g in zip(textbook.model, grads, strict=True)) / 100, norm=optimizer.last_grad_norm
    )
    assert optimizer.skipped_steps.item() == 0
    assert_same_bits(weights_of(held), weights_of(textbook.model))


def test_dropout_has_one_mask_for_both_passes() -> None:
    for kind in ("none", "reentrant", "non-reentrant"):
        model = transformer(Options(dropout=0.5, checkpoint=kind))
        textbook = Textbook(model, lr=0.3, clip_grad_norm=0.3)
        optimizer = Lomo(model, lr=0.3, clip_grad_norm=0.3, clip_passes="two")
        for step in range(3):
            torch.manual_seed(step)
            optimizer.backward(loss_of(model, step))
            torch.manual_seed(step)
            textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
        assert_same_bits(weights_of(model), weights_of(textbook.model))


def test_it_trains() -> None:
    model = transformer(Options(dtype=torch.bfloat16))
    optimizer = Lomo(model, lr=0.5, clip_grad_norm=1.0, rounding="stochastic", clip_passes="two")
    first = loss_of(model, 0).item()
    for _ in range(30):
        optimizer.backward(loss_of(model, 0))
    assert loss_of(model, 0).item() < first / 2


# ---- Random graphs --------------------------------------------------------------------------------------------------


class RandomGraph(nn.Module):
    """A list of instructions over a growing list of activations; parameters are shared, reused, detached or unused."""

    def __init__(self, program: list[tuple[int, int, int, int]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(torch.randn(5, 5, generator=generator) * 0.4 for _ in range(4))
        self.biases = nn.ParameterList(torch.randn(5, generator=generator) for _ in range(3))
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        values = [x, torch.tanh(x * self.scalar)]
        for kind, first, second, which in self.program:
            a, b = values[first % len(values)], values[second % len(values)]
            weight, bias = self.weights[which % 4], self.biases[which % 3]
            values.append(
                [
                    lambda a=a, w=weight, v=bias: F.linear(a, w, v),
                    lambda a=a, w=weight: torch.tanh(a @ w),  # the same weight, the other way round
                    lambda a=a, b=b: torch.tanh(a) + b,
                    lambda a=a, b=b: torch.tanh(a) * torch.sigmoid(b),
                    lambda a=a: torch.tanh(a).detach(),
                    lambda a=a, v=bias: F.layer_norm(a, (5,), v),
                    lambda a=a, w=weight: torch.utils.checkpoint.checkpoint(
                        lambda z: torch.tanh(F.linear(z, w)), a, use_reentrant=False
                    ),
                ][kind]()
            )
        return sum(value.square().mean() for value in values[1:])


instructions = st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 9), st.integers(0, 11))


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    program=st.lists(instructions, min_size=1, max_size=10),
    clip_grad_norm=st.sampled_from([None, 1e-3, 0.1, 10.0]),
    clip_grad_value=st.sampled_from([None, 1e-2]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    kept=st.booleans(),
)
def test_random_graphs(program: list[tuple[int, int, int, int]], dtype: torch.dtype, kept: bool, **rule: Any) -> None:
    model = RandomGraph(program, seed=len(program)).to(dtype)
    textbook = Textbook(model, lr=0.2, **rule)
    with Lomo(model, lr=0.2, **rule) as optimizer:
        for step in range(3):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
            if kept and step == 1:  # one backward more, into .grad
                model(x + 1).float().backward()
                textbook.backward(textbook.model(x + 1).float())
            optimizer.backward(model(x).float())
            textbook.step(textbook.model(x).float(), norm=optimizer.last_grad_norm)
            assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6)
            assert_same_bits(weights_of(model), weights_of(textbook.model))


def test_the_textbook_is_torch_sgd() -> None:
    """The oracle's own check: float32, clipped by torch, stepped by torch."""
    model = transformer()
    textbook = Textbook(model, lr=0.3, clip_grad_norm=0.3)
    plain = copy.deepcopy(model)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.3)
    for step in range(STEPS):
        textbook.step(loss_of(textbook.model, step))
        sgd.zero_grad()
        plain(*batch(step)).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        sgd.step()
    for ours, theirs in zip(textbook.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
