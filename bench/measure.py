"""Timing in rounds, so that what is compared ran side by side; and what it ran on."""

from __future__ import annotations

import datetime
import gc
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .results import RESULTS, SHORT

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = 5e-4  # seconds that a sample takes at least: short calls are repeated, the clock and its call cost 0.1 us
BUDGET = 0.6  # seconds that a contestant's rounds take together, within the limits of ROUNDS
ROUNDS = (9, 41)


class Clock:
    """pytest-benchmark's timer. It stands but for the seconds that samples add, so its table shows single calls."""

    seconds = 0.0

    @classmethod
    def read(cls) -> float:
        return cls.seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def repeated(device: str, *calls: Callable[[int], Any]) -> list[Callable[[], float]]:
    """For each call a function that calls it, with a running number to rotate buffers, as often as a sample takes, and
    returns the seconds of one call. On a GPU calls are queued and the last one is waited for.

    The number runs on over all of them: with numbers of their own, a call would find in the cache what the one before
    it has just used."""
    numbers = itertools.count()
    return [_repeated(device, call, numbers) for call in calls]


def _repeated(device: str, call: Callable[[int], Any], numbers: Iterator[int]) -> Callable[[], float]:
    times = 1

    def sample() -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            call(next(numbers))
        synchronize(device)
        return (time.perf_counter() - start) / times

    sample()  # the first call sets up
    while (spent := sample() * times) < SAMPLE:
        times = max(2 * times, min(math.ceil(SAMPLE / spent * times), 100 * times))
    return sample


def rounds_for(seconds: float, processes: int, budget: float = BUDGET) -> int:
    """How many rounds of so many seconds each of some processes runs, to fill the budget together."""
    return -(-min(max(int(budget / seconds), ROUNDS[0]), ROUNDS[1]) // processes)


def interleave(contestants: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
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


def memory_of(step: Callable[[], object], device: str) -> tuple[int, int]:
    """Bytes of tensors that `step` leaves behind, and the most alive during it, above what was there before."""
    gc.collect()
    if device == "cpu":
        changes = allocations(step)
        return sum(changes), peak_of(changes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before


def commit() -> str:
    """The commit checked out, with "+" where files differ from it; LOMO_COMMIT where that is given."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results", ":!*.md")
    return os.environ.get("LOMO_COMMIT") or git("rev-parse", "HEAD") + ("+" if changed else "") or "unknown"


def installed(package: str) -> str:
    """The version of a package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def environment(device: str) -> dict[str, Any]:
    """Device ("cpu" or "cuda"), driver, versions and commit."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    about: dict[str, Any] = {
        "device": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
    }
    if device == "cuda":
        about["device"] = torch.cuda.get_device_name()
        about["capability"] = list(torch.cuda.get_device_capability())
        about["driver"] = _said(r"([\d.]+)", "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        about["nvcc"] = _said(r"V([\d.]+)", "nvcc", "--version")
    return about | {
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "lomo_kernels": installed("lomo_kernels"),
        "peers": {package: installed(package) for package in ("lomo-optim", "torch-optimi")},
        "commit": commit(),
    }


def _said(pattern: str, *command: str) -> str:
    """What a program says of itself, or "none"."""
    if not shutil.which(command[0]):
        return "none"
    found = re.search(pattern, subprocess.run(command, capture_output=True, text=True).stdout)
    return found[1] if found else "none"


def todays_file(device: str, *, short: bool = False) -> Path:
    """Of results: ``bench/results/<device>-<date>.json``, ``…-short.json`` for less than every case; a processor is
    named with its best instruction set."""
    name = environment(device)["device"]
    if device == "cpu":
        from lomo_kernels import backends  # not at import: bench/gpu.py builds it

        name = f"{name} {backends.choice('CPU').detail}"
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / f"{name}-{datetime.date.today()}{SHORT * short}.json"
