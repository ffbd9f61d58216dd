"""Copies and pickles of the optimizer: with its model they go on as it would have; alone they are refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import Options, assert_same_bits, loss_of, transformer, vector, weights_of
from torch import Tensor, nn

from lomo_kernels import Lomo
from lomo_kernels.layers import FusedLayer


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_a_file,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two": {"clip_grad_norm": 0.3, "clip_grad_value": 0.5, "clip_passes": "two"},
    "one": {"clip_grad_norm": 0.3, "clip_passes": "one", "nonfinite": "raise"},
    "fused": {"clip_grad_norm": 0.3, "clip_passes": "one", "fused_layers": True},
    "tensor": {"lr": torch.tensor(0.3, dtype=torch.float64), "weight_decay": torch.tensor(0.5)},
    "scaled": {"loss_scale": 8.0},
}


def train(model: nn.Module, optimizer: Lomo, steps: range) -> None:
    for step in steps:
        group = optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(0.3 / (1 + step))
        else:
            group["lr"] = 0.3 / (1 + step)
        optimizer.backward(loss_of(model, step))


def numbers(optimizer: Lomo) -> tuple[Any, ...]:
    state = optimizer.state_dict()
    parts = [*state["param_groups"], state["lomo"]]
    parts = [{key: v.item() if isinstance(v, Tensor) else v for key, v in part.items()} for part in parts]
    return *parts, optimizer.last_grad_norm.item(), [norm.item() for norm in optimizer.grad_norms().values()]


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_copy_with_its_model_goes_on_alone(options: str, way: str) -> None:
    """Copied twice over: a copy's copy trains as the original does, and none of them moves another."""
    settings = {"lr": 0.3, "rounding": "stochastic", "seed": 5, "weight_decay": 0.01} | OPTIONS[options]
    model = transformer(Options(dtype=torch.float16))
    optimizer = Lomo(model, **settings)
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["initial_lr"] = 0.7  # a scheduler's
    first, first_optimizer = COPIES[way]((model, optimizer))
    assert numbers(first_optimizer) == numbers(optimizer)
    kinds = [isinstance(module, FusedLayer) for module in model.modules()]
    assert any(kinds) == (options == "fused")
    assert [isinstance(module, FusedLayer) for module in first.modules()] == kinds

    weights, state = weights_of(model), numbers(optimizer)
    train(first, first_optimizer, range(2, 4))
    assert_same_bits(weights_of(model), weights)
    assert numbers(optimizer) == state, "the copy has numbers of its own"
    second, second_optimizer = COPIES[way]((first, first_optimizer))
    train(first, first_optimizer, range(4, 5))
    train(second, second_optimizer, range(4, 5))
    train(model, optimizer, range(2, 5))
    for other, its in ((first, first_optimizer), (second, second_optimizer)):
        assert_same_bits(weights_of(other), weights_of(model))
        assert numbers(its) == numbers(optimizer)
        assert all(param.grad is None for param in other.parameters())


@pytest.mark.parametrize("way", COPIES)
def test_groups_names_and_frozen_parameters_are_copied(way: str) -> None:
    model = transformer(Options(frozen=("positions",)))
    pairs = list(model.named_parameters())
    groups = [{"params": pairs[:3], "lr": 0.5, "tag": "first"}, {"params": pairs[3:], "clip_grad_value": 0.25}]
    optimizer = Lomo(groups, lr=0.125, weight_decay=0.5)
    copied, its = COPIES[way]((model, optimizer))
    assert its.state_dict()["lomo"]["parameters"] == optimizer.state_dict()["lomo"]["parameters"]
    assert its.defaults == optimizer.defaults
    for ours, theirs in zip(its.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    own = {id(param) for param in copied.parameters()}
    assert all(id(param) in own for group in its.param_groups for param in group["params"])
    copied.positions.requires_grad_(True)  # gets its hook with the next step
    before = weights_of(copied)
    its.backward(loss_of(copied, 0))
    assert all(not torch.equal(value, before[name]) for name, value in weights_of(copied).items())


def test_a_deep_copy_keeps_sharing_what_was_shared() -> None:
    """A learning rate that two groups have in common; and parameters in a list, without a model."""
    lr = torch.tensor(0.5)
    params = [vector(1.0), vector(2.0)]
    optimizer = Lomo([{"params": [param], "lr": lr} for param in params])
    other_params, other, other_lr = copy.deepcopy((params, optimizer, lr))
    other_lr.fill_(0.25)
    other.backward((other_params[0] + other_params[1]).sum())
    optimizer.backward((params[0] + params[1]).sum())
    assert [param.item() for param in other_params] == [0.75, 1.75]
    assert [param.item() for param in params] == [0.5, 1.5]


class Trainer:
    def __init__(self) -> None:
        self.model = transformer()
        self.optimizer = Lomo(self.model, lr=0.3)


class Clipped(Lomo):
    """A subclass whose constructor takes other arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, lr=0.3, clip_grad_norm=0.5)


@pytest.mark.parametrize("way", COPIES)
def test_objects_that_hold_both_are_copied(way: str) -> None:
    trainer = Trainer()
    other = COPIES[way](trainer)
    model = transformer()
    pair = COPIES[way]((model, Clipped(model)))
    assert type(pair[1]) is Clipped
    for some, optimizer in ((other.model, other.optimizer), pair):
        before = weights_of(some)
        optimizer.backward(loss_of(some, 0))
        assert all(not torch.equal(value, before[name]) for name, value in weights_of(some).items())


def test_the_order_is_named_when_the_optimizer_comes_first() -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.3)
    with pytest.raises(TypeError, match=r"positions was not copied .* the model first"):
        copy.deepcopy((optimizer, model))
    fused = transformer()
    params = list(fused.parameters())
    with pytest.raises(TypeError, match=r"the model was not copied"):
        copy.deepcopy((params, Lomo(params, fused_layers=fused)))


@pytest.mark.parametrize("copy_it", [copy.deepcopy, lambda pair: pickle.dumps(pair)], ids=["deepcopy", "pickle"])
def test_an_optimizer_that_was_removed_is_not_copied(copy_it: Callable[[Any], Any]) -> None:
    model = transformer()
    optimizer = Lomo(model)
    optimizer.remove()
    with pytest.raises(RuntimeError, match=r"remove\(\) was called"):
        copy_it((model, optimizer))


def test_a_model_of_another_dtype_since_is_copied() -> None:
    """The copy finds out at once that it has to scale, as the original does at its next step."""
    model = transformer()
    optimizer = Lomo(model, lr=0.3)
    optimizer.backward(loss_of(model, 0))
    model.half()
    other, its = copy.deepcopy((model, optimizer))
    for some, of in ((model, optimizer), (other, its)):
        of.backward(loss_of(some, 1))
    assert_same_bits(weights_of(other), weights_of(model))
    assert numbers(its) == numbers(optimizer)
