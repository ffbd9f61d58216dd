"""Defects of other optimizers of this kind, each pinned by one test.

lomo-optim 0.1.1 unless a test says otherwise. Those that concern several processes are tested elsewhere.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from support.models import Options, assert_same_bits, gives, loss_of, transformer, vector, weights_of
from support.textbook import Textbook
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lomo_kernels
from lomo_kernels import Lomo

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_a_backward_in_evaluation_updates_nothing() -> None:
    model = transformer()
    Lomo(model, lr=0.1, clip_grad_norm=1.0, clip_passes="two")
    before = weights_of(model)
    model.eval()
    loss_of(model, 0).backward()
    torch.autograd.grad(loss_of(model, 1), model.embedding.weight)
    assert_same_bits(weights_of(model), before)
    expected = torch.autograd.grad(loss_of(model, 0), model.head.weight)[0]
    assert torch.equal(model.head.weight.grad, expected), "and leaves the true gradient"


def test_hooks_can_be_removed() -> None:
    model = transformer()
    with Lomo(model, lr=0.1) as optimizer:
        optimizer.backward(loss_of(model, 0))
    assert all(not param._post_accumulate_grad_hooks for param in model.parameters())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights_of(model)
    loss_of(model, 1).backward()
    assert_same_bits(weights_of(model), before)
    sgd.step()


def test_groups_learning_rates_and_decays_are_honoured() -> None:
    a, b = vector(1.0), vector(1.0)
    optimizer = Lomo([{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 1.0}], lr=0.25)
    optimizer.backward((a + b).sum())
    assert (a.item(), b.item()) == (0.5, 0.5)


@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_step_works() -> None:
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5)
    w.sum().backward()
    optimizer.step()
    assert w.item() == 0.5


def test_it_is_a_torch_optimizer() -> None:
    """Asked for again and again: zero_grad, state_dict, add_param_group, repr, hooks before and after step."""
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "lr: 0.5" in repr(optimizer)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    with pytest.warns(UserWarning):
        w.sum().backward()
        optimizer.step()
    assert calls == ["before", "after"]
    optimizer.zero_grad()
    assert w.grad is None


def test_float16_is_recognised_by_parameters_and_by_what_backward_computes() -> None:
    """lomo-optim goes by the loss: a float32 loss of a float16 model is not scaled there."""
    model = transformer(Options(dtype=torch.float16))
    assert loss_of(model, 0).dtype is torch.float32
    assert Lomo(model, lr=0.1).loss_scale.item() > 1.0
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5)
    optimizer.backward(w.sum().bfloat16())
    assert optimizer.loss_scale.item() == 1.0
    optimizer = Lomo([w], lr=0.5)
    optimizer.backward(w.sum().half())
    assert optimizer.loss_scale.item() > 1.0


@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
def test_an_overflow_in_a_single_process_is_handled(clip_grad_norm: float | None) -> None:
    assert not (torch.distributed.is_available() and torch.distributed.is_initialized())
    model = transformer(Options(dtype=torch.float16))
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, clip_passes="two")
    optimizer.backward(loss_of(model, 0) * 1e6)
    assert optimizer.skipped_steps.item() == 1
    assert all(param.isfinite().all() for param in model.parameters())


def test_an_overflow_met_while_updating_leaves_no_half_updated_model() -> None:
    model = transformer(Options(dtype=torch.float16))
    optimizer = Lomo(model, lr=0.1)
    before = weights_of(model)
    model.embedding.weight.register_hook(lambda grad: torch.full_like(grad, math.inf))  # the last gradient to come
    optimizer.backward(loss_of(model, 0))
    assert_same_bits(weights_of(model), before)


def test_an_overflow_in_grad_norm_does_not_stick() -> None:
    model = transformer(Options(dtype=torch.float16))
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=1.0, clip_passes="two")
    before = weights_of(model)
    loss = loss_of(model, 0) * 1e6
    optimizer.grad_norm(loss)
    optimizer.fused_backward(loss, lr=0.1)
    assert_same_bits(weights_of(model), before)
    optimizer.backward(loss_of(model, 1))
    assert optimizer.skipped_steps.item() == 1
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_a_clip_coefficient_is_used_once() -> None:
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    loss = gives(w, torch.tensor([1e6]))
    optimizer.grad_norm(loss)
    optimizer.fused_backward(loss, lr=0.0)
    optimizer.fused_backward(gives(w, torch.tensor([0.5])), lr=1.0)
    assert w.item() == -0.5


def test_fused_backward_without_grad_norm_is_clipped() -> None:
    """lomo_optim raises, or uses an old coefficient."""
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    optimizer.fused_backward(gives(w, torch.tensor([4.0])), lr=1.0)
    assert w.item() == pytest.approx(-1.0, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("rule", [{}, {"clip_grad_norm": 1.0}, {"clip_grad_value": 1.0}], ids=["", "norm", "value"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_are_not_finite_make_no_weight_nan(dtype: torch.dtype, rule: dict[str, Any], bad: float) -> None:
    model = transformer(Options(dtype=dtype))
    optimizer = Lomo(model, lr=0.1, weight_decay=0.1, **rule)
    optimizer.backward(loss_of(model, 0) * bad)
    assert all(param.isfinite().all() for param in model.parameters())


def test_the_loss_scale_starts_sane_and_grows() -> None:
    """It starts at 2**32 there, which overflows until it has been halved some twenty times, and never grows."""
    model = transformer(Options(dtype=torch.float16))
    optimizer = Lomo(model, lr=0.1)
    assert optimizer.loss_scale.item() == 2.0**16
    optimizer.backward(loss_of(model, 0))
    assert optimizer.skipped_steps.item() == 0
    w = vector(0.0, dtype=torch.float16)
    small = Lomo([w], lr=0.0)
    for _ in range(2000):
        small.backward(w.float().sum() * 0.25)
    assert small.loss_scale.item() == 2.0**17


def test_weight_decay_below_half_an_ulp_is_not_lost() -> None:
    """optimi 0.3.3: bfloat16 weights of 1 and lr * weight_decay = 2**-12 stay where they are for ever."""
    count, steps = 100_000, 16
    nearest, stochastic = (nn.Parameter(torch.ones(count, dtype=torch.bfloat16)) for _ in range(2))
    for w, rounding in ((nearest, "nearest"), (stochastic, "stochastic")):
        optimizer = Lomo([w], lr=2.0**-2, weight_decay=2.0**-10, rounding=rounding)
        for _ in range(steps):
            optimizer.backward((w * 0.0).sum())
    assert (nearest == 1).all(), "what is to be avoided"
    expected = (1 - 2.0**-12) ** steps
    # One step down of 2**-8 with probability 2**-4: a standard deviation of about 2**-8 * sqrt(steps / 16).
    error = 2.0**-8 * math.sqrt(steps / 16 / count)
    assert stochastic.double().mean().item() == pytest.approx(expected, abs=4 * error)


def test_small_updates_of_bfloat16_weights_are_not_lost() -> None:
    count, steps = 100_000, 16
    w = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    optimizer = Lomo([w], lr=2.0**-12, rounding="stochastic")
    for _ in range(steps):
        optimizer.backward(w.float().sum())
    error = 2.0**-8 * math.sqrt(steps / 16 / count)
    assert w.double().mean().item() == pytest.approx(1 - steps * 2.0**-12, abs=4 * error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_vector_of_weights_is_left_out(dtype: torch.dtype) -> None:
    """torch 2.13's fused SGD on the CPU leaves whole vectors of 16-bit weights as they were."""
    for size in (1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 40_001):
        w = nn.Parameter(torch.ones(size, dtype=dtype))
        Lomo([w], lr=0.25).backward(w.float().sum() * 0.5)
        assert (w == 0.875).all(), size


@pytest.mark.filterwarnings("ignore:Lomo.step")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulation_as_accelerate_does_it(dtype: torch.dtype) -> None:
    """Plain backwards of loss / n; step() and zero_grad() after the last. There the weights change at every part."""
    parts = 4
    model = transformer(Options(dtype=dtype))
    textbook = Textbook(model, lr=0.3, clip_grad_norm=0.3)
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=0.3, clip_passes="two")
    for step in range(2):
        before = weights_of(model)
        for part in range(parts):
            assert_same_bits(weights_of(model), before)
            (loss_of(model, parts * step + part) / parts).backward()
            textbook.backward(loss_of(textbook.model, parts * step + part) / parts)
        optimizer.step()
        optimizer.zero_grad()
        textbook.apply(norm=optimizer.last_grad_norm)
        textbook.zero_grad()
        assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6), "and logged truly"
    assert_same_bits(weights_of(model), weights_of(textbook.model))


def test_clipping_is_in_force_in_step() -> None:
    """accelerate's and transformers' max_grad_norm does nothing with lomo_optim."""
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    gives(w, torch.tensor([100.0])).backward()
    with pytest.warns(UserWarning):
        optimizer.step()
    assert w.item() == pytest.approx(-1.0, rel=1e-6)


def test_clip_grad_norm_of_torch_works_on_plain_gradients() -> None:
    """What a trainer does with max_grad_norm between backward() and step()."""
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0)
    gives(w, torch.tensor([100.0])).backward()
    nn.utils.clip_grad_norm_([w], 1.0)
    with pytest.warns(UserWarning):
        optimizer.step()
    assert w.item() == pytest.approx(-1.0, rel=1e-5)


def test_all_state_is_in_the_state_dict() -> None:
    """Two steps after a resume are those without it; nothing is kept elsewhere."""
    model = transformer(Options(dtype=torch.bfloat16))
    optimizer = Lomo(model, lr=0.1, rounding="stochastic")
    optimizer.backward(loss_of(model, 0))
    twin = transformer(Options(dtype=torch.bfloat16))
    twin.load_state_dict(model.state_dict())
    other = Lomo(twin, lr=7.0, rounding="stochastic", seed=8)
    other.load_state_dict(optimizer.state_dict())
    for step in (1, 2):
        optimizer.backward(loss_of(model, step))
        other.backward(loss_of(twin, step))
    assert_same_bits(weights_of(model), weights_of(twin))


def test_parameters_of_four_dimensions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 1))
    textbook = Textbook(model, lr=0.1, clip_grad_norm=0.1)
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=0.1, clip_passes="two")
    x = torch.linspace(-1, 1, 32).view(1, 2, 4, 4)
    optimizer.backward(model(x).sum())
    textbook.step(textbook.model(x).sum(), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


# ---- Cost -----------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """`count` parameters in a row."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(size)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x * weight
        return x.sum()


def library_work(optimizer: Lomo, loss: Tensor) -> int:
    """Bytecode instructions that the library's own Python executes during one step."""
    folder = lomo_kernels.__path__[0]
    executed = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal executed
        if not frame.f_code.co_filename.startswith(folder):
            return None
        frame.f_trace_opcodes = True
        executed += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        optimizer.backward(loss)
    finally:
        sys.settrace(before)
    return executed


@pytest.mark.parametrize("size", [4, 20_000], ids=["small", "large"])
@pytest.mark.parametrize(
    "rule", [{}, {"clip_grad_norm": 1.0}, {"loss_scale": "dynamic"}], ids=["plain", "norm", "scale"]
)
def test_the_cost_of_a_step_is_linear_in_the_number_of_parameters(rule: dict[str, Any], size: int) -> None:
    """There every hook looks through all parameters: 85 000 visits for 291 of them. Counted, not timed."""
    work = {}
    for count in (64, 128, 256):
        model = Chain(count, size)
        optimizer = Lomo(model, lr=1e-3, **rule)
        optimizer.backward(model(torch.ones(size)))
        work[count] = library_work(optimizer, model(torch.ones(size)))
    assert work[64] > 0
    first, second = work[128] - work[64], work[256] - work[128]
    assert second == pytest.approx(2 * first, rel=0.02)


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rule", [{}, {"clip_grad_norm": 1.0}, {"clip_grad_value": 1.0}], ids=["plain", "norm", "value"]
)
def test_a_step_never_waits_for_a_device(dtype: torch.dtype, rule: dict[str, Any]) -> None:
    """lomo-optim and OneTrainer read a flag per tensor (.item()); here the host reads nothing in a whole step. Only the
    first step of a graph reads norms, to compare two passes."""
    model = transformer(Options(dtype=dtype, tied=True))
    optimizer = Lomo(model, lr=torch.tensor(0.1), rounding="stochastic", **rule)

    def steps() -> None:
        optimizer.backward(loss_of(model, 0))
        with optimizer.accumulate():
            optimizer.backward(loss_of(model, 1))
        optimizer.backward(loss_of(model, 2))
        loss = loss_of(model, 3)
        optimizer.grad_norm(loss)
        optimizer.fused_backward(loss, lr=0.2)

    with CountOperators():  # its graphs are of other kinds than those without it
        steps()
    with CountOperators() as operators:
        steps()
    reads = {
        "aten._local_scalar_dense.default",
        "aten.is_nonzero.default",
        "aten.equal.default",
        "aten.nonzero.default",
    }
    assert not reads & operators.counts.keys()
    assert any("lomo_kernels" in name for name in operators.counts), "the counter sees the kernels"


def test_the_counter_sees_reads() -> None:
    w = vector(1.0)
    optimizer = Lomo([w], nonfinite="raise")
    with CountOperators() as operators:
        optimizer.backward(w.sum())
    assert operators.counts["aten._local_scalar_dense.default"]


def test_small_parameters_share_a_call() -> None:
    """300 norms and biases cost 126 us in one list call and 426 us in 300."""
    model = Chain(100, 8)
    optimizer = Lomo(model, lr=1e-3)
    loss = model(torch.ones(8))
    with CountOperators() as operators:
        optimizer.backward(loss)
    assert operators.counts["lomo_kernels.update_.default"] == 1


def test_every_public_method_says_what_it_does() -> None:
    for name, member in inspect.getmembers(Lomo):
        if not name.startswith("_") and name in vars(Lomo):
            assert inspect.getdoc(member), name
