"""What does one call for many small tensors save against a call for each?"""

from __future__ import annotations

import pytest
import torch

from lomo_kernels import ops, reference

from .buffers import Probe, scalar

TENSORS, ELEMENTS = 300, 4096  # the norms of a Llama of 65B are 161 vectors of 8192
CONTESTANTS = ("sgd_list_", "_foreach_add_", "sq_norm_list_", "_foreach_norm")


@pytest.fixture(scope="module")
def calls(device):
    """By contestant: the name and the call of the probe, the same done one by one, and the call."""
    torch.manual_seed(0)
    params, grads = ([torch.randn(ELEMENTS, device=device).bfloat16() for _ in range(TENSORS)] for _ in range(2))
    lr = scalar(1e-3, device)
    slots = list(torch.zeros(TENSORS, dtype=torch.float64, device=device))
    expected = [reference.updated(param, grad, lr=1e-3) for param, grad in zip(params, grads, strict=True)]
    ops.sgd_list_(params, grads, lr=lr)  # a bench of wrong results is worth nothing
    assert all(map(torch.equal, params, expected))

    def each(call, *lists, **options):
        for tensors in zip(*lists, strict=True):
            call(*tensors, **options)

    updates = Probe("sgd_, one by one", lambda _: each(ops.sgd_, params, grads, lr=lr))
    norms = Probe("sq_norm_, one by one", lambda _: each(ops.sq_norm_, slots, grads))
    return {
        "sgd_list_": (lambda _: ops.sgd_list_(params, grads, lr=lr), updates),
        "_foreach_add_": (lambda _: torch._foreach_add_(params, grads, alpha=-1e-3), updates),
        "sq_norm_list_": (lambda _: ops.sq_norm_list_(slots, grads), norms),
        "_foreach_norm": (lambda _: torch._foreach_norm(grads), norms),
    }


def test_lists(paired, calls, contestant):
    paired(contestant, {"dtype": "bfloat16", "tensors": TENSORS, "elements": ELEMENTS}, *calls[contestant])
