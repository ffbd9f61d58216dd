"""What do an embedding's update and norm from indices cost, next to its dense gradient?"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lomo_kernels import ops, reference

from .buffers import Baseline, scalar

SHAPE = {"cpu": (32_000, 1024), "cuda": (128_256, 4096)}  # vocabularies of Llama 1 and 3
LR = 1e-9
DECAY = 1e3  # 1 - LR * DECAY is not 1 in float32: every row is touched, as with any decay that counts


def dense(of, _):
    return torch.ops.aten.embedding_dense_backward(of.gy, of.index, len(of.weight), -1, False)


#: Each for one embedding: `of` has a weight, indices, gradients and scalars.
IMPLEMENTATIONS = {
    "dense gradient, sgd_": lambda of, _: ops.sgd_(of.weight, dense(of, _), lr=of.lr),
    "dense gradient, sq_norm_": lambda of, _: ops.sq_norm_(of.slot, dense(of, _)),
    "index_add_": lambda of, _: of.weight.index_add_(0, of.index, of.gy, alpha=-LR),
    "embedding_sgd_": lambda of, _: ops.embedding_sgd_(of.weight, of.index, of.gy, lr=of.lr),
    "embedding_sgd_, decay": lambda of, _: ops.embedding_sgd_(of.weight, of.index, of.gy, lr=of.lr, weight_decay=DECAY),
    "embedding_sq_norm_": lambda of, _: ops.embedding_sq_norm_(of.slot, of.index, of.gy),
}


def parameters(device, full):
    tokens = [256, 1024, 4096] if full else [256]
    return {"implementation": IMPLEMENTATIONS, "dtype": ["bfloat16"], "tokens": tokens}


@pytest.fixture(scope="module")
def layer(tokens, dtype, device):
    torch.manual_seed(0)
    rows, width = SHAPE[device]
    weight, gy = (torch.randn(size, width, device=device).to(getattr(torch, dtype)) for size in (rows, tokens))
    index = torch.randint(rows, (tokens,), device=device)
    expected = reference.updated(weight[:100], reference.embedding_gradient(100, [index % 100], [gy], [-1]), lr=0.5)
    updated = weight[:100].clone()
    ops.embedding_sgd_(updated, index % 100, gy, lr=0.5)
    torch.testing.assert_close(updated, expected)
    return SimpleNamespace(weight=weight, index=index, gy=gy, lr=scalar(LR, device), slot=scalar(0.0, device))


def test_embedding(paired, layer, implementation):
    paired(partial(IMPLEMENTATIONS[implementation], layer), Baseline("dense gradient", partial(dense, layer)))
