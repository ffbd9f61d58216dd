"""What do a linear layer's update and norm from its factors cost, next to the product that makes its gradient?"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lomo_kernels import ops, reference

from .buffers import Baseline, scalar

SHAPE = {"cpu": (1024, 1024), "cuda": (11008, 4096)}  # of the weight; the second is LLaMA-7B's
TOKENS = {"cpu": [256], "cuda": [256, 4096]}
ALL_TOKENS = {"cpu": [16, 64, 256, 1024, 4096], "cuda": [256, 1024, 4096, 16384]}
#: Each for one layer: `of` has a weight, its factors and scalars.
IMPLEMENTATIONS = {
    "product, sgd_": lambda of, _: ops.sgd_(of.weight, of.gy.T @ of.x, lr=of.lr),
    "product, sq_norm_": lambda of, _: ops.sq_norm_(of.slot, of.gy.T @ of.x),
    "addmm_": lambda of, _: of.weight.addmm_(of.gy.T, of.x, alpha=-1e-9),
    "linear_sgd_ nearest": lambda of, _: ops.linear_sgd_(of.weight, of.x, of.gy, lr=of.lr),
    "linear_sgd_ stochastic": lambda of, _: ops.linear_sgd_(of.weight, of.x, of.gy, lr=of.lr, rounding="stochastic"),
    "linear_sgd_ nearest, with its norm": lambda of, _: ops.linear_sgd_(
        of.weight, of.x, of.gy, lr=of.lr, sq_norm=of.slot
    ),
    "linear_sq_norm_": lambda of, _: ops.linear_sq_norm_(of.slot, of.x, of.gy),
}


def parameters(device, full):
    tokens = (ALL_TOKENS if full else TOKENS)[device]  # float16 goes as bfloat16 does
    return {"implementation": IMPLEMENTATIONS, "dtype": ["bfloat16", "float32"], "tokens": tokens}


@pytest.fixture(scope="module")
def layer(tokens, dtype, device):
    torch.manual_seed(0)
    rows, columns = SHAPE[device]
    shapes = {"weight": (rows, columns), "x": (tokens, columns), "gy": (tokens, rows)}
    random = {name: torch.randn(shape, device=device).to(getattr(torch, dtype)) for name, shape in shapes.items()}
    layer = SimpleNamespace(**random, lr=scalar(1e-9, device), slot=scalar(0.0, device))
    expected = reference.linear_gradient([layer.x], [layer.gy])
    weight = torch.zeros_like(expected)
    ops.linear_sgd_(weight, layer.x, layer.gy, lr=1.0)
    assert (weight + expected).abs().max() <= 1e-4 * expected.abs().max()
    ops.linear_sq_norm_(layer.slot, layer.x, layer.gy)
    torch.testing.assert_close(layer.slot[0], expected.double().square().sum(), rtol=1e-5, atol=0)
    return layer


def test_linear(paired, layer, implementation):
    product = Baseline("product", lambda _: layer.gy.T @ layer.x)  # no way to a new weight needs less
    paired(partial(IMPLEMENTATIONS[implementation], layer), product)
