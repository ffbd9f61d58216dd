"""What a call writes shares no memory with what else it takes: refused with nothing changed, and only then."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomo_kernels import Lomo, backends, ops
from lomo_kernels.ops import _overlap
from lomo_kernels.ops._overlap import Access
from lomo_kernels.ops.scalars import vector

RAW = torch.ops.lomo_kernels

SIZE = 48  # elements of the memory that views are taken of


def places(tensor):
    """Bytes that the elements lie in, one by one."""
    address = tensor.storage_offset() + sum(
        torch.arange(n).view(-1, *[1] * (tensor.dim() - d - 1)) * stride
        for d, (n, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    )
    size = tensor.element_size()
    return {size * int(place) + byte for place in torch.as_tensor(address).flatten() for byte in range(size)}


@st.composite
def views(draw, memory, *, disjoint):
    """A view of at most three dimensions, with gaps; where not `disjoint`, its elements may share places."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    strides, span = [], 0
    for n in shape:
        least = span + 1 if disjoint else 0
        strides.append(draw(st.integers(least, least + 5)))
        span += strides[-1] * (n - 1)
    offset = draw(st.integers(0, max(0, memory.numel() - 1 - span)))
    if offset + span >= memory.numel():
        return memory[:1]
    order = draw(st.permutations(range(len(shape))))
    return memory.as_strided([shape[d] for d in order], [strides[d] for d in order], offset)


@given(st.data())
def test_two_views_share_memory_where_they_have_a_byte_in_common(data):
    memory = torch.zeros(SIZE)
    a = data.draw(views(memory, disjoint=True))
    b = data.draw(views(data.draw(st.sampled_from([memory, memory.view(torch.int16)])), disjoint=False))
    region_a, region_b = _overlap.region(a, Access.WRITTEN, "a"), _overlap.region(b, Access.READ, "b")
    assert _overlap.share_memory(region_a, region_b) == _overlap.share_memory(region_b, region_a)
    assert _overlap.share_memory(region_a, region_b) == bool(places(a) & places(b))


@given(st.data())
@settings(max_examples=100)
def test_lists_are_refused_where_they_overlap_and_only_there(data):
    memory = torch.ones(SIZE)
    params = [data.draw(views(memory, disjoint=True)) for _ in range(data.draw(st.integers(1, 3)))]
    grads = [torch.full(param.shape, 0.5) for param in params]
    if data.draw(st.booleans()):  # a gradient in the memory that parameters lie in
        grads[-1] = data.draw(views(memory, disjoint=False))
        params[-1] = torch.ones(grads[-1].shape)
        written = [places(param) for param in params[:-1]]
        overlap = bool(places(grads[-1]) & set().union(*written))
    else:
        written = [places(param) for param in params]
        overlap = False
    overlap = overlap or len(set().union(*written)) < sum(map(len, written))
    before = memory.clone()
    if overlap:
        with pytest.raises(RuntimeError, match="share memory"):
            ops.sgd_list_(params, grads, lr=0.25)
        assert torch.equal(memory, before)
        return
    expected = [param - 0.25 * grad for param, grad in zip(params, grads, strict=True)]
    ops.sgd_list_(params, grads, lr=0.25)
    for param, wanted in zip(params, expected, strict=True):
        assert torch.equal(param, wanted)


def slots_in(memory):
    return memory.view(torch.float64)


def cases(memory):
    """Name: (call with overlap in `memory`, parts of its message)."""
    slot = slots_in(memory)[:1]
    x, gy, weight = memory[:12].view(3, 4), torch.ones(3, 5), torch.ones(5, 4)
    index = torch.zeros(3, dtype=torch.int64)
    lr, ones = {"lr": 0.1}, torch.ones
    other = ones(4)
    return {
        "a strided view twice": (lambda: ops.sgd_list_([memory[::2], memory[::2]], [ones(32)] * 2, **lr), "two params"),
        "columns that overlap": (
            lambda: ops.sgd_list_([memory.view(8, 8)[:, :5], memory.view(8, 8)[:, 4:]], [ones(8, 5), ones(8, 4)], **lr),
            "two params",
        ),
        "a gradient in another parameter": (
            lambda: ops.sgd_list_([memory[:4], other], [ones(4), memory[2:6]], **lr),
            "param and grad",
        ),
        "a slot in the parameter": (lambda: ops.sgd_(memory[:4], ones(4), sq_norm=slot, **lr), "param and sq_norm"),
        "a slot in the gradient": (lambda: ops.sgd_(other, memory[:4], sq_norm=slot, **lr), "sq_norm and grad"),
        "a slot in another's parameter": (
            lambda: ops.sgd_list_([other, memory[:8]], [ones(4), ones(8)], sq_norm=slots_in(memory)[2:4], **lr),
            "param and sq_norm",
        ),
        "a norm's slot in its gradient": (lambda: ops.sq_norm_(slot, memory[:4]), "slot and grad"),
        "a norm's slot in another gradient": (
            lambda: ops.sq_norm_list_(slots_in(memory)[:2], [ones(4), memory[2:6]]),
            "slot and grad",
        ),
        "a linear norm's slot": (lambda: ops.linear_sq_norm_(slot, x, gy), "slot and a factor"),
        "a linear update's slot": (lambda: ops.linear_sgd_(weight, x, gy, sq_norm=slot, **lr), "sq_norm and a factor"),
        "a linear update's factor": (
            lambda: ops.linear_sgd_(memory[8:28].view(5, 4), x, gy, **lr),
            "weight and a factor",
        ),
        "an embedding's slot": (
            lambda: ops.embedding_sgd_(weight, index, x, sq_norm=slot, **lr),
            "sq_norm and a factor",
        ),
        "an embedding norm's slot": (lambda: ops.embedding_sq_norm_(slot, index, x), "slot and a factor"),
        "a norm's scale": (lambda: ops.sq_norm_(slot, ones(4), inv_scale=memory[1]), "slot and inv_scale"),
        "a scale of a list of norms": (
            lambda: ops.sq_norm_list_(slots_in(memory)[:2], [ones(4)] * 2, inv_scale=memory[3]),
            "slot and inv_scale",
        ),
        "a linear norm's scale": (
            lambda: ops.linear_sq_norm_(slot, x.clone(), gy, inv_scale=memory[0]),
            "slot and inv_scale",
        ),
        "an embedding norm's scale": (
            lambda: ops.embedding_sq_norm_(slot, index, ones(3, 4), inv_scale=memory[0]),
            "slot and inv_scale",
        ),
        "an embedding's indices": (
            lambda: ops.embedding_sgd_(memory[:20].view(5, 4), memory[:6].view(torch.int64), ones(3, 4), **lr),
            "weight and a factor",
        ),
    }


@pytest.mark.parametrize("name", cases(torch.ones(64)))
def test_overlap_is_refused_and_changes_nothing(name):
    memory = torch.ones(64)
    call, words = cases(memory)[name]
    with pytest.raises(RuntimeError, match=f"{words}.* share memory"):
        call()
    assert (memory == 1).all()


@pytest.mark.skipif(backends.choice("CPU").backend != "cpu", reason="csrc/overlap.h is compiled into the CPU library")
@pytest.mark.parametrize("begin", range(0, 46))
def test_factors_next_to_the_elements_of_a_strided_parameter(begin):
    """Vectors of factors and of sums have elements of 4 and of 8 bytes."""
    memory, none, ones = torch.ones(SIZE), torch.empty(0), torch.full((3, 1), 0.5)
    scalars = vector("test", memory.device, {"lr": 0.1})
    matrix, vectors = memory.as_strided((3, 1), (13, 2), 9), memory[begin : begin + 3]
    sums = torch.zeros(1, 1, dtype=torch.float64)
    calls = [
        (vectors, lambda: RAW.factored_update_(matrix, ones, vectors, none, scalars, 0, False, 0, 0, [])),
    ]
    if begin % 2 == 0 and begin + 6 <= SIZE:
        wide = memory[begin : begin + 6].view(torch.float64)
        calls.append((wide, lambda: RAW.factor_sums_(wide, sums, matrix, scalars)))
    for others, call in calls:
        before = memory.clone()
        if places(matrix) & places(others):
            with pytest.raises(RuntimeError, match="share memory"):
                call()
            assert torch.equal(memory, before)
        else:
            call()
            assert not torch.equal(memory, before)


def test_columns_of_one_matrix_are_fine(device):
    whole = torch.ones(40, 64, device=device)
    params = [whole[:, 8 * i : 8 * i + 8] for i in range(8)]
    ops.sgd_list_(params, [torch.full((40, 8), float(i), device=device) for i in range(8)], lr=0.25)
    assert torch.equal(whole, (1 - 0.25 * torch.arange(8.0, device=device)).repeat_interleave(8).expand(40, 64))
    ops.sgd_(whole[:, ::2], whole[:, 1::2], lr=0.25)


def test_scalars_between_what_is_written_are_fine(device):
    memory = torch.full((12,), 0.25, device=device)
    slots = torch.ones(3, dtype=torch.float64, device=device)
    params = [memory[:8:2], memory[9:]]
    ones = [torch.ones_like(param) for param in params]
    ops.sgd_list_(params, ones, lr=memory[1], weight_decay=memory[8], clip_coef=slots[1], sq_norm=slots[::2])
    assert torch.equal(memory[[0, 2, 4, 6, 9, 10, 11]], torch.full((7,), 0.25 * (1 - 0.0625) - 0.25, device=device))
    assert slots.tolist() == [5, 1, 4]


def test_scalars_are_read_before_anything_is_written(device):
    def updated(apart):
        """What the memory holds after updates whose scalars lie in it, or are copies."""
        memory = torch.arange(1.0, 65.0, device=device) / 64
        ones, x, gy = (torch.ones(shape, device=device) for shape in ((4,), (3, 4), (3, 5)))
        slots = memory[40:48].view(torch.float64).fill_(0.5)
        index = torch.tensor([0, 2, 2], device=device)
        own = torch.clone if apart else lambda scalar: scalar
        ops.sgd_(memory[:4], ones, lr=own(memory[3]))
        ops.sgd_(memory[:4], ones, lr=0.25, sq_norm=slots[:1], found_inf=own(slots[0]))
        ops.sgd_list_(
            [memory[:4], memory[40:48]], [ones, torch.ones(8, device=device)], lr=0.1, clip_coef=own(slots[1])
        )
        keys = {"rounding": "stochastic", "step": own(memory[10:12].view(torch.int64))}
        halves = memory[8:16].view(torch.bfloat16)
        ops.sgd_(halves[::2], torch.ones(8, device=device), lr=0.1, **keys)
        low = memory[48:50].view(torch.int16)
        ops.sgd_(memory[50:52].view(torch.bfloat16), ones, lr=own(memory[49]), low=low, rounding="split")
        ops.linear_sgd_(memory[16:36].view(5, 4), x, gy, lr=own(memory[35]))
        ops.embedding_sgd_(memory[16:36].view(5, 4), index, x, lr=0.1, weight_decay=own(memory[16]))
        return memory

    assert torch.equal(updated(apart=False), updated(apart=True))


def test_one_slot_and_one_gradient_may_serve_several(device):
    params, grad = list(torch.ones(3, 5, device=device)), torch.ones(5, device=device)
    slot = torch.zeros(1, dtype=torch.float64, device=device)
    ops.sgd_list_(params, [grad] * 3, lr=0.25, sq_norm=[slot] * 3)
    assert slot.item() == 15


def test_the_optimizer_takes_columns_of_one_matrix_and_no_column_twice():
    whole = torch.ones(4, 6)
    columns = [torch.nn.Parameter(whole[:, i : i + 2]) for i in range(0, 6, 2)]
    Lomo(columns, lr=0.1).remove()
    with pytest.raises(ValueError, match="parameter 0 and parameter 3 share memory"):
        Lomo([*columns, torch.nn.Parameter(whole[:, 1:3])], lr=0.1)
