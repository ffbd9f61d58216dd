"""The pass that clips each parameter's gradient by its own norm: see `tensor_clip`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .factor_store import SavedFactors
from .managed_parameter import ManagedParameter
from .passes import NormPass, UpdatePass
from .tensor_clip import TensorClip

# How many gradients wait for each other if ranks have parts of them. A block of a transformer has about as many.
BATCH = 8


class TensorClipPass(UpdatePass, NormPass):
    """Finds the norm of each gradient, then its clip coefficient, then updates. It needs no other gradient.

    If ranks have parts of gradients, some gradients wait for each other, because one message brings all their norms.
    """

    kept_if_not_finite = "parameters"

    def __init__(self, *args: Any, tensor_clip: TensorClip, **options: Any) -> None:
        super().__init__(*args, vector_of=tensor_clip.scalars.vector, norm_known=True, **options)
        self._clip = tensor_clip
        engine = tensor_clip.engine  # the gradients that come may be local ones already, and `self._engine` None
        if engine is not None and not engine.has_whole_grads:
            self._batch = BATCH  # a count, because parts have different sizes and ranks must send alike

    def _handle(self, managed: ManagedParameter, grad: Tensor) -> None:
        NormPass._handle(self, managed, grad)
        self._clip.clip(managed)
        UpdatePass._handle(self, managed, grad)

    def _handle_list(self, managed_params: Sequence[ManagedParameter], grads: list[Tensor]) -> None:
        NormPass._handle_list(self, managed_params, grads)
        if self._batch and self._clip.engine is not None:
            self._clip.clip_over_ranks(managed_params, self._clip.engine)
        else:
            for managed in managed_params:
                self._clip.clip(managed)
        UpdatePass._handle_list(self, managed_params, grads)

    def _handle_factors(self, managed: ManagedParameter, grad: Tensor | None, saved: Sequence[SavedFactors]) -> None:
        NormPass._handle_factors(self, managed, grad, saved)
        self._clip.clip(managed)
        UpdatePass._handle_factors(self, managed, grad, saved)
