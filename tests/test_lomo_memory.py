"""Gradients really die: a recorder of live tensors watches every step, and is itself shown to see those that do not."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo
from lomo_kernels.memory import Event, LiveBytes

WIDTH = 256
LAYERS = 6
TOKENS = 2  # so few that every large tensor made in a step is a gradient, or a copy that should not be
LARGE = 64 * 1024
BUFFER = 1024 * 1024 + LARGE  # small gradients that may wait at any time, and the one that made it full
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = {"one pass": {"clip_passes": "two"}, "two passes": {"clip_grad_norm": 1.0, "clip_passes": "two"}}


class Stack(nn.Module):
    """Embedding, square layers with biases and norms, and a head; large weights of one size, activations of no account.

    Every storage of WIDTH * WIDTH elements that appears in a step is a gradient, or something that should not be there.
    """

    def __init__(self, kind: str, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.kind = kind

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer, norm in zip(self.layers, self.norms, strict=True):

            def block(x: Tensor, layer: nn.Module = layer, norm: nn.Module = norm) -> Tensor:
                return x + F.gelu(layer(norm(x)))

            x = block(x) if self.kind == "none" else checkpoint(block, x, use_reentrant=self.kind == "reentrant")
        return self.head(x).float().square().mean()


def stack(dtype: torch.dtype = torch.float32, kind: str = "none", tied: bool = False) -> Stack:
    torch.manual_seed(0)
    return Stack(kind, tied).to(dtype)


def large_of(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.nbytes > LARGE]


class Record(NamedTuple):
    large_at_once: int  # most tensors above LARGE alive at one time
    largest: int  # bytes of the largest tensor made
    peak: int  # bytes above what was alive before
    left: int  # bytes alive afterwards
    made: int  # number of tensors above LARGE made


def recorded(run: Callable[[], object]) -> Record:
    """`run` once to warm up whatever is made once, then once more under the recorder."""
    run()
    gc.collect()
    events: list[Event] = []
    with LiveBytes(events) as live:
        run()
    large, most, made = 0, 0, 0
    for event in events:
        if event.nbytes > LARGE:
            large += 1 if event.kind == "alloc" else -1
            made += event.kind == "alloc"
            most = max(most, large)
    return Record(most, max(event.nbytes for event in events), live.peak, live.current, made)


def tokens() -> Tensor:
    return torch.arange(TOKENS) % WIDTH


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_large_gradient_at_a_time(dtype: torch.dtype, kind: str, rule: str) -> None:
    model = stack(dtype, kind)
    optimizer = Lomo(model, lr=1e-3, rounding="stochastic", weight_decay=0.1, **RULES[rule])
    passes = 2 if rule == "two passes" or dtype is torch.float16 or kind == "reentrant" else 1
    record = recorded(lambda: optimizer.backward(model(tokens())))
    assert record.made == passes * len(large_of(model)), "a gradient for each large parameter, and no copy of any"
    assert record.large_at_once == 1
    assert record.largest == WIDTH * WIDTH * dtype.itemsize, "no float32 copy of a 16-bit parameter or gradient"
    small = sum(param.nbytes for param in model.parameters() if param.nbytes <= LARGE)
    activations = 40 * LAYERS * TOKENS * WIDTH * 4
    assert record.peak < record.largest + small + activations
    assert record.left <= 16 * LAYERS, "nothing outlives the step"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_a_tied_head_costs_the_one_gradient_that_autograd_holds(kind: str, rule: str) -> None:
    """Autograd keeps the head's part until the embedding's is there, and adds them; the others still die at once."""
    model = stack(kind=kind, tied=True)
    optimizer = Lomo(model, lr=1e-3, **RULES[rule])
    record = recorded(lambda: optimizer.backward(model(tokens())))
    plain = stack(kind=kind, tied=True)

    def plain_step() -> None:
        plain.zero_grad()
        plain(tokens()).backward()

    assert record.large_at_once <= 3
    assert recorded(plain_step).large_at_once >= LAYERS + 1
    assert record.left <= 16 * LAYERS


@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_the_recorder_sees_gradients_that_live(kind: str) -> None:
    """Plain backward, a hook that keeps what it sees, and accumulate(): all gradients at once."""
    model = stack(kind=kind)
    count = len(large_of(model))

    def plain() -> None:
        model.zero_grad()
        model(tokens()).backward()

    assert recorded(plain).large_at_once == count
    model.zero_grad()

    optimizer = Lomo(model, lr=1e-3)

    def accumulated() -> None:
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.backward(model(tokens()))

    assert recorded(accumulated).large_at_once == count
    optimizer.zero_grad()

    kept: list[Tensor] = []
    for param in large_of(model):
        param.register_hook(kept.append)

    def keeping() -> None:
        kept.clear()
        optimizer.backward(model(tokens()))

    assert recorded(keeping).large_at_once >= count


def test_the_recorder_sees_copies() -> None:
    """A float32 copy of one bfloat16 gradient is enough to be noticed."""
    model = stack(torch.bfloat16)
    optimizer = Lomo(model, lr=1e-3)
    model.layers[2].weight.register_hook(lambda grad: grad.float().sum() and None)
    record = recorded(lambda: optimizer.backward(model(tokens())))
    assert record.largest == WIDTH * WIDTH * 4
    assert record.large_at_once == 2


@pytest.mark.parametrize("rule", RULES)
def test_small_gradients_wait_in_a_bounded_buffer(rule: str) -> None:
    """60 gradients of 60 KiB, 3.5 MiB together: about one MiB of them at a time."""
    params = nn.ParameterList(nn.Parameter(torch.zeros(15 * 1024)) for _ in range(60))
    optimizer = Lomo(params, lr=1e-3, **RULES[rule])

    def loss() -> Tensor:
        out = torch.zeros(())
        for param in params:
            out = torch.addcmul(out, param[0], param[1])
        return out

    def plain() -> None:
        loss().backward()
        params.zero_grad()

    scratch = 3 * 60 * 1024  # of the backward of an indexing
    assert recorded(plain).peak > 60 * 60 * 1024
    record = recorded(lambda: optimizer.backward(loss()))
    assert record.peak < BUFFER + scratch
    assert record.left == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_optimizer_itself_is_small(dtype: torch.dtype) -> None:
    model = stack(dtype)
    count = len(list(model.parameters()))
    with LiveBytes() as live:
        optimizer = Lomo(model, lr=1e-3, clip_grad_norm=1.0, rounding="stochastic", clip_passes="two")
        optimizer.backward(model(tokens()))
        gc.collect()
        assert live.current <= 256 + 8 * count, "one float64 per parameter and some scalars"
        del optimizer


@pytest.mark.filterwarnings("ignore:Lomo.step")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_makes_no_copies(dtype: torch.dtype, rule: str) -> None:
    model = stack(dtype)
    optimizer = Lomo(model, lr=1e-3, rounding="stochastic", weight_decay=0.1, **RULES[rule])
    model(tokens()).backward()
    record = recorded(optimizer.step)
    assert record.made == 0
    assert record.peak < 8192


def test_accumulated_gradients_die_with_their_step() -> None:
    model = stack()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=1.0, clip_passes="two")

    def step() -> None:
        for _ in range(2):
            with optimizer.accumulate():
                optimizer.backward(model(tokens()))
        optimizer.backward(model(tokens()))

    record = recorded(step)
    assert record.large_at_once <= len(large_of(model)) + 1, "one set of gradients, and the one that is being added"
    assert record.left <= 16 * LAYERS


def test_a_step_that_fails_half_way_leaves_nothing_behind() -> None:
    model = stack()
    optimizer = Lomo(model, lr=1e-3)
    optimizer.backward(model(tokens()))
    fails = [True]

    def fail(grad: Tensor) -> None:
        if fails[0]:
            raise KeyError("half way")

    model.layers[1].weight.register_hook(fail)
    gc.collect()
    with LiveBytes() as live:
        loss = model(tokens())
        with pytest.raises(KeyError):
            optimizer.backward(loss)
        del loss
        gc.collect()
        assert live.current < LARGE
    assert all(param.grad is None for param in model.parameters())
    fails[0] = False
    optimizer.backward(model(tokens()))


def test_gradients_given_to_fused_backward_die_too() -> None:
    model = stack()
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=1.0, clip_passes="two")

    def step() -> None:
        loss = model(tokens())
        optimizer.grad_norm(loss)
        optimizer.fused_backward(loss, lr=1e-3)

    record = recorded(step)
    assert record.large_at_once == 1
    assert record.made == 2 * len(large_of(model))
    assert record.left <= 16 * LAYERS
