"""Who owns a parameter and a gradient where the model is spread over processes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.engines import LR, fsdp
from support.models import loss_of, same_bits, transformer_of_vectors, weights_of, whole_weights
from support.textbook import Textbook
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo

RULES: dict[str, dict[str, Any]] = {"hook": {}, "two": {"clip_grad_norm": 0.3, "clip_passes": "two"}}
BY_RULE = pytest.mark.parametrize("rule", RULES)


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "cpu": lambda model: model.cpu(),
    "load_state_dict": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
}


def moved_between_steps(rank: int, move: str, rule: str) -> None:
    """As verl does, which moves the model to the CPU and back around each rollout. DTensors are swapped then."""
    model = transformer_of_vectors()
    book = Textbook(model, lr=LR, **RULES[rule])
    fsdp(model)
    optimizer = Lomo(model, lr=LR, **RULES[rule])
    for step in range(3):
        book.step(sum(loss_of(book.model, 2 * step + n) for n in range(2)) / 2)
        optimizer.backward(loss_of(model, 2 * step + rank))
        assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=1e-6)
        assert all(param.grad is None for param in model.parameters())
        MOVES[move](model)
    for name, weight in whole_weights(model).items():
        assert (weight - book.model.get_parameter(name)).abs().max().item() <= 1e-6, name


@BY_RULE
@pytest.mark.parametrize("move", MOVES)
def test_a_model_that_is_moved_between_steps(ranks: Any, move: str, rule: str) -> None:
    ranks(2).call(moved_between_steps, move, rule)


def perceptron(inputs: int, outputs: int) -> nn.Module:
    """With a weight of 101 KiB, of which each of two ranks has less than 64; and with smaller ones."""
    return nn.Sequential(nn.Linear(inputs, 160), nn.Tanh(), nn.Linear(160, 162), nn.Tanh(), nn.Linear(162, outputs))


def two_models_in_turn(rank: int, rule: str, hidden: bool, accumulated: bool) -> None:
    first, second = perceptron(4, 8), perceptron(8, 1)
    books = tuple(Textbook(model, lr=LR, **RULES[rule]) for model in (first, second))
    for model in (first, second):
        fully_shard(model)
    optimizers = tuple(Lomo(model, lr=LR, **RULES[rule]) for model in (first, second))
    generator = torch.Generator().manual_seed(3)

    def through(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=True) if hidden else model(x)

    for _ in range(2):
        x, y = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 6, 8, generator=generator)
        if accumulated:
            second(y[rank]).square().mean().backward()
            bits = [param.grad.to_local().clone() for param in second.parameters()]
        optimizers[0].backward(through(second, first(x[rank])).square().mean())
        if accumulated:
            assert all(map(same_bits, bits, (param.grad.to_local() for param in second.parameters())))
        else:
            assert all(param.grad is None for param in second.parameters())
        (books[1].model(books[0].model(x.flatten(0, 1))).square().mean()).backward()
        books[0].apply()
        for book in books:
            book.zero_grad()
        optimizers[1].backward(second(y[rank]).square().mean())
        loss = books[1].model(y.flatten(0, 1)).square().mean()
        books[1].step(2 * loss if accumulated else loss)
    for model, book in zip((first, second), books, strict=True):
        for name, weight in whole_weights(model).items():
            assert (weight - book.model.get_parameter(name)).abs().max().item() <= 1e-6, name


@BY_RULE
@pytest.mark.parametrize("hidden", [False, True], ids=["visible", "in a reentrant checkpoint"])
@pytest.mark.parametrize("accumulated", [False, True])
def test_two_optimizers_of_two_models(ranks: Any, rule: str, hidden: bool, accumulated: bool) -> None:
    ranks(2).call(two_models_in_turn, rule, hidden, accumulated)


class Adapted(nn.Module):
    def __init__(self, base: Tensor) -> None:
        super().__init__()
        self.base = nn.Parameter(base, requires_grad=False)
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.layer = nn.Linear(4, 2)


def frozen_beside_trained(rank: int, dtype: torch.dtype) -> None:
    """Parameters and buffers start as the first rank's, those that no kernel takes too."""
    torch.manual_seed(rank)
    model = Adapted((torch.randn(5, 3) * 8).to(dtype))
    model.mask[rank] = False
    optimizer = Lomo(model, lr=LR, process_group=dist.group.WORLD)
    torch.manual_seed(0)
    expected = Adapted((torch.randn(5, 3) * 8).to(dtype))
    assert torch.equal(model.base.view(torch.uint8), expected.base.view(torch.uint8))
    assert model.mask.tolist() == [False, True, True]
    book = Textbook(expected, lr=LR)
    x = torch.randn(2, 6, 4)
    optimizer.backward(model.layer(x[rank]).square().mean())
    book.step(book.model.layer(x.flatten(0, 1)).square().mean())
    for name, weight in weights_of(model.layer).items():
        torch.testing.assert_close(weight, book.model.layer.get_parameter(name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64, torch.complex64], ids=str)
def test_frozen_parameters_of_other_dtypes(ranks: Any, dtype: torch.dtype) -> None:
    ranks(2).call(frozen_beside_trained, dtype)


# ---- float16 autocast -----------------------------------------------------------------------------------------------


def warnings_of_float16(rank: int) -> int:
    model = perceptron(4, 1)
    optimizer = Lomo(model, lr=LR, process_group=dist.group.WORLD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with torch.autocast("cpu", torch.float16):
                loss = model(torch.ones(2, 4)).float().square().mean()
            optimizer.backward(loss)
    assert optimizer.loss_scale.item() == 1.0
    return sum("float16" in str(one.message) and "dynamic" in str(one.message) for one in caught)


def test_float16_without_a_loss_scale_is_warned_of(ranks: Any) -> None:
    """One process decides for itself; several would have to agree."""
    assert ranks(2).call(warnings_of_float16) == [1, 1]
