"""Clipping: the norm is over everything, exact, of the raw gradient, and never that of another step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.models import Options, assert_same_bits, gives, loss_of, same_bits, transformer, vector, weights_of
from support.textbook import Textbook
from torch import Tensor, nn

from lomo_kernels import Lomo


def coefficient(clip: float, norm: float) -> float:
    return min(1.0, clip / (norm + 1e-6))


def test_norm_is_over_all_parameters_and_groups() -> None:
    a, b, c = vector(0.0), vector(0.0, 0.0), nn.Parameter(torch.zeros(200, 200))
    optimizer = Lomo([{"params": [a]}, {"params": [b, c], "lr": 0.5}], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    loss = 2 * a.sum() + gives(b, torch.tensor([1.0, 2.0])) + (c * torch.eye(200)).sum() * 4  # 4 + 5 + 16 * 200
    optimizer.backward(loss)
    norm = math.sqrt(4 + 5 + 3200)
    assert optimizer.last_grad_norm.item() == pytest.approx(norm, rel=1e-6)
    assert a.item() == pytest.approx(-2 / norm, rel=1e-6)
    assert b[1].item() == pytest.approx(-1 / norm, rel=1e-6)
    assert c[3, 3].item() == pytest.approx(-2 / norm, rel=1e-6)


@pytest.mark.parametrize("size", [1, 3, 1000, 20_000])
@pytest.mark.parametrize("clip", [1e-4, 1.0, 1e4])
def test_coefficient(size: int, clip: float) -> None:
    grad = torch.linspace(-1, 1, size) if size > 1 else torch.tensor([-0.7])
    w = nn.Parameter(torch.zeros(size))
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=clip, clip_passes="two")
    optimizer.backward(gives(w, grad))
    norm = grad.double().norm().item()
    assert optimizer.last_grad_norm.item() == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(w.double(), -grad.double() * coefficient(clip, norm), rtol=2e-6, atol=0)


@pytest.mark.parametrize("kept", [False, True], ids=["backward", "step"])
def test_values_are_clamped_before_the_coefficient_and_the_norm_is_of_the_unclamped(kept: bool) -> None:
    w = vector(0.0, 0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_grad_value=1.0, clip_passes="two")
    loss = gives(w, torch.tensor([3.0, 4.0]))
    if kept:
        loss.backward()
        with pytest.warns(UserWarning):
            optimizer.step()
    else:
        optimizer.backward(loss)
    assert optimizer.last_grad_norm.item() == pytest.approx(5.0, rel=1e-12)
    # Norm of the clamped one: 0.7. Clamped after the coefficient: 0.6 and 0.8.
    assert w.tolist() == pytest.approx([-0.2, -0.2], rel=1e-6)


def test_no_clipping_below_the_bound() -> None:
    """A coefficient of one changes no bit."""
    clipped, plain = transformer(), transformer()
    a, b = Lomo(clipped, lr=0.3, clip_grad_norm=1e6, clip_passes="two"), Lomo(plain, lr=0.3)
    for step in range(3):
        a.backward(loss_of(clipped, step))
        b.backward(loss_of(plain, step))
    assert_same_bits(weights_of(clipped), weights_of(plain))
    assert a.last_grad_norm.item() == pytest.approx(b.last_grad_norm.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("clip_grad_norm", [None, 0.1])
def test_last_grad_norm_without_and_with_clipping(dtype: torch.dtype, clip_grad_norm: float | None) -> None:
    model = transformer(Options(dtype=dtype, tied=True))
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, clip_grad_value=1e-3, clip_passes="two")
    for step in range(3):
        grads = torch.autograd.grad(loss_of(model, step) * 1024, list(model.parameters()))
        exact = math.sqrt(sum((grad.double() / 1024).square().sum().item() for grad in grads))
        optimizer.backward(loss_of(model, step))
        # float16 gradients of another scale differ where they are subnormal.
        if optimizer.skipped_steps.item() == 0:
            rel = 1e-4 if dtype is torch.float16 else 1e-6
            assert optimizer.last_grad_norm.item() == pytest.approx(exact, rel=rel)
        else:
            optimizer.skipped_steps.zero_()


def test_last_grad_norm_is_a_tensor_of_one_step() -> None:
    w = vector(0.0, 0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    assert optimizer.last_grad_norm.item() == 0.0
    for scale in (1.0, 100.0, 0.01):
        optimizer.backward(gives(w, torch.tensor([3.0, 4.0])) * scale)
        norm = optimizer.last_grad_norm
        assert isinstance(norm, Tensor) and norm.dtype is torch.float64 and norm.ndim == 0 and not norm.requires_grad
        assert norm.item() == pytest.approx(5 * scale, rel=1e-6)


@pytest.mark.parametrize("size", [1e20, 3e18, 1e-22, 1e-25, 1e-38])
def test_huge_and_tiny_gradients(size: float) -> None:
    """Their squares leave float32's range; the norm does not."""
    w = nn.Parameter(torch.zeros(3, 7))
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    optimizer.backward(w.sum() * size)
    assert optimizer.last_grad_norm.item() == pytest.approx(size * math.sqrt(21), rel=1e-6)
    expected = coefficient(1.0, size * math.sqrt(21)) * size
    torch.testing.assert_close(w.double(), torch.full((3, 7), -expected, dtype=torch.float64), rtol=2e-6, atol=0)
    assert optimizer.skipped_steps.item() == 0


def test_zero_gradients() -> None:
    w = vector(1.0, -2.0)
    optimizer = Lomo([w], lr=0.5, clip_grad_norm=1.0, clip_passes="two")
    optimizer.backward(gives(w, torch.zeros(2)))
    assert w.tolist() == [1.0, -2.0]
    assert optimizer.last_grad_norm.item() == 0.0
    assert optimizer.skipped_steps.item() == 0
    optimizer.backward(gives(w, torch.tensor([3.0, 4.0])))
    assert w.tolist() == pytest.approx([0.7, -2.4], rel=1e-6)


def test_norm_does_not_depend_on_the_order_of_the_hooks() -> None:
    """One slot for each parameter: the float64 sum is in the order of the groups."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(size)) for size in (3, 500, 20_000, 77, 40_000)]
    grads = [torch.randn_like(param) * 10**i for i, param in enumerate(params)]
    norms = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 4, 1, 0, 2]):
        optimizer = Lomo(params, lr=0.0, clip_grad_norm=1.0, clip_passes="two")
        optimizer.backward(sum(gives(params[i], grads[i]) for i in order))
        norms.append(optimizer.last_grad_norm.clone())
        optimizer.remove()
    assert all(same_bits(norm, norms[0]) for norm in norms)


# ---- A norm is used for the step it was found for, and for no other ------------------------------------------------


def huge(w: Tensor) -> Tensor:
    return gives(w, torch.tensor([3e6, 4e6]))


def ordinary(w: Tensor) -> Tensor:
    return gives(w, torch.tensor([3.0, 4.0]))


def run_backward(optimizer: Lomo, w: Tensor) -> None:
    optimizer.backward(ordinary(w))


def run_fused_backward(optimizer: Lomo, w: Tensor) -> None:
    optimizer.fused_backward(ordinary(w), lr=1.0)


def run_step(optimizer: Lomo, w: Tensor) -> None:
    ordinary(w).backward()
    optimizer.step()
    w.grad = None  # as model.zero_grad() has it


def run_accumulated(optimizer: Lomo, w: Tensor) -> None:
    with optimizer.accumulate():
        optimizer.backward(ordinary(w) / 2)
    optimizer.backward(ordinary(w) / 2)


STEPS = [run_backward, run_fused_backward, run_step, run_accumulated]


@pytest.mark.filterwarnings("ignore:Lomo.step")
@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("first", STEPS)
def test_a_norm_is_not_used_by_the_next_step(
    first: Callable[[Lomo, Tensor], None], second: Callable[[Lomo, Tensor], None]
) -> None:
    w = vector(0.0, 0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    optimizer.backward(huge(w))
    for run in (first, second):
        with torch.no_grad():
            w.zero_()
        run(optimizer, w)
        assert optimizer.last_grad_norm.item() == pytest.approx(5.0, rel=1e-6)
        assert w.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)


@pytest.mark.filterwarnings("ignore:Lomo.step")
@pytest.mark.parametrize("between", [run_backward, run_step, run_accumulated])
def test_a_step_ends_what_grad_norm_found(between: Callable[[Lomo, Tensor], None]) -> None:
    """grad_norm() is for the fused_backward() that follows it; whatever else comes finds its own norm."""
    w = vector(0.0, 0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    optimizer.grad_norm(huge(w))
    between(optimizer, w)
    assert optimizer.last_grad_norm.item() == pytest.approx(5.0, rel=1e-6)
    assert w.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)
    with torch.no_grad():
        w.zero_()
    optimizer.fused_backward(gives(w, torch.tensor([30.0, 40.0])), lr=1.0)
    assert optimizer.last_grad_norm.item() == pytest.approx(50.0, rel=1e-6)
    assert w.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)


@pytest.mark.parametrize("change", ["load_state_dict", "add_param_group", "to another dtype and back", "zero_grad"])
def test_what_changes_the_optimizer_ends_what_grad_norm_found(change: str) -> None:
    held = nn.ParameterList([vector(0.0, 0.0)])
    optimizer = Lomo(held.parameters(), lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    optimizer.grad_norm(huge(held[0]))
    if change == "load_state_dict":
        optimizer.load_state_dict(optimizer.state_dict())
    elif change == "add_param_group":
        optimizer.add_param_group({"params": [vector(1.0)]})
    elif change == "zero_grad":
        optimizer.zero_grad()
    else:
        held.to(torch.bfloat16)
        optimizer.backward(ordinary(held[0]))
        held.to(torch.float32)
        with torch.no_grad():
            held[0].zero_()
    optimizer.fused_backward(ordinary(held[0]), lr=1.0)
    assert held[0].tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)


def test_grad_norm_twice_uses_the_later() -> None:
    w = vector(0.0, 0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    optimizer.grad_norm(huge(w))
    optimizer.grad_norm(ordinary(w))
    optimizer.fused_backward(ordinary(w), lr=1.0)
    assert w.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)


def test_grad_norm_is_used_once() -> None:
    w = vector(0.0, 0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    optimizer.grad_norm(huge(w))
    optimizer.fused_backward(huge(w), lr=1.0)
    with torch.no_grad():
        w.zero_()
    optimizer.fused_backward(ordinary(w), lr=1.0)
    assert w.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)


def test_grad_norm_then_a_second_forward_as_lomo_optim_has_it() -> None:
    """lomo_optim's trainers compute the loss again between the two; the norm found holds for it."""
    model = transformer()
    textbook = Textbook(model, lr=0.3, clip_grad_norm=0.1)
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=0.1, clip_passes="two")
    for step in range(3):
        optimizer.grad_norm(loss_of(model, step))
        optimizer.fused_backward(loss_of(model, step), lr=0.3)
        textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


def test_grad_norm_refuses_kept_gradients() -> None:
    """Its norm would be of a part of the step only."""
    w = vector(0.0, 0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    ordinary(w).backward()
    with pytest.raises(RuntimeError, match=r"\.grad"):
        optimizer.grad_norm(ordinary(w))


def test_failed_norm_backward_leaves_no_norm_behind() -> None:
    w = vector(0.0, 0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    optimizer.grad_norm(huge(w))
    loss = ordinary(w)
    torch.autograd.grad(loss, w)  # frees the graph
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.grad_norm(loss)
    with torch.no_grad():
        w.zero_()
    optimizer.fused_backward(ordinary(w), lr=1.0)
    assert w.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)
