"""Results: pytest-benchmark's JSON, a file for each question (on a GPU for each stage of `make gpu`) in a folder for
each device: ``bench/results/<device>/<question>.json``.

A benchmark's ``group`` is its question, ``params`` its case, ``stats.data`` its samples in seconds of one call. Its
``extra_info`` has the setting of the process (``backend``, ``detail``, ``malloc``); the ``baseline`` by name, and
``baseline_seconds``, its samples of the same rounds; ``memory`` in bytes, by category or as "weights", the "peak" above
them and the "states" in it; ``most``, each category's own maximum; and ``error``, relative to float64. Beside the
benchmarks, ``missing`` says what could not run and why.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
#: By the file that asks: each is a function ``test_<question>``, and a key of the file's ``cases``.
ASKED = {
    "operators": ("ceilings", "update", "norm", "lists", "linear", "embedding"),
    "training": ("captured", "hooks", "step", "clipping"),
    "head": ("head",),
    "ranks": ("data_parallel", "sharded"),
    "memory": ("memory",),
}
QUESTIONS = {name: f"bench/bench_{file}.py::test_{name}" for file, names in ASKED.items() for name in names}
OURS = ("Lomo", "AdaLomo", "sgd_", "sq_norm_", "linear_", "embedding_", "product, s", "dense gradient, s")
BASE = "SGD, clip_grad_norm_"  # the baseline of training steps
FORWARD = "forward alone"  # no rival: a part of every step


def ours(implementation: str) -> bool:
    return implementation.startswith(OURS)


def clips(implementation: str) -> bool:
    """Whether a training step does, by the global norm."""
    return "clip_grad_norm_" in implementation or "clipping" in implementation


def ratios(benchmark: dict[str, Any]) -> list[float]:
    """Its time over the baseline's, in each round. Empty if it has no baseline."""
    baseline = benchmark["extra_info"].get("baseline_seconds", [])
    return [seconds / other for seconds, other in zip(benchmark["stats"]["data"], baseline, strict=bool(baseline))]


def pooled(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Runs as one: samples of the same benchmark are put together. Samples have four digits, the clock has no more."""
    from pytest_benchmark.stats import Stats  # not at import: bench/gpu.py says what is not installed

    whole: dict[str, Any] = {}
    benchmarks: dict[str, Any] = {}
    for run in runs:
        whole |= run | {"missing": sorted({*whole.get("missing", []), *run["missing"]})}
        for benchmark in run["benchmarks"]:
            first = benchmarks.setdefault(benchmark["fullname"], benchmark)
            if first is not benchmark:
                first["stats"]["data"] += benchmark["stats"]["data"]
                first["extra_info"]["baseline_seconds"] += benchmark["extra_info"]["baseline_seconds"]
    for benchmark in benchmarks.values():
        extra_info, stats = benchmark["extra_info"], Stats()
        extra_info["baseline_seconds"] = rounded(extra_info.get("baseline_seconds", []))
        stats.data = rounded(benchmark["stats"]["data"])
        benchmark["stats"] |= {**(stats.as_dict() if stats.data else {}), "data": stats.data}
    return {**whole, "benchmarks": list(benchmarks.values())}


def rounded(samples: list[float]) -> list[float]:
    return [float(f"{sample:.4g}") for sample in samples]


def read(file: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is no file of results.
    """
    content = json.loads(file.read_text())
    if missing := {"machine_info", "commit_info", "benchmarks", "missing", "datetime"} - set(content):
        raise ValueError(f"{file}: expected results as bench/results.py describes them, without {', '.join(missing)}")
    return dict(content)


def write(file: Path, run: dict[str, Any]) -> None:
    """A line for each benchmark: a readable difference."""
    head = json.dumps({**run, "benchmarks": []}, indent=1).removesuffix("\n}")
    lines = ",\n  ".join(map(json.dumps, run["benchmarks"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(head.replace('"benchmarks": []', f'"benchmarks": [\n  {lines}\n ]') + "\n}\n")


def commit() -> str:
    """The commit checked out, with "+" if files differ from it; LOMO_COMMIT if that is given."""
    status = "git status --porcelain --untracked-files=no -- ':!bench/results' ':!*.md'"
    git = subprocess.run(f"git rev-parse HEAD && {status}", shell=True, cwd=ROOT, capture_output=True, text=True)
    head, _, changed = git.stdout.partition("\n")
    return os.environ.get("LOMO_COMMIT") or head + "+" * bool(changed) or "unknown"


def machine_info(device: str) -> dict[str, Any]:
    """Device ("cpu" or "cuda"), threads and versions."""
    import torch

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    about: dict[str, Any] = {"device": cpu[1] if cpu else platform.machine(), "cores": os.cpu_count(), "threads": 1}
    if device == "cuda":
        about |= {"device": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    versions = {package.name: package.version for package in distributions()}
    about |= {"torch": torch.__version__, "triton": versions.get("triton"), "python": platform.python_version()}
    peers = {package: versions.get(package) for package in ("lomo-optim", "torch-optimi")}
    return about | {"lomo_kernels": versions.get("lomo_kernels"), "peers": peers}


def slug(device: str) -> str:
    """A device as the name of its folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
