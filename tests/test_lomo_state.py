"""What a run carries from step to step: checkpoints, groups that come later, schedulers."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import Options, assert_same_bits, gives, loss_of, transformer, vector, weights_of
from support.textbook import Textbook
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from lomo_kernels import Lomo

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def snapshot(optimizer: Lomo) -> tuple[Any, ...]:
    """All that load_state_dict changes."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = copy.deepcopy(optimizer.state_dict()["lomo"])
    return copy.deepcopy(groups), {k: v.item() if isinstance(v, Tensor) else v for k, v in state.items()}


# ---- Resume ---------------------------------------------------------------------------------------------------------


def train(optimizer: Lomo, model: nn.Module, steps: range) -> None:
    for step in steps:
        optimizer.param_groups[0]["lr"] = 0.3 / (1 + step)
        optimizer.backward(loss_of(model, step) * (3000.0 if step == 2 else 1.0))


@pytest.mark.parametrize("clip_grad_norm", [None, 0.3])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_resumed_run_continues_bit_for_bit(dtype: torch.dtype, rounding: str, clip_grad_norm: float | None) -> None:
    settings = {"rounding": rounding, "clip_grad_norm": clip_grad_norm, "weight_decay": 0.01, "clip_passes": "two"}
    straight = transformer(Options(dtype=dtype))
    whole = Lomo(straight, lr=0.3, seed=7, **settings)
    train(whole, straight, range(8))

    first = transformer(Options(dtype=dtype))
    before = Lomo(first, lr=0.3, seed=7, **settings)
    train(before, first, range(4))
    saved = through_a_file({"model": first.state_dict(), "optimizer": before.state_dict()})

    second = transformer(Options(dtype=dtype), seed=99)
    after = Lomo(second, lr=9.0, seed=1234, **settings)  # lr and seed come with the state
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["optimizer"])
    assert snapshot(after) == snapshot(before)
    assert after.step_count.item() == 4
    assert after.skipped_steps.item() == before.skipped_steps.item() == (1 if dtype is torch.float16 else 0)
    train(after, second, range(4, 8))
    assert_same_bits(weights_of(second), weights_of(straight))
    assert snapshot(after) == snapshot(whole)


def test_the_growth_tracker_is_resumed() -> None:
    w = vector(0.0, dtype=torch.float16)
    optimizer = Lomo([w], lr=0.0)
    for _ in range(1500):
        optimizer.backward(w.float().sum() * 0.25)
    state = through_a_file(optimizer.state_dict())
    optimizer.remove()
    resumed = Lomo([w], lr=0.0)
    resumed.load_state_dict(state)
    for _ in range(499):
        resumed.backward(w.float().sum() * 0.25)
    assert resumed.loss_scale.item() == 2.0**16
    resumed.backward(w.float().sum() * 0.25)
    assert resumed.loss_scale.item() == 2.0**17


def test_a_state_dict_is_a_copy() -> None:
    w = vector(0.0, dtype=torch.float16)
    optimizer = Lomo([w], lr=1.0)
    state = optimizer.state_dict()
    before = {k: v.item() for k, v in state["lomo"].items() if isinstance(v, Tensor)}
    optimizer.backward(gives(w, torch.tensor([math.inf])))
    assert {k: v.item() for k, v in state["lomo"].items() if isinstance(v, Tensor)} == before
    optimizer.load_state_dict(state)
    optimizer.backward(gives(w, torch.tensor([math.inf])))
    assert {k: v.item() for k, v in state["lomo"].items() if isinstance(v, Tensor)} == before


def test_loading_does_not_change_what_is_loaded() -> None:
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0)
    state = optimizer.state_dict()
    keys = set(state), set(state["lomo"])
    optimizer.load_state_dict(state)
    assert (set(state), set(state["lomo"])) == keys


@pytest.mark.parametrize("clip_grad_norm", [None, 0.3])
def test_groups_survive(clip_grad_norm: float | None) -> None:
    """load_state_dict replaces the group dicts; they are looked up at every step."""
    a, b = vector(0.0), vector(0.0)
    groups = [{"params": [a], "lr": 0.5}, {"params": [b], "lr": 0.25, "weight_decay": 0.5, "clip_grad_value": 0.5}]
    optimizer = Lomo(groups, lr=9.0, clip_grad_norm=clip_grad_norm, clip_passes="two")
    state = through_a_file(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.load_state_dict(state)
    coefficient = min(1.0, (clip_grad_norm or 9.0) / (2**0.5 + 1e-6))
    optimizer.backward((a + b).sum())
    assert [a.item(), b.item()] == pytest.approx([-0.5 * coefficient, -0.125 * coefficient], rel=1e-6)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.backward(a.sum())
    assert a.item() == pytest.approx(-0.5 * coefficient, rel=1e-6)


def test_learning_rates_as_tensors_survive() -> None:
    w = vector(0.0)
    optimizer = Lomo([w], lr=torch.tensor(0.5))
    state = through_a_file(optimizer.state_dict())
    optimizer.param_groups[0]["lr"].zero_()
    optimizer.load_state_dict(state)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    optimizer.backward(w.sum())
    assert w.item() == -0.5
    optimizer.param_groups[0]["lr"].fill_(0.25)
    optimizer.backward(w.sum())
    assert w.item() == -0.75


# ---- What does not fit is refused, and then nothing has changed -----------------------------------------------------


def named(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, names: str = "abcdef") -> nn.Module:
    module = nn.Module()
    for name, shape in zip(names, shapes, strict=False):
        module.register_parameter(name, nn.Parameter(torch.ones(shape, dtype=dtype)))
    return module


MISFITS: dict[str, Callable[[], dict[str, Any]]] = {
    "another shape": lambda: Lomo(named((2,), (4,)), lr=7.0).state_dict(),
    "another order": lambda: Lomo(named((3,), (2,), names="ba"), lr=7.0).state_dict(),
    "another name": lambda: Lomo(named((2,), (3,), names="xy"), lr=7.0).state_dict(),
    "more parameters": lambda: Lomo(named((2,), (3,), (1,)), lr=7.0).state_dict(),
    "fewer parameters": lambda: Lomo(named((2,)), lr=7.0).state_dict(),
    "another kind of scaling": lambda: Lomo(named((2,), (3,), dtype=torch.float16), lr=7.0).state_dict(),
    "a static scale": lambda: Lomo(named((2,), (3,)), lr=7.0, loss_scale=8.0).state_dict(),
    "of a torch.optim.SGD that maximizes": lambda: torch.optim.SGD(
        named((2,), (3,)).parameters(), lr=7.0, maximize=True
    ).state_dict(),
    "of torch.optim.Adam": lambda: torch.optim.Adam(named((2,), (3,)).named_parameters(), lr=7.0).state_dict(),
    "other groups": lambda: Lomo(
        [{"params": [p]} for p in named((2,), (3,)).named_parameters()], lr=7.0
    ).state_dict(),
}  # fmt: skip
REFUSALS = {
    "another shape": r"parameter 1 is b of shape \[4\] in the state dict, b of shape \[3\] here",
    "another order": r"parameter 0 is b of shape \[3\] in the state dict, a of shape \[2\] here",
    "another name": r"parameter 0 is x of shape \[2\] in the state dict, a of shape \[2\] here",
    "more parameters": "the state dict has 3 parameters, this optimizer has 2",
    "fewer parameters": "the state dict has 1 parameters, this optimizer has 2",
    "another kind of scaling": "saved with dynamic loss scaling, this optimizer has none",
    "a static scale": "saved with static loss scaling, this optimizer has none",
    "of a torch.optim.SGD that maximizes": "maximize=True, which Lomo does not have",
    "of torch.optim.Adam": r"no 'lomo' entry; expected one from Lomo.state_dict\(\) or torch.optim.SGD",
    "other groups": "the state dict has 2 parameter groups, this optimizer has 1",
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_state_dict_that_does_not_fit_is_refused_whole(misfit: str) -> None:
    model = named((2,), (3,))
    optimizer = Lomo(model, lr=0.5)
    optimizer.backward(model.a.sum() + model.b.sum())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=REFUSALS[misfit]):
        optimizer.load_state_dict(MISFITS[misfit]())
    assert snapshot(optimizer) == before
    optimizer.backward(model.a.sum() + model.b.sum())
    assert model.a.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", math.nan),
        ("lr", -1.0),
        ("lr", "0.1"),
        ("weight_decay", -0.1),
        ("weight_decay", None),
        ("clip_grad_value", 0.0),
        ("clip_grad_value", math.nan),
    ],
)
def test_unusable_hyperparameters_in_a_state_dict(key: str, value: Any) -> None:
    optimizer = Lomo(named((2,)), lr=0.5)
    state = optimizer.state_dict()
    before = snapshot(optimizer)
    state["param_groups"][0][key] = value
    state["lomo"]["step"].fill_(77)
    with pytest.raises((ValueError, TypeError), match=key):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("missing", ["step", "skipped_steps", "loss_scale", "growth_tracker", "seed", "parameters"])
def test_an_incomplete_state_dict_changes_nothing(missing: str) -> None:
    optimizer = Lomo(named((2,)), lr=0.5)
    state = optimizer.state_dict()
    before = snapshot(optimizer)
    state["param_groups"][0]["lr"] = 7.0
    state["lomo"]["step"].fill_(77)
    del state["lomo"][missing]
    with pytest.raises((ValueError, KeyError), match=missing):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


def test_the_error_names_what_differs() -> None:
    optimizer = Lomo(named((2,), (3,)), lr=0.5)
    with pytest.raises(ValueError, match=r"b of shape \[4\].*b of shape \[3\]"):
        optimizer.load_state_dict(MISFITS["another shape"]())


# ---- Groups and parameters that come later --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_param_group(dtype: torch.dtype) -> None:
    """The new parameters are trained from then on, with their own options and the numbers after the present ones."""
    torch.manual_seed(0)
    held = nn.ParameterList(nn.Parameter(torch.randn(65, dtype=dtype)) for _ in range(3))
    grads = [torch.randn(65) * 0.1 for _ in held]
    settings = {"lr": 0.3, "rounding": "stochastic", "clip_grad_norm": 0.5, "seed": 3, "clip_passes": "two"}
    scale = "dynamic" if dtype is torch.float16 else None
    textbook = Textbook(held, groups=[(["0"], {}), (["1", "2"], {"weight_decay": 0.5})], loss_scale=scale, **settings)
    optimizer = Lomo([held[0]], **settings)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [held[1], held[2]], "weight_decay": 0.5})
        used = range(1 if step < 2 else 3)
        optimizer.backward(sum(gives(held[i], grads[i]) for i in used))
        textbook.step(sum(gives(textbook.model[i], grads[i]) for i in used), norm=optimizer.last_grad_norm)
        assert optimizer.step_count.item() == step + 1, "counters go on"
    assert_same_bits(weights_of(held), weights_of(textbook.model))
    assert optimizer.loss_scale.item() == textbook.loss_scale


def test_add_param_group_by_name_and_frozen() -> None:
    model = named((2,), (3,), (1,))
    optimizer = Lomo([("a", model.a)], lr=0.5)
    model.c.requires_grad_(False)
    optimizer.add_param_group({"params": [("b", model.b), ("c", model.c)], "lr": 0.25})
    optimizer.backward(model.a.sum() + model.b.sum() + model.c.sum())
    assert (model.a[0].item(), model.b[0].item(), model.c[0].item()) == (0.5, 0.75, 1.0)
    with pytest.raises(ValueError, match="b is given twice"):
        optimizer.add_param_group({"params": [("b", model.b)]})


def test_add_param_group_that_fails_adds_nothing() -> None:
    a, b = vector(1.0), vector(1.0)
    optimizer = Lomo([a], lr=0.5)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"params": [b, a]}, "parameter 2 is given twice"),
        ({"params": [b], "lr": math.nan}, "lr is nan"),
        ({"params": [b, vector(1.0, dtype=torch.float64)]}, "parameter 2 has dtype torch.float64"),
        ({"params": [b, b]}, "parameter 2 is given twice"),
        ({"params": [b], "clip_grad_value": 0.0}, "clip_grad_value is 0.0"),
        ({"params": [("name", b)]}, "cannot add param group with names"),
    ]
    for group, message in bad:
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    optimizer.backward((a + b).sum())
    assert (a.item(), b.item()) == (0.5, 1.0)
    Lomo([b])  # is still anybody's


def test_add_param_group_keeps_what_moved() -> None:
    w = vector(1.0, dtype=torch.float16)
    optimizer = Lomo([w], lr=0.5)
    optimizer.backward(gives(w, torch.tensor([math.inf])))
    optimizer.add_param_group({"params": [vector(1.0)]})
    assert (optimizer.loss_scale.item(), optimizer.skipped_steps.item(), optimizer.step_count.item()) == (2.0**15, 1, 1)


def test_a_float16_group_brings_dynamic_scaling_with_it() -> None:
    a, b = vector(1.0), vector(0.0, dtype=torch.float16)
    optimizer = Lomo([a], lr=0.5)
    optimizer.add_param_group({"params": [b], "lr": 2.0**10})
    assert optimizer.loss_scale.item() == 2.0**16
    optimizer.backward(a.sum() + b.float().sum() * 2.0**-26)
    assert (a.item(), b.item()) == (0.5, -(2.0**-16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_unfrozen_and_frozen_later(dtype: torch.dtype) -> None:
    """Gradual unfreezing: a hook comes with the first step after."""
    model = transformer(Options(dtype=dtype, frozen=("embedding", "blocks", "positions")))
    settings = {"lr": 0.3, "rounding": "stochastic", "clip_grad_norm": 0.3, "clip_passes": "two"}
    textbook = Textbook(model, loss_scale="dynamic" if dtype is torch.float16 else None, **settings)
    optimizer = Lomo(model, **settings)
    for step in range(6):
        for one in (model, textbook.model):
            one.blocks[1].requires_grad_(step >= 2)
            one.embedding.requires_grad_(step >= 3)
            one.head.requires_grad_(step != 4)
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
        assert_same_bits(weights_of(model), weights_of(textbook.model))


def test_a_parameter_unfrozen_within_accumulation() -> None:
    a, b = vector(0.0), vector(0.0)
    b.requires_grad_(False)
    optimizer = Lomo([a, b], lr=1.0)
    with optimizer.accumulate():
        optimizer.backward((a + b).sum())
        b.requires_grad_(True)
        optimizer.backward((a + b).sum())
    optimizer.backward((a + b).sum())
    assert (a.item(), b.item()) == (-3.0, -2.0)


# ---- Another dtype --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_model_changes_its_dtype(dtype: torch.dtype) -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.3, rounding="stochastic")
    optimizer.backward(loss_of(model, 0))
    model.to(dtype)
    textbook = Textbook(model, lr=0.3, rounding="stochastic", loss_scale="dynamic" if dtype is torch.float16 else None)
    textbook.steps = 1
    for step in range(1, 3):
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step))
        assert_same_bits(weights_of(model), weights_of(textbook.model))
    assert optimizer.step_count.item() == 3
    assert optimizer.loss_scale.item() == textbook.loss_scale


def test_weights_loaded_between_steps_are_trained() -> None:
    model, other = transformer(), transformer(seed=5)
    optimizer = Lomo(model, lr=0.3)
    optimizer.backward(loss_of(model, 0))
    model.load_state_dict(other.state_dict())
    textbook = Textbook(other, lr=0.3)
    optimizer.backward(loss_of(model, 1))
    textbook.step(loss_of(textbook.model, 1))
    assert_same_bits(weights_of(model), weights_of(textbook.model))


# ---- Schedulers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["backward", "fused_backward", "skipped", "accumulated"])
def test_no_warning_about_the_order_of_calls(way: str) -> None:
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    scheduler = schedulers.LambdaLR(optimizer, lambda epoch: 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if way == "fused_backward":
            optimizer.fused_backward(w.sum(), lr=1.0)
        elif way == "accumulated":
            with optimizer.accumulate():
                optimizer.backward(w.sum())
            optimizer.backward(w.sum())
        else:
            optimizer.backward(w.sum() * (math.nan if way == "skipped" else 1.0))
        scheduler.step()


def test_the_warning_stays_where_it_is_deserved() -> None:
    optimizer = Lomo([vector(0.0)], lr=1.0)
    scheduler = schedulers.LambdaLR(optimizer, lambda epoch: 1.0)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


def test_a_scheduled_run_resumes() -> None:
    def start() -> tuple[nn.Module, Lomo, schedulers.LRScheduler]:
        model = transformer(Options(dtype=torch.bfloat16))
        optimizer = Lomo(model, lr=0.5, rounding="stochastic", clip_grad_norm=0.3, clip_passes="two")
        return model, optimizer, schedulers.CosineAnnealingLR(optimizer, T_max=6)

    def train(model: nn.Module, optimizer: Lomo, scheduler: schedulers.LRScheduler, steps: range) -> None:
        for step in steps:
            optimizer.backward(loss_of(model, step))
            scheduler.step()

    straight = start()
    train(*straight, range(6))
    first = start()
    train(*first, range(3))
    saved = through_a_file([part.state_dict() for part in first])
    second = start()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    train(*second, range(3, 6))
    assert_same_bits(weights_of(second[0]), weights_of(straight[0]))


def test_a_swa_model_averages_the_weights() -> None:
    """torch's weight averaging deep-copies the model; the copy has no hooks of ours."""
    model = transformer()
    optimizer = Lomo(model, lr=0.3)
    average = torch.optim.swa_utils.AveragedModel(model)
    trail = []
    for step in range(3):
        optimizer.backward(loss_of(model, step))
        average.update_parameters(model)
        trail.append(weights_of(model))
    for name, value in weights_of(average.module).items():
        torch.testing.assert_close(value, torch.stack([weights[name] for weights in trail]).mean(0))
    before = weights_of(average.module)
    loss_of(average.module, 0).backward()
    assert_same_bits(weights_of(average.module), before)
