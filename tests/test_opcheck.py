"""The operators as torch sees them: schemas, fake tensors, meta tensors, torch.compile."""

import pytest
import torch
from support import oracle
from support.oracle import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from lomo_kernels import ops, reference
from lomo_kernels.ops.scalars import vector

OPS = torch.ops.lomo_kernels


def number(value, dtype=torch.float64):
    return torch.tensor([value], dtype=dtype)


def slot():
    return torch.zeros(1, dtype=torch.float64)


def tensor(n, dtype=torch.float32, seed=0):
    return oracle.ordinary(n, dtype, seed)


def low(n):
    return torch.randint(-(2**15), 2**15, (n,), generator=oracle.generator(9), dtype=torch.int16)


def squares(matrices, rows, columns):
    return tensor(matrices * rows).view(matrices, rows) ** 2, tensor(matrices * columns).view(matrices, columns) ** 2


def scalars(**numbers):
    return vector("test", torch.device("cpu"), {"lr": 0.1} | numbers)


EVERY_SCALAR = {"weight_decay": 0.1, "inv_scale": 0.5, "clip_value": 1.0, "clip_coef": 0.7, "found_inf": 0.0, "step": 3}
INDEX, GRAD = torch.tensor([[1, 3, 1], [0, 3, 2]]), torch.ones(2, 3, 5, dtype=torch.bfloat16)

#: Name: (operator, arguments). Made anew for each test, since operators write to them.
CASES = {
    "sq_norm_": lambda: (OPS.sq_norm_, ([slot()], [tensor(40)], None)),
    "sq_norm_ scaled": lambda: (OPS.sq_norm_, ([slot()], [tensor(40, torch.bfloat16).view(5, 8).t()], number(0.5))),
    "sq_norm_ empty": lambda: (OPS.sq_norm_, ([slot()], [tensor(0, torch.float16)], None)),
    "sq_norm_ of two": lambda: (
        OPS.sq_norm_,
        ([slot(), slot()], [tensor(40), tensor(3, torch.float16)], number(0.5, torch.float32)),
    ),
    "update_": lambda: (OPS.update_, ([tensor(40)], [tensor(40, seed=1)], scalars(), [], 0, False, 0, [0], [], [])),
    "update_ with a graph": lambda: (
        OPS.update_,
        ([tensor(40).requires_grad_()], [tensor(40, seed=1)], scalars(), [], 0, False, 0, [0], [], []),
    ),
    "update_ with everything": lambda: (
        OPS.update_,
        (
            [tensor(40, torch.bfloat16).view(5, 8)],
            [tensor(40, seed=1).view(8, 5).t()],
            scalars(**EVERY_SCALAR),
            [slot()],
            1,
            True,
            1,
            [2],
            [4, 5, 6],
            [],
        ),
    ),
    "update_ empty": lambda: (
        OPS.update_,
        ([tensor(0, torch.float16)], [tensor(0)], scalars(step=3), [], 1, True, 0, [0], [], []),
    ),
    "update_ of two": lambda: (
        OPS.update_,
        (
            [tensor(40, torch.float16), tensor(6)],
            [tensor(40, seed=1), tensor(6, torch.bfloat16)],
            scalars(step=3),
            [slot(), slot()],
            0,
            True,
            1,
            [0, 1],
            [0, 5, 8, 0, 6, 6],
            [],
        ),
    ),
    "update_ of two, split": lambda: (
        OPS.update_,
        (
            [tensor(40, torch.bfloat16).view(5, 8).t().requires_grad_(), tensor(6)],
            [tensor(40, seed=1).view(8, 5), tensor(6, torch.bfloat16)],
            scalars(**EVERY_SCALAR),
            [slot(), slot()],
            0,
            False,
            0,
            [0, 1],
            [],
            [low(40).view(8, 5), low(0)],
        ),
    ),
    "linear_sq_norm_": lambda: (OPS.linear_sq_norm_, (slot(), [GRAD], [GRAD[..., :2]], number(0.5))),
    "linear_update_": lambda: (
        OPS.linear_update_,
        (tensor(10).view(2, 5), [GRAD, GRAD], [GRAD[..., :2]] * 2, scalars(), slot(), 1, False, 0, 0, [3, 5, 7]),
    ),
    "linear_update_ split": lambda: (
        OPS.linear_update_,
        (
            tensor(10, torch.bfloat16).view(2, 5),
            *([GRAD], [GRAD[..., :2]]),
            *(scalars(), None, 1, False, 0, 0, [], low(10).view(2, 5)),
        ),
    ),
    "factored_update_ split": lambda: (
        OPS.factored_update_,
        (
            *(tensor(30, torch.bfloat16).view(6, 5), tensor(30, seed=1).view(6, 5), tensor(6), tensor(0)),
            *(scalars(), 0, False, 0, 0, [], low(30).view(6, 5)),
        ),
    ),
    "embedding_update_ split": lambda: (
        OPS.embedding_update_,
        (
            *(tensor(20, torch.bfloat16).view(4, 5), [INDEX], [GRAD], [-1]),
            *(scalars(), None, 0, False, 0, 0, [], low(20).view(5, 4).t()),
        ),
    ),
    "factor_sums_": lambda: (
        OPS.factor_sums_,
        (
            torch.zeros(6, dtype=torch.float64),
            torch.zeros(2, 5, dtype=torch.float64),
            tensor(30, torch.bfloat16).view(5, 6).t(),
            scalars(),
        ),
    ),
    "factored_sq_norm_": lambda: (
        OPS.factored_sq_norm_,
        (slot(), tensor(30).view(6, 5), tensor(6), tensor(10).view(2, 5), scalars(**EVERY_SCALAR)),
    ),
    "adalomo_factors": lambda: (
        OPS.adalomo_factors,
        (tensor(6).double() ** 2, tensor(10).double().view(2, 5) ** 2, *squares(2, 3, 5), torch.tensor(0.3), 1e-30),
    ),
    "factor_sums_total_": lambda: (OPS.factor_sums_total_, (tensor(6).double() ** 2, slot(), slot())),
    "factor_sums_total_ without a norm": lambda: (OPS.factor_sums_total_, (tensor(6).double() ** 2, None, slot())),
    "inverse_rms": lambda: (OPS.inverse_rms, (tensor(6).double().view(2, 3) ** 2, 5, False)),
    "inverse_rms wide": lambda: (OPS.inverse_rms, (slot() + 1.0, 5, True)),
    "adalomo_scale_": lambda: (OPS.adalomo_scale_, (slot() + 0.5, slot() + 2.0, slot() + 3.0, 7, 1.0, 1e-3)),
    "replace_states_": lambda: (
        OPS.replace_states_,
        ([tensor(6).view(2, 3), tensor(5)], [tensor(6, seed=1).view(2, 3), tensor(5, seed=2)], torch.tensor(True)),
    ),
    "adalomo_factors of a vector": lambda: (
        OPS.adalomo_factors,
        (tensor(1).double() ** 2, tensor(5).double().view(1, 5) ** 2, *squares(1, 0, 5), torch.tensor(0.3), 1e-30),
    ),
    "factored_update_": lambda: (
        OPS.factored_update_,
        (
            tensor(30).view(6, 5),
            tensor(30, seed=1).view(6, 5),
            tensor(0),
            tensor(0),
            scalars(),
            0,
            False,
            0,
            0,
            [],
        ),
    ),
    "factored_update_ with everything": lambda: (
        OPS.factored_update_,
        (
            tensor(30, torch.bfloat16).view(5, 6).t().requires_grad_(),
            tensor(30, seed=1).view(6, 5),
            tensor(6),
            tensor(10).view(2, 5),
            scalars(**EVERY_SCALAR),
            0,
            True,
            1,
            2,
            [3, 5, 7],
        ),
    ),
    "embedding_sq_norm_": lambda: (OPS.embedding_sq_norm_, (slot(), [INDEX], [GRAD], [-1], None)),
    "embedding_sq_norm_ of two": lambda: (
        OPS.embedding_sq_norm_,
        (slot(), [INDEX.t().int(), INDEX[0]], [GRAD.transpose(0, 1), GRAD[0].float()], [3, -1], number(0.5)),
    ),
    "embedding_update_": lambda: (
        OPS.embedding_update_,
        (tensor(20).view(4, 5), [INDEX], [GRAD], [-1], scalars(), None, 0, False, 0, 0, []),
    ),
    "embedding_update_ with everything": lambda: (
        OPS.embedding_update_,
        (
            tensor(20, torch.bfloat16).view(5, 4).t().requires_grad_(),
            [INDEX.t().int(), INDEX[0]],
            [GRAD.transpose(0, 1), GRAD[0].float()],
            [3, -1],
            scalars(**EVERY_SCALAR),
            slot(),
            1,
            True,
            1,
            2,
            [3, 5, 7],
        ),
    ),
}


def test_every_operator_is_checked():
    assert {name.split()[0] for name in CASES} == set(ops.OPERATORS)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    """Schema (what is mutated), registration for autograd, fake tensors, tracing with dynamic shapes."""
    op, arguments = CASES[name]()
    opcheck(op.default, arguments)


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_the_schema_tells_what_is_mutated(name):
    mutated = [a.name for a in getattr(OPS, name).default._schema.arguments if a.alias_info and a.alias_info.is_write]
    written = {
        "sq_norm_": ["slots"],
        "update_": ["params", "sq_norm", "low"],
        "factor_sums_": ["row_sums", "column_sums"],
        "factored_update_": ["param", "low"],
        "factor_sums_total_": ["slot", "found_inf"],
        "inverse_rms": [],
        "adalomo_factors": [],
        "adalomo_scale_": ["coef"],
        "replace_states_": ["states"],
    }
    assert mutated == written.get(name, ["slot"] if "norm" in name else ["weight", "sq_norm", "low"])


# ---- Without data ---------------------------------------------------------------------------------------------------


def call_all(param, grad, slots):
    """Every wrapper once."""
    first, second = slots
    ops.sgd_(param, grad, lr=0.1, weight_decay=0.1, rounding="stochastic", step=3, sq_norm=first)
    ops.sgd_list_([param], [grad], lr=0.1, clip_value=1.0, sq_norm=[second])
    ops.sq_norm_(first, grad, inv_scale=0.5)
    ops.sq_norm_list_(slots, [grad, grad])
    low = torch.zeros_like(param, dtype=torch.int16)
    ops.sgd_(param.bfloat16(), grad, lr=0.1, low=low, rounding="split")


def refuse_all(empty):
    """Bad calls on tensors that `empty(*shape, dtype)` makes: the checks need no data."""
    param, grad, short = empty(4, 5), empty(4, 5, dtype=torch.bfloat16), empty(2, 5)
    slot, slots = empty(1, dtype=torch.float64), empty(2, dtype=torch.float64)
    vector = empty(7, dtype=torch.float64)
    for call in (
        lambda: ops.sgd_(param, short, lr=0.1),
        lambda: ops.sgd_(param, slots, lr=0.1),
        lambda: ops.sgd_list_([param], [short], lr=0.1),
        lambda: ops.sgd_list_([param], [], lr=0.1),
        lambda: ops.sq_norm_(slots, grad),
        lambda: ops.sq_norm_list_([slot], [grad, grad]),
        lambda: OPS.update_([param], [short], vector, [], 0, False, 0, [0], [], []),
        lambda: OPS.update_([param], [grad], slot, [], 0, False, 0, [0], [], []),
        lambda: OPS.update_([param], [grad, grad], vector, [], 0, False, 0, [0], [], []),
        lambda: OPS.sq_norm_([slots], [grad], None),
        lambda: OPS.sq_norm_([slot], [grad, grad], None),
    ):
        with pytest.raises((TypeError, ValueError), match=r"(sgd|sq_norm|update)_"):
            call()


def test_meta_tensors():
    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    slots = [empty(1, dtype=torch.float64), empty(1, dtype=torch.float64)]
    call_all(empty(4, 5), empty(4, 5, dtype=torch.bfloat16), slots)
    refuse_all(empty)


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_fake_tensors(place):
    """Nothing is computed, so neither a GPU nor memory is needed: the parameter has 4 TiB."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=place)

    with FakeTensorMode():
        param, grad = empty(2**20, 2**20), empty(2**20, 2**20, dtype=torch.bfloat16)
        version = param._version
        call_all(param, grad, [empty(1, dtype=torch.float64), empty(1, dtype=torch.float64)])
        assert param._version > version
        assert param.shape == (2**20, 2**20) and param.dtype == torch.float32
        refuse_all(empty)


# ---- torch.compile --------------------------------------------------------------------------------------------------


def step(param, grad, slots, lr):
    call_all(param, grad, slots)
    ops.sgd_(param, grad, lr=lr, clip_coef=lr)
    return param * 2, slots[0] + slots[1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_a_graph_break(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    lr = torch.tensor(0.3)
    for n in (70001, 513):
        start = oracle.ordinary(n, torch.bfloat16), oracle.ordinary(n, torch.float32, 1), slot(), slot()
        (p, g, *slots), (compiled_p, compiled_g, *compiled_slots) = ([t.clone() for t in start] for _ in range(2))
        expected = *step(p, g, slots, lr), p, *slots
        actual = *compiled(compiled_p, compiled_g, compiled_slots, lr), compiled_p, *compiled_slots
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)
        assert not torch.equal(compiled_p, start[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_update_bumps_the_version_counter(backend):
    torch._dynamo.reset()

    def update(param, grad):
        ops.sgd_(param, grad, lr=0.1)

    param, grad = torch.ones(5, requires_grad=True), torch.ones(5)
    loss = (param * param).sum()
    torch.compile(update, backend=backend, fullgraph=True)(param, grad)
    assert_same_bits(param.detach(), reference.updated(torch.ones(5), grad, lr=0.1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_input_while_compiling():
    torch._dynamo.reset()
    compiled = torch.compile(lambda p, g: ops.sgd_(p, g, lr=0.1), backend="aot_eager")
    param = torch.ones(4)
    with pytest.raises(Exception, match=r"grad has shape \[3\], param has shape \[4\]"):
        compiled(param, torch.ones(3))
    assert (param == 1).all()
