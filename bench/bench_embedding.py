"""What do an embedding's update and norm from indices cost, next to its dense gradient?"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lomo_kernels import ops, reference

from .buffers import Probe, scalar

ROWS = {"cpu": 32_000, "cuda": 128_256}  # vocabularies of Llama 1 and 3
WIDTH = {"cpu": 1024, "cuda": 4096}
LR = 1e-9
WEIGHT_DECAY = 1e3  # 1 - LR * WEIGHT_DECAY is not 1 in float32: every row is touched, as with any decay that counts
TOKENS = {"short": [256], "full": [256, 1024, 4096]}


def dense(of, _):
    return torch.ops.aten.embedding_dense_backward(of.gy, of.index, len(of.weight), -1, False)


#: Each for one bfloat16 embedding: `of` a weight, indices, gradients and scalars.
CALLS = {
    "dense gradient, sgd_": lambda of, _: ops.sgd_(of.weight, dense(of, _), lr=of.lr),
    "dense gradient, sq_norm_": lambda of, _: ops.sq_norm_(of.slot, dense(of, _)),
    "index_add_": lambda of, _: of.weight.index_add_(0, of.index, of.gy, alpha=-LR),
    "embedding_sgd_": lambda of, _: ops.embedding_sgd_(of.weight, of.index, of.gy, lr=of.lr),
    "embedding_sgd_, decay": lambda of, _: ops.embedding_sgd_(
        of.weight, of.index, of.gy, lr=of.lr, weight_decay=WEIGHT_DECAY
    ),
    "embedding_sq_norm_": lambda of, _: ops.embedding_sq_norm_(of.slot, of.index, of.gy),
}
CONTESTANTS = tuple(CALLS)


@pytest.fixture(scope="module")
def layer(tokens, device):
    torch.manual_seed(0)
    weight, gy = (torch.randn(rows, WIDTH[device], device=device).bfloat16() for rows in (ROWS[device], tokens))
    index = torch.randint(ROWS[device], (tokens,), device=device)
    few, some = weight[:100].clone(), index % 100  # a bench of wrong results is worth nothing
    expected = reference.updated(few, reference.embedding_gradient(100, [some], [gy], [-1]), lr=0.5)
    ops.embedding_sgd_(few, some, gy, lr=0.5)
    torch.testing.assert_close(few, expected)
    return SimpleNamespace(weight=weight, index=index, gy=gy, lr=scalar(LR, device), slot=scalar(0.0, device))


def test_embedding(paired, layer, contestant, tokens):
    probe = Probe("dense gradient", partial(dense, layer))
    paired(contestant, {"dtype": "bfloat16", "tokens": tokens}, partial(CALLS[contestant], layer), probe)
