"""The contract of `embedding_sgd_` and `embedding_sq_norm_`: the update and the norm of a gradient that is summed row
by row, in float32, in the order of the tokens. With that gradient, the bits are those of the reference."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support.oracle import ARGUMENTS, DTYPES, KEYS, ROUNDINGS, assert_same_bits, name_of, reference_arguments
from test_sgd import refused

from lomo_kernels import backends, ops, reference
from lomo_kernels.composite import tiled
from lomo_kernels.ops.scalars import vector
from lomo_kernels.rules import RULES

OPS = torch.ops.lomo_kernels
#: Else the tiled form serves, or the reference.
COMPILED = backends.choice("CPU").backend == "cpu" and "emulated" not in backends.choice("CPU").detail
every_form = pytest.mark.parametrize("form", (["compiled"] if COMPILED else []) + ["tiled"])
compiled_only = pytest.mark.skipif(not COMPILED, reason="of the compiled CPU library")
every_weight = pytest.mark.parametrize("weight_dtype", DTYPES, ids=name_of)
every_grad = pytest.mark.parametrize("grad_dtype", DTYPES, ids=name_of)
every_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)
#: Around the widths of groups (64) and tiles (4096).
DIMS = [1, 2, 63, 64, 65, 1000, 4095, 4096, 4097]


def empty_slot(value=0.0):
    return torch.tensor([value], dtype=torch.float64)


def sgd(
    form,
    weight,
    indices,
    grads,
    padding,
    *,
    sq_norm=None,
    rule="sgd",
    rounding="nearest",
    seed=0,
    parameter_id=0,
    **numbers,
):
    """The operator or its tiled form, which take one padding_idx per pair."""
    run = OPS.embedding_update_.default if form == "compiled" else tiled.embedding_update_
    scalars = vector("embedding_update_", weight.device, numbers)
    keys = (RULES[rule], rounding == "stochastic", seed, parameter_id, [])
    run(weight, indices, grads, padding, scalars, sq_norm, *keys)


def sq_norm(form, slot, indices, grads, padding, inv_scale=None):
    run = OPS.embedding_sq_norm_.default if form == "compiled" else tiled.embedding_sq_norm_
    run(slot, indices, grads, padding, None if inv_scale is None else empty_slot(inv_scale))


def gradient(rows, indices, grads, padding):
    """The gradient, float32 sums in the order of the tokens, and whether a token looked up each row."""
    total = np.zeros((rows, grads[0].shape[-1]), dtype=np.float32)
    looked_up = torch.zeros(rows, dtype=torch.bool)
    for index, gy, pad in zip(indices, grads, padding, strict=True):
        index = index.reshape(-1).long()
        counts = (index != pad) | (pad < 0)
        gy = gy.reshape(index.numel(), gy.shape[-1]).float()[counts]
        with np.errstate(all="ignore"):
            np.add.at(total, index[counts].numpy(), gy.numpy())
        looked_up[index[counts]] = True
    return torch.from_numpy(total), looked_up


def expected_of(form, weight, indices, grads, padding, **arguments):
    """What the reference makes of the weight. Without decay the compiled form does not touch rows that no token looked
    up; the arithmetic of the tiled form makes signalling NaN in them quiet, and changes nothing else."""
    grad, looked_up = gradient(len(weight), indices, grads, padding)
    new = reference.updated(weight, grad, **reference_arguments(arguments))
    decay = np.float32(1.0 - arguments["lr"] * arguments.get("weight_decay", 0.0))
    return torch.where(looked_up[:, None], new, weight) if form == "compiled" and decay == 1 else new


def check(form, weight, indices, grads, padding, *what, **arguments):
    p = weight.clone()
    sgd(form, p, indices, grads, padding, **arguments)
    assert_same_bits(p, expected_of(form, weight, indices, grads, padding, **arguments), *what)
    return p


def random_indices(rows, tokens, seed=0, dtype=torch.int64):
    return torch.randint(rows, (tokens,), generator=oracle.generator(5000 + seed), dtype=dtype)


def problem(rows, dim, tokens, weight_dtype=torch.float32, grad_dtype=torch.float32, make=oracle.ordinary, seed=0):
    """A weight, indices and grad_output; ordinary numbers unless `make` is `oracle.values`."""
    weight = make(rows * dim, weight_dtype, seed).view(rows, dim)
    grad = make(tokens * dim, grad_dtype, seed + 1).view(tokens, dim)
    return weight, random_indices(rows, tokens, seed), grad


# ---- Bits: sizes, arguments, tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", DIMS)
@every_rounding
@every_grad
@every_weight
@every_form
def test_every_size_and_alignment(form, weight_dtype, grad_dtype, rounding, dim):
    for make, decay in ((oracle.values, 0.0), (oracle.values, 0.1), (oracle.ordinary, 0.1)):
        weight, index, grad = problem(7, dim, 11, weight_dtype, grad_dtype, make, seed=dim)
        arguments = {"lr": 0.03, "weight_decay": decay, "clip_coef": 0.7, "rounding": rounding}
        expected = expected_of(form, weight, [index], [grad], [2], **arguments)
        for w_offset, g_offset in [(0, 0), (1, 3)]:
            p, surroundings = oracle.misaligned(weight, w_offset)
            g, _ = oracle.misaligned(grad, g_offset)
            sgd(form, p, [index], [g], [2], **arguments)
            assert_same_bits(p, expected, w_offset, g_offset)
            outside = torch.cat([surroundings[:w_offset], surroundings[w_offset + weight.numel() :]])
            assert (outside == 7.0).all(), "memory beside the weight was written"


@pytest.mark.parametrize("name", ARGUMENTS)
@every_rounding
@every_grad
@every_weight
@every_form
def test_every_argument(form, weight_dtype, grad_dtype, rounding, name):
    for make in (oracle.values, oracle.ordinary):
        weight, index, grad = problem(40, 130, 30, weight_dtype, grad_dtype, make)
        check(form, weight, [index], [grad], [-1], rounding=rounding, **ARGUMENTS[name])


@pytest.mark.parametrize("key", [key for key in KEYS if not key.startswith("shard")])
@every_weight
@every_form
def test_every_key_of_the_random_bits(form, weight_dtype, key):
    weight, index, grad = problem(40, 33, 30, weight_dtype)
    common = {"lr": 0.03, "weight_decay": 0.1, "rounding": "stochastic"}
    made = check(form, weight, [index], [grad], [-1], **common, **KEYS[key])
    if key != "none" and weight_dtype != torch.float32:
        assert not torch.equal(made, check(form, weight, [index], [grad], [-1], **common))


TOKENS = {
    "none": [],
    "one": [3],
    "one row": [5] * 200,
    "every row once": [*range(9, -1, -1)],
    "first and last row": [9, 0, 9, 0],
    "many of few": [0, 9, 4, 4] * 70,
    "padding only": [2] * 9,
    "padding among others": [2, 3, 2, 3, 2, 9],
}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("tokens", TOKENS)
@every_grad
@every_form
def test_tokens(form, grad_dtype, tokens, decay):
    index = torch.tensor(TOKENS[tokens], dtype=torch.int64)
    for dim in (3, 70, 5000):
        for weight_dtype in (torch.float32, torch.bfloat16):
            weight = oracle.ordinary(10 * dim, weight_dtype).view(10, dim)
            grad = oracle.ordinary(len(index) * dim, grad_dtype, 1).view(-1, dim)
            if not index.numel():
                grad = grad.view(0, dim)
            slot, apart = empty_slot(), empty_slot()
            check(form, weight, [index], [grad], [2], lr=0.1, weight_decay=decay, sq_norm=slot, rounding="stochastic")
            sq_norm(form, apart, [index], [grad], [2])
            exact = oracle.squares(gradient(10, [index], [grad], [2])[0])
            oracle.assert_close_sum(slot, exact)
            oracle.assert_close_sum(apart, exact)


@every_grad
@every_form
def test_rows_of_one_token_have_the_bits_of_the_reference(form, grad_dtype):
    """Whose sums are in float64: nothing here decides in which order or precision a row is summed."""
    weight, _, grad = problem(300, 65, 200, torch.bfloat16, grad_dtype, oracle.values)
    index = torch.randperm(300, generator=oracle.generator(1))[:200]
    made = weight.clone()
    arguments = {"lr": 0.03, "rounding": "stochastic", "seed": 5}
    sgd(form, made, [index], [grad], [-1], **arguments)
    dense = reference.embedding_gradient(300, [index], [grad], [-1])
    new = reference.updated(weight, dense, **reference_arguments(arguments))
    assert_same_bits(made[index], new[index])


@every_grad
@every_form
def test_sums_are_within_the_error_of_float32_summation(form, grad_dtype):
    _, index, grad = problem(20, 97, 3000, torch.float32, grad_dtype)
    made = torch.zeros(20, 97)
    sgd(form, made, [index], [grad], [-1], lr=1.0)
    exact = reference.embedding_gradient(20, [index], [grad], [-1]).double()
    magnitude = torch.zeros(20, 97, dtype=torch.float64).index_add_(0, index, grad.double().abs())
    assert ((-made.double() - exact).abs() <= 200 * 2.0**-24 * magnitude).all()
    assert (made != 0).all()


@every_form
def test_several_uses_of_one_embedding(form):
    """Shapes, dtypes and padding differ from use to use: the padding row of one may be looked up in another."""
    shapes, dim = [(), (5,), (2, 0), (3, 4), (2, 3, 5)], 67
    dtypes = [(torch.int64, torch.int32)[i % 2] for i in range(5)]
    indices = [random_indices(9, math.prod(s), i, dtypes[i]).view(s) for i, s in enumerate(shapes)]
    grads = [oracle.ordinary(i.numel() * dim, DTYPES[n % 3], n).view(*i.shape, dim) for n, i in enumerate(indices)]
    weight = oracle.ordinary(9 * dim, torch.bfloat16, 9).view(9, dim)
    seen = set()
    for padding in ([-1] * 5, [int(indices[0]), 4, 0, 8, 1], [3, -1, -5, 2, 2]):
        for decay in (0.0, 0.1):
            slot, apart = empty_slot(), empty_slot()
            arguments = {"lr": 0.3, "weight_decay": decay, "inv_scale": 0.3, "sq_norm": slot}
            made = check(form, weight, indices, grads, padding, **arguments)
            seen.add(tuple(made.flatten().tolist()))
            sq_norm(form, apart, indices, grads, padding, 0.3)
            exact = oracle.squares(gradient(9, indices, grads, padding)[0], 0.3)
            oracle.assert_close_sum(slot, exact)
            oracle.assert_close_sum(apart, exact)
    assert len(seen) == 6


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_equal_to_the_gradient_that_torch_makes(padding_idx):
    weight, index, grad = problem(50, 33, 20)
    dense = weight.clone().requires_grad_()
    torch.nn.functional.embedding(index.view(4, 5), dense, padding_idx).backward(grad.view(4, 5, 33))
    for lists in (False, True):
        made, slot = weight.clone(), empty_slot()
        uses = ([index.view(4, 5)], [grad.view(4, 5, 33)]) if lists else (index.view(4, 5), grad.view(4, 5, 33))
        ops.embedding_sgd_(made, *uses, padding_idx=padding_idx, lr=0.1, weight_decay=0.5)
        ops.embedding_sq_norm_(slot, *uses, padding_idx=padding_idx)
        assert torch.allclose(made, weight * 0.95 - 0.1 * dense.grad, rtol=1e-6, atol=1e-6)
        assert math.isclose(slot.item(), dense.grad.double().square().sum().item(), rel_tol=1e-6)


# ---- Rows that no token looked up -----------------------------------------------------------------------------------


@every_weight
@every_rounding
@every_form
def test_rows_that_were_not_looked_up_keep_every_bit(form, weight_dtype, rounding):
    """Signalling NaN, -0 and subnormals among them."""
    sixteen = weight_dtype != torch.float32
    weight = (oracle.all_patterns(weight_dtype) if sixteen else oracle.patterns(2**16, weight_dtype)).view(1024, 64)
    index, grad = torch.tensor([7, 1000]), torch.ones(2, 64)
    if form == "compiled":
        made = weight.clone()
        sgd(form, made, [index], [grad], [7], lr=0.1, rounding=rounding)
        assert_same_bits(made[:1000], weight[:1000])
        assert_same_bits(made[1001:], weight[1001:])
    # Dense arithmetic would have left them alone, too, but for signalling NaN.
    ordinary = torch.where(weight.isnan(), torch.zeros((), dtype=weight_dtype), weight)
    made = ordinary.clone()
    sgd(form, made, [index], [grad], [7], lr=0.1, rounding=rounding)
    dense = gradient(1024, [index], [grad], [7])[0]
    assert_same_bits(made, reference.updated(ordinary, dense, lr=0.1, stochastic=rounding == "stochastic"))


@pytest.mark.parametrize("shape", [(400, 33), (50, 4097), (9000, 1)], ids=str)
@every_weight
@every_rounding
@every_form
def test_decay_reaches_every_row(form, weight_dtype, rounding, shape):
    rows, dim = shape
    arguments = {"lr": 0.1, "weight_decay": 0.3, "rounding": rounding, "seed": 3}
    for make in (oracle.values, oracle.ordinary):
        weight, index, grad = problem(rows, dim, 20, weight_dtype, make=make)
        index[:3] = torch.tensor([0, rows - 1, 5])
        made = check(form, weight, [index], [grad], [5], **arguments)
        padding = weight[5:6], torch.zeros(1, dim)
        alone = reference.updated(*padding, **reference_arguments(arguments), shard=(5 * dim, dim, dim))
        assert_same_bits(made[5:6], alone, "the padding row decays")
    assert (made[5] != weight[5]).any()


@every_form
@pytest.mark.parametrize(
    "scalars",
    [{"lr": -0.0}, {"lr": math.nan}, {"lr": math.inf}, {"clip_coef": math.nan}, {"clip_coef": math.inf}, {"lr": -1.0}],
    ids=str,
)
def test_whatever_the_scalars_the_result_is_that_of_a_dense_gradient(form, scalars):
    """Tensors are not checked. A learning rate of -0 makes +0 of a weight -0, NaN makes everything NaN."""
    weight, index, grad = problem(40, 33, 20)
    weight[::3] = -0.0
    scalars = {"lr": 0.1} | scalars
    tensors = {name: empty_slot(value) for name, value in scalars.items()}
    made = weight.clone()
    sgd(form, made, [index], [grad], [-1], **tensors)
    assert_same_bits(made, reference.updated(weight, gradient(40, [index], [grad], [-1])[0], **scalars))


@every_form
def test_a_negative_zero_gradient_is_zero(form):
    """As a sum that starts at zero is."""
    weight = torch.full((3, 70), -0.0)
    made = check(form, weight, [torch.tensor([1, 2, 2])], [torch.full((3, 70), -0.0)], [-1], lr=1.0)
    assert torch.signbit(made).all()


# ---- What is not finite, and found_inf ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@every_grad
@every_form
def test_an_element_with_a_gradient_that_is_not_finite_keeps_its_weight(form, grad_dtype, bad):
    weight, index, grad = problem(30, 4097, 25, torch.bfloat16, grad_dtype)
    arguments = {"lr": 0.1, "weight_decay": 0.1, "clip_value": 0.5}
    usual, slot = check(form, weight, [index], [grad], [-1], **arguments), empty_slot()
    for column in (0, 64, 4096):
        grad[3, column] = bad
        usual[index[3], column] = weight[index[3], column]
    made = check(form, weight, [index], [grad], [-1], **arguments, sq_norm=slot)
    assert_same_bits(made, usual)
    assert not slot.isfinite()
    apart = empty_slot()
    sq_norm(form, apart, [index], [grad], [-1])
    assert not apart.isfinite()
    masked = empty_slot()
    sq_norm(form, masked, [index], [grad], [int(index[3])])  # padding counts nothing, NaN or not
    assert masked.isfinite()
    assert_same_bits(check(form, weight, [index], [grad], [int(index[3])], lr=0.1)[index[3]], weight[index[3]])


@every_form
def test_a_sum_may_be_infinite_where_no_token_is(form):
    weight = torch.ones(3, 5)
    index, grad = torch.tensor([1, 2, 1, 0]), torch.full((4, 5), 3e38)
    slot, apart = empty_slot(), empty_slot()
    made = check(form, weight, [index], [grad], [-1], lr=1e-38, sq_norm=slot)
    assert (made[1] == 1).all() and (made[0] != 1).all()
    sq_norm(form, apart, [index], [grad], [-1])
    assert slot.isinf() and apart.isinf()


@pytest.mark.parametrize("flag", [1.0, 0.5, math.inf, math.nan], ids=str)
@every_weight
@every_form
def test_found_inf_leaves_every_bit(form, weight_dtype, flag):
    weight, index, grad = problem(30, 100, 40, weight_dtype, make=oracle.values)
    grad = oracle.ordinary(4000, torch.float32).view(40, 100)
    made, slot = weight.clone(), empty_slot(3.0)
    found_inf = torch.tensor([flag])
    sgd(form, made, [index], [grad], [-1], lr=0.1, weight_decay=0.1, found_inf=found_inf, sq_norm=slot)
    assert_same_bits(made, weight)
    oracle.assert_close_sum(slot - 3.0, oracle.squares(gradient(30, [index], [grad], [-1])[0]))
    sgd(form, made, [index], [grad], [-1], lr=0.1, weight_decay=0.1, found_inf=found_inf)
    assert_same_bits(made, weight)


# ---- The norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e-40, 1e20, 1e37], ids=str)
@every_form
def test_the_norm_of_tiny_and_huge_gradients(form, scale):
    _, index, grad = problem(50, 4097, 60)
    grad = grad * scale
    slot, together = empty_slot(), empty_slot()
    sq_norm(form, slot, [index], [grad], [-1])
    exact = oracle.squares(gradient(50, [index], [grad], [-1])[0])
    oracle.assert_close_sum(slot, exact)
    sgd(form, torch.zeros(50, 4097), [index], [grad], [-1], lr=0.0, sq_norm=together)
    oracle.assert_close_sum(together, exact)


@every_form
def test_rows_are_summed_before_they_are_squared(form):
    index, grad = torch.tensor([4, 1, 4]), torch.tensor([[3.0, 1.0], [2.0, 0.0], [-3.0, 1.0]])
    slot = empty_slot(0.5)
    sq_norm(form, slot, [index], [grad], [-1])
    assert slot.item() == 0.5 + 4 + 4


@compiled_only
@every_grad
def test_the_norm_in_the_same_pass_has_the_same_bits(grad_dtype):
    weight, index, grad = problem(500, 130, 700, torch.bfloat16, grad_dtype)
    apart, together = empty_slot(), empty_slot()
    ops.embedding_sq_norm_(apart, index, grad, inv_scale=0.3)
    ops.embedding_sgd_(weight, index, grad, lr=0.1, clip_value=0.1, clip_coef=0.2, inv_scale=0.3, sq_norm=together)
    assert_same_bits(together, apart)


# ---- Strides --------------------------------------------------------------------------------------------------------


def laid_out(tensor, layout):
    """The same values in another order of memory, and the memory between them."""
    *rows, last = tensor.shape
    if layout == "contiguous":
        return tensor.clone(), None
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1), None
    whole = torch.full((*rows, 2 * last + 1), 7, dtype=tensor.dtype)
    if layout == "every_second":
        return whole[..., 1::2].copy_(tensor), whole[..., ::2]
    return whole[..., :last].copy_(tensor), whole[..., last:]


LAYOUTS = ("contiguous", "transposed", "every_second", "part_of_rows")


@pytest.mark.parametrize("index_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@every_form
def test_layouts(form, weight_layout, grad_layout, index_layout):
    for dim in (70, 4100):
        for weight_dtype, grad_dtype, index_dtype in (
            (torch.bfloat16, torch.float32, torch.int64),
            (torch.float32, torch.float16, torch.int32),
        ):
            weight, index, grad = problem(12, dim, 15, weight_dtype, grad_dtype, oracle.values)
            index, grad = index.to(index_dtype).view(3, 5), grad.view(3, 5, dim)
            p, gap = laid_out(weight, weight_layout)
            g, i = laid_out(grad, grad_layout)[0], laid_out(index, index_layout)[0]
            arguments = {"lr": 0.1, "weight_decay": 0.1, "rounding": "stochastic"}
            sgd(form, p, [i], [g], [3], **arguments)
            assert_same_bits(p, expected_of(form, weight, [index], [grad], [3], **arguments))
            assert gap is None or (gap == 7).all(), "memory between the elements was written"
            slot, exact = empty_slot(), oracle.squares(gradient(12, [index], [grad], [3])[0])
            sq_norm(form, slot, [i], [g], [3])
            assert not math.isfinite(exact) if not slot.isfinite() else math.isclose(slot.item(), exact, rel_tol=1e-6)


@pytest.mark.parametrize("expanded", [(1, 1), (37, 1), (1, 500)], ids=str)
@every_form
def test_expanded_gradients(form, expanded):
    """What the backward of sum() and mean() gives; and one index for all tokens."""
    grad = oracle.ordinary(math.prod(expanded), torch.bfloat16).view(expanded).expand(37, 500)
    weight = oracle.ordinary(20 * 500, torch.float32, 1).view(20, 500)
    for index in (random_indices(20, 37), torch.tensor(6).expand(37)):
        check(form, weight, [index], [grad], [-1], lr=0.1)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (1, 1)], ids=str)
@every_form
def test_sizes_of_zero_and_one(form, shape):
    rows, dim = shape
    index = torch.zeros(3 if rows else 0, dtype=torch.int64)
    weight, grad = torch.ones(shape), torch.ones(len(index), dim)
    slot, apart = empty_slot(), empty_slot()
    check(form, weight, [index], [grad], [-1], lr=0.1, weight_decay=0.1, sq_norm=slot)
    sq_norm(form, apart, [index], [grad], [-1])
    assert slot.item() == apart.item() == 9.0 * rows * dim * (shape == (1, 1))


def test_a_gradient_with_the_negative_bit():
    weight, index, _ = problem(20, 10, 30)
    grad = torch.randn(30, 10, dtype=torch.complex64).conj().imag
    assert grad.is_neg()
    made = weight.clone()
    ops.embedding_sgd_(made, index, grad, lr=0.1)
    plain = weight.clone()
    ops.embedding_sgd_(plain, index, grad.resolve_neg(), lr=0.1)
    assert_same_bits(made, plain)


# ---- Threads, versions, the host ------------------------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("shape", [(5000, 100, 6000), (300, 5000, 200), (70, 64, 100_000)], ids=str)
def test_the_number_of_threads_changes_no_bit(threads, shape):
    weight, index, grad = problem(*shape, torch.bfloat16, torch.bfloat16)
    index[index < shape[0] // 2] = 3  # most tokens look up one row
    results = []
    for count in (1, 2, 3, 5, 2):
        threads(count)
        made, slot, apart = weight.clone(), empty_slot(), empty_slot()
        arguments = {"lr": 0.1, "weight_decay": 0.1, "rounding": "stochastic", "sq_norm": slot}
        ops.embedding_sgd_(made, index, grad, **arguments)
        ops.embedding_sq_norm_(apart, index, grad)
        results.append((made, slot, apart))
    for result in results[1:]:
        for actual, wanted in zip(result, results[0], strict=True):
            assert_same_bits(actual, wanted)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_every_update_bumps_the_version_counter(requires_grad):
    weight = torch.ones(5, 4, requires_grad=requires_grad)
    for _ in range(2):
        version = weight._version
        ops.embedding_sgd_(weight, torch.tensor([1]), torch.ones(1, 4), lr=0.1)
        assert weight._version > version
    loss = (torch.ones(5, 4, requires_grad=True) * weight).sum()
    ops.embedding_sgd_(weight, torch.tensor([1]), torch.ones(1, 4), lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_tiled_form_reads_nothing_from_the_device():
    """On meta tensors what the host would have to wait for, a number or a size, is an error."""
    with torch.device("meta"):
        weight, slot = torch.empty(500, 300), torch.empty(1, dtype=torch.float64)
        indices = [torch.empty(4, 7, dtype=torch.int32), torch.empty(900, dtype=torch.int64)]
        grads = [torch.empty(*i.shape, 300, dtype=torch.bfloat16) for i in indices]
    sgd("tiled", weight, indices, grads, [-1, 3], lr=0.1, weight_decay=0.1, sq_norm=slot)
    sq_norm("tiled", slot, indices, grads, [-1, 3])


@pytest.mark.parametrize("on_gpu", [False, True])
def test_tiles_of_the_tiled_form(monkeypatch, on_gpu):
    """Many tiles of rows, and of columns for the norm; where the buffer is used again, nothing is left in it."""
    monkeypatch.setattr(tiled, "_may_be_read", lambda device: not on_gpu)
    monkeypatch.setattr(tiled, "TILE_BYTES", 4 * 20 * 7)
    monkeypatch.setattr(tiled, "LEAST_ROWS", 1)
    weight, index, grad = problem(100, 20, 300, torch.bfloat16)
    grad[index == 4] = math.nan  # padding
    for _ in range(2):
        slot, apart = empty_slot(), empty_slot()
        check("tiled", weight, [index], [grad], [4], lr=0.1, weight_decay=0.1, rounding="stochastic", sq_norm=slot)
        sq_norm("tiled", apart, [index], [grad], [4])
        exact = oracle.squares(gradient(100, [index], [grad], [4])[0])
        oracle.assert_close_sum(slot, exact)
        oracle.assert_close_sum(apart, exact)


# ---- Bad input ------------------------------------------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=name_of)
@pytest.mark.parametrize("bad", [-1, -(2**31), 6, 2**31 - 1])
def test_an_index_out_of_range_is_refused_and_changes_nothing(dtype, bad):
    weight, slot = torch.ones(6, 5), empty_slot(1.0)
    index = torch.tensor([[0, 1, 2], [3, bad, 4]], dtype=dtype)
    grad = torch.ones(2, 3, 5)
    for indices, grads in ((index, grad), ([index[0], index[1]], [grad[0], grad[1]])):
        arguments = {"lr": 0.1, "weight_decay": 0.1, "sq_norm": slot}
        words = f"indices … {bad} … >= 0 … < 6 … rows"
        for found_inf in (None, 1.0):
            call = functools.partial(ops.embedding_sgd_, weight, indices, grads, **arguments, found_inf=found_inf)
            refused(call, [weight, slot], RuntimeError, words, "embedding_sgd_")
    if bad < 0:
        words = f"indices … {bad} … >= 0"
        refused(lambda: ops.embedding_sq_norm_(slot, index, grad), [slot], RuntimeError, words, "embedding_sq_norm_")


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_tiled_form_leaves_out_tokens_out_of_range(monkeypatch, on_gpu):
    monkeypatch.setattr(tiled, "_may_be_read", lambda device: not on_gpu)
    weight = oracle.ordinary(60, torch.float32).view(6, 10)
    index, grad = torch.tensor([0, -1, 5, 6, 2**40, -(2**40), 5]), oracle.ordinary(70, torch.float32, 1).view(7, 10)
    inside = torch.tensor([0, 2, 6])
    made = weight.clone()
    sgd("tiled", made, [index], [grad], [-1], lr=0.1)
    assert_same_bits(made, expected_of("tiled", weight, [index[inside]], [grad[inside]], [-1], lr=0.1))


BAD = {
    "indices of float32": ({"indices": torch.ones(3)}, TypeError, "indices … float32 … int64 or int32"),
    "indices of int16": ({"indices": torch.ones(3).short()}, TypeError, "indices … int16 … int64 or int32"),
    "indices are a number": ({"indices": 3}, TypeError, "indices … 3 … list"),
    "indices of another shape": ({"indices": torch.ones(4).long()}, ValueError, "indices … [4] … grad_output … [3, 5]"),
    "indices on meta": ({"indices": torch.ones(3, device="meta").long()}, ValueError, "indices … meta … cpu"),
    "no indices": ({"indices": [], "grad_output": []}, ValueError, "indices … empty … one tensor per use"),
    "two indices for one grad_output": (
        {"indices": [torch.ones(3).long()] * 2},
        TypeError,
        "one of indices and grad_output … two lists",
    ),
    "grad_output of float64": ({"grad_output": torch.ones(3, 5).double()}, TypeError, "grad_output … float64"),
    "grad_output is a number": ({"grad_output": torch.ones(())}, ValueError, "grad_output … [] … embedding_dim"),
    "grad_output of another width": ({"grad_output": torch.ones(3, 4)}, ValueError, "weight … [6, 5] … [any, 4]"),
    "grad_outputs of two widths": (
        {"indices": [torch.ones(3).long()] * 2, "grad_output": [torch.ones(3, 5), torch.ones(3, 4)]},
        ValueError,
        "embedding_dim … one embedding",
    ),
    "weight of float64": ({"weight": torch.ones(6, 5).double()}, TypeError, "weight … float64 … float32"),
    "weight is a list": ({"weight": [1.0]}, TypeError, "weight … list … tensor"),
    "weight of one dimension": ({"weight": torch.ones(5)}, ValueError, "weight … [5] … [any, 5]"),
    "padding_idx is negative": ({"padding_idx": -1}, ValueError, "padding_idx … -1 … >= 0"),
    "padding_idx is a float": ({"padding_idx": 1.0}, TypeError, "padding_idx … float … int"),
    "lr is missing": ({"lr": None}, TypeError, "lr … None … number"),
    "clip_value is zero": ({"clip_value": 0.0}, ValueError, "clip_value … 0.0 … > 0"),
    "unknown rounding": ({"rounding": "up"}, ValueError, "rounding … up … nearest … stochastic … split"),
    "slot of float32": ({"sq_norm": torch.zeros(1)}, ValueError, "sq_norm … float32 … float64"),
}
SHARED_MEMORY = {
    "expanded weight": ({"weight": torch.ones(1, 5).expand(6, 5)}, RuntimeError, "weight … memory"),
    "overlapping weight": ({"weight": torch.ones(10).as_strided((6, 5), (1, 1))}, RuntimeError, "weight … memory"),
}


@pytest.mark.parametrize("name", BAD | (SHARED_MEMORY if COMPILED else {}))
def test_bad_input_is_refused_and_changes_nothing(name):
    change, exception, words = (BAD | SHARED_MEMORY)[name]
    good = {"weight": torch.ones(6, 5), "indices": torch.tensor([0, 3, 3]), "grad_output": torch.ones(3, 5)}
    good |= {"lr": 0.1, "weight_decay": 0.1, "sq_norm": empty_slot(1.0)}
    arguments = good | change
    tensors = [arguments["weight"], arguments["sq_norm"]]
    refused(lambda: ops.embedding_sgd_(**arguments), tensors, exception, words, "embedding_sgd_")
    if set(change) <= {"indices", "grad_output", "padding_idx"} and "weight" not in words:
        pairs = {key: value for key, value in arguments.items() if key in ("indices", "grad_output", "padding_idx")}
        slot = arguments["sq_norm"]
        refused(lambda: ops.embedding_sq_norm_(slot, **pairs), [slot], exception, words, "embedding_sq_norm_")


@compiled_only
def test_a_weight_that_shares_memory_with_a_gradient_is_refused():
    whole = torch.ones(12, 5)
    index = torch.tensor([0, 3, 3])
    words = "weight and a factor of its gradient share memory"
    for grads in ([whole[2:5]], [torch.ones(3, 5), whole[5:8]], [whole[5, :1].expand(3, 5)]):
        call = functools.partial(ops.embedding_sgd_, whole[:6], [index] * len(grads), grads, lr=0.1)
        refused(call, [whole], RuntimeError, words, "embedding_sgd_")
        scalars, paddings = vector("test", whole.device, {"lr": 0.1}), [-1] * len(grads)
        raw = (whole[:6], [index] * len(grads), grads, paddings, scalars, None, 0, False, 0, 0, [])
        call = functools.partial(OPS.embedding_update_.default, *raw)
        refused(call, [whole], RuntimeError, "weight and grad_output share memory", "embedding_update_")
    ops.embedding_sgd_(whole[:6], index, whole[6:9], lr=0.1)
    assert (whole[3] != 1).all()


def test_padding_beyond_the_rows_and_mixed_lists_are_refused():
    weight, index, grad = torch.ones(4, 3), torch.tensor([1, 2]), torch.ones(2, 3)
    with pytest.raises(ValueError, match="padding_idx is 4, expected a row of weight, < 4"):
        ops.embedding_sgd_(weight, index, grad, padding_idx=4, lr=0.1)
    with pytest.raises(TypeError, match="one of indices and grad_output is a tensor and one is not"):
        ops.embedding_sgd_(weight, [index], grad, lr=0.1)
    with pytest.raises(TypeError, match="one of input and grad_output is a tensor and one is not"):
        ops.linear_sgd_(weight, grad, [torch.ones(2, 4)], lr=0.1)
    assert torch.equal(weight, torch.ones(4, 3))


RAW = {
    "weight of float64": ({"weight": torch.ones(6, 5).double()}, "weight … Double … Float"),
    "weight of one dimension": ({"weight": torch.ones(5)}, "weight … [5] … [num_embeddings, embedding_dim]"),
    "weight of another width": ({"weight": torch.ones(6, 4)}, "weight … [6, 4] … [num_embeddings, 5]"),
    "grad_output of float64": ({"grads": [torch.ones(3, 5).double()]}, "grad_output … Double … Float"),
    "indices of float32": ({"indices": [torch.ones(3)]}, "indices … Float … Long"),
    "indices of another shape": ({"indices": [torch.ones(4).long()]}, "indices … [4] … grad_output … [3, 5]"),
    "grad_output with no dimension": ({"grads": [torch.ones(())]}, "indices … [3] … grad_output … []"),
    "lists of different lengths": ({"grads": [torch.ones(3, 5)] * 2}, "1 indices, 2 grad_output … one each"),
    "too few padding_idx": ({"padding": []}, "0 padding_idx … one each"),
    "no pairs": ({"indices": [], "grads": [], "padding": []}, "indices … empty … one tensor per use"),
    "uses of two embeddings": (
        {"indices": [torch.ones(3).long()] * 2, "grads": [torch.ones(3, 5), torch.ones(3, 4)], "padding": [-1, -1]},
        "embedding_dim … 5 and 4 … one embedding",
    ),
    "slot of float32": ({"sq_norm": torch.zeros(1)}, "sq_norm … Float … Double"),
    "scalars of int64": ({"scalars": torch.ones(7).long()}, "scalars … Long … 7 … Double"),
    "no such rule": ({"rule": 99}, "rule is 99"),
    "shard of two numbers": ({"shard": [0, 1]}, "shard has 2 numbers"),
}


@compiled_only
@pytest.mark.parametrize("name", RAW)
def test_bad_input_to_the_operator_itself(name):
    change, words = RAW[name]
    good = {"weight": torch.ones(6, 5), "indices": [torch.tensor([0, 3, 3])], "grads": [torch.ones(3, 5)]}
    good |= {"scalars": vector("test", torch.device("cpu"), {"lr": 0.1}), "rule": 0, "shard": []}
    a = good | {"padding": [-1], "sq_norm": empty_slot()} | change
    pairs = (a["indices"], a["grads"], a["padding"])
    tail = (a["scalars"], a["sq_norm"], a["rule"], False, 0, 0, a["shard"])
    call = functools.partial(OPS.embedding_update_.default, a["weight"], *pairs, *tail)
    refused(call, [a["weight"], a["sq_norm"]], RuntimeError, words, "embedding_update_")
    if not {"weight", "scalars", "rule", "shard"} & set(change):
        words = words.replace("sq_norm", "slot")
        call = functools.partial(OPS.embedding_sq_norm_.default, a["sq_norm"], *pairs, None)
        refused(call, [a["sq_norm"]], RuntimeError, words, "embedding_sq_norm_")


# ---- Any call -------------------------------------------------------------------------------------------------------

optional = st.none() | st.floats(1e-45, 1e30)


@every_form
@given(data=st.data())
def test_any_call_equals_the_reference(form, data):
    rows, dim = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 200) | st.just(4097))
    make = data.draw(st.sampled_from([oracle.values, oracle.ordinary]))
    seed = data.draw(st.integers(0, 2**20))
    looked_up = data.draw(st.integers(1, rows))  # few rows: many duplicates
    indices, grads, padding = [], [], []
    for use in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.lists(st.integers(0, 6), max_size=3))
        tokens = math.prod(shape)
        index = random_indices(looked_up, tokens, seed + use, data.draw(st.sampled_from([torch.int64, torch.int32])))
        indices.append(index.view(shape))
        dtype = data.draw(st.sampled_from(DTYPES))
        grads.append(make(tokens * dim, dtype, seed + 10 + use).view(*shape, dim))
        padding.append(data.draw(st.integers(-1, rows - 1)))
    weight = make(rows * dim, data.draw(st.sampled_from(DTYPES)), seed).view(rows, dim)
    int64 = st.integers(-(2**63), 2**63 - 1)
    arguments = {
        "lr": data.draw(st.floats(0, 1e10)),
        "weight_decay": data.draw(st.just(0.0) | st.floats(0, 10)),
        "inv_scale": data.draw(optional),
        "clip_value": data.draw(optional),
        "clip_coef": data.draw(st.none() | st.floats(0, 1)),
        "rounding": data.draw(st.sampled_from(ROUNDINGS)),
        "seed": data.draw(int64),
        "parameter_id": data.draw(int64),
        "step": data.draw(int64),
    }
    given_ = {name: value for name, value in arguments.items() if value is not None}
    slot, apart = empty_slot(), empty_slot()
    made = weight.clone()
    sgd(form, made, indices, grads, padding, **arguments, sq_norm=slot)
    assert_same_bits(made, expected_of(form, weight, indices, grads, padding, **given_), arguments)
    sq_norm(form, apart, indices, grads, padding, arguments["inv_scale"])
    exact = oracle.squares(gradient(rows, indices, grads, padding)[0], arguments["inv_scale"])
    for norm in (slot, apart):
        if math.isfinite(exact):
            oracle.assert_close_sum(norm, exact)
        else:
            assert not norm.isfinite()
