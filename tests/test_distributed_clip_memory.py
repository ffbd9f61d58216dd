"""`clip_memory` over several ranks: all keep every gradient, or none does, also if only some have room for theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from models import assert_same_bits, loss_of, transformer, transformer_of_vectors, whole_weights
from test_distributed_sharded import fsdp
from test_lomo_loss import Model, batch, ran
from torch import Tensor, nn

from lomo_kernels import Lomo


def made(engine: str, **options: Any) -> tuple[nn.Module, Lomo]:
    if engine == "fsdp":
        model = transformer_of_vectors()
        fsdp(model)
    else:
        model = transformer()
        options["process_group"] = dist.group.WORLD
    return model, Lomo(model, lr=0.1, clip_grad_norm=0.3, **options)


def kept_alike(rank: int, engine: str, share: float) -> None:
    _, whole = made(engine)
    # Rank 0 has the larger shards. Between both ranks' needs, only rank 1 has room for its gradients.
    needs = [0, 0]
    dist.all_gather_object(needs, sum(managed.bytes for managed in whole._training.managed_params))
    budget = min(needs) + share * (max(needs) - min(needs)) + (share - 0.5)
    model, optimizer = made(engine, clip_memory=budget)
    twin, reference = made(engine, clip_memory=0)
    backwards: list[int] = []

    def count(_: nn.Module, __: Any, output: Tensor) -> None:  # not at the loss, which may run once
        output.register_hook(lambda _: backwards.append(1))

    model.blocks[0].register_forward_hook(count)
    for step in range(3):
        optimizer.backward(loss_of(model, 10 * rank + step))
        reference.backward(loss_of(twin, 10 * rank + step))
    fits = budget >= max(needs)
    assert len(backwards) == 3 if fits else len(backwards) > 5, "one for each step, or two and the comparison"
    assert_same_bits(whole_weights(model), whole_weights(twin))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("engine", ["fsdp", "group"])
def test_ranks_keep_alike(ranks: Any, engine: str, share: float) -> None:
    ranks(2).call(kept_alike, engine, share)


def overwriting(rank: int) -> None:
    results = []
    for budget in (0, None):
        model = Model()
        optimizer = Lomo(model, lr=0.1, clip_grad_norm=0.3, clip_memory=budget, process_group=dist.group.WORLD)
        for step in range(3):
            ran.clear()
            optimizer.backward(model(*batch(10 * rank + step)))
            assert ran == ["in place"]
        results.append(whole_weights(model))
    assert_same_bits(*results)


def test_a_loss_that_overwrites_what_it_saved_runs_once(ranks: Any) -> None:
    ranks(2).call(overwriting)


def other_budgets(rank: int) -> None:
    with pytest.raises(ValueError, match="options on rank 1 and on rank 0 differ"):
        made("group", clip_memory=rank * 1000)


def test_ranks_have_one_budget(ranks: Any) -> None:
    ranks(2).call(other_budgets)
