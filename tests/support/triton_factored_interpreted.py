"""Tests of the Triton kernels with factors, under the interpreter; test_triton_factored.py runs this file in such a
process. The operators' contract is in test_factored.py, which runs there, too."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomo_kernels import backends, ops, reference
from lomo_kernels.composite import rule_factors
from lomo_kernels.ops.scalars import vector
from lomo_kernels.rules import RULES
from lomo_kernels.triton import factor_sums, factored, launch
from lomo_kernels.triton.matrices import Tile, tile_of
from support import oracle
from support.oracle import DTYPES, assert_same_bits, name_of

assert backends.choice("CPU").backend == "triton" and launch.INTERPRETED
#: Torch's operators serve these: each is few numbers.
SMALL = rule_factors.IMPLEMENTATIONS.keys() - {"adalomo_factors"}
assert {name for name in ops.OPERATORS if backends.choice("CPU").of(name).backend != "triton"} == SMALL
OPS = torch.ops.lomo_kernels
CPU = torch.device("cpu")
NONE = torch.empty(0)
CLIPPING = {"inv_scale": 0.5, "clip_value": 0.9, "clip_coef": 0.7}


@pytest.fixture(autouse=True)
def _counters_return_to_zero():
    yield
    for counter in launch.counters._kept.values():
        assert (counter == 0).all()


def matrix(rows, columns, dtype, seed=0):
    return oracle.ordinary(rows * columns, dtype, seed).view(rows, columns)


def factors(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 0.01


def scalars(**numbers):
    return vector("test", CPU, {"lr": 0.1, "weight_decay": 0.1, "step": 3} | numbers)


def test_tiles_are_few_and_fit():
    assert tile_of(1, 4096, 4096) == tile_of(3, 300, 257) == Tile(1, 16, 256)
    assert tile_of(4096, 3, 3) == Tile(256, 4, 4)
    assert tile_of(7, 32, 32) == Tile(4, 32, 32) and tile_of(7, 33, 32) == Tile(1, 128, 32)
    assert tile_of(1, 3, 3) == Tile(1, 1024, 4)  # few tiles are compiled: those of one matrix depend on its columns
    assert tile_of(1, 5, 2**27) == Tile(1, 1, 4096)  # distances in a tile of 16 rows would need 32 bits
    for matrices, rows, columns in itertools.product((1, 2, 5), (1, 7, 300), (1, 3, 64, 257, 2**27, 2**40)):
        tile = tile_of(matrices, rows, columns)
        assert tile.M * tile.R * tile.C == 4096
        assert ((tile.M - 1) * rows + tile.R) * columns < 2**31 or tile.M == tile.R == 1
        assert tile.M == 1 or (rows <= tile.R and columns <= tile.C)
        covered = tile.programs(matrices, rows, columns) * 4096
        assert covered >= matrices * rows * columns


@settings(max_examples=40, deadline=None)
@given(
    matrices=st.integers(1, 5),
    rows=st.integers(1, 40),
    columns=st.sampled_from([1, 2, 3, 16, 31, 32, 255, 256, 257, 512]),
    dtype=st.sampled_from(DTYPES),
    has_rows=st.booleans(),
    has_columns=st.booleans(),
    rule=st.sampled_from(sorted(RULES.values())),
    stochastic=st.booleans(),
    shard=st.sampled_from(["whole", "offset", "odd", "rows", "odd rows", "key", "pieces"]),
)
def test_any_matrices(matrices, rows, columns, dtype, has_rows, has_columns, rule, stochastic, shard):
    rows *= matrices
    n = rows * columns
    where = {
        "whole": [],
        "offset": [6, n, n],
        "odd": [7, n, n],
        "rows": [4, columns, columns + 6],
        "odd rows": [1, columns, columns + 3],
        "key": [2**33 - 1000 // 2 * 2, n, n],  # indices whose hashes have two keys
        "pieces": [2**33 - 40, 5, 2**32],
    }[shard]
    grad, param = matrix(rows, columns, dtype), matrix(rows, columns, dtype, 1)
    of_rows = factors(rows) if has_rows else NONE
    of_columns = factors(matrices, columns, seed=1) if has_columns else NONE
    arguments = (of_rows, of_columns, scalars(**CLIPPING), rule, stochastic, 11, 4, where)
    expected = param.clone()
    reference.IMPLEMENTATIONS["factored_update_"](expected, grad, *arguments)
    OPS.factored_update_(param, grad, *arguments)
    assert_same_bits(param, expected)
    f = reference.factored_gradient(grad, of_rows, of_columns, **CLIPPING).double().square()
    slot = torch.ones(1, dtype=torch.float64)
    OPS.factored_sq_norm_(slot, grad, of_rows, of_columns, scalars(**CLIPPING))
    assert slot.item() == pytest.approx(1 + f.sum().item(), rel=1e-6)
    g = reference.factored_gradient(grad, NONE, NONE, **CLIPPING).double().square()
    sums = torch.ones(rows, dtype=torch.float64), torch.ones(matrices, columns, dtype=torch.float64)
    OPS.factor_sums_(*sums, grad, scalars(**CLIPPING))
    torch.testing.assert_close(sums[0], 1 + g.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(sums[1], 1 + g.view(matrices, -1, columns).sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("columns", [300, 257])
def test_random_bits_of_every_tile_and_shard(columns, dtype):
    """Tiles after the first, and tiles whose hashes have several keys: in one row, and in short rows far apart."""
    n = 40 * columns
    for shard in ([], [2**33 - 5000, n, n], [2**32 - 5000, n, n], [2**33 - 40, 5, 2**32], [7, columns, columns + 3]):
        grad, param = matrix(40, columns, dtype), matrix(40, columns, dtype, 1)
        arguments = (factors(40), factors(1, columns), scalars(), 0, True, 11, 4, shard)
        expected = param.clone()
        reference.IMPLEMENTATIONS["factored_update_"](expected, grad, *arguments)
        OPS.factored_update_(param, grad, *arguments)
        assert_same_bits(param, expected, shard)


def test_a_product_that_overflows_keeps_its_element():
    param, grad = torch.ones(2, 16), torch.ones(2, 16)
    grad[0, 0] = 1e30
    OPS.factored_update_(param, grad, torch.tensor([1e30, 1.0]), NONE, scalars(), 0, False, 0, 0, [])
    assert param[0, 0] == 1 and (param[0, 1:] < -1e28).all()


@pytest.mark.parametrize("programs", [1, 3, 1024])
def test_strips_of_several_tiles(programs, monkeypatch):
    """As of large gradients: some tiles down for each program, the last ones fewer."""
    monkeypatch.setattr(factor_sums.PROGRAMS, "value", programs)
    for matrices, rows, columns in ((1, 100, 300), (2, 70, 257), (1, 33, 16)):
        grad = matrix(matrices * rows, columns, torch.bfloat16)
        sums = torch.zeros(matrices * rows).double(), torch.zeros(matrices, columns).double()
        OPS.factor_sums_(*sums, grad, scalars())
        squares = grad.double().square().view(matrices, rows, columns)
        torch.testing.assert_close(sums[0].view(matrices, rows), squares.sum(2), rtol=1e-12, atol=0)
        torch.testing.assert_close(sums[1], squares.sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(5, 3, 3), (300, 3, 3), (1, 17, 257), (2, 33, 300)], ids=str)
def test_sums_touch_nothing_beyond_them(shape):
    """What lies before and after them is -0, of which an addition of 0 would make 0."""
    matrices, rows, columns = shape
    memory = [torch.full((count + 9000,), -0.0).double() for count in (matrices * rows, matrices * columns)]
    sums = [of_all[4500:-4500].fill_(1) for of_all in memory]
    OPS.factor_sums_(
        sums[0], sums[1].view(matrices, columns), matrix(matrices * rows, columns, torch.float32), scalars()
    )
    for of_all in memory:
        assert of_all[:4500].signbit().all() and of_all[-4500:].signbit().all()


def test_sums_load_vectors_only_where_addresses_allow_them(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(factor_sums, "sums_of_strips_kernel", recorder)
    memory = torch.zeros(3 * 40 + 9)
    for offset, columns, aligned in ((0, 32, True), (4, 32, True), (1, 32, False), (0, 24, False)):
        grad = memory[offset:][: 3 * columns].view(3, columns)
        OPS.factor_sums_(torch.zeros(3).double(), torch.zeros(1, columns).double(), grad, scalars())
        assert recorder.launched[-1]["ALIGNED"] == aligned, (offset, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_scalars_that_the_device_reads(dtype, monkeypatch):
    monkeypatch.setattr(launch, "by_address", True)
    for found_inf, shape in itertools.product((0.0, 1.0), ((1, 20, 48), (9, 3, 3))):
        matrices, rows, columns = shape
        grad, param = matrix(matrices * rows, columns, dtype), matrix(matrices * rows, columns, dtype, 1)
        given_scalars = scalars(**CLIPPING, found_inf=found_inf)
        arguments = (factors(matrices * rows), factors(matrices, columns), given_scalars, 0, True, 1, 2, [])
        expected = param.clone()
        reference.IMPLEMENTATIONS["factored_update_"](expected, grad, *arguments)
        assert torch.equal(expected, param) == bool(found_inf)
        OPS.factored_update_(param, grad, *arguments)
        assert_same_bits(param, expected)
        sums = torch.zeros(matrices * rows).double(), torch.zeros(matrices, columns).double()
        OPS.factor_sums_(*sums, grad, given_scalars)
        g = reference.factored_gradient(grad, NONE, NONE, **CLIPPING).double().square()
        torch.testing.assert_close(sums[0], g.sum(1), rtol=1e-12, atol=0)


def test_what_is_not_finite_stays_and_shows():
    grad = matrix(20, 300, torch.bfloat16)
    grad[3, 5], grad[19, 299] = float("nan"), float("-inf")
    sums = torch.zeros(20).double(), torch.zeros(1, 300).double()
    OPS.factor_sums_(*sums, grad, scalars(**CLIPPING))
    assert sums[0].isnan().nonzero().flatten().tolist() == [3, 19]
    assert sums[1][0].isnan().nonzero().flatten().tolist() == [5, 299]
    slot = torch.zeros(1).double()
    OPS.factored_sq_norm_(slot, grad, factors(20), NONE, scalars(**CLIPPING))
    assert not slot.isfinite()


class Recorder:
    """In place of a kernel: what is launched."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *_, **constants: self.launched.append(constants)


def test_vectors_are_promised_only_where_all_addresses_allow_them(monkeypatch):
    """A GPU stops at a 128-bit access to any other address; the interpreter does not notice."""
    recorder = Recorder()
    monkeypatch.setattr(factored, "factored_update_kernel", recorder)
    memory = torch.zeros(4, 3 * 17 * 16)

    def aligned(offset, columns, low=None):
        param, grad = (memory[i][offset[i] :][: 3 * columns].view(3, columns) for i in range(2))
        lows = [] if low is None else [torch.zeros(999, dtype=torch.int16)[low:][: 3 * columns].view(3, columns)]
        dtype = torch.float32 if low is None else torch.bfloat16
        given_param = param if low is None else torch.zeros(3, columns, dtype=dtype)
        OPS.factored_update_(given_param, grad, NONE, NONE, scalars(), 0, False, 0, 0, [], *lows)
        return recorder.launched[-1]["ALIGNED"]

    assert aligned((0, 0), 16) and aligned((4, 8), 32) and aligned((0, 0), 16, low=8)
    assert not aligned((1, 0), 16) and not aligned((0, 2), 16) and not aligned((0, 0), 24)
    assert not aligned((0, 0), 16, low=1)


def test_pairs_share_a_hash_only_where_they_lie_in_one_row(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(factored, "factored_update_kernel", recorder)
    for columns, shard, pairs, rows in (
        (16, [], True, False),
        (15, [], False, False),
        (16, [1, 64, 64], False, False),
        (16, [0, 16, 20], True, True),
        (16, [0, 16, 21], False, True),
        (1, [], False, False),
    ):
        param = torch.zeros(4, columns, dtype=torch.bfloat16)
        OPS.factored_update_(param, param.clone(), NONE, NONE, scalars(), 0, True, 0, 0, shard)
        assert (recorder.launched[-1]["PAIRS"], recorder.launched[-1]["ROWS"]) == (pairs, rows), (columns, shard)


# ---- AdaLomo's factors -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    matrices=st.integers(1, 4),
    rows=st.sampled_from([1, 2, 7, 1023, 1024, 1025, 2500]),
    columns=st.sampled_from([1, 3, 600, 1024, 2100]),
    vector_=st.booleans(),
    bad=st.sampled_from([None, "inf", "nan", "zeros", "huge"]),
    beta=st.sampled_from([0.0, 0.2, 0.5, 0.97]),
)
def test_adalomo_factors_are_those_of_torchs_operators(matrices, rows, columns, vector_, bad, beta):
    generator = torch.Generator().manual_seed(matrices * rows + columns)
    if vector_:
        matrices, rows = 1, 1
    row_sums = torch.rand(matrices * rows, generator=generator, dtype=torch.float64) * 1e-3
    column_sums = torch.rand(matrices, columns, generator=generator, dtype=torch.float64) * 1e-3
    if bad in ("inf", "nan"):
        row_sums[-1] = column_sums[-1, 0] = float(bad)
    elif bad == "zeros":
        row_sums.zero_(), column_sums.zero_()
    elif bad == "huge":
        row_sums *= 1e60
    row = torch.empty(0) if vector_ else torch.rand(matrices, rows, generator=generator) * 1e-3
    column = torch.rand(matrices, columns, generator=generator) * 1e-3
    before = [tensor.clone() for tensor in (row_sums, column_sums, row, column)]
    arguments = row_sums, column_sums, row, column, torch.tensor(beta), 1e-30
    ours, expected = OPS.adalomo_factors(*arguments), rule_factors.adalomo_factors(*arguments)
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=5e-7, atol=0, equal_nan=True)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(arguments, before, strict=False))
