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
TOKENS, WIDTH, ROWS = (256, 1024, 2048, 8192), 4096, 128_256  # of a layer; rows of an embedding
PAIRS = 4  # layers that take turns: weights of 128 MiB


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


def layer_section() -> dict[str, Any]:
    """The layers' operators of the backend in force, and what they stand for: a product or a dense gradient in memory,
    and `sgd_` or `sq_norm_` on it. The probe is the matrix product alone, into the weight's dtype."""
    section: dict[str, Any] = {}
    lr = torch.tensor(LR, dtype=torch.float64, device="cuda")
    slot = torch.zeros(1, dtype=torch.float64, device="cuda")
    for tokens in TOKENS:
        inputs, grads = ([torch.randn(tokens, WIDTH, device="cuda").bfloat16() for _ in range(PAIRS)] for _ in range(2))
        weights = [torch.randn(WIDTH, WIDTH, device="cuda").bfloat16() for _ in range(PAIRS)]
        check_layer(inputs[0], grads[0])

        def product(i: int, inputs: Any = inputs, grads: Any = grads) -> torch.Tensor:
            return grads[i % PAIRS].T @ inputs[i % PAIRS]

        def pair(i: int, inputs: Any = inputs, grads: Any = grads) -> tuple[torch.Tensor, torch.Tensor]:
            return inputs[i % PAIRS], grads[i % PAIRS]

        def weight(i: int, weights: Any = weights) -> torch.Tensor:
            return weights[i % PAIRS]

        calls: dict[str, Callable[[int], Any]] = {
            "product": product,
            "linear_sgd_ nearest": lambda i, w=weight, p=pair: ops.linear_sgd_(w(i), *p(i), lr=lr),
            "linear_sgd_ stochastic": lambda i, w=weight, p=pair: ops.linear_sgd_(
                w(i), *p(i), lr=lr, rounding="stochastic"
            ),
            "linear_sgd_ nearest, with its norm": lambda i, w=weight, p=pair: ops.linear_sgd_(
                w(i), *p(i), lr=lr, sq_norm=slot
            ),
            "product + sgd_ nearest": lambda i, w=weight, g=product: ops.sgd_(w(i), g(i), lr=lr),
            "linear_sq_norm_": lambda i, p=pair: ops.linear_sq_norm_(slot, *p(i)),
            "product + sq_norm_": lambda i, g=product: ops.sq_norm_(slot, g(i)),
        }
        section[f"linear, {tokens} tokens"] = against("product", calls)
    gy = torch.randn(TOKENS[-1], WIDTH, device="cuda").bfloat16()
    indices = torch.randint(0, ROWS, (TOKENS[-1],), device="cuda")
    table = torch.randn(ROWS, WIDTH, device="cuda").bfloat16()

    def dense(_: int) -> torch.Tensor:
        return torch.ops.aten.embedding_dense_backward(gy, indices, ROWS, -1, False)

    calls = {
        "dense gradient": dense,
        "embedding_sgd_": lambda _: ops.embedding_sgd_(table, indices, gy, lr=lr),
        "embedding_sgd_ with decay": lambda _: ops.embedding_sgd_(table, indices, gy, lr=lr, weight_decay=0.1),
        "dense gradient + sgd_": lambda i: ops.sgd_(table, dense(i), lr=lr),
        "embedding_sq_norm_": lambda _: ops.embedding_sq_norm_(slot, indices, gy),
        "dense gradient + sq_norm_": lambda i: ops.sq_norm_(slot, dense(i)),
    }
    section[f"embedding, {ROWS} rows, {TOKENS[-1]} tokens"] = against("dense gradient", calls)
    return section


def check_layer(x: torch.Tensor, gy: torch.Tensor) -> None:
    """A bench of wrong results is worth nothing."""
    weight, slot = torch.zeros(WIDTH, WIDTH, device="cuda"), torch.zeros(1, dtype=torch.float64, device="cuda")
    expected = reference.linear_gradient([x], [gy])
    ops.linear_sgd_(weight, x, gy, lr=1.0)
    assert ((weight + expected).abs() <= 1e-4 * expected.abs().max()).all()
    ops.linear_sq_norm_(slot, x, gy)
    assert abs(slot.sqrt() / expected.double().norm() - 1).item() <= 1e-5


def against(probe: str, calls: dict[str, Callable[[int], Any]]) -> dict[str, Any]:
    """Seconds of each call, and how many times the probe's, round by round."""
    seconds = interleave({name: on_device(call) for name, call in calls.items()})
    section: dict[str, Any] = {}
    print(f"\n{WIDTH} wide, bfloat16: us, times the {probe} (quartiles)")
    for name, samples in seconds.items():
        times = ratios(samples, seconds[probe])
        section[name] = {"seconds": statistics.median(samples), f"times_{probe.replace(' ', '_')}": times}
        spread = f"{times['median']:.3f} ({times['low']:.3f}-{times['high']:.3f})"
        print(f"{name:36} {section[name]['seconds'] * 1e6:9.1f}  {spread}")
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
    sections = {"kernels": kernel_section(), "lists": list_section(), "layers": layer_section()}
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(sections))


if __name__ == "__main__":
    main()
