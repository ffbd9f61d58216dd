"""One step as an object with a lifetime: what a step that breaks off has left behind is taken away when it ends."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .owners import OptimizerBackward, optimizer_backward, set_optimizer_backward
from .passes import Pass, UpdatePass
from .records import Record
from .scaling import unscaled

_T = TypeVar("_T")


class Step:
    """What belongs to one call of `backward`, `step`, `grad_norm` or `fused_backward`, and to nothing after it.

    Args:
        records: all parameters of the optimizer.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self._grad_mode = torch.is_grad_enabled()
        self._around = optimizer_backward()
        self._backward: OptimizerBackward | None = None
        self._stood = [
            (record, grad, grad._version) for record in records if (grad := record.param.grad) is not None
        ]  # gradients of the user's, and their versions
        self._accumulated = any(not record.zeroed for record, _, _ in self._stood)
        self._consumed = False
        self._isolated: list[tuple[Tensor, Tensor | None]] = []  # leaves of others, and the gradients they had
        self.sink: Pass | None = None  # what hooks hand their gradients to; None: they stay in .grad
        self.adds_scaled = False  # whether the backward that now runs into .grad carries the loss scale
        self.update: UpdatePass | None = None
        self.applied = False  # every gradient was
        self.ended = False  # counted: an error after that is about gradients that are not finite
        self.taken_back = False  # nothing is left of it
        self.dropped = False  # whether gradients of the user's had to be

    @property
    def outcome(self) -> str:
        """What became of the weights: see `Lomo.last_step_outcome`."""
        if self.applied:
            return "complete"
        return "partial" if self.update is not None and self.update.changed else "unchanged"

    def isolate(self, leaves: Sequence[Tensor]) -> None:
        """Sets the gradients of others' leaves aside: a backward that is scaled, or one of two, is not to add to them.

        `rejoin` gives them back, or `take_back` if the backward fails.
        """
        self._isolated = [(leaf, leaf.grad) for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None

    def rejoin(self, scale: Tensor | None, *, wanted: bool) -> None:
        """Ends `isolate`. Leaves have the gradient then that a plain backward would have left there, or that they had
        before if this backward is not `wanted`."""
        made = [leaf.grad for leaf, _ in self._isolated]
        self._restore_isolated()
        for (leaf, _), grad in zip(self._isolated, made, strict=True):
            if grad is not None and wanted:
                # Not in place: autograd may have given the leaf the very memory of a gradient that a fused layer keeps.
                if scale is not None:
                    grad = unscaled(grad, scale)
                leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)
        self._isolated = []

    def enter(self, backward: OptimizerBackward) -> None:
        """The step's optimizer runs `backward` from here on, until `leave`."""
        self._backward = backward
        set_optimizer_backward(backward)
        backward.begin()

    def leave(self) -> None:
        """Ends `enter`."""
        if self._backward is not None:
            self._backward.end()
            set_optimizer_backward(self._around)
            self._backward = None

    def consume(self) -> None:
        """Takes the gradients out of ``.grad``: they are the step's own from here on, freed as they are applied."""
        self._consumed = True
        self._stood.clear()
        for record in self._records:
            record.param.grad = record.scaled_grad = record.zeros = None

    def take_back(self) -> None:
        """Called when the step has failed: leaves no gradient of it behind. Another call does what an interrupt kept
        this one from doing.

        Gradients that stood in ``.grad`` before are the user's. They stay if the step has neither added to them nor
        changed a weight; otherwise all are dropped, since they no longer belong to these weights or to one batch.
        """
        torch.set_grad_enabled(self._grad_mode)  # the interrupt may have come as a torch.no_grad() was to end
        self.leave()
        self._restore_isolated()
        stay = (
            (self.ended or self.outcome == "unchanged")
            and not self._consumed
            and all(record.param.grad is grad and grad._version == version for record, grad, version in self._stood)
        )
        theirs = {record.index for record, _, _ in self._stood} if stay else set()
        for record in self._records:
            if record.index not in theirs:
                record.param.grad = record.scaled_grad = record.zeros = None
        self.dropped = self._accumulated and not stay and not self.ended

    def _restore_isolated(self) -> None:
        for leaf, grad in self._isolated:
            leaf.grad = grad


class Steps:
    """Runs the steps of an optimizer, one after the other.

    Args:
        records: its parameters: its own list, which grows with it.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self._busy: Any = threading.RLock()  # held during a step
        self.current: Step | None = None  # the one that runs now
        self.outcome: str | None = None  # of the last one

    def run(self, optimizer: Any, run: Callable[[Step], _T]) -> _T:
        """Runs one step: another thread waits, and a hook that starts one inside another is told.

        However the step ends, nothing of it is left. An interrupt (Ctrl-C) may also come between any two lines of what
        takes a broken step back, and before the lock is given back: so both are done again if need be.
        """
        optimizer._check_not_wrapped()
        self.check_not_inside()
        try:
            with self._busy:
                return self._run(optimizer, Step(self._records), run)
        except BaseException:
            if self._busy._is_owned():
                self._busy.release()
            raise

    def _run(self, optimizer: Any, step: Step, run: Callable[[Step], _T]) -> _T:
        try:
            try:
                self.outcome = step.outcome
                self.current = step
                result = run(step)
                self.outcome = step.outcome
                self.current = None
                return result
            except BaseException:
                self._take_back(optimizer, step)
                raise
        except BaseException:
            self._take_back(optimizer, step)
            raise

    def _take_back(self, optimizer: Any, step: Step) -> None:
        """Leaves nothing of a step that has failed."""
        if step.taken_back:
            return
        self.current = None
        optimizer._norm_is_known = False
        self.outcome = step.outcome
        step.take_back()
        optimizer._state.level_steps()
        step.taken_back = True
        if step.dropped:
            warnings.warn(
                f"Lomo: a step broke off, and the gradients that stood in .grad before it were dropped with its own: "
                f"{'it had added to them' if step.outcome == 'unchanged' else 'some weights were updated already'}. "
                "Begin that step again, with its first backward",
                stacklevel=6,
            )

    def check_not_inside(self, refusal: str = "a step was started inside another one of the same optimizer") -> None:
        """Raises RuntimeError, which says `refusal`, if the caller is inside a step of this optimizer."""
        # On GPUs autograd runs hooks in threads of its own, which would wait here for the step that waits for them.
        in_backward = torch._C._current_graph_task_id() != -1
        if self._busy._is_owned() or (in_backward and self.current is not None):
            raise RuntimeError(f"Lomo: {refusal}")
