"""Rules with factors over several ranks: data parallel equals one process; engines that cut gradients are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.engines import fsdp
from support.factored import RULES, FactoredTextbook, Kinds, tokens
from support.models import assert_close, same_bits, transformer_of_vectors

from lomo_kernels import Lomo


def train(rank: int, rule: str) -> None:
    model = Kinds()
    book = FactoredTextbook(model, rule, lr=0.003)
    optimizer = Lomo(model, lr=0.003, rule=rule, process_group=dist.group.WORLD)
    world = dist.get_world_size()
    for step in range(5):
        book.step(sum(book.model(tokens(world * step + n)) for n in range(world)) / world)
        optimizer.backward(model(tokens(world * step + rank)))
    weights = {name: param.detach() for name, param in model.named_parameters() if not name.startswith("unused")}
    assert_close(weights, book.model, atol=2e-6)
    for param in model.parameters():
        for number in optimizer.state[param].values():
            if isinstance(number, torch.Tensor):
                first = number.clone()
                dist.broadcast(first, 0)
                assert same_bits(first, number), "ranks drift apart"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("world", [2, 4])
def test_data_parallel(ranks: Any, world: int, rule: str) -> None:
    ranks(world).call(train, rule)


def sharded(rank: int) -> None:
    model = transformer_of_vectors()
    fsdp(model)
    with pytest.raises(NotImplementedError, match="each rank has a part of it"):
        Lomo(model, rule="adalomo")


def test_sharded_gradients_are_refused(ranks: Any) -> None:
    ranks(2).call(sharded)
