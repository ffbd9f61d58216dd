"""The contract of `sgd_` and `sgd_list_`: on every backend the bits of the reference, which are those of the oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support.oracle import ARGUMENTS, DTYPES, KEYS, ROUNDINGS, SIZES, assert_same_bits, name_of, reference_arguments

from lomo_kernels import backends, numbers, ops, reference
from lomo_kernels.ops.scalars import vector

PLAIN_TORCH = backends.choice("CPU").backend == "reference"
SIXTEEN = (torch.bfloat16, torch.float16)

every_param = pytest.mark.parametrize("param_dtype", DTYPES, ids=name_of)
every_grad = pytest.mark.parametrize("grad_dtype", DTYPES, ids=name_of)
every_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)


def slot_on(device, value=0.0):
    return torch.tensor([value], dtype=torch.float64, device=device)


def check(param, grad, *what, device="cpu", **arguments):
    """Runs `sgd_` on a copy of `param` and compares with the reference; returns the result."""
    p = param.to(device, copy=True)
    ops.sgd_(p, grad.to(device), **arguments)
    assert_same_bits(p, reference.updated(param, grad, **reference_arguments(arguments)), *what)
    return p


# ---- Bits: sizes, alignments, arguments, values ---------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@every_rounding
@every_grad
@every_param
def test_every_size_and_alignment(device, param_dtype, grad_dtype, rounding, size):
    mixed = oracle.param_of(size, param_dtype), oracle.grad_of(size, grad_dtype)
    ordinary = oracle.ordinary(size, param_dtype), oracle.ordinary(size, grad_dtype, 1)  # may take shorter ways
    plain = {"lr": 0.03, "weight_decay": 0.1, "clip_coef": 0.7, "rounding": rounding}
    for (param, grad), arguments in [(mixed, plain), (ordinary, plain | {"inv_scale": 0.3, "clip_value": 0.9})]:
        expected = reference.updated(param, grad, **reference_arguments(arguments))
        for p_offset, g_offset in [(0, 0), (1, 0), (0, 3), (3, 5)]:
            p, surroundings = oracle.misaligned(param.to(device), p_offset)
            g, _ = oracle.misaligned(grad.to(device), g_offset)
            ops.sgd_(p, g, **arguments)
            assert_same_bits(p, expected, p_offset, g_offset)
            outside = torch.cat([surroundings[:p_offset], surroundings[p_offset + size :]])
            assert (outside == 7.0).all(), "memory beside the parameter was written"


@pytest.mark.parametrize("name", ARGUMENTS)
@every_rounding
@every_grad
@every_param
def test_every_argument(device, param_dtype, grad_dtype, rounding, name):
    param, grad = oracle.param_of(4097, param_dtype), oracle.grad_of(4097, grad_dtype)
    check(param, grad, device=device, rounding=rounding, **ARGUMENTS[name])
    param, grad = oracle.ordinary(1000, param_dtype), oracle.ordinary(1000, grad_dtype, 1)
    check(param, grad, device=device, rounding=rounding, **ARGUMENTS[name])


@pytest.mark.parametrize("key", KEYS)
@every_param
def test_every_key_of_the_random_bits(device, param_dtype, key):
    param, grad = oracle.param_of(4097, param_dtype), oracle.grad_of(4097, torch.float32)
    check(param, grad, device=device, lr=0.03, rounding="stochastic", **KEYS[key])


@pytest.mark.parametrize("key", [key for key in KEYS if key != "none"])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=name_of)
def test_every_key_changes_the_random_bits(device, dtype, key):
    param, grad = oracle.ordinary(4097, dtype), oracle.ordinary(4097, torch.float32, 1)
    common = {"device": device, "lr": 0.03, "rounding": "stochastic"}
    results = [check(param, grad, **common, **KEYS[k]) for k in ("none", key)]
    assert not torch.equal(*results)


@every_rounding
@every_grad
@every_param
def test_reference_and_operator_equal_the_oracle(device, param_dtype, grad_dtype, rounding):
    quiet = {2: 0x40, 4: 0x400000}[param_dtype.itemsize] if param_dtype != torch.float16 else 0x200
    keys = list(KEYS.values())
    for i, (name, arguments) in enumerate(ARGUMENTS.items()):
        param, grad = oracle.param_of(160, param_dtype, i), oracle.grad_of(160, grad_dtype, i)
        arguments = {k: v for k, v in arguments.items() if k != "found_inf"} | keys[i % len(keys)]
        expected = oracle.updated_bits(param, grad, **arguments, rounding=rounding)
        made = reference.updated(param, grad, **arguments, stochastic=rounding == "stochastic")
        p = param.to(device, copy=True)
        ops.sgd_(p, grad.to(device), **arguments, rounding=rounding)
        for result in (made, p.cpu()):
            for j, (actual, wanted) in enumerate(zip(oracle.unsigned(result), expected, strict=True)):
                if wanted is None:
                    assert result[j].isnan() and actual & quiet, (name, j, hex(actual))
                else:
                    assert actual == wanted, (name, j, param[j], grad[j], hex(actual), hex(wanted))


@every_rounding
@pytest.mark.parametrize("grad_dtype", SIXTEEN, ids=name_of)
@pytest.mark.parametrize("param_dtype", SIXTEEN, ids=name_of)
def test_all_65536_parameters_and_gradients(device, param_dtype, grad_dtype, rounding):
    param = oracle.all_patterns(param_dtype)
    for seed, arguments in enumerate([{"lr": 1.0}, {"lr": 0.03, "weight_decay": 0.1, "clip_value": 3.0}]):
        grad = oracle.all_patterns(grad_dtype, seed)
        check(param, grad, device=device, **arguments, rounding=rounding, step=seed)


@every_param
def test_numbers_and_tensors_mean_the_same(device, param_dtype):
    param, grad = oracle.param_of(1000, param_dtype), oracle.grad_of(1000, torch.float32)
    for arguments in ARGUMENTS.values():
        for dtype in (torch.float64, torch.float32):
            tensors = {k: torch.tensor(v, dtype=dtype, device=device) for k, v in arguments.items()}
            shaped = {k: v.view(1) for k, v in tensors.items()}
            numbers = {k: float(v) for k, v in tensors.items()}  # a float32 tensor is widened first
            expected = check(param, grad, device=device, **numbers)
            for given_ in (tensors, shaped):
                p = param.to(device, copy=True)
                ops.sgd_(p, grad.to(device), **given_)
                assert_same_bits(p, expected.cpu(), arguments, dtype)


@pytest.mark.parametrize("step", [0, 1, 2**40, -1])
def test_step_may_be_a_tensor(device, step):
    param, grad = oracle.param_of(1000, torch.bfloat16).to(device), oracle.grad_of(1000, torch.float32).to(device)
    as_number, as_tensor, shaped = param.clone(), param.clone(), param.clone()
    ops.sgd_(as_number, grad, lr=0.03, rounding="stochastic", step=step)
    ops.sgd_(as_tensor, grad, lr=0.03, rounding="stochastic", step=torch.tensor(step, device=device))
    ops.sgd_(shaped, grad, lr=0.03, rounding="stochastic", step=torch.tensor([step], device=device))
    assert_same_bits(as_tensor, as_number.cpu())
    assert_same_bits(shaped, as_number.cpu())


def test_arguments_that_are_not_given_change_no_bit(device):
    param, grad = oracle.param_of(5000, torch.float32), oracle.grad_of(5000, torch.float32)
    plain = check(param, grad, device=device, lr=0.03)
    given_ = {"weight_decay": 0.0, "inv_scale": 1.0, "clip_value": math.inf, "clip_coef": 1.0, "found_inf": 0.0}
    assert_same_bits(check(param, grad, device=device, lr=0.03, **given_), plain.cpu())


# ---- Rounding -------------------------------------------------------------------------------------------------------


def around_every_boundary(dtype):
    """float32 numbers on, just below and just above every value of `dtype` and every midpoint between two."""
    exact = oracle.all_patterns(dtype).float()
    exact = exact[exact.isfinite()]
    half_a_step = {torch.bfloat16: 0x8000, torch.float16: 0x1000}[dtype]
    middle = (exact.view(torch.int32) + half_a_step).view(torch.float32)
    if dtype == torch.float16:  # its subnormals are 2**-24 apart
        middle = torch.where(exact.abs() < 2.0**-14, exact + exact.sign() * 2.0**-25, middle)
    near = torch.cat([exact, middle])
    return torch.cat([near, near.nextafter(torch.tensor(math.inf)), near.nextafter(torch.tensor(-math.inf))])


@pytest.mark.parametrize("dtype", SIXTEEN, ids=name_of)
def test_nearest_rounding_is_ieee(device, dtype):
    x = torch.cat([around_every_boundary(dtype), oracle.patterns(2**18, torch.float32)])
    x = x[~x.isnan()]
    rounded = reference.round_bfloat16(x) if dtype == torch.bfloat16 else reference.round_float16(x)
    assert_same_bits(rounded, x.to(dtype))
    p = torch.zeros(x.numel(), dtype=dtype, device=device)  # 0 - 1 * -x is x, but for the sign of zero
    x = x[x.isfinite() & (x != 0)]
    p = p[: x.numel()]
    ops.sgd_(p, -x.to(device), lr=1.0)
    assert_same_bits(p, x.to(dtype))


@pytest.mark.parametrize("dtype", SIXTEEN, ids=name_of)
def test_stochastic_rounding_of_the_reference_equals_the_oracle(dtype):
    width = 16 if dtype == torch.bfloat16 else 32
    x = around_every_boundary(dtype)
    pick = torch.randperm(x.numel(), generator=oracle.generator(5))[:1500]
    ends = torch.tensor([65504.0, 65519.0, 65519.996, 65520.0, 65535.0, 65536.0, 1e5, 3.39e38, 3.4e38, 2.0**-33, 1e-40])
    x = torch.cat([x[pick], ends, -ends, oracle.patterns(500, torch.float32)])
    x = x[~x.isnan()]
    rounding = reference.round_bfloat16 if dtype == torch.bfloat16 else reference.round_float16
    top = 2**width - 1
    draws = torch.randint(0, 2**width, (x.numel(),), generator=oracle.generator(6))
    for random in (torch.zeros_like(draws), torch.full_like(draws, top), torch.full_like(draws, top // 2), draws):
        made = oracle.unsigned(rounding(x, random))
        pairs = zip(x.tolist(), random.tolist(), strict=True)
        assert made == [oracle.rounded(v, oracle.FORMATS[dtype], r) for v, r in pairs]


@pytest.mark.parametrize("dtype", SIXTEEN, ids=name_of)
def test_stochastic_rounding_near_overflow(device, dtype):
    """Never infinite where nearest is finite; the largest finite number may be drawn where nearest is infinite."""
    largest = torch.finfo(dtype).max
    unit = largest - torch.full((), largest, dtype=dtype).nextafter(torch.zeros((), dtype=dtype)).double().item()
    fraction = torch.linspace(-1.5, 1.5, 60001)
    param = torch.where(torch.arange(60001) % 2 == 0, largest, -largest).to(dtype)
    grad = -(fraction * unit) * param.float().sign()
    near = check(param, grad, device=device, lr=1.0)
    drawn = check(param, grad, device=device, lr=1.0, rounding="stochastic")
    assert near.isinf().any() and near.isfinite().any()
    assert not (drawn.isinf() & near.isfinite()).any()


@pytest.mark.parametrize("scale", [1.0, 2.0**-12, 2.0**-20, 2.0**-26], ids=["one", "small", "subnormal", "tiny"])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=name_of)
def test_stochastic_rounding_is_unbiased(device, dtype, scale):
    n = 10**6
    target = 1.2345678 * scale
    p = torch.zeros(n, dtype=dtype, device=device)
    ops.sgd_(p, torch.full((n,), -target, device=device), lr=1.0, rounding="stochastic", seed=11)
    drawn = p.double()
    target = torch.tensor(target).double()
    low, high = drawn.min(), drawn.max()
    assert low <= target <= high and drawn.unique().numel() == 2
    standard_error = ((target - low) * (high - target)).sqrt() / math.sqrt(n)
    assert (drawn.mean() - target).abs() < 4 * standard_error


def correlation(first, second):
    """Of two float64 tensors of numbers uniform in [-0.5, 0.5), in standard errors."""
    return float((first * second).mean()) * 12 * math.sqrt(first.numel())


def drawn(counter, seed=0, parameter_id=0, step=0):
    return reference.random_bits(numbers.stream_key(seed, parameter_id, step), counter).double() / 2**32 - 0.5


LAGS = [1, 2, 16, 64, 768, 1024, 4096, 11008, 12288, 16384, 2**32]


@pytest.mark.parametrize("lag", LAGS)
def test_random_bits_of_elements_apart_are_uncorrelated(lag):
    """Neighbours, and elements above each other in rows of usual lengths."""
    counter = torch.arange(2**18)
    here, there = (torch.cat([drawn(c, seed=s) for s in range(4)]) for c in (counter, counter + lag))
    assert abs(correlation(here, there)) < 4


@pytest.mark.parametrize("other", [1, 2, 2**32, -1], ids=str)
@pytest.mark.parametrize("key", ["seed", "parameter_id", "step"])
def test_random_bits_of_different_keys_are_uncorrelated(key, other):
    counter = torch.arange(2**20)
    assert abs(correlation(drawn(counter), drawn(counter, **{key: other}))) < 4


def test_random_bits_are_uniform():
    """As 32 bits, and as the two halves that serve bfloat16 elements; the halves know nothing of each other."""
    n = 2**20
    whole = reference.random_bits(numbers.stream_key(0, 0, 0), torch.arange(n))
    low, high = (whole & 0xFFFF).double() / 2**16 - 0.5, (whole >> 16).double() / 2**16 - 0.5
    for half in (low, high):
        assert abs(half.mean()) < 4 / math.sqrt(12 * n)
        counts = torch.histc(half, 256, -0.5, 0.5)
        assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 4 * math.sqrt(2 * 255)
    assert abs(correlation(low, high)) < 4


#: (seed, parameter id, step, counter): random bits.
FROZEN = {
    (0, 0, 0, 0): 0x7EB4C6F2,
    (1, 2, 3, 4): 0x4CBA1900,
    (-1, 0, 2**40, 2**32 - 1): 0x32F86B93,
    (-1, 0, 2**40, 2**32): 0xE1C8183B,
    (2**62, 2**33, -7, 2**40 + 12345): 0x0237A4BB,
}
FROZEN_KEY = 0x238275BC38FCBE91


def test_the_hash_is_frozen():
    """A resumed run must draw what it would have drawn, with any later version: these numbers never change."""
    assert oracle.mix64(0) == numbers.mix64(0) == 0xE220A8397B1DCDAF  # SplitMix64's first output from state 0
    assert numbers.stream_key(0, 0, 0) == FROZEN_KEY
    for (seed, parameter_id, step, counter), expected in FROZEN.items():
        stream = numbers.stream_key(seed, parameter_id, step)
        assert reference.random_bits(stream, torch.tensor([counter])).tolist() == [expected]
        assert oracle.hashed(seed, parameter_id, step, counter) == expected


# ---- What is not finite, and found_inf ------------------------------------------------------------------------------


@every_rounding
@every_param
def test_an_element_with_a_gradient_that_is_not_finite_keeps_its_parameter(device, param_dtype, rounding):
    sixteen = param_dtype != torch.float32
    param = oracle.all_patterns(param_dtype) if sixteen else oracle.patterns(2**16, torch.float32)
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        for grad_dtype in DTYPES:
            grad = torch.full((2**16,), bad, dtype=grad_dtype)
            arguments = {"lr": 0.03, "weight_decay": 0.1, "clip_value": 1.0, "clip_coef": 0.0, "rounding": rounding}
            p = check(param, grad, device=device, **arguments)
            assert_same_bits(p, param, bad)
    p = check(param, torch.full((2**16,), 3e38), device=device, lr=0.03, inv_scale=10.0, rounding=rounding)
    assert_same_bits(p, param, "the scaled gradient overflows")


@every_param
def test_a_gradient_that_is_not_finite_leaves_its_neighbours_alone(device, param_dtype):
    param, grad = oracle.ordinary(4097, param_dtype), oracle.ordinary(4097, torch.float32, 1)
    usual = check(param, grad, device=device, lr=0.03).cpu()
    for i in (0, 15, 16, 4095, 4096):
        for bad in (math.nan, math.inf):
            hurt = grad.clone()
            hurt[i] = bad
            expected = usual.clone()
            expected[i] = param[i]
            assert_same_bits(check(param, hurt, device=device, lr=0.03, found_inf=0.0), expected, i, bad)


@every_param
def test_no_clip_value_hides_an_overflow(device, param_dtype):
    """The finiteness of the scaled gradient is taken before the clamp, which would make infinity ordinary."""
    param = oracle.ordinary(64, param_dtype)
    p = check(param, torch.full((64,), math.inf), device=device, lr=1.0, clip_value=0.5)
    assert_same_bits(p, param)


@pytest.mark.parametrize("flag", [1.0, 0.5, math.inf, math.nan, -1.0], ids=str)
@every_rounding
@every_param
def test_found_inf_leaves_every_bit(device, param_dtype, rounding, flag):
    param, grad = oracle.param_of(70001, param_dtype), oracle.ordinary(70001, torch.float32)
    for dtype in (torch.float32, torch.float64):
        p, slot = param.to(device, copy=True), slot_on(device, 3.0)
        found_inf = torch.tensor(flag, dtype=dtype, device=device)
        ops.sgd_(p, grad.to(device), lr=0.03, weight_decay=0.1, found_inf=found_inf, sq_norm=slot, rounding=rounding)
        assert_same_bits(p, param)
        oracle.assert_close_sum(slot - 3.0, oracle.squares(grad))  # the norm is added all the same


@pytest.mark.parametrize("flag", [1, 1.0, 2.5, math.inf], ids=str)
def test_found_inf_may_be_a_number(device, flag):
    param = oracle.param_of(100, torch.float32)
    p = param.to(device, copy=True)
    ops.sgd_(p, torch.ones(100, device=device), lr=0.03, found_inf=flag)
    assert_same_bits(p, param)


@every_rounding
@every_param
@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip_coef"])
def test_a_scalar_that_is_any_nan_makes_nan(device, name, param_dtype, rounding):
    """Tensors are not read by the host. A NaN of all bits must not round to zero, as a carry would make it."""
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).to(device)
    scalars = {"lr": 0.5} | {name: nan}
    param = oracle.ordinary(200, param_dtype).to(device)
    ops.sgd_(param, torch.ones_like(param), rounding=rounding, **scalars)
    assert param.isnan().all()


def test_negative_zero_is_no_found_inf(device):
    param, grad = oracle.ordinary(100, torch.float32), oracle.ordinary(100, torch.float32, 1)
    p = param.to(device, copy=True)
    ops.sgd_(p, grad.to(device), lr=0.03, found_inf=torch.tensor(-0.0, device=device))
    assert_same_bits(p, reference.updated(param, grad, lr=0.03))


@every_grad
@every_param
def test_subnormal_numbers_are_kept(device, param_dtype, grad_dtype):
    """Neither a subnormal parameter, nor a subnormal gradient, nor a subnormal difference of the two becomes zero."""
    param, grad = oracle.subnormals(4097, param_dtype), oracle.subnormals(4097, grad_dtype).flip(0)
    kept = check(param, torch.zeros_like(grad), device=device, lr=1.0)
    assert_same_bits(kept, param)
    for rounding in ROUNDINGS:
        moved = check(param, grad, device=device, lr=1.0, rounding=rounding)
        check(param, grad, device=device, lr=0.3, inv_scale=0.7, rounding=rounding)
        assert (moved != 0).float().mean() > 0.5
    alone = check(torch.zeros(4097), grad, device=device, lr=1.0)
    assert_same_bits(alone, -grad.float())


def test_operations_are_not_fused(device):
    param, grad = oracle.contraction(4097)
    check(param, grad, device=device, lr=oracle.CONTRACTION_LR, weight_decay=0.1, clip_coef=0.7)


# ---- The norm in the same pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 33, 511, 4097, 65537, 200003])
@every_rounding
@every_grad
@every_param
def test_sq_norm_in_the_same_pass(device, param_dtype, grad_dtype, rounding, size):
    """The same bits as `sq_norm_`, of the gradient before clamp and coefficient; and the update does not notice."""
    param, grad = oracle.ordinary(size, param_dtype), oracle.ordinary(size, grad_dtype, 1)
    arguments = {"lr": 0.03, "inv_scale": 0.3, "clip_value": 0.1, "clip_coef": 0.2, "rounding": rounding}
    apart, together = slot_on(device, 5.0), slot_on(device, 5.0)
    ops.sq_norm_(apart, grad.to(device), inv_scale=0.3)
    p = param.to(device, copy=True)
    ops.sgd_(p, grad.to(device), **arguments, sq_norm=together)
    assert_same_bits(together, apart.cpu())
    assert_same_bits(p, reference.updated(param, grad, **reference_arguments(arguments)))
    oracle.assert_close_sum(together, 5.0 + oracle.squares(grad, 0.3))


# ---- Strides --------------------------------------------------------------------------------------------------------


def laid_out(tensor, layout):
    """The same values in another order of memory, and the whole memory around them."""
    if layout == "transposed":
        order = list(range(tensor.dim()))[::-1]
        made = tensor.permute(order).contiguous().permute(order)
        return made, made.permute(order)
    if layout == "channels_last":
        made = tensor.contiguous(memory_format=torch.channels_last)
        return made, made.permute(0, 2, 3, 1)
    *rows, last = tensor.shape
    whole = torch.full((*rows, 2 * last + 1), 7.0, dtype=tensor.dtype, device=tensor.device)
    made = {"every_second": whole[..., 1::2], "part_of_rows": whole[..., 3 : 3 + last]}[layout]
    if layout == "every_second":
        made = made[..., :last]
    return made.copy_(tensor), whole


LAYOUTS = ("contiguous", "transposed", "channels_last", "every_second", "part_of_rows")


@every_rounding
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4, 36, 16, 33)], ids=["small", "large"])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_layouts(device, param_layout, grad_layout, shape, rounding):
    n = math.prod(shape)
    for param_dtype, grad_dtype in [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]:
        param = oracle.param_of(n, param_dtype).view(shape).to(device)
        grad = oracle.grad_of(n, grad_dtype).view(shape).to(device)
        p, whole = (param.clone(),) * 2 if param_layout == "contiguous" else laid_out(param, param_layout)
        g = grad if grad_layout == "contiguous" else laid_out(grad, grad_layout)[0]
        arguments = {"lr": 0.03, "weight_decay": 0.1, "rounding": rounding}
        sevens = int((whole == 7.0).sum() - (param == 7.0).sum())
        ops.sgd_(p, g, **arguments)
        assert_same_bits(p, reference.updated(param.cpu(), grad.cpu(), **reference_arguments(arguments)))
        assert int((whole == 7.0).sum() - (p == 7.0).sum()) == sevens, "memory between the elements was written"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (3, 1, 5), (0,), (0, 7), (7, 0)], ids=str)
def test_shapes_with_one_or_no_element_in_a_dimension(device, shape):
    n = math.prod(shape)
    for dtype in DTYPES:
        param, grad = oracle.ordinary(n, dtype).view(shape), oracle.ordinary(n, torch.float32, 1).view(shape)
        for rounding in ROUNDINGS:
            check(param, grad, device=device, lr=0.03, rounding=rounding)
    strange = torch.randn(10, device=device).as_strided((1, 4), (77, 2))  # the first stride is never used
    expected = reference.updated(strange.cpu(), torch.ones(1, 4), lr=0.03)
    ops.sgd_(strange, torch.ones(1, 4, device=device), lr=0.03)
    assert_same_bits(strange, expected)


@pytest.mark.parametrize("expanded", [(1, 1), (37, 1), (1, 500)], ids=str)
def test_expanded_gradients(device, expanded):
    """What the backward of sum() and mean() gives."""
    grad = oracle.ordinary(math.prod(expanded), torch.bfloat16).view(expanded).expand(37, 500)
    param = oracle.ordinary(37 * 500, torch.float32, 1).view(37, 500)
    check(param, grad, device=device, lr=0.03)
    slot = slot_on(device)
    ops.sq_norm_(slot, grad.to(device))
    oracle.assert_close_sum(slot, oracle.squares(grad))


def test_a_gradient_with_the_negative_bit(device):
    grad = torch.randn(1000, dtype=torch.complex64, device=device).conj().imag
    assert grad.is_neg()
    param = oracle.ordinary(1000, torch.float32)
    p = param.to(device, copy=True)
    ops.sgd_(p, grad, lr=0.03)
    assert_same_bits(p, reference.updated(param, grad.resolve_neg().cpu(), lr=0.03))


# ---- Threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_number_of_threads_changes_no_bit(threads, rounding):
    param, grad = oracle.param_of(300007, torch.bfloat16), oracle.ordinary(300007, torch.float32)
    strided = oracle.param_of(2 * 300007, torch.float16)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        p, s, slot = param.clone(), strided.clone(), slot_on("cpu")
        ops.sgd_(p, grad, lr=0.03, rounding=rounding, sq_norm=slot, shard=(3, 1001, 5003))
        ops.sgd_(s[::2], grad, lr=0.03, rounding=rounding, sq_norm=slot)
        results.append((p, s, slot))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual, expected)


# ---- Shards ---------------------------------------------------------------------------------------------------------

WHOLE = (37, 53)
#: Name: (part of the whole, shard).
PARTS = {
    "rows": [
        ((slice(a, b),), (a * 53, (b - a) * 53, (b - a) * 53)) for a, b in ((0, 10), (10, 20), (20, 30), (30, 37))
    ],
    "columns": [((slice(None), slice(a, b)), (a, b - a, 53)) for a, b in ((0, 14), (14, 28), (28, 42), (42, 53))],
    "uneven": [((slice(None), slice(a, b)), (a, b - a, 53)) for a, b in ((0, 1), (1, 2), (2, 51), (51, 53))],
    "block": [((slice(5, 30), slice(7, 24)), (5 * 53 + 7, 17, 53))],
    "one_element": [((slice(36, 37), slice(52, 53)), (36 * 53 + 52, 1, 1)), ((slice(1), slice(1)), (0, 1, 1))],
    "empty": [((slice(0, 0),), (0, 53, 53))],
}


@pytest.mark.parametrize("name", PARTS)
@every_param
def test_a_shard_equals_its_part_of_the_whole(device, param_dtype, name):
    n = math.prod(WHOLE)
    param, grad = oracle.ordinary(n, param_dtype).view(WHOLE), oracle.ordinary(n, torch.float32, 1).view(WHOLE)
    arguments = {"lr": 0.03, "weight_decay": 0.1, "rounding": "stochastic", "seed": 3, "parameter_id": 4, "step": 5}
    whole = check(param, grad, device=device, **arguments).cpu()
    parts, grads, shards = [], [], []
    for where, shard in PARTS[name]:
        local = param[where].contiguous()
        part = check(local, grad[where].contiguous(), device=device, shard=shard, **arguments)
        assert_same_bits(part.cpu(), whole[where].contiguous(), where)
        view = param.to(device, copy=True)[where]  # a shard may be a strided view, too
        ops.sgd_(view, grad.to(device)[where], shard=shard, **arguments)
        assert_same_bits(view, whole[where].contiguous(), where)
        parts, grads, shards = [*parts, local.to(device)], [*grads, grad[where].to(device)], [*shards, shard]
    arguments["parameter_id"] = [4] * len(parts)
    ops.sgd_list_(parts, grads, shard=shards, **arguments)
    for part, (where, _) in zip(parts, PARTS[name], strict=True):
        assert_same_bits(part, whole[where].contiguous(), where)


@pytest.mark.parametrize("rows", [(1, 1), (3, 3), (3, 2**32 + 1), (7, 2**33 + 2), (5000, 2**31)], ids=str)
@pytest.mark.parametrize("offset", [2**32 - 5, 2**32, 2**33 - 5, 2**33 + 1, 2**40 + 7, 2**62], ids=hex)
@pytest.mark.parametrize("dtype", SIXTEEN, ids=name_of)
def test_indices_beyond_32_bits(device, dtype, offset, rows):
    """The random bits change key at every 2**32 counters, which is every 2**33 elements for bfloat16."""
    param, grad = oracle.ordinary(1501, dtype), oracle.ordinary(1501, torch.float32, 1)
    arguments = {"lr": 0.03, "rounding": "stochastic", "seed": 3, "shard": (offset, *rows)}
    p = check(param, grad, device=device, **arguments)
    ends = [*range(20), *range(1481, 1501)]  # the oracle computes each index by itself
    expected = oracle.updated_bits(param, grad, **arguments, elements=ends)
    actual = oracle.unsigned(p)
    assert [actual[i] for i in ends] == expected


# ---- The list form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARGUMENTS)
@every_rounding
def test_the_list_form_equals_single_calls(device, rounding, name):
    sizes = [5, 0, 1, 513, 4097, 70001, 33, 2, 16]
    dtypes = [(p, g) for p in DTYPES for g in DTYPES]
    params = [oracle.param_of(n, p, i).to(device) for i, (n, (p, _)) in enumerate(zip(sizes, dtypes, strict=True))]
    grads = [oracle.grad_of(n, g, i).to(device) for i, (n, (_, g)) in enumerate(zip(sizes, dtypes, strict=True))]
    params[3], grads[4] = params[3].view(27, 19).t(), grads[4].repeat_interleave(2)[::2]
    grads[3] = grads[3].view(19, 27)
    arguments = ARGUMENTS[name] | {"rounding": rounding, "seed": 9, "step": 3}
    expected = [p.clone() for p in params]
    apart = torch.ones(len(params), dtype=torch.float64, device=device)
    for i, (p, g) in enumerate(zip(expected, grads, strict=True)):
        ops.sgd_(p, g, **arguments, sq_norm=apart[i : i + 1], parameter_id=i)
    together = torch.ones(len(params), dtype=torch.float64, device=device)
    ops.sgd_list_(params, grads, **arguments, sq_norm=together)  # ids are positions by default
    for p, e in zip(params, expected, strict=True):
        assert_same_bits(p, e.cpu())
    assert_same_bits(together, apart.cpu())


def test_the_list_form_takes_ids_shards_and_slots(device):
    params = [oracle.ordinary(n, torch.bfloat16, i).to(device) for i, n in enumerate((700, 30, 1))]
    grads = [oracle.ordinary(n, torch.float32, 9 + i).to(device) for i, n in enumerate((700, 30, 1))]
    ids, shards = [7, 2**40, 0], [(0, 7, 100), (2**33 - 3, 30, 30), (5, 1, 1)]
    slots = [slot_on(device, float(i)) for i in range(3)]
    expected = [p.clone() for p in params]
    expected_slots = [s.clone() for s in slots]
    arguments = {"lr": 0.03, "rounding": "stochastic", "seed": 1}
    for p, g, i, shard, slot in zip(expected, grads, ids, shards, expected_slots, strict=True):
        ops.sgd_(p, g, **arguments, parameter_id=i, shard=shard, sq_norm=slot)
    ops.sgd_list_(params, grads, **arguments, parameter_id=ids, shard=shards, sq_norm=slots)
    for actual, wanted in zip(params + slots, expected + expected_slots, strict=True):
        assert_same_bits(actual, wanted.cpu())


def test_an_empty_list_does_nothing(device):
    ops.sgd_list_([], [], lr=0.1)
    ops.sgd_list_([], [], lr=0.1, sq_norm=[], parameter_id=[], shard=[], rounding="stochastic")


def test_lists_may_be_any_iterable(device):
    params = [torch.ones(3, device=device), torch.ones(4, device=device)]
    grads = [torch.ones_like(p) for p in params]
    ops.sgd_list_(iter(params), (g for g in grads), lr=0.25, sq_norm=torch.zeros(2, dtype=torch.float64, device=device))
    assert all((p == 0.75).all() for p in params)


# ---- Autograd -------------------------------------------------------------------------------------------------------


def update_one(param, grad):
    ops.sgd_(param, grad, lr=0.1)


def update_list(param, grad):
    ops.sgd_list_([param], [grad], lr=0.1)


every_form = pytest.mark.parametrize("update", [update_one, update_list], ids=["single", "list"])


@every_form
@pytest.mark.parametrize("requires_grad", [False, True])
def test_every_update_bumps_the_version_counter(device, update, requires_grad):
    param = torch.ones(5, device=device, requires_grad=requires_grad)
    for _ in range(3):
        version = param._version
        update(param, torch.ones(5, device=device))
        assert param._version > version
    assert param.is_leaf and param.grad_fn is None and param.requires_grad == requires_grad


@every_form
def test_a_graph_that_saved_the_parameter_raises(device, update):
    param = torch.ones(5, device=device, requires_grad=True)
    loss = (param * param).sum()
    update(param, torch.ones(5, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_form
def test_a_view_shares_the_version_counter(device, update):
    param = torch.ones(5, 4, device=device, requires_grad=True)
    loss = (param * param).sum()
    update(param.detach()[1:3], torch.ones(2, 4, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_form
def test_inference_tensors_are_updated(device, update):
    with torch.inference_mode():
        param = torch.ones(5, device=device)
        update(param, torch.ones(5, device=device))
        assert_same_bits(param.clone(), reference.updated(torch.ones(5), torch.ones(5), lr=0.1))


def test_inside_a_post_accumulate_hook(device):
    param = torch.ones(5, device=device, requires_grad=True)
    param.register_post_accumulate_grad_hook(lambda p: ops.sgd_(p, p.grad, lr=0.25))
    (param * 2).sum().backward()
    assert (param == 0.5).all()


# ---- Bad input ------------------------------------------------------------------------------------------------------

NAN = math.nan
#: Name: (arguments that replace good ones, exception, parts of the message in their order).
BAD = {
    "param is no tensor": ({"param": [1.0]}, TypeError, "param … list … tensor"),
    "grad is missing": ({"grad": None}, TypeError, "grad … NoneType … tensor"),
    "grad of another shape": ({"grad": torch.ones(3, 4)}, ValueError, "grad … [3, 4] … param … [4, 3]"),
    "grad that would broadcast": ({"grad": torch.ones(1)}, ValueError, "grad … [1] … param … [4, 3]"),
    "grad of float64": (
        {"grad": torch.ones(4, 3).double()},
        TypeError,
        "grad … float64 … float32 … bfloat16 … float16",
    ),
    "grad of int32": ({"grad": torch.ones(4, 3).int()}, TypeError, "grad … int32 … float32"),
    "grad of complex64": ({"grad": torch.ones(4, 3).cfloat()}, TypeError, "grad … complex64 … float32"),
    "param of float64": ({"param": torch.ones(4, 3).double()}, TypeError, "param … float64 … float32"),
    "param of int16": ({"param": torch.ones(4, 3).short()}, TypeError, "param … int16 … float32"),
    "grad on meta": ({"grad": torch.ones(4, 3, device="meta")}, ValueError, "grad … meta … param … cpu"),
    "param on meta": ({"param": torch.ones(4, 3, device="meta")}, ValueError, "grad … cpu … param … meta"),
    "sparse grad": ({"grad": torch.ones(4, 3).to_sparse()}, ValueError, "grad … sparse_coo … dense"),
    "sparse param": ({"param": torch.ones(4, 3).to_sparse()}, ValueError, "param … sparse_coo … dense"),
    "expanded param": ({"param": torch.ones(1, 3).expand(4, 3)}, RuntimeError, "param … memory"),
    "overlapping param": ({"param": torch.ones(6).as_strided((4, 3), (1, 1))}, RuntimeError, "param … memory"),
    "lr is missing": ({"lr": None}, TypeError, "lr … None … number"),
    "lr is a string": ({"lr": "0.1"}, TypeError, "lr … str … number"),
    "lr is negative": ({"lr": -0.1}, ValueError, "lr … -0.1 … >= 0"),
    "lr is NaN": ({"lr": NAN}, ValueError, "lr … nan … >= 0"),
    "lr is infinite": ({"lr": math.inf}, ValueError, "lr … inf … finite"),
    "lr has two elements": ({"lr": torch.ones(2)}, ValueError, "lr … [2] … one"),
    "lr has no element": ({"lr": torch.ones(0)}, ValueError, "lr … [0] … one"),
    "lr of int64": ({"lr": torch.ones(1).long()}, TypeError, "lr … int64 … float64 … float32"),
    "lr of bfloat16": ({"lr": torch.ones(1).bfloat16()}, TypeError, "lr … bfloat16 … float64 … float32"),
    "lr on meta": ({"lr": torch.ones(1, device="meta")}, ValueError, "lr … meta … cpu"),
    "weight_decay is negative": ({"weight_decay": -1.0}, ValueError, "weight_decay … -1.0 … >= 0"),
    "weight_decay is NaN": ({"weight_decay": NAN}, ValueError, "weight_decay … nan … >= 0"),
    "inv_scale is zero": ({"inv_scale": 0.0}, ValueError, "inv_scale … 0.0 … > 0"),
    "inv_scale is negative": ({"inv_scale": -1.0}, ValueError, "inv_scale … -1.0 … > 0"),
    "inv_scale is infinite": ({"inv_scale": math.inf}, ValueError, "inv_scale … inf … finite"),
    "inv_scale is NaN": ({"inv_scale": NAN}, ValueError, "inv_scale … nan … > 0"),
    "clip_value is zero": ({"clip_value": 0.0}, ValueError, "clip_value … 0.0 … > 0"),
    "clip_value is negative": ({"clip_value": -1.0}, ValueError, "clip_value … -1.0 … > 0"),
    "clip_value is NaN": ({"clip_value": NAN}, ValueError, "clip_value … nan … > 0"),
    "clip_coef is negative": ({"clip_coef": -1.0}, ValueError, "clip_coef … -1.0 … >= 0"),
    "clip_coef is NaN": ({"clip_coef": NAN}, ValueError, "clip_coef … nan … >= 0"),
    "clip_coef is infinite": ({"clip_coef": math.inf}, ValueError, "clip_coef … inf … finite"),
    "found_inf is NaN": ({"found_inf": NAN}, ValueError, "found_inf … nan"),
    "found_inf is a bool tensor": (
        {"found_inf": torch.ones(1).bool()},
        TypeError,
        "found_inf … bool … float64 … float32",
    ),
    "slot is no tensor": ({"sq_norm": 0.0}, TypeError, "sq_norm … float … float64"),
    "slot of float32": ({"sq_norm": torch.zeros(1)}, ValueError, "sq_norm … float32 … float64"),
    "slot of two elements": ({"sq_norm": torch.zeros(2).double()}, ValueError, "sq_norm … [2] … one"),
    "slot on meta": ({"sq_norm": torch.zeros(1, device="meta").double()}, ValueError, "sq_norm … meta … cpu"),
    "unknown rounding": ({"rounding": "up"}, ValueError, "rounding … up … nearest … stochastic … split"),
    "rounding is None": ({"rounding": None}, ValueError, "rounding … None … nearest … stochastic … split"),
    "seed is a float": ({"seed": 1.0}, TypeError, "seed … float … int"),
    "seed of 65 bits": ({"seed": 2**64}, ValueError, "seed … 18446744073709551616 … 64"),
    "step is a float": ({"step": 1.0}, TypeError, "step … float … int"),
    "step of 65 bits": ({"step": -(2**64)}, ValueError, "step … 64"),
    "step tensor of float32": ({"step": torch.ones(1)}, ValueError, "step … float32 … int64"),
    "step tensor of two": ({"step": torch.ones(2).long()}, ValueError, "step … [2] … one … int64"),
    "step tensor on meta": ({"step": torch.ones(1, device="meta").long()}, ValueError, "step … meta … cpu"),
}
BAD_SINGLE = {
    "parameter_id is a string": ({"parameter_id": "weight"}, TypeError, "parameter_id … str … int"),
    "parameter_id of 65 bits": ({"parameter_id": 2**63}, ValueError, "parameter_id … 64"),
    "shard is a number": ({"shard": 3}, (TypeError, ValueError), "shard"),
    "shard of two numbers": ({"shard": (0, 1)}, ValueError, "shard … (0, 1) … offset, row_length, row_stride"),
    "shard of four numbers": ({"shard": (0, 1, 1, 1)}, ValueError, "shard … offset, row_length, row_stride"),
    "shard of floats": ({"shard": (0.0, 1, 1)}, TypeError, "shard … float … int"),
    "shard before the whole": ({"shard": (-1, 3, 3)}, ValueError, "shard … -1 … offset … >= 0"),
    "shard without rows": ({"shard": (0, 0, 3)}, ValueError, "shard … row_length … > 0"),
    "shard whose rows overlap": ({"shard": (0, 3, 2)}, ValueError, "shard … row_stride >= row_length"),
    "shard beyond 64 bits": ({"shard": (2**63 - 1, 1, 1)}, ValueError, "shard"),
    "shard whose last row is beyond 64 bits": ({"shard": (0, 3, 2**62)}, ValueError, "shard"),
}


def applicable(table):
    return [name for name in table if not (PLAIN_TORCH and name in SHARED_MEMORY)]


def refused(call, tensors, exception, words, op="sgd_"):
    """`call` raises, its message has these words in this order, and no tensor has changed. `op`: the wrapper; what the
    operator under it refuses begins with the operator's name."""
    dense = [t for t in tensors if isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta]
    kept = [(t, t._version, t.clone()) for t in dense]
    with pytest.raises(exception, match=oracle.in_order("", words)) as raised:
        call()
    assert str(raised.value).startswith((op, op.replace("sgd_", "update_")))
    for tensor, version, before in kept:
        assert tensor._version == version and torch.equal(tensor, before)


#: Where elements share memory is seen by the kernels; plain torch refuses part of it, in its own words.
SHARED_MEMORY = ("expanded param", "overlapping param", "a parameter and its alias")


@pytest.mark.parametrize("name", applicable(BAD | BAD_SINGLE))
def test_bad_input_is_refused_and_changes_nothing(name):
    change, exception, words = (BAD | BAD_SINGLE)[name]
    good = {"param": torch.ones(4, 3), "grad": torch.ones(4, 3), "lr": 0.1, "sq_norm": torch.ones(1).double()}
    arguments = good | change
    param, grad = arguments.pop("param"), arguments.pop("grad")
    tensors = [param, grad, arguments["sq_norm"]]
    refused(lambda: ops.sgd_(param, grad, **arguments), tensors, exception, words)


@pytest.mark.parametrize("name", applicable(BAD))
def test_bad_input_in_a_list_is_refused_and_changes_nothing(name):
    change, exception, words = BAD[name]
    good = {"param": torch.ones(4, 3), "grad": torch.ones(4, 3), "lr": 0.1, "sq_norm": torch.ones(1).double()}
    arguments = good | change
    params = [torch.ones(5), arguments.pop("param"), torch.ones(2)]
    grads = [torch.ones(5), arguments.pop("grad"), torch.ones(2)]
    slots = [torch.ones(1).double(), arguments.pop("sq_norm"), torch.ones(1).double()]
    refused(lambda: ops.sgd_list_(params, grads, sq_norm=slots, **arguments), params + grads + slots, exception, words)


def lists(**change):
    """Good arguments of `sgd_list_` for two parameters, some replaced."""
    return {"params": [torch.ones(2), torch.ones(3)], "grads": [torch.ones(2), torch.ones(3)], "lr": 0.1} | change


TWICE = torch.ones(3)
#: Name: (arguments, exception, parts of the message in their order).
BAD_LISTS = {
    "fewer grads": (lists(grads=[torch.ones(2)]), ValueError, "1 … grads … 2 … params"),
    "more grads": (lists(grads=[torch.ones(2)] * 3), ValueError, "3 … grads … 2 … params"),
    "no grads": (lists(grads=[]), ValueError, "0 … grads … 2 … params"),
    "params is None": (lists(params=None), (TypeError, ValueError), "params"),
    "params hold no tensor": (lists(params=[1.0, torch.ones(3)]), TypeError, "param … float … tensor"),
    "fewer slots": (lists(sq_norm=torch.zeros(1).double()), ValueError, "1 … sq_norm … 2 … params"),
    "slots without a dimension": (lists(sq_norm=torch.zeros(()).double()), (TypeError, ValueError), "sq_norm"),
    "fewer ids": (lists(parameter_id=[0]), ValueError, "1 … parameter_id … 2 … params"),
    "ids are one number": (lists(parameter_id=3), (TypeError, ValueError), "parameter_id"),
    "an id is a string": (lists(parameter_id=[0, "b"]), TypeError, "parameter_id … str … int"),
    "fewer shards": (lists(shard=[(0, 1, 1)]), ValueError, "1 … shard … 2 … params"),
    "a bad shard": (lists(shard=[(0, 1, 1), (0, 2, 1)]), ValueError, "shard … row_stride"),
    "one shard for all": (lists(shard=(0, 1, 1)), (TypeError, ValueError), "shard"),
    "a parameter twice": (lists(params=[TWICE, TWICE], grads=[torch.ones(3)] * 2), ValueError, "params … twice"),
    "a parameter and its alias": (
        lists(params=[TWICE, TWICE.detach()], grads=[torch.ones(3)] * 2),
        (ValueError, RuntimeError),
        "params",
    ),
}


@pytest.mark.parametrize("name", applicable(BAD_LISTS))
def test_bad_lists_are_refused_and_change_nothing(name):
    arguments, exception, words = BAD_LISTS[name]
    tensors = [*(arguments["params"] or []), *arguments["grads"], arguments.get("sq_norm")]
    refused(lambda: ops.sgd_list_(**arguments), tensors, exception, words)


@pytest.mark.skipif(PLAIN_TORCH, reason="plain torch may read what it writes")
def test_a_gradient_in_the_parameters_memory_is_refused():
    memory = torch.ones(12)
    for param, grad in [(memory, memory), (memory[:8], memory[4:]), (memory[::2], memory[:6])]:
        refused(lambda p=param, g=grad: ops.sgd_(p, g, lr=0.1), [memory], RuntimeError, "param … grad … memory")


@pytest.mark.skipif(PLAIN_TORCH, reason="plain torch may read what it writes")
@pytest.mark.parametrize("views", [(True, True), (False, True)], ids=["two transposed", "one transposed"])
def test_two_views_of_one_parameter_in_a_list_are_refused(device, views):
    whole = torch.ones(8, 8, device=device)
    params = [whole.t() if transposed else whole for transposed in views]
    params = [param.view_as(param) for param in params]  # two tensors
    with pytest.raises(RuntimeError, match="two params share memory"):
        ops.sgd_list_(params, [torch.ones(8, 8, device=device)] * 2, lr=0.25)
    assert (whole == 1).all()


def test_parts_of_one_tensor_that_do_not_overlap_are_fine(device):
    memory = torch.ones(12, device=device)
    ops.sgd_(memory[:6], memory[6:], lr=0.25)
    assert memory.tolist() == [0.75] * 6 + [1.0] * 6


VECTOR = vector("test", torch.device("cpu"), {"lr": 0.1})
#: Name: replacement for positional arguments of `torch.ops.lomo_kernels.update_.default`, for one parameter.
RAW = {
    "grad of another shape": {1: [torch.ones(9)]},
    "grad of no element": {1: [torch.ones(0)]},
    "grad of int64": {1: [torch.ones(12).long()]},
    "sparse grad": {1: [torch.ones(12).to_sparse()]},
    "float64 param": {0: [torch.ones(12).double()]},
    "scalars of six elements": {2: VECTOR[:6]},
    "scalars of no element": {2: VECTOR[:0]},
    "scalars of two dimensions": {2: VECTOR[None]},
    "scalars with gaps": {2: torch.stack([VECTOR, VECTOR], 1)[:, 0]},
    "scalars of float32": {2: VECTOR.float()},
    "scalars of int64": {2: VECTOR.long()},
    "slot of float32": {3: [torch.ones(1)]},
    "slot of no element": {3: [torch.ones(0).double()]},
    "no such rule": {4: 99},
    "a negative rule": {4: -1},
    "shard of two numbers": {8: [0, 1]},
    "shard without rows": {8: [0, 0, 0]},
    "shard whose rows overlap": {8: [0, 3, 1]},
    "shard before the whole": {8: [-1, 3, 3]},
    "low of a float32 param": {9: [torch.zeros(12).short()]},
    "low of a float16 param": {0: [torch.ones(12).half()], 9: [torch.zeros(12).short()]},
    "low of another shape": {0: [torch.ones(12).bfloat16()], 9: [torch.zeros(3, 4).short()]},
    "low of no element": {0: [torch.ones(12).bfloat16()], 9: [torch.zeros(0).short()]},
    "low of bfloat16": {0: [torch.ones(12).bfloat16()], 9: [torch.zeros(12).bfloat16()]},
    "low of int64": {0: [torch.ones(12).bfloat16()], 9: [torch.zeros(12).long()]},
    "low of expanded memory": {0: [torch.ones(12).bfloat16()], 9: [torch.zeros(1).short().expand(12)]},
    "low and stochastic": {0: [torch.ones(12).bfloat16()], 5: True, 9: [torch.zeros(12).short()]},
}


@pytest.mark.skipif(PLAIN_TORCH, reason="plain torch has only the wrappers' checks")
@pytest.mark.parametrize("name", RAW)
def test_the_raw_operator_refuses_bad_input(name):
    """Whoever calls torch.ops directly gets an exception, not a crash."""
    good = [[torch.ones(12)], [torch.ones(12)], VECTOR, [], 0, False, 0, [0], [], []]
    arguments = [RAW[name].get(i, value) for i, value in enumerate(good)]
    before = [tensor.clone() for tensor in (*arguments[0], *arguments[9])]
    with pytest.raises((RuntimeError, NotImplementedError, ValueError, TypeError)):
        torch.ops.lomo_kernels.update_.default(*arguments)
    assert all(map(torch.equal, (*arguments[0], *arguments[9]), before))


@pytest.mark.skipif(PLAIN_TORCH, reason="plain torch has only the wrappers' checks")
@pytest.mark.parametrize(
    "change",
    [
        {1: [torch.ones(3)]},
        {1: []},
        {3: [torch.ones(1).double()]},
        {7: [0]},
        {7: []},
        {8: [0, 1, 1]},
        {8: [0] * 6},
        {9: [torch.zeros(0).short()]},
    ],
    ids=str,
)
def test_the_raw_operator_refuses_bad_lists(change):
    params, grads = [torch.ones(3), torch.ones(4)], [torch.ones(3), torch.ones(4)]
    good = [params, grads, VECTOR, [], 0, False, 0, [0, 1], [], []]
    with pytest.raises(RuntimeError, match="update_"):
        torch.ops.lomo_kernels.update_.default(*[change.get(i, value) for i, value in enumerate(good)])
    assert all((p == 1).all() for p in params)


# ---- Anything -------------------------------------------------------------------------------------------------------


@st.composite
def tensors_of(draw, shape, dtype, seed):
    """A tensor of ordinary and extreme values, with any order of dimensions, steps and offset in memory."""
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    offset = draw(st.integers(0, 3))
    memory_shape = [shape[d] * steps[d] for d in order]
    memory = torch.full((offset + math.prod(memory_shape),), 7.0, dtype=dtype)
    view = memory[offset:].view(memory_shape)
    for d, original in enumerate(order):
        view = view[(slice(None),) * d + (slice(None, None, steps[original]),)]
    view = view.permute([order.index(d) for d in range(len(shape))])
    assert list(view.shape) == list(shape)
    return view.copy_(oracle.values(math.prod(shape), dtype, seed, scale=1.0).view(shape))


optional = st.none() | st.floats(1e-45, 1e30)


@given(data=st.data())
def test_any_call_equals_the_reference(data):
    shape = data.draw(st.lists(st.integers(0, 9), max_size=4) | st.lists(st.integers(1, 3000), max_size=1))
    param_dtype, grad_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    seed = data.draw(st.integers(0, 2**20))
    param = data.draw(tensors_of(shape, param_dtype, seed))
    grad = data.draw(tensors_of(shape, grad_dtype, seed + 5000))
    arguments = {
        "lr": data.draw(st.floats(0, 1e10)),
        "weight_decay": data.draw(st.just(0.0) | st.floats(0, 10)),
        "inv_scale": data.draw(optional),
        "clip_value": data.draw(optional),
        "clip_coef": data.draw(st.none() | st.floats(0, 1)),
    }
    numbers = {k: v for k, v in arguments.items() if v is not None}
    if data.draw(st.booleans()):
        numbers = {k: torch.tensor(v, dtype=torch.float32).item() for k, v in numbers.items()}
        arguments = {k: torch.tensor([v], dtype=torch.float32) for k, v in numbers.items()}
    int64 = st.integers(-(2**63), 2**63 - 1)
    keys = {
        "rounding": data.draw(st.sampled_from(ROUNDINGS)),
        "seed": data.draw(int64),
        "parameter_id": data.draw(int64),
        "step": data.draw(int64),
    }
    if data.draw(st.booleans()):
        length = data.draw(st.integers(1, 2**34))
        keys["shard"] = (data.draw(st.integers(0, 2**45)), length, length + data.draw(st.integers(0, 2**33)))
    expected = reference.updated(param, grad, **numbers, **reference_arguments(keys))
    before, version = grad.clone(), param._version
    slot = slot_on("cpu")
    ops.sgd_(param, grad, **arguments, **keys, sq_norm=slot)
    assert_same_bits(param, expected, arguments, keys)
    assert_same_bits(grad, before)
    assert param._version > version
    exact = oracle.squares(grad, numbers.get("inv_scale"))
    if math.isfinite(exact):
        oracle.assert_close_sum(slot, exact)
    else:
        assert not math.isfinite(slot.item())
