"""Clipping of each parameter's gradient by its own norm: AdaGC (arXiv 2502.11034).

The norm of a gradient is bounded by `clip_tensor` times a running mean of the parameter's clipped norms. With n the
norm of the gradient::

    the first 100 steps    h = the coefficient of clip_grad_norm, or 1;   mean = min(mean, h * n)
    later                  h = min(1, clip_tensor * mean / n);            mean = 0.99 * mean + 0.01 * h * n

The update multiplies the gradient by h. The norm is known in the parameter's own hook, so one backward is enough. The
mean stays as it is if the gradient is zero or not finite, and in a step that is skipped. With a mean of zero a
parameter would never move again. If a parameter's first gradient comes after the first 100 steps, its norm becomes the
mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .engines.base import ParallelEngine
from .managed_parameter import ManagedParameter
from .parameter_scalars import ParameterScalars

#: The first steps, which find the means. Skipped steps do not count.
WARM_UP = 100
DECAY = 0.99


def _coefficients(squares: Tensor, bounds: Tensor, out: Tensor | None = None) -> Tensor:
    """h = min(1, bound / norm), from the norms' squares. It is NaN or 0 if a norm is not finite."""
    norms = torch.sqrt(squares, out=out)
    return torch.div(bounds, norms, out=out).clamp_(max=1.0)


class TensorClip:
    """The running means, and the clip coefficients that follow from them. All of them stay on the devices.

    Args:
        factor: `clip_tensor`.
        scalars: of each parameter's update. This class sets their clip coefficients.
        devices: those of the parameters. The means are on the first one.
        parameters: the number of parameters.
        engine: adds up over ranks that have parts of a parameter; None: there is one process.
    """

    def __init__(
        self,
        factor: float,
        scalars: ParameterScalars,
        devices: Iterable[torch.device],
        parameters: int,
        engine: ParallelEngine | None,
    ) -> None:
        self._factor = factor
        self.engine = engine
        self.scalars = scalars
        self._bounds = {device: torch.zeros(parameters, dtype=torch.float64, device=device) for device in devices}
        self.means = torch.full_like(next(iter(self._bounds.values())), math.inf)
        self._left_before = 0  # steps that were left when the device was last asked
        self._left: int | None = None  # steps of the warm-up; None: the device has to be asked

    # ---- The warm-up ------------------------------------------------------------------------------------------------

    def warms_up(self, step: Tensor, skipped: Tensor) -> bool:
        """Whether a step that begins now belongs to the warm-up. The host waits for the device only when the warm-up
        begins, and when it may have ended.

        Args:
            step, skipped: the number of steps so far, and how many of them were skipped.

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
            if self._left and self._left == self._left_before:
                warnings.warn(
                    f"Lomo: all of the last {self._left} steps had a gradient that is not finite, so clip_tensor still "
                    "finds its means and clips nothing by them. optimizer.grad_norms() says whose gradient it is",
                    stacklevel=10,
                )
            self._left_before = self._left
        return self._left > 0

    def count_step(self) -> None:
        """A step has ended."""
        if self._left:
            self._left = self._left - 1 or None  # some may have been skipped

    def forget_count(self) -> None:
        """A step broke off, perhaps while it was counted. The next step asks the device how many there were."""
        self._left, self._left_before = None, 0

    def load(self, means: Tensor) -> None:
        """Takes over the means of the first parameters. The others have had no step."""
        self.means.fill_(math.inf)
        self.means[: len(means)].copy_(means)
        self.forget_count()

    # ---- A step after the warm-up -----------------------------------------------------------------------------------

    def begin_update(self) -> None:
        """Gives each parameter its group's scalars, and its bound."""
        self.scalars.begin_update()
        bounds = self.means * self._factor
        for bound in self._bounds.values():
            bound.copy_(bounds, non_blocking=bound.is_cuda)

    def _bound(self, managed: ManagedParameter) -> Tensor:
        return self._bounds[managed.device][managed.index]

    def clip(self, managed: ManagedParameter) -> None:
        """Finds the coefficient of one parameter, whose slot has the sum of squares of its gradient. A parameter whose
        norm is not finite keeps its weights."""
        _, coef, found_inf = self.scalars.cells(managed)
        _coefficients(managed.slot, self._bound(managed), out=coef)
        torch.mul(managed.slot, 0.0, out=found_inf)  # NaN, which is not zero, of infinity and of NaN

    def clip_over_ranks(self, managed_params: Sequence[ManagedParameter], engine: ParallelEngine) -> None:
        """`clip` of several parameters on one device. Their slots hold the sums of squares of this rank's parts."""
        squares = torch.stack([managed.slot * managed.weight for managed in managed_params])
        engine.sum_(squares)
        bounds = torch.stack([self._bound(managed) for managed in managed_params])
        coefs = _coefficients(squares, bounds)
        for managed, coef, found_inf in zip(managed_params, coefs.unbind(), (squares * 0.0).unbind(), strict=True):
            cells = self.scalars.cells(managed)
            cells.clip_coef.copy_(coef)
            cells.found_inf.copy_(found_inf)

    def clip_all(self, squares: Tensor) -> None:
        """`clip` of all parameters at once, if all norms are known before the update: with dynamic loss scaling. The
        scalars already say whether the step is skipped.

        Args:
            squares: sums of squares of whole gradients, float64 [parameters], on the first device.
        """
        self.scalars.set_coefs(_coefficients(squares, self._bounds[self.means.device]))

    # ---- The end of a step ------------------------------------------------------------------------------------------

    def means_after_step(self, squares: Tensor, coef: Tensor | None, found_inf: Tensor | None) -> Tensor:
        """What the means become when a step ends.

        Args:
            squares: as in `clip_all`.
            coef: the coefficient that clipped a step of the warm-up; None: nothing was clipped.
            found_inf: not zero if the step was skipped; None: it was not.
        """
        norms, means = squares.sqrt(), self.means
        if self._left:
            moved = torch.minimum(means, norms if coef is None else norms * coef)
        else:
            clipped = torch.minimum(norms, self._bounds[means.device])  # h * n
            moved = DECAY * means + (1 - DECAY) * clipped
            moved = torch.where(means.isinf(), norms, moved)
        counts = norms.isfinite() & (norms > 0)
        if found_inf is not None:
            counts &= found_inf == 0
        return torch.where(counts, moved, means)
