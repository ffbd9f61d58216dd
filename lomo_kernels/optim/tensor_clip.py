"""Clipping of each parameter's gradient by a norm of its own: AdaGC (arXiv 2502.11034).

The bound is `clip_tensor` times a running mean of the parameter's clipped norms. With n the norm of its gradient::

    the first 100 steps    h = the coefficient of clip_grad_norm, or 1;   mean = min(mean, h * n)
    later                  h = min(1, clip_tensor * mean / n);            mean = 0.99 * mean + 0.01 * h * n

The update takes h as its coefficient. A parameter knows its norm in its own hook, so one backward is enough. The mean
stays as it is when the gradient is zero or not finite, and in a step that is skipped: with a mean of zero a parameter
(of LoRA, say, whose first gradients are zero) would never move again. If a parameter's first gradient comes after the
first 100 steps, its norm becomes the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..ops.scalars import NAMES
from .engines.base import ParallelEngine
from .managed_parameter import DeviceState, ManagedParameter

#: Steps, those that were skipped not counted, in which the means are found.
WARM_UP = 100
DECAY = 0.99

_COEF, _FOUND_INF = NAMES.index("clip_coef"), NAMES.index("found_inf")


class _Cells(NamedTuple):
    """What one parameter's update reads, on its device."""

    vector: Tensor  # its scalars (`lomo_kernels.ops.scalars`), of which the next two are elements
    coef: Tensor
    found_inf: Tensor
    bound: Tensor


class _Table(NamedTuple):
    """The same of all parameters on one device, a row or an element for each."""

    device_state: DeviceState
    group_of: Tensor
    vectors: Tensor
    bounds: Tensor


class TensorClip:
    """The running means, and what follows from them for each update. All of it stays on the devices.

    Args:
        factor: `clip_tensor`.
        managed_params: all parameters.
        group_of: each one's group.
        devices: those of the parameters; the means are on the first one.
    """

    def __init__(
        self,
        factor: float,
        managed_params: Sequence[ManagedParameter],
        group_of: Sequence[int],
        devices: Mapping[torch.device, DeviceState],
    ) -> None:
        self._factor = factor
        self._tables: dict[torch.device, _Table] = {}
        for device, device_state in devices.items():
            index = torch.tensor(group_of, dtype=torch.int64, device="cpu").to(device)
            vectors = device_state.vectors.index_select(0, index)
            self._tables[device] = _Table(device_state, index, vectors, torch.zeros_like(vectors[:, 0]))
        first = next(iter(self._tables.values()))
        self.means = torch.full_like(first.bounds, math.inf)
        self._cells = []
        for managed in managed_params:
            _, _, vectors, bounds = self._tables.get(managed.device, first)
            row = vectors[managed.index]
            self._cells.append(_Cells(row, row[_COEF], row[_FOUND_INF], bounds[managed.index]))
        self._left: int | None = None  # steps of the warm-up; None: the device has to be asked

    # ---- The warm-up ------------------------------------------------------------------------------------------------

    def warms_up(self, step: Tensor, skipped: Tensor) -> bool:
        """Whether a step that begins now belongs to the warm-up. Waits for the device at the warm-up's ends only.

        Args:
            step, skipped: how many steps there were, and how many of them were skipped.

        Raises:
            RuntimeError: a CUDA graph is being captured, which would repeat the warm-up for ever.
        """
        if self._left != 0 and step.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"Lomo: a CUDA graph captures a step in which clip_tensor may still warm up. Run {WARM_UP + 1} steps "
                "before the capture. No weight was changed"
            )
        if self._left is None:
            simulated = isinstance(step, FakeTensor) or step.is_meta
            self._left = 0 if simulated else max(WARM_UP - int((step - skipped).item()), 0)
        return self._left > 0

    def count_step(self) -> None:
        """A step has ended."""
        if self._left:
            self._left = self._left - 1 or None  # some may have been skipped

    def load(self, means: Tensor) -> None:
        """Takes over the means of the first parameters. The others have had no step."""
        self.means.fill_(math.inf)
        self.means[: len(means)].copy_(means)
        self._left = None

    # ---- A step after it --------------------------------------------------------------------------------------------

    def begin_update(self) -> None:
        """Gives each parameter its group's scalars, and its bound."""
        bounds = self.means * self._factor
        for device_state, group_of, vectors, bound in self._tables.values():
            torch.index_select(device_state.vectors, 0, group_of, out=vectors)
            bound.copy_(bounds, non_blocking=bound.is_cuda)

    def vector(self, managed: ManagedParameter) -> Tensor:
        """The scalars of one parameter's update."""
        return self._cells[managed.index].vector

    def clip(self, managed: ManagedParameter) -> None:
        """Finds the coefficient of one parameter, whose slot has the sum of squares of its gradient. A parameter whose
        norm is not finite keeps its weights."""
        _, coef, found_inf, bound = self._cells[managed.index]
        torch.sqrt(managed.slot, out=coef)
        torch.div(bound, coef, out=coef)
        coef.clamp_(max=1.0)
        torch.mul(managed.slot, 0.0, out=found_inf)  # NaN, which is not zero, of infinity and of NaN

    def clip_over_ranks(self, managed_params: Sequence[ManagedParameter], engine: ParallelEngine) -> None:
        """`clip` of several parameters of one device, whose slots have the sums of this rank's parts."""
        squares = torch.stack([managed.slot * managed.weight for managed in managed_params])
        engine.sum_(squares)
        cells = [self._cells[managed.index] for managed in managed_params]
        coefs = (torch.stack([one.bound for one in cells]) / squares.sqrt()).clamp_(max=1.0)
        for one, coef, found_inf in zip(cells, coefs.unbind(), (squares * 0.0).unbind(), strict=True):
            one.coef.copy_(coef)
            one.found_inf.copy_(found_inf)

    def clip_all(self, squares: Tensor) -> None:
        """`clip` of all parameters, whose norms are known, as they are with dynamic loss scaling. Whether the step is
        skipped is in the scalars.

        Args:
            squares: sums of squares of whole gradients, float64 [parameters], on the first device.
        """
        norms = squares.sqrt()
        for _, _, vectors, bounds in self._tables.values():
            vectors[:, _COEF].copy_((bounds / norms.to(bounds.device)).clamp_(max=1.0))

    # ---- Its end ----------------------------------------------------------------------------------------------------

    def update_means(self, squares: Tensor, coef: Tensor | None, found_inf: Tensor | None) -> None:
        """Moves the means when a step has ended.

        Args:
            squares: as in `clip_all`.
            coef: by which a step of the warm-up was clipped; None: by nothing.
            found_inf: not zero if the step was skipped; None: it was not.
        """
        norms, means = squares.sqrt(), self.means
        if self._left:
            moved = torch.minimum(means, norms if coef is None else norms * coef)
        else:
            moved = DECAY * means + (1 - DECAY) * torch.minimum(norms, self._factor * means)
            moved = torch.where(means.isinf(), norms, moved)
        counts = norms.isfinite() & (norms > 0)
        if found_inf is not None:
            counts &= found_inf == 0
        means.copy_(torch.where(counts, moved, means))
