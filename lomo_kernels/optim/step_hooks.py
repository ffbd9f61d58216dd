"""Calls torch's step hooks, and marks its profiler's trace, around each call that makes a step: once per step."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch._C._autograd import _profiler_enabled
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_P = ParamSpec("_P")
_R = TypeVar("_R")
Method = Callable[Concatenate[Any, _P], _R]


def as_step(makes_step: Callable[..., bool]) -> Callable[[Method[_P, _R]], Method[_P, _R]]:
    """Makes a method of an optimizer call step hooks as torch's `Optimizer.step` does, with the method's arguments.

    Without hooks and profiler the method is called directly: torch's mark in the trace takes 20 us.

    Args:
        makes_step: called with the method's arguments; says whether this call makes a step. If not, it runs without
            hooks. So does a call inside another step of the same thread (``optimizer.backward`` in the closure of
            ``optimizer.step``).
    """

    def decorate(method: Method[_P, _R]) -> Method[_P, _R]:
        with_hooks = Optimizer.profile_hook_step(method)

        @functools.wraps(method)
        def call(self: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            # In a function under torch.compile. Its graph ends before a step.
            if torch.compiler.is_dynamo_compiling():
                return untraced(self, *args, **kwargs)
            if not _is_watched(self):
                return method(self, *args, **kwargs)
            thread = threading.get_ident()
            if thread in self._stepping or not makes_step(self, *args, **kwargs):
                return method(self, *args, **kwargs)
            try:
                try:
                    self._training.steps.outcome = "unchanged"  # until the step begins: a hook before it may fail
                    self._stepping.add(thread)
                    return with_hooks(self, *args, **kwargs)
                finally:
                    self._stepping.discard(thread)
            finally:
                self._stepping.discard(thread)  # once more, in case an interrupt has kept the line above from running

        call.hooked = True  # type: ignore[attr-defined]  # torch wraps a `step` without this mark once more
        untraced = _disable_dynamo(call)
        return call

    return decorate


def _is_watched(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or _profiler_enabled()
    )
