"""Loss scaling: sane at the start, moves both ways, and a step that overflows changes nothing or is not a step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.models import (
    Options,
    assert_same_bits,
    gives,
    loss_of,
    on_gradient_pass,
    transformer,
    vector,
    weights_of,
)
from support.textbook import Textbook
from torch import Tensor, nn

from lomo_kernels import Lomo

HALF = torch.float16
INTERVAL = 2000


def half_model() -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList(nn.Parameter(torch.randn(size, dtype=HALF)) for size in (7, 40_000, 3, 33_000))


def loss_with(model: nn.ParameterList, gradient: float, only: int | None = None) -> Tensor:
    """The gradient of every element, or of the elements of parameter `only`, is `gradient`; of the others 2**-10."""
    return sum(
        (w.float() * (gradient if only in (None, i) else 2.0**-10)).sum() for i, w in enumerate(model)
    )  # fmt: skip


# ---- When there is one ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF], ids=str)
def test_the_default_goes_by_the_parameters_dtype(dtype: torch.dtype) -> None:
    """Not by the loss's: a float16 model with a float32 loss is the usual case."""
    optimizer = Lomo([vector(1.0), vector(1.0, dtype=dtype)])
    assert optimizer.loss_scale.item() == (2.0**16 if dtype is HALF else 1.0)
    optimizer.backward(sum(param.float().sum() * 0.25 for param in optimizer.param_groups[0]["params"]))
    assert optimizer.skipped_steps.item() == 0


@pytest.mark.parametrize(("scale", "expected"), [(None, 1.0), (128.0, 128.0), (4, 4.0), ("dynamic", 2.0**16)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_it_can_be_chosen(dtype: torch.dtype, scale: Any, expected: float) -> None:
    optimizer = Lomo([vector(1.0, dtype=dtype)], loss_scale=scale, clip_passes="two")
    assert optimizer.loss_scale.item() == expected


@pytest.mark.parametrize("clip_grad_norm", [None, 1e-3])
def test_it_saves_gradients_that_float16_would_lose(clip_grad_norm: float | None) -> None:
    """2**-26 is below float16's smallest subnormal."""
    w = vector(0.0, 0.0, dtype=HALF)
    optimizer = Lomo([w], lr=2.0**10, clip_grad_norm=clip_grad_norm, clip_passes="two")
    optimizer.backward(w.float().sum() * 2.0**-26)
    assert w.tolist() == [-(2.0**-16)] * 2
    assert optimizer.last_grad_norm.item() == pytest.approx(2.0**-26 * math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("scale", [8.0, 1000.0, 1001.0, 3.7])
@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.bfloat16, HALF], ids=str)
def test_a_static_scale_cancels_out(scale: float, loss_dtype: torch.dtype) -> None:
    """Also where the loss's dtype cannot hold it exactly."""
    w = vector(1.0, 2.0, 3.0)
    optimizer = Lomo([w], lr=1.0, loss_scale=scale, clip_passes="two")
    optimizer.backward(w.sum().to(loss_dtype))
    assert optimizer.last_grad_norm.item() == pytest.approx(math.sqrt(3), rel=1e-6)
    assert w.tolist() == pytest.approx([0.0, 1.0, 2.0], abs=1e-6)


# ---- How it moves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
def test_it_doubles_after_2000_good_steps_in_a_row(clip_grad_norm: float | None) -> None:
    w = vector(0.0, dtype=HALF)
    optimizer = Lomo([w], lr=0.0, clip_grad_norm=clip_grad_norm, clip_passes="two")
    scales = []
    for step in range(2 * INTERVAL + 5):
        optimizer.backward(gives(w, torch.tensor([math.inf if step == 4 else 2.0**-10])))
        scales.append(optimizer.loss_scale.item())
    assert scales[3] == 2.0**16
    assert scales[4 : 4 + INTERVAL] == [2.0**15] * INTERVAL, "an overflow starts the count again"
    assert scales[4 + INTERVAL : 4 + 2 * INTERVAL] == [2.0**16] * INTERVAL
    assert scales[4 + 2 * INTERVAL] == 2.0**17
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.step_count.item() == len(scales)


def almost_grown(optimizer: Lomo) -> None:
    """One good step before the scale doubles, by way of the state dict."""
    state = optimizer.state_dict()
    state["lomo"]["growth_tracker"].fill_(INTERVAL - 1)
    optimizer.load_state_dict(state)


def test_it_doubles_as_soon_as_the_tracker_says() -> None:
    model = half_model()
    optimizer = Lomo(model, lr=0.0)
    almost_grown(optimizer)
    optimizer.backward(loss_with(model, 2.0**-10))
    assert optimizer.loss_scale.item() == 2.0**17
    optimizer.backward(loss_with(model, 2.0**-10))
    assert optimizer.loss_scale.item() == 2.0**17


def test_it_grows_by_accumulated_and_fused_steps_too() -> None:
    model = half_model()
    optimizer = Lomo(model, lr=0.0, clip_grad_norm=1.0, clip_passes="two")
    almost_grown(optimizer)
    with optimizer.accumulate():
        optimizer.backward(loss_with(model, 2.0**-10))
        assert optimizer.loss_scale.item() == 2.0**16, "not in the middle of a step"
    optimizer.backward(loss_with(model, 2.0**-10))
    assert optimizer.loss_scale.item() == 2.0**17
    almost_grown(optimizer)
    loss = loss_with(model, 2.0**-10)
    optimizer.grad_norm(loss)
    assert optimizer.loss_scale.item() == 2.0**17
    optimizer.fused_backward(loss, lr=0.0)
    assert optimizer.loss_scale.item() == 2.0**18


def test_it_halves_until_the_gradient_fits() -> None:
    w = vector(0.0, dtype=HALF)
    optimizer = Lomo([w], lr=1.0)
    scales = []
    for _ in range(6):
        optimizer.backward(gives(w, torch.tensor([10.0])))
        scales.append(optimizer.loss_scale.item())
    assert scales == [2.0**15, 2.0**14, 2.0**13, 2.0**12, 2.0**12, 2.0**12]  # 10 * 2**12 < 65504
    assert optimizer.skipped_steps.item() == 4
    assert w.item() == -20.0


def test_it_never_becomes_useless() -> None:
    """A gradient that no scale makes finite does not drive it to zero, whose inverse would not be finite."""
    w = vector(1.0, dtype=HALF)
    optimizer = Lomo([w], lr=1.0)
    for _ in range(200):
        optimizer.backward(gives(w, torch.tensor([math.inf])))
    assert optimizer.skipped_steps.item() == 200
    assert w.item() == 1.0
    assert optimizer.loss_scale.item() > 0
    assert optimizer.loss_scale.reciprocal().isfinite()
    optimizer.backward(gives(w, torch.tensor([0.5])))
    assert optimizer.skipped_steps.item() == 200


@pytest.mark.parametrize("scale", [None, 64.0, 2.0**16])
def test_a_fixed_one_never_moves(scale: float | None) -> None:
    w = vector(0.0, dtype=HALF)
    optimizer = Lomo([w], lr=1.0, loss_scale=scale, clip_passes="two")
    for gradient in (math.inf, 0.25, math.nan, 0.25):
        optimizer.backward(gives(w, torch.tensor([gradient])))
        assert optimizer.loss_scale.item() == (scale or 1.0)
    assert w.item() == -0.5
    assert optimizer.skipped_steps.item() == 2


def test_a_float16_loss_does_not_overflow_at_the_start() -> None:
    """2**16 itself is more than float16 holds; a pure float16 model's loss must not cost a step for that."""
    w = vector(1.0, dtype=HALF)
    optimizer = Lomo([w], lr=0.5)
    optimizer.backward((w * 2.0**-4).sum())
    assert optimizer.skipped_steps.item() == 0
    assert w.item() == 1.0 - 2.0**-5


def test_a_fixed_scale_that_a_float16_loss_cannot_hold_is_no_silent_standstill() -> None:
    """Either it works, or it says why it does not; skipping every step is neither."""
    w = vector(1.0, dtype=HALF)
    optimizer = Lomo([w], lr=0.5, loss_scale=2.0**16, clip_passes="two")
    try:
        optimizer.backward((w * 2.0**-4).sum())
    except (ValueError, RuntimeError) as error:
        assert "scale" in str(error)
    else:
        assert w.item() == 1.0 - 2.0**-5


def test_as_a_textbook_has_it_through_overflows() -> None:
    model = transformer(Options(dtype=HALF, tied=True))
    settings = {"lr": 0.3, "rounding": "stochastic", "clip_grad_norm": 0.5, "clip_passes": "two"}
    textbook = Textbook(model, loss_scale="dynamic", **settings)
    optimizer = Lomo(model, **settings)
    for step in range(8):
        factor = 3000.0 if step % 3 == 1 else 1.0
        optimizer.backward(loss_of(model, step) * factor)
        textbook.step(loss_of(textbook.model, step) * factor, norm=optimizer.last_grad_norm)
        assert_same_bits(weights_of(model), weights_of(textbook.model))
        assert optimizer.loss_scale.item() == textbook.loss_scale
        assert optimizer.skipped_steps.item() == textbook.skipped
    assert 2 <= textbook.skipped <= 6


# ---- All or nothing -------------------------------------------------------------------------------------------------

BAD = [math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("only", range(4))
@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
def test_an_overflow_anywhere_changes_nothing(only: int, clip_grad_norm: float | None, bad: float) -> None:
    """Whichever parameter it is in: the one whose gradient comes last, too, when the others' are long consumed."""
    model = half_model()
    before = weights_of(model)
    optimizer = Lomo(model, lr=1.0, weight_decay=0.1, clip_grad_norm=clip_grad_norm, clip_passes="two")
    optimizer.backward(loss_with(model, bad, only))
    assert_same_bits(weights_of(model), before)
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.step_count.item() == 1, "a skipped step is a step"
    assert optimizer.loss_scale.item() == 2.0**15
    assert all(w.grad is None for w in model)
    assert not optimizer.last_grad_norm.isfinite()
    optimizer.backward(loss_with(model, 2.0**-3))
    assert optimizer.skipped_steps.item() == 1
    assert all((w != before[name]).any() for name, w in model.named_parameters())


@pytest.mark.parametrize("only", range(4))
def test_an_overflow_of_one_element_changes_nothing(only: int) -> None:
    model = half_model()
    before = weights_of(model)
    on_gradient_pass(model[only], lambda _, grad: grad.index_fill(0, torch.tensor([len(grad) - 1]), math.inf))
    optimizer = Lomo(model, lr=1.0)
    optimizer.backward(loss_with(model, 0.25))
    assert_same_bits(weights_of(model), before)
    assert optimizer.skipped_steps.item() == 1


def test_clipping_skips_whole_steps_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = half_model().to(dtype)
        before = weights_of(model)
        optimizer = Lomo(model, lr=1.0, weight_decay=0.1, clip_grad_norm=1.0, clip_passes="two")
        optimizer.backward(loss_with(model, math.nan, only=2))
        assert_same_bits(weights_of(model), before)
        assert optimizer.skipped_steps.item() == 1
        optimizer.remove()


@pytest.mark.parametrize("scale", [None, 256.0])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("size", [3, 40_000])
def test_without_a_norm_the_elements_concerned_keep_their_weight(size: int, bad: float, scale: float | None) -> None:
    w, other = nn.Parameter(torch.ones(size)), vector(1.0)
    grad = torch.full((size,), 0.25)
    grad[1] = bad
    optimizer = Lomo([w, other], lr=1.0, weight_decay=0.5, loss_scale=scale, clip_passes="two")
    optimizer.backward(gives(w, grad) + other.sum() * 0.25)
    assert w[1].item() == 1.0, "not even decay"
    assert (w[2].item(), w[0].item(), other.item()) == (0.25, 0.25, 0.25)
    assert optimizer.skipped_steps.item() == 1
    assert not optimizer.last_grad_norm.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF], ids=str)
@pytest.mark.parametrize(
    "rule",
    [{}, {"clip_grad_norm": 1.0, "clip_passes": "two"}, {"clip_grad_value": 1.0}, {"loss_scale": 1024.0}],
    ids=str,
)
@pytest.mark.parametrize("kept", [False, True], ids=["backward", "step"])
@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_no_weight_ever_becomes_nan(dtype: torch.dtype, rule: dict[str, Any], kept: bool) -> None:
    model = transformer(Options(dtype=dtype))
    optimizer = Lomo(model, lr=0.1, weight_decay=0.1, rounding="stochastic", **rule)
    for step, factor in enumerate((1.0, math.nan, math.inf, -math.inf, 1e30, 1.0)):
        loss = loss_of(model, step) * factor
        if kept:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.backward(loss)
    assert all(param.isfinite().all() for param in model.parameters())
    assert 3 <= optimizer.skipped_steps.item() <= 5


def test_an_overflow_in_the_update_pass_only_cannot_half_update() -> None:
    """What lomo_optim does: it looks for an overflow while it updates, tensor by tensor."""
    model = transformer(Options(dtype=HALF))
    before = weights_of(model)
    optimizer = Lomo(model, lr=0.1)
    # The embedding's gradient, the last to come, overflows; the head's and the blocks' do not.
    model.embedding.weight.register_hook(lambda grad: grad * math.inf)
    optimizer.backward(loss_of(model, 0))
    assert_same_bits(weights_of(model), before)


def test_a_gradient_not_finite_in_the_second_pass_only_makes_no_weight_nan() -> None:
    """No two passes over one graph differ so; a hook of the user's can, after the first step, which looks for it."""
    model = transformer(Options(dtype=HALF))
    passes_of_first_step = 3
    on_gradient_pass(model.head.weight, lambda number, grad: grad * math.nan if number > passes_of_first_step else grad)
    optimizer = Lomo(model, lr=0.1, clip_passes="two")
    optimizer.backward(loss_of(model, 0))
    before = weights_of(model)
    optimizer.backward(loss_of(model, 0))
    assert_same_bits({"": model.head.weight}, {"": before["head.weight"]})
    assert all(param.isfinite().all() for param in model.parameters())


# ---- grad_norm and fused_backward -----------------------------------------------------------------------------------


def test_an_overflow_in_grad_norm_is_over_with_its_step() -> None:
    model = half_model()
    before = weights_of(model)
    optimizer = Lomo(model, lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    loss = loss_with(model, math.inf, only=1)
    assert not optimizer.grad_norm(loss).isfinite()
    optimizer.fused_backward(loss, lr=1.0)
    assert_same_bits(weights_of(model), before)
    assert (optimizer.loss_scale.item(), optimizer.skipped_steps.item()) == (2.0**15, 1)
    loss = loss_with(model, 2.0**-3)
    assert optimizer.grad_norm(loss).isfinite()
    optimizer.fused_backward(loss, lr=1.0)
    assert all((w != before[name]).any() for name, w in model.named_parameters())


def test_a_loop_that_leaves_overflowed_batches_out_does_not_hang() -> None:
    """lomo_optim's trainers go on to the next batch where grad_norm() overflows; the scale must have moved by then."""
    w = vector(0.0, dtype=HALF)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    for _ in range(20):
        loss = gives(w, torch.tensor([10.0]))
        if not optimizer.grad_norm(loss).isfinite():
            continue
        optimizer.fused_backward(loss, lr=1.0)
    assert w.item() != 0.0


# ---- Plain backwards ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_step_on_unscaled_gradients_leaves_the_scale_alone() -> None:
    """A plain backward carries no scale, so its overflow says nothing about it."""
    model = half_model()
    before = weights_of(model)
    optimizer = Lomo(model, lr=1.0)
    loss_with(model, math.inf, only=2).backward()
    optimizer.step()
    assert_same_bits(weights_of(model), before)
    assert (optimizer.loss_scale.item(), optimizer.skipped_steps.item()) == (2.0**16, 1)
    optimizer.zero_grad()
    loss_with(model, 0.25).backward()
    optimizer.step()
    torch.testing.assert_close(model[0], before["0"] - 0.25)


@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_accumulated_gradients_are_unscaled_once() -> None:
    for finish in ("step", "backward"):
        w = vector(1.0, dtype=HALF)
        optimizer = Lomo([w], lr=1.0)
        with optimizer.accumulate():
            optimizer.backward(w.float().sum() * 0.125)
            if finish == "step":
                optimizer.backward(w.float().sum() * 0.125)
        if finish == "step":
            optimizer.step()
        else:
            optimizer.backward(w.float().sum() * 0.125)
        assert w.item() == 0.75
        assert optimizer.last_grad_norm.item() == 0.25


def test_scaled_and_unscaled_gradients_do_not_mix() -> None:
    w = vector(1.0, dtype=HALF)
    optimizer = Lomo([w], lr=1.0)
    with optimizer.accumulate():
        optimizer.backward(w.float().sum() * 0.125)
    with pytest.raises(RuntimeError, match="loss scale"):
        (w.float().sum() * 0.125).backward()


@pytest.mark.filterwarnings("ignore:Lomo.step")
@pytest.mark.parametrize("clear", ["model.zero_grad", "grad = None"])
def test_gradients_dropped_behind_the_optimizers_back_are_forgotten(clear: str) -> None:
    """model.zero_grad() is as common as optimizer.zero_grad()."""
    model = nn.ParameterList([vector(1.0, dtype=HALF)])
    optimizer = Lomo(model, lr=1.0)
    with optimizer.accumulate():
        optimizer.backward(model[0].float().sum() * 0.125)
    if clear == "model.zero_grad":
        model.zero_grad()
    else:
        model[0].grad = None
    (model[0].float().sum() * 0.25).backward()
    optimizer.step()
    assert model[0].item() == 0.75


@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_a_gradient_set_by_hand_carries_no_scale() -> None:
    w = vector(1.0, dtype=HALF)
    optimizer = Lomo([w], lr=1.0)
    with optimizer.accumulate():
        optimizer.backward(w.float().sum() * 0.125)
    w.grad = torch.full_like(w, 0.25)
    optimizer.step()
    assert w.item() == 0.75


def test_zeros_left_by_zero_grad_do_not_cost_the_scale() -> None:
    """zero_grad(set_to_none=False) leaves tensors of zeros; what backward adds to them is scaled as ever."""
    w = vector(0.0, dtype=HALF)
    optimizer = Lomo([w], lr=2.0**10)
    with optimizer.accumulate():
        optimizer.backward(w.float().sum())
    optimizer.zero_grad(set_to_none=False)
    optimizer.backward(w.float().sum() * 2.0**-26)
    assert w.item() == -(2.0**-16)


# ---- nonfinite="raise" ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
def test_raise_names_the_parameter_and_counts_the_step(dtype: torch.dtype, clip_grad_norm: float | None) -> None:
    model = transformer(Options(dtype=dtype))
    optimizer = Lomo(model, lr=0.1, nonfinite="raise", clip_grad_norm=clip_grad_norm, clip_passes="two")
    model.blocks[1].up.weight.register_hook(lambda grad: grad * math.nan)
    before = weights_of(model)
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.up\.weight") as error:
        optimizer.backward(loss_of(model, 0))
    whole = clip_grad_norm is not None or dtype is HALF
    assert ("no weight was changed" in str(error.value)) == whole
    if whole:
        assert_same_bits(weights_of(model), before)
    assert all(param.isfinite().all() for param in model.parameters())
    assert (optimizer.step_count.item(), optimizer.skipped_steps.item()) == (1, 1)
    assert all(param.grad is None for param in model.parameters())


def test_raise_says_nothing_about_finite_gradients() -> None:
    model, quiet = transformer(), transformer()
    a, b = Lomo(model, lr=0.1, nonfinite="raise"), Lomo(quiet, lr=0.1)
    for step in range(2):
        a.backward(loss_of(model, step))
        b.backward(loss_of(quiet, step))
    assert_same_bits(weights_of(model), weights_of(quiet))


@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
def test_raise_in_an_accumulated_step_does_not_stick(clip_grad_norm: float | None) -> None:
    """The gradients of the step that failed are not part of the next."""
    w = vector(1.0, 1.0)
    optimizer = Lomo([w], lr=1.0, nonfinite="raise", clip_grad_norm=clip_grad_norm, clip_passes="two")
    with optimizer.accumulate():
        optimizer.backward(gives(w, torch.tensor([math.inf, 0.0])))
    with pytest.raises(FloatingPointError):
        optimizer.backward(gives(w, torch.zeros(2)))
    with torch.no_grad():
        w.fill_(1.0)
    optimizer.backward(gives(w, torch.tensor([0.25, 0.25])))
    assert w.tolist() == [0.75, 0.75]
    assert (optimizer.step_count.item(), optimizer.skipped_steps.item()) == (2, 1)
