"""``python -m bench``: kernels and hooks, interleaved, in one thread; prints tables and writes ``bench/results/``."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from . import hooks, kernels
from .measure import interleave, ratios, write


def kernel_section(title: str, make: Any, streams: int) -> dict[str, Any]:
    """Every contestant's median, GB/s and fraction of the probe's speed."""
    section: dict[str, Any] = {}
    print(f"\n{title}, {kernels.SIDE} x {kernels.SIDE}, one thread: ms, GB/s, fraction of the probe (quartiles)")
    for name, dtype in kernels.DTYPES.items():
        seconds = interleave(make(dtype))
        bytes_moved = streams * kernels.SIDE**2 * dtype.itemsize
        section[name] = {}
        for contestant, samples in seconds.items():
            median, fraction = statistics.median(samples), ratios(seconds["probe"], samples)
            section[name][contestant] = {"seconds": median, "fraction_of_probe": fraction}
            spread = f"{fraction['median']:.2f} ({fraction['low']:.2f}-{fraction['high']:.2f})"
            print(f"{name:9} {contestant:27} {median * 1e3:7.2f} {bytes_moved / median / 1e9:6.1f}  {spread}")
    return section


def hook_section() -> dict[str, Any]:
    """Microseconds per parameter above bare autograd, in the same round."""
    section: dict[str, Any] = {}
    print("\nBackward + update, microseconds per parameter above bare autograd: median (lowest quartile)")
    for count in hooks.COUNTS:
        for shape, size in hooks.SHAPES.items():
            for dtype in (torch.float32, torch.bfloat16):
                seconds = interleave(hooks.contestants(size, dtype, count), rounds=41)
                bare = seconds.pop("bare")
                for name, samples in seconds.items():
                    above = [(mine - base) / count * 1e6 for mine, base in zip(samples, bare, strict=True)]
                    low, median, _ = statistics.quantiles(above, n=4)
                    key = f"{count} x {shape}, {str(dtype).removeprefix('torch.')}, {name}"
                    section[key] = {"median_us": median, "lowest_quartile_us": low}
                    print(f"{key:45} {median:6.2f} ({low:.2f})")
    return section


def main() -> None:
    """Runs everything: some two minutes."""
    torch.set_num_threads(1)
    sections = {
        "hooks": hook_section(),  # first: what the others leave in the allocator shows in microseconds
        "update": kernel_section("Update", kernels.update_contestants, 3),
        "norm": kernel_section("Norm", kernels.norm_contestants, 1),
        "norm_errors": {name: kernels.norm_errors(dtype) for name, dtype in kernels.DTYPES.items()},
    }
    for dtype, errors in sections["norm_errors"].items():
        print(f"norm of 2^25 elements, {dtype}: " + ", ".join(f"{k} off by {v:.1e}" for k, v in errors.items()))
    print(f"\nwritten to {write(sections).name}")


if __name__ == "__main__":
    main()
