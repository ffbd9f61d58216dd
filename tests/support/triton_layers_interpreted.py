"""Tests of the layers' Triton kernels under the interpreter; test_triton_layers.py runs this file in such a process.

An update is checked in two steps: the float32 gradient that the kernel forms, which a float32 weight of zeros and a
learning rate of one show, against float64; and every update against `reference.updated` of that gradient, in all bits.
"""

import itertools
import math

import pytest
import torch

from lomo_kernels import backends, ops, reference
from lomo_kernels.composite import tiled
from lomo_kernels.ops.scalars import vector
from lomo_kernels.rules import RULES
from lomo_kernels.triton import embedding, launch, linear
from support import oracle
from support.oracle import ARGUMENTS, DTYPES, ROUNDINGS, assert_same_bits, name_of, reference_arguments

assert backends.choice("CPU").backend == "triton" and launch.INTERPRETED
assert not backends.choice("CPU").overrides.keys() & tiled.IMPLEMENTATIONS.keys()  # Triton serves all of layers
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _counters_return_to_zero():
    yield
    for counter in launch.counters._kept.values():
        assert (counter == 0).all()


def slot_of(value=0.0):
    return torch.full((1,), value, dtype=torch.float64)


def matrix(rows, columns, dtype, seed=0, scale=1.0):
    return oracle.ordinary(rows * columns, dtype, seed, scale).view(rows, columns)


def assert_close_gradient(made, factors):
    """Within a few roundings of the float32 sum of the products' sizes."""
    x, gy = factors
    sizes = gy.double().abs().T @ x.double().abs()
    error = (made.double() - gy.double().T @ x.double()).abs()
    assert (error <= 4 * 2.0**-24 * sizes + 1e-300).all(), (error / sizes).max()


# ---- Linear ----------------------------------------------------------------------------------------------------------

#: tokens, out_features, in_features: around tiles of 128 or 64 by 128, 64 or 32 and steps of 16 or 32.
SHAPES = [(1, 1, 1), (0, 5, 4), (31, 127, 129), (32, 128, 128), (33, 65, 33), (70, 64, 257)]


def linear_gradient(x, gy):
    """What the kernel takes for the gradient."""
    weight = torch.zeros(gy.shape[-1], x.shape[-1])
    ops.linear_sgd_(weight, x, gy, lr=1.0)
    return -weight


def factors_of(shape, dtype):
    tokens, rows, columns = shape
    return matrix(tokens, columns, dtype), matrix(tokens, rows, dtype, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linear_sgd_of_every_shape(dtype, shape):
    factors = factors_of(shape, dtype)
    gradient = linear_gradient(*factors)
    assert_close_gradient(gradient, factors)
    keys = {"seed": -3, "parameter_id": 2**40, "step": 7}
    for weight_dtype in DTYPES:
        before = matrix(*shape[1:], weight_dtype, 2)
        for rounding in ROUNDINGS:
            weight, slot = before.clone(), slot_of(1.0)
            arguments = {"lr": 0.03, "weight_decay": 0.1, "rounding": rounding, **keys}
            ops.linear_sgd_(weight, *factors, **arguments, sq_norm=slot)
            assert_same_bits(weight, reference.updated(before, gradient, **reference_arguments(arguments)))
            assert abs(slot.item() - 1 - oracle.squares(gradient)) <= 1e-6 * oracle.squares(gradient) + 1e-15


@pytest.mark.parametrize("shape", [(2, 1100, 160), (2, 513, 90), (2, 20, 1000)], ids=str)
def test_every_tile_is_done_once(shape):
    """The order of programs: groups of 8 rows of tiles, of which the last may be lower."""
    x, gy = factors_of(shape, torch.float32)
    gradient = linear_gradient(x, gy)
    assert_close_gradient(gradient, (x, gy))
    slot = slot_of()
    ops.linear_sq_norm_(slot, x, gy)
    oracle.assert_close_sum(slot, exact(x, gy))


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("by_address", [False, True], ids=["numbers", "addresses"])
def test_linear_sgd_with_every_argument(arguments, by_address, rule, monkeypatch):
    """In one tile and one step of tokens: more of them are for the test of every shape."""
    monkeypatch.setattr(launch, "by_address", by_address)
    factors = factors_of((5, 120, 20), torch.bfloat16)
    gradient = linear_gradient(*factors)
    arguments = ARGUMENTS[arguments]
    for weight_dtype in DTYPES:
        for rounding in ROUNDINGS:
            before = matrix(120, 20, weight_dtype, 2)
            weight = before.clone()
            ops.linear_sgd_(weight, *factors, **arguments, rounding=rounding, step=5, rule=rule)
            stochastic = {"stochastic": rounding == "stochastic", "step": 5, "rule": rule}
            assert_same_bits(
                weight, reference.updated(before, gradient, **reference_arguments(arguments), **stochastic)
            )


def test_linear_sgd_leaves_everything_where_infinities_were_found():
    for columns in (16, 7):
        factors = factors_of((40, 130, columns), torch.bfloat16)
        weight = oracle.param_of(130 * columns, torch.bfloat16).view(130, columns)
        before, slot = weight.clone(), slot_of()
        ops.linear_sgd_(weight, *factors, lr=1.0, weight_decay=0.5, found_inf=torch.ones(1), sq_norm=slot)
        assert torch.equal(weight.view(torch.int16), before.view(torch.int16))
        oracle.assert_close_sum(slot, oracle.squares(linear_gradient(*factors)))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linear_sgd_keeps_weights_whose_gradient_is_not_finite(dtype, bad):
    x, gy = factors_of((20, 130, 140), dtype)
    gy[3, 129], x[5, 7] = bad, -bad
    gradient = linear_gradient(x, gy)
    finite = torch.ones(130, 140, dtype=torch.bool)
    finite[129, :] = finite[:, 7] = False
    before = matrix(130, 140, dtype, 2)
    weight, slot = before.clone(), slot_of()
    ops.linear_sgd_(weight, x, gy, lr=0.1, clip_value=0.5, weight_decay=0.1, sq_norm=slot)
    assert_same_bits(weight[~finite], before[~finite])
    expected = reference.updated(before, gradient, lr=0.1, clip_value=0.5, weight_decay=0.1)
    assert_same_bits(weight[finite], expected[finite])
    assert not slot.isfinite()


@pytest.mark.parametrize("parts", [1, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linear_sgd_in_any_number_of_parts(dtype, parts, monkeypatch):
    factors = factors_of((5, 20, 133), torch.bfloat16)
    expected, slot = matrix(20, 133, dtype, 2), slot_of()
    weight, other_slot = expected.clone(), slot_of()
    ops.linear_sgd_(expected, *factors, lr=0.03, rounding="stochastic", seed=1, sq_norm=slot)
    monkeypatch.setattr(linear, "PARTS", parts)
    ops.linear_sgd_(weight, *factors, lr=0.03, rounding="stochastic", seed=1, sq_norm=other_slot)
    assert_same_bits(weight, expected)
    assert_same_bits(other_slot, slot)


@pytest.mark.parametrize("columns", [34, 35])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
def test_linear_sgd_draws_with_the_index_in_the_whole_weight(dtype, columns):
    """More than one tile in both directions; an odd number of columns divides the pairs of a hash otherwise."""
    factors = factors_of((5, 300, 128 + columns), dtype)
    gradient = linear_gradient(*factors)
    before = matrix(300, 128 + columns, dtype, 2)
    weight = before.clone()
    ops.linear_sgd_(weight, *factors, lr=0.03, rounding="stochastic", seed=1)
    assert_same_bits(weight, reference.updated(before, gradient, lr=0.03, stochastic=True, seed=1))
    nearest = reference.updated(before, gradient, lr=0.03)
    assert not torch.equal(weight, nearest)


def views(tensor):
    """The same matrix in other layouts."""
    tokens, features = tensor.shape
    wide = tensor.new_full((tokens, features + 16), math.nan)
    wide[:, 3 : 3 + features] = tensor
    yield "column slice", wide[:, 3 : 3 + features]
    yield "transposed", tensor.T.contiguous().T
    yield "strided", tensor.repeat_interleave(2, 1)[:, ::2]
    yield "misaligned", oracle.misaligned(tensor, 1)[0]
    if tokens % 2 == 0:
        yield "three dimensions", tensor.view(2, tokens // 2, features)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linear_sgd_and_sq_norm_of_layouts(dtype):
    x, gy = factors_of((18, 40, 72), dtype)
    gradient = linear_gradient(x, gy)
    shown = dict(views(x))
    for name, other in views(gy):
        assert_same_bits(linear_gradient(shown[name], other), gradient, name)
        weight, slot = torch.zeros(40, 72), slot_of()
        ops.linear_sgd_(weight, shown[name], other, lr=1.0, sq_norm=slot)
        oracle.assert_close_sum(slot, oracle.squares(gradient))
        for margin in (0, math.inf):
            made, by_inner_products = norm_of(shown[name], other, margin)
            assert made == pytest.approx(exact(x, gy), rel=1e-6) and by_inner_products == (margin == 0), name
    expanded = gy[:1].expand(18, 40)
    assert_same_bits(linear_gradient(x, expanded), linear_gradient(x, expanded.contiguous()))
    ones = gy.new_ones(()).expand(18, 40)
    assert_same_bits(linear_gradient(x, ones), linear_gradient(x, ones.contiguous()))
    for weight in (torch.zeros(72, 40).T, torch.zeros(40, 144)[:, ::2], torch.zeros(40, 80)[:, 5:77]):
        ops.linear_sgd_(weight, x, gy, lr=1.0)
        assert_same_bits(weight.contiguous(), -gradient)


def test_linear_sgd_refuses_a_weight_that_is_read_or_written_twice():
    x, gy = factors_of((4, 5, 6), torch.float32)
    with pytest.raises(RuntimeError, match="share one place"):
        ops.linear_sgd_(torch.zeros(6).expand(5, 6), x, gy, lr=1.0)
    memory = torch.ones(100)
    with pytest.raises(RuntimeError, match="share memory"):
        ops.linear_sgd_(memory[:30].view(5, 6), memory[20:44].view(4, 6), gy, lr=1.0)
    assert (memory == 1).all()
    with pytest.raises((TypeError, ValueError, RuntimeError), match="expected"):
        scalars = vector("", memory.device, {"lr": 1.0})
        torch.ops.lomo_kernels.linear_update_(memory[:25].view(5, 5), [x], [gy], scalars, None, 0, False, 0, 0, [])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linear_sgd_of_several_pairs_adds_them_first(dtype):
    pairs = [factors_of((tokens, 130, 70), dtype) for tokens in (9, 30)]
    xs, gys = zip(*pairs, strict=True)
    weight, slot, alone = torch.zeros(130, 70), slot_of(), slot_of()
    ops.linear_sgd_(weight, list(xs), list(gys), lr=1.0, sq_norm=slot)
    assert_close_gradient(-weight, (torch.cat(xs), torch.cat(gys)))
    oracle.assert_close_sum(slot, oracle.squares(weight))
    ops.linear_sq_norm_(alone, list(xs), list(gys))
    oracle.assert_close_sum(alone, oracle.squares(weight))


# ---- Norms of linear layers ------------------------------------------------------------------------------------------


def exact(x, gy, inv_scale=1.0):
    return (gy.double().T @ x.double() * inv_scale).square().sum().item()


def norm_of(x, gy, margin, **arguments):
    """What is added, and whether inner products gave it, which a margin of zero asks for; one of infinity for tiles."""
    slot = slot_of(1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear.gram, "GRAM_MARGIN", margin)
        linear._done._kept.clear()
        ops.linear_sq_norm_(slot, x, gy, **arguments)
    done = [bool(tensor[0]) for tensor in linear._done._kept.values()]
    return slot.item() - 1, done == [True]


@pytest.mark.parametrize("shape", [*SHAPES, (129, 40, 30), (200, 33, 31)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linear_sq_norm_of_every_shape(dtype, shape):
    x, gy = factors_of(shape, dtype)
    for margin in (0, math.inf):
        made, by_inner_products = norm_of(x, gy, margin)
        assert math.sqrt(made) == pytest.approx(math.sqrt(exact(x, gy)), rel=1e-6)
        assert by_inner_products == (margin == 0 and shape[0] > 0)


@pytest.mark.parametrize("margin", [0, math.inf], ids=["inner products", "tiles"])
@pytest.mark.parametrize("inv_scale", [0.3, torch.tensor([0.3]), torch.tensor(0.3).double()], ids=str)
def test_linear_sq_norm_is_of_the_unscaled_gradient(margin, inv_scale):
    x, gy = factors_of((40, 30, 20), torch.bfloat16)
    made, _ = norm_of(x, gy, margin, inv_scale=inv_scale)
    assert made == pytest.approx(exact(x, gy, 0.3), rel=1e-6)


@pytest.mark.parametrize("spread", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linear_sq_norm_of_tokens_that_are_alike(dtype, spread):
    """Inner products of 1 + 0.01 * noise with a gradient that sums to zero cancel: then tiles are taken."""
    x = (1 + spread * matrix(150, 96, torch.float32)).to(dtype)
    gy = matrix(150, 80, torch.float32, 1)
    gy = (gy - gy.mean(0)).to(dtype)
    made, by_inner_products = norm_of(x, gy, 0)
    assert math.sqrt(made) == pytest.approx(math.sqrt(exact(x, gy)), rel=1e-5)
    if spread != 0.1:
        assert by_inner_products == (spread == 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linear_sq_norm_of_extreme_factors(dtype):
    """Inner products overflow or vanish where the gradient's squares do not."""
    info = torch.finfo(dtype)
    x, gy = factors_of((20, 40, 30), dtype)
    for a, b in ((1e15, 1e-15), (1e-15, 1e15), (1e17, 1e-2), (1e-12, 1e-12), (1e25, 1e-25), (1e-3, 0.0), (1e-20, 1.0)):
        large, small = x * min(a, info.max / 8), gy * min(b, info.max / 8)
        made, _ = norm_of(large, small, 0)
        assert math.sqrt(made) == pytest.approx(math.sqrt(exact(large, small)), rel=1e-5), (a, b)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("margin", [0, math.inf], ids=["inner products", "tiles"])
def test_linear_sq_norm_of_what_is_not_finite(margin, bad):
    for place in (0, 1):
        factors = factors_of((20, 40, 30), torch.bfloat16)
        factors[place][19, 3] = bad
        slot = slot_of()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear.gram, "GRAM_MARGIN", margin)
            ops.linear_sq_norm_(slot, *factors)
        assert not slot.isfinite()


def test_linear_sq_norm_shows_an_unscaled_gradient_that_overflows():
    x, gy = factors_of((20, 40, 30), torch.float32)
    for margin in (0, math.inf):
        assert math.isinf(norm_of(x, gy, margin, inv_scale=1e38 * 3)[0])


def test_norms_that_triton_cannot_compile_go_by_tiles(monkeypatch):
    assert not linear.sums_products(100, "3.6.0") and not linear.sums_products(103, "3.8.1")
    assert linear.sums_products(100, "3.9.0") and linear.sums_products(90, "3.6.0") and linear.sums_products(0, "3.6.0")
    x, gy = factors_of((20, 40, 30), torch.float32)
    done = []
    monkeypatch.setattr(linear, "sums_products", lambda *_: False)
    for name in ("update_by_tiles", "sq_norm_by_tiles"):
        monkeypatch.setattr(linear.tiled, name, lambda *_, name=name: done.append(name))
    ops.linear_sq_norm_(slot_of(), x, gy)
    ops.linear_sgd_(torch.zeros(40, 30), x, gy, lr=0.1, sq_norm=slot_of())
    ops.linear_sgd_(torch.zeros(40, 30), x, gy, lr=0.1)
    assert done == ["sq_norm_by_tiles", "update_by_tiles"]


@pytest.mark.parametrize("gpu", [0, 75, 80, 90, 100, 103, 120])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_products_are_launched_with_a_limit_of_registers(dtype, gpu, monkeypatch):
    """Of Hopper and Blackwell, where two programs then share a multiprocessor."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **constants: launched.append(constants)

    for name in ("linear_sgd_kernel", "linear_sq_norm_kernel"):
        monkeypatch.setattr(linear, name, Kernel())
    monkeypatch.setattr(linear, "generation", lambda device: gpu)
    monkeypatch.setattr(linear, "sums_products", lambda *_: True)
    monkeypatch.setattr(linear.gram, "GRAM_MARGIN", math.inf)
    for columns in (64, 65):
        launched.clear()
        x, gy = factors_of((64, 64, columns), dtype)
        ops.linear_sgd_(torch.zeros(64, columns), x, gy, lr=0.1)
        ops.linear_sq_norm_(slot_of(), x, gy)
        limited = gpu in (90, 100, 103) and dtype != torch.float32 and columns == 64
        assert [constants.get("maxnreg") for constants in launched] == [128 if limited else None] * 2


def test_many_tokens_are_multiplied_by_torch(monkeypatch):
    """From CROSSOVER on, where torch has products of 16-bit factors with a float32 result; the results agree."""
    monkeypatch.setattr(linear.tiled, "CROSSOVER", 40)
    monkeypatch.setattr(linear.gram, "GRAM_MARGIN", math.inf)
    served = {torch.bfloat16: True, torch.float32: False}
    tiles = []
    for dtype, tokens in itertools.product(served, (39, 40)):
        x, gy = factors_of((tokens, 130, 70), dtype)
        with monkeypatch.context() as patch:
            patch.setattr(linear.tiled, "has_mixed_products", lambda x: served[x.dtype])
            patch.setattr(linear.tiled, "add_product", lambda tile, gy, x, fresh: tiles.append((x.dtype, len(x))))
            ops.linear_sgd_(torch.zeros(130, 70), x, gy, lr=1.0)
            ops.linear_sq_norm_(slot_of(), x, gy)
    assert tiles == [(torch.bfloat16, 40)] * 2


def test_inner_products_are_tried_where_they_are_cheaper():
    for tokens, expected in ((8, True), (31, True), (32, False), (200, False)):
        x, gy = factors_of((tokens, 128, 128), torch.bfloat16)
        assert norm_of(x, gy, linear.gram.GRAM_MARGIN)[1] == expected


def test_the_estimate_of_the_error_covers_the_error():
    """The further tokens are alike, the worse: as long as the sum is taken, it is within 2e-5."""
    tried = 0
    for spread in torch.logspace(-2, 0, 9).tolist():
        x = 1 + spread * matrix(64, 64, torch.float32)
        gy = matrix(64, 64, torch.float32, 1)
        gy = gy - (1 - spread) * gy.mean(0)
        made, by_inner_products = norm_of(x, gy, 0)
        tried += by_inner_products
        assert made == pytest.approx(exact(x, gy), rel=2e-5 if by_inner_products else 1e-6)
    assert 2 <= tried <= 7


# ---- Embedding -------------------------------------------------------------------------------------------------------

#: tokens, rows, columns, padding_idx.
TABLES = [
    (0, 4, 3, None),
    (1, 1, 1, None),
    (13, 7, 5, 2),
    (20, 6, 512, None),
    (5, 4, 1025, 0),
    (30, 2, 16, 1),
    (9, 30, 34, 3),
]


def table_of(shape, dtype):
    tokens, rows, columns, padding = shape
    indices = torch.randint(0, rows, (tokens,), generator=oracle.generator(0))
    return indices, matrix(tokens, columns, dtype), padding


def embedding_gradient(rows, indices, gy, padding_idx=None):
    weight = torch.zeros(rows, gy.shape[-1])
    ops.embedding_sgd_(weight, indices, gy, padding_idx=padding_idx, lr=1.0)
    return -weight


@pytest.mark.parametrize("shape", TABLES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_embedding_sgd_of_every_shape(dtype, shape):
    rows = shape[1]
    indices, gy, padding = table_of(shape, dtype)
    gradient = embedding_gradient(rows, indices, gy, padding)
    one_hot = torch.nn.functional.one_hot(indices, rows).double()
    if padding is not None:
        one_hot[:, padding] = 0
    assert_close_gradient(gradient, (gy, one_hot))
    expected_norm = oracle.squares(gradient * 0.5)
    keys = {"seed": 5, "parameter_id": 6, "step": 7}
    decays = itertools.cycle((torch.tensor([0.1]), 0.0, 0.1, torch.zeros(1)))
    for weight_dtype, rounding in itertools.product(DTYPES, ROUNDINGS):
        before, weight_decay = matrix(rows, shape[2], weight_dtype, 2), next(decays)
        weight, slot = before.clone(), slot_of(1.0)
        arguments = {"lr": 0.3, "inv_scale": 0.5, "clip_value": 0.7, "clip_coef": 0.9, "rounding": rounding} | keys
        ops.embedding_sgd_(
            weight, indices, gy, padding_idx=padding, **arguments, weight_decay=weight_decay, sq_norm=slot
        )
        arguments["weight_decay"] = float(weight_decay)
        assert_same_bits(weight, reference.updated(before, gradient, **reference_arguments(arguments)))
        assert abs(slot.item() - 1 - expected_norm) <= 1e-6 * expected_norm + 1e-15
    alone = slot_of(1.0)
    ops.embedding_sq_norm_(alone, indices.int(), gy, padding_idx=padding, inv_scale=0.5)
    assert abs(alone.item() - 1 - expected_norm) <= 1e-6 * expected_norm + 1e-15


def test_embedding_sgd_leaves_other_rows_alone():
    """All bit patterns: also those that an update would change, as NaN."""
    weight = oracle.patterns(10 * 20, torch.bfloat16).view(10, 20)
    before = weight.clone()
    gy = matrix(3, 20, torch.bfloat16)
    ops.embedding_sgd_(weight, torch.tensor([3, 3, 8]), gy, lr=0.1, rounding="stochastic")
    others = [row for row in range(10) if row not in (3, 8)]
    assert torch.equal(weight[others].view(torch.int16), before[others].view(torch.int16))
    assert not torch.equal(weight[[3, 8]].view(torch.int16), before[[3, 8]].view(torch.int16))


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=name_of)
def test_embedding_sgd_leaves_out_indices_that_are_no_rows(index_dtype):
    far = 2**40 if index_dtype == torch.int64 else 2**31 - 1
    indices = torch.tensor([[4, -1, 2], [5, far, 2], [-(2**31), 0, 4]], dtype=index_dtype)
    gy = matrix(9, 6, torch.float32).view(3, 3, 6)
    inside = (indices >= 0) & (indices < 5)
    gradient = reference.embedding_gradient(5, [indices[inside]], [gy[inside]], [-1])
    made = embedding_gradient(5, indices, gy)
    assert torch.allclose(made, gradient, rtol=1e-6)
    guarded = torch.zeros(7, 6)
    ops.embedding_sgd_(guarded[1:6], indices, gy, lr=1.0, weight_decay=0.5)
    assert_same_bits(guarded[1:6], -made)
    assert (guarded[[0, 6]] == 0).all()
    slot = slot_of()
    ops.embedding_sq_norm_(slot, indices[:1], gy[:1])  # here the number of rows is not known
    oracle.assert_close_sum(
        slot, oracle.squares(reference.embedding_gradient(5, [indices[0, ::2]], [gy[0, ::2]], [-1]))
    )


def test_embedding_sgd_leaves_everything_where_infinities_were_found():
    indices, gy, _ = table_of((30, 9, 40, None), torch.bfloat16)
    weight = oracle.param_of(360, torch.bfloat16).view(9, 40)
    before, slot = weight.clone(), slot_of()
    ops.embedding_sgd_(weight, indices, gy, lr=1.0, weight_decay=0.5, found_inf=torch.ones(1), sq_norm=slot)
    assert torch.equal(weight.view(torch.int16), before.view(torch.int16))
    oracle.assert_close_sum(slot, oracle.squares(embedding_gradient(9, indices, gy)))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_embedding_sgd_keeps_weights_whose_gradient_is_not_finite(bad):
    indices, gy = torch.tensor([2, 1, 2]), matrix(3, 40, torch.float16)
    gy[2, 7] = bad
    weight, slot, alone = torch.ones(4, 40), slot_of(), slot_of()
    ops.embedding_sgd_(weight, indices, gy, lr=0.1, weight_decay=0.1, sq_norm=slot)
    assert weight[2, 7] == 1 and weight.isfinite().all() and (weight != 1).sum() == 159
    ops.embedding_sq_norm_(alone, indices, gy)
    assert not slot.isfinite() and not alone.isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_embedding_sgd_of_several_uses_and_layouts(dtype):
    uses = [table_of((tokens, 6, 24, None), dtype)[:2] for tokens in (5, 0, 20)]
    indices, gys = (list(parts) for parts in zip(*uses, strict=True))
    gradient = embedding_gradient(6, torch.cat(indices), torch.cat(gys))
    weight, slot = torch.zeros(24, 6).T, slot_of()
    ops.embedding_sgd_(weight, indices, [dict(views(gy))["strided"] if len(gy) else gy for gy in gys], lr=1.0)
    assert_same_bits(weight.contiguous(), -gradient)
    ops.embedding_sq_norm_(slot, indices, gys)
    oracle.assert_close_sum(slot, oracle.squares(gradient))
    mixed = [gys[0], gys[2].float()]
    made = torch.zeros(6, 24)
    ops.embedding_sgd_(made, [indices[0], indices[2]], mixed, lr=1.0)
    assert_same_bits(made, -gradient)


def test_embedding_sgd_adds_a_long_run_in_one_order():
    gy = matrix(203, 8, torch.float32)
    indices = torch.zeros(203, dtype=torch.int64)
    first = embedding_gradient(1, indices, gy)
    assert_close_gradient(first, (gy, torch.ones(203, 1)))
    assert_same_bits(embedding_gradient(3, indices + 2, gy)[2:], first)


def test_without_decay_there_is_no_second_kernel(monkeypatch):
    """Numbers in the host's memory say so; a GPU's are not read there."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **constants: launched.append(constants["DECAY"])

    monkeypatch.setattr(embedding, "embedding_sgd_kernel", Kernel())
    gy = matrix(3, 20, torch.bfloat16)
    for weight_decay, on_a_gpu, expected in (
        (0.0, False, [False]),
        (torch.zeros(1), False, [False]),
        (0.1, False, [False, True]),
        (0.0, True, [False, True]),
    ):
        monkeypatch.setattr(launch, "by_address", on_a_gpu)
        launched.clear()
        ops.embedding_sgd_(torch.zeros(4, 20), torch.tensor([0, 1, 1]), gy, lr=0.1, weight_decay=weight_decay)
        assert launched == expected
