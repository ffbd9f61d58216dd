"""How often a call is repeated and measured; and the memory that a step takes."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lomo_kernels.composite import tiled
from lomo_kernels.plan.methods import LR, Method

#: Seconds that a round takes at least; short calls are repeated. A CPU's clock and its call cost 0.1 us. On a GPU a
#: round waits for the device before and after, some 20 us, 0.4% of 5 ms.
ROUND = {"cpu": 5e-4, "cuda": 5e-3}
BUDGET = 0.6  # seconds that all rounds of a benchmark take, within the limits of ROUNDS
ROUNDS = (9, 41)

Call = Callable[[int], object]  # with a running number, to use buffers in turn


class Baseline(NamedTuple):
    """What a benchmark is compared with: its time is that of `call`, times `scale` if that moves other bytes."""

    name: str
    call: Call
    scale: float = 1.0


def scalar(value: float, device: str) -> Tensor:
    """As operators take one without a copy from the host, or a slot that they add to."""
    return torch.tensor([value], dtype=torch.float64, device=device)


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS = {"cpu": time.perf_counter, "cuda": _synchronized}


def timed(call: Callable[[], object], times: int, device: str) -> float:
    """Seconds of one call, of so many."""
    start = CLOCKS[device]()
    for _ in range(times):
        call()
    return (CLOCKS[device]() - start) / times


#: Calls of a CUDA graph. So many buffers of 16 Mi elements are used in turn.
CAPTURED = 16


def captured(call: Call) -> Callable[[], None]:
    """`call` in a CUDA graph: so a GPU's kernels are timed, and not the host, which may take longer to launch them. Of
    every `CAPTURED` calls of what is returned, the first replays as many of `call`, and the others do nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)  # what the first call allocates and compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for number in range(CAPTURED):
            call(number)
    numbers = itertools.count()
    return lambda: None if next(numbers) % CAPTURED else graph.replay()


def calibrated(call: Callable[[], object], device: str) -> tuple[int, float]:
    """How many calls a round takes, and their seconds."""
    times = 1
    call()  # sets up
    while (spent := timed(call, times, device) * times) < ROUND[device]:
        times = max(2 * times, min(math.ceil(ROUND[device] / spent * times), 100 * times))
    return times, spent


def rounds_for(seconds: float, processes: int) -> int:
    """How many rounds of so many seconds each of some processes runs, to fill the budget together."""
    return -(-min(max(int(BUDGET / seconds), ROUNDS[0]), ROUNDS[1]) // processes)


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


def second_step_peak(
    build: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor], method: Method, device: str
) -> int:
    """Bytes of all tensors at the peak of a second step, inside operators too. On a GPU with FlashAttention 2, which
    the simulator knows; on Hopper torch prefers cuDNN's."""
    with torch.device(device), sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device == "cuda" else nullcontext():
        model = build()
        attached = method.attach(model, LR)
        attached.update(loss(model))
        tiled.buffer.memory = torch.empty(0)  # a tile that stayed counts too
        lasting = sum(tensor.nbytes for tensor in (*model.parameters(), *attached.states()))
        return lasting + memory_of(lambda: attached.update(loss(model)), device)[1]
