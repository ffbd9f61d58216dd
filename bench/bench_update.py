"""What fraction of memory bandwidth does the update reach?"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lomo_kernels import ops, reference

from .buffers import Buffers, scalar
from .methods import missing_peer

ELEMENTS = {"short": [2**16, 2**24], "full": [2**power for power in (10, 13, 16, 18, 20, 24, 28)]}
LR = 1e-3
EVERY = {"weight_decay": 0.01, "inv_scale": 0.5, "clip_value": 3.0, "clip_coef": 0.5}
STREAMS = 3  # reads the parameter and the gradient, writes the parameter

Call = Callable[[int], object]


def ours(buffers: Buffers, lr: float, *, norm: bool = False, rounding: str = "nearest", **scalars: float) -> Call:
    given = {name: scalar(value, buffers.device) for name, value in {"lr": lr, **scalars}.items()}
    if norm:
        given["sq_norm"] = scalar(0.0, buffers.device)
    return lambda number: ops.sgd_(*buffers.pair(number), rounding=rounding, **given)


def plain(buffers: Buffers, lr: float, weight_decay: float | None = None) -> Call:
    def call(number: int) -> None:
        param, grad = buffers.pair(number)
        if weight_decay:
            param.mul_(1 - lr * weight_decay)
        param.add_(grad, alpha=-lr)

    return call


def stepped(buffers: Buffers, holder: dict[str, Any], key: str, step: Callable[[], object]) -> Call:
    """An optimizer's step on one parameter: one optimizer for all, whose `holder` has them in turn. `.grad` is set anew
    each time: optimizers may take it away."""
    params = [nn.Parameter(param) for param in buffers.params]
    held = [[param] for param in params] if key == "params" else params

    def call(number: int) -> None:
        number %= len(params)
        params[number].grad = buffers.grads[number]
        holder[key] = held[number]
        step()

    return call


def sgd(buffers: Buffers, lr: float, module: str = "torch.optim", **options: bool) -> Call:
    optimizer = importlib.import_module(module).SGD([nn.Parameter(buffers.params[0])], lr=lr, **options)
    return stepped(buffers, optimizer.param_groups[0], "params", optimizer.step)


def lomo_optim(buffers: Buffers, lr: float) -> Call:
    """What its hook does with the first gradient that it finds."""
    from lomo_optim import Lomo

    held = {"weight": nn.Parameter(buffers.params[0])}
    model = SimpleNamespace(named_parameters=held.items, parameters=held.values)
    return stepped(buffers, held, "weight", partial(Lomo(model, lr=lr).grad_func, None))


#: The last ones may overwrite the gradients.
MAKERS: dict[str, Callable[[Buffers, float], Call]] = {
    "sgd_ nearest": ours,
    "sgd_ nearest, every scalar": partial(ours, **EVERY),
    "sgd_ nearest, with its norm": partial(ours, norm=True),
    "sgd_ stochastic": partial(ours, rounding="stochastic"),
    "add_": plain,
    "mul_, add_": partial(plain, weight_decay=EVERY["weight_decay"]),
    "SGD foreach": partial(sgd, foreach=True),
    "SGD fused": partial(sgd, fused=True),
    "lomo_optim": lomo_optim,
    "optimi SGD, no Kahan": partial(sgd, module="optimi", kahan_sum=False),
    "optimi SGD": partial(sgd, module="optimi"),
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
    if lacking := missing_peer(contestant):
        missing(*lacking)
    if dtype == "float32" and contestant in ("sgd_ stochastic", "optimi SGD"):
        pytest.skip("float32 is not rounded")
    if reason := wrong(contestant, buffers.dtype, device):
        assert not contestant.startswith("sgd_"), reason
        missing(f"{contestant}, {dtype}, {device}", reason)
    call = MAKERS[contestant](buffers, LR)
    case = {"dtype": dtype, "elements": elements}
    paired(contestant, case, call, buffers.probe(STREAMS))
