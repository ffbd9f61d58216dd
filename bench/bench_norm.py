"""How fast, and how exact, is the sum of squares?"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lomo_kernels import ops

from .buffers import scalar

ELEMENTS = {"short": [2**16, 2**24], "full": [2**power for power in (10, 13, 16, 18, 20, 24, 28)]}
#: Of rivals, which return the norm; ours adds its square to a slot.
NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "vector_norm": torch.linalg.vector_norm,
    "vector_norm, float32": lambda grad: torch.linalg.vector_norm(grad, dtype=torch.float32),
    "foreach_norm": lambda grad: torch._foreach_norm([grad])[0],  # clip_grad_norm_(foreach=True)
    "lomo_optim": lambda grad: torch.norm(grad.to(torch.float32), 2.0),  # its hook's very line
}
CONTESTANTS = ("sq_norm_", *NORMS)


def test_norm(paired, buffers, contestant, dtype, elements, device):
    slot = scalar(0.0, device)
    grad = buffers.grads[0]
    exact = sum(chunk.double().square().sum() for chunk in grad.split(2**24)).sqrt()
    if contestant == "sq_norm_":
        ops.sq_norm_(slot, grad)
        error = abs(slot.sqrt() / exact - 1).item()
        assert error <= 1e-6

        def call(number):
            ops.sq_norm_(slot, buffers.pair(number)[1])
    else:
        norm = NORMS[contestant]
        error = abs(norm(grad).double() / exact - 1).item()

        def call(number):
            norm(buffers.pair(number)[1])

    case = {"dtype": dtype, "elements": elements}
    paired(contestant, case, call, buffers.probe(1), error=error)
