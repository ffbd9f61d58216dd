"""Gradients that stand in ``.grad`` before a step, from plain backwards or `Lomo.accumulate`, and their loss scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .records import Record
from .scaling import LossScale, unscaled

_ONE_KIND = "Use optimizer.backward() for all parts of a step, and optimizer.zero_grad() to drop one"


class Accumulation:
    """What an optimizer knows of gradients in ``.grad``.

    Args:
        records: its parameters: its own list, which grows with it.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self._scale: Tensor | None = None  # the loss scale in the gradients that `Lomo.accumulate` left
        self._dtype: torch.dtype | None = None  # of the losses they came from

    def has_gradients(self) -> bool:
        return any(record.param.grad is not None for record in self._records)

    def gradients(self) -> list[tuple[Record, Tensor]]:
        """Those that plain backwards left in ``.grad``."""
        return [(record, grad) for record in self._records if (grad := record.param.grad) is not None]

    def scale_of(self, gradients: Sequence[tuple[Record, Tensor]]) -> Tensor | None:
        """The loss scale that `gradients` carry. Raises RuntimeError if only some carry one."""
        if self._scale is None:
            return None
        kinds = {record.scaled for record, _ in gradients if not record.zeroed}
        if len(kinds) == 2:
            raise RuntimeError(
                "Lomo: some gradients in .grad carry the loss scale (from accumulate()) and some do not (from a plain "
                f"backward). {_ONE_KIND}"
            )
        return self._scale if True in kinds else None

    def scale_for(self, loss: Tensor, gradients: Sequence[tuple[Record, Tensor]], present: LossScale) -> Tensor | None:
        """The loss scale for a backward from `loss` that adds to `gradients`: the one that they carry, or the `present`
        one if there are none yet.

        Raises:
            RuntimeError: only some of `gradients` carry one, or `loss` has another dtype than the losses before it.
        """
        fresh = all(record.zeroed for record, _ in gradients)
        if fresh and present.used:
            self._scale, self._dtype = present.of(loss), loss.dtype
        scale = self._scale if fresh else self.scale_of(gradients)
        if scale is not None and loss.dtype is not self._dtype:
            raise RuntimeError(
                f"Lomo: the loss has dtype {loss.dtype}, expected {self._dtype} as in the parts before. "
                "The loss scale is rounded to this dtype, so all parts of a step need the same"
            )
        return scale

    def note(self, record: Record, *, scaled: bool) -> None:
        """Called when a backward, `scaled` or not, has added to the parameter's ``.grad``.

        Raises:
            RuntimeError: it was not, and what it added to is.
        """
        if record.param.grad is None:  # a custom layer that keeps it to itself
            return
        record.zeros = None  # FSDP2 adds to the shard inside a DTensor, whose version stays as it was
        if scaled:
            record.scaled_grad, record.grad_scale = record.param.grad, self._scale
        elif record.scaled:
            raise RuntimeError(
                f"Lomo: a plain backward added to the gradient of {record.name}. accumulate() left this gradient with "
                f"the loss scale in it. {_ONE_KIND}"
            )


@torch.no_grad()
def unscale_grads(records: Iterable[Record]) -> None:
    """Takes the loss scale out of what `Lomo.accumulate` left in ``.grad``: then it is what plain backwards leave."""
    for record in records:
        if record.scaled_grad is not None and record.scaled and record.grad_scale is not None:
            record.param.grad = unscaled(record.scaled_grad, record.grad_scale)
        record.scaled_grad = record.zeros = None
