"""What only a GPU can show: sizes up to beyond 2**31 elements, streams, CUDA graphs, no synchronisation, no allocation,
the optimizer end to end. For the backend in force: `make gpu` runs it for the CUDA library and for Triton.

tests/test_sgd.py and tests/test_sq_norm.py run on the GPU as well, with all their cases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.models import Options, TinyTransformer, assert_same_bits, loss_of, transformer, weights_of
from support.textbook import Textbook
from test_lomo import MODELS, RULES, scale_for
from torch import Tensor, nn

from bench.measure import SCRATCH, memory_of
from lomo_kernels import Lomo, backends, ops, reference
from lomo_kernels.composite import rule_factors, tiled
from lomo_kernels.ops import scalars

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]
CHUNK = 2**25  # elements the reference takes at a time: it needs some 100 bytes for each
ARGUMENTS = {"lr": 3e-2, "weight_decay": 0.1, "inv_scale": 0.5, "clip_value": 2.0, "clip_coef": 0.7}


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def room_for(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} are free")


def numbers(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    made = torch.empty(n, dtype=dtype, device=CUDA)
    for part in made.split(2**28):
        part.normal_(generator=generator)
    return made


def assert_equals_reference(param: Tensor, before: Tensor, grad: Tensor, **arguments: Any) -> None:
    """Bit for bit, chunk by chunk: a chunk is a shard of the whole."""
    integers = {2: torch.int16, 4: torch.int32}[param.element_size()]
    for begin in range(0, param.numel(), CHUNK):
        part = slice(begin, min(begin + CHUNK, param.numel()))
        length = part.stop - part.start
        stochastic = arguments.get("rounding") == "stochastic"
        others = {name: value for name, value in arguments.items() if name != "rounding"}
        expected = reference.updated(
            before[part], grad[part], **others, stochastic=stochastic, shard=(begin, length, length)
        )
        assert torch.equal(param[part].view(integers), expected.view(integers)), f"elements from {begin} on"


def sum_of_squares(grad: Tensor, inv_scale: float) -> float:
    return sum(reference.sum_of_squares(part, inv_scale).item() for part in grad.split(CHUNK))


# ---- Sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("n", [10**6, 10**7 + 3, 10**8])
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), PAIRS, ids=str)
def test_large_tensors(param_dtype: torch.dtype, grad_dtype: torch.dtype, n: int, rounding: str) -> None:
    room_for(n * 20 / 1e9 + 8)
    before, grad = numbers(n, param_dtype, 0), numbers(n, grad_dtype, 1)
    param, slot = before.clone(), torch.zeros(1, dtype=torch.float64, device=CUDA)
    ops.sgd_(param, grad, **ARGUMENTS, rounding=rounding, seed=5, parameter_id=3, step=9, sq_norm=slot)
    assert_equals_reference(param, before, grad, **ARGUMENTS, rounding=rounding, seed=5, parameter_id=3, step=9)
    exact = sum_of_squares(grad, 0.5)
    assert slot.item() == pytest.approx(exact, rel=1e-6)
    alone = torch.zeros_like(slot)
    ops.sq_norm_(alone, grad, inv_scale=0.5)
    assert alone.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["single", "list"])
def test_more_than_2_to_the_31_elements(form: str) -> None:
    n = 2**31 + 2**20 + 5
    room_for(6 * n / 1e9 + 8)
    before, grad = numbers(n, torch.bfloat16, 0), numbers(n, torch.bfloat16, 1)
    param, slot = before.clone(), torch.zeros(1, dtype=torch.float64, device=CUDA)
    keys = {"rounding": "stochastic", "seed": 5, "step": 9}
    if form == "single":
        ops.sgd_(param, grad, **ARGUMENTS, **keys, sq_norm=slot)
    else:
        ops.sgd_list_([param], [grad], **ARGUMENTS, **keys, sq_norm=[slot])
    assert_equals_reference(param, before, grad, **ARGUMENTS, **keys)
    assert slot.item() == pytest.approx(sum_of_squares(grad, 0.5), rel=1e-6)


def test_every_run_gives_the_same_bits() -> None:
    grad = numbers(10**7 + 1, torch.bfloat16, 1)
    slots = torch.zeros(50, dtype=torch.float64, device=CUDA)
    for slot in slots:
        ops.sq_norm_(slot, grad)
    assert len(set(slots.tolist())) == 1


# ---- Streams, graphs, synchronisation, allocation --------------------------------------------------------------------


def test_streams_side_by_side() -> None:
    """Norms of several streams at a time do not share a workspace."""
    grads = [numbers(4 * 10**6 + i, torch.float32, i) for i in range(4)]
    expected = [sum_of_squares(grad, 1.0) for grad in grads]
    side = [torch.cuda.Stream(CUDA) for _ in grads]
    slots = torch.zeros(len(grads), 25, dtype=torch.float64, device=CUDA)
    torch.cuda.synchronize()
    for turn in range(slots.shape[1]):
        for i, stream in enumerate(side):
            with torch.cuda.stream(stream):
                ops.sq_norm_(slots[i, turn], grads[i])
    torch.cuda.synchronize()
    for i, value in enumerate(expected):
        assert len(set(slots[i].tolist())) == 1 and slots[i, 0].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("rule", "fused"), [("plain", False), ("norm", False), ("plain", True), ("one", True)])
def test_a_forward_on_another_stream(rule: str, fused: bool) -> None:
    """The hooks then run on that stream; hyperparameters and slots are set on the caller's. On the loss's device the
    engine itself makes that stream wait for the caller's; for others see `test_a_side_stream_of_a_second_gpu`. A fused
    layer has no gradient for which the engine would make a hook's stream wait."""
    options = Options(dtype=torch.bfloat16, width=256, layers=4)
    models = [transformer(options).to(CUDA) for _ in range(2)]
    one, other = (Lomo(model, lr=0.1, fused_layers=fused, **RULES[rule]) for model in models)
    side = torch.cuda.Stream(CUDA)
    for step in range(5):
        for optimizer in (one, other):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        one.backward(loss_of(models[0], step))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = loss_of(models[1], step)
        torch.cuda._sleep(10**7)  # what the caller's stream still has to do before it sets them
        other.backward(loss)
    assert_same_bits(weights_of(models[1]), weights_of(models[0]))
    assert one.last_grad_norm.item() == other.last_grad_norm.item()


def training(rule: str, dtype: torch.dtype, lr: float | Tensor) -> tuple[TinyTransformer, Lomo]:
    model = transformer(Options(dtype=dtype)).to(CUDA)
    return model, Lomo(model, lr=lr, loss_scale=scale_for(dtype), rounding="stochastic", **RULES[rule])


def assert_replays_the_eager_step(
    model: TinyTransformer, optimizer: Lomo, twin: TinyTransformer, eager: Lomo, lr: Tensor
) -> None:
    """A captured step of `optimizer` gives the bits of the eager one, with other batches and other learning rates.

    Args:
        twin: equal to `model`; `eager` is its optimizer.
        lr: of both optimizers.
    """
    rate = lr.item()
    tokens, targets = (torch.zeros(3, 6, dtype=torch.int64, device=CUDA) for _ in range(2))

    def step() -> None:
        optimizer.backward(model(tokens, targets))

    side = torch.cuda.Stream(CUDA)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
            eager.backward(twin(tokens, targets))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    generator = torch.Generator().manual_seed(0)
    for turn in range(4):
        tokens.copy_(torch.randint(19, tokens.shape, generator=generator))
        targets.copy_(torch.randint(19, targets.shape, generator=generator))
        lr.fill_(rate / (turn + 1))
        graph.replay()
        eager.backward(twin(tokens, targets))
    assert_same_bits(weights_of(model), weights_of(twin))
    assert optimizer.step_count.item() == eager.step_count.item() == 7


@pytest.mark.parametrize("rule", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_captured_step_replays_with_another_learning_rate(dtype: torch.dtype, rule: str) -> None:
    lr = torch.tensor(0.5, device=CUDA, dtype=torch.float64)
    model, optimizer = training(rule, dtype, lr)
    twin, eager = training(rule, dtype, lr)
    assert_replays_the_eager_step(model, optimizer, twin, eager, lr)
    assert optimizer.last_grad_norm.item() == eager.last_grad_norm.item()


def test_a_graph_beside_eager_calls() -> None:
    """A captured call has a workspace of its own: its graph may be replayed on any stream."""
    grad, slots = numbers(10**6, torch.float32, 0), torch.zeros(2, dtype=torch.float64, device=CUDA)
    larger = numbers(10**7, torch.float32, 1)
    ops.sq_norm_(slots[0], grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.sq_norm_(slots[0], grad)
    side = torch.cuda.Stream(CUDA)
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        with torch.cuda.stream(side):
            graph.replay()
        ops.sq_norm_(slots[1], larger)
    torch.cuda.synchronize()
    assert slots[0].item() == pytest.approx(51 * sum_of_squares(grad, 1.0), rel=1e-6)
    assert slots[1].item() == pytest.approx(50 * sum_of_squares(larger, 1.0), rel=1e-6)


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_never_synchronises(dtype: torch.dtype, rule: str) -> None:
    model, optimizer = training(rule, dtype, 0.1)
    tokens, targets = (torch.zeros(3, 6, dtype=torch.int64, device=CUDA) for _ in range(2))
    optimizer.backward(model(tokens, targets))
    # Looks once, at finite gradients, whether a second backward has the first one's. float16's overflow at first.
    while not math.isfinite(optimizer.grad_norm(model(tokens, targets))):
        optimizer.backward(model(tokens, targets))
    with no_synchronisation():
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.backward(model(tokens, targets))
        with optimizer.accumulate():
            optimizer.backward(model(tokens, targets))
        optimizer.backward(model(tokens, targets))
        loss = model(tokens, targets)
        optimizer.grad_norm(loss)
        optimizer.fused_backward(loss, lr=0.2)


def test_the_detector_sees_a_synchronisation() -> None:
    model, optimizer = training("plain", torch.float32, 0.1)
    owner = optimizer._training
    owner.settings = dataclasses.replace(owner.settings, raise_nonfinite=True)  # which reads a flag

    loss = loss_of(model, 0)
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        optimizer.backward(loss)


def allocations() -> int:
    return int(torch.cuda.memory_stats(CUDA)["allocation.all.allocated"])


def test_operators_allocate_their_scalars_and_nothing_else_after_the_first_call() -> None:
    params = [numbers(n, torch.bfloat16, n) for n in (100, 10_001, 3 * 10**6)]
    grads = [numbers(param.numel(), torch.bfloat16, 1) for param in params]
    slots = list(torch.zeros(len(params), dtype=torch.float64, device=CUDA))
    scalars = {name: torch.tensor(value, device=CUDA, dtype=torch.float64) for name, value in ARGUMENTS.items()}

    def calls() -> None:
        for rounding in ("nearest", "stochastic"):
            for slot, param, grad in zip(slots, params, grads, strict=True):
                ops.sq_norm_(slot, grad)
                ops.sgd_(param, grad, **scalars, rounding=rounding, sq_norm=slot)
            ops.sgd_list_(params, grads, **scalars, rounding=rounding, sq_norm=slots)
            ops.sq_norm_list_(slots, grads)

    calls()
    before = allocations()
    calls()
    assert allocations() - before == 2 * (len(params) + 1)  # a vector for each call of an update


def test_a_list_takes_few_launches() -> None:
    params = [numbers(1000 + n, torch.bfloat16, n) for n in range(500)]
    grads = [numbers(param.numel(), torch.bfloat16, 1) for param in params]
    slots = torch.zeros(len(params), dtype=torch.float64, device=CUDA)
    lr = torch.tensor(0.1, device=CUDA)

    def launches(call: Callable[[], None]) -> int:
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not event.name.startswith("Memcpy") for event in kernels)

    # Two for the tensors, two for the scalars: lr to float64, and all of them to one vector.
    assert 1 <= launches(lambda: ops.sgd_list_(params, grads, lr=lr)) <= 4
    assert 1 <= launches(lambda: ops.sq_norm_list_(slots, grads)) <= 4
    assert launches(lambda: [ops.sgd_(p, g, lr=lr) for p, g in zip(params, grads, strict=True)]) >= 500


# ---- Layers: for each form that serves them --------------------------------------------------------------------------


def forms() -> dict[str, dict[str, Callable[..., None]]]:
    """By name, what can serve the layers' operators here: tiles, and Triton's kernels."""
    there = {"tiled": dict(tiled.IMPLEMENTATIONS)}
    try:
        from lomo_kernels.triton import embedding, linear
    except ImportError:
        return there
    kernels = (linear.linear_update_, linear.linear_sq_norm_, embedding.embedding_update_, embedding.embedding_sq_norm_)
    return there | {"triton": {kernel.__name__: kernel for kernel in kernels}}


#: tokens, out_features, in_features: tiles cut off and not, aligned and not, few tokens and many.
LAYERS = [(300, 1024, 512), (64, 4096, 4096), (2048, 384, 640), (77, 130, 257), (1, 1, 1), (0, 64, 64), (5, 1100, 48)]


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, device=CUDA)


def layer(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tokens, rows, columns = shape
    x, gy = numbers(tokens * columns, dtype, 0), numbers(tokens * rows, dtype, 1)
    return x.view(tokens, columns), gy.view(tokens, rows)


def update(kernel: Callable[..., None], weight: Tensor, *factors: Any, **arguments: Any) -> None:
    """Calls an update's implementation, past the wrapper."""
    given: dict[str, Any] = {name: number(arguments[name]) for name in scalars.NAMES if name in arguments}
    given["step"] = torch.tensor([3], device=CUDA)
    vector = scalars.vector("test", weight.device, given)
    kernel(weight, *factors, vector, arguments.get("sq_norm"), 0, arguments.get("stochastic", False), 5, 6, [])


def check_update(kernel: Any, rows: int, columns: int, gradient: Tensor, slack: Tensor, *factors: Any) -> None:
    """The gradient that a float32 weight of zeros shows is within `slack` of the exact one; every other update is that
    of `reference.updated`, but for what another order of the sums may do, which one step of rounding bounds."""
    zeros = torch.zeros(rows, columns, device=CUDA)
    update(kernel, zeros, *factors, lr=1.0)
    assert ((-zeros - gradient).abs().double() <= slack).all()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        before = numbers(rows * columns, dtype, 2).view(rows, columns)
        for stochastic in (False, True):
            weight, slot = before.clone(), number(0.0)
            update(kernel, weight, *factors, **ARGUMENTS, stochastic=stochastic, sq_norm=slot)
            keys = {"stochastic": stochastic, "seed": 5, "parameter_id": 6, "step": 3}
            expected = reference.updated(before, -zeros, **ARGUMENTS, **keys)
            step = torch.finfo(dtype).eps * expected.abs().double() + torch.finfo(dtype).smallest_normal
            assert ((weight.double() - expected.double()).abs() <= step + slack).all()
            if dtype != torch.float32:
                assert (weight != expected).float().mean() <= 1e-2
            assert slot.item() == pytest.approx(sum_of_squares(gradient.flatten(), 0.5), rel=1e-5)


@pytest.mark.parametrize("form", ["tiled", "triton"])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_linear_layers(dtype: torch.dtype, shape: tuple[int, int, int], form: str) -> None:
    kernels = forms().get(form) or pytest.skip("Triton cannot be imported")
    x, gy = layer(shape, dtype)
    gradient = reference.linear_gradient([x], [gy])
    slack = 2.0**-20 * (gy.double().abs().T @ x.double().abs())
    check_update(kernels["linear_update_"], *shape[1:], gradient, slack, [x], [gy])
    slots = torch.zeros(20, dtype=torch.float64, device=CUDA)
    for slot in slots:
        kernels["linear_sq_norm_"](slot, [x], [gy], number(0.5))
    exact = gradient.double().square().sum().item() / 4
    rel = 1e-5 if dtype == torch.float32 else 5e-5  # an H100's matrix units cut off what lies far below a sum
    assert len(set(slots.tolist())) == 1 and slots[0].sqrt().item() == pytest.approx(math.sqrt(exact), rel=rel)


@pytest.mark.parametrize("form", ["tiled", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_norms_of_tokens_that_are_alike(dtype: torch.dtype, form: str) -> None:
    kernels = forms().get(form) or pytest.skip("Triton cannot be imported")
    x, gy = layer((256, 2048, 2048), torch.float32)
    x, gy = (1 + 0.01 * x).to(dtype), (gy - gy.mean(0)).to(dtype)
    slot = number(0.0)
    kernels["linear_sq_norm_"](slot, [x], [gy], None)
    exact = reference.linear_gradient([x], [gy]).double().norm().item()
    assert slot.sqrt().item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("form", ["tiled", "triton"])
@pytest.mark.parametrize(
    "shape", [(4096, 999, 1024), (33, 50_000, 96), (70, 3, 257), (0, 4, 4), (3000, 1, 64)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_embeddings(dtype: torch.dtype, shape: tuple[int, int, int], form: str) -> None:
    kernels = forms().get(form) or pytest.skip("Triton cannot be imported")
    tokens, rows, columns = shape
    indices = torch.randint(0, rows, (tokens,), device=CUDA)
    gy = numbers(tokens * columns, dtype, 1).view(tokens, columns)
    pairs = [indices], [gy], [2]
    gradient = reference.embedding_gradient(rows, *pairs)
    slack = 2.0**-20 * reference.embedding_gradient(rows, [indices], [gy.abs()], [2]).double()
    check_update(kernels["embedding_update_"], rows, columns, gradient, slack, *pairs)
    slots = torch.zeros(20, dtype=torch.float64, device=CUDA)
    for slot in slots:
        kernels["embedding_sq_norm_"](slot, *pairs, number(0.5))
    assert len(set(slots.tolist())) == 1
    assert slots[0].item() == pytest.approx(gradient.double().square().sum().item() / 4, rel=1e-5)


@pytest.mark.parametrize("form", ["tiled", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layers_never_synchronise_and_can_be_captured(dtype: torch.dtype, form: str) -> None:
    kernels = forms().get(form) or pytest.skip("Triton cannot be imported")
    uses = [layer((tokens, 512, 256), dtype) for tokens in (40, 900)]
    xs, gys = [x for x, _ in uses], [gy for _, gy in uses]
    weights = [numbers(512 * 256, dtype, 2).view(512, 256) for _ in range(2)]
    indices, table = [torch.randint(0, 99, (40,), device=CUDA)], numbers(99 * 256, dtype, 3).view(99, 256)
    slots = torch.zeros(5, dtype=torch.float64, device=CUDA)
    given = {"lr": number(0.1), "weight_decay": number(0.2), "step": torch.tensor([3], device=CUDA)}
    vector = scalars.vector("test", weights[0].device, given)
    rest = (0, True, 1, 2, [])  # rule, stochastic, seed, parameter id, shard

    def calls() -> None:
        kernels["linear_update_"](weights[0], xs[:1], gys[:1], vector, slots[0], *rest)
        kernels["linear_update_"](weights[1], xs, gys, vector, None, *rest)
        kernels["linear_sq_norm_"](slots[1], xs[:1], gys[:1], None)  # by inner products
        kernels["linear_sq_norm_"](slots[2], xs, gys, None)
        kernels["embedding_update_"](table, indices, xs[:1], [-1], vector, slots[3], *rest)
        kernels["embedding_sq_norm_"](slots[4], indices, xs[:1], [-1], None)

    side = torch.cuda.Stream(CUDA)
    with torch.cuda.stream(side):
        calls()
    torch.cuda.synchronize()
    state = [*weights, table, slots]
    before = [tensor.clone() for tensor in state]
    with no_synchronisation():
        calls()
    after = [tensor.clone() for tensor in state]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        calls()
    for turn in range(3):
        for tensor, start in zip(state, before, strict=True):
            tensor.copy_(start)
        graph.replay()
        for tensor, expected in zip(state, after, strict=True):
            assert torch.equal(tensor, expected), turn


@pytest.mark.parametrize("form", ["tiled", "triton"])
def test_linear_layers_allocate_no_gradient(form: str) -> None:
    kernels = forms().get(form) or pytest.skip("Triton cannot be imported")
    x, gy = layer((256, 8192, 8192), torch.bfloat16)
    weight = numbers(8192 * 8192, torch.bfloat16, 2).view(8192, 8192)
    slot = number(0.0)

    def calls() -> None:
        update(kernels["linear_update_"], weight, [x], [gy], lr=0.1, weight_decay=0.1, sq_norm=slot)
        kernels["linear_sq_norm_"](slot, [x], [gy], None)

    calls()
    assert memory_of(calls, "cuda")[1] <= 2 * tiled.GPU_TILE_BYTES + SCRATCH  # the gradient would have 128 MiB


def test_every_operator_has_one_kernel_and_info_names_it() -> None:
    chosen = backends.choice("CUDA")
    for name in ops.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lomo_kernels::{name}", "CUDA")
        expected = chosen.backend
        if chosen.backend == "cuda" and name in tiled.IMPLEMENTATIONS:
            expected = "tiled" if os.environ.get(backends.VARIABLE) == "cuda" or "triton" not in forms() else "triton"
        elif chosen.backend != "cuda" and name in rule_factors.IMPLEMENTATIONS:
            expected = "triton" if chosen.backend == "triton" and name == "adalomo_factors" else "tiled"
        assert chosen.of(name).backend == expected


# ---- The optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "rounding"), [("plain", "nearest"), ("all", "stochastic")])
@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_textbook_in_every_bit(dtype: torch.dtype, options: Options, rule: str, rounding: str) -> None:
    model = transformer(Options(**{**options.__dict__, "dtype": dtype})).to(CUDA)
    settings = {"lr": 0.5, "rounding": rounding, "seed": 11} | RULES[rule]
    textbook = Textbook(model, loss_scale=scale_for(dtype), **settings)
    optimizer = Lomo(model, **settings)
    for step in range(3):
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step), optimizer.last_grad_norm)
        assert optimizer.last_grad_norm.isfinite().item() == math.isfinite(textbook.norm)
        if math.isfinite(textbook.norm):
            assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6)
        assert_same_bits(weights_of(model), weights_of(textbook.model))


def test_gradients_die() -> None:
    """Sixteen layers of 32 MiB: above weights and activations stand at most two gradients, one being made, and those of
    two activations of 64 KiB."""
    layers, width = 16, 4096
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(CUDA, torch.bfloat16)
    optimizer = Lomo(model, lr=1e-3)
    x = torch.randn(8, width, device=CUDA, dtype=torch.bfloat16)
    optimizer.backward(model(x).square().mean())
    loss = model(x).square().mean()
    _, peak = memory_of(lambda: optimizer.backward(loss), "cuda")
    assert peak <= 2 * (width * width * 2) + 2 * x.nbytes + SCRATCH
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("rule", ["plain", "norm"])
def test_a_model_on_gpu_and_cpu(rule: str) -> None:
    """As `device_map` spreads one: the halves equal a model in one place but for the device's own products."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    textbook = Textbook(model, lr=0.01, **RULES[rule])
    model[0].to(CUDA)
    optimizer = Lomo(model, lr=0.01, **RULES[rule])
    for step in range(3):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(step))
        optimizer.backward(model[1](model[0](x.to(CUDA)).cpu()).square().sum())
        textbook.step(textbook.model(x).square().sum())
    assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-4)
    for ours, theirs in zip(model.parameters(), textbook.model.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["plain", "norm"])
def test_a_model_on_two_gpus(rule: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    second = torch.device("cuda", 1)
    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).to(CUDA)
    spread = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).to(CUDA)
    spread.load_state_dict(whole.state_dict())
    for layer in spread[4:]:
        layer.to(second)
    one, two = (Lomo(model, lr=0.1, **RULES[rule]) for model in (whole, spread))
    for step in range(5):
        x = torch.randn(5, 256, generator=torch.Generator().manual_seed(step)).to(CUDA)
        one.backward(whole(x).square().sum())
        two.backward(spread[4:](spread[:4](x).to(second)).square().sum())
    assert_same_bits(
        {name: weight.cpu() for name, weight in weights_of(spread).items()},
        {name: weight.cpu() for name, weight in weights_of(whole).items()},
    )


def test_a_side_stream_of_a_second_gpu() -> None:
    """Nothing but the optimizer makes it wait for what the caller set on its own stream of that GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    second = torch.device("cuda", 1)
    weights = [nn.Parameter(torch.ones(1000, device=device)) for device in (CUDA, second)]
    optimizer = Lomo(weights, lr=1.0)
    side = torch.cuda.Stream(second)
    for step in range(1, 6):
        optimizer.param_groups[0]["lr"] = 1.0 / 2**step
        with torch.cuda.stream(side):
            there = weights[1].sum()
        side.synchronize()
        loss = weights[0].sum() + there.to(CUDA)
        with torch.cuda.device(second):
            torch.cuda._sleep(10**8)  # before the caller's stream of that GPU sets the learning rate
        optimizer.backward(loss)
    for weight in weights:
        assert torch.equal(weight.cpu(), torch.full((1000,), 1 / 32))


def test_a_step_started_in_a_hook_is_told() -> None:
    """Hooks run in a thread of autograd's, where waiting for the step would be waiting for oneself."""
    weight = nn.Parameter(torch.ones(3, device=CUDA))
    optimizer = Lomo([weight], lr=0.1)
    weight.register_hook(lambda _: optimizer.step())
    weight.grad = torch.ones(3, device=CUDA)
    with pytest.raises(RuntimeError, match="inside another"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.backward(weight.sum())
