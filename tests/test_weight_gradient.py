"""The norm and the update of a weight that several kinds of layers share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lomo_kernels import reference
from lomo_kernels.composite import gram, tiled
from lomo_kernels.layers import Factors
from lomo_kernels.ops.scalars import vector
from lomo_kernels.optim.weight_gradient import WeightGradient

VOCAB, WIDTH = 700, 130


def pairs(dtype: torch.dtype, tokens: int, seed: int = 0, embeddings: int = 2) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    head = Factors(randn(tokens, WIDTH), randn(tokens, VOCAB), None)
    tables = []
    for padding in (-1, 3)[:embeddings]:
        index = torch.randint(12, (2, tokens), generator=generator)  # many of them more than once
        tables.append(Factors(index, randn(2, tokens, WIDTH), padding))
    return [head, *tables]


def gradient(parts: list[Factors]) -> Tensor:
    (head, *tables) = parts
    return reference.linear_gradient([head.input], [head.grad_output]).double() + reference.embedding_gradient(
        VOCAB, [t.input for t in tables], [t.grad_output for t in tables], [t.padding_idx for t in tables]
    )


def norm_of(parts: list[Factors], inv_scale: float | None = None) -> float:
    slot = torch.zeros(1, dtype=torch.float64)
    scale = None if inv_scale is None else torch.tensor(inv_scale, dtype=torch.float64)
    WeightGradient(parts, None).sq_norm_(slot, torch.empty(VOCAB, WIDTH), scale)
    return slot.item()


@pytest.fixture
def no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("formed tiles")

    monkeypatch.setattr(WeightGradient, "tiles", refuse)


@pytest.mark.usefixtures("no_tiles")
@pytest.mark.parametrize("inv_scale", [None, 2.0**-10])
@pytest.mark.parametrize("tokens", [1, 7, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tied_head_is_normed_without_tiles(
    dtype: torch.dtype, tokens: int, inv_scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "_TOKENS", 16)  # several rounds of each loop
    parts = pairs(dtype, tokens)
    exact = (gradient(parts).square().sum() * (inv_scale or 1.0) ** 2).item()
    assert norm_of(parts, inv_scale) == pytest.approx(exact, rel=1e-6)


def test_where_the_parts_cancel_tiles_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding's rows undo the head's gradient, but for a hundredth."""
    used: list[bool] = []
    tiles = WeightGradient.tiles
    monkeypatch.setattr(WeightGradient, "tiles", lambda self, weight: used.append(True) or tiles(self, weight))
    head, _, _ = pairs(torch.float32, 40)
    few = torch.zeros(40, VOCAB)
    few[:, :12] = head.grad_output[:, :12]
    head = head._replace(grad_output=few)
    full = reference.linear_gradient([head.input], [few])
    table = Factors(torch.arange(VOCAB), -full * (1 - 1e-2), -1)
    exact = gradient([head, table]).square().sum().item()
    assert norm_of([head, table]) == pytest.approx(exact, rel=1e-4)  # float32 leaves five digits of the difference
    assert used
    estimate = gram.tied([head.input], [head.grad_output], [table.input], [table.grad_output], [-1])
    assert estimate is not None and not estimate.add_to(torch.zeros(1), None, VOCAB * WIDTH)


@pytest.mark.usefixtures("no_tiles")
def test_correlated_tokens() -> None:
    parts = pairs(torch.float32, 60, embeddings=1)
    noise = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(5))
    parts[0] = parts[0]._replace(input=1 + 0.01 * noise)
    assert norm_of(parts) == pytest.approx(gradient(parts).square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_shows(bad: float, where: int) -> None:
    parts = pairs(torch.float32, 20)
    parts[where].grad_output.view(-1)[5] = bad
    slot = norm_of(parts)
    assert slot != slot or slot == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beside", [False, True], ids=["layers", "layers and a gradient"])
def test_the_update_is_that_of_the_sum(dtype: torch.dtype, beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE_BYTES", 4 * 100 * WIDTH)  # several tiles
    parts = pairs(dtype, 30)
    grad = torch.randn(VOCAB, WIDTH).to(dtype) if beside else None
    total = gradient(parts) + (0 if grad is None else grad.double())
    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = weight.clone()
    slot = torch.zeros(1, dtype=torch.float64)
    numbers = {"lr": 0.1, "weight_decay": 0.2, "inv_scale": 0.5, "clip_value": 3.0, "step": 4}
    WeightGradient(parts, grad).update_(weight, vector("test", weight.device, numbers), slot, 0, True, 7, 3, [])
    options = {"lr": 0.1, "weight_decay": 0.2, "inv_scale": 0.5, "clip_value": 3.0, "stochastic": True}
    expected = reference.updated(before, total.float(), **options, seed=7, parameter_id=3, step=4)
    if dtype is torch.bfloat16:
        assert (weight != expected).double().mean().item() < 0.001
    torch.testing.assert_close(weight, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
    assert slot.item() == pytest.approx(total.square().sum().item() / 4, rel=1e-6)
