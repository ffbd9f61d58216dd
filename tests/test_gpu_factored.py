"""The operators with row and column factors, and the rules "tensor", "rows" and "adalomo", as only a GPU can show them:
large sizes, streams, CUDA graphs, no synchronisation, no allocation. For the backend in force, as test_gpu.py.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.factored import RULES, FactoredTextbook, Kinds, tokens
from support.models import Options, assert_same_bits, loss_of, transformer, weights_of
from test_gpu import CUDA, PAIRS, allocations, assert_replays_the_eager_step, no_synchronisation, numbers
from torch import Tensor, nn

from lomo_kernels import Lomo, backends, ops, reference
from lomo_kernels.ops.scalars import POSITIONS, vector

pytestmark = pytest.mark.gpu

OPERATORS = ("factor_sums_", "factored_sq_norm_", "factored_update_")
#: Operators that make few numbers of sums.
SMALL = ("factor_sums_total_", "inverse_rms", "adalomo_factors", "adalomo_scale_", "replace_states_")
CLIPPING = {"inv_scale": 0.5, "clip_value": 0.9, "clip_coef": 0.7}
#: (matrices, rows of each, columns): around blocks of 16 rows, 256 columns and 4096 elements, convolutions, rows that
#: begin at addresses no vector can be loaded from, long and short ones, and more programs than a GPU runs at a time.
SHAPES = [
    (1, 1, 1),
    (1, 3, 5),
    (1, 16, 256),
    (1, 17, 257),
    (1, 15, 1000),
    (1, 300, 704),
    (3, 130, 300),
    (5000, 3, 3),
    (70, 32, 32),
    (9, 33, 32),
    (1, 1, 100_000),
    (1, 100_000, 3),
    (2, 3000, 1001),
    (1, 4096, 4096),
    (1, 2049, 11_008),
]
#: For each pair of dtypes a kernel is compiled for each kind of block, so other pairs meet fewer shapes.
PAIRS_AND_SHAPES = [(*PAIRS[0], shape) for shape in SHAPES]
PAIRS_AND_SHAPES += [(*pair, shape) for pair in PAIRS[1:] for shape in ((1, 17, 257), (1, 300, 704), (5000, 3, 3))]
NONE = torch.empty(0)


def operator(name: str) -> Callable[..., None]:
    backends.check_device(CUDA)  # registers it
    function: Callable[..., None] = getattr(torch.ops.lomo_kernels, name)
    return function


def matrix(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Tensor:
    matrices, rows, columns = shape
    return numbers(matrices * rows * columns, dtype, seed).view(matrices * rows, columns)


def factors(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.rand(shape, generator=generator, device=CUDA) * 3 + 0.01


def factors_of(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    matrices, rows, columns = shape
    return factors((matrices * rows,), 2), factors((matrices, columns), 3)


def scalars(clipping: dict[str, float] = CLIPPING, *, on_device: bool = True, **others: Any) -> Tensor:
    """The vector of scalars; `on_device`: where the host cannot read it."""
    lr = torch.tensor([0.1], dtype=torch.float64, device=CUDA)
    return vector(
        "test", lr.device, {"lr": lr if on_device else 0.1, "weight_decay": 0.1, "step": 3} | clipping | others
    )


def with_nonfinite(grad: Tensor) -> Tensor:
    grad.view(-1)[3 :: max(7, grad.numel() // 3)] = math.nan
    grad.view(-1)[4 :: max(9, grad.numel() // 3)] = -math.inf
    return grad


# ---- Equal to the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("param_dtype", "grad_dtype", "shape"), PAIRS_AND_SHAPES, ids=str)
def test_updates(param_dtype: torch.dtype, grad_dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    before, grad = matrix(shape, param_dtype, 5), with_nonfinite(matrix(shape, grad_dtype, 1))
    of_rows, of_columns = factors_of(shape)
    none, columns = NONE.to(CUDA), shape[2]
    cases = [
        (of_rows, of_columns, [], CLIPPING),
        (of_rows, none, [2 * columns, columns, 2 * columns + 2], {}),
        (none, of_columns, [2**33 - 2, columns, columns + 3], CLIPPING),
        (none, none, [5, before.numel(), before.numel()], {}),
    ]
    for (rows, of_column, shard, clipping), stochastic in itertools.product(cases, (False, True)):
        arguments = rows, of_column, scalars(clipping, on_device=bool(shard)), 0, stochastic, 11, 4, shard
        expected, param = before.clone(), before.clone()
        reference.IMPLEMENTATIONS["factored_update_"](expected, grad, *arguments)
        operator("factored_update_")(param, grad, *arguments)
        assert before.numel() < 100 or not torch.equal(expected, before)
        assert_same_bits({"": param}, {"": expected})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_updates_of_split_weights(grad_dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    before, grad = matrix(shape, torch.bfloat16, 5), with_nonfinite(matrix(shape, grad_dtype, 1))
    low_before = torch.randint(-(2**15), 2**15, before.shape, device=CUDA).to(torch.int16)
    arguments = *factors_of(shape), scalars(), 0, False, 0, 0, []
    expected, expected_low, param, low = (t.clone() for t in (before, low_before, before, low_before))
    reference.IMPLEMENTATIONS["factored_update_"](expected, grad, *arguments, expected_low)
    operator("factored_update_")(param, grad, *arguments, low)
    assert_same_bits({"": param}, {"": expected})
    assert torch.equal(low, expected_low)


def test_updates_of_tensors_at_odd_addresses() -> None:
    shape = (1, 300, 704)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = numbers(300 * 704 + 1, dtype, 5)[1:].view(300, 704)
        grad = numbers(300 * 704 + 1, dtype, 1)[1:].view(300, 704)
        expected = made.clone()
        arguments = *factors_of(shape), scalars(), 0, True, 11, 4, []
        reference.IMPLEMENTATIONS["factored_update_"](expected, grad, *arguments)
        operator("factored_update_")(made, grad, *arguments)
        assert_same_bits({"": made.clone()}, {"": expected})


@pytest.mark.parametrize("on_device", [True, False])
def test_found_inf_leaves_the_parameter(on_device: bool) -> None:
    param, grad = matrix((1, 300, 700), torch.bfloat16, 5), matrix((1, 300, 700), torch.bfloat16, 1)
    before = param.clone()
    vectors = scalars(on_device=on_device, found_inf=1.0)
    operator("factored_update_")(param, grad, *factors_of((1, 300, 700)), vectors, 0, True, 11, 4, [])
    assert_same_bits({"": param}, {"": before})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    matrices, rows, columns = shape
    grad, none = matrix(shape, dtype, 1), NONE.to(CUDA)
    of_rows, of_columns = factors_of(shape)
    for clipping, on_device in ((CLIPPING, True), ({}, False)):
        vectors = scalars(clipping, on_device=on_device)
        g = reference.factored_gradient(grad, none, none, **clipping).double().square()
        results = []
        for _ in range(5):
            row_sums = torch.ones(matrices * rows, dtype=torch.float64, device=CUDA)
            column_sums = torch.ones(matrices, columns, dtype=torch.float64, device=CUDA)
            slot = torch.ones(1, dtype=torch.float64, device=CUDA)
            operator("factor_sums_")(row_sums, column_sums, grad, vectors)
            operator("factored_sq_norm_")(slot, grad, of_rows, of_columns, vectors)
            results.append((row_sums, column_sums, slot))
        torch.testing.assert_close(row_sums, 1 + g.sum(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(column_sums, 1 + g.view(matrices, rows, columns).sum(1), rtol=1e-12, atol=0)
        f = reference.factored_gradient(grad, of_rows, of_columns, **clipping)
        assert slot.item() == pytest.approx(1 + f.double().square().sum().item(), rel=1e-6)
        for others in results[1:]:
            assert all(map(torch.equal, others, results[0])), "another run has other bits"


@pytest.mark.parametrize("where", [(0, 0), (299, 699), (123, 456)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sums_tell_a_gradient_that_is_not_finite(value: float, where: tuple[int, int]) -> None:
    grad = matrix((1, 300, 700), torch.bfloat16, 1)
    grad[where] = value
    row_sums = torch.zeros(300, dtype=torch.float64, device=CUDA)
    column_sums = torch.zeros(1, 700, dtype=torch.float64, device=CUDA)
    slot = torch.zeros(1, dtype=torch.float64, device=CUDA)
    operator("factor_sums_")(row_sums, column_sums, grad, scalars())
    operator("factored_sq_norm_")(slot, grad, *factors_of((1, 300, 700)), scalars())
    assert not slot.isfinite().any()
    assert (~row_sums.isfinite()).nonzero().flatten().tolist() == [where[0]]
    assert (~column_sums.isfinite()).nonzero()[:, 1].tolist() == [where[1]]


def made_of_sums(shape: tuple[int, int, int], device: torch.device | str) -> list[Tensor]:
    """What the operators of `ops.rule_factors` make of random sums, all of it."""
    matrices, rows, columns = shape
    generator = torch.Generator().manual_seed(1)
    sizes = (matrices * rows,), (matrices, columns), (matrices, rows), (matrices, columns)
    row_sums, column_sums, *states = (torch.rand(s, generator=generator).double().to(device) for s in sizes)
    row, column = (state.float() for state in states)
    slot, found_inf, coef = torch.tensor([1.0, 0.0, 0.7], dtype=torch.float64, device=device).unbind()
    beta = torch.tensor(0.3, device=device)
    made: list[Tensor] = []

    def call() -> None:
        total, is_finite = operator("factor_sums_total_")(row_sums, slot, found_inf)
        narrow, wide = (operator("inverse_rms")(row_sums, columns, wide) for wide in (False, True))
        factors = operator("adalomo_factors")(row_sums, column_sums, row, column, beta, 1e-30)
        operator("adalomo_scale_")(coef, total, slot, matrices * rows * columns, 1.0, 1e-3)
        operator("replace_states_")([row, column], list(factors[2:]), is_finite)
        made[:] = [total, is_finite, narrow, wide, *factors]

    call()
    if device != "cpu":
        with no_synchronisation():
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
    else:
        call()
        call()
    return [tensor.cpu() for tensor in (*made, row, column, slot, found_inf, coef)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_rules_make_of_sums_is_what_a_cpu_makes(shape: tuple[int, int, int]) -> None:
    """Three times: called, called without a synchronisation, and replayed."""
    for ours, expected in zip(made_of_sums(shape, CUDA), made_of_sums(shape, "cpu"), strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        if ours.dtype is torch.bool:
            assert ours.item() and expected.item()
        else:
            tolerance = 1e-13 if ours.dtype is torch.float64 else 2e-6  # of states, after three steps
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0)


# ---- Streams, graphs, synchronisation, allocation --------------------------------------------------------------------


class Calls:
    """Each operator on matrices of several shapes, with both roundings and a split weight."""

    SHAPES = ((1, 300, 704), (1, 1500, 1001), (2000, 3, 3), (1, 1, 5))

    def __init__(self, vectors: Tensor, seed: int = 0) -> None:
        self.vectors = vectors
        self.grads = [matrix(shape, torch.bfloat16, seed + 1) for shape in self.SHAPES]
        self.factors = [factors_of(shape) for shape in self.SHAPES]
        self.params = [matrix(shape, torch.bfloat16, seed + 5) for shape in self.SHAPES]
        self.low = torch.zeros(300, 704, dtype=torch.int16, device=CUDA)
        self.split = matrix(self.SHAPES[0], torch.bfloat16, seed + 6)
        self.slots = torch.zeros(len(self.SHAPES), 1, dtype=torch.float64, device=CUDA)
        self.sums = [tuple(factor.double().zero_() for factor in pair) for pair in self.factors]
        self.start = [tensor.clone() for tensor in self.state()]

    def state(self) -> list[Tensor]:
        return [*self.params, self.low, self.split, self.slots, *itertools.chain(*self.sums)]

    def reset(self) -> None:
        for tensor, start in zip(self.state(), self.start, strict=True):
            tensor.copy_(start)

    def __call__(self) -> None:
        everything = zip(self.params, self.grads, self.factors, self.slots, self.sums, strict=True)
        for param, grad, both, slot, sums in everything:
            operator("factor_sums_")(*sums, grad, self.vectors)
            operator("factored_sq_norm_")(slot, grad, *both, self.vectors)
            for stochastic in (False, True):
                operator("factored_update_")(param, grad, *both, self.vectors, 0, stochastic, 11, 4, [])
        tail = 0, False, 0, 0, [], self.low
        operator("factored_update_")(self.split, self.grads[0], *self.factors[0], self.vectors, *tail)

    def result(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.state()]


@pytest.mark.parametrize("on_device", [True, False])
def test_calls_never_synchronise_and_replay_with_the_same_bits(on_device: bool) -> None:
    calls = Calls(scalars(on_device=on_device))
    side = torch.cuda.Stream(CUDA)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls()
        first = calls.result()
        calls.reset()
    torch.cuda.synchronize()
    with no_synchronisation():
        calls()
    assert all(map(torch.equal, calls.result(), first))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        calls()
    for turn in range(3):
        calls.reset()
        graph.replay()
        assert all(map(torch.equal, calls.result(), first)), turn


def test_a_captured_call_reads_scalars_when_it_is_replayed() -> None:
    calls = Calls(scalars())
    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    for name, value in (("lr", 0.3), ("clip_coef", 0.2), ("inv_scale", 0.25), ("clip_value", 0.1), ("found_inf", 1.0)):
        calls.vectors[POSITIONS[name]] = value
        calls.reset()
        graph.replay()
        replayed = calls.result()
        calls.reset()
        calls()
        assert all(map(torch.equal, calls.result(), replayed)), name


def test_calls_allocate_nothing_after_the_first() -> None:
    if any(backends.choice("CUDA").of(name).backend == "tiled" for name in OPERATORS):
        pytest.skip("torch's operators serve them, which allocate")
    calls = Calls(scalars())
    calls()
    before = allocations()
    calls()
    assert allocations() == before


def test_streams_side_by_side() -> None:
    """Sums of several streams at a time do not share a workspace."""
    every = [Calls(scalars(), seed=10 * i) for i in range(4)]
    expected = []
    for calls in every:
        calls()
        expected.append(calls.result())
    streams = [torch.cuda.Stream(CUDA) for _ in every]
    torch.cuda.synchronize()
    for _ in range(20):
        for calls, stream in zip(every, streams, strict=True):
            with torch.cuda.stream(stream):
                calls.reset()
                calls()
    torch.cuda.synchronize()
    for calls, results in zip(every, expected, strict=True):
        assert all(map(torch.equal, calls.result(), results))


def test_a_graph_beside_eager_calls() -> None:
    """A captured call has a workspace of its own: its graph may be replayed on any stream."""
    captured, eager = Calls(scalars()), Calls(scalars(), seed=20)
    expected = []
    for calls in (captured, eager):
        calls()
        expected.append(calls.result())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    side = torch.cuda.Stream(CUDA)
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        with torch.cuda.stream(side):
            captured.reset()
            graph.replay()
        eager.reset()
        eager()
    torch.cuda.synchronize()
    for calls, results in zip((captured, eager), expected, strict=True):
        assert all(map(torch.equal, calls.result(), results))


def test_every_factored_operator_has_one_kernel_and_info_names_it() -> None:
    chosen = backends.choice("CUDA")
    for name in (*OPERATORS, *SMALL):
        assert name in ops.OPERATORS
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lomo_kernels::{name}", "CUDA")
        if chosen.backend == "cuda":
            assert chosen.of(name).backend == "cuda"
        if name in OPERATORS and os.environ.get(backends.VARIABLE) in ("triton", "reference"):
            assert chosen.of(name).backend == os.environ[backends.VARIABLE]


# ---- The optimizer --------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, not in TensorFloat32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize(
    "options", [{}, {"clip_grad_norm": 0.5}, {"clip_grad_value": 0.01, "weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_the_rule(rule: str, fused: bool, options: dict[str, Any]) -> None:
    """The bound is five times that of a CPU, because a GPU adds up products in other orders."""
    model = Kinds().to(CUDA)
    book = FactoredTextbook(model, rule, lr=0.003, **options)
    optimizer = Lomo(model, lr=0.003, rule=rule, fused_layers=fused, **options)
    for step in range(6):
        optimizer.backward(model(tokens(step).to(CUDA)))
        book.step(book.model(tokens(step).to(CUDA)))
        assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=1e-5)
    for (name, param), expected in zip(model.named_parameters(), book.model.parameters(), strict=True):
        assert (param.double() - expected).abs().max().item() <= 1e-5, name


def training(rule: str, rounding: str, *, fused: bool, lr: float | Tensor) -> tuple[nn.Module, Lomo]:
    model = transformer(Options(width=144, dtype=torch.bfloat16)).to(CUDA)
    options = {"clip_grad_norm": 0.5, "rounding": rounding, "seed": 11, "weight_decay": 0.1}
    return model, Lomo(model, lr=lr, rule=rule, fused_layers=fused, **options)


@pytest.mark.parametrize("rounding", ["stochastic", "split"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_never_synchronises_and_has_the_same_bits_again(rule: str, fused: bool, rounding: str) -> None:
    runs = []
    for _ in range(2):
        model, optimizer = training(rule, rounding, fused=fused, lr=0.01)
        for step in range(3):
            loss = loss_of(model, step)
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            if step:
                torch.cuda.synchronize()
                with no_synchronisation():
                    optimizer.backward(loss)
            else:
                optimizer.backward(loss)
        runs.append(weights_of(model))
    assert_same_bits(*runs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_captured_step_replays_with_another_learning_rate(rule: str, fused: bool) -> None:
    lr = torch.tensor(0.01, device=CUDA, dtype=torch.float64)
    model, optimizer = training(rule, "stochastic", fused=fused, lr=lr)
    twin, eager = training(rule, "stochastic", fused=fused, lr=lr)
    assert_replays_the_eager_step(model, optimizer, twin, eager, lr)
