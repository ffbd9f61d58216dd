"""What all benches share: interleaved rounds, ratios taken round by round, the bandwidth probes, and the results file.

Speed on a shared machine drifts by tens of percent within a minute, so nothing is timed on its own: a round runs every
contestant once, the order rotates from round to round, and a ratio is formed inside its round before the median is
taken. Data comes from memory: each call takes the next buffers of a ring larger than the last-level cache.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lomo_kernels

RESULTS = Path(__file__).parent / "results"
ROUNDS = 40
WARMUP = 2
RING_BYTES = 768 << 20  # about three times 260 MiB, the largest last-level cache met so far
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

torch.set_num_threads(1)  # the probes have one thread; hooks run in one


def short(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


# ---- Contestants and rounds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """One thing to time: `run` gets what `prepare` returned, and only `run` is timed."""

    name: str
    prepare: Callable[[], Any]
    run: Callable[[Any], object]

    def seconds(self) -> float:
        argument = self.prepare()
        start = time.perf_counter()
        self.run(argument)
        return time.perf_counter() - start


def race(contestants: Sequence[Contestant], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; the lists are aligned, entry i of each is from round i."""
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    gc.collect()
    gc.disable()
    try:
        for i in range(-WARMUP, rounds):
            first = i % len(contestants)
            for contestant in (*contestants[first:], *contestants[:first]):
                seconds = contestant.seconds()
                if i >= 0:
                    times[contestant.name].append(seconds)
    finally:
        gc.enable()
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def fraction(probe: Sequence[float], times: Sequence[float]) -> dict[str, float]:
    """Speed as a fraction of the probe's on the same bytes, formed in each round: 1 is as fast as the probe."""
    return spread([p / t for p, t in zip(probe, times, strict=True)])


def ring(make: Callable[[], Any], nbytes: int) -> Callable[[], Any]:
    """A function that hands out what `make` made (`nbytes` each, at least six), one after the other, again and again."""
    count = max(6, -(-RING_BYTES // nbytes))
    return itertools.cycle([make() for _ in range(count)]).__next__


def run_under_pytest(benchmark: Any, contestant: Contestant, probe: Contestant, rounds: int = ROUNDS) -> list[float]:
    """Times `contestant` with pytest-benchmark, and `probe` before each of its rounds.

    Returns the probe's seconds, aligned with ``benchmark.stats.stats.data``; empty where benchmarks are disabled.
    """
    seconds = []

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        seconds.append(probe.seconds())
        return (contestant.prepare(),), {}

    benchmark.pedantic(contestant.run, setup=setup, rounds=rounds, warmup_rounds=WARMUP)
    return seconds[-rounds:] if benchmark.stats else []


def bandwidth_under_pytest(benchmark: Any, contestant: Contestant, probe: Contestant, nbytes: int) -> None:
    """`run_under_pytest`, with GB/s and the fraction of the probe in ``extra_info``."""
    seconds = run_under_pytest(benchmark, contestant, probe)
    if seconds:
        times = benchmark.stats.stats.data
        benchmark.extra_info["GB/s"] = round(nbytes / statistics.median(times) / 1e9, 2)
        benchmark.extra_info["of probe"] = round(fraction(seconds, times)["median"], 3)


def bandwidth_rows(times: dict[str, list[float]], probe: str, nbytes: int, **same: Any) -> list[dict[str, Any]]:
    """One row per contestant: milliseconds, GB/s on `nbytes`, and the fraction of the probe."""
    return [
        {
            **same,
            "name": name,
            "ms": spread([1e3 * t for t in seconds]),
            "gb_per_s": nbytes / statistics.median(seconds) / 1e9,
            "of_probe": fraction(times[probe], seconds),
        }
        for name, seconds in times.items()
    ]


# ---- Probes ---------------------------------------------------------------------------------------------------------


def _testing() -> Any:
    try:
        import lomo_kernels_testing
    except ImportError as error:
        raise ImportError("the bandwidth probes are missing: run `make testing`") from error
    return lomo_kernels_testing


def update_probe(nbytes: int) -> Contestant:
    """Two streams of `nbytes` read, one of them written, as an update does; on buffers of its own (it garbles them)."""
    testing = _testing()
    # ones: zeros would all be one physical page
    pairs = ring(lambda: [torch.ones(nbytes // 8, dtype=torch.int64) for _ in range(2)], 2 * nbytes)
    return Contestant(
        "probe: 2 reads, 1 write", pairs, lambda pg: testing.read_2_write_1(pg[0].data_ptr(), pg[1].data_ptr(), nbytes)
    )


def read_probe(tensors: Callable[[], torch.Tensor], nbytes: int) -> Contestant:
    """`nbytes` of each tensor read."""
    testing = _testing()
    return Contestant("probe: 1 read", tensors, lambda tensor: testing.read_1(tensor.data_ptr(), nbytes))


# ---- Device and results file ----------------------------------------------------------------------------------------


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _malloc() -> str:
    """What changes where and how large blocks are allocated: each step's page faults cost as much as its update."""
    threshold, preloaded = os.environ.get("MALLOC_MMAP_THRESHOLD_"), os.environ.get("LD_PRELOAD", "")
    notes = [f"MALLOC_MMAP_THRESHOLD_={threshold}"] if threshold else []
    notes += [f"LD_PRELOAD={Path(name).name}" for name in re.split(r"[ :]+", preloaded) if name]
    return ", ".join(notes) or "the C library's, default settings"


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text[text.find("[") + 1 : text.find("]")]


def device() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": _cpu_model(),
        "instruction_set": next(choice.detail for choice in lomo_kernels.backends.choices if choice.key == "CPU"),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "malloc": _malloc(),
        "transparent_huge_pages": _huge_pages(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lomo_kernels": lomo_kernels.__version__,
        "commit": _commit(),
    }


def _rounded(value: Any) -> Any:
    """Floats with four significant digits: more is noise, and makes results hard to compare."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def write(about: dict[str, Any], sections: dict[str, Any], date: datetime.date) -> Path:
    """Writes ``results/<device>-<date>.json``: `about` (from `device`, before the first round) and one entry per bench."""
    words = re.sub(r"\((R|TM)\)", "", about["cpu"], flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    path = RESULTS / f"{slug}-{about['instruction_set']}-{date}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"date": str(date), "device": about, **sections}
    path.write_text(json.dumps(_rounded(content), indent=1) + "\n")
    return path
