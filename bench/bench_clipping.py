"""What does exact clipping cost with each budget of `clip_memory`, and what do rules cost that need no global norm?

The budgets are shares of what all gradients take: two passes keep nothing, one pass keeps all.
"""

from __future__ import annotations

import itertools

from .bench_step import COLUMNS, pytestmark, test_step  # noqa: F401 (the same step, of other methods)
from .methods import OWN_NORMS, SHARES

IMPLEMENTATIONS = (
    *("AdamW, clip_grad_norm_", "lomo_optim, clipping", "Lomo, clipping, two passes"),
    *(f"Lomo, clipping, {share} kept" for share in SHARES),
    *("Lomo, clipping, one pass", *OWN_NORMS),
)


def parameters(device, full):
    """Without checkpointing, and in full with it, too."""
    model, tokens = ("1.1B", 1024) if device == "cuda" else ("107M" if full else "17M", 256)
    return {COLUMNS: list(itertools.product([model], [tokens], (False, True)[: 1 + full], IMPLEMENTATIONS))}
