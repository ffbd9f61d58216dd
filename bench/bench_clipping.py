"""What does exact clipping cost with each budget of `clip_memory`, and what do rules cost that need no global norm?

The budgets are shares of what all gradients take: two passes keep nothing, one pass keeps all.
"""

from __future__ import annotations

import pytest

from .bench_step import Case, Trained, base, llama  # noqa: F401 (fixtures)
from .buffers import Probe
from .methods import OWN_NORMS, SHARES, cannot
from .results import BASE

pytestmark = pytest.mark.timeout(1800)

CONTESTANTS = (
    "AdamW, clip_grad_norm_",
    "lomo_optim, clipping",
    "Lomo, clipping, two passes",
    *(f"Lomo, clipping, {share} kept" for share in SHARES),
    "Lomo, clipping, one pass",
    *OWN_NORMS,
)
CASES = {
    "cpu": {"short": [Case("17M", 256)], "full": [Case("107M", 256), Case("107M", 256, True)]},
    "cuda": {"short": [Case("1.1B", 1024)], "full": [Case("1.1B", 1024), Case("1.1B", 1024, True)]},
}


def test_step(paired, missing, case, contestant, llama, base, device):  # noqa: F811
    if lacking := cannot(contestant, llama.embedding.weight.dtype, device):
        missing(*lacking)
    described = {"model": case.model, "tokens": case.tokens, "checkpointing": case.checkpointing}
    trained = Trained(contestant, llama, case, device)
    trained.step(2)  # the first step only finds out what fits, the second one keeps that
    paired(contestant, described, trained.step, Probe(BASE, base.step), memory=trained.memory)
