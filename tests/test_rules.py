"""Every rule in every place: operators, hook path, fused layers, every clipping, stochastic, shards, resumed runs."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support.models import Options, loss_of, transformer
from support.oracle import DTYPES, ROUNDINGS, assert_same_bits, name_of
from support.textbook import Textbook
from torch import Tensor, nn

from lomo_kernels import Lomo, ops, reference
from lomo_kernels.composite import tiled
from lomo_kernels.ops.scalars import vector
from lomo_kernels.rules import RULES

ROOT = Path(__file__).parents[1]
every_rule = pytest.mark.parametrize("rule", RULES)
every_param = pytest.mark.parametrize("param_dtype", DTYPES, ids=name_of)
every_grad = pytest.mark.parametrize("grad_dtype", DTYPES, ids=name_of)
every_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)
#: Around every width that a kernel works in, and several chunks of tiles.
SIZES = [1, 7, 16, 63, 64, 65, 4095, 4097, 70001]


# ---- The operators --------------------------------------------------------------------------------------------------


def names_in(file: str, pattern: str) -> list[str]:
    """The rules that a source names, in lower case, in the order of their numbers."""
    lists = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert len(lists) == 1, f"{file}: {pattern} stands {len(lists)} times in it"
    return [name.strip().lower() for name in lists[0].split(",")]


@every_rule
def test_every_file_has_the_rule(rule):
    """The first test to look at if a rule was added: it says what is missing, the others only that bits differ."""
    assert sorted(RULES.values()) == list(range(len(RULES))), "lomo_kernels/rules.py: numbers are not 0, 1, 2, ..."
    assert rule in reference.DIRECTIONS, f"lomo_kernels/reference.py: DIRECTIONS lacks {rule!r}"
    for file, pattern in (
        ("csrc/numerics.h", r"^using Rules = RuleList<(.*)>;"),
        ("lomo_kernels/triton/numerics.py", r"^(\w+(?:, \w+)*) = tl\.constexpr\(0\), tl\.constexpr\(1\)"),
    ):
        names = names_in(file, pattern)
        assert names[RULES[rule] : RULES[rule] + 1] == [rule], (
            f"{file}: rule {RULES[rule]}, {rule!r}, is not in {names}"
        )
    for name, text in (
        ("docs/numerics.md", (ROOT / "docs" / "numerics.md").read_text()),
        ("the docstring of Lomo", Lomo.__doc__),
        ("the docstring of sgd_", ops.sgd_.__doc__),
    ):
        assert f'"{rule}"' in text, f"{name} does not name the rule {rule!r}"
    try:
        ops.sgd_(torch.ones(3), torch.ones(3), lr=0.1, rule=rule)
    except RuntimeError as error:
        pytest.fail(f"the library in force lacks {rule!r}, build it anew (`make testing`): {error}")


def test_the_reference_has_no_other_rule():
    assert reference.DIRECTIONS.keys() == RULES.keys()


def test_the_directions():
    """One element at a time, with Python's numbers: sign of zero, NaN and infinities included."""
    g = torch.tensor([3.0, -0.25, 0.0, -0.0, 1e-45, -1e-45, 3e38])
    expected = [1.0, -1.0, 0.0, 0.0, 1.0, -1.0, 1.0]
    assert reference.DIRECTIONS["sign"](g).tolist() == expected
    assert not reference.DIRECTIONS["sign"](torch.tensor([-0.0])).signbit().item()
    assert reference.DIRECTIONS["sgd"](g) is g


def test_sign_by_hand():
    inf, nan = math.inf, math.nan
    param = torch.tensor([1.0, 1.0, 1.0, -0.0, 5.0, 5.0, 5.0])
    grad = torch.tensor([3.0, -1e-30, 0.0, -0.0, inf, -inf, nan])
    ops.sgd_(param, grad, lr=0.25, rule="sign")
    assert param.tolist() == [0.75, 1.25, 1.0, 0.0, 5.0, 5.0, 5.0]
    assert param[3].signbit()
    ops.sgd_(param, torch.ones(7), lr=0.25, weight_decay=2.0, clip_coef=0.0, rule="sign")  # sign(0) = 0: decay alone
    assert param.tolist() == [0.375, 0.625, 0.5, 0.0, 2.5, 2.5, 2.5]


@every_rounding
@every_grad
@every_param
@every_rule
def test_update_has_the_reference_bits(rule, param_dtype, grad_dtype, rounding):
    for size in SIZES:
        for name in ("lr", "clip_value", "all"):
            given_ = oracle.ARGUMENTS[name] | {"rounding": rounding, "seed": 3, "parameter_id": 5, "step": 2**40 + 7}
            param, grad = oracle.param_of(size, param_dtype), oracle.grad_of(size, grad_dtype)
            expected = reference.updated(param, grad, **oracle.reference_arguments(given_), rule=rule)
            slot = torch.zeros(1, dtype=torch.float64)
            ops.sgd_(param, grad, **given_, rule=rule, sq_norm=slot)
            assert_same_bits(param, expected, size, name)


@every_rule
def test_ordinary_gradients_too(rule):
    """On which kernels take their fast ways."""
    for dtype in DTYPES:
        for rounding in ROUNDINGS:
            param, grad = oracle.ordinary(10007, dtype), oracle.ordinary(10007, dtype, 1)
            grad[5000] = math.inf
            expected = reference.updated(param, grad, lr=0.03, rule=rule, stochastic=rounding == "stochastic")
            ops.sgd_(param, grad, lr=0.03, rule=rule, rounding=rounding)
            assert_same_bits(param, expected, dtype, rounding)


@every_rule
def test_lists_have_the_bits_of_single_calls(rule):
    sizes = (5, 64, 4097)
    params = [oracle.ordinary(size, dtype, size) for dtype in DTYPES for size in sizes]
    grads = [oracle.ordinary(param.numel(), torch.bfloat16, i) for i, param in enumerate(params)]
    ones = [param.clone() for param in params]
    given_ = {"lr": 0.1, "weight_decay": 0.1, "rule": rule, "rounding": "stochastic", "step": 4}
    ops.sgd_list_(params, grads, **given_)
    for i, (one, grad) in enumerate(zip(ones, grads, strict=True)):
        ops.sgd_(one, grad, **given_, parameter_id=i)
        assert_same_bits(params[i], one)


int64 = st.integers(-(2**63), 2**63 - 1)


@given(st.data())
def test_any_update(data):
    rule, size = data.draw(st.sampled_from(list(RULES))), data.draw(st.integers(0, 300))
    make = data.draw(st.sampled_from([oracle.values, oracle.ordinary, oracle.subnormals, oracle.patterns]))
    dtypes = [data.draw(st.sampled_from(DTYPES[1:] if make is oracle.subnormals else DTYPES)) for _ in range(2)]
    seed = data.draw(st.integers(0, 2**20))
    param, grad = make(size, dtypes[0], seed), make(size, dtypes[1], seed + 7)
    param = torch.where(param.isnan(), 0.5, param)  # torch's own float16 conversion changes a NaN at a tensor's end
    optional = st.none() | st.floats(1e-45, 1e30)
    numbers: dict[str, Any] = {
        "lr": data.draw(st.floats(0, 1e5)),
        "weight_decay": data.draw(st.floats(0, 10)),
        "inv_scale": data.draw(optional),
        "clip_value": data.draw(optional),
        "clip_coef": data.draw(st.none() | st.floats(0, 1)),
    }
    keys = {"rounding": data.draw(st.sampled_from(ROUNDINGS)), "seed": data.draw(int64), "step": data.draw(int64)}
    if data.draw(st.booleans()):
        length = data.draw(st.integers(1, 2**34))
        keys["shard"] = (data.draw(st.integers(0, 2**45)), length, length + data.draw(st.integers(0, 2**33)))
    given_ = {name: value for name, value in numbers.items() if value is not None} | keys
    expected = reference.updated(param, grad, **oracle.reference_arguments(given_), rule=rule)
    ops.sgd_(param, grad, **numbers, **keys, rule=rule)
    assert_same_bits(param, expected, rule, numbers, keys)


@pytest.mark.parametrize("rule", ["nonesuch", None, 1, ["sgd"]])
def test_another_rule_is_refused(rule):
    param = torch.ones(3)
    with pytest.raises(ValueError, match=r"sgd_: rule is .*, expected one of 'sgd', 'sign'"):
        ops.sgd_(param, torch.ones(3), lr=0.1, rule=rule)
    with pytest.raises(ValueError, match=r"Lomo: rule is .*, expected one of 'sgd', 'sign'"):
        Lomo([nn.Parameter(param)], rule=rule)
    with pytest.raises(TypeError, match="sgd_: got an unexpected argument 'rules'"):
        ops.sgd_(param, torch.ones(3), lr=0.1, rules="sgd")
    assert (param == 1).all()


# ---- Layers' operators ----------------------------------------------------------------------------------------------

#: One row of the shard for every row of the weight; one for all; rows that end inside the weight's rows.
SHARDS = {
    "columns": (3, 24, 60),
    "rows": (700, 2**40, 2**40),
    "uneven": (2**33 - 5, 7, 11),
    "pairs of rows": (0, 48, 50),
}


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=oracle.generator(seed)).float()


@pytest.mark.parametrize("shard", [None, *SHARDS])
@every_rounding
@every_param
@every_rule
def test_layers_have_the_bits_of_the_whole_gradient(rule, param_dtype, rounding, shard, monkeypatch):
    """Of integers, whose sums are exact. Several tiles, whose ends are no ends of the shard's rows."""
    monkeypatch.setattr(tiled, "TILE_BYTES", 4 * 24 * 5)
    monkeypatch.setattr(tiled, "LEAST_ROWS", 5)
    rows, columns, tokens = 33, 24, 9
    x, gy = integers(tokens, columns, seed=1), integers(tokens, rows, seed=2)
    index = torch.randint(0, rows, (tokens,), generator=oracle.generator(3))
    keys = {"shard": SHARDS[shard]} if shard else {}
    keys |= {"lr": 0.3, "weight_decay": 0.1, "clip_value": 3.0, "rounding": rounding, "seed": 9, "step": 3}
    for call, gradient in (
        (lambda w, slot: ops.linear_sgd_(w, x, gy, rule=rule, sq_norm=slot, **keys), gy.T @ x),
        (
            lambda w, slot: ops.embedding_sgd_(w, index, x, rule=rule, sq_norm=slot, **keys),
            torch.zeros(rows, columns).index_add_(0, index, x),
        ),
    ):
        weight, slot = oracle.ordinary(rows * columns, param_dtype).view(rows, columns), torch.zeros(1).double()
        expected = reference.updated(weight, gradient, **oracle.reference_arguments(keys), rule=rule)
        call(weight, slot)
        assert_same_bits(weight, expected)
        assert slot.item() == gradient.square().sum().item()


@pytest.mark.parametrize("shard", SHARDS)
def test_the_embedding_in_tiles_takes_a_shard_too(shard, monkeypatch):
    monkeypatch.setattr(tiled, "TILE_BYTES", 4 * 24 * 5)
    monkeypatch.setattr(tiled, "LEAST_ROWS", 5)
    x, index = integers(9, 24, seed=1), torch.randint(0, 33, (9,), generator=oracle.generator(3))
    weight = oracle.ordinary(33 * 24, torch.bfloat16).view(33, 24)
    gradient = torch.zeros(33, 24).index_add_(0, index, x)
    expected = reference.updated(weight, gradient, lr=0.3, stochastic=True, seed=9, shard=SHARDS[shard])
    scalars = vector("test", weight.device, {"lr": 0.3})
    tiled.embedding_update_(weight, [index], [x], [-1], scalars, None, 0, True, 9, 0, list(SHARDS[shard]))
    assert_same_bits(weight, expected)


# ---- The optimizer --------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm, two passes": {"clip_grad_norm": 0.1, "clip_passes": "two"},
    "norm, one pass": {"clip_grad_norm": 0.1, "clip_passes": "one"},
    "value": {"clip_grad_value": 1e-3},
    "stochastic": {"rounding": "stochastic", "seed": 11},
    "split": {"rounding": "split"},
    "static scale": {"loss_scale": 64.0},
    "dynamic scale": {"loss_scale": "dynamic", "clip_grad_norm": 0.1, "clip_passes": "two"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("options", OPTIONS)
@every_rule
def test_lomo_equals_the_textbook(rule, options, dtype):
    model = transformer(Options(dtype=dtype))
    settings = {"lr": 1e-2, "weight_decay": 0.01, "rule": rule, **OPTIONS[options]}
    textbook, optimizer = Textbook(model, **settings), Lomo(model, **settings)
    for step in range(3):
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
        for ours, theirs in zip(model.parameters(), textbook.model.parameters(), strict=True):
            assert_same_bits(ours, theirs, step)


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "stochastic"])
@every_rule
def test_fused_layers(rule, options):
    """Integers below 2**24 make every sum exact, so weights have the bits of the layers that are not fused. After a
    step with sign they are halves of integers."""
    made = []
    for fused in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 7, bias=False))
        for param in model.parameters():
            param.data = torch.randint(-3, 4, param.shape).float()
        optimizer = Lomo(model, lr=0.5, rule=rule, fused_layers=fused, **OPTIONS[options])
        tokens = torch.randint(0, 11, (3, 5))
        factor = torch.randint(-2, 3, (3, 5, 7)).float()
        for _ in range(2 if rule == "sign" else 1):
            optimizer.backward((model(tokens) * factor).sum())
        made.append([param.detach().clone() for param in model.parameters()])
    for plain, fused_ in zip(*made, strict=True):
        assert_same_bits(fused_, plain)


def test_a_gradient_that_is_not_finite_keeps_its_elements():
    param = nn.Parameter(torch.ones(4))
    optimizer = Lomo([param], lr=0.5, rule="sign")
    optimizer.backward((param * torch.tensor([2.0, math.inf, 0.0, -1e-20])).sum())
    assert param.tolist() == [0.5, 1.0, 1.0, 1.5]
    assert optimizer.skipped_steps.item() == 1


def trained(steps: range, *, rule: str, state: dict[str, Any] | None = None, model: nn.Module | None = None) -> Any:
    model = model or transformer(Options(dtype=torch.bfloat16))
    optimizer = Lomo(model, lr=1e-2, rule=rule, rounding="stochastic", clip_grad_norm=0.5, clip_passes="two")
    if state is not None:
        optimizer.load_state_dict(state)
    for step in steps:
        optimizer.backward(loss_of(model, step))
    return model, optimizer


def test_a_resumed_run_continues_with_the_same_rule():
    whole, _ = trained(range(4), rule="sign")
    model, optimizer = trained(range(2), rule="sign")
    state = optimizer.state_dict()
    optimizer.remove()
    model, _ = trained(range(2, 4), rule="sign", state=state, model=model)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("saved", RULES)
def test_another_rule_does_not_resume(saved):
    _, optimizer = trained(range(1), rule=saved)
    state = optimizer.state_dict()
    other = "sgd" if saved == "sign" else "sign"
    with pytest.raises(ValueError, match=f"saved with rule '{saved}', this optimizer has '{other}'"):
        trained(range(0), rule=other, state=state)
    del state["lomo"]  # what `torch.distributed.checkpoint` keeps
    with pytest.raises(ValueError, match=f"saved with rule '{saved}', this optimizer has '{other}'"):
        trained(range(0), rule=other, state=state)
    trained(range(0), rule=saved, state=state)


def test_a_state_dict_without_a_rule_is_that_of_sgd():
    _, optimizer = trained(range(1), rule="sgd")
    state = optimizer.state_dict()
    del state["lomo"]["rule"]
    trained(range(0), rule="sgd", state=state)
    with pytest.raises(ValueError, match="saved with rule 'sgd'"):
        trained(range(0), rule="sign", state=state)


def test_a_copy_has_the_rule():
    model, optimizer = trained(range(1), rule="sign")
    other, copied = copy.deepcopy((model, optimizer))
    for one, trainer in ((model, optimizer), (other, copied)):
        trainer.backward(loss_of(one, 1))
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_bits(ours, theirs)
