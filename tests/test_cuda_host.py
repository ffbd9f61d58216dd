"""The CUDA kernels' own sources on the host: every thread of a block a fiber, blocks in any order (csrc/testing/).

The operators' whole contract runs on them, with the emulated backend in the place of the CPU's; below it stands what
only a GPU's kernels can get wrong. What this cannot show: nvcc's code (tests/test_cuda_build.py), the GPU's own
conversions of float16, and races between threads that run at the same time.
"""

import math
import shutil
from pathlib import Path

import lomo_kernels_testing
import pytest
import torch
from support import oracle
from support.oracle import DTYPES, ROUNDINGS, assert_close_sum, assert_same_bits, name_of, reference_arguments

import lomo_kernels
from lomo_kernels import reference
from lomo_kernels.ops.scalars import vector
from lomo_kernels.rules import RULES

host = lomo_kernels_testing.cuda
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TILE, BLOCKS, NORM_BLOCKS = host.TILE, host.TENSOR_BLOCKS, host.NORM_BLOCKS
WHOLE = (0, 2**63 - 1, 2**63 - 1)

every_param = pytest.mark.parametrize("param_dtype", DTYPES, ids=name_of)
every_grad = pytest.mark.parametrize("grad_dtype", DTYPES, ids=name_of)
every_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)


@pytest.fixture(autouse=True)
def ascending():
    host.set_block_order(0)
    yield
    host.set_block_order(0)


def number(value):
    """A scalar argument as the kernels take it: a number, or the address of a tensor's element."""
    if isinstance(value, torch.Tensor):
        return 0.0, value.data_ptr(), value.dtype == torch.float32
    return float(value), 0, False


def gradient(grad, slot):
    return grad.data_ptr(), CODES[grad.dtype], grad.numel(), 0 if slot is None else slot.data_ptr()


def sgd_list(
    params,
    grads,
    *,
    slots=None,
    rounding="nearest",
    seed=0,
    ids=None,
    shards=None,
    rule="sgd",
    on_device=False,
    **numbers,
):
    """`ops.sgd_list_` by the emulated kernels, without the operator around them. `on_device`: the kernels read the
    vector of scalars."""
    n = len(params)
    parts = zip(params, grads, slots or [None] * n, ids or [0] * n, shards or [WHOLE] * n, strict=True)
    scalars = vector("test", torch.device("cpu"), numbers)
    host.update(
        [(p.data_ptr(), CODES[p.dtype], gradient(g, slot), i, *shard) for p, g, slot, i, shard in parts],
        [math.nan] * 7 if on_device else scalars.tolist(),
        scalars.data_ptr() if on_device else 0,
        RULES[rule],
        rounding == "stochastic",
        seed,
    )


def norms(grads, inv_scale=1.0):
    """Slots with what `ops.sq_norm_list_` adds to empty ones, by the emulated kernels."""
    slots = torch.zeros(len(grads), dtype=torch.float64)
    host.sq_norm([gradient(g, s) for g, s in zip(grads, slots, strict=True)], number(inv_scale))
    return slots


# ---- The operators' contract ----------------------------------------------------------------------------------------

CONTRACT = """
import sys, pytest
sys.path.insert(0, sys.argv.pop(1))
from lomo_kernels import backends
assert backends.choice("CPU").detail == "the CUDA kernels, emulated", backends.choices()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""
#: The first tests of test_sgd.py take half of its time.
PARTS = {
    "sizes": ("test_sgd.py", "every_size"),
    "arguments": ("test_sgd.py", "every_argument"),
    "rest": ("test_sgd.py", "not every_size and not every_argument and not random_bits"),
    "split": ("test_split.py", "not any_update and not becomes_nan"),
    "some split": ("test_split.py", "every_size and (-31] or -4097])"),
    "norms": ("test_sq_norm.py", ""),
    "factored updates": ("test_factored.py", "not sum"),
    "factored sums": ("test_factored.py", "sum"),
    "rule factors": ("test_rule_factors.py", "not torch"),
    "refusals": ("test_fuzz.py", "no_parameters or 64_bits"),
    "shared memory": ("test_overlap.py", "factors_next"),
}
#: The tests below have no split weights.
FEW = ("some split",)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", [pytest.param(part, marks=[pytest.mark.slow] * (part not in FEW)) for part in PARTS])
def test_the_contract(run_python, tmp_path, part):
    """The operators' own tests on csrc/cuda's operators and kernels, layouts and bad input included."""
    package = tmp_path / "lomo_kernels"
    shutil.copytree(Path(lomo_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(Path(lomo_kernels_testing.__file__).parent / "_emulated.so", package / "_cpu.so")
    file, chosen = PARTS[part]
    process = run_python(CONTRACT, str(tmp_path), str(Path(__file__).parent / file), "-k", chosen)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]


# ---- Who does which element -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 100, TILE + 9])
@every_rounding
@every_grad
@every_param
def test_every_alignment_of_param_and_grad(param_dtype, grad_dtype, rounding, size):
    param, grad = oracle.param_of(size, param_dtype), oracle.grad_of(size, grad_dtype)
    arguments = {"lr": 0.03, "weight_decay": 0.1, "clip_coef": 0.7, "rounding": rounding}
    expected = reference.updated(param, grad, **reference_arguments(arguments))
    for p_offset in range(8):
        for g_offset in range(8):
            p, surroundings = oracle.misaligned(param, p_offset)
            g, _ = oracle.misaligned(grad, g_offset)
            sgd_list([p], [g], **arguments)
            assert_same_bits(p, expected, p_offset, g_offset)
            assert (surroundings[:p_offset] == 7).all() and (surroundings[p_offset + size :] == 7).all()


@pytest.mark.parametrize("size", [n * TILE + d for n in (1, 2, BLOCKS, 2 * BLOCKS) for d in (-1, 0, 1, 4095)])
@pytest.mark.parametrize("offset", [0, 5])
def test_sizes_around_tiles_and_blocks(size, offset):
    param, grad = oracle.param_of(size, torch.bfloat16), oracle.grad_of(size, torch.bfloat16)
    p, _ = oracle.misaligned(param, offset)
    sgd_list([p], [grad], lr=0.03, rounding="stochastic", seed=1)
    assert_same_bits(p, reference.updated(param, grad, lr=0.03, stochastic=True, seed=1))
    ordinary = oracle.ordinary(size, torch.bfloat16)
    assert_close_sum(norms([ordinary])[0], oracle.squares(ordinary))
    assert_same_bits(norms([oracle.misaligned(ordinary, offset)[0]]), norms([ordinary]))
    # With a norm the groups follow the gradient's elements, so a misaligned parameter has no straight tile.
    p, _ = oracle.misaligned(param, offset)
    slot = torch.zeros(1, dtype=torch.float64)
    sgd_list([p], [ordinary], lr=0.03, slots=[slot])
    assert_same_bits(p, reference.updated(param, ordinary, lr=0.03))
    assert_same_bits(slot, norms([ordinary]))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_of_blocks_changes_no_bit(order):
    n = 3 * BLOCKS * TILE + 17
    param, grad = oracle.ordinary(n, torch.bfloat16), oracle.ordinary(n, torch.float32, 1)
    results = []
    for o in (0, order):
        host.set_block_order(o)
        p, slot = param.clone(), torch.zeros(1, dtype=torch.float64)
        sgd_list([p], [grad], lr=0.03, rounding="stochastic", slots=[slot])
        sgd_list([p], [grad], lr=0.03, rounding="stochastic")
        results.append((p, slot, norms([grad])))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_same_bits(actual, expected)
    assert_same_bits(results[0][1], results[0][2])  # the norm in the same pass is that of sq_norm_


@pytest.mark.parametrize("size", [TILE - 8, TILE + 8, 2 * TILE - 1, 2 * TILE])
@every_rounding
@every_grad
@every_param
def test_nothing_beyond_a_tensor_is_touched(param_dtype, grad_dtype, rounding, size):
    """An aligned tensor in the middle of a larger one: what lies before and after it is neither read nor written."""
    params = torch.full((size + 2 * TILE,), 7.0, dtype=param_dtype)
    grads = torch.full((size + 2 * TILE,), math.nan, dtype=grad_dtype)
    p, g = params[TILE : TILE + size], grads[TILE : TILE + size]
    p.copy_(oracle.ordinary(size, param_dtype))
    g.copy_(oracle.ordinary(size, grad_dtype, 1))
    expected = reference.updated(p, g, lr=0.03, stochastic=rounding == "stochastic")
    slot = torch.zeros(1, dtype=torch.float64)
    sgd_list([p], [g], lr=0.03, rounding=rounding, slots=[slot])
    assert_same_bits(p, expected)
    assert (params[:TILE] == 7).all() and (params[TILE + size :] == 7).all()
    assert_close_sum(slot, oracle.squares(g))
    assert_same_bits(slot, norms([g]))


# ---- Exceptions -----------------------------------------------------------------------------------------------------


def one_in_eight(ordinary, odd):
    """`ordinary` with one of the odd numbers in each run of 8 neighbours, in every place of the 8."""
    n = len(ordinary) // 8
    mixed, places = ordinary.clone(), torch.arange(n) * 8 + torch.arange(n) // 3 % 8
    mixed[places[::2]] = odd.to(mixed.dtype)[torch.arange(n) % len(odd)][::2]
    return mixed


@every_rounding
@every_grad
@every_param
def test_a_single_exception_among_ordinary_elements(param_dtype, grad_dtype, rounding):
    """What lets a thread leave the usual path: a gradient or a result that is not finite, a sum of magnitudes beyond
    float32, a result that is subnormal or next to infinity."""
    size = 4 * TILE
    param, grad = oracle.ordinary(size, param_dtype), oracle.ordinary(size, grad_dtype, 1)
    info = torch.finfo(param_dtype)
    steps = torch.tensor([0.25, 1.0, 3.0], dtype=torch.float64) * info.smallest_normal
    odd = torch.cat([oracle.specials(param_dtype).double(), steps, -steps])
    arguments = {"lr": 0.03, "clip_value": 0.5, "rounding": rounding, "seed": 5}
    for p, g in (
        (param, one_in_eight(grad, oracle.specials(grad_dtype))),
        (one_in_eight(param, odd), grad),
        (one_in_eight(param, odd), torch.zeros_like(grad)),
    ):
        updated = p.clone()
        sgd_list([updated], [g], **arguments)
        assert_same_bits(updated, reference.updated(p, g, **reference_arguments(arguments)))


# ---- Indices --------------------------------------------------------------------------------------------------------

#: With bfloat16 a key serves 2**33 elements, with float16 2**32: the first shards begin shortly before the next key.
SHARDS = [
    *((2**32 * k - d, 2**62, 2**62) for k in (1, 2, 4) for d in (1, 3, 8, 16, 1001, TILE, TILE + 5, TILE + 8)),
    *((offset, length, 101) for offset in (0, 1, 2**33 - 77) for length in (1, 3, 7, 8, 9, 100, 101)),
    (5, 4096, 2**31 + 1),
    (2**40 + 1, 1000, 2**33 - 1),
    (7, 2**31 - 1, 2**31),
    (7, 2**31, 2**31),
    (7, 2**31 + 1, 2**33),
    (2**62, 2, 2**40),
]


@pytest.mark.parametrize("shard", SHARDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_shards(dtype, shard):
    size = 2 * TILE + 4
    param, grad = oracle.ordinary(size, dtype), oracle.ordinary(size, torch.float32, 1)
    expected = reference.updated(param, grad, lr=0.03, stochastic=True, seed=3, shard=shard)
    for offset in (0, 3):
        p, _ = oracle.misaligned(param, offset)
        sgd_list([p], [grad], lr=0.03, rounding="stochastic", seed=3, shards=[shard])
        assert_same_bits(p, expected, offset)


# ---- Lists ----------------------------------------------------------------------------------------------------------


def launches_of(call):
    before = host.launches()
    call()
    return host.launches() - before


@every_rounding
def test_a_long_list_takes_few_launches(rounding):
    n = host.TABLE_ENTRIES + 100
    sizes = [1 + 37 * i % 300 for i in range(n)]
    params = [oracle.ordinary(size, torch.bfloat16, i) for i, size in enumerate(sizes)]
    grads = [oracle.ordinary(size, torch.bfloat16, i + 1) for i, size in enumerate(sizes)]
    results, ids = [p.clone() for p in params], list(range(5, n + 5))
    slots = list(torch.zeros(n, dtype=torch.float64))
    call = {"lr": 0.03, "rounding": rounding, "slots": slots, "ids": ids}
    assert launches_of(lambda: sgd_list(results, grads, **call)) == 2
    for p, g, i, result, slot in zip(params, grads, ids, results, slots, strict=True):
        expected = reference.updated(p, g, lr=0.03, stochastic=rounding == "stochastic", parameter_id=i)
        assert_same_bits(result, expected)
        assert_close_sum(slot, oracle.squares(g))
    assert launches_of(lambda: norms(grads)) == 2
    assert_same_bits(norms(grads), torch.stack(slots))


@pytest.mark.parametrize("n", [2, host.SOME_ENTRIES, host.SOME_ENTRIES + 1, host.TABLE_ENTRIES])
def test_lists_around_the_sizes_of_tables(n):
    params = [oracle.ordinary(1 + i % 70, torch.bfloat16, i) for i in range(n)]
    grads = [oracle.ordinary(len(p), torch.bfloat16, i + 1) for i, p in enumerate(params)]
    results, slots = [p.clone() for p in params], torch.zeros(n, dtype=torch.float64)
    assert launches_of(lambda: sgd_list(results, grads, lr=0.03, slots=list(slots))) == 1
    for p, g, result in zip(params, grads, results, strict=True):
        assert_same_bits(result, reference.updated(p, g, lr=0.03))
    assert launches_of(lambda: norms(grads)) == 1
    assert_same_bits(norms(grads), slots)


def test_a_list_of_all_dtypes_and_sizes():
    sizes = [5, 0, TILE, 3 * BLOCKS * TILE + 1, 1, 2 * TILE + 3, 513]
    cases = [(size, p, g) for size in sizes for p in DTYPES for g in DTYPES]
    params = [oracle.ordinary(size, p, i) for i, (size, p, _) in enumerate(cases)]
    grads = [oracle.ordinary(size, g, i + 1) for i, (size, _, g) in enumerate(cases)]
    results = [p.clone() for p in params]
    for o in (0, 7):
        host.set_block_order(o)
        slots = torch.zeros(len(cases), dtype=torch.float64)
        for result, p in zip(results, params, strict=True):
            result.copy_(p)
        sgd_list(results, grads, lr=0.03, rounding="stochastic", slots=list(slots))
        for p, g, result in zip(params, grads, results, strict=True):
            assert_same_bits(result, reference.updated(p, g, lr=0.03, stochastic=True))
        assert_same_bits(slots, torch.cat([norms([g]) for g in grads]))


def test_launches_are_bounded():
    """By their blocks too, as many as there is memory for partial sums."""
    n = 2 * (host.LAUNCH_BLOCKS // NORM_BLOCKS)
    grads = [oracle.ordinary(NORM_BLOCKS * TILE - i, torch.bfloat16, i) for i in range(n)]
    slots = torch.zeros(len(grads), dtype=torch.float64)
    call = [gradient(g, s) for g, s in zip(grads, slots, strict=True)]
    assert launches_of(lambda: host.sq_norm(call, number(1.0))) == 2
    for g, slot in zip(grads, slots, strict=True):
        assert_close_sum(slot, oracle.squares(g))


def test_a_slot_that_stands_for_several_gradients():
    """Their sums are added one after another: two blocks that add at the same time would lose one."""
    grads = [oracle.ordinary(size, torch.float32, size) for size in (10, 5 * TILE, 300)]
    slot = torch.zeros(1, dtype=torch.float64)
    call = [gradient(g, slot) for g in grads]
    assert launches_of(lambda: host.sq_norm(call, number(1.0))) == 3
    assert slot.item() == norms(grads).sum().item()
    params = [torch.zeros_like(g) for g in grads]
    assert launches_of(lambda: sgd_list(params, grads, lr=0.0, slots=[slot.zero_()] * 3)) == 3
    assert slot.item() == norms(grads).sum().item()


def test_nothing_is_launched_for_nothing():
    empty = torch.zeros(0)
    assert launches_of(lambda: sgd_list([empty], [empty], lr=1.0, slots=[torch.zeros(1, dtype=torch.float64)])) == 0
    assert launches_of(lambda: norms([])) == 0


# ---- Scalars that the device reads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", oracle.ARGUMENTS)
def test_scalars_in_memory(name, rule):
    param, grad = oracle.param_of(TILE + 100, torch.bfloat16), oracle.grad_of(TILE + 100, torch.float16)
    numbers = oracle.ARGUMENTS[name] | {"step": 2**40 + 1}
    p = param.clone()
    sgd_list([p], [grad], **numbers, rule=rule, rounding="stochastic", on_device=True)
    assert_same_bits(p, reference.updated(param, grad, **reference_arguments(numbers), rule=rule, stochastic=True))
    before = p.clone()
    sgd_list([p], [grad], **numbers | {"found_inf": 1.0}, rule=rule, on_device=True)
    assert_same_bits(p, before)


def test_found_inf_leaves_the_parameter_and_adds_the_norm():
    param, grad = oracle.param_of(TILE + 100, torch.bfloat16), oracle.ordinary(TILE + 100, torch.bfloat16)
    p, slot = param.clone(), torch.zeros(1, dtype=torch.float64)
    sgd_list([p], [grad], lr=1.0, found_inf=1.0, slots=[slot])
    assert_same_bits(p, param)
    assert_same_bits(slot, norms([grad]))


# ---- Sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e20, 1e-25, 1e-45, 3e38], ids=str)
def test_squares_beyond_float32(scale):
    """A warp's sum that overflows, or in which squares vanish, is made again in float64."""
    grad = torch.full((3 * TILE + 5,), scale)
    grad[TILE : 2 * TILE] = 1.0
    assert_close_sum(norms([grad])[0], oracle.squares(grad))
    slot = torch.zeros(1, dtype=torch.float64)
    sgd_list([torch.zeros_like(grad)], [grad], lr=0.0, slots=[slot])
    assert_same_bits(slot, norms([grad]))


@every_grad
@every_param
def test_a_norm_has_the_same_bits_with_every_parameter(param_dtype, grad_dtype):
    """Threads take 8 neighbours or 4 and 4, by the dtypes; the order of the sum is the same.

    Among the gradients are zeros and squares beyond float32 on both sides, whole tiles of them and single ones."""
    size = NORM_BLOCKS * TILE + 3 * TILE + 5
    grad = oracle.ordinary(size, grad_dtype)
    exponents = torch.randint(-30, 30, (size // 16 + 1,), generator=oracle.generator(1)).repeat_interleave(16)[:size]
    grad = (grad.double() * torch.where(exponents % 3 == 0, 10.0 ** (exponents % 12), 1.0)).to(grad_dtype)
    grad[5 * TILE : 6 * TILE] = 0
    grad[6 * TILE : 7 * TILE : 3] = torch.finfo(grad_dtype).tiny
    grad[7 * TILE + 16 : 8 * TILE] = 0
    grad[::7] = 0
    grad.masked_fill_(~grad.isfinite(), 1.0)
    slot = torch.zeros(1, dtype=torch.float64)
    sgd_list([torch.zeros(size, dtype=param_dtype)], [grad], lr=0.0, slots=[slot])
    assert_same_bits(slot, norms([grad]))
    assert_close_sum(slot, oracle.squares(grad))
