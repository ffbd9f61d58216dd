"""`Lomo(rounding="split")`: a bfloat16 run whose weights, with their low parts, are those of a float32 run."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.models import Options, gives, loss_of, same_bits, transformer, vector
from support.oracle import ordinary
from test_lomo_state import through_a_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lomo_kernels import AdaLomo, Lomo, reference

BF16 = torch.bfloat16
SHAPES = ((300, 150), (64, 40), (7,), (), (3, 4, 5, 2))  # one above 64 KiB, which has a call of its own


def params(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    """The same bfloat16 numbers in any dtype."""
    made = (ordinary(math.prod(shape), BF16, seed + i, scale=0.02).view(shape) for i, shape in enumerate(SHAPES))
    return [nn.Parameter(tensor.to(dtype)) for tensor in made]


def loss(some: list[nn.Parameter], step: int) -> Tensor:
    """Gradients that do not depend on the weights, of bfloat16 numbers; a few are not finite in step 3."""
    total = torch.zeros(())
    for i, param in enumerate(some):
        grad = ordinary(param.numel(), BF16, 100 * step + i, scale=1e-3).view(param.shape)
        total = total + gives(param, grad)
    return total


def joined(optimizer: Lomo, some: list[nn.Parameter]) -> list[Tensor]:
    """The float32 weights, as docs/numerics.md says how to get them."""
    made = []
    for param in some:
        low = low_of(optimizer, param)
        made.append(((param.detach().view(torch.int16).int() << 16) + low).view(torch.float32))
    return made


def low_of(optimizer: Lomo, param: nn.Parameter) -> Tensor:
    """In its own memory."""
    return optimizer.state[param]["low"].view(torch.int16)[..., 0]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay, value": {"weight_decay": 0.1, "clip_grad_value": 1e-3},
    "norm, two passes": {"clip_grad_norm": 0.1, "clip_passes": "two"},
    "norm, one pass": {"clip_grad_norm": 0.1, "clip_passes": "one"},
    "tensor clip": {"clip_tensor": 1.04, "clip_grad_norm": 0.1},
    "static scale": {"loss_scale": 64.0},
    "dynamic scale": {"loss_scale": "dynamic", "clip_grad_norm": 0.1},
    "sign": {"rule": "sign"},
    "rows": {"rule": "rows"},
    "tensor": {"rule": "tensor"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_weights_are_those_of_float32_training(options: str) -> None:
    """Bit for bit, with the same gradients. Without low parts most of these updates would be lost."""
    settings = {"lr": 1e-3, **OPTIONS[options]}
    ours, theirs, rounded = params(BF16), params(torch.float32), params(BF16)
    optimizer, other = Lomo(ours, rounding="split", **settings), Lomo(theirs, **settings)
    nearest = Lomo(rounded, **settings)
    for step in range(6):
        for one, some in ((optimizer, ours), (other, theirs), (nearest, rounded)):
            one.backward(loss(some, step))
        # A norm is a sum in another order if the gradient has another dtype.
        assert optimizer.last_grad_norm.item() == pytest.approx(other.last_grad_norm.item(), rel=1e-9)
        for i, (mine, whole) in enumerate(zip(joined(optimizer, ours), theirs, strict=True)):
            assert same_bits(mine, whole), (step, i)
    assert any(not same_bits(mine, one) for mine, one in zip(ours, rounded, strict=True))


def test_adalomo_differs_only_by_the_size_of_the_rounded_weight() -> None:
    """RMS(p) is that of the bfloat16 weight, which the model computes with."""
    ours, theirs = params(BF16), params(torch.float32)
    optimizer, other = AdaLomo(ours, lr=1e-2, rounding="split"), AdaLomo(theirs, lr=1e-2)
    for step in range(6):
        optimizer.backward(loss(ours, step))
        other.backward(loss(theirs, step))
    for mine, whole in zip(joined(optimizer, ours), theirs, strict=True):
        assert (mine - whole).abs().max() <= 6 * 1e-2 * 2.0**-8 * whole.abs().max()


@pytest.mark.parametrize("clip", [{}, {"clip_grad_norm": 0.5}, {"clip_grad_norm": 0.5, "clip_passes": "two"}], ids=str)
def test_fused_layers(clip: dict[str, Any]) -> None:
    """Integers make every sum exact, whatever its order: the weights have the bits of the layers that are not fused."""
    runs = []
    for dtype, fused in ((BF16, False), (BF16, True), (torch.float32, True)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 7, bias=False), nn.Linear(7, 8, bias=False))
        model[2].weight = model[1].weight = nn.Parameter(torch.randint(-3, 4, (8, 8)).to(dtype))
        model[0].weight = nn.Parameter(torch.randint(-3, 4, (11, 8)).to(dtype))
        rounding = "split" if dtype is BF16 else "nearest"
        optimizer = Lomo(model, lr=2.0**-11, rounding=rounding, fused_layers=fused, **clip)
        tokens, factor = torch.randint(0, 11, (3, 5)), torch.randint(-2, 3, (3, 5, 8)).float()
        optimizer.backward((model(tokens).float() * factor).sum())
        some = list(model.parameters())
        runs.append(joined(optimizer, some) if dtype is BF16 else [param.detach() for param in some])
    for plain, fused_, whole in zip(*runs, strict=True):
        assert same_bits(plain, fused_) and same_bits(plain, whole)


def test_where_the_low_parts_are() -> None:
    frozen = nn.Parameter(torch.ones(5, dtype=BF16), requires_grad=False)
    some = [*params(BF16), vector(1.0, 2.0), frozen]
    with Lomo(some, lr=0.1, rounding="split") as optimizer:
        for param in some[:-2]:
            low = low_of(optimizer, param)
            assert low.dtype is torch.int16 and low.shape == param.shape and not low.any()
        assert all("low" not in optimizer.state[param] for param in some[-2:])
        assert f"{sum(2 * param.numel() for param in some[:-2]) / 2**20:.2f} MiB of low parts" in optimizer.summary()
    with Lomo(some, lr=0.1, rounding="stochastic") as optimizer:
        assert all("low" not in state for state in optimizer.state.values())
        assert "low parts" not in optimizer.summary()


@pytest.mark.parametrize("rule", ["sgd", "adalomo"])
def test_any_layout_of_a_parameter(rule: str) -> None:
    """Of convolutions with channels last, and of a part of a larger tensor. Also if it changes between two steps."""
    made = []
    for last, changes in ((False, False), (True, False), (False, True), (True, True)):
        some = [param.detach().clone() for param in params(BF16)]
        if last:
            some[4] = some[4].to(memory_format=torch.channels_last)
            some[0] = torch.zeros(300, 300, dtype=BF16)[:, ::2].copy_(some[0])
        ours = [nn.Parameter(tensor) for tensor in some]
        optimizer = Lomo(ours, lr=1e-3, rounding="split", rule=rule)
        for step in range(3):
            optimizer.backward(loss(ours, step))
            if changes and step == 1:
                kind = torch.contiguous_format if last else torch.channels_last
                ours[4].data = ours[4].data.to(memory_format=kind)
        parts = [param.detach() for param in ours] + [low_of(optimizer, param) for param in ours]
        made.append([part.contiguous() for part in parts])
    assert all(same_bits(one, other) for some in made[1:] for one, other in zip(made[0], some, strict=True))


# ---- Steps that change nothing --------------------------------------------------------------------------------------


def test_what_is_not_finite_keeps_both_parts() -> None:
    for options in ({}, {"clip_grad_norm": 1.0}, {"loss_scale": "dynamic"}, {"rule": "adalomo"}):
        some = params(BF16)
        optimizer = Lomo(some, lr=1e-3, rounding="split", **options)
        optimizer.backward(loss(some, 0))
        before = joined(optimizer, some)
        grads = [ordinary(param.numel(), BF16, i).view(param.shape) for i, param in enumerate(some)]
        for grad in grads:
            grad.view(-1)[0] = math.inf
        optimizer.backward(sum(gives(param, grad) for param, grad in zip(some, grads, strict=True)))
        whole = bool(options)
        for old, new in zip(before, joined(optimizer, some), strict=True):
            assert same_bits(old.view(-1)[:1], new.view(-1)[:1])
            assert same_bits(old, new) == (whole or old.numel() == 1), options
        assert optimizer.skipped_steps.item() == 1


def test_plain_steps_and_accumulation() -> None:
    ours, theirs = params(BF16), params(torch.float32)
    optimizer, other = Lomo(ours, lr=1e-3, rounding="split"), Lomo(theirs, lr=1e-3)
    for one, some in ((optimizer, ours), (other, theirs)):
        loss(some, 0).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one.step()
        one.zero_grad()
        with one.accumulate():
            one.backward(loss(some, 1))
        one.backward(loss(some, 1))
    for mine, whole in zip(joined(optimizer, ours), theirs, strict=True):
        assert same_bits(mine, whole)


# ---- Runs that are resumed or copied --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("rule", ["sgd", "adalomo"])
@pytest.mark.parametrize("how", ["state_dict", "torch.save", "checkpoint", "deepcopy", "pickle"])
def test_resumed_twice_it_goes_on_bit_for_bit(how: str, rule: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 1e-3, "rounding": "split", "rule": rule}
    model, twin = (transformer(Options(dtype=BF16)) for _ in range(2))
    optimizer, other = Lomo(model, **options), Lomo(twin, **options)
    for step in range(7):
        if step in (2, 4):
            if how in ("state_dict", "torch.save"):
                state = copy.deepcopy(optimizer.state_dict()) if how == "state_dict" else optimizer.state_dict()
                twin.load_state_dict(model.state_dict())
                other.load_state_dict(state if how == "state_dict" else through_a_file(state))
            elif how == "checkpoint":
                state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                dcp.save(state, checkpoint_id=str(tmp_path / str(step)))
                state = dict(zip(("model", "optimizer"), get_state_dict(twin, other), strict=True))
                dcp.load(state, checkpoint_id=str(tmp_path / str(step)))
                set_state_dict(twin, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            elif how == "deepcopy":
                twin, other = copy.deepcopy((model, optimizer))
            else:
                twin, other = pickle.loads(pickle.dumps((model, optimizer)))
        optimizer.backward(loss_of(model, step))
        if step >= 2:
            other.backward(loss_of(twin, step))
            both = (joined(one, list(some.parameters())) for one, some in ((optimizer, model), (other, twin)))
            assert all(map(same_bits, *both)), step
    assert any(state["low"].any() for state in optimizer.state.values())


def test_a_state_dict_has_copies() -> None:
    some = params(BF16)
    optimizer = Lomo(some, lr=1e-3, rounding="split")
    optimizer.backward(loss(some, 0))
    state = optimizer.state_dict()
    low = state["state"][0]["low"].clone()
    optimizer.backward(loss(some, 1))
    assert torch.equal(state["state"][0]["low"], low)
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[some[0]]["low"], low)
    optimizer.backward(loss(some, 1))
    assert torch.equal(state["state"][0]["low"], low)


def test_a_state_dict_without_low_parts() -> None:
    """The weights continue from the bfloat16 numbers that they are."""
    some = params(BF16)
    optimizer = Lomo(some, lr=1e-3, rounding="split")
    optimizer.backward(loss(some, 0))
    state = Lomo(params(BF16), lr=1e-3).state_dict()
    with pytest.warns(UserWarning, match=r'saved without rounding="split". The low parts begin with zeros') as seen:
        optimizer.load_state_dict(state)
    assert seen[0].filename == __file__
    assert not any(state["low"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_low_parts_that_are_of_no_use(rounding: str) -> None:
    some = params(BF16)
    optimizer = Lomo(some, lr=1e-3, rounding="split")
    optimizer.backward(loss(some, 0))
    other = Lomo(params(BF16), lr=1e-3, rounding=rounding)
    with pytest.warns(UserWarning, match="The low part of parameter 0 and 4 more is dropped") as seen:
        other.load_state_dict(optimizer.state_dict())
    assert other.step_count.item() == 1 and seen[0].filename == __file__
    wide = Lomo(params(torch.float32), lr=1e-3, rounding="split")
    with pytest.warns(UserWarning, match="is dropped, because the optimizer that loads it does not split"):
        wide.load_state_dict(optimizer.state_dict())


def test_bad_low_parts_are_refused() -> None:
    some = params(BF16)
    optimizer = Lomo(some, lr=1e-3, rounding="split")
    optimizer.backward(loss(some, 0))
    before = [state["low"].clone() for state in optimizer.state.values()]
    for bad in (*(torch.zeros(300, 150, 2).to(some) for some in (torch.int16, "meta")), torch.zeros(3).byte(), None, 3):
        state = optimizer.state_dict()
        state["state"][0]["low"] = bad
        state["lomo"]["step"] += 5
        if bad is None:  # as of a parameter that was frozen
            optimizer.load_state_dict(state)
            assert not optimizer.state[some[0]]["low"].any()
            state["state"][0]["low"] = before[0]
            optimizer.load_state_dict(state)
            continue
        steps = optimizer.step_count.item()
        with pytest.raises(ValueError, match=r"the state dict's low part of parameter 0 (is|has shape) "):
            optimizer.load_state_dict(state)
        assert optimizer.step_count.item() == steps
        assert all(torch.equal(now["low"], then) for now, then in zip(optimizer.state.values(), before, strict=True))


def test_weights_that_somebody_else_sets() -> None:
    """The low part is then older than the weight: the float32 is within half a unit of the weight, and never NaN."""
    some = params(BF16)
    optimizer = Lomo(some, lr=1e-3, rounding="split")
    optimizer.backward(loss(some, 0))
    for value in (0.0, -0.0, 1.0, math.inf, 3.3e38):
        for param in some:
            param.data.fill_(value)
            low_of(optimizer, param).view(-1)[::2] = -(2**15)
            low_of(optimizer, param).view(-1)[1::2] = 77
        stale = [low_of(optimizer, param).clone() for param in some]
        before = [param.detach().clone() for param in some]
        optimizer.backward(loss(some, 1))
        for i, param in enumerate(some):
            grad = ordinary(param.numel(), BF16, 100 + i, scale=1e-3).view(param.shape)
            expected = reference.updated_split(before[i], stale[i], grad, lr=1e-3)
            assert same_bits(param, expected[0]) and same_bits(low_of(optimizer, param), expected[1])
            assert not param.isnan().any()


# ---- Parameters that come, thaw and change --------------------------------------------------------------------------


def test_parameters_that_are_added_and_unfrozen() -> None:
    ours, theirs = params(BF16), params(torch.float32)
    for some in (ours, theirs):
        some[1].requires_grad_(False)
    optimizer, other = Lomo(ours[:3], lr=1e-3, rounding="split"), Lomo(theirs[:3], lr=1e-3)
    for step in range(6):
        for one, some in ((optimizer, ours), (other, theirs)):
            if step == 2:
                one.add_param_group({"params": some[3:]})
            if step == 4:
                some[1].requires_grad_(True)
            one.backward(loss(some if step >= 2 else some[:3], step))
    for mine, whole in zip(joined(optimizer, ours), theirs, strict=True):
        assert same_bits(mine, whole)


def test_float16_is_refused() -> None:
    message = r'{} is float16, and rounding="split" is for bfloat16 parameters. Use model.bfloat16\(\), or rounding='
    half = vector(1.0, dtype=torch.float16)
    with pytest.raises(TypeError, match=message.format("Lomo: parameter 0")):
        Lomo([half], rounding="split")
    Lomo([half]).remove()
    whole = vector(1.0, dtype=BF16)
    optimizer = Lomo([whole], lr=0.5, rounding="split")
    with pytest.raises(TypeError, match=message.format("Lomo: parameter 1")):
        optimizer.add_param_group({"params": [half]})
    assert len(optimizer.param_groups) == 1
    optimizer.backward(whole.float().sum())
    assert whole.item() == 0.5
    half.requires_grad_(False)
    other = Lomo([whole, half], lr=0.5, rounding="split")
    half.requires_grad_(True)
    for _ in range(2):
        with pytest.raises(TypeError, match=message.format("Lomo: parameter 1")):
            other.backward(whole.float().sum() + half.float().sum())
    assert (whole.item(), half.item()) == (0.5, 1.0)
    half.requires_grad_(False)
    other.backward(whole.float().sum())
    assert whole.item() == 0.0


def test_a_model_that_changes_its_dtype() -> None:
    model = nn.Linear(200, 200).to(BF16)
    optimizer = Lomo(model, lr=1e-3, rounding="split")
    optimizer.backward(model(torch.ones(1, 200, dtype=BF16)).float().square().sum())
    model.float()
    optimizer.backward(model(torch.ones(1, 200)).square().sum())
    assert "low" not in optimizer.state[model.weight]
    model.to(BF16)
    before = model.weight.detach().clone()
    optimizer.backward(gives(model.weight, torch.full((200, 200), 2.0**-20)) + gives(model.bias, torch.ones(200)))
    expected = reference.updated_split(
        before, torch.zeros_like(before, dtype=torch.int16), torch.tensor(2.0**-20), lr=1e-3
    )
    assert same_bits(low_of(optimizer, model.weight), expected[1])


@pytest.mark.parametrize("rounding", ["Split", None, True, "compensation"])
def test_another_rounding_is_refused(rounding: Any) -> None:
    with pytest.raises(ValueError, match=r'Lomo: rounding is .*, expected "nearest", "stochastic" or "split"'):
        Lomo([vector(1.0)], rounding=rounding)


def test_a_load_that_fails_at_its_end_leaves_the_low_parts() -> None:
    some = params(BF16)
    optimizer = Lomo(some, lr=1e-3, rounding="split")
    optimizer.backward(loss(some, 0))
    state, before = optimizer.state_dict(), joined(optimizer, some)
    for entry in state["state"].values():
        entry["low"].zero_()

    def fail(_: Any) -> None:
        raise KeyboardInterrupt

    optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(state)
    assert all(map(same_bits, joined(optimizer, some), before))
