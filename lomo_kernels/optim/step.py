"""One step as an object: when a step breaks off, it removes what this step has left behind."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .managed_parameter import ManagedParameter
from .out_of_memory import as_out_of_memory
from .owners import OptimizerBackward, optimizer_backward, set_optimizer_backward
from .passes import Pass, UpdatePass
from .scaling import unscaled

_T = TypeVar("_T")

#: What to do after an error, by the step's outcome.
_NOTES = {
    "unchanged": "the step broke off before a weight was changed; the batch can be run again",
    "partial": "the step broke off amid its updates: some weights are new, the others old; load the last checkpoint",
    "complete": "the step had updated all weights, and was counted; do not run the batch again",
}


class Step:
    """What belongs to one call of `backward`, `step`, `grad_norm` or `fused_backward`. It lives as long as the call.

    Args:
        managed_params: all parameters of the optimizer.
    """

    def __init__(self, managed_params: Sequence[ManagedParameter]) -> None:
        self._managed_params = managed_params
        self._grad_mode = torch.is_grad_enabled()
        self._around = optimizer_backward()
        self._backward: OptimizerBackward | None = None
        self._stood = [
            (managed, grad, grad._version) for managed in managed_params if (grad := managed.param.grad) is not None
        ]  # the user's gradients, and their versions
        self._accumulated = any(not managed.zeroed for managed, _, _ in self._stood)
        self._consumed = False
        self._isolated: list[tuple[Tensor, Tensor | None]] = []  # unmanaged leaves, and the gradients they had
        self.sink: Pass | None = None  # hooks hand gradients to it; None: gradients stay in .grad
        self.adds_scaled = False  # whether a backward that adds to .grad runs now, with the loss scale
        self.update: UpdatePass | None = None
        self.applied = False  # every gradient was applied
        self.finish: Callable[[], None] | None = None  # called if the step breaks off after its last update
        self.ended = False  # the step was counted; an error after that is about gradients that are not finite
        self.taken_back = False  # `take_back` is done
        self.dropped = False  # `take_back` had to drop gradients of the user's

    @property
    def outcome(self) -> str:
        """What happened to the weights: see `Lomo.last_step_outcome`."""
        if self.applied:
            return "complete"
        return "partial" if self.update is not None and self.update.changed else "unchanged"

    def isolate(self, leaves: Sequence[Tensor]) -> None:
        """Sets aside the gradients of unmanaged leaves. A scaled backward, or one of two, must not add to them.

        `rejoin` gives them back, or `take_back` if the backward fails.
        """
        self._isolated = [(leaf, leaf.grad) for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None

    def rejoin(self, scale: Tensor | None, *, wanted: bool) -> None:
        """Ends `isolate`. Leaves then have the gradient that a plain backward would have left. If this backward is not
        `wanted`, they have the gradient that they had before."""
        made = [leaf.grad for leaf, _ in self._isolated]
        self._restore_isolated()
        for (leaf, _), grad in zip(self._isolated, made, strict=True):
            if grad is not None and wanted:
                # Not in place: a fused layer may keep the same memory as its gradient.
                if scale is not None:
                    grad = unscaled(grad, scale)
                leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)
        self._isolated = []

    @property
    def isolated_grads(self) -> bool:
        """Whether an unmanaged leaf has got a gradient since `isolate`."""
        return any(leaf.grad is not None for leaf, _ in self._isolated)

    def enter(self, backward: OptimizerBackward) -> None:
        """`backward` is the backward that runs, from here on until `leave`."""
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
        """Takes the gradients out of ``.grad``. From here on they are the step's own, freed when applied."""
        self._consumed = True
        self._stood.clear()
        for managed in self._managed_params:
            managed.param.grad = managed.scaled_grad = managed.zeros = None

    def take_back(self) -> None:
        """Removes all gradients of a step that has failed. An interrupt may cut it short; then it is called again.

        Gradients that were in ``.grad`` before the step are the user's. They stay if the step has not added to them and
        has changed no weight. Otherwise all are dropped: they no longer belong to these weights or to one batch.
        """
        torch.set_grad_enabled(self._grad_mode)  # an interrupt may have kept torch.no_grad() from ending
        self.leave()
        self._restore_isolated()
        stay = (
            (self.ended or self.outcome != "partial")
            and not self._consumed
            and all(managed.param.grad is grad and grad._version == version for managed, grad, version in self._stood)
        )
        theirs = {managed.index for managed, _, _ in self._stood} if stay else set()
        for managed in self._managed_params:
            if managed.index not in theirs:
                managed.param.grad = managed.scaled_grad = managed.zeros = None
        self.dropped = self._accumulated and not (stay or self.applied or self.ended)

    def _restore_isolated(self) -> None:
        for leaf, grad in self._isolated:
            leaf.grad = grad


#: All that are in use.
_live: weakref.WeakSet[Steps] = weakref.WeakSet()


class Steps:
    """Runs the steps of an optimizer, one after the other.

    Args:
        managed_params: its parameters: its own list, which grows with it.
    """

    def __init__(self, managed_params: Sequence[ManagedParameter]) -> None:
        self._managed_params = managed_params
        self._busy: Any = threading.RLock()  # held during a step
        self.current: Step | None = None  # the one that runs now
        self.outcome: str | None = None  # of the last one
        _live.add(self)

    def run(self, training: Any, run: Callable[[Step], _T]) -> _T:
        """Runs one step. Another thread waits. A hook that starts a step inside another one gets an error.

        A step that fails leaves nothing behind. An interrupt (Ctrl-C) may come between any two lines, also while a
        broken step is removed and before the lock is released. So both are done again if needed.
        """
        self.check_not_inside()
        try:
            with self._busy:
                return self._run(training, Step(self._managed_params), run)
        except BaseException as error:
            if self._busy._is_owned():
                self._busy.release()
            explained = as_out_of_memory(error)
            self._describe(explained)
            if explained is error:
                raise
            raise explained from error

    def _describe(self, error: BaseException) -> None:
        """Adds to the traceback what became of the weights. Our own errors say that themselves."""
        message = error.args[0] if error.args and isinstance(error.args[0], str) else ""
        if not hasattr(error, "add_note") or message.startswith("Lomo:"):  # notes came with Python 3.11
            return
        error.add_note(f"Lomo: {_NOTES[self.outcome or 'unchanged']} (last_step_outcome is {self.outcome!r})")

    def between(self, call: str, run: Callable[[], _T]) -> _T:
        """Calls `run` while no step runs: waits for that of another thread.

        Args:
            call: what calls it, for an error.

        Raises:
            RuntimeError: the caller is inside a step, which has updated some weights and not others.
        """
        if self._busy._is_owned() and self.current is None:  # a hook inside another such call, as of `load_state_dict`
            return run()
        self.check_not_inside(
            f"{call} came inside a step of the same optimizer, whose weights are old and new; call it after the step"
        )
        try:
            self._busy.acquire()
            result = run()
            self._busy.release()
            return result
        except BaseException:  # also at the end of `run`
            if self._busy._is_owned():
                self._busy.release()
            raise

    def _run(self, training: Any, step: Step, run: Callable[[Step], _T]) -> _T:
        try:
            try:
                self.outcome = step.outcome
                self.current = step
                result = run(step)
                self.outcome = step.outcome
                self.current = None
                return result
            except BaseException:
                self._take_back(training, step)
                raise
        except BaseException:
            self._take_back(training, step)
            raise

    def _take_back(self, training: Any, step: Step) -> None:
        """Removes everything that a failed step has left."""
        if step.taken_back:
            return
        self.current = None
        training.norm_is_known = False
        self.outcome = step.outcome
        step.take_back()
        if step.finish is not None and not step.ended:
            step.finish()
        step.finish = None
        training.state.forget_norms()
        training.state.strategy.forget_count()
        step.taken_back = True
        if step.dropped:
            warnings.warn(
                f"Lomo: a step broke off. The gradients that were in .grad before it were dropped with its own: "
                f"{'it had added to them' if step.outcome == 'unchanged' else 'some weights were updated already'}. "
                "Begin the step again with its first backward",
                stacklevel=6,
            )

    def after_fork(self) -> None:
        """In a child that was forked: the thread whose step ran does not exist here. The step has broken off."""
        if not self._busy._is_owned():
            self._busy = threading.RLock()
            self.outcome = self.outcome if self.current is None else self.current.outcome
            self.current = None

    def check_not_inside(
        self, refusal: str = "a step was started inside another step of the same optimizer; start it after that step"
    ) -> None:
        """Raises RuntimeError, which says `refusal`, if the caller is inside a step of this optimizer."""
        # On GPUs autograd runs hooks in threads of its own, which would wait here for the step that waits for them.
        in_backward = torch._C._current_graph_task_id() != -1
        if self._busy._is_owned() or (in_backward and self.current is not None):
            raise RuntimeError(f"Lomo: {refusal}")


def _after_fork() -> None:
    for steps in list(_live):
        steps.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
