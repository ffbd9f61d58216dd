"""An exception at every line of our Python that a step executes, as a signal's handler raises it between two lines."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lomo_kernels

from .scenes import Scene

PACKAGE = str(Path(lomo_kernels.__file__).parent)
KINDS: tuple[type[BaseException], ...] = (KeyboardInterrupt, RuntimeError, MemoryError)


class Tracer:
    """Raises an exception at the line with number `at`, counted from 0 over all frames of the library."""

    def __init__(self, at: int = -1, kind: type[BaseException] = KeyboardInterrupt) -> None:
        self.at, self.kind = at, kind
        self.lines = 0
        self.point = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_filename.endswith("backends.py"):
            return None  # a trace also stops at the end of a ``with``, before it is left: backends' lock would stay
        if event == "line":
            self.lines += 1
            if self.lines - 1 == self.at:
                self.point = f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno} ({self.kind.__name__})"
                raise self.kind(f"at {self.point}")
        return self

    def run(self, call: Callable[[], Any]) -> BaseException | None:
        """What `call` raised. Also traces the threads in which autograd may run hooks."""
        unraisable, sys.unraisablehook = sys.unraisablehook, lambda _: None  # Python drops what a finalizer raises
        threading.settrace(self)
        sys.settrace(self)
        try:
            call()
        except BaseException as error:
            return error
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            sys.unraisablehook = unraisable
        return None


def faults(scene: Scene, stride: int, offset: int) -> Iterator[tuple[str, str, str]]:
    """(point, outcome, what is wrong) for each line of one step, from `offset` on."""
    scene.reset()
    counter = Tracer()
    assert counter.run(scene.step) is None
    for number in range(offset % stride, counter.lines, stride):
        scene.reset()
        tracer = Tracer(number, KINDS[number % len(KINDS)])
        raised = tracer.run(scene.step)
        if raised is None:  # at an operation whose RuntimeError means something else to the library, or in a finalizer
            yield tracer.point, "no error", scene.check_close()
            continue
        raised = None  # its traceback keeps alive what the call has made
        yield tracer.point, str(scene.optimizer.last_step_outcome), scene.check(between_lines=True)
