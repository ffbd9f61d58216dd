"""torch's step hooks, and its profiler's mark: around each step once, whichever method makes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from support.models import Options, assert_same_bits, gives, loss_of, transformer, vector, weights_of
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lomo_kernels import Lomo

pytestmark = pytest.mark.filterwarnings("ignore:Lomo.step")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two": {"clip_grad_norm": 0.3, "clip_passes": "two"},
    "one": {"clip_grad_norm": 0.3, "clip_passes": "one"},
    "fused": {"clip_grad_norm": 0.3, "clip_passes": "one", "fused_layers": True},
    "dynamic": {"loss_scale": "dynamic", "clip_passes": "two"},
}


class Log:
    """Notes step hooks, the optimizer's own and the global ones, with step count and a weight as they are then."""

    def __init__(self, optimizer: Lomo, weight: Tensor) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.arguments: list[tuple[Any, ...]] = []
        self._optimizer, self._weight = optimizer, weight
        self.handles = [
            register_optimizer_step_post_hook(self._hook("global after")),
            optimizer.register_step_post_hook(self._hook("after")),
            optimizer.register_step_pre_hook(self._hook("before")),
            register_optimizer_step_pre_hook(self._hook("global before")),
        ]

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
            if optimizer is self._optimizer:
                self.calls.append((name, optimizer.step_count.item(), self._weight.item()))
                self.arguments.append((args, kwargs))

        return hook


@pytest.fixture
def log() -> Iterator[Callable[[Lomo, Tensor], Log]]:
    logs: list[Log] = []

    def make(optimizer: Lomo, weight: Tensor) -> Log:
        logs.append(Log(optimizer, weight))
        return logs[-1]

    yield make
    for some in logs:
        for handle in some.handles:
            handle.remove()


def around(step: int, before: float, after: float) -> list[tuple[Any, ...]]:
    """What a step from `before` to `after` has to leave in the log, in torch's order."""
    return [
        ("global before", step, before),
        ("before", step, before),
        ("after", step + 1, after),
        ("global after", step + 1, after),
    ]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_backward_is_one_step(options: str, log: Any) -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.3, **OPTIONS[options])
    calls = log(optimizer, model.gain)
    for step in range(3):
        before = model.gain.item()
        loss = loss_of(model, step)
        optimizer.backward(loss)
        assert calls.calls == around(step, before, model.gain.item())
        assert model.gain.item() != before
        assert all(args == (optimizer, loss) and kwargs == {} for args, kwargs in calls.arguments)
        optimizer.step()  # has nothing to apply
        assert len(calls.calls) == 4
        calls.calls.clear(), calls.arguments.clear()


def backward(optimizer: Lomo, loss: Callable[[], Tensor]) -> None:
    optimizer.backward(loss())


def backward_by_name(optimizer: Lomo, loss: Callable[[], Tensor]) -> None:
    optimizer.backward(loss=loss())


def accumulated(optimizer: Lomo, loss: Callable[[], Tensor]) -> None:
    with optimizer.accumulate():
        optimizer.backward(loss() / 4)
        optimizer.fused_backward(loss() / 4, 0.5)
    optimizer.backward(loss() / 2)


def fused_backward(optimizer: Lomo, loss: Callable[[], Tensor]) -> None:
    optimizer.fused_backward(loss(), lr=0.5)


def after_grad_norm(optimizer: Lomo, loss: Callable[[], Tensor]) -> None:
    optimizer.grad_norm(loss())
    optimizer.fused_backward(loss(), lr=0.5)


def step(optimizer: Lomo, loss: Callable[[], Tensor]) -> None:
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def closure(optimizer: Lomo, loss: Callable[[], Tensor]) -> None:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(evaluate)
    optimizer.zero_grad()


def closure_of_backward(optimizer: Lomo, loss: Callable[[], Tensor]) -> None:
    optimizer.step(lambda: optimizer.backward(loss()))


def skipped(optimizer: Lomo, loss: Callable[[], Tensor]) -> None:
    optimizer.backward(loss())
    optimizer.backward(loss() * float("nan"))


WAYS = [
    backward,
    backward_by_name,
    accumulated,
    fused_backward,
    after_grad_norm,
    step,
    closure,
    closure_of_backward,
    skipped,
]


@pytest.mark.parametrize("clip_grad_norm", [None, 9.0])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_of_a_step_calls_them_once(way: Callable[..., None], clip_grad_norm: float | None, log: Any) -> None:
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5, clip_grad_norm=clip_grad_norm, clip_passes="two")
    calls = log(optimizer, w)
    way(optimizer, lambda: gives(w, torch.ones(1)))
    expected = around(0, 1.0, 0.5) + (around(1, 0.5, 0.5) if way is skipped else [])
    assert calls.calls == expected
    for handle in calls.handles:
        handle.remove()
    way(optimizer, lambda: gives(w, torch.ones(1)))
    assert calls.calls == expected
    assert w.item() == 0.0


def test_nothing_to_apply_is_no_step(log: Any) -> None:
    w = vector(1.0)
    optimizer = Lomo([w])
    calls = log(optimizer, w)
    optimizer.step()
    optimizer.grad_norm(w.sum())
    optimizer.zero_grad()
    with optimizer.accumulate():
        optimizer.backward(w.sum())
    assert calls.calls == []


def test_a_hook_may_give_other_arguments() -> None:
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5)
    handle = optimizer.register_step_pre_hook(lambda _, args, kwargs: ((args[0], args[1] * 3), kwargs))
    optimizer.backward(w.sum())
    assert w.item() == -0.5
    handle.remove()
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, kwargs | {"lr": 0.25}))
    optimizer.fused_backward(w.sum(), lr=9.0)
    assert w.item() == -0.75


@pytest.mark.parametrize("clip_grad_norm", [None, 9.0])
def test_a_hook_that_fails_before_a_step_keeps_it_from_being_made(clip_grad_norm: float | None) -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=clip_grad_norm, clip_passes="two")
    other = transformer()
    others = Lomo(other, lr=0.3, clip_grad_norm=clip_grad_norm, clip_passes="two")
    for which, stepper in ((model, optimizer), (other, others)):
        stepper.backward(loss_of(which, 1))
    before = weights_of(model)

    def raises(*_: Any) -> None:
        raise KeyError("theirs")

    for hook, error in ((raises, KeyError), (lambda *_: "no tuple", RuntimeError)):
        assert optimizer.last_step_outcome == "complete" or hook is not raises
        handle = optimizer.register_step_pre_hook(hook)
        with pytest.raises(error):
            optimizer.backward(loss_of(model, 0))
        assert optimizer.last_step_outcome == "unchanged"
        handle.remove()
    assert_same_bits(weights_of(model), before)
    assert optimizer.step_count.item() == 1 and all(param.grad is None for param in model.parameters())
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    others.backward(loss_of(other, 0))
    optimizer.backward(loss_of(model, 0))
    assert_same_bits(weights_of(model), weights_of(other))
    assert seen == [1]


def test_a_step_that_is_refused_is_not_followed_by_hooks(log: Any) -> None:
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5)
    calls = log(optimizer, w)
    with pytest.raises((ValueError, TypeError)):
        optimizer.backward(torch.ones(2, requires_grad=True))
    assert [name for name, *_ in calls.calls] == ["global before", "before"]
    optimizer.backward(w.sum())
    assert len(calls.calls) == 6


def test_a_hook_sees_a_whole_step() -> None:
    """Hyperparameters set before a step count in it; state dict, norms and weights are there after it."""
    w = vector(1.0)
    optimizer = Lomo([w], lr=9.0)
    steps: list[Any] = []

    def warm_up(self: Any, *_: Any) -> None:
        self.param_groups[0]["lr"] = 0.25 * (1 + self.step_count.item())

    def after(self: Any, *_: Any) -> None:
        steps.append((self.state_dict()["lomo"]["step"].item(), self.grad_norms()["parameter 0"].item(), w.item()))

    optimizer.register_step_pre_hook(warm_up)
    optimizer.register_step_post_hook(after)
    for _ in range(2):
        optimizer.backward(gives(w, torch.full((1,), 2.0)))
    assert steps == [(1, 2.0, 0.5), (2, 2.0, -0.5)]


@pytest.mark.parametrize("options", OPTIONS)
def test_an_average_of_the_weights_from_a_hook(options: str) -> None:
    """torch's exponential moving average, updated by hand after every step and by a hook."""
    averages = []
    for by_hook in (True, False):
        model = transformer(Options(dtype=torch.bfloat16))
        optimizer = Lomo(model, lr=0.3, rounding="stochastic", **OPTIONS[options])
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        if by_hook:
            optimizer.register_step_post_hook(lambda *_, average=average, model=model: average.update_parameters(model))
        for number in range(3):
            with optimizer.accumulate():
                optimizer.backward(loss_of(model, number))
            optimizer.backward(loss_of(model, 10 + number))
            if not by_hook:
                average.update_parameters(model)
        assert average.n_averaged.item() == 3
        averages.append(weights_of(average.module))
    assert_same_bits(*averages)


def test_threads_have_hooks_of_their_own(log: Any) -> None:
    """A closure in one thread does not keep another thread's step from calling its hooks."""
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0)
    calls = log(optimizer, w)

    def evaluate() -> None:
        thread = threading.Thread(target=lambda: optimizer.backward(w.sum()))
        thread.start()
        thread.join()
        optimizer.backward(w.sum())

    optimizer.step(evaluate)
    names = [name for name, *_ in calls.calls]
    assert names == ["global before", "before"] * 2 + ["after", "global after"] * 2
    assert w.item() == -2.0


def test_the_profiler_has_a_mark_for_every_step() -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=1.0, clip_passes="two")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for number in range(3):
            optimizer.backward(loss_of(model, number))
            optimizer.step()
        with optimizer.accumulate():
            optimizer.backward(loss_of(model, 0))
        optimizer.step()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#Lomo.step"] == 4


def test_without_hooks_there_is_nothing_around_a_step() -> None:
    """torch's mark alone takes as long as a small layer's update."""
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5)
    with mock.patch("torch.autograd.profiler.record_function", side_effect=AssertionError("a mark")):
        optimizer.backward(w.sum())
        optimizer.register_step_pre_hook(lambda *_: None)
        with pytest.raises(AssertionError, match="a mark"):
            optimizer.backward(w.sum())
    assert w.item() == 0.5
