"""What the optimizer saves and what it agrees to load: every checkpoint of a run, every value, all or nothing."""

from __future__ import annotations

import copy
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.models import assert_same_bits, gives, same_bits, vector, weights_of
from test_lomo_state import named, through_a_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import lomo_kernels
from lomo_kernels import Lomo
from lomo_kernels.layers import factor_sinks
from lomo_kernels.optim import saved_numbers
from lomo_kernels.optim.scaling import GROWTH_INTERVAL

# ---- Every checkpoint of a run --------------------------------------------------------------------------------------


def small_model(dtype: torch.dtype = torch.float16) -> nn.Sequential:
    """One weight above 64 KiB, which has a call of its own, and small ones, which wait for a list call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4200), nn.Tanh(), nn.Linear(4200, 1)).to(dtype)


def take_step(model: nn.Module, optimizer: Lomo, step: int) -> None:
    """The gradients of steps 1 and 3 are infinite, so that loss scale and counters differ between checkpoints."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
    optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
    optimizer.backward(model(x).float().square().mean() * (math.inf if step in (1, 3) else 1.0))


def new_run(seed: int = 5) -> tuple[nn.Sequential, Lomo]:
    model = small_model()
    return model, Lomo(
        model, lr=0.05, rounding="stochastic", clip_grad_norm=0.5, weight_decay=0.01, seed=seed, clip_passes="two"
    )


def save_in_memory(model: nn.Module, optimizer: Lomo, _: Path) -> Any:
    return {"model": copy.deepcopy(model.state_dict()), "optimizer": optimizer.state_dict()}


def load_from_memory(model: nn.Module, optimizer: Lomo, saved: Any) -> None:
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])


def save_with_helpers(options: StateDictOptions) -> Callable[..., Any]:
    def save(model: nn.Module, optimizer: Lomo, folder: Path) -> Any:
        state = get_state_dict(model, optimizer, options=options)
        dcp.save(dict(zip(("model", "optimizer"), state, strict=True)), checkpoint_id=folder)
        return folder

    return save


def load_with_helpers(options: StateDictOptions) -> Callable[..., None]:
    def load(model: nn.Module, optimizer: Lomo, folder: Path) -> None:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )

    return load


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
WAYS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "state_dict": (save_in_memory, load_from_memory),
    "torch.save": (lambda *run: through_a_file(save_in_memory(*run)), load_from_memory),
    "get_state_dict": (save_with_helpers(StateDictOptions()), load_with_helpers(StateDictOptions())),
    "get_state_dict, flat": (save_with_helpers(FLAT), load_with_helpers(FLAT)),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", WAYS)
def test_every_checkpoint_holds_its_own_step(way: str, tmp_path: Path) -> None:
    """Saved three times, resumed from each and once more from a resumed run: bit for bit the run without a break."""
    save, load = WAYS[way]
    model, optimizer = new_run()
    saved = {}
    for step in range(6):
        if step in (1, 2, 4):
            saved[step] = save(model, optimizer, tmp_path / str(step))
        take_step(model, optimizer, step)
    ends = optimizer.state_dict()["lomo"]
    assert (ends["step"].item(), ends["skipped_steps"].item(), ends["loss_scale"].item()) == (6, 2, 2.0**14)
    for first in saved:
        resumed, after = new_run(seed=99)
        load(resumed, after, saved[first])
        assert after.step_count.item() == first
        take_step(resumed, after, first)
        again = save(resumed, after, tmp_path / f"{first} again")
        resumed, after = new_run(seed=98)
        load(resumed, after, again)
        for step in range(first + 1, 6):
            take_step(resumed, after, step)
        assert_same_bits(weights_of(resumed), weights_of(model))
        assert after.state_dict()["lomo"] == ends


@pytest.mark.parametrize("options", [{}, {"rule": "adalomo"}, {"clip_tensor": 1.04}], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["parts", "full"])
def test_helpers_of_torch_and_frozen_parameters(full: bool, options: dict[str, Any]) -> None:
    """Of a frozen parameter they load nothing, or, into a full state dict, what this optimizer had."""
    helpers = StateDictOptions(full_state_dict=full, cpu_offload=full)
    models = [small_model(torch.float32) for _ in range(2)]
    for model in models:
        model[0].weight.requires_grad_(False)
    optimizer, other = (Lomo(model, lr=0.05, **options) for model in models)
    for step in range(4):
        if step == 2:
            of_model, of_optimizer = get_state_dict(models[0], optimizer, options=helpers)
            set_state_dict(models[1], other, model_state_dict=of_model, optim_state_dict=of_optimizer, options=helpers)
            assert other.step_count.item() == 2
        take_step(models[0], optimizer, 2 * step)
        if step >= 2:
            take_step(models[1], other, 2 * step)
    assert_same_bits(weights_of(models[1]), weights_of(models[0]))


def test_saving_puts_nothing_into_the_optimizer() -> None:
    model = named((2,), (3,))
    optimizer = Lomo(model, lr=torch.tensor(0.5))
    live = {param: dict(numbers) for param, numbers in optimizer.state.items()}
    saved = optimizer.state_dict()
    for param, numbers in optimizer.state.items():
        assert numbers.keys() == live[param].keys()
        assert all(numbers[key] is live[param][key] for key in numbers)
    tensors = [value for numbers in saved["state"].values() for value in numbers.values() if isinstance(value, Tensor)]
    tensors += [saved["param_groups"][0]["lr"]]
    before = [tensor.clone() for tensor in tensors]
    optimizer.param_groups[0]["lr"].fill_(0.25)
    optimizer.backward(model.a.sum() + model.b.sum())
    assert all(same_bits(tensor, value) for tensor, value in zip(tensors, before, strict=True))
    assert all(numbers["step"].item() == 1 for numbers in optimizer.state.values())


def test_what_is_loaded_is_not_shared() -> None:
    """Two optimizers from one state dict, with a learning rate that is a tensor."""
    state = Lomo(named((2,)), lr=torch.tensor(0.5)).state_dict()
    models = named((2,)), named((2,))
    optimizers = [Lomo(model, lr=torch.tensor(9.0)) for model in models]
    for optimizer in optimizers:
        optimizer.load_state_dict(state)
    optimizers[0].param_groups[0]["lr"].fill_(0.25)
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.backward(model.a.sum())
    assert [model.a[0].item() for model in models] == [0.75, 0.5]
    assert state["param_groups"][0]["lr"].item() == 0.5


# ---- Every value ----------------------------------------------------------------------------------------------------


def whole_state(optimizer: Lomo) -> dict[str, Any]:
    """All that loading, or a group that is added, may change; compared by `==`."""
    training = optimizer._training
    records, attachment = training.managed_params, training.attachment
    return {
        "groups": [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups],
        "lists": [id(optimizer.param_groups), id(optimizer.state)],
        "numbers": {k: v.item() if isinstance(v, Tensor) else v for k, v in optimizer.state_dict()["lomo"].items()},
        "live": [training.state.primary.step.data_ptr(), training.norm_is_known, training.settings.seed],
        "state": {
            id(p): {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in numbers.items()}
            for p, numbers in optimizer.state.items()
        },
        "records": [vars(record).copy() for record in records],
        "hooks": [len(record.param._post_accumulate_grad_hooks or ()) for record in records],
        "handles": [handle.id for handle in attachment._handles],
        "fused": [id(reference()) for reference in attachment._fused],
        "sinks": [*attachment._factor_sinks, sorted(factor_sinks)],
    }


def integer(value: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


UNUSABLE: list[tuple[str, Any]] = [
    ("step", integer(-1)),
    ("step", integer([1, 2])),
    ("step", integer([])),
    ("step", integer(7, torch.int32)),
    ("step", torch.tensor(7.0)),
    ("step", torch.tensor(True)),
    ("step", torch.empty((), dtype=torch.int64, device="meta")),
    ("step", 7),
    ("step", None),
    ("step", True),
    ("skipped_steps", integer(-1)),
    ("skipped_steps", integer(4)),  # of 3 steps
    ("skipped_steps", None),
    ("loss_scale", torch.tensor(math.nan)),
    ("loss_scale", torch.tensor(math.inf)),
    ("loss_scale", torch.tensor(0.0)),
    ("loss_scale", torch.tensor(-4.0)),
    ("loss_scale", torch.tensor(2.0**-25)),
    ("loss_scale", torch.tensor(4.0, dtype=torch.float64)),
    ("loss_scale", torch.ones(2)),
    ("loss_scale", 4.0),
    ("growth_tracker", integer(-1, torch.int32)),
    ("growth_tracker", integer(GROWTH_INTERVAL, torch.int32)),
    ("growth_tracker", integer(0)),
    ("growth_tracker", False),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 1.0),
    ("seed", True),
    ("seed", None),
    ("seed", integer(1)),
]


def run_of_three(**options: Any) -> tuple[nn.Module, Lomo]:
    model = named((2,), (3,))
    optimizer = Lomo(model, **{"lr": 0.5, "loss_scale": "dynamic", **options})
    for _ in range(3):
        optimizer.backward(model.a.sum() + model.b.sum())
    return model, optimizer


@pytest.mark.parametrize("by_parameter", [False, True], ids=["entry", "by parameter"])
@pytest.mark.parametrize(("key", "value"), UNUSABLE, ids=lambda value: str(value).replace("\n", " "))
def test_a_value_that_no_run_can_have_is_refused(key: str, value: Any, by_parameter: bool) -> None:
    """In our entry, and as `torch.distributed.checkpoint` hands it on: by parameter, without that."""
    _, source = run_of_three()
    state = source.state_dict()
    state["param_groups"][0]["lr"] = 7.0
    if by_parameter:
        del state["lomo"]
        for numbers in state["state"].values():
            numbers[key] = value
    else:
        state["lomo"][key] = value
    model, optimizer = run_of_three(seed=3)
    before = whole_state(optimizer)
    with pytest.raises(ValueError, match=key):
        optimizer.load_state_dict(state)
    assert whole_state(optimizer) == before
    optimizer.backward(model.a.sum())
    assert model.a[0].item() == -1.0


@pytest.mark.parametrize(
    ("loss_scale", "value", "tracker"),
    [(None, 2.0, 0), (None, 1.0, 1), (8.0, 2.0**101, 0), (8.0, 8.0, 1), ("dynamic", 2.0**-25, 0)],
)
def test_the_range_of_each_kind_of_scaling(loss_scale: Any, value: float, tracker: int) -> None:
    _, optimizer = run_of_three(loss_scale=loss_scale)
    state = optimizer.state_dict()
    state["lomo"] |= {"loss_scale": torch.tensor(value), "growth_tracker": integer(tracker, torch.int32)}
    with pytest.raises(ValueError, match="growth_tracker" if tracker else "loss_scale"):
        optimizer.load_state_dict(state)


def test_the_ends_of_every_range_are_loaded() -> None:
    _, optimizer = run_of_three()
    for scale, tracker, seed in ((2.0**-24, 0, -(2**63)), (2.0**127, GROWTH_INTERVAL - 1, 2**63 - 1)):
        state = optimizer.state_dict()
        state["lomo"] |= {
            "step": integer(2**62),
            "skipped_steps": integer([2**62]),
            "loss_scale": torch.tensor(scale),
            "growth_tracker": integer(tracker, torch.int32),
            "seed": seed,
        }
        optimizer.load_state_dict(through_a_file(state))
        assert optimizer.skipped_steps.item() == optimizer.step_count.item() == 2**62
        assert (optimizer.loss_scale.item(), optimizer._training.state.scale.growth_tracker.item()) == (scale, tracker)
        assert optimizer.state_dict()["lomo"]["seed"] == seed


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no dict": lambda state: [state],
    "without groups": lambda state: {"state": {}, "lomo": state["lomo"]},
    "without state": lambda state: {key: state[key] for key in ("param_groups", "lomo")},
    "state is a list": lambda state: state | {"state": []},
    "groups are a dict": lambda state: state | {"param_groups": {}},
    "a group is a list": lambda state: state | {"param_groups": [[]]},
    "a group without parameters": lambda state: state | {"param_groups": [{"lr": 0.1}]},
    "the entry is None": lambda state: state | {"lomo": None},
    "an unknown key": lambda state: state | {"lomo": state["lomo"] | {"momentum": 0.9}},
    "a later version": lambda state: state | {"lomo": state["lomo"] | {"version": saved_numbers.VERSION + 1, "new": 1}},
    "no version": lambda state: state | {"lomo": state["lomo"] | {"version": "1"}},
    "parameters is None": lambda state: state | {"lomo": state["lomo"] | {"parameters": None}},
    "parameters are names": lambda state: state | {"lomo": state["lomo"] | {"parameters": ["a", "b"]}},
    "scaling is a number": lambda state: state | {"lomo": state["lomo"] | {"scaling": 2}},
    "scaling unknown": lambda state: state | {"lomo": state["lomo"] | {"scaling": "adaptive"}},
    "a learning rate of NaN": lambda state: state | {
        "param_groups": [state["param_groups"][0] | {"lr": torch.tensor(math.nan)}]
    },
    "a negative learning rate": lambda state: state | {
        "param_groups": [state["param_groups"][0] | {"lr": torch.tensor(-0.1)}]
    },
    "by parameter, an unknown key": lambda state: {
        "state": {0: state["state"][0] | {"momentum": 0.9}, 1: state["state"][1]},
        "param_groups": state["param_groups"],
    },
    "by parameter, a key less": lambda state: {
        "state": {0: state["state"][0], 1: {"scaling": 2}},
        "param_groups": state["param_groups"],
    },
    "by parameter, two steps": lambda state: {
        "state": {0: state["state"][0], 1: state["state"][1] | {"step": integer([2])}},
        "param_groups": state["param_groups"],
    },
    "by parameter, scaling out of range": lambda state: {
        "state": {i: state["state"][i] | {"scaling": -1} for i in (0, 1)},
        "param_groups": state["param_groups"],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_of_another_form_is_refused_in_our_words(form: str) -> None:
    _, source = run_of_three()
    state = source.state_dict()
    state["param_groups"][0]["weight_decay"] = 0.125
    _, optimizer = run_of_three()
    before = whole_state(optimizer)
    with pytest.raises((TypeError, ValueError), match=r"^Lomo: ") as error:
        optimizer.load_state_dict(FORMS[form](state))
    assert whole_state(optimizer) == before
    if form == "a later version":
        assert "Update lomo_kernels" in str(error.value)


def test_a_state_dict_without_a_version_is_of_the_first() -> None:
    _, source = run_of_three()
    state = source.state_dict()
    del state["lomo"]["version"]
    model = named((2,), (3,))
    optimizer = Lomo(model, loss_scale="dynamic", clip_passes="two")
    optimizer.load_state_dict(state)
    assert optimizer.step_count.item() == 3


# ---- All or nothing -------------------------------------------------------------------------------------------------

PACKAGE = os.path.dirname(lomo_kernels.__file__)
#: Not `backends`, whose lock would stay locked: the trace also stops at the end of a ``with``, before it is left.
TRACED = tuple(os.path.join(PACKAGE, folder) + os.sep for folder in ("optim", "layers"))


class Interrupt(BaseException):
    pass


def interrupted(call: Callable[[], Any], line: int) -> bool:
    """Runs `call` until the optimizer has begun `line` lines, and raises there; False: it came to its end before."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        if event == "line":
            count += 1
            if count == line:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("by_parameter", [False, True], ids=["entry", "by parameter"])
def test_an_interrupt_at_any_line_of_load_state_dict(by_parameter: bool) -> None:
    _, source = run_of_three(lr=0.25, seed=11)
    state = source.state_dict()
    if by_parameter:
        del state["lomo"]
    model = named((2,), (3,))
    optimizer = Lomo(model, lr=0.5, loss_scale="dynamic", clip_grad_norm=1.0, clip_passes="two")
    optimizer.backward(model.a.sum() + model.b.sum())
    optimizer.grad_norm(model.a.sum() * math.inf)  # a norm that waits for its step
    before, line = whole_state(optimizer), 1
    while interrupted(lambda: optimizer.load_state_dict(state), line):
        assert whole_state(optimizer) == before, f"line {line}"
        line += 1
    assert line > 50
    assert optimizer.step_count.item() == 3
    assert (optimizer.param_groups[0]["lr"], optimizer.state_dict()["lomo"]["seed"]) == (0.25, 11)


def test_a_hook_of_the_user_that_raises_leaves_all_as_it_was() -> None:
    _, source = run_of_three(lr=0.25)
    _, optimizer = run_of_three()
    before = whole_state(optimizer)
    for register in (optimizer.register_load_state_dict_pre_hook, optimizer.register_load_state_dict_post_hook):

        def fails(*_: Any) -> None:
            raise KeyError("theirs")

        handle = register(fails)
        with pytest.raises(KeyError, match="theirs"):
            optimizer.load_state_dict(source.state_dict() | {"param_groups": source.state_dict()["param_groups"]})
        handle.remove()
        assert whole_state(optimizer) == before


def test_a_hook_of_a_load_may_save() -> None:
    """It was refused as "inside a step"."""
    _, source = run_of_three(lr=0.25)
    _, optimizer = run_of_three()
    saved: list[Any] = []
    optimizer.register_load_state_dict_post_hook(lambda each: saved.append(each.state_dict()))
    optimizer.load_state_dict(source.state_dict())
    assert saved[0]["param_groups"][0]["lr"] == 0.25


def test_an_interrupt_at_any_line_of_add_param_group() -> None:
    """With a layer to fuse, a parameter unfrozen since, and a norm that waits for its step."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    optimizer = Lomo(
        model[0].parameters(), lr=0.5, fused_layers=model, clip_grad_norm=1.0, loss_scale="dynamic", clip_passes="two"
    )
    optimizer.backward(model(torch.ones(2, 3)).sum())
    optimizer.grad_norm(model(torch.ones(2, 3)).sum() * math.inf)
    model[0].bias.requires_grad_(True)
    later = list(model[1].parameters())

    def state() -> Any:
        hooks = [len(param._post_accumulate_grad_hooks or ()) for param in later]
        classes = [type(module) for module in model]
        return whole_state(optimizer), hooks, classes

    before, line = state(), 1
    while interrupted(lambda: optimizer.add_param_group({"params": later, "lr": 0.25}), line):
        assert state() == before, f"line {line}"
        Lomo(later).remove()  # they are still anybody's
        line += 1
    assert line > 200
    weights = weights_of(model)
    optimizer.backward(model(torch.ones(2, 3)).sum())
    changed = [name for name, value in weights_of(model).items() if not same_bits(value, weights[name])]
    assert changed == ["0.weight", "0.bias", "1.weight", "1.bias"]


# ---- Names ----------------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


def wrapped(model: Blocks) -> Blocks:
    model.second = checkpoint_wrapper(model.second)
    return model


def compiled(model: Blocks) -> nn.Module:
    return torch.compile(model, backend="eager")  # compiled when it is called, which nothing here does


MAKERS: dict[str, Callable[[Blocks], Any]] = {
    "model": lambda model: model,
    "named parameters": lambda model: list(model.named_parameters()),
    "parameters": lambda model: list(model.parameters()),
    "groups": lambda model: [{"params": list(model.parameters())}],
    "checkpoint_wrapper": wrapped,
    "compile": compiled,
    "both": lambda model: compiled(wrapped(model)),
}


@pytest.mark.parametrize("after", MAKERS)
@pytest.mark.parametrize("before", MAKERS)
def test_names_do_not_keep_a_run_from_going_on(before: str, after: str) -> None:
    options = {"lr": 0.25, "rounding": "stochastic"}
    x = torch.linspace(-1, 1, 8).view(2, 4).bfloat16()
    whole, first, second = (Blocks().bfloat16() for _ in range(3))
    straight, source = Lomo(whole, seed=4, **options), Lomo(MAKERS[before](first), seed=4, **options)
    optimizer = Lomo(MAKERS[after](second), seed=5, **options)
    names = optimizer.param_groups[0].get("param_names")
    for model, some in ((whole, straight), (first, source)):
        some.backward(model(x).sum())
    for _ in range(2):  # and what was loaded is saved and loaded again
        state = through_a_file(source.state_dict())
        optimizer.load_state_dict(state)
        for theirs, ours in zip(first.parameters(), second.parameters(), strict=True):
            ours.data.copy_(theirs.data)
        assert optimizer.param_groups[0].get("param_names") == names
        for model, some in ((whole, straight), (first, source), (second, optimizer)):
            some.backward(model(x).sum())
    for other in (first, second):
        assert all(same_bits(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))
    if names is None:
        optimizer.add_param_group({"params": [vector(1.0)]})
    else:
        optimizer.add_param_group({"params": [("later", vector(1.0))]})


@pytest.mark.parametrize("nameless", [False, True])
def test_another_shape_is_refused_by_name(nameless: bool) -> None:
    source, model = named((2,), (3,)), named((2,), (4,))
    state = Lomo(list(source.parameters()) if nameless else source).state_dict()
    with pytest.raises(ValueError, match=r"parameter 1 is .* of shape \[3\] in the state dict, b of shape \[4\] here"):
        Lomo(model).load_state_dict(state)


@pytest.mark.parametrize("name", ["_orig_mod.b", "x._checkpoint_wrapped_module.a", "parameter 1", "A"])
def test_another_name_is_refused(name: str) -> None:
    state = Lomo([(name, vector(1.0))]).state_dict()
    with pytest.raises(ValueError, match="parameter 0 is"):
        Lomo([("a", vector(1.0))]).load_state_dict(state)


# ---- From torch.optim.SGD -------------------------------------------------------------------------------------------


def sgd_of(model: nn.Module, by_name: bool = True, **options: Any) -> torch.optim.SGD:
    """With a step behind it, a schedule, and another learning rate for the second parameter."""
    entries = [[pair] if by_name else [pair[1]] for pair in model.named_parameters()]
    groups = [{"params": some, "lr": 0.5 / (1 + index)} for index, some in enumerate(entries)]
    sgd = torch.optim.SGD(groups, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, step_size=1, gamma=0.5)
    sum(param.sum() for param in model.parameters()).backward()
    sgd.step()
    scheduler.step()
    return sgd


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.125}], ids=str)
def test_the_state_dict_of_sgd_gives_learning_rates_and_groups(options: dict[str, Any], by_name: bool) -> None:
    sgd = sgd_of(named((2,), (3,)), by_name, **options)
    model = named((2,), (3,))
    optimizer = Lomo([{"params": [pair]} for pair in model.named_parameters()], lr=9.0, clip_grad_value=4.0, seed=6)
    optimizer.backward(model.a.sum() * 0.0)
    dropped = "momentum, momentum_buffer, nesterov$" if options else "nothing that was in use$"
    with pytest.warns(UserWarning, match=f"Dropped: {dropped}") as caught:
        optimizer.load_state_dict(through_a_file(sgd.state_dict()))
    assert len(caught) == 1 and caught[0].filename == __file__
    for index, group in enumerate(optimizer.param_groups):
        assert not {"dampening", "nesterov", "foreach", "fused"} & group.keys() and group["momentum"] == 0.0
        assert (group["lr"], group["initial_lr"]) == (0.25 / (1 + index), 0.5 / (1 + index))
        assert (group["weight_decay"], group["clip_grad_value"]) == (options.get("weight_decay", 0.0), 4.0)
    assert (optimizer.step_count.item(), optimizer.state_dict()["lomo"]["seed"]) == (1, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.backward(gives(model.a, torch.ones(2)))
        optimizer.load_state_dict(optimizer.state_dict())
    assert model.a[0].item() == (1 - 0.25 * options.get("weight_decay", 0.0)) - 0.25


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_loads_nothing() -> None:
    _, optimizer = run_of_three()
    before = whole_state(optimizer)
    with pytest.raises(UserWarning, match="SGD"):
        optimizer.load_state_dict(torch.optim.SGD(named((2,), (3,)).parameters(), lr=7.0).state_dict())
    assert whole_state(optimizer) == before


SGD_MISFITS: dict[str, Callable[[], dict[str, Any]]] = {
    "a momentum of another shape": lambda: sgd_of(named((2,), (4,)), False, momentum=0.9).state_dict(),
    "other names": lambda: sgd_of(named((2,), (3,), names="xy")).state_dict(),
    "more parameters": lambda: sgd_of(named((2,), (3,), (4,))).state_dict(),
    "other groups": lambda: torch.optim.SGD(named((2,), (3,)).parameters(), lr=7.0).state_dict(),
    "maximize": lambda: sgd_of(named((2,), (3,)), maximize=True).state_dict(),
    "Adam": lambda: torch.optim.Adam([{"params": [p]} for p in named((2,), (3,)).parameters()]).state_dict(),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("misfit", SGD_MISFITS)
def test_of_sgd_a_real_mismatch_is_refused(misfit: str) -> None:
    model = named((2,), (3,))
    optimizer = Lomo([{"params": [pair]} for pair in model.named_parameters()], lr=0.5)
    before = whole_state(optimizer)
    with pytest.raises(ValueError, match=r"^Lomo: "):
        optimizer.load_state_dict(SGD_MISFITS[misfit]())
    assert whole_state(optimizer) == before
