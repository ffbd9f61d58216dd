"""The contract of `sq_norm_` and `sq_norm_list_`: within 1e-6 of float64 for every finite gradient, and repeatable."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support.oracle import DTYPES, SIZES, assert_close_sum, assert_same_bits, name_of

from lomo_kernels import backends, ops, reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
PLAIN_TORCH = backends.choice("CPU").backend == "reference"


def slot_on(device, value=0.0):
    return torch.tensor([value], dtype=torch.float64, device=device)


def norm_of(grad, device="cpu", **arguments):
    """What `sq_norm_` adds to an empty slot."""
    slot = slot_on(device)
    ops.sq_norm_(slot, grad.to(device), **arguments)
    return slot


# ---- Accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@every_dtype
def test_every_size_and_alignment(device, dtype, size):
    grad = oracle.ordinary(size, dtype)
    expected = oracle.squares(grad)
    first = norm_of(grad, device)
    assert_close_sum(first, expected)
    for offset in (1, 3, 5):
        part, _ = oracle.misaligned(grad.to(device), offset)
        assert_same_bits(norm_of(part, device), first.cpu())


def test_the_reference_is_close_too():
    for dtype in DTYPES:
        for size in (0, 1, 4097):
            grad = oracle.ordinary(size, dtype)
            assert_close_sum(reference.sum_of_squares(grad, 0.3), oracle.squares(grad, 0.3))


def adversarial(kind, n, dtype):
    """Gradients on which a careless sum is wrong."""
    info = torch.finfo(dtype)
    big = {torch.float32: 1e20, torch.bfloat16: 1e20, torch.float16: 6e4}[dtype]
    tiny = {torch.float32: 1e-25, torch.bfloat16: 1e-25, torch.float16: 6e-8}[dtype]
    grad = torch.zeros(n, dtype=dtype)
    if kind == "all_equal":
        return grad.fill_(0.1)
    if kind == "all_big":
        return grad.fill_(big)
    if kind == "all_tiny":
        return grad.fill_(tiny)
    if kind == "all_largest":
        return grad.fill_(info.max)
    if kind == "all_smallest_subnormal":
        return grad.fill_(info.smallest_normal * info.eps)
    if kind == "big_and_tiny":
        grad[0::2], grad[1::2] = big, tiny
    if kind == "one_big":
        grad.fill_(tiny)[n // 3] = big
    if kind == "one_one_and_many_small":  # added one by one in float32 to 1, each of the others is lost
        grad.fill_(2.0**-13 if dtype != torch.float16 else 2.0**-12)[0] = 1.0
    if kind == "blocks_of_every_size":  # neighbouring blocks' sums are not comparable
        exponents = torch.arange(n) // 512 % (60 if dtype != torch.float16 else 20)
        return (oracle.ordinary(n, torch.float32) * torch.exp2(10.0 - exponents)).to(dtype)
    return grad


KINDS = (
    "all_equal",
    "all_big",
    "all_tiny",
    "all_largest",
    "all_smallest_subnormal",
    "big_and_tiny",
    "one_big",
    "one_one_and_many_small",
    "blocks_of_every_size",
)


@pytest.mark.parametrize("size", [5, 1000, 3_000_001])
@pytest.mark.parametrize("kind", KINDS)
@every_dtype
def test_adversarial_gradients(device, dtype, kind, size):
    grad = adversarial(kind, size, dtype)
    assert_close_sum(norm_of(grad, device), oracle.squares(grad))


@every_dtype
def test_zeros_give_exactly_zero(device, dtype):
    for size in (1, 4097, 3_000_001):
        zeros = torch.zeros(size, dtype=dtype)
        assert norm_of(zeros, device).item() == norm_of(-zeros, device).item() == 0.0


@pytest.mark.parametrize("value", [1e20, 1e-25, 3e38, 1e-45, 1e-19, 2.0**-75, 1.8446743e19], ids=str)
def test_single_values_of_any_size(device, value):
    """Squares in float32 overflow from 1.8e19 on, and lose bits below 1e-19."""
    for size in (1, 2, 513):
        grad = torch.full((size,), value)
        assert_close_sum(norm_of(grad, device), oracle.squares(grad))


@pytest.mark.parametrize("inv_scale", [2.0**-16, 1 / 3, 7.0, 1e-30, 1e30], ids=str)
@every_dtype
def test_inv_scale(device, dtype, inv_scale):
    """The product with the gradient is rounded to float32 before it is squared."""
    grad = oracle.ordinary(4097, dtype)
    expected = norm_of(grad, device, inv_scale=inv_scale)
    assert_close_sum(expected, oracle.squares(grad, inv_scale))
    as_tensor = norm_of(grad, device, inv_scale=torch.tensor(inv_scale, dtype=torch.float64, device=device))
    assert_same_bits(as_tensor, expected.cpu())
    short = torch.tensor([inv_scale], dtype=torch.float32, device=device)
    assert_same_bits(norm_of(grad, device, inv_scale=short), norm_of(grad, device, inv_scale=short.item()).cpu())


def test_the_scaled_gradient_is_rounded_before_it_is_squared(device):
    grad, inv_scale = torch.full((1,), 2.0**-140 + 2.0**-149), 2.0**-9  # 2**-149 + 2**-158 is 2**-149 in float32
    assert norm_of(grad, device, inv_scale=inv_scale).item() == 2.0**-298


# ---- What is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 17, 512, 70001])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@every_dtype
def test_a_gradient_that_is_not_finite_shows_in_the_slot(device, dtype, value, size):
    for place in sorted({0, size // 2, size - 1}):
        grad = oracle.ordinary(size, dtype)
        grad[place] = value
        assert not norm_of(grad, device).isfinite()
        assert not norm_of(grad, device, inv_scale=1e-60).isfinite()  # zero in float32, and infinity times zero


def test_a_scaled_gradient_that_overflows_shows_in_the_slot(device):
    grad = torch.full((100,), 3e38)
    assert norm_of(grad, device).isfinite() and norm_of(grad, device, inv_scale=1.1).isfinite()
    assert not norm_of(grad, device, inv_scale=1.2).isfinite()


@pytest.mark.parametrize("times", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_nothing_finite_makes_the_slot_infinite(device, dtype, times):
    grad = oracle.all_patterns(dtype)
    grad = grad[grad.isfinite()].repeat(times)
    assert_close_sum(norm_of(grad, device), oracle.squares(grad))


# ---- The slot -------------------------------------------------------------------------------------------------------


@every_dtype
def test_the_slot_accumulates(device, dtype):
    grad = oracle.ordinary(70001, dtype)
    alone = norm_of(grad, device)
    slot = slot_on(device, 0.1)
    for _ in range(3):
        before = slot.clone()
        ops.sq_norm_(slot, grad.to(device))
        assert_same_bits(slot, (before + alone).cpu())


def test_the_slot_may_be_a_view(device):
    vector = torch.arange(5, dtype=torch.float64, device=device)
    ops.sq_norm_(vector[2:3], torch.full((4,), 3.0, device=device))
    ops.sq_norm_(vector[4], torch.full((1,), 2.0, device=device))
    assert vector.tolist() == [0.0, 1.0, 38.0, 3.0, 8.0]


def test_the_gradient_is_left_alone(device):
    grad = oracle.grad_of(70001, torch.float16).to(device)
    before, version = grad.clone(), grad._version
    ops.sq_norm_(slot_on(device), grad, inv_scale=0.5)
    assert_same_bits(grad, before.cpu())
    assert grad._version == version


# ---- Repeatable -----------------------------------------------------------------------------------------------------


@every_dtype
def test_neither_threads_nor_runs_change_a_bit(threads, dtype):
    grad = oracle.ordinary(700001, dtype)
    strided = oracle.ordinary(700001, dtype)[::3]
    results = []
    for count in (1, 2, 3, 3, 2, 1):
        threads(count)
        results.append((norm_of(grad), norm_of(strided)))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("layout", ["transposed", "every_second", "channels_last", "expanded", "negative"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4, 36, 16, 33)], ids=["small", "large"])
def test_layouts(device, shape, layout):
    grad = oracle.ordinary(math.prod(shape), torch.float32).view(shape).to(device)
    if layout == "transposed":
        grad = grad.permute(3, 1, 0, 2)
    elif layout == "every_second":
        grad = grad[:, 1::2, :, ::3]
    elif layout == "channels_last":
        grad = grad.to(memory_format=torch.channels_last)
    elif layout == "expanded":
        grad = grad[:, :1, :, :1].expand(shape)
    elif layout == "negative":
        grad = torch.view_as_complex(torch.stack([grad, grad], -1)).conj().imag
        assert grad.is_neg()
    assert not grad.is_contiguous()
    result = norm_of(grad, device)
    assert_close_sum(result, oracle.squares(grad.resolve_neg()))
    if not PLAIN_TORCH:
        assert_same_bits(result, norm_of(grad.contiguous(), device).cpu())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (3, 0)], ids=str)
def test_shapes_with_one_or_no_element(device, shape):
    assert norm_of(torch.full(shape, 3.0), device).item() == (0.0 if 0 in shape else 9.0)


# ---- The list form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inv_scale", [None, 0.3])
def test_the_list_form_equals_single_calls(device, inv_scale):
    sizes = [5, 0, 1, 513, 70001, 4097, 33, 2, 16]
    grads = [oracle.ordinary(n, DTYPES[i % 3], i).to(device) for i, n in enumerate(sizes)]
    grads[3], grads[4] = grads[3].view(27, 19).t(), grads[4][::2]
    apart = torch.ones(len(grads), dtype=torch.float64, device=device)
    for i, grad in enumerate(grads):
        ops.sq_norm_(apart[i], grad, inv_scale=inv_scale)
    vector, slots = torch.ones_like(apart), list(torch.ones_like(apart).split(1))
    ops.sq_norm_list_(vector, grads, inv_scale=inv_scale)
    ops.sq_norm_list_(slots, grads, inv_scale=inv_scale)
    assert_same_bits(vector, apart.cpu())
    assert_same_bits(torch.cat(slots), apart.cpu())


def test_an_empty_list_does_nothing(device):
    ops.sq_norm_list_([], [])
    ops.sq_norm_list_(torch.zeros(0, dtype=torch.float64, device=device), [])


def test_one_slot_may_stand_for_several_gradients(device):
    slot = slot_on(device)
    ops.sq_norm_list_([slot] * 3, [torch.full((2,), float(v), device=device) for v in (1, 2, 3)])
    assert slot.item() == 28.0


# ---- Bad input ------------------------------------------------------------------------------------------------------

#: Name: (arguments that replace good ones, exception, parts of the message in their order).
BAD = {
    "slot is no tensor": ({"slot": 0.0}, TypeError, "slot … float … float64"),
    "slot of float32": ({"slot": torch.zeros(1)}, ValueError, "slot … float32 … float64"),
    "slot of two elements": ({"slot": torch.zeros(2).double()}, ValueError, "slot … [2] … one"),
    "slot of no element": ({"slot": torch.zeros(0).double()}, ValueError, "slot … [0] … one"),
    "slot on meta": ({"slot": torch.zeros(1, device="meta").double()}, ValueError, "slot … meta … cpu"),
    "grad is missing": ({"grad": None}, TypeError, "grad … NoneType … tensor"),
    "grad of float64": ({"grad": torch.ones(3).double()}, TypeError, "grad … float64 … float32, bfloat16 or float16"),
    "grad of int64": ({"grad": torch.ones(3).long()}, TypeError, "grad … int64 … float32"),
    "sparse grad": ({"grad": torch.ones(3).to_sparse()}, ValueError, "grad … sparse_coo … dense"),
    "grad on meta": ({"grad": torch.ones(3, device="meta")}, ValueError, "slot … cpu … meta"),
    "inv_scale is zero": ({"inv_scale": 0.0}, ValueError, "inv_scale … 0.0 … > 0"),
    "inv_scale is negative": ({"inv_scale": -1.0}, ValueError, "inv_scale … -1.0 … > 0"),
    "inv_scale is NaN": ({"inv_scale": math.nan}, ValueError, "inv_scale … nan … > 0"),
    "inv_scale is infinite": ({"inv_scale": math.inf}, ValueError, "inv_scale … inf … finite"),
    "inv_scale is a string": ({"inv_scale": "1"}, TypeError, "inv_scale … str … number"),
    "inv_scale of two elements": ({"inv_scale": torch.ones(2)}, ValueError, "inv_scale … [2] … one"),
    "inv_scale of int64": ({"inv_scale": torch.ones(1).long()}, TypeError, "inv_scale … int64 … float64 or float32"),
    "inv_scale on meta": ({"inv_scale": torch.ones(1, device="meta")}, ValueError, "inv_scale … meta … cpu"),
}
BAD_LISTS = {
    "fewer slots": (1, 2, ValueError, "1 slots … 2 grads"),
    "more slots": (3, 2, ValueError, "3 slots … 2 grads"),
    "no grads": (2, 0, ValueError, "2 slots … 0 grads"),
}


@pytest.mark.parametrize("form", ["single", "list"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_changes_nothing(name, form):
    change, exception, words = BAD[name]
    arguments = {"slot": slot_on("cpu", 1.0), "grad": torch.ones(3)} | change
    slot, grad = arguments.pop("slot"), arguments.pop("grad")
    others = [slot_on("cpu", 1.0), slot_on("cpu", 1.0)]
    with pytest.raises(exception, match=oracle.in_order("sq_norm_", words)):
        if form == "single":
            ops.sq_norm_(slot, grad, **arguments)
        else:
            ops.sq_norm_list_([others[0], slot, others[1]], [torch.ones(2), grad, torch.ones(2)], **arguments)
    assert others[0].item() == others[1].item() == 1.0
    if "slot" not in change:
        assert slot.item() == 1.0


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists_are_refused_and_change_nothing(name):
    slots, grads, exception, words = BAD_LISTS[name]
    vector = torch.ones(slots, dtype=torch.float64)
    with pytest.raises(exception, match=oracle.in_order("sq_norm_list_", words)):
        ops.sq_norm_list_(vector, [torch.ones(3)] * grads)
    assert (vector == 1).all()


#: Name: (slot, grad, inv_scale), two of them in lists, of `torch.ops.lomo_kernels.sq_norm_.default`.
RAW = {
    "slot of float32": (torch.zeros(1), torch.ones(3), None),
    "slot of no element": (torch.zeros(0).double(), torch.ones(3), None),
    "slot of two elements": (torch.zeros(2).double(), torch.ones(3), None),
    "grad of float64": (torch.zeros(1).double(), torch.ones(3).double(), None),
    "grad of int32": (torch.zeros(1).double(), torch.ones(3).int(), None),
    "sparse grad": (torch.zeros(1).double(), torch.ones(3).to_sparse(), None),
    "inv_scale of no element": (torch.zeros(1).double(), torch.ones(3), torch.ones(0)),
    "inv_scale of two elements": (torch.zeros(1).double(), torch.ones(3), torch.ones(2)),
    "inv_scale of int64": (torch.zeros(1).double(), torch.ones(3), torch.ones(1).long()),
}


@pytest.mark.parametrize(
    ("slots", "grads", "words"),
    [
        (None, [torch.ones(3)], "slots … None"),
        (torch.zeros(()).double(), [torch.ones(3)], "slots"),
        (torch.zeros(1).double(), None, "grads … None"),
        (torch.zeros(1).double(), torch.tensor(1.0), "grads"),
    ],
    ids=["no slots", "slots without a dimension", "no grads", "grads without a dimension"],
)
def test_what_is_no_list_is_refused(slots, grads, words):
    with pytest.raises(TypeError, match=oracle.in_order("sq_norm_list_", words, "expected a list")):
        ops.sq_norm_list_(slots, grads)


@pytest.mark.skipif(PLAIN_TORCH, reason="plain torch has only the wrappers' checks")
@pytest.mark.parametrize("name", RAW)
def test_the_raw_operator_refuses_bad_input(name):
    """Whoever calls torch.ops directly gets an exception, not a crash."""
    slot, grad, inv_scale = RAW[name]
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.lomo_kernels.sq_norm_.default([slot], [grad], inv_scale)
    assert (slot == 0).all()


@pytest.mark.skipif(PLAIN_TORCH, reason="plain torch has only the wrappers' checks")
def test_the_raw_operator_refuses_lists_of_different_lengths():
    with pytest.raises(RuntimeError, match="sq_norm_"):
        torch.ops.lomo_kernels.sq_norm_.default([torch.zeros(1).double()], [torch.ones(3)] * 2, None)


# ---- Anything -------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_any_finite_gradient(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    n = data.draw(st.integers(0, 3000))
    seed = data.draw(st.integers(0, 2**20))
    grad = oracle.ordinary(n, dtype, seed) if data.draw(st.booleans()) else oracle.patterns(n, dtype, seed)
    if data.draw(st.booleans()):
        grad = (grad.float() * data.draw(st.sampled_from([1e-40, 1e-25, 1e-10, 1e10, 1e20, 1e38]))).to(dtype)
    grad = torch.where(grad.isfinite(), grad, torch.zeros((), dtype=dtype))[:: data.draw(st.integers(1, 3))]
    inv_scale = data.draw(st.none() | st.floats(1e-20, 1.0))
    expected = oracle.squares(grad, inv_scale)
    slot = norm_of(grad, inv_scale=inv_scale)
    assert_close_sum(slot, expected)
    assert_same_bits(norm_of(grad, inv_scale=inv_scale), slot)
