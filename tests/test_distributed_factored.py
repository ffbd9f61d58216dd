"""Rules with factors over several ranks: what is special to an engine, messages, and what the state does."""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.engines import ENGINES, Engine, equals_one_process, everywhere, fsdp, line, place, square
from support.factored import FEW_RULES, RULES, FactoredTextbook, Kinds, rule_state, tokens
from support.models import (
    Planted,
    assert_close,
    assert_same_bits,
    loss_of,
    same_bits,
    transformer_of_vectors,
    weights_of,
    whole,
    whole_weights,
)
from support.processes import Collectives, lowest_peak
from test_distributed_sharded import FOUR, PLACEMENTS, WAYS, Experts
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lomo_kernels import AdaLomo, Lomo
from lomo_kernels.optim.engines import sums

EVERY_RULE = pytest.mark.parametrize("rule", RULES)


# ---- Data parallel --------------------------------------------------------------------------------------------------


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
    all_have_the_state(optimizer)


def all_have_the_state(optimizer: Lomo) -> None:
    state = rule_state(optimizer)
    for other in everywhere(state):
        assert_same_bits(other, state)


@EVERY_RULE
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_data_parallel(ranks: Any, world: int, rule: str) -> None:
    ranks(world).call(train, rule)


# ---- Shards ---------------------------------------------------------------------------------------------------------


def sharded(rank: int, way: str, rule: str) -> None:
    equals_one_process(WAYS[way], {"rule": rule, "lr": 0.003, "weight_decay": 0.1})


@pytest.mark.parametrize("rule", FEW_RULES)
@pytest.mark.parametrize("way", WAYS)
def test_sharded(ranks: Any, way: str, rule: str) -> None:
    ranks(4 if way in FOUR else 2).call(sharded, way, rule)


def in_two_messages(rank: int, engine: str) -> None:
    """As if the sums were so many that each rank adds up a part of them."""
    with mock.patch.object(sums, "FEW", 0):
        equals_one_process(ENGINES[engine], {"rule": "adalomo", "lr": 0.003})


@pytest.mark.parametrize("engine", ["FSDP2", "tensor parallel"])
def test_many_sums(ranks: Any, engine: str) -> None:
    ranks(4).call(in_two_messages, engine)


def placed(rank: int, how: str, rule: str) -> None:
    """Parameters of one to three dimensions, cut in each: weights and state have the bits of one process, because sums
    of squares of 16-bit gradients are exact in float64."""
    model, alone = Planted(torch.bfloat16), Planted(torch.bfloat16)
    placements = PLACEMENTS[how]
    place(model, line() if len(placements) == 1 else square("a", "b"), placements)
    ours, theirs = (
        Lomo(some, lr=1e-3, rule=rule, rounding="stochastic", seed=3, loss_scale=None) for some in (model, alone)
    )
    for step in range(3):
        ours.backward(model(step))
        theirs.backward(alone(step))
    assert_same_bits(whole_weights(model), weights_of(alone))
    assert_same_bits(rule_state(ours), rule_state(theirs))
    assert not same_bits(alone.layers[4].weight, Planted(torch.bfloat16).layers[4].weight)


PLACEMENTS_OF_TWO = [name for name, placements in PLACEMENTS.items() if len(placements) == 2]


@EVERY_RULE
def test_placements(ranks: Any, rule: str) -> None:
    for how in set(PLACEMENTS) - set(PLACEMENTS_OF_TWO):
        ranks(2).call(placed, how, rule)
    for how in PLACEMENTS_OF_TWO:
        ranks(4).call(placed, how, rule)


def behind_the_first_dimension(rank: int, rule: str) -> None:
    """A block cut in the rows and columns of several matrices, whose matrices do not follow each other in memory."""
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 6)
    grad = torch.randn(5, 4, 6)
    for placements in ([Shard(1), Shard(2)], [Shard(2), Shard(1)], [Shard(0), Shard(2)]):
        mesh = square("a", "b")
        param = nn.Parameter(distribute_tensor(weight, mesh, placements))
        book = FactoredTextbook(nn.ParameterList([nn.Parameter(weight)]), rule, lr=0.1)
        optimizer = Lomo([param], lr=0.1, rule=rule)
        for factor in (1.0, 3.0):
            optimizer.backward((param * distribute_tensor(grad * factor, mesh, placements)).sum().full_tensor())
            book.step((book.model[0] * (grad * factor).double()).sum())
        assert (whole(param) - book.model[0]).abs().max() <= 2e-6
        all_have_the_state(optimizer)


@EVERY_RULE
def test_blocks_behind_the_first_dimension(ranks: Any, rule: str) -> None:
    ranks(4).call(behind_the_first_dimension, rule)


def some_ranks(rank: int, rule: str) -> None:
    """A model on ranks 1 and 2 of four: the others take no part, in nothing."""
    mesh = DeviceMesh("cpu", [1, 2])
    if rank in (1, 2):
        part = Part(mesh)
        equals_one_process(part, {"rule": rule, "lr": 0.003})


class Part(Engine):
    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def spread(self, model: nn.Module) -> nn.Module:
        fsdp(model, self._mesh)
        return model

    def batches(self) -> tuple[int, int]:
        return 2, dist.get_rank() - 1


@EVERY_RULE
def test_some_of_the_ranks(ranks: Any, rule: str) -> None:
    ranks(4).call(some_ranks, rule)


def different_experts(rank: int, rule: str) -> None:
    """Each rank lacks the gradients of two experts."""
    model = Experts()
    book = FactoredTextbook(model, rule, lr=0.003)
    fully_shard(model)
    model.set_reduce_scatter_unused_params(True)
    optimizer = Lomo(model, lr=0.003, rule=rule)
    for step in range(4):
        book.step(sum(book.model((step + n) % 3) for n in range(2)) / 2)
        optimizer.backward(model((step + rank) % 3))
    # FSDP2 gives all ranks a gradient for every expert; that of the one which nobody uses is zero.
    assert_close(whole_weights(model), book.model, atol=2e-6)
    all_have_the_state(optimizer)


@pytest.mark.skipif(not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="needs torch 2.13")
@pytest.mark.parametrize("rule", ["tensor", "rows"])
def test_different_experts(ranks: Any, rule: str) -> None:
    ranks(2).call(different_experts, rule)


def mixed_precision(rank: int, rule: str) -> None:
    """float32 weights, bfloat16 in the forward, gradients reduced in float32: as one process with bfloat16 copies."""
    model = transformer_of_vectors()
    book = FactoredTextbook(model, rule, lr=0.003)
    fsdp(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    optimizer = Lomo(model, lr=0.003, rule=rule)
    single = copy.deepcopy(transformer_of_vectors())
    for step in range(3):
        for batch in range(2):
            low = copy.deepcopy(single).bfloat16()
            loss_of(low, 2 * step + batch).backward()
            for param, copied in zip(book.model.parameters(), low.parameters(), strict=True):
                grad = copied.grad.double() / 2
                param.grad = grad if param.grad is None else param.grad + grad
        book.apply()
        optimizer.backward(loss_of(model, 2 * step + rank))
        # The next forward rounds weights to bfloat16, so a last bit of float32 may become one of bfloat16.
        weights = whole_weights(model)
        assert_close(weights, book.model, atol=2e-6)
        for name, param in single.named_parameters():
            param.data.copy_(weights[name])


@EVERY_RULE
def test_mixed_precision(ranks: Any, rule: str) -> None:
    ranks(2).call(mixed_precision, rule)


# ---- Steps that are skipped -----------------------------------------------------------------------------------------


def a_nan_in_one_shard(rank: int, rule: str) -> None:
    """Only rank 1's part has it. Its parameter and state stay on all ranks; the other parameter is updated."""
    params = [nn.Parameter(distribute_tensor(torch.ones(4, 2), line(), [Shard(0)])) for _ in range(2)]
    grad = torch.arange(1.0, 9.0).view(4, 2)
    first, good = (distribute_tensor(some, line(), [Shard(0)]) for some in (grad, grad.sqrt()))
    grad[3, 1] = math.nan
    bad = distribute_tensor(grad, line(), [Shard(0)])
    optimizer = Lomo(params, lr=0.1, rule=rule, weight_decay=0.1)
    optimizer.backward(((params[0] + params[1]) * first).sum().full_tensor())
    before, state = [whole(param).clone() for param in params], rule_state(optimizer)
    optimizer.backward((params[0] * bad + params[1] * good).sum().full_tensor())
    assert same_bits(whole(params[0]), before[0])
    assert not torch.equal(whole(params[1]), before[1])
    assert whole(params[1]).isfinite().all()
    for name, number in rule_state(optimizer).items():
        assert same_bits(number, state[name]) == name.startswith("0"), name
    assert optimizer.skipped_steps.item() == 1


@EVERY_RULE
def test_a_nan_in_one_shard(ranks: Any, rule: str) -> None:
    ranks(2).call(a_nan_in_one_shard, rule)


# ---- Messages and memory --------------------------------------------------------------------------------------------


def sums_in_order(rank: int) -> None:
    for count in (1, 2, 5, sums.FEW, sums.FEW + 1, 3 * sums.FEW + 2):
        torch.manual_seed(0)
        numbers = torch.randn(dist.get_world_size(), count, dtype=torch.float64)
        total = sums.sum_in_order(numbers[rank].clone(), dist.group.WORLD)
        torch.testing.assert_close(total, numbers.sum(0), rtol=0, atol=1e-14)
        assert all(same_bits(other, total) for other in everywhere(total))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sums_in_order(ranks: Any, world: int) -> None:
    ranks(world).call(sums_in_order)


class Sums:
    """Counts the elements of each sum over ranks, with the ranks of its group."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, list[int]]] = []
        self._sum = sums.sum_in_order

    def __call__(self, numbers: Tensor, group: dist.ProcessGroup) -> Tensor:
        self.sent.append((numbers.numel(), dist.get_process_group_ranks(group)))
        return self._sum(numbers, group)


def messages(rank: int, way: str, rule: str) -> None:
    """One sum brings those of eight parameters, of rows and columns and one more; AdaLomo's second one the sizes. They
    go to the ranks with other parts, and to no copies."""
    engine: Engine = (ENGINES | WAYS)[way]
    spread = engine.spread(engine.make())
    optimizer = engine.lomo(spread, lr=0.003, rule=rule)
    _, mine = engine.batches()
    loss = loss_of(spread, mine)
    with mock.patch("lomo_kernels.optim.engines.base.sum_in_order", Sums()) as seen:
        optimizer.backward(loss)
    groups = {
        "FSDP2": [0, 1],
        "tensor parallel": [0, 1],
        "hsdp": [2 * (rank // 2), 2 * (rank // 2) + 1],
    }
    params = list(spread.parameters())
    cut = [param for param in params if isinstance(param, DTensor) and not param.placements[-1].is_replicate()]
    numbers = sum(matrices * (rows + columns) + 1 for matrices, rows, columns in map(as_matrices, cut))
    assert {tuple(ranks) for _, ranks in seen.sent} == {tuple(groups[way])}
    assert sum(elements for elements, _ in seen.sent) == numbers + (len(cut) if rule == "adalomo" else 0)
    # Whole gradients count among the eight.
    assert len(seen.sent) <= -(-len(params) // 8) * (2 if rule == "adalomo" else 1)


def as_matrices(param: Tensor) -> tuple[int, int, int]:
    shape = [1] * (2 - param.dim()) + list(param.shape)
    return math.prod(shape[:-2]), shape[-2], shape[-1]


@EVERY_RULE
@pytest.mark.parametrize(("way", "world"), [("FSDP2", 2), ("tensor parallel", 2), ("hsdp", 4)])
def test_messages(ranks: Any, way: str, world: int, rule: str) -> None:
    ranks(world).call(messages, way, rule)


def traffic(rank: int, few: int) -> dict[str, list[int]]:
    """What a step sends beside what FSDP2 alone sends in as many backwards, and the sum of squares."""
    model = nn.Sequential(
        *(nn.Linear(40, 30, bias=False) if n % 2 else nn.Linear(30, 40, bias=False) for n in range(8))
    )
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    x = torch.randn(3, 30)
    optimizer = Lomo(model, lr=1e-3, rule="adalomo")
    optimizer.backward(model(x).square().sum())
    loss = model(x).square().sum()
    with Collectives() as alone:
        loss.backward()
    model.zero_grad()
    loss = model(x).square().sum()
    with mock.patch.object(sums, "FEW", few), Collectives() as seen:
        optimizer.backward(loss)
    for kind, sizes in alone.sent.items():
        for size in sizes:
            seen.sent[kind].remove(size)
    return {kind: sizes for kind, sizes in seen.sent.items() if sizes}


def test_traffic(ranks: Any) -> None:
    """Eight matrices: 70 row and column sums each and one of the weight, then eight sizes, then the norm."""
    sent = [ranks(2).call(traffic, few)[0] for few in (1024, 8)]
    assert sent[0] == {"_allgather_base_": [2 * 8 * 71, 2 * 8], "allreduce_": [1]}, "received from both ranks"
    assert sent[1] == {"alltoall_base_": [8 * 71], "_allgather_base_": [8 * 71, 2 * 8], "allreduce_": [1]}


def peak_above_weights(rank: int, count: int) -> int:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(count)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = AdaLomo(model, lr=1e-3)
    x = torch.randn(4, 256)

    def step() -> None:
        optimizer.backward(model(x).square().sum())

    step()
    return lowest_peak(step)


def test_gradients_do_not_pile_up(ranks: Any) -> None:
    """Eight wait for each other, and no more: the peak grows by a block's activations."""
    few, many = (ranks(2).call(peak_above_weights, count)[0] for count in (8, 16))
    assert (many - few) / 8 < 16 * 1024


# ---- Parts that are no blocks ---------------------------------------------------------------------------------------


def rows_that_do_not_follow(rank: int) -> None:
    local = torch.ones(4, 2)
    param = nn.Parameter(DTensor.from_local(local, line(), [_StridedShard(0, split_factor=2)]))
    with pytest.raises(NotImplementedError, match=r"rows that do not follow each other.*Redistribute it"):
        Lomo([param], rule="rows")
    Lomo([param]).remove()


def test_rows_that_do_not_follow_each_other(ranks: Any) -> None:
    ranks(2).call(rows_that_do_not_follow)
