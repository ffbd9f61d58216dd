"""How fast, and how exact, is the sum of squares?"""

from __future__ import annotations

import torch

from lomo_kernels import ops

from .buffers import DTYPES, scalar

#: Of rivals, which return the norm; ours adds its square to a slot.
NORMS = {
    "vector_norm": torch.linalg.vector_norm,
    "vector_norm, float32": lambda grad: torch.linalg.vector_norm(grad, dtype=torch.float32),
    "foreach_norm": lambda grad: torch._foreach_norm([grad])[0],  # clip_grad_norm_(foreach=True)
    "lomo_optim": lambda grad: torch.norm(grad.to(torch.float32), 2.0),  # its hook's very line
}


def parameters(device, full):
    sizes = [2**power for power in ((10, 13, 16, 18, 20, 24, 28) if full else (16, 24))]
    return {"implementation": ["sq_norm_", *NORMS], "dtype": DTYPES, "elements": sizes}


def test_norm(paired, buffers, implementation, device):
    slot = scalar(0.0, device)
    norm = NORMS.get(implementation, lambda grad: ops.sq_norm_(slot, grad))
    grad = buffers.grads[0]
    exact = sum(chunk.double().square().sum() for chunk in grad.split(2**24)).sqrt()
    result = norm(grad)
    error = abs((slot.sqrt() if implementation == "sq_norm_" else result.double()) / exact - 1).item()
    assert implementation != "sq_norm_" or error <= 1e-6
    paired(lambda number: norm(buffers.pair(number)[1]), buffers.probe(1), error=error)
