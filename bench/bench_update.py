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

from .buffers import DTYPES, Buffers, scalar
from .methods import missing_peer

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


def stepped(buffers: Buffers, target: dict[str, Any], key: str, step: Callable[[], object]) -> Call:
    """An optimizer's step on one parameter. One optimizer serves all buffers: `target[key]` is set to them in turn.
    `.grad` is set anew each time, since optimizers may take it away."""
    params = [nn.Parameter(param) for param in buffers.params]
    values = [[param] for param in params] if key == "params" else params

    def call(number: int) -> None:
        number %= len(params)
        params[number].grad = buffers.grads[number]
        target[key] = values[number]
        step()

    return call


def sgd(buffers: Buffers, lr: float, module: str = "torch.optim", **options: bool) -> Call:
    optimizer = importlib.import_module(module).SGD([nn.Parameter(buffers.params[0])], lr=lr, **options)
    return stepped(buffers, optimizer.param_groups[0], "params", optimizer.step)


def lomo_optim(buffers: Buffers, lr: float) -> Call:
    """What its hook does with the first gradient that it finds."""
    from lomo_optim import Lomo

    params = {"weight": nn.Parameter(buffers.params[0])}
    model = SimpleNamespace(named_parameters=params.items, parameters=params.values)
    return stepped(buffers, params, "weight", partial(Lomo(model, lr=lr).grad_func, None))


#: The last ones may overwrite the gradients.
IMPLEMENTATIONS: dict[str, Callable[[Buffers, float], Call]] = {
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


def parameters(device: str, full: bool) -> dict[str, Any]:
    sizes = [2**power for power in ((10, 13, 16, 18, 20, 24, 28) if full else (16, 24))]
    return {"implementation": IMPLEMENTATIONS, "dtype": DTYPES, "elements": sizes}


def wrong(name: str, dtype: torch.dtype, device: str) -> str:
    """What is wrong with an update of 10,007 elements. Empty if nothing is."""
    buffers = Buffers(dtype, 10_007, device)
    before, grad = (tensor.clone() for tensor in buffers.pair(0))
    decay = {"weight_decay": EVERY["weight_decay"]}
    scalars = EVERY if "every scalar" in name else decay if name == "mul_, add_" else {}
    expected = reference.updated(before, grad, lr=0.5, stochastic="stochastic" in name, **scalars)
    IMPLEMENTATIONS[name](buffers, 0.5)(0)
    after = buffers.pair(0)[0]
    if name.startswith("sgd_"):
        differ, limit = after != expected, "the reference's bits"
    else:  # two roundings instead of one
        differ = (after.double() - expected.double()).abs() > 4 * torch.finfo(dtype).eps * (1 + expected.double().abs())
        limit = "four units in the last place"
    return f"{int(differ.sum())} of 10007 elements are not within {limit}" if differ.any() else ""


def test_update(paired, buffers, implementation, dtype, device):
    if lacking := missing_peer(implementation):
        pytest.skip(lacking)
    if dtype == "float32" and implementation in ("sgd_ stochastic", "optimi SGD"):
        pytest.skip(f"{implementation}, float32: float32 is not rounded")
    if reason := wrong(implementation, buffers.dtype, device):
        assert not implementation.startswith("sgd_"), reason
        pytest.skip(f"{implementation}, {dtype}, {device}: {reason}")
    paired(IMPLEMENTATIONS[implementation](buffers, LR), buffers.probe(STREAMS))
