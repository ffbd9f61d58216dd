"""Tests of the Triton kernels themselves, under the interpreter; test_triton.py runs this file in such a process."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl

from lomo_kernels import backends, ops, reference
from lomo_kernels.ops.scalars import vector
from lomo_kernels.rules import RULES
from lomo_kernels.triton import launch, numerics, sgd, sq_norm
from lomo_kernels.triton.numerics import BLOCK, add_to_slot, float_of, fold, is_ordinary, nearest, ordinary, stochastic
from support import oracle
from support.oracle import DTYPES, ROUNDINGS, assert_same_bits, name_of, reference_arguments

assert backends.choice("CPU").backend == "triton" and launch.INTERPRETED
WIDTH = 1024  # partial sums that are added at a time


def made(param, grad, **arguments):
    p = param.clone()
    ops.sgd_(p, grad, **arguments)
    assert_same_bits(p, reference.updated(param, grad, **reference_arguments(arguments)), arguments)
    return p


def slots_of(n, value=0.0):
    return torch.full((n,), value, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _counters_return_to_zero():
    yield
    for counter in launch.counters._kept.values():
        assert (counter == 0).all()


# ---- Blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK + 77])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sizes_around_blocks(dtype, size):
    param, grad = oracle.param_of(size, dtype), oracle.grad_of(size, dtype)
    for i, rounding in enumerate(ROUNDINGS):
        for offset in (0, 1, 8):
            whole = torch.cat([param.new_full((offset,), 7.0), param, param.new_full((9,), 7.0)])
            ops.sgd_(whole[offset : offset + size], grad, lr=0.03, rounding=rounding, step=i)
            expected = reference.updated(param, grad, lr=0.03, stochastic=rounding == "stochastic", step=i)
            assert_same_bits(whole[offset : offset + size], expected)
            assert (whole[:offset] == 7).all() and (whole[offset + size :] == 7).all()


#: Counters of bfloat16 are indices // 2. Key changes inside a block, at its begin, after its first and last element.
EDGES = [0, 1, 2, 1000, 1001, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK]


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(
    "rows", [None, (3, 4), (6, 8), (4 * BLOCK, 4 * BLOCK), (100, 2**33), (101, 2**31 + 1)], ids=str
)
@pytest.mark.parametrize(("dtype", "period"), [(torch.bfloat16, 2**33), (torch.float16, 2**32)], ids=str)
def test_keys_change_every_2_32_counters(dtype, period, rows, edge):
    n = 2 * BLOCK + 5
    param, grad = oracle.ordinary(n, dtype), oracle.ordinary(n, dtype, 1)
    shard = (5 * period - edge, *(rows or (n, n)))
    made(param, grad, lr=0.03, rounding="stochastic", shard=shard, seed=-5, parameter_id=2**50, step=2**60)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 4094, 4095, 4096, 4097, 5000, 2 * BLOCK + 4, 2**40])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
def test_rows_of_shards_against_blocks(dtype, length):
    param, grad = oracle.ordinary(2 * BLOCK + 5, dtype), oracle.ordinary(2 * BLOCK + 5, dtype, 1)
    for offset in (0, 3):
        for stride in (length, length + 1, length + 2):
            made(param, grad, lr=0.03, rounding="stochastic", shard=(offset, length, stride))


# ---- Rounding --------------------------------------------------------------------------------------------------------


@triton.jit
def round_kernel(x, random, result, dtype: tl.constexpr, STOCHASTIC: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, N)
    value = float_of(tl.load(x + place).to(tl.uint32, bitcast=True))
    if STOCHASTIC:
        bits = stochastic(value, tl.load(random + place).to(tl.uint32), dtype)
    else:
        bits = nearest(value, dtype)
    tl.store(result + place, bits.to(tl.int16, bitcast=True))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
def test_rounding_of_any_number_and_any_nan(dtype, rounding):
    """A GPU's own NaN is 0x7fffffff, which no arithmetic on the host makes: a carry would turn it into minus zero."""
    n = 2**15
    special = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7FFF8000, 0x7F800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF])
    near = torch.randint(90 << 23, 146 << 23, (n // 2,), generator=oracle.generator(1))
    x = oracle.patterns(n, torch.float32).view(torch.int32)
    x[: n // 2] = near
    x[:16] = torch.cat([special, special - 2**31 * (special > 0)])
    random = torch.randint(0, 2 ** (16 if dtype == torch.bfloat16 else 32), (n,), generator=oracle.generator(2))
    for draws in (
        random,
        torch.zeros_like(random),
        torch.full_like(random, 2 ** (16 if dtype == torch.bfloat16 else 32) - 1),
    ):
        result = torch.empty(n, dtype=torch.int16)
        round_kernel[(1,)](x, draws, result, dtype=launch.TYPES[dtype], STOCHASTIC=rounding == "stochastic", N=n)
        of = reference.round_bfloat16 if dtype == torch.bfloat16 else reference.round_float16
        expected = of(x.view(torch.float32), draws if rounding == "stochastic" else None)
        assert_same_bits(result.view(dtype), expected)


@triton.jit
def split_kernel(x, high, low, N: tl.constexpr):
    place = tl.arange(0, N)
    value = float_of(tl.load(x + place).to(tl.uint32, bitcast=True))
    tl.store(high + place, numerics.high_part(value).to(tl.int16, bitcast=True))
    tl.store(low + place, numerics.low_part(value).to(tl.int16, bitcast=True))


def test_splitting_of_any_number_and_any_nan():
    """Ties, both ends of the low part's range, and NaN of whose bits a carry would make minus zero."""
    n = 2**15
    special = torch.tensor([0x7FFFFFFF, 0x7FFF8000, 0x7FC00000, 0x7F800000, 0x7F7FFFFF, 0x7F7F8000, 0x3F808000, 0x8000])
    x = oracle.patterns(n, torch.float32).view(torch.int32)
    x[:16] = torch.cat([special, special - 2**31])
    high, low = torch.empty(n, dtype=torch.int16), torch.empty(n, dtype=torch.int16)
    split_kernel[(1,)](x, high, low, N=n)
    expected, expected_low = reference.split(x.view(torch.float32))
    assert_same_bits(high.view(torch.bfloat16), expected)
    assert_same_bits(low, expected_low)


@triton.jit
def ordinary_kernel(x, random, result, N: tl.constexpr):
    place = tl.arange(0, N)
    value = float_of(tl.load(x + place).to(tl.uint32, bitcast=True))
    bits = ordinary(value, tl.load(random + place).to(tl.uint32), tl.float16)
    tl.store(result + place, tl.where(is_ordinary(value, tl.float16), bits.to(tl.int16, bitcast=True), -1))


def test_ordinary_float16_numbers():
    """Both ends of every binade from 2**-24 on, of both signs; -1, a NaN, if one number is outside."""
    n, first, end = 2**15, 103 << 23, 0x477FE000
    binades = torch.arange(103, 144)[:, None] << 23
    ends = torch.cat([binades + torch.arange(64), binades - 1 - torch.arange(64)]).flatten().clamp(first, end - 1)
    x = torch.randint(first, end, (n,), generator=oracle.generator(1))
    x[: ends.numel()] = ends
    x[::2] -= 2**31
    random = torch.randint(0, 2**32, (n,), generator=oracle.generator(2))
    result = torch.empty(n, dtype=torch.int16)
    for draws in (random, random * 0, random * 0 + 2**32 - 1, random | 0xFFFF0000, random & 0x1FFFF):
        ordinary_kernel[(1,)](x.int(), draws, result, N=n)
        assert_same_bits(result.view(torch.float16), reference.round_float16(x.int().view(torch.float32), draws))
    for size in (0, first - 1, end, 0x7F800000, 0x7F800001, 0x7FFFFFFF):
        for sign in (0, 2**31):
            x[n // 3] = size - sign
            ordinary_kernel[(1,)](x.int(), random, result, N=n)
            assert (result == -1).all(), (size, sign)


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("hiding", [{"clip_value": 1.0}, {"rule": "sign"}], ids=["clamp", "sign"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
def test_nothing_hides_what_is_not_finite(dtype, hiding, bad, norm):
    """From a decision for a whole block, all of whose other numbers are ordinary."""
    param = torch.full((BLOCK,), 0.3, dtype=dtype)
    grad = torch.full((BLOCK,), 2.0, dtype=dtype)
    grad[BLOCK // 3] = bad
    arguments = {"lr": 0.03, "rounding": "stochastic", **hiding}
    updated = made(param, grad, **arguments, **({"sq_norm": slots_of(1)} if norm else {}))
    assert updated[BLOCK // 3] == param[0] and (updated != param[0]).sum() == BLOCK - 1


# ---- Elements far from the first -------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [2**31, 2**32, 2**33 - BLOCK, 2**40], ids=hex)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_elements_beyond_32_bits(dtype, far):
    """Two blocks of a parameter of which nothing else is there: addresses and indices are computed in 64 bits."""
    n = BLOCK + 9
    param, grad = oracle.ordinary(n, dtype), oracle.ordinary(n, dtype, 1)
    stochastic = dtype != torch.float32
    expected = reference.updated(param, grad, lr=0.03, stochastic=stochastic, seed=3, shard=(far, n, n))
    addresses = [t.data_ptr() - far * t.element_size() for t in (param, grad)]
    key = launch.parameter_key(3, 0)
    row = [*addresses, 0, far + n, -(far // BLOCK), key, 0, 2**62, 2**62]
    step = launch.step_scalars("", vector("", param.device, {"lr": 0.03}), param.device)
    sgd.sgd_kernel[(2,)](
        *(None, None, None, 0),
        *step.arguments,
        step.on_device,
        *(0, 0, 0, 0, 0),
        torch.tensor([*row, 0, 0]),
        launch.COLUMNS.value,
        0,
        None,
        None,
        P=launch.TYPES[dtype],
        G=launch.TYPES[dtype],
        RULE=0,
        ALIGNED=True,
        CLAMP=False,
        STOCHASTIC=stochastic,
        ROWS=False,
        PAIRS=True,
        NORM=False,
        SPLIT=False,
        BLOCK=BLOCK,
        COLUMNS=launch.COLUMNS.value,
    )
    assert_same_bits(param, expected)


# ---- Norms -----------------------------------------------------------------------------------------------------------


@triton.jit
def slot_kernel(slot, values, partials, counter, reverse: tl.constexpr):
    block, blocks = tl.program_id(0), tl.num_programs(0)
    if reverse:  # another block is the last to come
        block = blocks - 1 - block
    add_to_slot(tl.load(values + block), slot, partials, counter, block, blocks)


@pytest.mark.parametrize("blocks", [1, 2, WIDTH - 1, WIDTH, WIDTH + 1, 2 * WIDTH + 3])
def test_the_last_block_adds_all_sums_in_one_order(blocks):
    values = torch.rand(blocks, dtype=torch.float64, generator=oracle.generator(0))
    partials, counter = torch.full((blocks,), math.nan, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    results = []
    for reverse in (False, True):
        slot = slots_of(1, 0.5)
        slot_kernel[(blocks,)](slot, values, partials, counter, reverse=reverse)
        assert abs(slot.item() - 0.5 - math.fsum(values.tolist())) <= 1e-13 * blocks
        assert counter.item() == 0
        results.append(slot.item())
    assert results[0] == results[1]


@triton.jit
def halved(blocks):
    return tl.cdiv(blocks, 2)


def test_programs_that_add_up_several_blocks(monkeypatch):
    """As of a tensor with more than `PROGRAMS` blocks: two programs for up to six blocks."""
    for module in (numerics, sq_norm):
        monkeypatch.setattr(module, "blocks_per_program", halved)
    monkeypatch.setattr(sq_norm, "programs_of", lambda n: min(2, launch.blocks_of(n)))
    for n in (BLOCK, 2 * BLOCK, 3 * BLOCK, 5 * BLOCK + 7, 6 * BLOCK):
        grad, together, apart, listed = oracle.ordinary(n, torch.bfloat16), slots_of(1), slots_of(1), slots_of(2)
        ops.sq_norm_(apart, grad)
        oracle.assert_close_sum(apart, oracle.squares(grad))
        ops.sgd_(torch.zeros(n), grad, lr=0.1, sq_norm=together)
        ops.sq_norm_list_(listed, [grad[:9].clone(), grad])
        assert_same_bits(together, apart)
        assert_same_bits(listed[1:], apart)


def test_the_number_of_programs_of_a_norm():
    for blocks, programs in ((1, 1), (1024, 1024), (1025, 513), (2048, 1024), (11008, 1001), (2**16, 1024)):
        assert sq_norm.programs_of(blocks * BLOCK) == programs == sq_norm.programs_of(blocks * BLOCK - 1)


@triton.jit
def fold_kernel(x, result, N: tl.constexpr, LEVELS: tl.constexpr):
    tl.store(result + tl.arange(0, N >> LEVELS), fold(tl.load(x + tl.arange(0, N)), LEVELS))


def test_fold_adds_neighbours():
    x = torch.randn(64)
    expected = x
    for levels in (1, 2, 3):
        result = torch.empty(64 >> levels)
        fold_kernel[(1,)](x, result, N=64, LEVELS=levels)
        expected = expected.view(-1, 2).sum(1)
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_norms_of_blocks_that_need_scaling(dtype):
    """Blocks whose squares overflow or vanish in float32, between ordinary ones, with zeros, at both ends."""
    info = torch.finfo(dtype)
    for extreme in (info.max, info.smallest_normal * info.eps, info.smallest_normal, 0.0, math.sqrt(info.max)):
        grad = oracle.ordinary(3 * BLOCK + 5, dtype)
        grad[BLOCK : 2 * BLOCK] = extreme
        grad[BLOCK + 7 : BLOCK + 100] = 0
        for part in (grad, grad[BLOCK : 2 * BLOCK], grad[BLOCK : BLOCK + 200]):
            together, apart = slots_of(1), slots_of(1)
            ops.sq_norm_(apart, part)
            oracle.assert_close_sum(apart, oracle.squares(part))
            param = oracle.ordinary(part.numel(), dtype, 1)
            expected = reference.updated(param, part, lr=0.03)
            ops.sgd_(param, part, lr=0.03, sq_norm=together)
            assert_same_bits(together, apart)
            assert_same_bits(param, expected)


def test_the_worst_rounding_of_a_sum_is_within_the_promise():
    """Equal squares just above half a unit are all rounded the same way, level by level."""
    for value in (1.0 + 2.0**-12, 1.0 + 2.0**-13, 1.1, 1.4142135, 1.9999999, 0.1, 1 / 3):
        grad = torch.full((5 * BLOCK,), value)
        slot = slots_of(1)
        ops.sq_norm_(slot, grad)
        oracle.assert_close_sum(slot, oracle.squares(grad))


# ---- Lists -----------------------------------------------------------------------------------------------------------


def many(seed):
    """99 tensors: all dtypes, empty ones, several blocks, misaligned, strided, with shards of every kind."""
    draw = torch.Generator().manual_seed(seed)
    params, grads, shards = [], [], []
    for i in range(99):
        n = int(torch.randint(0, 40, (1,), generator=draw))
        n = {5: BLOCK, 6: BLOCK + 1, 7: 0, 50: 3 * BLOCK + 9, 90: 2 * BLOCK}.get(i, n)
        p, g = DTYPES[i % 3], DTYPES[i // 3 % 3]
        param, grad = oracle.param_of(n, p, i), oracle.grad_of(n, g, i)
        if i % 5 == 1:
            param = oracle.misaligned(param, 1)[0]
        if i % 7 == 1:
            grad = oracle.misaligned(grad, 3)[0]
        if i % 11 == 1:
            param = param.repeat_interleave(2)[::2]
        params.append(param)
        grads.append(grad)
        shards.append([(0, 50, 50), (2**33 - 3, 5, 7), (2, 4, 6), (2**32 - 6, 10**6, 10**6)][i % 4])
    return params, grads, shards


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("norms", [False, True])
def test_a_long_list_equals_the_reference(rounding, norms):
    params, grads, shards = many(0)
    ids = [i * 2**33 for i in range(99)]
    arguments = {"lr": 0.03, "weight_decay": 0.1, "clip_value": 0.5}
    keys = {"seed": 3, "step": 4, "stochastic": rounding == "stochastic"}
    expected = [
        reference.updated(p, g, **arguments, **keys, parameter_id=i, shard=s)
        for p, g, i, s in zip(params, grads, ids, shards, strict=True)
    ]
    slots = slots_of(99, 1.0) if norms else None
    apart = slots_of(99, 1.0)
    for i, grad in enumerate(grads):
        ops.sq_norm_(apart[i], grad)
    more = {"seed": 3, "step": torch.tensor([4]), "parameter_id": ids, "shard": shards, "sq_norm": slots}
    ops.sgd_list_(params, grads, **arguments, rounding=rounding, **more)
    for i, (param, wanted) in enumerate(zip(params, expected, strict=True)):
        assert_same_bits(param, wanted, i)
    finite = apart.isfinite()
    if norms:
        assert torch.equal(slots[finite], apart[finite]) and not slots[~finite].isfinite().any()
    listed = slots_of(99, 1.0)
    ops.sq_norm_list_(listed, grads)
    assert torch.equal(listed[finite], apart[finite]) and not listed[~finite].isfinite().any()


def test_a_slot_that_stands_several_times_takes_turns():
    """On a GPU two blocks that add to one slot at a time would lose one of the sums."""
    slots = slots_of(3)
    order = [0, 1, 0, 2, 0, 1]
    grads = [torch.full((BLOCK + 1,), float(i)) for i in range(6)]
    row = [launch.Row(0, 0, slots[i].data_ptr(), 1, 0, launch.WHOLE, (), True) for i in order]
    parts = launch.rounds(row)
    assert [len({r.slot for r in part}) for part in parts] == [len(part) for part in parts] == [3, 2, 1]
    ops.sq_norm_list_([slots[i : i + 1] for i in order], grads)
    exact = [sum(i * i for i, place in enumerate(order) if place == slot) * (BLOCK + 1.0) for slot in range(3)]
    assert slots.tolist() == exact
    params = [torch.zeros(3) for _ in range(6)]
    ops.sgd_list_(params, [g[:3] for g in grads], lr=1.0, sq_norm=[slots[i : i + 1] for i in order])
    assert slots.tolist() == [e * (BLOCK + 4) / (BLOCK + 1) for e in exact]


def test_one_launch_for_one_kind():
    """Tensors of one pair of dtypes are one launch, or two if some are not plain, whatever their sizes and shards."""
    kinds = (5, "a", True), (BLOCK + 1, "a", True), (1, "b", True), (2, "a", False)
    rows = [launch.Row(0, 0, 0, n, 0, launch.WHOLE, (name,), plain) for n, name, plain in kinds]
    _, begin, launches = launch.upload(rows, torch.device("cpu"), launch.blocks_of)
    assert begin == 4 * launch.COLUMNS.value
    assert launches == [
        launch.Launch(("a",), True, 0, 3),
        launch.Launch(("b",), True, 3, 1),
        launch.Launch(("a",), False, 4, 1),
    ]


class Recorder:
    """In place of a kernel: what is launched, and what is only loaded."""

    def __init__(self):
        self.launched, self.loaded = [], []

    def __getitem__(self, grid):
        return lambda *_, **constants: self.launched.append((grid, constants))

    def warmup(self, *_, grid, **constants):
        self.loaded.append(constants)


@pytest.mark.parametrize("gpu", [0, 75, 80, 90, 120])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_clamp_is_launched_with_a_limit_of_registers(dtype, gpu, monkeypatch):
    monkeypatch.setattr(launch, "generation", lambda device: gpu)
    for rounding, clip_value, norm in itertools.product(ROUNDINGS, (None, 1.0), (False, True)):
        recorder = Recorder()
        monkeypatch.setattr(sgd, "sgd_kernel", recorder)
        param, grad = torch.zeros(64, dtype=dtype), torch.zeros(64, dtype=dtype)
        arguments = {"lr": 0.1, "rounding": rounding, "clip_value": clip_value}
        ops.sgd_(param, grad, **arguments, sq_norm=slots_of(1) if norm else None)
        ops.sgd_list_([param], [grad], **arguments, sq_norm=slots_of(1) if norm else None)
        limited = rounding == "stochastic" and dtype == torch.float16 and clip_value and gpu >= 80
        expected = 120 if limited else None
        assert [constants.get("maxnreg") for _, constants in recorder.launched] == [expected] * 2
        of_rows = recorder.loaded[0]  # not limited, where they are of rounding: a thread has half as many elements
        assert of_rows["ROWS"] == (rounding == "stochastic" and dtype != torch.float32)
        assert "maxnreg" not in of_rows and of_rows["num_warps"] == launch.WARPS * (1 + of_rows["ROWS"])


def lists_of(dtype):
    """Params, grads and shards: plain, misaligned, at an odd index, of short rows, of rows that divide a pair."""
    plain, large = [torch.zeros(64, dtype=dtype), torch.zeros(64, dtype=dtype)], torch.zeros(2 * BLOCK, dtype=dtype)
    yield [plain[0]], [plain[1]], [(0, 64, 64)]
    yield [plain[0][1:]], [plain[1][1:]], [(0, 63, 63)]
    yield [plain[0], large[:BLOCK]], [plain[1][:64], large[BLOCK:].clone()], [(1, 64, 64), (0, 2**40, 2**40)]
    yield [plain[0]], [plain[1]], [(0, 8, 16)]
    yield [plain[0]], [plain[1]], [(0, 7, 9)]


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("clamp", [{}, {"clip_value": 1.0}], ids=["", "clamp"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_list_never_needs_a_kernel_that_the_first_did_not_load(dtype, rounding, clamp, norms, monkeypatch):
    """In the capture of a CUDA graph, which may have other tensors, nothing can be compiled or loaded."""
    for first in range(5):
        recorder, norm_recorder = Recorder(), Recorder()
        monkeypatch.setattr(sgd, "sgd_kernel", recorder)
        monkeypatch.setattr(sq_norm, "sq_norm_kernel", norm_recorder)
        lists = list(lists_of(dtype))
        ready, norm_ready = None, None
        for params, grads, shards in [lists[first], *lists]:
            slots = slots_of(len(params)) if norms else None
            ops.sgd_list_(params, grads, lr=0.1, rounding=rounding, sq_norm=slots, shard=shards, **clamp)
            ops.sq_norm_list_(slots_of(len(grads)), grads)
            if ready is None:
                ready, norm_ready = (
                    [*kernel.loaded, *(constants for _, constants in kernel.launched)]
                    for kernel in (recorder, norm_recorder)
                )
                monkeypatch.setattr(launch, "is_capturing", lambda device: True)
        monkeypatch.setattr(launch, "is_capturing", lambda device: False)
        assert len(recorder.loaded) == len(norm_recorder.loaded) == 1
        for kernel, known in ((recorder, ready), (norm_recorder, norm_ready)):
            assert len(kernel.launched) >= 6 and all(constants in known for _, constants in kernel.launched)


@pytest.mark.parametrize("module", [sgd, sq_norm], ids=["sgd", "sq_norm"])
def test_vectors_are_promised_only_where_all_addresses_allow_them(module, monkeypatch):
    """A GPU stops at a 128-bit access to any other address; the interpreter does not notice."""
    recorder = Recorder()
    monkeypatch.setattr(module, "sgd_kernel" if module is sgd else "sq_norm_kernel", recorder)
    memory = torch.zeros(8, 64)
    grads = [memory[0], memory[1, 1:], memory[2, 2:], memory[3, 4:]]
    if module is sgd:
        params = [memory[4], memory[5, :-1], memory[6, 4:-2], memory[7, 3:-1]]
        ops.sgd_list_(params, [g[: p.numel()] for g, p in zip(grads, params, strict=True)], lr=0.1)
        expected = [((1,), True), ((3,), False)]
    else:
        ops.sq_norm_list_(slots_of(4), grads)
        expected = [((2,), False), ((2,), True)]
    assert sorted((grid, constants["ALIGNED"]) for grid, constants in recorder.launched) == expected


def test_a_low_part_decides_too_whether_vectors_are_promised(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(sgd, "sgd_kernel", recorder)
    memory = torch.zeros(9, 64, dtype=torch.int16)
    params, grads = list(memory[:3].view(torch.bfloat16)), list(memory[3:6].view(torch.bfloat16))
    params, grads = [p[:48] for p in params], [g[:48] for g in grads]
    lows = [memory[6, :48], memory[7, 1:49], memory[8, 8:56]]  # the second begins at an odd multiple of 2 bytes
    ops.sgd_list_(params, grads, lr=0.1, low=lows, rounding="split")
    launched = sorted((grid, constants["ALIGNED"], constants["SPLIT"]) for grid, constants in recorder.launched)
    assert launched == [((1,), False, True), ((2,), True, True)]


def test_a_mixed_list_gives_each_row_its_own_low_part():
    """Split weights stand between float32 and empty ones. In the table a low part's address stands in a key's place."""
    params, parts, grads, expected = [], [], [], []
    for i, n in enumerate((5, 0, BLOCK + 3, 64, 7, 2 * BLOCK, 33, 100)):
        dtype = torch.float32 if i % 4 == 3 else torch.bfloat16
        param, grad = oracle.ordinary(n, dtype, i), oracle.ordinary(n, DTYPES[i % 3], 100 + i)
        low = torch.randint(-(2**15), 2**15, (n,), generator=oracle.generator(i), dtype=torch.int16)
        if dtype == torch.float32:
            expected.append((reference.updated(param, grad, lr=0.03, weight_decay=0.1), None))
        else:
            expected.append(reference.updated_split(param, low, grad, lr=0.03, weight_decay=0.1))
        params.append(param), grads.append(grad), parts.append(None if dtype == torch.float32 else low)
    ops.sgd_list_(params, grads, lr=0.03, weight_decay=0.1, low=parts, rounding="split")
    for i, (param, low, (expected_param, expected_low)) in enumerate(zip(params, parts, expected, strict=True)):
        assert_same_bits(param, expected_param, i)
        assert low is None or expected_low is not None
        if low is not None:
            assert_same_bits(low, expected_low, i)


def test_workspaces_made_in_inference_mode_serve_outside_of_it():
    for workspaces in (launch._tables, launch.partials, launch.counters):
        workspaces._kept.clear()
    for mode in (True, False):
        with torch.inference_mode(mode):
            params, slots = [torch.ones(2 * BLOCK)], slots_of(1)
            ops.sgd_list_(params, [torch.ones(2 * BLOCK)], lr=0.25, sq_norm=slots)
            assert (params[0] == 0.75).all() and slots.item() == 2 * BLOCK


# ---- Scalars ---------------------------------------------------------------------------------------------------------


def test_a_vector_is_read_by_the_host_or_by_its_address(monkeypatch):
    cpu = torch.device("cpu")
    given = vector("", cpu, {"lr": 0.1, "step": 2**40})
    bits = given.view(torch.int64).tolist()
    assert launch.step_scalars("", given, cpu) == (bits, 0, False, False)
    assert launch.step_scalars("", vector("", cpu, {"lr": 0.1, "clip_value": 1.0}), cpu).clamps
    assert launch.step_scalars("", vector("", cpu, {"lr": 0.1, "weight_decay": 1.0}), cpu).decays
    monkeypatch.setattr(launch, "by_address", True)
    addresses = [given.data_ptr() + 8 * i for i in range(7)]
    assert launch.step_scalars("", given, cpu) == (addresses, 1, True, True)
    number = torch.tensor(0.5)
    assert launch.inv_scale("", number, cpu) == (number.data_ptr(), 2)
    assert launch.inv_scale("", number.double(), cpu)[1] == 1


@pytest.fixture(params=[False, True], ids=["numbers", "addresses"])
def by_address(request, monkeypatch):
    monkeypatch.setattr(launch, "by_address", request.param)


@pytest.mark.usefixtures("by_address")
@pytest.mark.parametrize("alone", [False, True], ids=["table", "alone"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_rule_with_and_without_a_table(dtype, rule, alone, monkeypatch):
    if alone:
        monkeypatch.setattr(launch, "LIST_BYTES", 0)
    n = BLOCK + 77
    shards = ((0, n, n), (2**33 - 70, n, n), (5, 7, 9))
    names = ("lr", "clip_value", "all")
    if rule != "sgd":  # neither a key's end nor a clamp alone depends on the rule
        names, shards = ("lr", "all"), shards[::2]
    for rounding, norm, name in itertools.product(ROUNDINGS, (False, True), names):
        for i, shard in enumerate(shards):
            given = oracle.ARGUMENTS[name] | {"rounding": rounding, "shard": shard, "step": 2**40, "seed": i}
            param, grad = oracle.param_of(n + i, dtype)[i:], oracle.grad_of(n + i, torch.float16)[i:]
            if norm and i:  # else no sum is finite
                grad = grad.nan_to_num(0.5, 2.0, -3.0)
            expected = reference.updated(param, grad, **oracle.reference_arguments(given), rule=rule)
            slots = slots_of(2)
            ops.sgd_(param, grad, **given, rule=rule, sq_norm=slots[0] if norm else None)
            assert_same_bits(param, expected, given)
            if norm:
                ops.sq_norm_(slots[1], grad, inv_scale=given.get("inv_scale"))
                assert slots[1].isfinite() == (i > 0)
                assert torch.equal(slots[0].nan_to_num(1.0), slots[1].nan_to_num(1.0))
