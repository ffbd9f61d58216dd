"""What torch asks of every optimizer, as its own suites do, held against `torch.optim.SGD`."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import same_bits, vector
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from lomo_kernels import Lomo


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def two_vectors() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, 9)), nn.Parameter(torch.linspace(1, -2, 17))]


def loss_of(params: list[nn.Parameter]) -> Tensor:
    return sum((param.square() * (1 + number)).sum() / 2 for number, param in enumerate(params))


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    """One step of `Lomo`, or of another optimizer."""
    if isinstance(optimizer, Lomo):
        optimizer.backward(loss_of(params))
    else:
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()


# ---- Schedulers -----------------------------------------------------------------------------------------------------

Make = Callable[[Any], Any]
SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda epoch: 0.5**epoch, lambda epoch: 1 / (1 + epoch)]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, step_size=2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, milestones=[1, 3, 3, 7]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.5, total_iters=2),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.7),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=4, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=3, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, base_lr=[0.1, 0.05], max_lr=[0.5, 0.2], step_size_up=2, mode="triangular2", cycle_momentum=False
    ),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=[0.5, 0.2], total_steps=20, cycle_momentum=False),
    "OneCycleLR, three phases": lambda o: schedulers.OneCycleLR(
        o, max_lr=0.5, total_steps=12, three_phase=True, anneal_strategy="linear", cycle_momentum=False
    ),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.LinearLR(o, total_iters=2), schedulers.ExponentialLR(o, gamma=0.5), schedulers.ConstantLR(o)],
        milestones=[2, 6],
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=2), schedulers.ExponentialLR(o, gamma=0.5)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, factor=0.5, cooldown=1),
    "SWALR": lambda o: SWALR(o, swa_lr=[0.05, 0.01], anneal_epochs=5, anneal_strategy="linear"),
}
#: With torch's defaults, which move the momentum, of which Lomo has none: only learning rates are comparable.
WITH_MOMENTUM: dict[str, Make] = {
    "CyclicLR": lambda o: schedulers.CyclicLR(o, base_lr=0.1, max_lr=0.5, step_size_up=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.5, total_steps=12),
}
METRICS = [3.0, 2.0, 2.5, 2.5, 2.4, 2.6, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5]


def test_every_scheduler_of_torch_is_here() -> None:
    theirs = {name for name in schedulers.__all__ if name != "LRScheduler"}
    assert theirs <= {name.split(",")[0] for name in SCHEDULERS}
    assert theirs >= WITH_MOMENTUM.keys()


def start(kind: Any, make: Make, tensor_lr: bool) -> tuple[list[nn.Parameter], Any, Any]:
    params = two_vectors()
    rates = [torch.tensor(rate) if tensor_lr else rate for rate in (0.3, 0.1)]
    optimizer = kind([{"params": [param], "lr": lr} for param, lr in zip(params, rates, strict=True)], lr=9.0)
    return params, optimizer, make(optimizer)


def advance(scheduler: Any, number: int) -> None:
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(METRICS[number])
    else:
        scheduler.step()


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.mark.filterwarnings("error", "ignore:The epoch parameter")  # that is SequentialLR's own
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rates_and_weights_are_those_of_sgd(name: str, tensor_lr: bool) -> None:
    """And no warning about the order of calls."""
    ours, optimizer, scheduler = start(Lomo, SCHEDULERS[name], tensor_lr)
    theirs, sgd, their_scheduler = start(torch.optim.SGD, SCHEDULERS[name], tensor_lr)
    seen = set()
    for number in range(len(METRICS)):
        step(optimizer, ours)
        step(sgd, theirs)
        advance(scheduler, number)
        advance(their_scheduler, number)
        assert rates_of(optimizer) == rates_of(sgd)
        assert [float(lr) for lr in scheduler.get_last_lr()] == [float(lr) for lr in their_scheduler.get_last_lr()]
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)
        seen.add(tuple(rates_of(optimizer)))
    assert len(seen) > 1
    assert all(isinstance(group["lr"], Tensor) == tensor_lr for group in optimizer.param_groups)


@pytest.mark.filterwarnings("ignore:The epoch parameter", "ignore:Detected call of")
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_is_resumed_twice(name: str, tensor_lr: bool) -> None:
    straight, whole, schedule = start(Lomo, SCHEDULERS[name], tensor_lr)
    params, optimizer, scheduler = start(Lomo, SCHEDULERS[name], tensor_lr)
    for number in range(len(METRICS)):
        if number in (3, 7):
            saved = through_a_file([optimizer.state_dict(), scheduler.state_dict(), [p.detach() for p in params]])
            params, optimizer, scheduler = start(Lomo, SCHEDULERS[name], tensor_lr)
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
            for param, value in zip(params, saved[2], strict=True):
                param.data.copy_(value)
            assert rates_of(optimizer) == rates_of(whole)
        step(whole, straight)
        step(optimizer, params)
        advance(schedule, number)
        advance(scheduler, number)
        assert rates_of(optimizer) == rates_of(whole)
    assert all(same_bits(a, b) for a, b in zip(params, straight, strict=True))


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_schedulers_that_cycle_momentum_by_default(name: str) -> None:
    ours, optimizer, scheduler = start(Lomo, WITH_MOMENTUM[name], False)
    theirs, sgd, their_scheduler = start(torch.optim.SGD, WITH_MOMENTUM[name], False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*momentum")
        for _ in range(10):
            step(optimizer, ours)
            step(sgd, theirs)
            scheduler.step()
            their_scheduler.step()
            assert rates_of(optimizer) == rates_of(sgd)
            assert [g["momentum"] for g in optimizer.param_groups] == [g["momentum"] for g in sgd.param_groups]


def test_stochastic_weight_averaging_with_its_learning_rate() -> None:
    """torch's recipe: train, average, anneal to the SWA rate, then bring the batch norms up to date."""

    def train(kind: Any) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        optimizer = kind(model.parameters(), lr=0.1)
        scheduler = schedulers.CosineAnnealingLR(optimizer, T_max=3)
        average, swa = AveragedModel(model, use_buffers=True), SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(6)]
        for number, x in enumerate(batches):
            loss = model(x).square().mean()
            if kind is Lomo:
                optimizer.backward(loss)
            else:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if number < 3:
                scheduler.step()
            else:
                average.update_parameters(model)
                swa.step()
        update_bn(batches, average)
        return model, average

    for ours, theirs in zip(train(Lomo), train(torch.optim.SGD), strict=True):
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_group_that_comes_after_the_scheduler() -> None:
    for kind in (Lomo, torch.optim.SGD):
        optimizer = kind([vector(1.0)], lr=0.5)
        scheduler = schedulers.StepLR(optimizer, step_size=1, gamma=0.5)
        optimizer.add_param_group({"params": [vector(1.0)], "lr": 0.25, "initial_lr": 0.25})
        scheduler.base_lrs.append(0.25)
        step(optimizer, [param for group in optimizer.param_groups for param in group["params"]])
        scheduler.step()
        assert rates_of(optimizer) == [0.25, 0.125]


# ---- State dicts and their hooks ------------------------------------------------------------------------------------


def after_two_steps(**options: Any) -> tuple[list[nn.Parameter], Lomo]:
    params = two_vectors()
    optimizer = Lomo(params, **{"lr": 0.1, **options})
    step(optimizer, params)
    step(optimizer, params)
    return params, optimizer


def plain(state: Any) -> Any:
    """With numbers in place of tensors, for `==`."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, Tensor) else state


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)], ids=str)
def test_state_dicts_go_round_and_are_the_same_for_the_same_run(lr: Any) -> None:
    first, second = (after_two_steps(lr=copy.deepcopy(lr))[1].state_dict() for _ in range(2))
    assert plain(first) == plain(second)
    state = first
    for _ in range(2):
        params = two_vectors()
        optimizer = Lomo(params, lr=9.0, seed=77)
        before = plain(state)
        optimizer.load_state_dict(state)
        assert plain(state) == before, "loading changes nothing in what is loaded"
        assert all(ours is param for ours, param in zip(optimizer.param_groups[0]["params"], params, strict=True))
        state = through_a_file(optimizer.state_dict())
        assert plain(state) == plain(first)
        assert optimizer.state.keys() == set(params)


def test_what_torch_looks_for_in_a_state_dict() -> None:
    _, optimizer = after_two_steps()
    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1]]
    assert state["state"].keys() == {0, 1}
    sgd = torch.optim.SGD(two_vectors(), lr=0.1).state_dict()
    assert sgd.keys() <= state.keys()


def test_state_dict_hooks() -> None:
    """Before and after, in order; the last ones see all of it and may give another."""
    _, optimizer = after_two_steps()
    calls: list[str] = []

    def keys(name: str) -> Callable[..., None]:
        return lambda _, state: calls.append(f"{name} {' '.join(sorted(state))}")

    def exchanged(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("last")
        return {**state, "mine": 1}

    handles = [
        optimizer.register_state_dict_pre_hook(lambda _: calls.append("pre")),
        optimizer.register_state_dict_pre_hook(lambda _: calls.append("first pre"), prepend=True),
        optimizer.register_state_dict_post_hook(keys("post")),
        optimizer.register_state_dict_post_hook(keys("first post"), prepend=True),
        optimizer.register_state_dict_post_hook(exchanged),
    ]
    for _ in range(2):
        state = optimizer.state_dict()
        expected = ["first pre", "pre", "first post lomo param_groups state", "post lomo param_groups state", "last"]
        assert calls == expected
        assert state["mine"] == 1
        calls.clear()
    for handle in handles:
        handle.remove()
    assert "mine" not in optimizer.state_dict() and not calls
    Lomo(two_vectors()).load_state_dict(state)  # with a key of the user's own


def test_load_state_dict_hooks() -> None:
    """What the last pre-hook gives is what is checked and loaded; post-hooks find it loaded."""
    _, source = after_two_steps()
    state = source.state_dict()
    state["lomo"]["parameters"] = [["old.a", [9]], ["old.b", [17]]]
    optimizer = Lomo(list(zip("ab", two_vectors(), strict=True)), lr=9.0)
    calls: list[Any] = []

    def renamed(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        calls.append("pre")
        assert loaded == state and loaded is not state
        parameters = [[name.removeprefix("old."), shape] for name, shape in loaded["lomo"]["parameters"]]
        return loaded | {"lomo": loaded["lomo"] | {"parameters": parameters}}

    def in_place(_: Any, loaded: dict[str, Any]) -> None:
        calls.append("first pre")
        loaded["extra"] = 1
        del loaded["extra"]

    with pytest.raises(ValueError, match=r"old\.a"):
        optimizer.load_state_dict(state)
    handles = [
        optimizer.register_load_state_dict_pre_hook(renamed),
        optimizer.register_load_state_dict_pre_hook(in_place, prepend=True),
        optimizer.register_load_state_dict_post_hook(lambda o: calls.append((o.step_count.item(), rates_of(o)))),
        optimizer.register_load_state_dict_post_hook(lambda _: calls.append("first post"), prepend=True),
    ]
    for _ in range(2):
        optimizer.load_state_dict(state)
        assert calls == ["first pre", "pre", "first post", (2, [0.1])]
        calls.clear()
    for handle in handles:
        handle.remove()
    with pytest.raises(ValueError, match=r"old\.a"):
        optimizer.load_state_dict(state)
    assert not calls


def test_a_state_dict_of_another_mapping_is_loaded() -> None:
    _, source = after_two_steps()
    optimizer = Lomo(two_vectors())
    optimizer.load_state_dict(OrderedDict(source.state_dict()))
    assert optimizer.step_count.item() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_state_dict_keeps_its_dtypes_whatever_the_parameters_are(dtype: torch.dtype) -> None:
    """torch casts what it loads to the parameter's dtype, where a step count would be rounded."""
    _, source = after_two_steps(loss_scale="dynamic")
    state = source.state_dict()
    state["lomo"]["step"].fill_(2**40 + 1)
    optimizer = Lomo(
        [nn.Parameter(param.detach().to(dtype)) for param in two_vectors()], loss_scale="dynamic", clip_passes="two"
    )
    optimizer.load_state_dict(state)
    assert optimizer.step_count.item() == 2**40 + 1
    assert plain(optimizer.state_dict()["lomo"]) == plain(state["lomo"])


# ---- Groups, hyperparameters and everything else --------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor([0.1])], ids=["number", "0-d", "1-d"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
@pytest.mark.parametrize("later", [False, True])
def test_groups_train_as_those_of_sgd(lr: Any, weight_decay: float, later: bool) -> None:
    """Options of the group, the defaults, and a group that is added. Decoupled decay is SGD's without momentum."""
    runs = []
    for kind in (Lomo, torch.optim.SGD):
        params = two_vectors()
        groups = [{"params": params[0], "lr": 0.05}, {"params": params[1:]}]
        if later:
            optimizer = kind(groups[:1], lr=copy.deepcopy(lr), weight_decay=weight_decay)
            step(optimizer, params[:1])
            optimizer.add_param_group(groups[1])
        else:
            optimizer = kind(groups, lr=copy.deepcopy(lr), weight_decay=weight_decay)
        for number in range(4):
            optimizer.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"] * (0.5 if number == 2 else 1.0)
            step(optimizer, params)
        runs.append(params)
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


NOT_A_LEAF, TWICE = "is not a leaf tensor", "is given twice; each parameter has one place"
#: What is given, and what is said of it. torch speaks of sets and names.
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (list, "model_or_params holds no parameters"),
    "a tensor": (lambda: vector(0.0), "model_or_params is a Parameter, expected an nn.Module"),
    "no tensor": (lambda: [1.0], "parameter 0 is a float, expected a parameter"),
    "a dict of no tensor": (lambda: [{"params": [1.0]}], "parameter 0 is a float, expected a parameter"),
    "no leaf": (lambda: [vector(0.0) * 2], NOT_A_LEAF),
    "a set": (lambda: [{"params": {vector(0.0)}}], "organized in ordered collections"),
    "twice in a group": (lambda: [vector(0.0)] * 2, TWICE),
    "twice in two groups": (lambda: [{"params": some} for some in [[vector(0.0)]] * 2], TWICE),
    "some with names": (lambda: [("a", vector(0.0)), vector(1.0)], "Some param names are missing"),
    "some groups with names": (
        lambda: [{"params": [("a", vector(0.0))]}, {"params": [vector(1.0)]}],
        "cannot add param group without names",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_torch_refuses_is_refused(bad: str) -> None:
    make, message = BAD[bad]
    with pytest.raises((TypeError, ValueError), match=message):
        Lomo(make(), lr=0.1)


BAD_GROUPS: dict[str, tuple[Callable[[nn.Parameter], Any], str]] = {
    "no dict": (lambda _: [vector(1.0)], "a parameter group is a list, expected a dict"),
    "no tensor": (lambda _: {"params": [1.0]}, "parameter 1 is a float, expected a parameter"),
    "no leaf": (lambda _: {"params": [vector(1.0) * 2]}, NOT_A_LEAF),
    "a set": (lambda _: {"params": {vector(1.0)}}, "organized in ordered collections"),
    "twice": (lambda _: {"params": [vector(1.0)] * 2}, TWICE),
    "in another group": (lambda known: {"params": [vector(1.0), known]}, TWICE),
    "with names": (lambda _: {"params": [("a", vector(1.0))]}, "cannot add param group with names"),
}


@pytest.mark.parametrize("bad", BAD_GROUPS)
def test_a_group_that_torch_refuses_is_refused_later_too(bad: str) -> None:
    known = vector(0.0)
    optimizer = Lomo([known], lr=0.1)
    make, message = BAD_GROUPS[bad]
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group(make(known))
    assert [group["params"] for group in optimizer.param_groups] == [[known]]
    assert "param_names" not in optimizer.param_groups[0]


@pytest.mark.parametrize("lr", [-1e-2, float("nan"), float("inf"), "0.1", None, True])
def test_a_learning_rate_that_is_none(lr: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="lr"):
        Lomo([vector(0.0)], lr=lr)


@pytest.mark.parametrize(
    "given",
    [
        lambda params: iter(params),
        lambda params: tuple(params),
        lambda params: [{"params": iter(params)}],
        lambda params: ({"params": param} for param in params),
        lambda params: zip("ab", params, strict=True),
        nn.ParameterList,
    ],
    ids=["iterator", "tuple", "group of an iterator", "iterator of groups", "names", "module"],
)
def test_whatever_holds_parameters(given: Callable[[Any], Any]) -> None:
    params = two_vectors()
    optimizer = Lomo(given(params), lr=0.1)
    before = [param.detach().clone() for param in params]
    step(optimizer, params)
    assert all(not torch.equal(param, value) for param, value in zip(params, before, strict=True))


def test_defaults_groups_and_repr() -> None:
    _, optimizer = after_two_steps(weight_decay=0.5)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults.items() >= {"lr": 0.1, "weight_decay": 0.5, "clip_grad_value": None}.items()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [vector(1.0)], "lr": 0.25})
    assert rates_of(optimizer) == [0.1, 0.25]
    for keys in (optimizer.defaults.keys(), *(group.keys() for group in optimizer.param_groups)):
        assert not {"foreach", "fused", "capturable", "differentiable", "maximize"} & keys
    text = repr(optimizer)
    assert text.startswith("Lomo (\nParameter Group 0\n") and "Parameter Group 1" in text
    assert "lr: 0.25" in text and "weight_decay: 0.5" in text


@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_closures() -> None:
    params = two_vectors()
    theirs = two_vectors()
    optimizer, sgd = Lomo(params, lr=0.1), torch.optim.SGD(theirs, lr=0.1)

    def closure(some: torch.optim.Optimizer, of: list[nn.Parameter]) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            assert torch.is_grad_enabled()
            some.zero_grad()
            loss = loss_of(of)
            loss.backward()
            return loss

        return evaluate

    for _ in range(2):
        with torch.no_grad():
            ours, expected = optimizer.step(closure(optimizer, params)), sgd.step(closure(sgd, theirs))
        assert ours.item() == pytest.approx(expected.item())
    for our, their in zip(params, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)
    optimizer.zero_grad()
    assert optimizer.step() is None and optimizer.step(closure=None) is None


def test_parameters_without_a_gradient_stay() -> None:
    for kind in (Lomo, torch.optim.SGD):
        params = two_vectors()
        optimizer = kind(params, lr=0.1, weight_decay=0.5)
        step(optimizer, params[:1])
        assert torch.equal(params[1], two_vectors()[1]) and not torch.equal(params[0], two_vectors()[0])


def test_the_same_run_gives_the_same_bits() -> None:
    runs = [after_two_steps(rounding="stochastic", clip_grad_norm=0.5)[0] for _ in range(2)]
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))
