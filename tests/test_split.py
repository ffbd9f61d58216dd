"""Split weights: a bfloat16 and 16 further bits that together are a float32. The numbers, and every operator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support.oracle import ARGUMENTS, DTYPES, SIZES, assert_same_bits, name_of, reference_arguments
from torch import Tensor

from lomo_kernels import backends, ops, reference
from lomo_kernels.composite import gram, tiled
from lomo_kernels.ops.scalars import vector
from lomo_kernels.rules import RULES

BF16 = torch.bfloat16
PLAIN_TORCH = backends.choice("CPU").backend == "reference"
every_grad = pytest.mark.parametrize("grad_dtype", DTYPES, ids=name_of)
every_rule = pytest.mark.parametrize("rule", RULES)


def lows(n: int, seed: int = 0) -> Tensor:
    """Any 16 bits, the ends of the range among them."""
    low = torch.randint(-(2**15), 2**15, (n,), generator=oracle.generator(5000 + seed), dtype=torch.int16)
    low[::7] = 0
    low[1::7] = -(2**15)
    low[2::7] = 2**15 - 1
    return low


def check(param: Tensor, low: Tensor, grad: Tensor, *what: Any, device: str = "cpu", **arguments: Any) -> None:
    """Runs `sgd_` on copies and compares both parts with the reference."""
    p, part = param.to(device, copy=True), low.to(device, copy=True)
    ops.sgd_(p, grad.to(device), low=part, rounding="split", **arguments)
    expected, expected_low = reference.updated_split(param, low, grad, **reference_arguments(arguments))
    assert_same_bits(p, expected, *what)
    assert_same_bits(part, expected_low, *what)


# ---- The numbers ----------------------------------------------------------------------------------------------------


def floats() -> Tensor:
    """Around every bfloat16 and every midpoint between two, and any others. No NaN."""
    exact = oracle.all_patterns(BF16).view(torch.int16).int() << 16
    near = torch.cat([exact + offset for offset in (-0x8000, -0x7FFF, -1, 0, 1, 0x7FFF, 0x8000, 0x8001)])
    x = torch.cat([near.view(torch.float32), oracle.patterns(2**18, torch.float32)])
    return x[~x.isnan()]


def joined_bits(high: int, low: int) -> int:
    """Of unsigned 16 bits each, by the words of `docs/numerics.md`."""
    bits = (high * 2**16 + (low - 2**16 if low >= 2**15 else low)) % 2**32
    return high * 2**16 if bits % 2**31 > 0x7F800000 else bits


def test_a_pair_is_the_float32_and_its_first_part_the_nearest_bfloat16() -> None:
    x = floats()
    high, low = reference.split(x)
    assert_same_bits(reference.join(high, low), x)
    nearest = x.to(BF16)  # ties to even
    tie = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert_same_bits(high[~tie], nearest[~tie])
    away = high.double().abs() > x.double().abs()
    assert away[tie].all()
    assert high[x.isfinite()].isinf().any(), "no number rounds to infinity"


def test_the_reference_equals_pythons_integers() -> None:
    highs = [0, 1, 0x7F, 0x80, 0x3F80, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF]
    for high in [sign | one for sign in (0, 0x8000) for one in highs]:
        for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
            pair = torch.tensor([high, low], dtype=torch.int32).to(torch.int16)
            made = oracle.unsigned(reference.join(pair[:1].view(BF16), pair[1:]))[0]
            expected = joined_bits(high, low)
            assert made == expected or (high % 2**15 > 0x7F80 and made % 2**31 > 0x7F800000), (hex(high), hex(low))


def test_no_pair_is_nan_unless_its_first_part_is() -> None:
    high = oracle.all_patterns(BF16)
    for low in (0, 1, -1, 2**15 - 1, -(2**15), 0x1234, -0x1234):
        joined = reference.join(high, torch.full((2**16,), low, dtype=torch.int16))
        assert torch.equal(joined.isnan(), high.isnan()), low
        again, rest = reference.split(joined)
        numbers = ~high.isnan()
        assert_same_bits(again[numbers], high[numbers], low)
        assert ((rest == low) | (rest == 0))[numbers].all()


def test_a_stale_low_part_is_at_most_half_a_unit() -> None:
    """A weight that somebody else has set, with the low part of the weight before."""
    high = oracle.all_patterns(BF16)
    high = high[high.isfinite()]
    exponent = torch.frexp(high.double().abs()).exponent
    unit = torch.ldexp(torch.ones(len(high)).double(), exponent - 8).clamp(min=2.0**-133)
    for low in (0x7FFF, -(2**15), 77):
        joined = reference.join(high, torch.full_like(high, low, dtype=torch.int16))
        assert ((joined.double() - high.double()).abs() <= unit / 2).all()


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.floats(width=32), st.floats(0, 1e30), st.floats(0, 1))
def test_no_weight_becomes_nan(high: int, low: int, grad: float, lr: float, weight_decay: float) -> None:
    """Whatever 32 bits a pair has: a step makes NaN only of NaN, as that of a float32 weight does."""
    pair = torch.tensor([high, low], dtype=torch.int32).to(torch.int16)
    param, part = pair[:1].view(BF16).clone(), pair[1:].clone()
    whole = reference.join(param, part)
    gradient = torch.tensor([grad])
    ops.sgd_(param, gradient, lr=lr, weight_decay=weight_decay, low=part, rounding="split")
    ops.sgd_(whole, gradient, lr=lr, weight_decay=weight_decay)
    assert bool(param.isnan()) == bool(whole.isnan())
    if not whole.isnan() and math.isfinite(grad):
        assert_same_bits(reference.join(param, part), whole)


# ---- update_ --------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_nan_keeps_no_low_part() -> None:
    size = 4101
    for kind in ("ordinary", "not finite"):  # fast and slow ways through the kernels
        grad = torch.full((size,), 0.5, dtype=BF16)
        param, low = torch.full((size,), math.nan, dtype=BF16), lows(size)
        if kind == "not finite":
            grad[::7] = math.inf
        expected = torch.where(grad.isfinite(), 0, low)
        ops.sgd_(param, grad, lr=0.1, low=low, rounding="split")
        assert param.isnan().all()
        assert torch.equal(low, expected), kind


@pytest.mark.parametrize("beyond", [1, 3, 4])
def test_low_parts_that_are_not_aligned_as_their_weights(beyond: int) -> None:
    size = 9001
    param, grad = oracle.ordinary(size, BF16), oracle.ordinary(size, BF16, 1)
    low = lows(size + beyond)[beyond:]
    expected = reference.updated_split(param, low, grad, lr=0.03)
    ops.sgd_(param, grad, lr=0.03, low=low, rounding="split")
    assert_same_bits(param, expected[0])
    assert torch.equal(low, expected[1])


@pytest.mark.parametrize("size", SIZES)
@every_grad
def test_every_size_and_alignment(device: str, grad_dtype: torch.dtype, size: int) -> None:
    mixed = oracle.param_of(size, BF16), lows(size), oracle.grad_of(size, grad_dtype)
    ordinary = oracle.ordinary(size, BF16), lows(size, 1), oracle.ordinary(size, grad_dtype, 1)
    plain: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.1, "clip_coef": 0.7}
    for (param, low, grad), numbers in ((mixed, plain), (ordinary, plain | {"inv_scale": 0.3, "clip_value": 0.9})):
        expected = reference.updated_split(param, low, grad, **numbers)
        for offsets in ((0, 0, 0), (0, 1, 0), (3, 3, 3), (3, 5, 1)):  # as (parameter, low part, gradient)
            tensors = [oracle.misaligned(t.to(device), k) for t, k in zip((param, low, grad), offsets, strict=True)]
            (p, around_p), (part, around_low), (g, _) = tensors
            ops.sgd_(p, g, low=part, rounding="split", **numbers)
            assert_same_bits(p, expected[0], offsets)
            assert_same_bits(part, expected[1], offsets)
            for whole, offset in ((around_p, offsets[0]), (around_low, offsets[1])):
                outside = torch.cat([whole[:offset], whole[offset + size :]])
                assert (outside == 7).all(), "memory beside the parameter was written"


@pytest.mark.parametrize("name", ARGUMENTS)
@every_grad
@every_rule
def test_every_argument(device: str, rule: str, grad_dtype: torch.dtype, name: str) -> None:
    arguments = ARGUMENTS[name] | {"rule": rule}
    check(oracle.param_of(4097, BF16), lows(4097), oracle.grad_of(4097, grad_dtype), device=device, **arguments)
    check(oracle.ordinary(1000, BF16), lows(1000), oracle.ordinary(1000, grad_dtype, 1), device=device, **arguments)


@every_grad
def test_all_65536_parameters(device: str, grad_dtype: torch.dtype) -> None:
    for seed, numbers in enumerate(({"lr": 1.0}, {"lr": 0.03, "weight_decay": 0.1, "clip_value": 3.0})):
        grad = oracle.all_patterns(BF16, seed).to(grad_dtype)
        for low in (lows(2**16, seed), torch.full((2**16,), -(2**15), dtype=torch.int16)):
            check(oracle.all_patterns(BF16), low, grad, device=device, **numbers)


@pytest.mark.parametrize("numbers", [{"lr": 0.03}, ARGUMENTS["all"]], ids=["lr", "all"])
@every_grad
@every_rule
def test_steps_have_the_bits_of_float32_steps(device: str, rule: str, grad_dtype: torch.dtype, numbers: Any) -> None:
    """Joined, the pair is the weight that float32 training has, after any number of steps."""
    param = oracle.ordinary(5003, BF16).to(device)
    low, whole = torch.zeros_like(param, dtype=torch.int16), param.float()
    for step in range(20):
        grad = oracle.ordinary(5003, grad_dtype, step, scale=1e-3).to(device)
        grad[step] = math.inf
        ops.sgd_(param, grad, low=low, rounding="split", rule=rule, **numbers)
        ops.sgd_(whole, grad, rule=rule, **numbers)
        assert_same_bits(reference.join(param.cpu(), low.cpu()), whole.cpu(), step)
    assert not torch.equal(param.float(), whole), "the low parts hold something"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@every_grad
def test_an_element_whose_gradient_is_not_finite_keeps_both_parts(
    device: str, grad_dtype: torch.dtype, bad: float
) -> None:
    param, low = oracle.all_patterns(BF16), lows(2**16)
    grad = torch.full((2**16,), bad, dtype=grad_dtype)
    p, part = param.to(device, copy=True), low.to(device, copy=True)
    ops.sgd_(p, grad.to(device), lr=0.03, weight_decay=0.1, clip_value=1.0, low=part, rounding="split")
    assert_same_bits(p, param)
    assert_same_bits(part, low)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip_coef"])
def test_a_scalar_that_is_any_nan_makes_nan_and_a_low_part_of_zero(device: str, name: str) -> None:
    """A NaN of all bits must not round to zero, as a carry would make it. 5000: whole tiles and an end."""
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).to(device)
    param, low = oracle.ordinary(5000, BF16).to(device), lows(5000).to(device)
    scalars: dict[str, Any] = {"lr": 0.5, name: nan}
    ops.sgd_(param, torch.ones_like(param), low=low, rounding="split", **scalars)
    assert param.isnan().all()
    assert not low.any()


@pytest.mark.parametrize("flag", [1.0, 0.5, math.nan], ids=str)
def test_found_inf_leaves_both_parts_and_adds_the_norm(device: str, flag: float) -> None:
    param, low, grad = oracle.all_patterns(BF16), lows(2**16), oracle.ordinary(2**16, torch.float32)
    p, part = param.to(device, copy=True), low.to(device, copy=True)
    slot = torch.zeros(1, dtype=torch.float64, device=device)
    found = torch.tensor(flag, device=device)
    ops.sgd_(p, grad.to(device), lr=0.03, found_inf=found, sq_norm=slot, low=part, rounding="split")
    assert_same_bits(p, param)
    assert_same_bits(part, low)
    oracle.assert_close_sum(slot, oracle.squares(grad))


def test_strided_tensors(device: str) -> None:
    param = oracle.ordinary(6 * 70, BF16).to(device)[::2].view(7, 30).t()
    low, grad = lows(210).view(30, 7).to(device), oracle.ordinary(210, torch.float32).to(device).view(7, 30).t()
    for part in (low, low.clone().t().contiguous().t(), torch.stack([low, low], -1)[..., 0]):
        p = param.clone() if part is low else param
        expected = reference.updated_split(p.cpu(), part.cpu(), grad.cpu(), lr=0.03, weight_decay=0.1)
        ops.sgd_(p, grad, lr=0.03, weight_decay=0.1, low=part, rounding="split")
        assert_same_bits(p.contiguous(), expected[0])
        assert_same_bits(part.contiguous(), expected[1])


def test_lists_have_the_bits_of_single_calls(device: str) -> None:
    """bfloat16 and float32 parameters together; float32 ones have no low part."""
    sizes = (5, 64, 4097, 0)
    params = [oracle.ordinary(n, dtype, n).to(device) for dtype in (BF16, torch.float32) for n in sizes]
    parts = [lows(p.numel(), i).to(device) if p.dtype is BF16 else None for i, p in enumerate(params)]
    grads = [oracle.ordinary(p.numel(), torch.float16, i).to(device) for i, p in enumerate(params)]
    slots = torch.zeros(len(params), dtype=torch.float64, device=device)
    ones = [(p.clone(), None if part is None else part.clone()) for p, part in zip(params, parts, strict=True)]
    ops.sgd_list_(params, grads, lr=0.1, weight_decay=0.1, low=parts, rounding="split", sq_norm=slots)
    for i, ((one, part), grad) in enumerate(zip(ones, grads, strict=True)):
        ops.sgd_(one, grad, lr=0.1, weight_decay=0.1, low=part, rounding="split")
        assert_same_bits(params[i], one.cpu())
        if part is not None:
            assert_same_bits(parts[i], part.cpu())
        oracle.assert_close_sum(slots[i], oracle.squares(grad))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_change_no_bit(threads: Callable[[int], None], count: int) -> None:
    threads(count)
    check(oracle.param_of(300_001, BF16), lows(300_001), oracle.grad_of(300_001, BF16), lr=0.03)


def test_the_version_counters_move(device: str) -> None:
    param, low = torch.ones(3, dtype=BF16, device=device), torch.zeros(3, dtype=torch.int16, device=device)
    ops.sgd_(param, torch.ones(3, device=device), lr=0.1, low=low, rounding="split")
    assert param._version == 1


@given(st.data())
def test_any_update(data: st.DataObject) -> None:
    size, seed = data.draw(st.integers(0, 300)), data.draw(st.integers(0, 2**20))
    make = data.draw(st.sampled_from([oracle.values, oracle.ordinary, oracle.subnormals, oracle.patterns]))
    param, grad = make(size, BF16, seed), make(size, data.draw(st.sampled_from((BF16, torch.float16))), seed + 7)
    optional = st.none() | st.floats(1e-45, 1e30)
    numbers = {
        "lr": data.draw(st.floats(0, 1e5)),
        "weight_decay": data.draw(st.floats(0, 10)),
        "inv_scale": data.draw(optional),
        "clip_value": data.draw(optional),
        "clip_coef": data.draw(st.none() | st.floats(0, 1)),
    }
    given_ = {name: value for name, value in numbers.items() if value is not None}
    check(param, lows(size, seed), grad, rule=data.draw(st.sampled_from(list(RULES))), **given_)


# ---- Operators of layers, and with factors --------------------------------------------------------------------------


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=oracle.generator(seed)).float()


ROWS, COLUMNS, TOKENS = 33, 24, 9
INDEX = torch.randint(0, ROWS, (TOKENS,), generator=oracle.generator(3))


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE_BYTES", 4 * COLUMNS * 5)
    monkeypatch.setattr(tiled, "LEAST_ROWS", 5)


def layouts(matrix: Tensor) -> list[Tensor]:
    """Copies of the matrix: with contiguous rows, with contiguous columns, with gaps."""
    gaps = torch.zeros(matrix.shape[0], 2 * matrix.shape[1], dtype=matrix.dtype)[:, ::2]
    return [matrix.clone(), matrix.t().contiguous().t(), gaps.copy_(matrix)]


def both_layouts(weight: Tensor, low: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for first, second in itertools.product(range(3), range(3)):
        yield layouts(weight)[first], layouts(low)[second]


LAYERS: dict[str, Callable[..., None]] = {
    "linear": lambda weight, x, gy, scalars, *rest: torch.ops.lomo_kernels.linear_update_(
        weight, [x], [gy], scalars, *rest
    ),
    "embedding": lambda weight, x, gy, scalars, *rest: torch.ops.lomo_kernels.embedding_update_(
        weight, [INDEX], [x], [-1], scalars, *rest
    ),
    "linear in tiles": lambda weight, x, gy, scalars, *rest: tiled.linear_update_(weight, [x], [gy], scalars, *rest),
    "embedding in tiles": lambda weight, x, gy, scalars, *rest: tiled.embedding_update_(
        weight, [INDEX], [x], [-1], scalars, *rest
    ),
}


@pytest.mark.parametrize("numbers", [{"lr": 0.3}, {"lr": 0.3, "weight_decay": 0.1, "clip_value": 3.0}], ids=str)
@pytest.mark.parametrize("shard", [[], [3, 7, 11]], ids=["whole", "shard"])
@pytest.mark.parametrize("layer", LAYERS)
@every_rule
def test_layers(rule: str, layer: str, shard: list[int], numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of integers, whose sums are exact. Several tiles. A shard says nothing to an update without random bits."""
    small_tiles(monkeypatch)
    x, gy = integers(TOKENS, COLUMNS, seed=1), integers(TOKENS, ROWS, seed=2)
    gradient = gy.T @ x if "linear" in layer else torch.zeros(ROWS, COLUMNS).index_add_(0, INDEX, x)
    weight, low = oracle.ordinary(ROWS * COLUMNS, BF16).view(ROWS, COLUMNS), lows(ROWS * COLUMNS).view(ROWS, COLUMNS)
    expected = reference.updated_split(weight, low, gradient, **numbers, rule=rule)
    scalars = vector("test", weight.device, numbers)
    for given_weight, given_low in both_layouts(weight, low):
        slot = torch.zeros(1, dtype=torch.float64)
        LAYERS[layer](given_weight, x, gy, scalars, slot, RULES[rule], False, 0, 0, shard, given_low)
        assert_same_bits(given_weight.contiguous(), expected[0])
        assert_same_bits(given_low.contiguous(), expected[1])
        assert slot.item() == gradient.square().sum().item()


def test_the_wrappers_of_layers() -> None:
    x, gy = integers(TOKENS, COLUMNS, seed=1), integers(TOKENS, ROWS, seed=2)
    weight, low = oracle.ordinary(ROWS * COLUMNS, BF16).view(ROWS, COLUMNS), lows(ROWS * COLUMNS).view(ROWS, COLUMNS)
    of_tokens = torch.zeros(ROWS, COLUMNS).index_add_(0, INDEX, x)
    calls: list[tuple[Callable[..., None], tuple[Tensor, Tensor], Tensor]] = [
        (ops.linear_sgd_, (x, gy), gy.T @ x),
        (ops.embedding_sgd_, (INDEX, x), of_tokens),
    ]
    for call, factors, gradient in calls:
        w, part = weight.clone(), low.clone()
        expected = reference.updated_split(weight, low, gradient, lr=0.3)
        call(w, *factors, lr=0.3, low=part, rounding="split")
        assert_same_bits(w, expected[0])
        assert_same_bits(part, expected[1])
        whole = weight.float()
        call(whole, *factors, lr=0.3, rounding="split")  # float32 is not split
        assert_same_bits(whole, reference.updated(weight.float(), gradient, lr=0.3))


@every_grad
def test_factored_updates(grad_dtype: torch.dtype) -> None:
    grad = oracle.ordinary(ROWS * COLUMNS, grad_dtype, 1).view(ROWS, COLUMNS)
    grad[3, 5] = math.nan
    of_rows, of_columns = torch.rand(ROWS) + 0.5, torch.rand(3, COLUMNS) + 0.5
    weight, low = oracle.ordinary(ROWS * COLUMNS, BF16).view(ROWS, COLUMNS), lows(ROWS * COLUMNS).view(ROWS, COLUMNS)
    scalars = vector("test", weight.device, {"lr": 0.3, "weight_decay": 0.1, "clip_coef": 0.5})
    expected, expected_low = weight.clone(), low.clone()
    arguments = (grad, of_rows, of_columns, scalars, 0, False, 0, 0, [])
    reference.IMPLEMENTATIONS["factored_update_"](expected, *arguments, expected_low)
    f = reference.factored_gradient(grad, of_rows, of_columns, clip_coef=0.5)
    assert_same_bits(expected, reference.updated_split(weight, low, f, lr=0.3, weight_decay=0.1)[0])
    for given_weight, given_low in both_layouts(weight, low):
        torch.ops.lomo_kernels.factored_update_(given_weight, *arguments, given_low)
        assert_same_bits(given_weight.contiguous(), expected)
        assert_same_bits(given_low.contiguous(), expected_low)


# ---- What is refused ------------------------------------------------------------------------------------------------

ONES = torch.ones(4, dtype=BF16)
ZEROS = torch.zeros(4, dtype=torch.int16)
BAD: dict[str, tuple[Tensor, Any, str, str]] = {
    "no low": (ONES, None, "split", r'sgd_: low is None and rounding is "split", expected an int16 tensor'),
    "low without split": (ONES, ZEROS, "nearest", r"sgd_: low was given, and rounding is 'nearest'"),
    "low and stochastic": (ONES, ZEROS, "stochastic", r"sgd_: low was given, and rounding is 'stochastic'"),
    "float16": (ONES.half(), ZEROS, "split", r"sgd_: a parameter is float16, .* make the parameter bfloat16"),
    "float16 without low": (
        ONES.half(),
        None,
        "split",
        r"sgd_: a parameter is float16, .* make the parameter bfloat16",
    ),
    "low of float32": (ONES.float(), ZEROS, "split", r"sgd_: a float32 parameter has a low part"),
    "another dtype": (ONES, ZEROS.int(), "split", r"sgd_: low has shape \[4\] and dtype torch.int32"),
    "another shape": (ONES, ZEROS[:3], "split", r"sgd_: low has shape \[3\] and dtype torch.int16, .* shape \[4\]"),
    "no tensor": (ONES, 0, "split", r"sgd_: low is a int, expected an int16 tensor"),
    "another device": (ONES, ZEROS.to("meta"), "split", r"sgd_: low is on meta, the parameter is on cpu"),
    "expanded": (ONES, ZEROS[:1].expand(4), "split", r"several elements of low share one place in memory"),
    "the parameter's memory": (ONES, None, "itself", r"param and low share memory; it would be updated twice"),
}


@pytest.mark.skipif(PLAIN_TORCH, reason="plain torch has only the wrappers' checks")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    param, low, rounding, message = BAD[name]
    param = param.clone()
    if rounding == "itself":
        low, rounding = param.view(torch.int16), "split"
    before = param.clone(), low.clone() if isinstance(low, Tensor) and not low.is_meta else None
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        ops.sgd_(param, torch.ones(4), lr=0.1, low=low, rounding=rounding)
    assert_same_bits(param, before[0])
    assert before[1] is None or torch.equal(low, before[1])


@pytest.mark.skipif(PLAIN_TORCH, reason="plain torch has only the wrappers' checks")
def test_tensors_that_share_memory_are_refused() -> None:
    memory = torch.zeros(64, dtype=torch.int16)
    part, weight = memory[:16].view(4, 4), torch.ones(4, 4, dtype=BF16)
    grad = memory[8:24].view(BF16).view(4, 4)
    with pytest.raises(RuntimeError, match="low and grad share memory: grad would change before it is read"):
        ops.sgd_(weight, grad, lr=0.1, low=part, rounding="split")
    with pytest.raises(RuntimeError, match="two lows share memory"):
        ops.sgd_list_([weight, weight + 0], [weight + 0] * 2, lr=0.1, low=[part, part], rounding="split")
    with pytest.raises(RuntimeError, match="low and sq_norm share memory"):
        slot = memory[8:12].view(torch.float64)
        ops.sgd_(weight, weight.clone(), lr=0.1, low=part, sq_norm=slot, rounding="split")
    with pytest.raises(RuntimeError, match="low and a factor of its gradient share memory"):
        ops.linear_sgd_(weight, grad, grad.clone(), lr=0.1, low=part, rounding="split")
    with pytest.raises(RuntimeError, match="low and a factor of its gradient share memory"):
        ops.embedding_sgd_(weight, torch.tensor([0, 1, 2, 3]), grad, lr=0.1, low=part, rounding="split")
    if backends.choice("CPU").backend == "cpu" and gram.compiled():  # not of composites
        scalars, none = vector("test", weight.device, {"lr": 0.1}), torch.empty(0)
        with pytest.raises(RuntimeError, match="low and grad share memory"):
            torch.ops.lomo_kernels.factored_update_(weight, grad, none, none, scalars, 0, False, 0, 0, [], part)
    assert not memory.any() and (weight == 1).all()
