"""`clip_tensor`, AdaGC: each parameter clipped by its own running norm, in one backward."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from support.adagc import FACTOR, WARM, AdaGC, assert_equal, means_of
from support.models import Options, assert_same_bits, loss_of, on_gradient_pass, transformer, vector, weights_of
from support.ways import WAYS, backward
from torch import Tensor, nn

from lomo_kernels import Lomo
from lomo_kernels.optim import tensor_clip
from lomo_kernels.optim.tensor_clip import WARM_UP
from lomo_kernels.optim.update_strategy import TensorClipStrategy


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_clip, "WARM_UP", WARM)


def spiky(model: nn.Module, step: int) -> Tensor:
    """Every third gradient is much larger than the others."""
    return loss_of(model, step) * (20.0 if step % 3 == 2 else 1.0)


# ---- The rule -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("loss_scale", [None, 64.0, "dynamic"])
@pytest.mark.parametrize(
    "clip", [{}, {"clip_grad_norm": 0.4}, {"clip_grad_norm": 0.4, "clip_grad_value": 0.01}], ids=str
)
@pytest.mark.parametrize("fused", [False, True], ids=["hooks", "fused"])
@pytest.mark.parametrize("memory", [0, None])
def test_steps_are_those_of_the_rule(memory: Any, fused: bool, clip: dict[str, float], loss_scale: Any) -> None:
    model = transformer(Options(width=144, tied=True))  # with weights that wait in no list
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, **clip}
    book = AdaGC(model, **options)
    optimizer = Lomo(
        model, clip_tensor=FACTOR, clip_memory=memory, loss_scale=loss_scale, fused_layers=fused, **options
    )
    for step in range(8):
        optimizer.backward(spiky(model, step))
        book.step(spiky(book.model, step))
        if step == 5:
            assert min(book.coefs) < 0.1, "the spike is clipped"
    assert_equal(optimizer, model, book)


def test_a_hundred_steps_warm_up() -> None:
    model = nn.Linear(3, 2)
    book = AdaGC(model, lr=0.01, clip_grad_norm=0.5, warm_up=100)
    optimizer = Lomo(model, lr=0.01, clip_grad_norm=0.5, clip_tensor=FACTOR)
    x = torch.linspace(-1, 1, 3)
    for step in range(110):
        factor = 1.0 + step % 7
        optimizer.backward(model(x).square().sum() * factor)
        book.step(book.model(x.double()).square().sum() * factor)
    assert WARM_UP == 100
    assert_equal(optimizer, model, book)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["sgd", "sign"])
def test_every_way_to_a_step_gives_the_same_bits(rule: str, dtype: torch.dtype) -> None:
    """The hook's own norm, the norms of a norm pass, gradients that wait in .grad."""
    weights = []
    for way, loss_scale in [*((way, None) for way in WAYS), (backward, "dynamic")]:
        model = transformer(Options(width=144, dtype=dtype))
        optimizer = Lomo(model, lr=0.1, clip_tensor=FACTOR, rounding="stochastic", rule=rule, loss_scale=loss_scale)
        if loss_scale is not None:
            optimizer.loss_scale.fill_(1.0)  # with another, a bfloat16 gradient is rounded elsewhere
        for step in range(6):
            way(optimizer, partial(spiky, model, step), 0.1)
        weights.append(weights_of(model))
    for others in weights[1:]:
        assert_same_bits(others, weights[0])


@pytest.mark.usefixtures("_short")
def test_later_steps_run_one_backward_and_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(Options(width=144))
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=0.5, clip_tensor=FACTOR, clip_memory=0)
    backwards: list[int] = []
    on_gradient_pass(model.head.weight, lambda number, grad: backwards.append(number))
    counts = []
    for step in range(WARM + 3):
        if step == WARM + 1:  # the step after the warm-up reads how many were skipped
            monkeypatch.setattr(Tensor, "item", lambda _: pytest.fail("the host waited"))
        backwards.clear()
        optimizer.backward(loss_of(model, step))
        counts.append(len(backwards))
        assert all(param.grad is None for param in model.parameters())
    assert counts == [3] + [2] * (WARM - 1) + [1] * 3, "the first compares two norm passes"


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("fused", [False, True])
def test_a_zero_gradient_leaves_the_mean(fused: bool) -> None:
    """LoRA's first factor has zero gradients at first, because its second one is zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))
    nn.init.zeros_(model[1].weight)
    book = AdaGC(model, lr=0.01)
    optimizer = Lomo(model, lr=0.01, clip_tensor=FACTOR, fused_layers=fused)
    x = torch.randn(4, 8)
    for _ in range(8):
        optimizer.backward((model(x) - x).square().sum())
        book.step((book.model(x.double()) - x.double()).square().sum())
    assert all(0 < mean < math.inf for mean in means_of(optimizer))
    assert_equal(optimizer, model, book)


@pytest.mark.usefixtures("_short")
def test_a_parameter_whose_first_gradient_comes_late() -> None:
    model = transformer(Options(frozen=("blocks.0",)))
    book = AdaGC(model, lr=0.02)
    optimizer = Lomo(model, lr=0.02, clip_tensor=FACTOR)
    for step in range(8):
        if step == 5:
            for net in (model, book.model):
                net.blocks[0].requires_grad_(True)
        optimizer.backward(spiky(model, step))
        book.step(spiky(book.model, step))
    assert_equal(optimizer, model, book)


# ---- Gradients that are not finite, errors --------------------------------------------------------------------------


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"clip_grad_norm": 0.5}, {"loss_scale": "dynamic"}], ids=str)
def test_skipped_steps_do_not_count(options: dict[str, Any], bad: float) -> None:
    model = transformer()
    book = AdaGC(model, lr=0.02, clip_grad_norm=options.get("clip_grad_norm"))
    optimizer = Lomo(model, lr=0.02, clip_tensor=FACTOR, **options)
    for step in range(8):
        if step == 1:
            before = weights_of(model), means_of(optimizer)
            for _ in range(2):
                optimizer.backward(loss_of(model, step) * bad)
            assert_same_bits(weights_of(model), before[0])
            assert means_of(optimizer) == before[1]
        optimizer.backward(spiky(model, step))
        book.step(spiky(book.model, step))
    assert optimizer.skipped_steps.item() == 2
    assert_equal(optimizer, model, book)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_after_the_warm_up_only_parameters_with_such_a_gradient_are_kept(nonfinite: str) -> None:
    params = [vector(*torch.linspace(-1, 1, 50)) for _ in range(2)]
    optimizer = Lomo(params, lr=0.1, weight_decay=0.1, clip_tensor=FACTOR, nonfinite=nonfinite)
    for _ in range(WARM + 2):
        optimizer.backward(sum((param * param).sum() for param in params))
    before, means = [param.detach().clone() for param in params], means_of(optimizer)
    loss = (params[0] * params[0]).sum() + (params[1] * torch.tensor([math.inf] + [1.0] * 49)).sum()
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="parameter 1; parameters whose gradient is not finite were kept"):
            optimizer.backward(loss)
    else:
        optimizer.backward(loss)
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    assert means_of(optimizer)[1] == means[1]
    assert means_of(optimizer)[0] != means[0]


@pytest.mark.usefixtures("_short")
def test_a_step_that_breaks_off_leaves_the_means() -> None:
    model = transformer(Options(width=144))
    optimizer = Lomo(model, lr=0.1, clip_tensor=FACTOR)
    for step in range(WARM + 2):
        optimizer.backward(loss_of(model, step))
    before = means_of(optimizer)
    handle = model.embedding.weight.register_hook(lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(loss_of(model, 9))
    handle.remove()
    assert means_of(optimizer) == before
    assert optimizer.last_step_outcome == "partial"
    book = AdaGC(model, lr=0.1)
    book.means, book.steps = list(before), WARM
    optimizer.backward(loss_of(model, 10))
    book.step(loss_of(book.model, 10))
    assert_equal(optimizer, model, book)


@pytest.mark.usefixtures("_short")
def test_a_warm_up_that_does_not_end_is_said() -> None:
    params = [vector(1.0, 2.0), vector(3.0)]
    optimizer = Lomo(params, lr=0.1, clip_tensor=FACTOR)

    def step(factor: float) -> None:
        optimizer.backward(params[0].square().sum() + params[1].sum() * factor)

    for _ in range(WARM):
        step(math.nan)
    with pytest.warns(UserWarning, match="all of the last 3 steps had a gradient that is not finite"):
        step(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(WARM + 3):
            step(1.0)
    assert optimizer._training.clips_tensors


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "1.04", torch.tensor(1.04)])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="clip_tensor"):
        Lomo(nn.Linear(2, 2), clip_tensor=value)


def test_a_capture_waits_for_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    strategy = Lomo(model, clip_tensor=FACTOR)._training.state.strategy
    assert isinstance(strategy, TensorClipStrategy)
    clip = strategy.clip

    class Captured:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured: Any = Captured()
    with pytest.raises(RuntimeError, match="Run 101 steps before the capture"):
        clip.warms_up(captured, captured)
    clip._left = 0
    assert not clip.warms_up(captured, captured)


# ---- State ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("first", [1, WARM, WARM + 2])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_resumed_twice_it_goes_on_bit_for_bit(how: str, first: int) -> None:
    model = transformer(Options(dtype=torch.bfloat16))
    options: dict[str, Any] = {"lr": 0.1, "clip_grad_norm": 0.5, "clip_tensor": FACTOR, "rounding": "stochastic"}
    optimizer = Lomo(model, **options)
    twin, other = transformer(Options(dtype=torch.bfloat16)), None
    for step in range(first + 6):
        if step in (first, first + 2):
            if how == "state_dict":
                saved = copy.deepcopy(optimizer.state_dict())
                twin.load_state_dict(model.state_dict())
                other = Lomo(twin, **options)
                other.load_state_dict(saved)
            elif how == "deepcopy":
                twin, other = copy.deepcopy((model, optimizer))
            else:
                twin, other = pickle.loads(pickle.dumps((model, optimizer)))
        optimizer.backward(spiky(model, step))
        if other is not None:
            other.backward(spiky(twin, step))
            assert means_of(other) == means_of(optimizer)
    assert_same_bits(weights_of(twin), weights_of(model))


@pytest.mark.usefixtures("_short")
def test_added_parameters_have_means_of_their_own() -> None:
    params = [vector(1.0, 2.0), vector(3.0)]
    optimizer = Lomo([params[0]], lr=0.01, clip_tensor=FACTOR)
    for _ in range(WARM + 1):
        optimizer.backward(params[0].square().sum())
    before = means_of(optimizer)
    optimizer.add_param_group({"params": [params[1]], "lr": 0.1})
    assert means_of(optimizer) == [*before, math.inf]
    optimizer.backward(params[1].square().sum())
    assert means_of(optimizer) == [*before, 6.0]
    assert params[1].item() == pytest.approx(3.0 - 0.1 * 6.0)


def test_a_state_dict_of_another_kind_is_refused() -> None:
    model = nn.Linear(2, 2)
    plain, clipped = Lomo(model).state_dict(), Lomo(model, clip_tensor=FACTOR).state_dict()
    with pytest.raises(ValueError, match=r"saved without clip_tensor, this optimizer has 1\.04"):
        Lomo(model, clip_tensor=FACTOR).load_state_dict(plain)
    with pytest.raises(ValueError, match="saved with clip_tensor, this optimizer has none"):
        Lomo(model).load_state_dict(clipped)
    Lomo(model, clip_tensor=1.2).load_state_dict(clipped)
    for wrong in (torch.ones(3, dtype=torch.float64), torch.ones(2), torch.tensor([1.0, -1.0]).double(), [1.0, 1.0]):
        clipped["lomo"]["clip_norm_mean"] = wrong
        with pytest.raises(ValueError, match="clip_norm_mean"):
            Lomo(model, clip_tensor=FACTOR).load_state_dict(clipped)
