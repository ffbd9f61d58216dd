"""What does an embedding's update from indices cost, next to a dense gradient?"""

import pytest
import torch

from lomo_kernels import ops, reference

ROWS, WIDTH = 32_000, 1024


@pytest.fixture(scope="module", params=[256, 4096], ids="{} tokens".format)
def contestants(request):
    """Each for one bfloat16 embedding of ROWS x WIDTH."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(ROWS, WIDTH).bfloat16()
    index, gy = torch.randint(ROWS, (request.param,)), torch.randn(request.param, WIDTH).bfloat16()
    few, rows = weight[:100].clone(), index % 100  # a bench of wrong results is worth nothing
    expected = reference.updated(few, reference.embedding_gradient(100, [rows], [gy], [-1]), lr=0.5)
    ops.embedding_sgd_(few, rows, gy, lr=0.5)
    torch.testing.assert_close(few, expected)
    slot = torch.zeros(1, dtype=torch.float64)

    def dense():
        return torch.ops.aten.embedding_dense_backward(gy, index, ROWS, -1, False)

    return {
        "dense gradient": dense,
        "dense gradient, sgd_": lambda: ops.sgd_(weight, dense(), lr=1e-9),
        "embedding_sgd_": lambda: ops.embedding_sgd_(weight, index, gy, lr=1e-9),
        "embedding_sgd_, decay": lambda: ops.embedding_sgd_(weight, index, gy, lr=1e-9, weight_decay=0.1),
        "embedding_sq_norm_": lambda: ops.embedding_sq_norm_(slot, index, gy),
    }


NAMES = ["dense gradient", "dense gradient, sgd_", "embedding_sgd_", "embedding_sgd_, decay", "embedding_sq_norm_"]


@pytest.mark.parametrize("name", NAMES)
def test_embedding(benchmark, contestants, name):
    benchmark.pedantic(contestants[name], rounds=15, warmup_rounds=2)
