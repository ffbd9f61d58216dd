"""What fused layers save, watched by a recorder of every tensor that a step makes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_lomo_memory import Record, recorded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.measure import allocations, peak_of
from lomo_kernels import Lomo
from lomo_kernels.composite import tiled
from lomo_kernels.memory import Event, LiveBytes

WIDTH = 512
ROWS = 640
WEIGHT = WIDTH * ROWS  # elements; float32: 1.25 MiB, some three tiles
LAYERS = 2
CLIP = {"clip_grad_norm": 1e-3, "clip_passes": "two"}
ONE = {**CLIP, "clip_passes": "one"}


class Stack(nn.Module):
    """Embedding, pairs of layers, and a head; every matrix has rows * width elements."""

    def __init__(
        self, *, tied: bool = False, shared: int = 1, kind: str = "none", rows: int = ROWS, width: int = WIDTH
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.ups = nn.ModuleList(nn.ModuleList(nn.Linear(width, rows) for _ in range(shared)) for _ in range(LAYERS))
        self.downs = nn.ModuleList(nn.Linear(rows, width, bias=False) for _ in range(LAYERS))
        self.head = nn.Linear(width, rows, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.kind = kind

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for ups, down in zip(self.ups, self.downs, strict=True):

            def block(x: Tensor, ups: Any = ups, down: nn.Module = down) -> Tensor:
                return x + down(torch.stack([torch.tanh(up(x)) for up in ups]).sum(0))

            x = block(x) if self.kind == "none" else checkpoint(block, x, use_reentrant=self.kind == "reentrant")
        return self.head(x).float().square().mean()


#: Bytes of a tile: a quarter of `tiled.TILE_BYTES`, as the weights are a quarter of what would fill three of those. A
#: product of as many tokens as decide between factors and gradients takes an eighth of the time.
TILE = tiled.TILE_BYTES // 4


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE_BYTES", TILE)
    monkeypatch.setattr(tiled, "LEAST_ROWS", tiled.LEAST_ROWS // 2)
    monkeypatch.setattr(tiled.buffer, "memory", torch.empty(0))
    assert 4 * tiled.tile_rows(ROWS, WIDTH) * WIDTH == TILE


class Allocated(NamedTuple):
    sizes: set[int]  # bytes of each allocation
    peak: int  # bytes above what was alive before
    left: int  # bytes alive afterwards


def allocated(step: Callable[[], None]) -> Allocated:
    """The second of two steps as the allocator saw it: inside operators too. The tile, which stays from step to step,
    counts as made anew."""
    step()
    gc.collect()
    tiled.buffer.memory = torch.empty(0)
    changes = allocations(step)
    return Allocated({change for change in changes if change > 0}, peak_of(changes), sum(changes))


def scratch_of_products(dtype: torch.dtype, tokens: int) -> tuple[set[int], int]:
    """Bytes of each allocation that torch makes for a layer's product, and the most that it takes in addition to the
    result. oneDNN packs bfloat16 factors for AMX, a weight in 6 KiB more than its size. Without AMX, and for float32,
    it does not."""
    weight = torch.ones(ROWS, WIDTH, dtype=dtype)
    x, gy = weight.new_ones(tokens, WIDTH), weight.new_ones(tokens, ROWS)
    forward, backward = allocations(lambda: F.linear(x, weight)), allocations(lambda: gy @ weight)
    most = max(peak_of(forward) - gy.nbytes, peak_of(backward) - x.nbytes)
    return {change for change in (*forward, *backward) if change > 0}, most


def step_of(model: Stack, optimizer: Lomo, tokens: int) -> Callable[[], None]:
    indices = torch.arange(tokens) % model.embedding.num_embeddings
    return lambda: optimizer.backward(model(indices))


def sgd_step(model: Stack, tokens: int) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=False)
    indices = torch.arange(tokens) % ROWS

    def step() -> None:
        model(indices).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=False)
        optimizer.step()
        optimizer.zero_grad()

    return step


#: Each kind of checkpoints with each dtype and each rule, as each dtype with each rule, tied and not.
@pytest.mark.parametrize(
    ("tied", "kind", "dtype", "rule"),
    [
        (False, "none", torch.float32, {}),
        (False, "none", torch.bfloat16, CLIP),
        (False, "reentrant", torch.float32, CLIP),
        (False, "reentrant", torch.bfloat16, {}),
        (False, "non-reentrant", torch.float32, {}),
        (False, "non-reentrant", torch.bfloat16, CLIP),
        (True, "none", torch.float32, CLIP),
        (True, "none", torch.bfloat16, {}),
        (True, "non-reentrant", torch.float32, {}),
        (True, "non-reentrant", torch.bfloat16, CLIP),
    ],
    ids=str,
)
def test_no_tensor_of_a_weights_size_is_ever_made(dtype: torch.dtype, rule: Any, tied: bool, kind: str) -> None:
    model = Stack(tied=tied, kind=kind).to(dtype)
    optimizer = Lomo(model, lr=1e-3, fused_layers=True, weight_decay=0.1, **rule)
    record = allocated(step_of(model, optimizer, 16))
    packed, scratch = scratch_of_products(dtype, 16)
    assert max(record.sizes - packed) == TILE < WEIGHT * dtype.itemsize
    assert WEIGHT * dtype.itemsize not in packed, "else a gradient could hide among these"
    assert record.peak < TILE + scratch + WEIGHT * dtype.itemsize / 2, "a tile, and the activations of 16 tokens"
    assert record.left < TILE + 4096


def test_the_recorder_sees_the_gradient_of_a_layer_that_is_not_fused() -> None:
    model = Stack()
    assert max(allocated(step_of(model, Lomo(model, lr=1e-3), 16)).sizes) == WEIGHT * 4


#: Each two of them in all pairs of values. `shared` layers have one input.
@pytest.mark.parametrize(
    ("tokens", "kind", "shared"),
    [
        (4, "none", 1),
        (4, "non-reentrant", 3),
        (100, "none", 3),
        (100, "non-reentrant", 1),
        (350, "none", 1),
        (350, "non-reentrant", 3),
    ],
)
def test_one_backward_keeps_the_smaller_of_factors_and_gradients(tokens: int, kind: str, shared: int) -> None:
    model = Stack(shared=shared, kind=kind)
    weights = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    others = sum(param.nbytes for param in model.parameters()) - 4 * WEIGHT * len(weights)
    base = allocated(step_of(model, Lomo(model, lr=1e-3, fused_layers=True), tokens))
    gc.collect()
    record = allocated(step_of(model, Lomo(model, lr=1e-3, fused_layers=True, **ONE), tokens))
    # An input shared by several layers counts once; the embedding's indices are int64.
    linear = 4 * tokens * sum(module.out_features for module in weights if isinstance(module, nn.Linear))
    inputs = 4 * tokens * (LAYERS * (WIDTH + ROWS) + WIDTH)
    pairs = linear + inputs + tokens * (8 + 4 * WIDTH)
    gradients = 4 * WEIGHT * len(weights)
    # With factors as large as gradients the head's comes first, while the activations of the whole forward are alive.
    assert record.peak - base.peak <= min(pairs, gradients) + others + TILE + 4096
    sgd = Stack(shared=shared, kind=kind)
    standard = allocated(sgd_step(sgd, tokens))
    assert record.peak <= standard.peak + TILE
    assert record.left < TILE + 4096


def test_factors_die_as_they_are_applied() -> None:
    model = Stack()
    optimizer = Lomo(model, lr=1e-3, fused_layers=True, **ONE)
    step = step_of(model, optimizer, 64)
    step()
    live_when_applied: list[int] = []
    events: list[Event] = []
    with LiveBytes(events) as live:
        handle = torch.autograd.graph.increment_version

        def watched(tensors: Any) -> None:
            live_when_applied.append(live.current)
            handle(tensors)

        torch.autograd.graph.increment_version = watched
        try:
            step()
        finally:
            torch.autograd.graph.increment_version = handle
    assert live_when_applied == sorted(live_when_applied, reverse=True)
    assert len(live_when_applied) >= 2 * LAYERS + 2
    assert live.current < 4096


def kept_by(optimizer: Lomo, step: Callable[[], None]) -> int:
    """Bytes alive when backward has ended and the coefficient is formed."""
    step()
    at_the_end: list[int] = []
    finish_norm = optimizer._training.state.finish_norm

    def watched(clip: float | None) -> None:
        at_the_end.append(live.current)
        finish_norm(clip)

    optimizer._training.state.finish_norm = watched  # type: ignore[method-assign]
    with LiveBytes() as live:
        step()
    return at_the_end[0]


@pytest.mark.parametrize("view", ["selected", "narrowed"])
def test_a_factor_that_is_a_small_part_of_a_large_tensor_does_not_keep_it(view: str) -> None:
    """As BERT's pooler, which takes one token of each sequence."""
    torch.manual_seed(0)
    pooler, bias = nn.Linear(256, 256, bias=False), nn.Parameter(torch.randn(256))
    optimizer = Lomo([pooler.weight, bias], lr=1e-3, fused_layers=pooler, **ONE)
    data = torch.randn(64, 512, 256)  # 32 MiB

    def step() -> None:
        hidden = torch.tanh(data * bias)
        loss = pooler(hidden[:, 0] if view == "selected" else hidden[:, 3:4]).square().sum()
        del hidden
        optimizer.backward(loss)

    factors = 4 * 64 * (256 + 256)  # half of the gradient
    assert kept_by(optimizer, step) < factors + 4 * 256 + 4096


def test_an_input_that_another_layer_keeps_counts_in_full() -> None:
    """As in grouped-query attention: the key's factors are larger than its gradient, which is kept therefore. What a
    layer keeps depends on its own shapes, or the way it takes, and its bits, would depend on the layers around it."""
    torch.manual_seed(0)
    query, key, first = nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 128, bias=False), nn.Linear(4, 1024)
    optimizer = Lomo(nn.ModuleList([first, query, key]), lr=1e-3, fused_layers=True, **ONE)

    def step() -> None:
        x = torch.tanh(first(torch.ones(300, 4)))
        loss = key(x).square().sum()
        loss = query(x).square().sum() + loss  # backward comes to the query first
        optimizer.backward(loss)

    step()
    kept = 4 * 300 * (1024 + 1024) + key.weight.nbytes + first.weight.nbytes + first.bias.nbytes
    assert 4 * 300 * (1024 + 128) > key.weight.nbytes > 4 * 300 * 128
    assert kept_by(optimizer, step) < kept + 4 * 300 * 4 + 4096


def test_autocast_keeps_factors_of_16_bits() -> None:
    model = Stack()
    optimizer = Lomo(model, lr=1e-3, fused_layers=True, **ONE)
    indices = torch.arange(64)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(indices)
        optimizer.backward(loss)

    record: Record = recorded(step)
    assert record.largest == 2 * WEIGHT, "the weight cast for a product, and never a gradient"


def test_many_uses_of_one_weight_become_a_gradient() -> None:
    """A recurrent layer: the factors of all steps would be many times the gradient."""
    layer = nn.Linear(256, 256)
    optimizer = Lomo(layer, lr=1e-3, fused_layers=True, **ONE)

    def step() -> None:
        x = torch.ones(64, 256)
        for _ in range(40):
            x = F.relu(layer(x))
        optimizer.backward(x.sum())

    def sgd() -> None:
        x = torch.ones(64, 256)
        for _ in range(40):
            x = F.relu(layer(x))
        x.sum().backward()
        layer.weight.grad = layer.bias.grad = None

    mine = recorded(step)
    optimizer.remove()
    assert mine.peak <= recorded(sgd).peak + 3 * 4 * 256 * 256


@pytest.mark.parametrize("rule", [{}, CLIP, ONE], ids=["plain", "two", "one"])
def test_a_tied_head_with_many_tokens_holds_its_gradient_not_its_factors(rule: Any) -> None:
    """The hook of a tied weight comes last, after all layers; its head's factors would be there all the time."""
    tokens = 3 * ROWS
    model = Stack(tied=True)
    plain = Stack(tied=True)
    optimizer = Lomo(model, lr=1e-3, fused_layers=True, **rule)
    at_the_first_block: list[int] = []

    def watch(net: Stack, step: Callable[[], None]) -> int:
        step()
        handle = net.ups[0][0].register_full_backward_hook(lambda *_: at_the_first_block.append(live.current))
        with LiveBytes() as live:
            step()
        handle.remove()
        return at_the_first_block.pop()

    mine = watch(model, step_of(model, optimizer, tokens))
    theirs = watch(plain, step_of(plain, Lomo(plain, lr=1e-3), tokens))
    kept = 4 * WEIGHT * (2 * LAYERS + 1) if rule is ONE else 0
    assert mine <= theirs + kept + 4 * 4096
