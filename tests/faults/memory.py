"""Memory that runs out at every allocation of a tensor, in Python, in torch's kernels and in ours."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import lomo_kernels_testing
import torch

from .scenes import Scene

KINDS = ("RuntimeError", "OutOfMemoryError", "bad_alloc")

_library = ctypes.CDLL(str(Path(lomo_kernels_testing.__file__).parent / "failing_memory.so"))
_library.failing_memory_arm.argtypes = [ctypes.c_int64, ctypes.c_int]
_library.failing_memory_count.restype = ctypes.c_int64


def arm(number: int, kind: str) -> None:
    """The allocation with this number fails, once."""
    _library.failing_memory_arm(number, KINDS.index(kind))


def disarm() -> int:
    """Returns the allocations since the last call."""
    count: int = _library.failing_memory_count()
    _library.failing_memory_arm(-1, 0)
    return count


def faults(scene: Scene, stride: int, offset: int) -> Iterator[tuple[str, str, str]]:
    """(point, outcome, what is wrong) for each allocation of one step, from `offset` on."""
    scene.reset()
    disarm()
    scene.step()
    allocations = disarm()
    for number in range(offset % stride, allocations, stride):
        scene.reset()
        kind = KINDS[number % len(KINDS)]
        arm(number, kind)
        raised: BaseException | None = None
        try:
            scene.step()
        except (RuntimeError, MemoryError) as error:
            raised = error
        disarm()
        point = f"allocation {number} of {allocations} ({kind})"
        if raised is None:
            yield point, "swallowed", "no error came"
            continue
        outcome = str(scene.optimizer.last_step_outcome)
        wrong = scene.check()
        yield point, outcome, wrong or _unsaid(raised, outcome, kind)


def _unsaid(error: BaseException, outcome: str, kind: str) -> str:
    """What the error lacks: its type, or words."""
    if kind == "OutOfMemoryError" and not isinstance(error, torch.OutOfMemoryError):
        return f"a {type(error).__name__}: {error}"[:300]
    if not hasattr(error, "add_note"):  # Python 3.10
        return ""
    words = "".join([str(error), *getattr(error, "__notes__", ())])
    if kind != "bad_alloc" and "memory" not in words:
        return f"no word of memory: {error}"[:300]
    said = outcome == "unchanged" or f"last_step_outcome is {outcome!r}" in words
    return "" if said else f"no word of what became of the weights: {words}"[:300]
