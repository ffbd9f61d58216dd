"""What do an embedding's update and norm from indices cost, next to its dense gradient?"""

from __future__ import annotations

import pytest
import torch

from lomo_kernels import ops, reference

from .buffers import Probe

ROWS = {"cpu": 32_000, "cuda": 128_256}  # vocabularies of Llama 1 and 3
WIDTH = {"cpu": 1024, "cuda": 4096}
LR = 1e-9
WEIGHT_DECAY = 1e3  # 1 - LR * WEIGHT_DECAY is not 1 in float32: every row is touched, as with any decay that counts
TOKENS = {"short": [256], "full": [256, 1024, 4096]}
CONTESTANTS = (
    "dense gradient, sgd_",
    "dense gradient, sq_norm_",
    "index_add_",
    "embedding_sgd_",
    "embedding_sgd_, decay",
    "embedding_sq_norm_",
)


@pytest.fixture(scope="module")
def calls(tokens, device):
    """By contestant, each for one bfloat16 embedding; and the probe, the making of its dense gradient."""
    torch.manual_seed(0)
    rows, width = ROWS[device], WIDTH[device]
    weight = torch.randn(rows, width, device=device).bfloat16()
    index = torch.randint(rows, (tokens,), device=device)
    gy = torch.randn(tokens, width, device=device).bfloat16()
    lr, slot = (torch.tensor([value], dtype=torch.float64, device=device) for value in (LR, 0.0))
    few, some = weight[:100].clone(), index % 100  # a bench of wrong results is worth nothing
    expected = reference.updated(few, reference.embedding_gradient(100, [some], [gy], [-1]), lr=0.5)
    ops.embedding_sgd_(few, some, gy, lr=0.5)
    torch.testing.assert_close(few, expected)

    def dense(_):
        return torch.ops.aten.embedding_dense_backward(gy, index, rows, -1, False)

    return Probe("dense gradient", dense), {
        "dense gradient, sgd_": lambda _: ops.sgd_(weight, dense(_), lr=lr),
        "dense gradient, sq_norm_": lambda _: ops.sq_norm_(slot, dense(_)),
        "index_add_": lambda _: weight.index_add_(0, index, gy, alpha=-LR),
        "embedding_sgd_": lambda _: ops.embedding_sgd_(weight, index, gy, lr=lr),
        "embedding_sgd_, decay": lambda _: ops.embedding_sgd_(weight, index, gy, lr=lr, weight_decay=WEIGHT_DECAY),
        "embedding_sq_norm_": lambda _: ops.embedding_sq_norm_(slot, index, gy),
    }


def test_embedding(paired, calls, contestant, tokens):
    probe, contestants = calls
    paired(contestant, {"dtype": "bfloat16", "tokens": tokens}, contestants[contestant], probe)
