"""`process_group`: gradients averaged inside the hooks, in real processes over gloo, against SGD on one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.engines import CLIPPED, LR, DataParallel, equals_one_process
from support.models import (
    Options,
    assert_close,
    assert_same_bits,
    loss_of,
    same_bits,
    transformer,
    weights_of,
    whole_weights,
)
from support.processes import lowest_peak
from support.textbook import Textbook
from test_lomo_loss import Model, ran
from test_lomo_loss import batch as batch_of_model
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate

from lomo_kernels import Lomo
from lomo_kernels.optim.engines import data_parallel, in_flight

LARGE = DataParallel.options


def train(rank: int, options: Options, members: list[int] | None = None) -> None:
    group = dist.group.WORLD if members is None else dist.new_group(members)
    engine = DataParallel(group)
    model = engine.make(options)
    if members is not None and rank not in members:
        with pytest.raises(TypeError, match="that this process belongs to"):
            engine.lomo(model, lr=LR)
        return
    equals_one_process(engine, CLIPPED, model)


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(tied=True),
        Options(frozen=("embedding", "blocks.0")),
        Options(checkpoint="reentrant"),
        Options(checkpoint="non-reentrant", tied=True),
    ],
    ids=str,
)
def test_models(ranks: Any, options: Options) -> None:
    ranks(2).call(train, options)


def test_a_part_of_the_ranks(ranks: Any) -> None:
    ranks(4).call(train, Options(), [0, 1, 3])  # the kernels divide by three


# ---- Order and absence ----------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Layers of one shape, used in an order, and left out, as the batch says: what ranks cannot know of each other."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(144, 144, bias=index % 2 == 0) for index in range(6))
        self.reentrant = reentrant

    def one(self, index: int, x: Tensor) -> Tensor:
        return x + self.layers[index](x).tanh()

    def forward(self, route: tuple[int, ...]) -> Tensor:
        x = torch.linspace(-1, 1, 2 * 144).view(2, 144).requires_grad_(self.reentrant)
        for index in route:
            if self.reentrant:
                x = torch.utils.checkpoint.checkpoint(self.one, index, x, use_reentrant=True)
            else:
                x = self.one(index, x)
        return x.square().mean()


ROUTES = [
    ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0)),
    ((0, 1, 2), (2, 1, 0)),
    ((0, 1, 2, 3, 4, 5), (3,)),
    ((1,), (1,)),
    ((2, 2, 5), (0, 4, 1)),
    ((5, 3, 1), (1, 3, 5)),
]


def routed(rank: int, clip: float | None, reentrant: bool) -> None:
    model = Routed(reentrant)
    book = Textbook(model, lr=LR, clip_grad_norm=clip)
    optimizer = Lomo(model, lr=LR, clip_grad_norm=clip, process_group=dist.group.WORLD, clip_passes="two")
    for routes in ROUTES:
        if reentrant and (2, 2, 5) in routes:  # a layer in two such checkpoints, which is refused
            continue
        book.step(sum(book.model(route) for route in routes) / 2)
        optimizer.backward(model(routes[rank]))
        assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=1e-6)
    assert_close(weights_of(model), book.model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_graphs_that_differ_between_ranks(ranks: Any, clip: float | None, reentrant: bool) -> None:
    ranks(2).call(routed, clip, reentrant)


def shared_memory(rank: int) -> None:
    """Autograd gives `bias` a view of the gradient that `x` gets too: the reduction must not work in it."""
    x, bias = nn.Parameter(torch.ones(160, 160)), nn.Parameter(torch.ones(160 * 160))
    weight = torch.linspace(1, 2, 160 * 160).view(160, 160) * (rank + 1)
    optimizer = Lomo([x, bias], lr=1.0, process_group=dist.group.WORLD)  # the last one is reduced first
    optimizer.backward(((x * 2 + bias.view(160, 160)) * weight).sum())
    mean = torch.linspace(1, 2, 160 * 160).view(160, 160) * 1.5
    assert torch.allclose(bias.view(160, 160), 1 - mean) and torch.allclose(x, 1 - 2 * mean)


def test_a_gradient_that_shares_its_memory(ranks: Any) -> None:
    ranks(2).call(shared_memory)


def layouts(rank: int) -> None:
    """Parameters that are not contiguous, of no elements, of one, and of two dtypes; buffers of rank 0."""
    model = nn.Module()
    model.turned = nn.Parameter((torch.arange(200.0 * 300).view(200, 300) + rank).t())
    model.little = nn.Parameter((torch.arange(6.0).view(2, 3) + rank).t())
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.number = nn.Parameter(torch.tensor(1.0 + rank))
    model.low = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    model.register_buffer("count", torch.tensor([rank]))
    optimizer = Lomo(model, lr=1.0, process_group=dist.group.WORLD)
    assert model.count.item() == 0
    grads = [torch.randn(param.shape) for param in model.parameters()]
    loss = sum((param.float() * grad).sum() for param, grad in zip(model.parameters(), grads, strict=True))
    optimizer.backward(loss * (1 + 2 * rank))
    started = (
        torch.arange(200.0 * 300).view(200, 300).t(),
        torch.arange(6.0).view(2, 3).t(),
        torch.zeros(0, 3),
        torch.tensor(1.0),
    )
    for param, before, grad in zip(model.parameters(), started, grads, strict=False):
        torch.testing.assert_close(param.detach(), before - 2 * grad)
    torch.testing.assert_close(model.low.float(), 1 - 2 * grads[-1], rtol=1e-2, atol=1e-2)


def test_layouts(ranks: Any) -> None:
    ranks(2).call(layouts)


# ---- Steps ----------------------------------------------------------------------------------------------------------


def parameters_that_come_later(rank: int) -> None:
    torch.manual_seed(rank)
    first, frozen, later = (nn.Parameter(torch.randn(3)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = Lomo([first, frozen], lr=1.0, process_group=dist.group.WORLD)
    optimizer.backward((first * (rank + 1.0)).sum())
    optimizer.add_param_group({"params": [later]})
    frozen.requires_grad_(True)
    optimizer.backward(((later + first * 3 + frozen * 2) * (rank + 1.0)).sum())
    torch.manual_seed(0)
    for param, taken in ((first, 1.5 + 4.5), (frozen, 3.0), (later, 1.5)):
        assert torch.allclose(param, torch.randn(3) - taken)


def test_parameters_that_come_later(ranks: Any) -> None:
    ranks(2).call(parameters_that_come_later)


def freezing(rank: int) -> None:
    """Between backward and step: the gradient is applied, as on one process. Before backward: none comes."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lomo([first, second], lr=1.0, process_group=dist.group.WORLD)
    (first + 3 * second).sum().mul(rank + 1.0).backward()
    first.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"optimizer\.backward"):
        optimizer.step()
    assert torch.equal(first, torch.full((2,), -0.5)) and torch.equal(second, torch.full((2,), -3.5))
    optimizer.zero_grad()
    first.requires_grad_(True)
    loss = (first + second).sum()
    first.requires_grad_(False)
    optimizer.backward(loss)
    assert torch.equal(first, torch.full((2,), -0.5)) and torch.equal(second, torch.full((2,), -4.5))


def test_freezing(ranks: Any) -> None:
    ranks(2).call(freezing)


# ---- Traffic and memory ---------------------------------------------------------------------------------------------


def traffic(rank: int) -> list[int]:
    """Elements of each reduction of a step with three large gradients and forty small ones of 60 kB."""
    params = [nn.Parameter(torch.ones(n)) for n in [20_000, 30_000, 40_000] + [15_000] * 40]
    optimizer = Lomo(params, lr=1.0, process_group=dist.group.WORLD)
    sent: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        optimizer.backward(sum(param.sum() for param in params))
    finally:
        dist.all_reduce = real
    return sent


def test_small_gradients_travel_together(ranks: Any) -> None:
    together = math.ceil(in_flight.BUCKET_BYTES / 60_000)
    for sent in ranks(2).call(traffic):
        expected = [20_000, 30_000, 40_000, *[15_000 * n for n in (together, together, 40 - 2 * together)]]
        assert sorted(sent) == sorted(expected)


def peak(rank: int, count: int) -> int:
    """Above weights and activations that a step of `count` layers has, each of 16 MiB."""
    params = [nn.Parameter(torch.ones(4 * 1024 * 1024)) for _ in range(count)]
    optimizer = Lomo(params, lr=1e-3, process_group=dist.group.WORLD)
    x = torch.ones(1, requires_grad=True)

    def step() -> None:
        y = x
        for param in params:
            y = y + param.dot(param.detach())
        optimizer.backward(y.sum())

    step()  # has no order yet
    return lowest_peak(step) // 2**20


def test_gradients_in_flight_are_bounded(ranks: Any) -> None:
    few, many = (ranks(2).call(peak, count)[0] for count in (5, 12))
    assert many == few <= 32 + 3 * 16


# ---- What is refused ------------------------------------------------------------------------------------------------


def wrapped(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(transformer())
    with pytest.raises(RuntimeError, match=r"Pass the plain module, and process_group=torch\.distributed"):
        Lomo(model, lr=LR, process_group=dist.group.WORLD)
    Lomo(model.module, lr=LR, process_group=dist.group.WORLD).backward(loss_of(model.module, rank))
    with pytest.raises(RuntimeError, match=r"holds a DDPLinear.*Pass the plain module"):
        Lomo(nn.Sequential(replicate(nn.Linear(3, 3))), lr=LR)


def sparse(rank: int) -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = Lomo(model, lr=LR, process_group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.backward(model(torch.tensor([1])).sum())
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"), pytest.warns(UserWarning, match=r"optimizer\.backward"):
        optimizer.step()
    assert not optimizer._training.engine._agreed  # no order came of it: other ranks may still ask for one


def differing(rank: int) -> None:
    with pytest.raises(ValueError, match="parameters on rank 1 and on rank 0 differ"):
        Lomo(transformer(Options(width=16 + rank)), lr=LR, process_group=dist.group.WORLD)
    for groups in (
        {"lr": LR + rank},
        {"lr": torch.tensor(LR + rank)},
        {"lr": LR, "clip_grad_value": 1.0 if rank else None},
    ):
        with pytest.raises(ValueError, match="hyperparameters on rank 1 and on rank 0 differ"):
            Lomo(transformer(), process_group=dist.group.WORLD, **groups)
    optimizer = Lomo(transformer(), lr=LR, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="hyperparameters on rank 1 and on rank 0 differ"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.1 * rank})
    with pytest.raises(ValueError, match="options on rank 1 and on rank 0 differ"):
        Lomo(transformer(), lr=LR, clip_grad_norm=None if rank else 1.0, process_group=dist.group.WORLD)


def devices(rank: int) -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
    with pytest.raises(ValueError, match="one device, these are on cpu, meta"):
        data_parallel.DataParallel(
            dist.group.WORLD, [type("ManagedParameter", (), {"param": param, "supported": True}) for param in params]
        )


def grad_scaler(rank: int) -> None:
    """Only rank 1 sees an infinity. Left to itself, the scaler would let rank 0 step alone."""
    model = transformer()
    optimizer = Lomo(model, lr=LR, process_group=dist.group.WORLD)
    before = weights_of(model)
    for unscale in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        scaler.scale(loss_of(model, rank) * (math.inf if rank == 1 else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match=r'GradScaler decides on every rank alone.*loss_scale="dynamic"'):
            scaler.step(optimizer)
        optimizer.zero_grad()
    assert_same_bits(weights_of(model), before)
    loss_of(model, rank).backward()
    with pytest.warns(UserWarning, match=r"optimizer\.backward"):
        optimizer.step()


@pytest.mark.parametrize("check", [wrapped, sparse, differing, devices, grad_scaler], ids=lambda check: check.__name__)
def test_refused(ranks: Any, check: Callable[[int], None]) -> None:
    ranks(2).call(check)


def test_nothing_changes_for_one_process(ranks: Any) -> None:
    ranks(2).call(alone)


def alone(rank: int) -> None:
    """A group of one rank, and no group, are the same."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    a, b = transformer(), transformer()
    ours = Lomo(a, lr=LR, clip_grad_norm=0.3, process_group=groups[rank], clip_passes="two")
    theirs = Lomo(b, lr=LR, clip_grad_norm=0.3, clip_passes="two")
    for step in range(3):
        ours.backward(loss_of(a, step))
        theirs.backward(loss_of(b, step))
    assert same_bits(ours.last_grad_norm, theirs.last_grad_norm)
    assert_same_bits(weights_of(a), weights_of(b))


def overwriting(rank: int) -> None:
    results = []
    for budget in (0, None):
        model = Model()
        optimizer = Lomo(model, lr=0.1, clip_grad_norm=0.3, clip_memory=budget, process_group=dist.group.WORLD)
        for step in range(3):
            ran.clear()
            optimizer.backward(model(*batch_of_model(10 * rank + step)))
            assert ran == ["in place"]
        results.append(whole_weights(model))
    assert_same_bits(*results)


def test_a_loss_that_overwrites_what_it_saved_runs_once(ranks: Any) -> None:
    ranks(2).call(overwriting)
