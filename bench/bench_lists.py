"""What does one call for many small tensors save against a call for each?"""

from __future__ import annotations

import pytest
import torch

from lomo_kernels import ops, reference

from .buffers import Baseline, scalar

TENSORS, ELEMENTS = 300, 4096  # the norms of a Llama of 65B are 161 vectors of 8192
IMPLEMENTATIONS = ("sgd_list_", "_foreach_add_", "sq_norm_list_", "_foreach_norm")


def parameters(device, full):
    return {"implementation": IMPLEMENTATIONS, "dtype": ["bfloat16"], "tensors": [TENSORS], "elements": [ELEMENTS]}


@pytest.fixture(scope="module")
def calls(dtype, tensors, elements, device):
    """By implementation: its call, and the same for one tensor after the other."""
    torch.manual_seed(0)
    of = {"dtype": getattr(torch, dtype), "device": device}
    params, grads = ([torch.randn(elements, **of) for _ in range(tensors)] for _ in range(2))
    lr = scalar(1e-3, device)
    slots = list(torch.zeros(tensors, dtype=torch.float64, device=device))
    expected = [reference.updated(param, grad, lr=1e-3) for param, grad in zip(params, grads, strict=True)]
    ops.sgd_list_(params, grads, lr=lr)
    assert all(map(torch.equal, params, expected))

    def updates(_):
        for param, grad in zip(params, grads, strict=True):
            ops.sgd_(param, grad, lr=lr)

    def norms(_):
        for slot, grad in zip(slots, grads, strict=True):
            ops.sq_norm_(slot, grad)

    singly = Baseline("sgd_, one by one", updates), Baseline("sq_norm_, one by one", norms)
    return {
        "sgd_list_": (lambda _: ops.sgd_list_(params, grads, lr=lr), singly[0]),
        "_foreach_add_": (lambda _: torch._foreach_add_(params, grads, alpha=-1e-3), singly[0]),
        "sq_norm_list_": (lambda _: ops.sq_norm_list_(slots, grads), singly[1]),
        "_foreach_norm": (lambda _: torch._foreach_norm(grads), singly[1]),
    }


def test_lists(paired, calls, implementation):
    paired(*calls[implementation])
