"""Gradients that stand in ``.grad`` before a step, from plain backwards or `Lomo.accumulate`, and their loss scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .managed_parameter import ManagedParameter
from .scaling import LossScale, unscaled

_ONE_KIND = "Use optimizer.backward() for all parts of a step, and optimizer.zero_grad() to drop one"


class Accumulation:
    """What an optimizer knows of gradients in ``.grad``.

    Args:
        managed_params: its parameters: its own list, which grows with it.
    """

    def __init__(self, managed_params: Sequence[ManagedParameter]) -> None:
        self._managed_params = managed_params
        self._scale: Tensor | None = None  # the loss scale in the gradients that `Lomo.accumulate` left
        self._dtype: torch.dtype | None = None  # of the losses they came from

    def has_gradients(self) -> bool:
        return any(managed.param.grad is not None for managed in self._managed_params)

    def gradients(self) -> list[tuple[ManagedParameter, Tensor]]:
        """Those that plain backwards left in ``.grad``."""
        return [(managed, grad) for managed in self._managed_params if (grad := managed.param.grad) is not None]

    def scale_of(self, gradients: Sequence[tuple[ManagedParameter, Tensor]]) -> Tensor | None:
        """The loss scale that `gradients` carry. Raises RuntimeError if only some carry one."""
        if self._scale is None:
            return None
        kinds = {managed.scaled for managed, _ in gradients if not managed.zeroed}
        if len(kinds) == 2:
            raise RuntimeError(
                "Lomo: some gradients in .grad carry the loss scale (from accumulate()) and some do not (from a plain "
                f"backward). {_ONE_KIND}"
            )
        return self._scale if True in kinds else None

    def scale_for(
        self, loss: Tensor, gradients: Sequence[tuple[ManagedParameter, Tensor]], present: LossScale
    ) -> Tensor | None:
        """The loss scale for a backward from `loss` that adds to `gradients`: the one that they carry, or the `present`
        one if there are none yet.

        Raises:
            RuntimeError: only some of `gradients` carry one, or `loss` has another dtype than the losses before it.
        """
        fresh = all(managed.zeroed for managed, _ in gradients)
        if fresh and present.used:
            self._scale, self._dtype = present.of(loss), loss.dtype
        scale = self._scale if fresh else self.scale_of(gradients)
        if scale is not None and loss.dtype is not self._dtype:
            raise RuntimeError(
                f"Lomo: the loss has dtype {loss.dtype}, expected {self._dtype} as in the parts before. "
                "The loss scale is rounded to this dtype, so all parts of a step need the same"
            )
        return scale

    def note(self, managed: ManagedParameter, *, scaled: bool) -> None:
        """Called when a backward, `scaled` or not, has added to the parameter's ``.grad``.

        Raises:
            RuntimeError: it was not, and what it added to is.
        """
        if managed.param.grad is None:  # a custom layer that keeps it to itself
            return
        managed.zeros = None  # FSDP2 adds to the shard inside a DTensor, whose version stays as it was
        if scaled:
            managed.scaled_grad, managed.grad_scale = managed.param.grad, self._scale
        elif managed.scaled:
            raise RuntimeError(
                f"Lomo: a plain backward added to the gradient of {managed.name}. accumulate() left this gradient with "
                f"the loss scale in it. {_ONE_KIND}"
            )


@torch.no_grad()
def unscale_grads(managed_params: Iterable[ManagedParameter]) -> None:
    """Takes the loss scale out of what `Lomo.accumulate` left in ``.grad``: then it is what plain backwards leave."""
    for managed in managed_params:
        if managed.scaled_grad is not None and managed.scaled and managed.grad_scale is not None:
            managed.param.grad = unscaled(managed.scaled_grad, managed.grad_scale)
        managed.scaled_grad = managed.zeros = None
