"""Whether accelerate accumulates gradients while somebody calls the optimizer's own backward."""

from __future__ import annotations

import gc
import sys
from typing import Any


def check_synchronised(optimizer: Any) -> None:
    """Raises RuntimeError if accelerate has wrapped `optimizer` and says that the next `step` is to be left out.

    accelerate is not imported for that. Only if it accumulates now, the garbage collector is asked whether it is this
    optimizer that it has wrapped: some 50 ms.
    """
    state = sys.modules.get("accelerate.state")
    if state is None or state.GradientState._shared_state.get("sync_gradients", True):
        return
    for holder in gc.get_referrers(optimizer):
        owners = gc.get_referrers(holder) if isinstance(holder, dict) else [holder]
        if any(type(owner).__name__ == "AcceleratedOptimizer" for owner in owners):
            raise RuntimeError(
                "Lomo: accelerate accumulates gradients (accelerator.sync_gradients is False), and a step now would "
                "use those of this batch alone. Call lomo_kernels.integrations.accelerate.attach(accelerator) once, "
                "and accelerator.backward(loss) in place of optimizer.backward(loss). No weight was changed"
            )
