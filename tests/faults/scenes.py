"""A small model with an optimizer in each mode, and what has to be true after a step that broke off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from support.models import same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo, linear_cross_entropy
from lomo_kernels.composite import tiled

LR = 0.05
WIDTH = 200
CLASSES = 150


class Net(nn.Module):
    """Matrices above 64 KiB, which are updated at once, and small ones, which wait in lists; a weight used twice, and
    one that is embedding and head."""

    reentrant = False

    @staticmethod
    def index(seed: int) -> Tensor:
        return index(seed)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to(dtype)

    def forward(self, index: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(index)))
        x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return linear_cross_entropy(self.last(self.norm(x)), self.embedding.weight, index.flip(0))

    def block(self, x: Tensor) -> Tensor:
        return self.twice(torch.tanh(self.twice(x)))


class Reentrant(Net):
    reentrant = True


def index(seed: int, classes: int = CLASSES, tokens: int = 24) -> Tensor:
    return torch.randint(classes, (tokens,), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, seed: int) -> Tensor:
    """Of the batch that the model's `index` draws."""
    return model(model.index(seed))


def backward(optimizer: Lomo, model: nn.Module, seed: int) -> None:
    optimizer.backward(loss_of(model, seed))


def accumulated(optimizer: Lomo, model: nn.Module, seed: int) -> None:
    with optimizer.accumulate():
        optimizer.backward(loss_of(model, seed + 100))
    optimizer.backward(loss_of(model, seed))


def pair(optimizer: Lomo, model: nn.Module, seed: int) -> None:
    loss = loss_of(model, seed)
    optimizer.grad_norm(loss)
    optimizer.fused_backward(loss, lr=optimizer.param_groups[0]["lr"])


def plain(optimizer: Lomo, model: nn.Module, seed: int) -> None:
    loss_of(model, seed).backward()
    optimizer.step()


def overflowing(optimizer: Lomo, model: nn.Module, seed: int) -> None:
    optimizer.backward(loss_of(model, seed) * 1e38 * 1e38)


Way = Callable[[Lomo, nn.Module, int], None]


@dataclass(frozen=True)
class Mode:
    """Options of `Lomo`, what is called for one step, and how many steps came before."""

    options: dict[str, Any]
    way: Way = backward
    dtype: torch.dtype = torch.float32
    net: type[Net] = Net
    steps: int = 1


TWO, ONE = ({"clip_grad_norm": 0.05, "clip_passes": passes} for passes in ("two", "one"))
FUSED = {"fused_layers": True}
BF16 = torch.bfloat16
MODES: dict[str, Mode] = {
    "hook": Mode({}),
    "hook, first step": Mode({}, steps=0),
    "two passes": Mode(TWO),
    "two passes, first step": Mode(TWO, steps=0),
    "one pass": Mode(ONE),
    "some gradients kept": Mode({"clip_grad_norm": 0.05, "clip_memory": 500_000}, steps=2),
    "fused": Mode(FUSED),
    "fused, two passes": Mode(FUSED | TWO),
    "fused, one pass": Mode(FUSED | ONE),
    "reentrant": Mode({}, net=Reentrant),
    "sign": Mode({"rule": "sign"}),
    "tensor": Mode({"rule": "tensor"}),
    "rows": Mode({"rule": "rows"}),
    "adalomo": Mode({"rule": "adalomo"}),
    "adalomo, two passes": Mode({"rule": "adalomo"} | TWO),
    "fused adalomo": Mode({"rule": "adalomo"} | FUSED),
    "fused rows": Mode({"rule": "rows"} | FUSED),
    "fused rows, one pass": Mode({"rule": "rows"} | FUSED | ONE),
    "clip_tensor, warm-up": Mode({"clip_tensor": 1.04} | ONE),
    "clip_tensor": Mode({"clip_tensor": 1.04}, steps=101),
    "clip_tensor, dynamic": Mode({"clip_tensor": 1.04, "loss_scale": "dynamic"}, steps=101),
    "stochastic": Mode({"rounding": "stochastic"}, dtype=BF16),
    "split": Mode({"rounding": "split"}, dtype=BF16),
    "split, one pass": Mode({"rounding": "split"} | ONE, dtype=BF16),
    "split, rows": Mode({"rounding": "split", "rule": "rows"}, dtype=BF16),
    "split, fused": Mode({"rounding": "split"} | FUSED, dtype=BF16),
    "split, fused adalomo": Mode({"rounding": "split", "rule": "adalomo"} | FUSED, dtype=BF16),
    "dynamic": Mode({"loss_scale": "dynamic"}),
    "dynamic, overflow": Mode({"loss_scale": "dynamic", "clip_passes": "two"}, overflowing),
    "static": Mode({"loss_scale": 512.0}),
    "accumulated": Mode({"loss_scale": 512.0} | TWO, accumulated),
    "grad_norm": Mode(TWO, pair),
    "step": Mode(TWO, plain),
    "step, adalomo": Mode({"rule": "adalomo"}, plain),
}


@contextmanager
def small_tiles() -> Iterator[None]:
    """A weight of this size is several tiles, as large weights are."""
    before = tiled.TILE_BYTES, tiled.LEAST_ROWS
    tiled.TILE_BYTES, tiled.LEAST_ROWS = 1, 64
    try:
        yield
    finally:
        tiled.TILE_BYTES, tiled.LEAST_ROWS = before


class Snapshot:
    """All that a step changes: of each parameter its weight and what the optimizer keeps for it, and the counters."""

    COUNTERS: ClassVar = ("step", "skipped_steps", "loss_scale", "growth_tracker", "clip_norm_mean")
    SETTINGS: ClassVar = ("scaling", "seed", "rule")

    def __init__(self, model: nn.Module, optimizer: Lomo) -> None:
        self.state = optimizer.state_dict()
        self.weights = {name: param.detach().clone() for name, param in model.named_parameters()}
        self.params: dict[str, list[Tensor]] = {}
        self.counters: dict[str, Any] = {}
        for (name, weight), numbers in zip(self.weights.items(), self.state["state"].values(), strict=True):
            own = sorted(set(numbers) - {*self.COUNTERS, *self.SETTINGS})
            self.params[name] = [weight, *(numbers[key] for key in own)]
            self.counters[name] = [numbers[key] for key in self.COUNTERS if key in numbers]

    def load(self, model: nn.Module, optimizer: Lomo) -> None:
        model.load_state_dict(self.weights)
        optimizer.load_state_dict(self.state)
        model.zero_grad()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def in_the_middle(now: list[Tensor], before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether each row of a weight, with its low part, is that before or after the step, and each other tensor too."""
    rows = len(now[0])
    parts = [index for index, tensor in enumerate(now) if tensor.shape[:1] == now[0].shape[:1]]
    whole = [index for index in range(len(now)) if index not in parts]
    return all(
        any(
            same([now[index][row] for index in parts], [side[index][row] for index in parts])
            for side in (before, after)
        )
        for row in range(rows)
    ) and all(any(same_bits(now[index], side[index]) for side in (before, after)) for index in whole)


class Scene:
    """One mode: a run that is ready for a step, the same step without a fault, and the check after a fault."""

    def __init__(self, name: str) -> None:
        self.mode = mode = MODES[name]
        self.fresh = mode.steps == 0
        self.model, self.optimizer = self.make()
        self.twin, self.twin_optimizer = self.make()
        for _ in range(mode.steps):
            mode.way(self.optimizer, self.model, 0)
            self.model.zero_grad()
        for seed in range(3):
            mode.way(self.twin_optimizer, self.twin, seed)
            self.twin.zero_grad()
        self.before = Snapshot(self.model, self.optimizer)
        self.after = self._without_fault()

    def make(self) -> tuple[Net, Lomo]:
        torch.manual_seed(0)
        model = self.mode.net(self.mode.dtype)
        return model, Lomo(model, **{"lr": LR} | self.mode.options)

    def _without_fault(self) -> Snapshot:
        self.before.load(self.twin, self.twin_optimizer)
        self.mode.way(self.twin_optimizer, self.twin, 1)
        self.twin.zero_grad()
        return Snapshot(self.twin, self.twin_optimizer)

    def reset(self) -> None:
        if self.fresh:
            self.optimizer.remove()
            self.model, self.optimizer = self.make()
        else:
            self.before.load(self.model, self.optimizer)
        self.optimizer._training.steps.outcome = "unchanged"  # a fault in the forward comes before any step

    def step(self) -> None:
        self.mode.way(self.optimizer, self.model, 1)

    def check(self, *, between_lines: bool = False) -> str:
        """What is wrong after a step that broke off; "" if nothing is. Then a step is taken from what there is.

        Args:
            between_lines: it broke off between two lines of Python, and not because an operation failed.
        """
        optimizer, before, after = self.optimizer, self.before, self.after
        now, outcome = Snapshot(self.model, optimizer), optimizer.last_step_outcome
        changed = {name: not same(now.params[name], before.params[name]) for name in now.params}
        torn = [name for name in now.params if changed[name] and not same(now.params[name], after.params[name])]
        if outcome == "partial" and len(torn) == 1 and (between_lines or "fused_layers" in self.mode.options):
            (name,) = torn  # as docs/limits.md says: rows of a fused weight, or a rule's state, may be behind
            torn = [] if in_the_middle(*(side.params[name] for side in (now, before, after))) else torn
        if torn:
            return f"torn: {', '.join(torn)} ({outcome})"
        counted = now.counters != before.counters
        if outcome == "unchanged" and (any(changed.values()) or (counted and self.mode.way is not pair)):
            return f"'unchanged', but changed: {[name for name in changed if changed[name]]}, counted: {counted}"
        if outcome == "partial" and counted:
            return "'partial', but the step was counted"
        if outcome == "complete":
            lacking = [name for name in now.params if not same(now.params[name], after.params[name])]
            if lacking or now.counters != after.counters:
                return f"'complete', but lacking: {lacking}; counters {now.counters != after.counters}"
        kept = [name for name, param in self.model.named_parameters() if param.grad is not None]
        if kept and (self.mode.way not in (plain, accumulated) or outcome == "partial"):
            return f"a gradient is left on {kept} ({outcome})"
        return self._next_step(now)

    def check_close(self) -> str:
        """What is wrong after a step that found another way to its end."""
        off = [
            name
            for name, weight in self.model.named_parameters()
            if (weight.float() - self.after.weights[name].float()).abs().max() > 1e-2
        ]
        return f"wrong: {off}" if off or self.optimizer.last_step_outcome != "complete" else ""

    def _next_step(self, now: Snapshot) -> str:
        """The next step has to be that of a run which never had a fault, from the same numbers."""
        self.model.zero_grad()
        self.optimizer.zero_grad()
        self.mode.way(self.optimizer, self.model, 2)
        now.load(self.twin, self.twin_optimizer)
        self.mode.way(self.twin_optimizer, self.twin, 2)
        mine, right = Snapshot(self.model, self.optimizer), Snapshot(self.twin, self.twin_optimizer)
        wrong = [name for name in mine.params if not same(mine.params[name], right.params[name])]
        return f"the next step is wrong: {wrong}" if wrong or mine.counters != right.counters else ""
