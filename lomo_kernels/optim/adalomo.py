"""`AdaLomo`: AdaLomo (arXiv 2310.10195) under the name and with the arguments of lomo_optim."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .factored_rules import AdaLomoRule
from .lomo import Lomo


class AdaLomo(Lomo):
    """`Lomo` with ``rule="adalomo"``: adaptive like AdamW, with one float32 number of state per row and per column.

    The update is scaled by each weight's own size, so one learning rate suits all layers. The paper takes 5e-4 for
    instruction tuning and 1e-3 for further pre-training. The rule needs no norm of all gradients. So one backward is
    enough, unless you set `clip_grad_norm` (the paper does not) or float16 needs a loss scale.

    Args:
        model, lr, clip_grad_norm, clip_grad_value, weight_decay: as in `Lomo`. Decay is ``lr * weight_decay``;
            lomo_optim also multiplies the decay by the weight's size.
        loss_scale: as in `Lomo`. lomo_optim's default is 1024, a constant.
        eps: added to the squares of the gradient, and the least size of a weight that an update is scaled by.
        clip_threshold: bound on the RMS of an update before it is scaled by the weight's size.
        decay_rate: the state keeps the share ``1 - t ** decay_rate`` of its former value at step t.
        options: of `Lomo`, except ``rule`` and ``clip_tensor``.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `Lomo`.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        loss_scale: float | str | None = "auto",
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | Tensor | None = None,
        weight_decay: float | Tensor = 0.0,
        **options: Any,
    ) -> None:
        rule = AdaLomoRule(eps, clip_threshold, decay_rate)
        super().__init__(
            model,
            lr,
            clip_grad_norm,
            clip_grad_value,
            weight_decay=weight_decay,
            loss_scale=loss_scale,
            rule=rule,
            **options,
        )
