"""The contract of `linear_sgd_` and `linear_sq_norm_`: within the error of a float32 sum of what `sgd_` and `sq_norm_`
make of the gradient in float64; and the two kernels under them, on every instruction set."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.oracle import ARGUMENTS, DTYPES, ROUNDINGS, assert_same_bits, name_of, reference_arguments
from torch.library import opcheck

from lomo_kernels import backends, ops, reference
from lomo_kernels.composite import tiled
from lomo_kernels.ops.scalars import vector

CPU_KERNELS = backends.choice("CPU").backend == "cpu"
needs_cpu_kernels = pytest.mark.skipif(not CPU_KERNELS, reason="the kernels of the cpu backend are not in force")
every_weight = pytest.mark.parametrize("weight_dtype", DTYPES, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)
SIXTEEN = (torch.bfloat16, torch.float16)
OPS = torch.ops.lomo_kernels


def slot_on(device="cpu", value=0.0):
    return torch.tensor([value], dtype=torch.float64, device=device)


def pair(tokens, rows, columns, dtype, seed=0, scale=1.0):
    """Input [tokens, columns] and grad_output [tokens, rows]."""
    x, gy = oracle.ordinary(tokens * columns, dtype, seed), oracle.ordinary(tokens * rows, dtype, seed + 1, scale)
    return x.view(tokens, columns), gy.view(tokens, rows)


def matrix(tensor):
    return tensor.double()[None].flatten(0, -2)


def error_of_sums(inputs, grad_outputs):
    """What a float32 sum of the products may be off by: for n terms, 4 sqrt(n) roundings of the sum of magnitudes, and
    for each term what bfloat16 instructions flush."""
    tokens = sum(matrix(x).shape[0] for x in inputs)
    magnitude = sum(matrix(gy).abs().T @ matrix(x).abs() for x, gy in zip(inputs, grad_outputs, strict=True))
    return 2.0**-24 * 4 * math.sqrt(tokens + 1) * magnitude + tokens * 2.0**-126


def as_list(tensors):
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors


def assert_updated(result, weight, inputs, grad_outputs, **arguments):
    """The update falls where the gradient rises, also when it is rounded: so it lies between those of the gradient's
    two ends. That leaves nothing to the weight's own rounding."""
    inputs, grad_outputs = as_list(inputs), as_list(grad_outputs)
    gradient = reference.linear_gradient(inputs, grad_outputs)
    error = error_of_sums(inputs, grad_outputs).nan_to_num(0.0, 0.0)
    arguments = reference_arguments(arguments)
    ends = [(gradient.double() + sign * error).float() for sign in (1, -1)]
    ends = [torch.where(gradient.isfinite(), end, gradient) for end in ends]
    low, high = (reference.updated(weight, end, **arguments) for end in ends)
    made = result.cpu()
    assert made.dtype == weight.dtype and made.shape == weight.shape
    outside = ~((low.double() <= made.double()) & (made.double() <= high.double()))
    outside &= ~((low.isnan() | high.isnan()) & made.isnan())
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(outside.sum())} of {outside.numel()} weights, the first at {where}: {made[where]!r} is not between "
            f"{low[where]!r} and {high[where]!r}; gradient {gradient[where]!r}, {arguments}"
        )


def check_update(weight, inputs, grad_outputs, device="cpu", **arguments):
    result = weight.to(device, copy=True)
    moved = [[t.to(device) for t in as_list(tensors)] for tensors in (inputs, grad_outputs)]
    ops.linear_sgd_(result, *moved, **arguments)
    assert_updated(result, weight, inputs, grad_outputs, **arguments)
    return result


def exact_square(inputs, grad_outputs, inv_scale=None):
    gradient = reference.linear_gradient(as_list(inputs), as_list(grad_outputs))
    return oracle.squares(gradient, inv_scale)


def norm_of(inputs, grad_outputs, device="cpu", **arguments):
    slot = slot_on(device, 0.0)
    moved = [[t.to(device) for t in as_list(tensors)] for tensors in (inputs, grad_outputs)]
    ops.linear_sq_norm_(slot, *moved, **arguments)
    return slot.item()


def check_norm(inputs, grad_outputs, device="cpu", **arguments):
    """The norm, the root of the sum, is within 1e-5."""
    made, exact = norm_of(inputs, grad_outputs, device, **arguments), exact_square(inputs, grad_outputs, **arguments)
    assert math.isfinite(made) and abs(math.sqrt(made) - math.sqrt(exact)) <= 1e-5 * math.sqrt(exact), (made, exact)
    return made


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few rows, so that small weights have many."""
    monkeypatch.setattr(tiled, "TILE_BYTES", 4000)
    monkeypatch.setattr(tiled, "LEAST_ROWS", 5)


# ---- Shapes, dtypes, arguments --------------------------------------------------------------------------------------

#: Around the width of every register tile, block and step, in tokens, rows and columns.
SHAPES = [
    *[(tokens, 5, 3) for tokens in (0, 1, 2, 3, 31, 32, 33, 64, 127, 128, 129, 255, 256, 257, 513, 1025)],
    *[(3, rows, 5) for rows in (1, 4, 7, 8, 9, 255, 256, 257, 513)],
    *[(3, 5, columns) for columns in (1, 4, 11, 12, 13, 23, 24, 25, 47, 48, 49, 95, 97, 527, 528, 529, 1025)],
    (300, 264, 97),
    (33, 17, 1100),
    (70, 1100, 3),
    (5, 0, 3),
    (5, 3, 0),
    (0, 0, 0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
def test_every_shape(device, dtype, shape):
    x, gy = pair(*shape, dtype)
    weight = oracle.ordinary(shape[1] * shape[2], torch.float32, 5).view(shape[1:])
    check_update(weight, x, gy, device, lr=0.03)
    check_norm(x, gy, device)


@every_rounding
@every_dtype
@every_weight
def test_every_dtype_over_many_tiles(device, small_tiles, weight_dtype, dtype, rounding):
    """The tiles' random bits are those of the elements' places in the whole weight."""
    x, gy = pair(40, 63, 101, dtype)
    weight = oracle.ordinary(63 * 101, weight_dtype, 5).view(63, 101)
    keys = {"rounding": rounding, "seed": 3, "parameter_id": 2**40, "step": 7}
    result = check_update(weight, x, gy, device, lr=0.01, **keys)
    assert not torch.equal(result.cpu(), weight)
    if rounding == "stochastic" and weight_dtype in SIXTEEN:
        for change in ({"seed": 4}, {"parameter_id": 1}, {"step": 8}):
            assert not torch.equal(check_update(weight, x, gy, device, lr=0.01, **keys | change), result)


@pytest.mark.parametrize("name", ARGUMENTS)
@every_rounding
@every_weight
def test_every_argument(device, small_tiles, weight_dtype, rounding, name):
    x, gy = pair(20, 33, 65, torch.bfloat16)
    weight = oracle.ordinary(33 * 65, weight_dtype, 5).view(33, 65)
    check_update(weight, x, gy, device, rounding=rounding, **ARGUMENTS[name])


@every_weight
def test_numbers_and_tensors_mean_the_same(device, weight_dtype):
    x, gy = (t.to(device) for t in pair(9, 33, 65, torch.bfloat16))
    weight = oracle.ordinary(33 * 65, weight_dtype, 5).view(33, 65).to(device)
    for arguments in ARGUMENTS.values():
        tensors = {k: torch.tensor([v], dtype=torch.float64, device=device) for k, v in arguments.items()}
        one, other = weight.clone(), weight.clone()
        ops.linear_sgd_(one, x, gy, **arguments)
        ops.linear_sgd_(other, x, gy, **tensors, step=torch.tensor(0, device=device))
        assert_same_bits(one, other.cpu(), arguments)


@pytest.mark.parametrize("flag", [1.0, math.inf, math.nan], ids=str)
@every_weight
def test_found_inf_leaves_every_bit_and_the_norm_is_added(device, small_tiles, weight_dtype, flag):
    x, gy = pair(20, 33, 65, torch.bfloat16)
    weight = oracle.param_of(33 * 65, weight_dtype).view(33, 65)
    result, slot = weight.to(device, copy=True), slot_on(device, 3.0)
    found_inf = torch.tensor([flag], dtype=torch.float64, device=device)
    ops.linear_sgd_(result, x.to(device), gy.to(device), lr=0.1, weight_decay=0.1, found_inf=found_inf, sq_norm=slot)
    assert_same_bits(result, weight)
    exact = exact_square(x, gy)
    assert abs(slot.item() - 3.0 - exact) <= 1e-5 * exact


@every_dtype
def test_sq_norm_in_the_same_pass(device, small_tiles, dtype):
    """Of the scaled gradient before clamp and coefficient."""
    x, gy = pair(20, 33, 65, dtype)
    weight, slot = torch.zeros(33, 65, device=device), slot_on(device, 3.0)
    arguments = {"lr": 0.1, "inv_scale": 0.3, "clip_value": 0.1, "clip_coef": 0.2}
    ops.linear_sgd_(weight, x.to(device), gy.to(device), **arguments, sq_norm=slot)
    exact = exact_square(x, gy, 0.3)
    assert abs(slot.item() - 3.0 - exact) <= 1e-5 * exact
    assert_updated(weight, torch.zeros(33, 65), x, gy, **arguments)


@every_dtype
def test_several_pairs_are_one_gradient(device, small_tiles, dtype):
    """The sum is squared, not the parts."""
    pairs = [pair(tokens, 33, 65, dtype, seed) for seed, tokens in enumerate((7, 0, 20, 1))]
    pairs.append((-pairs[0][0], pairs[0][1]))  # cancels the first
    inputs, grad_outputs = (list(tensors) for tensors in zip(*pairs, strict=True))
    weight = oracle.ordinary(33 * 65, torch.float32, 5).view(33, 65)
    check_update(weight, inputs, grad_outputs, device, lr=0.1)
    check_norm(inputs, grad_outputs, device)
    check_norm(inputs, grad_outputs, device, inv_scale=0.3)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3), (0, 4)], ids=str)
@every_dtype
def test_inputs_of_any_rank(device, dtype, shape):
    x, gy = pair(math.prod(shape), 33, 65, dtype)
    x, gy = x.reshape(*shape, 65), gy.reshape(*shape, 33)
    check_update(oracle.ordinary(33 * 65, torch.float32, 5).view(33, 65), x, gy, device, lr=0.1)
    check_norm(x, gy, device)


def layouts(tensor):
    """The same values in other orders of memory."""
    tokens, width = tensor.shape
    wide = torch.full((tokens, 2 * width + 3), 7.0, dtype=tensor.dtype, device=tensor.device)
    wide[:, 3 : 3 + width] = tensor
    apart = torch.full((tokens, 2 * width), 7.0, dtype=tensor.dtype, device=tensor.device)
    apart[:, ::2] = tensor
    return [tensor, tensor.t().contiguous().t(), wide[:, 3 : 3 + width], apart[:, ::2], tensor.flip(0).flip(0)]


@every_dtype
def test_factors_in_any_order_of_memory(device, small_tiles, dtype):
    x, gy = (t.to(device) for t in pair(20, 33, 65, dtype))
    weight = oracle.ordinary(33 * 65, torch.float32, 5).view(33, 65)
    for one in layouts(x):
        for other in layouts(gy):
            result = weight.to(device, copy=True)
            ops.linear_sgd_(result, one, other, lr=0.1)
            assert_updated(result, weight, x.cpu(), gy.cpu(), lr=0.1)
            slot = slot_on(device)
            ops.linear_sq_norm_(slot, one, other)
            assert abs(slot.item() - exact_square(x.cpu(), gy.cpu())) <= 1e-5 * slot.item()


@every_dtype
def test_factors_that_repeat_one_row_or_element(device, dtype):
    """What the gradients of a sum and of a mean look like: expanded, with strides of zero."""
    x, gy = pair(20, 33, 65, dtype)
    for one, other in [(x, gy[:1].expand(20, 33)), (x, gy[:1, :1].expand(20, 33)), (x[:1].expand(20, 65), gy)]:
        check_update(torch.zeros(33, 65), one, other, device, lr=0.1)
        check_norm(one, other, device)


@every_rounding
@every_weight
def test_weights_in_any_order_of_memory(device, small_tiles, weight_dtype, rounding):
    x, gy = pair(20, 33, 65, torch.bfloat16)
    weight = oracle.ordinary(33 * 65, weight_dtype, 5).view(33, 65)
    for made in layouts(weight.to(device, copy=True)):
        ops.linear_sgd_(made, x.to(device), gy.to(device), lr=0.1, rounding=rounding)
        assert_updated(made, weight, x, gy, lr=0.1, rounding=rounding)


def test_memory_beside_the_weight_is_left_alone(device, small_tiles):
    x, gy = (t.to(device) for t in pair(20, 33, 65, torch.bfloat16))
    whole = torch.full((35, 70), 7.0, device=device)
    ops.linear_sgd_(whole[1:34, 3:68], x, gy, lr=0.1)
    whole[1:34, 3:68] = 7.0
    assert (whole == 7.0).all()


def test_the_version_counter_is_increased(device):
    x, gy = (t.to(device) for t in pair(3, 4, 5, torch.float32))
    weight = torch.ones(4, 5, device=device, requires_grad=True)
    loss = (weight * weight).sum()
    ops.linear_sgd_(weight, x, gy, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@every_rounding
@every_dtype
@every_weight
def test_an_element_with_a_gradient_that_is_not_finite_keeps_its_weight(
    device, small_tiles, weight_dtype, dtype, rounding, bad
):
    """A bad input reaches a column, a bad grad_output a row."""
    weight = oracle.ordinary(33 * 65, weight_dtype, 5).view(33, 65)
    for row, column in [(0, None), (32, None), (None, 0), (None, 64), (7, 9)]:
        x, gy = pair(20, 33, 65, dtype)
        if row is not None:
            gy[-1, row] = bad
        if column is not None:
            x[-1, column] = bad
        result = check_update(weight, x, gy, device, lr=0.1, weight_decay=0.1, clip_value=0.5, rounding=rounding).cpu()
        hurt = torch.zeros(33, 65, dtype=torch.bool)
        if row is not None:
            hurt[row] = True
        if column is not None:
            hurt[:, column] = True
        assert_same_bits(result[hurt], weight[hurt])
        assert (result != weight)[~hurt].float().mean() > 0.5
        assert not math.isfinite(norm_of(x, gy, device))


#: Name: (scale of input, of grad_output). float16 takes none of them.
SCALES = {
    "tiny": (1.0, 1e-25),
    "tinier": (1.0, 1e-30),
    "least": (1.0, 1e-36),
    "both_small": (1e-15, 1e-15),
    "huge": (1e10, 1e10),
    "huge_and_tiny": (1e30, 1e-30),
    "overflows_in_a_gram_matrix": (1e20, 1e-5),
    "underflows_in_a_gram_matrix": (1e5, 1e-20),
}


@pytest.mark.parametrize("inv_scale", [1.0, 2.0**-16, 1e4])
@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_tiny_and_huge_values(device, dtype, name, inv_scale):
    x, gy = pair(20, 330, 65, torch.float32)
    x, gy = (x * SCALES[name][0]).to(dtype), (gy * SCALES[name][1]).to(dtype)
    check_norm(x, gy, device, inv_scale=inv_scale)
    check_update(torch.zeros(330, 65), x, gy, device, lr=1.0, inv_scale=inv_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_gradient_that_underflows_moves_nothing_and_adds_nothing(device, dtype):
    x, gy = (t * 1e-25 for t in pair(20, 330, 65, dtype))
    assert norm_of(x, gy, device) == 0.0
    result = check_update(torch.ones(330, 65), x, gy, device, lr=1.0)
    assert (result == 1.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_gradient_that_overflows_is_not_finite(device, dtype):
    """Also where the sum of squares would fit float64."""
    x, gy = pair(20, 330, 65, dtype)
    for one, other, inv_scale in [(x * 1e20, gy * 1e20, None), (x * 1e15, gy * 1e15, 1e10)]:
        assert not math.isfinite(norm_of(one, other, device, inv_scale=inv_scale))
        result = torch.ones(330, 65, device=device)
        ops.linear_sgd_(result, one.to(device), other.to(device), lr=1.0, inv_scale=inv_scale)
        assert result.isfinite().all()


def correlated(kind, tokens, rows, columns):
    """Factors of which inner products cancel, in float32."""
    x, gy = pair(tokens, rows, columns, torch.float32)
    centered = gy - gy.mean(0)
    pick = torch.arange(tokens) % 2
    one_feature = x.clone()
    one_feature[:, 0] = 300.0
    return {
        "noise": (1 + 0.01 * x, gy),
        "noise_centered": (1 + 0.01 * x, centered),
        "noise_slightly_centered": (1 + 0.3 * x, centered),
        "noise_in_both": (1 + 0.01 * x, 1 + 0.01 * gy),
        "repeated": (x[pick], gy),
        "repeated_centered": ((x[:1] + 0.02 * x)[pick], centered),
        "one_hot": (torch.eye(columns)[torch.arange(tokens) % columns], gy),
        "one_feature": (one_feature, centered),
        "constant_rows": (1.1 * x[:, :1].expand(tokens, columns).contiguous(), gy),
        "every_size": (x * torch.exp2(torch.arange(tokens) % 24 - 12.0)[:, None], gy),
        "one_token_counts": (x * torch.tensor([1.0, *[1e-4] * (tokens - 1)])[:, None], gy),
        "softmax": (1 + x, torch.softmax(gy, 1) - torch.eye(rows)[torch.arange(tokens) % rows]),
    }[kind]


KINDS = [
    "noise",
    "noise_centered",
    "noise_slightly_centered",
    "noise_in_both",
    "repeated",
    "repeated_centered",
    "one_hot",
    "one_feature",
    "constant_rows",
    "every_size",
    "one_token_counts",
    "softmax",
]


@pytest.mark.parametrize("kind", KINDS)
@every_dtype
def test_norms_of_correlated_data(device, dtype, kind):
    for shape in [(100, 257, 512), (33, 1024, 300), (1, 64, 64)]:
        x, gy = (t.to(dtype) for t in correlated(kind, *shape))
        check_norm(x, gy, device)


# ---- The two kernels ------------------------------------------------------------------------------------------------


def check_product(tokens, rows, columns, dtype):
    x, gy = pair(tokens, rows, columns, dtype)
    exact, error = matrix(gy).T @ matrix(x), error_of_sums([x], [gy])
    wide = torch.full((tokens, rows + 9), 7.0, dtype=dtype)  # a tile takes some of the columns
    wide[:, 4 : 4 + rows] = gy
    whole = torch.full((rows * columns + 64,), 7.0)
    out = whole[32 : 32 + rows * columns].view(rows, columns)
    out.fill_(math.nan)
    OPS._product_(out, wide[:, 4 : 4 + rows], x, False)
    assert ((out.double() - exact).abs() <= error).all(), (tokens, rows, columns, dtype)
    OPS._product_(out, gy, x, True)
    assert ((out.double() - 2 * exact).abs() <= 3 * error).all(), (tokens, rows, columns, dtype)
    assert (torch.cat([whole[:32], whole[32 + rows * columns :]]) == 7.0).all(), "memory beside `out` was written"


def check_gram(tokens, rows, columns, dtype):
    """The sum is within four times the estimate of its error, which is small for random data."""
    x, gy = pair(tokens, rows, columns, dtype)
    wide = torch.full((tokens, rows + 9), 7.0, dtype=dtype)
    wide[:, 4 : 4 + rows] = gy
    total, error = OPS._gram(x, wide[:, 4 : 4 + rows]).tolist()
    exact = (matrix(gy).T @ matrix(x)).square().sum().item()
    assert abs(total - exact) <= 4 * error, (tokens, rows, columns, dtype, total, exact, error)
    assert error <= 1e-5 * exact or min(rows, columns) <= 5, (tokens, rows, columns, dtype, exact, error)


def check_estimates(dtype):
    """Where the sum cancels, the estimate says so."""
    refused = 0
    for kind in KINDS:
        for shape in [(100, 257, 512), (65, 1024, 300)]:
            x, gy = (t.to(dtype) for t in correlated(kind, *shape))
            total, error = OPS._gram(x, gy).tolist()
            exact = (matrix(gy).T @ matrix(x)).square().sum().item()
            assert abs(total - exact) <= 4 * error, (kind, shape, dtype, total, exact, error)
            refused += error > 5e-6 * total
    assert 0 < refused < len(KINDS), refused


def check_estimate_of_copies(dtype):
    """Inner products of copies of one row, and of a row with itself, have one error: these do not average out."""
    x, gy = pair(70, 90, 50, dtype)
    for rows in (x, x[:1].expand(70, 50).contiguous()):
        a, b = matrix(rows), matrix(gy)
        from_a = torch.outer(a.norm(dim=1), a.norm(dim=1)) * (b @ b.T).abs()
        from_b = torch.outer(b.norm(dim=1), b.norm(dim=1)) * (a @ a.T).abs()
        variance = 2 * (from_a.square().sum() + from_b.square().sum())
        variance -= from_a.diagonal().square().sum() + from_b.diagonal().square().sum()
        common = (from_a.sum() if rows is not x else from_a.diagonal().sum()) + from_b.diagonal().sum()
        expected = 2.0**-23 * (variance.sqrt() + common)
        error = OPS._gram(rows, gy)[1]
        assert abs(error - expected) <= 1e-5 * expected, (dtype, error, expected)


def check_kernels():
    """Both kernels of the instruction set in force."""
    for shape in SHAPES:
        for dtype in DTYPES:
            check_gram(*shape, dtype)
            if dtype in SIXTEEN:
                check_product(*shape, dtype)
    for dtype in DTYPES:
        check_estimates(dtype)
        check_estimate_of_copies(dtype)


@needs_cpu_kernels
def test_the_kernels_in_force():
    check_kernels()


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_the_kernels_of_every_instruction_set(run_python, isa):
    process = run_python("import test_linear; test_linear.check_kernels()", LOMO_KERNELS_ISA=isa)
    if process.returncode and "this processor and build offer" in process.stderr:
        pytest.skip(process.stderr.strip().splitlines()[-1])
    assert process.returncode == 0, process.stderr


@needs_cpu_kernels
@pytest.mark.parametrize("scale", [1e-18, 1e-20, 1e-25, 1e-30, 1e20, 1e38], ids=str)
def test_gram_matrices_that_underflow_or_overflow_are_refused(scale):
    for dtype in (torch.float32, torch.bfloat16):
        x, gy = pair(20, 330, 65, dtype)
        total, error = OPS._gram(x, gy * scale).tolist()
        assert not (0 < total < math.inf and error <= 5e-6 * total), (total, error)


@needs_cpu_kernels
def test_few_tokens_take_inner_products_and_many_take_tiles(monkeypatch):
    made = []
    monkeypatch.setattr(tiled, "linear_tiles", lambda *pair: made.append(pair) or [])
    for tokens, tiles in [(20, 0), (200, 1)]:
        made.clear()
        norm_of(*pair(tokens, 100, 100, torch.bfloat16))
        assert len(made) == tiles, tokens
    made.clear()
    norm_of(*(t.bfloat16() for t in correlated("noise_centered", 20, 100, 100)))
    assert len(made) == 1, "inner products that cancel were trusted"


@needs_cpu_kernels
@every_dtype
def test_results_do_not_depend_on_the_number_of_threads(threads, dtype):
    x, gy = pair(300, 700, 900, dtype)
    results = []
    for n in (1, 2, 3, 8):
        threads(n)
        out, weight = torch.zeros(700, 900), torch.zeros(700, 900, dtype=torch.bfloat16)
        if dtype in SIXTEEN:
            OPS._product_(out, gy, x, False)
            ops.linear_sgd_(weight, x, gy, lr=0.1, rounding="stochastic")
        results.append((out, weight, OPS._gram(x, gy), torch.tensor([norm_of(x, gy)], dtype=torch.float64)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


X, GY = torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16)
OUT = torch.zeros(4, 5)
#: Name: call, and words of its message.
BAD_KERNEL_CALLS = {
    "other dtypes": (lambda: OPS._gram(X, GY.float()), "grad_output has dtype Float"),
    "integers": (lambda: OPS._gram(X.long(), GY.long()), "input has dtype Long"),
    "other tokens": (lambda: OPS._gram(X, GY[:2]), "input has 3 rows, grad_output has 2"),
    "a vector": (lambda: OPS._gram(X[0], GY[0]), "matrix"),
    "columns apart": (lambda: OPS._gram(X[:, ::2], GY), "contiguous"),
    "float32 product": (lambda: OPS._product_(OUT, GY.float(), X.float(), False), "dtype Float"),
    "product of other tokens": (lambda: OPS._product_(OUT, GY[:2], X, False), "rows"),
    "columns of grad_output apart": (lambda: OPS._product_(OUT[:2], GY[:, ::2], X, False), "contiguous"),
    "out of another shape": (lambda: OPS._product_(torch.zeros(5, 4), GY, X, False), "[5, 4]"),
    "out of another dtype": (lambda: OPS._product_(torch.zeros(4, 5).double(), GY, X, False), "Double"),
    "out not contiguous": (lambda: OPS._product_(torch.zeros(5, 4).t(), GY, X, False), "contiguous"),
}


@needs_cpu_kernels
@pytest.mark.parametrize("name", BAD_KERNEL_CALLS)
def test_the_kernels_refuse_bad_input(name):
    call, words = BAD_KERNEL_CALLS[name]
    with pytest.raises(RuntimeError, match=oracle.in_order("_ … " + words).replace("^", "")):
        call()


# ---- Bad input ------------------------------------------------------------------------------------------------------

#: Name: replacements among the arguments of `linear_sgd_`, the exception, words of its message in order.
BAD = {
    "weight is a list": ({"weight": [1.0]}, TypeError, "weight is a list, expected a tensor"),
    "weight of int64": ({"weight": torch.ones(4, 5).long()}, TypeError, "weight has dtype torch.int64"),
    "weight of another shape": ({"weight": torch.ones(5, 4)}, ValueError, "weight has shape [5, 4], expected [4, 5]"),
    "weight of three dimensions": ({"weight": torch.ones(4, 5, 1)}, ValueError, "weight has shape [4, 5, 1]"),
    "weight is expanded": ({"weight": torch.ones(1, 5).expand(4, 5)}, RuntimeError, "share"),
    "input of float64": ({"input": torch.ones(3, 5).double()}, TypeError, "input has dtype torch.float64"),
    "other dtypes": ({"input": torch.ones(3, 5).half()}, TypeError, "input has dtype torch.float16, grad_output has"),
    "other tokens": ({"input": torch.ones(2, 5)}, ValueError, "input has shape [2, 5], grad_output has shape [3, 4]"),
    "no dimension": ({"input": torch.ones(())}, ValueError, "input has shape []"),
    "empty lists": ({"input": [], "grad_output": []}, ValueError, "input is an empty list"),
    "lists of other lengths": ({"input": [torch.ones(3, 5)] * 2, "grad_output": [torch.ones(3, 4)]}, ValueError, "2"),
    "pairs of two layers": (
        {"input": [torch.ones(3, 5), torch.ones(3, 6)], "grad_output": [torch.ones(3, 4)] * 2},
        ValueError,
        "pairs differ",
    ),
    "negative lr": ({"lr": -0.1}, ValueError, "lr is -0.1"),
    "lr of two elements": ({"lr": torch.ones(2)}, ValueError, "lr has shape [2]"),
    "rounding": ({"rounding": "up"}, ValueError, "rounding"),
    "slot of float32": ({"sq_norm": torch.zeros(1)}, ValueError, "sq_norm has shape [1] and dtype torch.float32"),
    "step of float": ({"step": 1.5}, TypeError, "step is a float"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_changes_nothing(name):
    change, exception, words = BAD[name]
    if exception is RuntimeError and not CPU_KERNELS:
        pytest.skip("plain torch has only the wrappers' checks")
    good = {"weight": torch.ones(4, 5), "input": torch.ones(3, 5), "grad_output": torch.ones(3, 4), "lr": 0.1}
    arguments = good | {"sq_norm": slot_on()} | change
    weight, slot = arguments["weight"], arguments["sq_norm"]
    before = weight.clone() if isinstance(weight, torch.Tensor) else None
    version = getattr(weight, "_version", None)
    expected = words if exception is RuntimeError else oracle.in_order("linear_sgd_: … " + words)
    with pytest.raises(exception, match=expected):
        ops.linear_sgd_(**arguments)
    assert (slot == 0).all()
    if before is not None:
        assert torch.equal(weight, before) and weight._version == version


@pytest.mark.parametrize("name", ["other dtypes", "other tokens", "empty lists", "pairs of two layers"])
def test_bad_input_of_the_norm_is_refused_and_changes_nothing(name):
    change, exception, words = BAD[name]
    slot = slot_on()
    good = {"input": torch.ones(3, 5), "grad_output": torch.ones(3, 4)}
    with pytest.raises(exception, match=oracle.in_order("linear_sq_norm_: … " + words)):
        ops.linear_sq_norm_(slot, **good | change)
    for bad_slot in (torch.zeros(1), torch.zeros(2).double(), 1.0):
        with pytest.raises((TypeError, ValueError), match="slot"):
            ops.linear_sq_norm_(bad_slot, **good)
    with pytest.raises(ValueError, match="inv_scale is 0"):
        ops.linear_sq_norm_(slot, **good, inv_scale=0.0)
    assert slot.item() == 0.0


# ---- As torch sees them, and anything -------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [3, 400], ids=["inner products", "tiles"])
def test_opcheck(tokens):
    x, gy = pair(tokens, 33, 65, torch.bfloat16)
    opcheck(OPS.linear_sq_norm_.default, (slot_on(), [x], [gy], torch.tensor([0.5], dtype=torch.float64)))
    weight = torch.zeros(33, 65)
    scalars = vector("test", weight.device, {"lr": 0.1})
    opcheck(OPS.linear_update_.default, (weight, [x, x], [gy, gy], scalars, None, 0, False, 0, 0, []))
    names = ("lr", "weight_decay", "inv_scale", "clip_value", "clip_coef")
    scalars = vector("test", weight.device, dict.fromkeys(names, 0.1) | {"step": 3})
    everything = [scalars, slot_on(), 1, True, 1, 2, [3, 65, 70]]
    opcheck(OPS.linear_update_.default, (weight.bfloat16(), [x], [gy], *everything))


dimensions = st.integers(0, 70) | st.integers(0, 700)


@settings(max_examples=100)
@given(st.integers(0, 300), dimensions, dimensions, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.data())
def test_any_call(tokens, rows, columns, dtype, weight_dtype, data):
    x, gy = pair(tokens, rows, columns, dtype, data.draw(st.integers(0, 1000)), data.draw(st.sampled_from([1.0, 1e-3])))
    weight = oracle.ordinary(rows * columns, weight_dtype, 5).view(rows, columns)
    arguments = {
        "lr": data.draw(st.floats(0, 10)),
        "weight_decay": data.draw(st.floats(0, 1)),
        "inv_scale": data.draw(st.none() | st.floats(1e-5, 1e3)),
        "clip_value": data.draw(st.none() | st.floats(1e-3, 10)),
        "clip_coef": data.draw(st.none() | st.floats(0, 1)),
        "rounding": data.draw(st.sampled_from(ROUNDINGS)),
    }
    check_update(weight, x, gy, **{k: v for k, v in arguments.items() if v is not None})
    check_norm(x, gy)


def test_a_weight_that_shares_memory_with_a_factor_is_refused():
    """The second tile would be formed from rows that the first has updated."""
    whole = torch.ones(2048, 64)
    weight, words = whole[:1024], "weight and a factor of its gradient share memory"
    for x, gy in (
        (whole[1020:1028], torch.ones(8, 1024)),
        (torch.ones(8, 64), whole[:128].view(8, 1024)),
        (torch.ones(8, 64), whole[5, 3].expand(8, 1024)),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.linear_sgd_(weight, x, gy, lr=0.5)
    assert torch.equal(whole, torch.ones(2048, 64))
    ops.linear_sgd_(weight, whole[1024:1032], torch.ones(8, 1024), lr=0.5)
    assert (weight != 1).all()
