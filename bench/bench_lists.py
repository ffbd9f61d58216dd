"""What does one call for many small tensors save against a call for each?"""

from __future__ import annotations

import pytest
import torch

from lomo_kernels import ops, reference

from .buffers import Probe

TENSORS, ELEMENTS = 300, 4096  # the norms of a Llama of 65B are 161 vectors of 8192
CONTESTANTS = ("sgd_list_", "_foreach_add_", "sq_norm_list_", "_foreach_norm")


@pytest.fixture(scope="module")
def calls(device):
    """By contestant: the probe, the same done one by one, and the call."""
    torch.manual_seed(0)
    params, grads = ([torch.randn(ELEMENTS, device=device).bfloat16() for _ in range(TENSORS)] for _ in range(2))
    lr = torch.tensor(1e-3, dtype=torch.float64, device=device)
    slots = list(torch.zeros(TENSORS, dtype=torch.float64, device=device))
    expected = [reference.updated(param, grad, lr=1e-3) for param, grad in zip(params, grads, strict=True)]
    ops.sgd_list_(params, grads, lr=lr)  # a bench of wrong results is worth nothing
    assert all(torch.equal(param, wanted) for param, wanted in zip(params, expected, strict=True))

    def each_update(_):
        for param, grad in zip(params, grads, strict=True):
            ops.sgd_(param, grad, lr=lr)

    def each_norm(_):
        for slot, grad in zip(slots, grads, strict=True):
            ops.sq_norm_(slot, grad)

    updates, norms = Probe("sgd_, one by one", each_update), Probe("sq_norm_, one by one", each_norm)
    return {
        "sgd_list_": (updates, lambda _: ops.sgd_list_(params, grads, lr=lr)),
        "_foreach_add_": (updates, lambda _: torch._foreach_add_(params, grads, alpha=-1e-3)),
        "sq_norm_list_": (norms, lambda _: ops.sq_norm_list_(slots, grads)),
        "_foreach_norm": (norms, lambda _: torch._foreach_norm(grads)),
    }


def test_lists(paired, calls, contestant):
    probe, call = calls[contestant]
    paired(contestant, {"dtype": "bfloat16", "tensors": TENSORS, "elements": ELEMENTS}, call, probe)
