"""What do a linear layer's update and norm from its factors cost, next to the product that makes its gradient?"""

from __future__ import annotations

import pytest
import torch

from lomo_kernels import ops, reference

from .buffers import Probe

SHAPE = {"cpu": (1024, 1024), "cuda": (11008, 4096)}  # of the weight; the second is LLaMA-7B's
TOKENS = {
    "cpu": {"short": [256], "full": [16, 64, 256, 1024, 4096]},
    "cuda": {"short": [256, 4096], "full": [256, 1024, 4096, 16384]},
}
DTYPES = ("bfloat16", "float32")  # float16 goes as bfloat16 does
CONTESTANTS = (
    "product, sgd_",
    "product, sq_norm_",
    "addmm_",
    "linear_sgd_ nearest",
    "linear_sgd_ stochastic",
    "linear_sgd_ nearest, with its norm",
    "linear_sq_norm_",
)


@pytest.fixture(scope="module")
def calls(tokens, dtype, device):
    """By contestant, each for one layer; and the probe, torch's product: no way to a new weight needs less."""
    torch.manual_seed(0)
    (rows, columns), of = SHAPE[device], getattr(torch, dtype)
    shapes = ((rows, columns), (tokens, columns), (tokens, rows))
    weight, x, gy = (torch.randn(shape, device=device).to(of) for shape in shapes)
    lr, slot = (torch.tensor([value], dtype=torch.float64, device=device) for value in (1e-9, 0.0))
    check(x, gy, slot)

    def update(_, **options):
        ops.linear_sgd_(weight, x, gy, lr=lr, **options)

    probe = Probe("product", lambda _: gy.T @ x)
    return probe, {
        "product, sgd_": lambda _: ops.sgd_(weight, gy.T @ x, lr=lr),
        "product, sq_norm_": lambda _: ops.sq_norm_(slot, gy.T @ x),
        "addmm_": lambda _: weight.addmm_(gy.T, x, alpha=-1e-9),
        "linear_sgd_ nearest": update,
        "linear_sgd_ stochastic": lambda _: update(_, rounding="stochastic"),
        "linear_sgd_ nearest, with its norm": lambda _: update(_, sq_norm=slot),
        "linear_sq_norm_": lambda _: ops.linear_sq_norm_(slot, x, gy),
    }


def check(x: torch.Tensor, gy: torch.Tensor, slot: torch.Tensor) -> None:
    """A bench of wrong results is worth nothing."""
    expected = reference.linear_gradient([x], [gy])
    weight = torch.zeros_like(expected)
    ops.linear_sgd_(weight, x, gy, lr=1.0)
    assert (weight + expected).abs().max() <= 1e-4 * expected.abs().max()
    ops.linear_sq_norm_(slot, x, gy)
    torch.testing.assert_close(slot[0], expected.double().square().sum(), rtol=1e-5, atol=0)


def test_linear(paired, calls, contestant, tokens, dtype):
    probe, contestants = calls
    paired(contestant, {"dtype": dtype, "tokens": tokens}, contestants[contestant], probe)
