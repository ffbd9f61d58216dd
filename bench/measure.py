"""Interleaved timing, and results that say what they were measured on."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleave(contestants: dict[str, Callable[[int], Any]], rounds: int = 61) -> dict[str, list[float]]:
    """Seconds of each contestant in each round. Every round runs all, in rotated order; the first round is not counted.

    A contestant is called with a running number, to rotate its buffers, and may return the seconds itself.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    number = 0
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            number += 1
            start = time.perf_counter()
            own = contestants[name](number)
            spent = own if isinstance(own, float) else time.perf_counter() - start
            if turn:
                seconds[name].append(spent)
    return seconds


def ratios(limit: list[float], mine: list[float]) -> dict[str, float]:
    """Median and quartiles of limit / mine, round by round: the fraction of the limit's speed."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(limit, mine, strict=True)], n=4)
    return {"median": middle, "low": low, "high": high}


def allocations(step: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (> 0) and free (< 0) of CPU memory by torch during `step`, in order, those inside
    operators too."""
    kind = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind], profile_memory=True, acc_events=False) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_of(changes: list[int]) -> int:
    """The most bytes alive above what was alive before."""
    return max(itertools.accumulate(changes), default=0)


def commit() -> str:
    """The commit checked out, with "+" where files differ from it; LOMO_COMMIT where that is given."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=RESULTS, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no")
    return os.environ.get("LOMO_COMMIT") or git("rev-parse", "HEAD") + ("+" if changed else "") or "unknown"


def environment() -> dict[str, Any]:
    """Device, versions, commit and settings of this process."""
    import lomo_kernels  # not before: bench/gpu.py builds it

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "device": cpu[1] if cpu else platform.machine(),
        "instruction_set": lomo_kernels.backends.choice("CPU").detail,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lomo_kernels": lomo_kernels.__version__,
        "commit": commit(),
        "malloc": os.environ.get("MALLOC_MMAP_THRESHOLD_", "stock"),
    }


def write(sections: dict[str, Any], kind: str = "cpu") -> Path:
    """Writes one run's results to ``bench/results/<kind>-<instruction set>-<date>.json``."""
    RESULTS.mkdir(exist_ok=True)
    about = environment()
    path = RESULTS / f"{kind}-{about['instruction_set']}-{datetime.date.today()}.json"
    path.write_text(json.dumps({"environment": about, **sections}, indent=1) + "\n")
    return path
