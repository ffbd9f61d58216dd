"""What do a linear layer's update and norm from factors cost, next to the product that makes its gradient?"""

import pytest
import torch

from lomo_kernels import ops, reference

SIDE = 1024
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(scope="module", params=[(dtype, tokens) for dtype in DTYPES for tokens in (64, 256, 1024)], ids=str)
def contestants(request):
    """Each for one layer of SIDE x SIDE. The limit is torch's product: no way to a new weight needs less."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, tokens = request.param
    dtype = DTYPES[name]
    weight, x, gy = (torch.randn(rows, SIDE).to(dtype) for rows in (SIDE, tokens, tokens))
    slot = torch.zeros(1, dtype=torch.float64)
    ops.linear_sq_norm_(slot, x, gy)  # a bench of wrong results is worth nothing
    exact = reference.linear_gradient([x], [gy]).double().square().sum()
    torch.testing.assert_close(slot[0], exact, rtol=1e-5, atol=0)
    return {
        "product": lambda: gy.T @ x,
        "product, sgd_": lambda: ops.sgd_(weight, gy.T @ x, lr=1e-9),
        "product, sq_norm_": lambda: ops.sq_norm_(slot, gy.T @ x),
        "addmm_": lambda: weight.addmm_(gy.T, x, alpha=-1e-9),
        "linear_sgd_": lambda: ops.linear_sgd_(weight, x, gy, lr=1e-9),
        "linear_sgd_ stochastic": lambda: ops.linear_sgd_(weight, x, gy, lr=1e-9, rounding="stochastic"),
        "linear_sq_norm_": lambda: ops.linear_sq_norm_(slot, x, gy),
    }


NAMES = [
    "product",
    "product, sgd_",
    "product, sq_norm_",
    "addmm_",
    "linear_sgd_",
    "linear_sgd_ stochastic",
    "linear_sq_norm_",
]


@pytest.mark.parametrize("name", NAMES)
def test_linear(benchmark, contestants, name):
    benchmark.pedantic(contestants[name], rounds=15, warmup_rounds=2)
