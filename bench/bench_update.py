"""What fraction of memory bandwidth does the update reach?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from lomo_kernels import ops, reference

from . import peers
from .buffers import Buffers

ELEMENTS = {"short": [2**16, 2**24], "full": [2**power for power in (10, 13, 16, 18, 20, 24, 28)]}
LR = 1e-3
EVERY = {"weight_decay": 0.01, "inv_scale": 0.5, "clip_value": 3.0, "clip_coef": 0.5}
STREAMS = 3  # reads the parameter and the gradient, writes the parameter

Call = Callable[[int], object]


def ours(buffers: Buffers, lr: float, *, norm: bool = False, rounding: str = "nearest", **scalars: float) -> Call:
    given = {name: scalar(value, buffers.device) for name, value in {"lr": lr, **scalars}.items()}
    if norm:
        given["sq_norm"] = torch.zeros(1, dtype=torch.float64, device=buffers.device)
    return lambda number: ops.sgd_(*buffers.pair(number), rounding=rounding, **given)


def scalar(value: float, device: str) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def plain(buffers: Buffers, lr: float) -> Call:
    def call(number: int) -> None:
        param, grad = buffers.pair(number)
        param.add_(grad, alpha=-lr)

    return call


def decayed(buffers: Buffers, lr: float) -> Call:
    def call(number: int) -> None:
        param, grad = buffers.pair(number)
        param.mul_(1 - lr * EVERY["weight_decay"]).add_(grad, alpha=-lr)

    return call


def stepped(buffers: Buffers, stepper: Callable[[nn.Parameter], peers.OneAtATime | peers.LomoOptim]) -> Call:
    """An optimizer's step on one parameter. `.grad` is set anew each time: optimizers may take it away."""
    held = [nn.Parameter(param) for param in buffers.params]
    optimizer = stepper(held[0])

    def call(number: int) -> None:
        param = held[number % len(held)]
        param.grad = buffers.grads[number % len(held)]
        optimizer.step(param)

    return call


def sgd(buffers: Buffers, lr: float, **options: bool) -> Call:
    return stepped(buffers, lambda param: peers.OneAtATime(partial(torch.optim.SGD, lr=lr, **options), param))


def optimi(buffers: Buffers, lr: float, **options: bool) -> Call:
    from optimi import SGD

    return stepped(buffers, lambda param: peers.OneAtATime(partial(SGD, lr=lr, **options), param))


def lomo_optim(buffers: Buffers, lr: float) -> Call:
    return stepped(buffers, lambda _: peers.LomoOptim(lr))


#: The last ones may overwrite the gradients.
MAKERS: dict[str, Callable[[Buffers, float], Call]] = {
    "sgd_ nearest": ours,
    "sgd_ nearest, every scalar": partial(ours, **EVERY),
    "sgd_ nearest, with its norm": partial(ours, norm=True),
    "sgd_ stochastic": partial(ours, rounding="stochastic"),
    "add_": plain,
    "mul_, add_": decayed,
    "SGD foreach": partial(sgd, foreach=True),
    "SGD fused": partial(sgd, fused=True),
    "lomo_optim": lomo_optim,
    "optimi SGD, no Kahan": partial(optimi, kahan_sum=False),
    "optimi SGD": optimi,
}
CONTESTANTS = tuple(MAKERS)


def wrong(name: str, dtype: torch.dtype, device: str) -> str:
    """What is wrong with a contestant's result on 10,007 elements; empty where nothing is. A bench of wrong results is
    worth nothing."""
    buffers = Buffers(dtype, 10_007, device)
    before, grad = (tensor.clone() for tensor in buffers.pair(0))
    scalars = EVERY if "every scalar" in name else {}
    if name == "mul_, add_":
        scalars = {"weight_decay": EVERY["weight_decay"]}
    expected = reference.updated(before, grad, lr=0.5, stochastic="stochastic" in name, **scalars)
    MAKERS[name](buffers, 0.5)(0)
    after = buffers.pair(0)[0]
    if name.startswith("sgd_"):
        differ = after != expected
        limit = "the reference's bits"
    else:  # two roundings instead of one
        differ = (after.double() - expected.double()).abs() > 4 * torch.finfo(dtype).eps * (1 + expected.double().abs())
        limit = "four units in the last place"
    return f"{int(differ.sum())} of 10007 elements are not within {limit}" if differ.any() else ""


def test_update(paired, missing, buffers, contestant, dtype, elements, device):
    if lacking := peers.missing(contestant):
        missing(*lacking)
    if dtype == "float32" and contestant in ("sgd_ stochastic", "optimi SGD"):
        pytest.skip("float32 is not rounded")
    if reason := wrong(contestant, buffers.dtype, device):
        if contestant.startswith("sgd_"):
            pytest.fail(reason)
        missing(f"{contestant}, {dtype}, {device}", reason)
    call = MAKERS[contestant](buffers, LR)
    case = {"dtype": dtype, "elements": elements}
    paired(contestant, case, call, buffers.probe(STREAMS), bytes_moved=STREAMS * buffers.nbytes)
