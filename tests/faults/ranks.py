"""A rank that dies at every stage of a step: the other one gets an error in finite time, and keeps whole weights."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from support.engines import ENGINES, LR
from support.models import batch, same_bits
from support.processes import Failed, Processes
from torch import Tensor

from .lines import PACKAGE, Tracer

#: Seconds: of a collective operation; within which the rank that is left has to know.
TIMEOUT, LIMIT = 5.0, 15.0
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one pass": {"clip_grad_norm": 0.3, "clip_passes": "one"},
    "adalomo": {"rule": "adalomo"},
}
SPREADS = ("data parallel", "FSDP2", "tensor parallel")


class Exit(Tracer):
    """Ends the process at a line, as a kill does, or raises."""

    def __init__(self, at: int, way: str) -> None:
        super().__init__(at, ConnectionAbortedError)
        self.way = way

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if self.way == "dies" and event == "line" and self.lines == self.at:
            os._exit(9)
        super().__call__(frame, event, argument)
        return self if frame.f_code.co_filename.startswith(PACKAGE) else None


def step(rank: int, engine: str, settings: str, way: str, line: int, after: list[Tensor] | None) -> dict[str, Any]:
    """A step, in which rank 1 fails at the line of this number. What this rank has after it.

    Args:
        way: "dies", "raises", or "counts": nothing fails.
        after: this rank's weights after a step in which nothing fails.
    """
    spread = ENGINES[engine].spread(ENGINES[engine].make())
    optimizer = ENGINES[engine].lomo(spread, lr=LR, **SETTINGS[settings])
    module, (count, mine) = ENGINES[engine].module(spread), ENGINES[engine].batches()
    optimizer.backward(module(*batch(mine)))
    loss = module(*batch(count + mine))
    local = [managed.local for managed in optimizer._training.managed_params]
    before = [tensor.detach().clone() for tensor in local]
    tracer = Exit(line if rank == 1 else -1, way)
    dist.barrier()
    begin = time.monotonic()
    error = tracer.run(lambda: optimizer.backward(loss))
    seconds = time.monotonic() - begin
    if rank == 1 and error is not None:
        time.sleep(TIMEOUT + 2)  # alive, and not answering
    now = [tensor.detach().clone() for tensor in local]
    torn = 0
    if after is not None:
        sides = zip(now, before, after, strict=True)
        torn = sum(not (same_bits(new, old) or same_bits(new, end)) for new, old, end in sides)
    return {
        "lines": tracer.lines,
        "error": "" if error is None else f"{type(error).__name__}: {error}",
        "notes": getattr(error, "__notes__", []),
        "seconds": seconds,
        "outcome": optimizer.last_step_outcome,
        "changed": any(not same_bits(new, old) for new, old in zip(now, before, strict=True)),
        "torn": torn,
        "steps": int(optimizer.step_count),
        "weights": now,
    }


def faults(engine: str, settings: str, points: int, way: str = "dies") -> Iterator[tuple[str, str, str]]:
    """(point, outcome on the rank that is left, what is wrong)."""
    whole = _two(engine, settings, "counts", -1, None)
    lines, after = whole[1]["lines"], whole[0]["weights"]
    for point in range(points):
        line = lines * (2 * point + 1) // (2 * points)
        left = _two(engine, settings, way, line, after)[0]
        said = f"{engine}, {settings}, rank 1 {way} at line {line} of {lines}"
        if isinstance(left, Failed):
            yield said, "failed", left.text
        else:
            yield said, left["outcome"], _wrong(left)


def _two(engine: str, settings: str, way: str, line: int, after: Any) -> list[Any]:
    processes = Processes(2, timeout=TIMEOUT)
    try:
        return processes.outcomes(step, engine, settings, way, line, after)
    finally:
        processes.close()


def _wrong(left: dict[str, Any]) -> str:
    if left["seconds"] > LIMIT:
        return f"{left['seconds']:.0f} s until the error"
    if left["torn"]:
        return f"{left['torn']} torn weights"
    if not left["error"] and left["outcome"] != "complete":
        return f"no error, and {left['outcome']}"
    if left["outcome"] == "unchanged" and left["changed"]:
        return "'unchanged', but weights were changed"
    if left["steps"] != 1 and left["outcome"] != "complete":
        return f"{left['outcome']}, and {left['steps']} steps"
    if left["error"] and not (left["notes"] or left["error"].partition(": ")[2].startswith("Lomo:")):
        return f"no word on the weights: {left['error']}"
    return ""
