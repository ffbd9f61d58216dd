"""Whatever comes into a step, Ctrl-C included: the next step is exact, and nothing of the broken one is left.

tests/test_faults.py raises an exception at the lines of a step. Here it comes from hooks and signals.
"""

from __future__ import annotations

import itertools
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faults import scenes
from faults.lines import Tracer
from faults.scenes import Way, accumulated, backward, pair
from support.models import assert_same_bits, gives, vector, weights_of
from support.textbook import Textbook, Textbook64
from torch import Tensor, nn

from lomo_kernels import Lomo

pytestmark = pytest.mark.filterwarnings("ignore:Lomo.step", "ignore:.*a step broke off")

LR = 0.1


class Net(nn.Module):
    """Matrices of 160 KiB, which are updated at once, and small ones, which wait in lists; a weight used twice."""

    @staticmethod
    def index(seed: int) -> Tensor:
        return scenes.index(seed, classes=11, tokens=6)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 200)
        self.first = nn.Linear(200, 200)
        self.twice = nn.Linear(200, 200, bias=False)
        self.norm = nn.LayerNorm(200)
        self.head = nn.Linear(200, 11, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(index)))
        x = self.norm(self.twice(torch.tanh(self.twice(x))))
        return F.cross_entropy(self.head(x), index.flip(0))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def plain(optimizer: Lomo, model: nn.Module, seed: int) -> None:
    scenes.plain(optimizer, model, seed)
    optimizer.zero_grad()


CLIP = {"clip_grad_norm": 0.05, "clip_passes": "two"}
#: The optimizer's options, and what is called for one step.
MODES: dict[str, tuple[dict[str, Any], Way]] = {
    "plain": ({}, backward),
    "clip two": (CLIP, backward),
    "clip one": (CLIP | {"clip_passes": "one"}, backward),
    "fused": ({"fused_layers": True}, backward),
    "fused two": (CLIP | {"fused_layers": True}, backward),
    "fused one": (CLIP | {"fused_layers": True, "clip_passes": "one"}, backward),
    "dynamic": ({"loss_scale": "dynamic", "clip_passes": "two"}, backward),
    "static": ({"loss_scale": 512.0}, backward),
    "accumulated": ({"loss_scale": 512.0, **CLIP}, accumulated),
    "grad_norm": (CLIP, pair),
    "step": (CLIP, plain),
}


def check_after(optimizer: Lomo, model: nn.Module, options: dict[str, Any], seed: int, where: str) -> None:
    """The next step: no gradient is left, it does not wait, and it equals that of SGD from the weights as they are."""
    assert all(param.grad is None for param in model.parameters()), f"a gradient is left, {where}"
    assert not optimizer._training.steps._busy._is_owned(), where
    scale = optimizer.loss_scale.item()
    clip = options.get("clip_grad_norm")
    textbook = Textbook(model, lr=LR, clip_grad_norm=clip, loss_scale=None if scale == 1.0 else scale)
    fused = "fused_layers" in options
    exact = Textbook64(model, lr=LR, clip_grad_norm=clip)
    backward(optimizer, model, seed)
    assert optimizer.last_step_outcome == "complete", where
    if fused:  # the sums of products are in another order than autograd's
        exact.step(exact.model(Net.index(seed)))
        assert optimizer.last_grad_norm.item() == pytest.approx(exact.norm, rel=1e-4), where
        for (name, param), wanted in zip(model.named_parameters(), exact.model.parameters(), strict=True):
            assert (param.double() - wanted).abs().max().item() < 1e-5, f"{name}, {where}"
    else:
        textbook.step(textbook.model(Net.index(seed)), norm=optimizer.last_grad_norm)
        assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6), where
        assert_same_bits(weights_of(model), weights_of(textbook.model))


# ---- Interrupts as they come ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this system")
@pytest.mark.parametrize("mode", ["plain", "clip two", "clip one", "fused one", "dynamic"])
def test_a_signal_during_backward(mode: str) -> None:
    """Python runs a handler after the C++ kernel that the signal came in: often at the first line of a hook."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    options, _ = MODES[mode]
    model = net()
    optimizer = Lomo(model, lr=LR, **options)
    backward(optimizer, model, 0)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for turn in range(30):
            loss = model(Net.index(1))
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * 1.3**turn)
                optimizer.backward(loss)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            check_after(optimizer, model, options, turn, f"turn {turn}")
    finally:
        signal.signal(signal.SIGALRM, before)


class Failure(Exception):
    pass


def failing(model: Net, name: str, at: int = 0) -> Any:
    """A hook before the optimizer's own on this parameter, which fails at its call with number `at`."""
    calls = itertools.count()

    def fail(param: Tensor) -> None:
        if next(calls) == at:
            raise Failure

    return dict(model.named_parameters())[name].register_post_accumulate_grad_hook(fail)


@pytest.mark.parametrize("name", ["twice.weight", "first.bias", "embedding.weight"])
@pytest.mark.parametrize("mode", [mode for mode, (_, way) in MODES.items() if way is not plain])
def test_a_hook_before_the_optimizers_that_fails(mode: str, name: str) -> None:
    """Its gradient, with the loss scale in it, stood in .grad and went into the next step."""
    options, way = MODES[mode]
    model = net()
    handle = failing(model, name)
    optimizer = Lomo(model, lr=LR, **options)
    before = weights_of(model)
    with pytest.raises(Failure):
        way(optimizer, model, 1)
    handle.remove()
    assert optimizer.last_step_outcome in ("unchanged", "partial")
    if optimizer.last_step_outcome == "unchanged":
        assert_same_bits(weights_of(model), before)
    check_after(optimizer, model, options, 2, name)


def test_what_became_of_a_step() -> None:
    model = net()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=0.05, loss_scale=4.0, clip_passes="two")
    assert optimizer.last_step_outcome is None
    backward(optimizer, model, 0)
    assert optimizer.last_step_outcome == "complete"
    with optimizer.accumulate():
        backward(optimizer, model, 1)
    assert optimizer.last_step_outcome == "unchanged"
    backward(optimizer, model, 1)
    assert optimizer.last_step_outcome == "complete"
    for at, outcome in ((0, "unchanged"), (1, "partial")):
        handle = failing(model, "embedding.weight", at)
        before = weights_of(model)
        with pytest.raises(Failure):
            backward(optimizer, model, 2)
        assert optimizer.last_step_outcome == outcome
        same = {name: torch.equal(now, before[name]) for name, now in weights_of(model).items()}
        assert all(same.values()) == (outcome == "unchanged")
        assert same["embedding.weight"]
        handle.remove()
    backward(optimizer, model, 3)
    assert optimizer.last_step_outcome == "complete"
    with pytest.raises(ValueError, match="lr"):
        optimizer.fused_backward(next(model.parameters()).sum(), lr=-1.0)
    assert optimizer.last_step_outcome == "unchanged"


# ---- Gradients that stood in .grad before a broken step --------------------------------------------------------------


def test_accumulated_gradients_that_the_broken_step_added_to_are_dropped_with_a_word() -> None:
    model = net()
    optimizer = Lomo(model, lr=LR, loss_scale=512.0)
    with optimizer.accumulate():
        backward(optimizer, model, 0)
        handle = failing(model, "first.weight")
        with pytest.warns(UserWarning, match="had added to them"), pytest.raises(Failure):
            backward(optimizer, model, 1)
    handle.remove()
    check_after(optimizer, model, {}, 2, "")


def test_accumulated_gradients_stay_if_the_broken_step_has_not_come_to_them() -> None:
    """A loss of the wrong dtype, a graph that is used up: nothing was added, and the sum goes on."""
    model = net()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=0.05, clip_passes="two")
    textbook = Textbook(model, lr=LR, clip_grad_norm=0.05)
    used = model(Net.index(5))
    used.backward()
    model.zero_grad()
    with optimizer.accumulate(), warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(optimizer, model, 0)
        with pytest.raises(RuntimeError, match="second time"):
            optimizer.backward(used)
        with pytest.raises(TypeError):
            optimizer.backward(None)  # type: ignore[arg-type]
    backward(optimizer, model, 1)
    textbook.backward(textbook.model(Net.index(0)))
    textbook.step(textbook.model(Net.index(1)), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


def test_gradients_of_other_leaves_are_given_back() -> None:
    """Of an input, and of another optimizer's parameter, in the norm pass and under a loss scale."""
    model = net()
    other, sgd = nn.Parameter(torch.ones(200)), torch.ones(200) * 3
    for at in (0, 1):
        handle = failing(model, "embedding.weight", at)
        optimizer = Lomo(model, lr=LR, clip_grad_norm=0.05, loss_scale=512.0, clip_passes="two")
        other.grad = sgd.clone()
        with pytest.raises(Failure):
            optimizer.backward(model(Net.index(0)) * other.sum())
        assert torch.equal(other.grad, sgd)
        handle.remove()
        optimizer.remove()


# ---- What a hook may do, and a loss may be --------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["remove", "backward", "grad_norm", "fused_backward", "step"])
@pytest.mark.parametrize("mode", ["plain", "clip two", "fused one", "dynamic"])
def test_a_use_of_the_optimizer_by_a_hook_inside_its_step(mode: str, use: str) -> None:
    """remove() left the gradients that came after it in .grad, without a word."""
    options, _ = MODES[mode]
    model = net()
    optimizer = Lomo(model, lr=LR, **options)
    loss = model(Net.index(7))
    uses: dict[str, Callable[[], Any]] = {
        "remove": optimizer.remove,
        "backward": lambda: optimizer.backward(loss),
        "grad_norm": lambda: optimizer.grad_norm(loss),
        "fused_backward": lambda: optimizer.fused_backward(loss, lr=LR),
        "step": optimizer.step,
    }
    handle = model.head.weight.register_hook(lambda grad: uses[use]())
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"inside (another|a step)"):
        backward(optimizer, model, 1)
    handle.remove()
    assert_same_bits(weights_of(model), before)
    check_after(optimizer, model, options, 2, use)
    optimizer.remove()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_grad_norm": 0.5, "clip_passes": "two"},
        {"clip_grad_norm": 0.5, "clip_passes": "one"},
        {"loss_scale": 8.0},
        {"loss_scale": "dynamic", "clip_passes": "two"},
        {"loss_scale": "dynamic", "clip_passes": "one"},
    ],
    ids=str,
)
def test_a_loss_that_is_a_parameter(options: dict[str, Any], fused: bool) -> None:
    w = nn.Parameter(torch.tensor(1.0))
    model = nn.Module()
    model.w = w
    optimizer = Lomo(model, lr=LR, fused_layers=fused, **options)
    for expected in (1, 2, 3):
        optimizer.backward(w)
        assert w.item() == pytest.approx(1.0 - expected * LR * options.get("clip_grad_norm", 1.0), abs=1e-5)
        assert w.grad is None and optimizer.last_step_outcome == "complete"
    with optimizer.accumulate():
        optimizer.backward(w)
    assert w.grad is not None


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.5, "clip_passes": "two"}, {"loss_scale": 8.0}], ids=str)
def test_a_loss_that_is_somebody_elses_parameter(options: dict[str, Any]) -> None:
    w, other = vector(1.0), vector(2.0)
    optimizer = Lomo([w], lr=LR, **options)
    with pytest.raises(RuntimeError, match="no gradient came"):
        optimizer.backward(other)
    assert (w.item(), optimizer.last_step_outcome) == (1.0, "unchanged")
    optimizer.backward(w.sum())
    assert w.item() < 1.0


@pytest.mark.parametrize("size", [3, 20_000])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip_grad_norm": 5.0, "clip_passes": "two"}, {"clip_grad_norm": 5.0, "clip_passes": "one"}],
    ids=str,
)
def test_a_gradient_that_is_not_finite_and_raises(options: dict[str, Any], size: int) -> None:
    w, v = nn.Parameter(torch.ones(size)), vector(1.0)
    optimizer = Lomo([w, v], lr=LR, nonfinite="raise", **options)
    bad = torch.ones(size)
    bad[1] = float("inf")
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match="parameter 0"):
        warnings.simplefilter("error")
        optimizer.backward(gives(w, bad) + v.sum())
    clipped = "clip_grad_norm" in options
    assert optimizer.last_step_outcome == ("unchanged" if clipped else "complete")
    assert (v.item() == 1.0) == clipped and w[1].item() == 1.0
    assert optimizer.step_count.item() == optimizer.skipped_steps.item() == 1
    assert w.grad is None and v.grad is None
    before = v.item()
    optimizer.backward(v.sum())
    assert v.item() == pytest.approx(before - LR)


def test_another_thread_goes_on_after_an_interrupt() -> None:
    """The step lock stayed held, and the next step of another thread waited for ever."""
    model = net()
    optimizer = Lomo(model, lr=LR)
    handle = failing(model, "first.weight")
    with pytest.raises(Failure):
        backward(optimizer, model, 0)
    handle.remove()
    thread = threading.Thread(target=lambda: check_after(optimizer, model, {}, 1, "thread"), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive() and optimizer.last_step_outcome == "complete"


@pytest.mark.parametrize("mode", ["plain", "clip two"])
def test_step_hooks_are_called_after_an_interrupt(mode: str) -> None:
    options, way = MODES[mode]
    model, called = net(), []
    optimizer = Lomo(model, lr=LR, **options)
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    way(optimizer, model, 0)
    lines = Tracer()
    lines.run(lambda: way(optimizer, model, 0))
    for line in [*range(12), *range(lines.lines - 12, lines.lines)]:
        Tracer(line).run(lambda: way(optimizer, model, 1))
        called.clear()
        way(optimizer, model, 2)
        assert called == [1], line
