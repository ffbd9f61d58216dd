"""``python -m bench.gpu_kernels [FILE]``: the kernels of the backend in force on a GPU, against a copy on the device.

A copy reads one stream and writes one: bytes over its time is the memory's speed. The update reads two and writes one,
the norm reads one; each one's bytes over its time is given as a fraction of the copy's, round by round.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lomo_kernels import backends, ops, reference

from .measure import interleave, ratios

SIZES = {"16M": 2**24, "64M": 2**26, "256M": 2**28}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CACHE = 512 * 2**20  # bytes that a round of calls goes through, several times the largest second-level cache
CALLS = 10  # between two events, whose own cost is some microseconds
LR = 1e-3
SMALL, SMALL_SIZE = 500, 4096


def on_device(call: Callable[[int], Any]) -> Callable[[int], float]:
    """Seconds of one call by the GPU's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(number: int) -> float:
        torch.cuda._sleep(2_000_000)  # some 1 ms: all calls are queued before the clock starts, it measures no Python
        start.record()
        for turn in range(CALLS):
            call(number * CALLS + turn)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / CALLS

    return timed


def contestants(n: int, dtype: torch.dtype) -> tuple[dict[str, Callable[[int], float]], dict[str, int]]:
    """Calls by name, and how many streams of n elements each moves."""
    pairs = max(2, CACHE // (2 * n * dtype.itemsize) + 1)
    params = [torch.randn(n, device="cuda").to(dtype) for _ in range(pairs)]
    grads = [torch.randn(n, device="cuda").to(dtype) for _ in range(pairs)]
    lr = torch.tensor(LR, dtype=torch.float64, device="cuda")
    slot = torch.zeros(1, dtype=torch.float64, device="cuda")
    every = {"weight_decay": 0.01, "inv_scale": 0.5, "clip_value": 3.0, "clip_coef": 0.5}
    scalars = {name: torch.tensor(value, dtype=torch.float64, device="cuda") for name, value in every.items()}
    for rounding in ("nearest", "stochastic"):  # a bench of wrong results is worth nothing
        param, grad = params[0][: 2**20].clone(), grads[0][: 2**20]
        expected = reference.updated(param, grad, lr=LR, stochastic=rounding == "stochastic")
        ops.sgd_(param, grad, lr=lr, rounding=rounding)
        assert torch.equal(param, expected)

    def pair(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return params[number % pairs], grads[number % pairs]

    calls: dict[str, tuple[int, Callable[[int], Any]]] = {
        "copy": (2, lambda i: params[i % pairs].copy_(grads[i % pairs])),
        "sgd_ nearest": (3, lambda i: ops.sgd_(*pair(i), lr=lr)),
        "sgd_ nearest, every scalar": (3, lambda i: ops.sgd_(*pair(i), lr=lr, **scalars)),
        "sgd_ stochastic": (3, lambda i: ops.sgd_(*pair(i), lr=lr, rounding="stochastic")),
        "sgd_ nearest, with its norm": (3, lambda i: ops.sgd_(*pair(i), lr=lr, sq_norm=slot)),
        "sq_norm_": (1, lambda i: ops.sq_norm_(slot, grads[i % pairs])),
        "add_": (3, lambda i: params[i % pairs].add_(grads[i % pairs], alpha=-LR)),
        "vector_norm": (1, lambda i: torch.linalg.vector_norm(grads[i % pairs])),
    }
    return {name: on_device(call) for name, (_, call) in calls.items()}, {name: s for name, (s, _) in calls.items()}


def kernel_section() -> dict[str, Any]:
    """Seconds, GB/s and the fraction of the copy's speed."""
    section: dict[str, Any] = {}
    for size, n in SIZES.items():
        for name, dtype in DTYPES.items():
            calls, streams = contestants(n, dtype)
            seconds = interleave(calls)
            copy = [each / streams["copy"] for each in seconds["copy"]]  # seconds per stream
            print(f"\n{size} elements, {name}: us, GB/s, fraction of the copy's speed (quartiles)")
            for contestant, samples in seconds.items():
                own = [each / streams[contestant] for each in samples]
                fraction = ratios(copy, own)
                median = statistics.median(samples)
                speed = streams[contestant] * n * dtype.itemsize / median
                section.setdefault(size, {}).setdefault(name, {})[contestant] = {
                    "seconds": median,
                    "bytes_per_second": speed,
                    "fraction_of_copy": fraction,
                }
                spread = f"{fraction['median']:.3f} ({fraction['low']:.3f}-{fraction['high']:.3f})"
                print(f"{contestant:28} {median * 1e6:9.1f} {speed / 1e9:8.0f}  {spread}")
            del calls
            torch.cuda.empty_cache()
    return section


def list_section() -> dict[str, Any]:
    """Many small tensors: one list call against a call each, by the wall and by the GPU's clock."""
    params = [torch.randn(SMALL_SIZE, device="cuda").bfloat16() for _ in range(SMALL)]
    grads = [torch.randn(SMALL_SIZE, device="cuda").bfloat16() for _ in range(SMALL)]
    slots = torch.zeros(SMALL, dtype=torch.float64, device="cuda")
    each_slot = list(slots)
    lr = torch.tensor(LR, dtype=torch.float64, device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "sgd_, one by one": lambda: [ops.sgd_(p, g, lr=lr) for p, g in zip(params, grads, strict=True)],
        "sgd_list_": lambda: ops.sgd_list_(params, grads, lr=lr),
        "sq_norm_, one by one": lambda: [ops.sq_norm_(s, g) for s, g in zip(each_slot, grads, strict=True)],
        "sq_norm_list_": lambda: ops.sq_norm_list_(each_slot, grads),
    }
    section: dict[str, Any] = {}
    print(f"\n{SMALL} tensors of {SMALL_SIZE} bfloat16: wall us, GPU us")
    for name, call in calls.items():
        section[name] = {"wall_seconds": wall_seconds(call), "gpu_seconds": gpu_seconds(call)}
        print(f"{name:28} {section[name]['wall_seconds'] * 1e6:9.1f} {section[name]['gpu_seconds'] * 1e6:9.1f}")
    return section


def wall_seconds(call: Callable[[], Any], rounds: int = 21) -> float:
    """Median, from an idle GPU to an idle GPU."""
    samples = []
    for turn in range(rounds + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if turn >= 3:
            samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def gpu_seconds(call: Callable[[], Any]) -> float:
    """Time that the GPU was busy with the call's kernels and copies."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in profile.key_averages()) / 1e6


def main() -> None:
    """Measures and prints; with a file name, writes JSON there, too."""
    print(f"{torch.cuda.get_device_name()}, backend {backends.choice('CUDA')}")
    sections = {"kernels": kernel_section(), "lists": list_section()}
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(sections))


if __name__ == "__main__":
    main()
