"""Whatever comes into a step, Ctrl-C included: the next step is exact, and nothing of the broken one is left.

`every_line` raises KeyboardInterrupt at the n-th line that a step executes in `lomo_kernels.optim` and
`lomo_kernels.layers`, as a signal handler may. A sample of the lines by default; all of them with
``LOMO_KERNELS_EVERY_LINE=1`` (minutes).
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import assert_same_bits, weights_of
from textbook import Textbook, Textbook64
from torch import Tensor, nn

import lomo_kernels
from lomo_kernels import Lomo

pytestmark = pytest.mark.filterwarnings("ignore:Lomo.step", "ignore:.*a step broke off")

PACKAGE = Path(lomo_kernels.__file__).parent
TRACED = tuple(str(PACKAGE / folder) for folder in ("optim", "layers"))
EVERY_LINE = bool(os.environ.get("LOMO_KERNELS_EVERY_LINE"))
LR = 0.1


class Net(nn.Module):
    """Matrices of 160 KiB, which are updated at once, and small ones, which wait in lists; a weight used twice."""

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


def index(seed: int) -> Tensor:
    return torch.randint(11, (6,), generator=torch.Generator().manual_seed(seed))


def backward(optimizer: Lomo, model: nn.Module, seed: int) -> None:
    optimizer.backward(model(index(seed)))


def accumulated(optimizer: Lomo, model: nn.Module, seed: int) -> None:
    with optimizer.accumulate():
        optimizer.backward(model(index(seed + 100)))
    optimizer.backward(model(index(seed)))


def pair(optimizer: Lomo, model: nn.Module, seed: int) -> None:
    loss = model(index(seed))
    optimizer.grad_norm(loss)
    optimizer.fused_backward(loss, lr=LR)


def plain(optimizer: Lomo, model: nn.Module, seed: int) -> None:
    """The backward before it is torch's: an interrupt in it leaves what it leaves with any optimizer."""
    tracer = sys.gettrace()
    sys.settrace(None)
    model(index(seed)).backward()
    sys.settrace(tracer)
    optimizer.step()
    optimizer.zero_grad()


CLIP = {"clip_grad_norm": 0.05}
Way = Callable[[Lomo, nn.Module, int], None]
#: The optimizer's options, and what is called for one step.
MODES: dict[str, tuple[dict[str, Any], Way]] = {
    "plain": ({}, backward),
    "clip two": (CLIP, backward),
    "clip one": (CLIP | {"clip_passes": "one"}, backward),
    "fused": ({"fused_layers": True}, backward),
    "fused two": (CLIP | {"fused_layers": True}, backward),
    "fused one": (CLIP | {"fused_layers": True, "clip_passes": "one"}, backward),
    "dynamic": ({"loss_scale": "dynamic"}, backward),
    "static": ({"loss_scale": 512.0}, backward),
    "accumulated": ({"loss_scale": 512.0, **CLIP}, accumulated),
    "grad_norm": (CLIP, pair),
    "step": (CLIP, plain),
}


class Tracer:
    """Raises KeyboardInterrupt at the line with number `at`, counted from 0 over all traced frames of a call."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.lines = 0
        self.where = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        if event == "line":
            if self.lines == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                self.lines += 1
                raise KeyboardInterrupt
            self.lines += 1
        return self

    def run(self, call: Callable[[], None]) -> bool:
        """Whether `call` was interrupted. Also traces the threads in which autograd may run hooks."""
        threading.settrace(self)
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
        return False


def check_after(optimizer: Lomo, model: nn.Module, options: dict[str, Any], seed: int, where: str) -> None:
    """The next step: no gradient is left, it does not wait, and it equals that of SGD from the weights as they are."""
    assert all(param.grad is None for param in model.parameters()), f"a gradient is left, {where}"
    assert not optimizer._busy._is_owned(), where
    scale = optimizer.loss_scale.item()
    clip = options.get("clip_grad_norm")
    textbook = Textbook(model, lr=LR, clip_grad_norm=clip, loss_scale=None if scale == 1.0 else scale)
    fused = "fused_layers" in options
    exact = Textbook64(model, lr=LR, clip_grad_norm=clip)
    backward(optimizer, model, seed)
    assert optimizer.last_step_outcome == "complete", where
    if fused:  # the sums of products are in another order than autograd's
        exact.step(exact.model(index(seed)))
        assert optimizer.last_grad_norm.item() == pytest.approx(exact.norm, rel=1e-4), where
        for (name, param), wanted in zip(model.named_parameters(), exact.model.parameters(), strict=True):
            assert (param.double() - wanted).abs().max().item() < 1e-5, f"{name}, {where}"
    else:
        textbook.step(textbook.model(index(seed)), norm=optimizer.last_grad_norm)
        assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6), where
        assert_same_bits(weights_of(model), weights_of(textbook.model))


def interrupted_at(line: int, mode: str, model: Net, optimizer: Lomo) -> bool:
    """One interrupted step, and the one after it. False if the step has no line of that number."""
    options, way = MODES[mode]
    before, steps = weights_of(model), optimizer.step_count.item()
    tracer = Tracer(line)
    interrupted = tracer.run(lambda: way(optimizer, model, 1))
    if not interrupted:
        assert tracer.lines <= line, f"{tracer.where} swallowed the interrupt"
        return False
    outcome = optimizer.last_step_outcome
    same = all(torch.equal(now, before[name]) for name, now in weights_of(model).items())
    assert same or outcome in ("partial", "complete"), f"weights were changed, {tracer.where}"
    if outcome == "partial":
        assert optimizer.step_count.item() == steps, tracer.where
    assert not optimizer._accumulating, tracer.where
    if way in (accumulated, plain) and any(param.grad is not None for param in model.parameters()):
        # What stood there before the step: the plain backward's, which the step has not altered.
        assert outcome != "partial", tracer.where
        optimizer.zero_grad()
    check_after(optimizer, model, options, 2, tracer.where)
    return True


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_at_any_line(mode: str) -> None:
    options, way = MODES[mode]
    # The first step, which looks at more, and one that is like all later ones.
    for first in (True, False):
        model = net()
        optimizer = Lomo(model, lr=LR, **options)
        if not first:
            way(optimizer, model, 0)
        counter = Tracer(None)
        with Lomo(twin := copy.deepcopy(model), lr=LR, **options) as other:
            if not first:
                way(other, twin, 0)
            counter.run(lambda: way(other, twin, 1))
        assert counter.lines > 200
        step = 1 if EVERY_LINE else max(1, counter.lines // 24)
        start = model.state_dict()
        start = {name: value.clone() for name, value in start.items()}
        for line in range(0 if EVERY_LINE else hash_of(mode) % step, counter.lines, step):
            model.load_state_dict(start)
            if first:
                optimizer.remove()
                optimizer = Lomo(model, lr=LR, **options)
            interrupted_at(line, mode, model, optimizer)
        optimizer.remove()


def hash_of(text: str) -> int:
    """The same in every process."""
    return sum(text.encode())
