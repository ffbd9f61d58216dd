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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .results import RESULTS, SHORT, commit

if TYPE_CHECKING:
    from lomo_kernels.plan.methods import Method

#: Seconds that a sample takes at least; short calls are repeated. A CPU's clock and its call cost 0.1 us. On a GPU the
#: first launch after an event costs some 10 us, 0.2% of 5 ms.
SAMPLE = {"cpu": 5e-4, "cuda": 5e-3}
BUDGET = 0.6  # seconds that a contestant's rounds take together, within the limits of ROUNDS
ROUNDS = (9, 41)


class Clock:
    """pytest-benchmark's timer. It stands but for the seconds that samples add, so its table shows single calls."""

    seconds = 0.0

    @classmethod
    def read(cls) -> float:
        return cls.seconds


def repeated(device: str, *calls: Callable[[int], Any]) -> list[Callable[[], float]]:
    """For each call a function that calls it, with a running number to rotate buffers, as often as a sample takes, and
    returns the seconds of one call. On a GPU they are queued between two events, whose times are the GPU's own.

    The number runs on over all of them: with numbers of their own, a call would find in the cache what the one before
    it has just used."""
    numbers = itertools.count()
    return [_repeated(device, call, numbers) for call in calls]


def _repeated(device: str, call: Callable[[int], Any], numbers: Iterator[int]) -> Callable[[], float]:
    times = 1

    def sample() -> float:
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            calls()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / times
        start = time.perf_counter()
        calls()
        return (time.perf_counter() - start) / times

    def calls() -> None:
        for _ in range(times):
            call(next(numbers))

    sample()  # the first call sets up
    while (spent := sample() * times) < SAMPLE[device]:
        times = max(2 * times, min(math.ceil(SAMPLE[device] / spent * times), 100 * times))
    return sample


def rounds_for(seconds: float, processes: int, budget: float = BUDGET) -> int:
    """How many rounds of so many seconds each of some processes runs, to fill the budget together."""
    return -(-min(max(int(budget / seconds), ROUNDS[0]), ROUNDS[1]) // processes)


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
    start_cublas()
    before = requested("current")
    torch.cuda.reset_peak_memory_stats()
    step()
    return requested("current") - before, requested("peak") - before


#: Bytes that a step on a GPU may take in addition to its tensors: partial sums of reductions. `torch._foreach_norm`
#: has 4 bytes for every 65536 elements of its largest tensor, for each tensor: 0.77 MiB for TinyLlama's 201 tensors,
#: the largest of 65.5M elements. Our norms keep 132 KiB for a stream. torch's other reductions take less, and RMSNorm's
#: backward has no partial sums below 64 Ki tokens. What products and attention take is known: `start_cublas` and
#: `lomo_kernels.plan.kernels`.
SCRATCH = 2**20


def requested(moment: str) -> int:
    """Bytes ("current" or "peak") that were asked of a GPU's allocator. What it hands out is more: multiples of 512
    bytes, and above 1 MiB up to 1 MiB that it does not split off."""
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{moment}"])


def start_cublas() -> None:
    """Makes cuBLAS allocate its workspaces, so that later differences of bytes do not include them.

    cuBLAS takes a workspace from torch's allocator for each handle and stream: 32 MiB on Hopper, 8 MiB before. Each
    thread has a handle: this one, which runs forwards, and autograd's. The workspaces stay."""
    x = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    (x @ x).sum().backward()
    torch.cuda.synchronize()


def peak_on_gpu(build: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor], method: Method) -> int:
    """Bytes of all tensors at the peak of a second step. With FlashAttention 2, which the simulator knows; on Hopper
    torch prefers cuDNN's."""
    start_cublas()
    gc.collect()
    before = requested("current")
    with torch.device("cuda"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model = build()
        attached = method.attach(model)
        attached.update(loss(model))
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        attached.update(loss(model))
    return requested("peak") - before


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
