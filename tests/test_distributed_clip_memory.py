"""`clip_memory` over several ranks: all keep every gradient, or none does, also if only some have room for theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from support.models import assert_same_bits, loss_of, transformer, transformer_of_vectors, whole_weights
from test_distributed_sharded import fsdp
from torch import nn

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
    for step in range(3):
        loss = loss_of(model, 10 * rank + step)
        loss.register_hook(lambda _: backwards.append(1))
        optimizer.backward(loss)
        reference.backward(loss_of(twin, 10 * rank + step))
    fits = budget >= max(needs)
    assert len(backwards) == 3 if fits else len(backwards) > 5, "one for each step, or two and the comparison"
    assert_same_bits(whole_weights(model), whole_weights(twin))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("engine", ["fsdp", "group"])
def test_ranks_keep_alike(ranks: Any, engine: str, share: float) -> None:
    ranks(2).call(kept_alike, engine, share)


def other_budgets(rank: int) -> None:
    with pytest.raises(ValueError, match="options on rank 1 and on rank 0 differ"):
        made("group", clip_memory=rank * 1000)


def test_ranks_have_one_budget(ranks: Any) -> None:
    ranks(2).call(other_budgets)
