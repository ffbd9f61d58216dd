"""Bytes that a step with fused layers takes with the rules "tensor", "rows" and "adalomo", beside a step without."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support.factored import RULES
from test_lomo_fused_memory import CLIP, ONE, ROWS, TILE, WEIGHT, WIDTH, Stack, allocated, small_tiles, step_of
from torch import nn

from lomo_kernels import Lomo
from lomo_kernels.plan.methods import Method, lomo
from lomo_kernels.plan.simulate import simulate

__all__ = ["small_tiles"]  # a fixture: weights are of some three tiles here, too

#: Tokens whose factors are nearly as large as the gradient.
MANY = 200


def peak(rule: str, fused: bool, tokens: int, *, dtype: torch.dtype, **options: Any) -> int:
    shape = {name: options.pop(name) for name in ("tied", "kind", "rows", "width") if name in options}
    model = Stack(**shape).to(dtype)
    with Lomo(model, lr=1e-3, rule=rule, fused_layers=fused, **options) as optimizer:
        gc.collect()
        return allocated(step_of(model, optimizer, tokens)).peak


@pytest.mark.parametrize(
    ("tied", "kind", "dtype"),
    [
        (False, "none", torch.float32),
        (False, "non-reentrant", torch.bfloat16),
        (True, "none", torch.bfloat16),
        (True, "reentrant", torch.float32),
    ],
)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:Lomo. reentrant")
def test_the_peak_is_never_above_that_of_the_hooks(dtype: torch.dtype, rule: str, tied: bool, kind: str) -> None:
    # With weights of a tile and a quarter the activations of a bfloat16 block, computed again, would decide.
    more = 2 if kind == "non-reentrant" else 1
    model: dict[str, Any] = {"dtype": dtype, "tied": tied, "kind": kind, "rows": more * ROWS, "width": more * WIDTH}
    size = more**2 * WEIGHT * dtype.itemsize
    hooks, fused = (peak(rule, way, 16, **model) for way in (False, True))
    assert fused <= hooks + 4096, "indices, and numbers"
    if tied:  # in the hooks a gradient of the head waits for that of the embedding
        assert fused < hooks - 0.9 * size
    elif rule == "rows":
        assert fused < hooks - (size - TILE) + 0.2 * size
    if kind == "none":
        assert peak(rule, True, MANY, **model) <= peak(rule, False, MANY, **model) + 4096


@pytest.mark.parametrize("rule", RULES)
def test_clipping_keeps_factors_and_forms_one_gradient_at_a_time(rule: str) -> None:
    model = {"dtype": torch.float32}
    assert peak(rule, True, 16, **model, **CLIP) <= peak(rule, False, 16, **model, **CLIP) + 4096
    assert peak(rule, True, 16, **model, **ONE) < 1.3 * 4 * WEIGHT


@pytest.mark.parametrize("rule", RULES)
def test_no_tensor_of_an_embeddings_size_is_made(rule: str) -> None:
    layer = nn.Embedding(4000, 256).bfloat16()
    with Lomo(layer, rule=rule, fused_layers=True) as optimizer:
        record = allocated(lambda: optimizer.backward(layer(torch.arange(64) % 50).float().sum()))
    assert record.peak < 0.2 * layer.weight.nbytes


@pytest.mark.parametrize("rule", RULES)
def test_many_tokens_take_no_more_than_the_gradient(rule: str) -> None:
    def peak_of(fused: bool, tokens: int) -> int:
        layer = nn.Embedding(512, 256).bfloat16()
        with Lomo(layer, rule=rule, fused_layers=fused) as optimizer:
            return allocated(lambda: optimizer.backward(layer(torch.arange(tokens) % 512).square().sum())).peak

    for tokens in (120, 140, 2000):
        assert peak_of(True, tokens) <= peak_of(False, tokens) + 32 * tokens + 4096, tokens  # indices


def test_a_plan_counts_what_is_formed() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(256, 256), nn.Linear(256, 16384, bias=False))

    def planned(**options: Any) -> int:
        loss = lambda model: model(torch.zeros(8, dtype=torch.int64)).sum()  # noqa: E731
        return simulate(build, loss, Method(lomo(**options)), kernels="cpu").peak

    size, others = 4 * 16384 * 256, 4 * 16640 * 256
    hooks, fused = planned(rule="adalomo"), planned(rule="adalomo", fused_layers=True)
    rows = planned(rule="rows", fused_layers=True)
    assert size < fused - others <= hooks - others < 1.2 * size
    assert rows - others < 0.4 * size, "tiles"
