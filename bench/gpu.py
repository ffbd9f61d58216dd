"""``make gpu``: what needs a GPU, in stages: ``build``, ``test``, ``sanitize``, ``bench``; all of them, or those named.

Uses the interpreter it runs in, whose torch must have CUDA, and installs nothing but this package (editable, without
its dependencies). Each stage's outcome goes into the ``checks`` of ``bench/results/<device>-<date>.json``, measurements
beside them (``python -m bench --device cuda`` alone measures, too). ``LOMO_COMMIT`` names the commit where there is no
git repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from typing import Any

import torch

from . import results
from .measure import ROOT, environment, todays_file

BACKENDS = ("cuda", "triton")
# The tools see every access of every thread: some hundred times slower, so small cases of each kernel.
SANITIZED = "every_key_of_the_random or in_the_same_pass and (33] or 65537]) or list_form or accumulates"


def run(command: list[str], **env: str) -> dict[str, Any]:
    """Runs a command, showing its output; returns status, seconds and the output's end."""
    print("+", " ".join([f"{name}={value}" for name, value in env.items()] + command), flush=True)
    if not shutil.which(command[0]):
        return {"status": 127, "seconds": 0.0, "output": [f"{command[0]} is not on PATH"]}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    return {"status": process.wait(), "seconds": round(time.perf_counter() - start, 1), "output": lines[-15:]}


def build() -> dict[str, Any]:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
    major, minor = torch.cuda.get_device_capability()
    return {"install": run(pip, LOMO_CUDA="1", LOMO_CUDA_ARCHS=f"{major}{minor}")}


def test() -> dict[str, Any]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    files = ["tests/test_gpu.py", "tests/test_sgd.py", "tests/test_sq_norm.py"]
    outcome = {backend: run([*pytest, *files], LOMO_KERNELS_BACKEND=backend) for backend in BACKENDS}
    # What a user has who forces nothing: the CUDA library, and Triton for the layers' operators.
    files = ["tests/test_gpu.py", "tests/test_plan.py", "tests/test_distributed_backends.py"]
    return outcome | {"chosen": run([*pytest, *files], LOMO_KERNELS_BACKEND="")}


def sanitize() -> dict[str, Any]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", "-k", SANITIZED]
    files = ["tests/test_sgd.py", "tests/test_sq_norm.py"]
    outcome = {}
    for tool in ("memcheck", "racecheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        outcome[tool] = run(
            [*sanitizer, *pytest, *files], LOMO_KERNELS_BACKEND="cuda", PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
    return outcome


def bench() -> dict[str, Any]:
    command = [sys.executable, "-m", "bench", "--full", "--device", "cuda", "--output", str(todays_file("cuda"))]
    return {"measured": run(command)}


STAGES = {stage.__name__: stage for stage in (build, test, sanitize, bench)}


def main() -> int:
    """Runs the stages named on the command line; returns 1 where one failed."""
    stages = sys.argv[1:] or list(STAGES)
    if unknown := set(stages) - set(STAGES):
        sys.exit(f"unknown stages: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if not torch.cuda.is_available():
        sys.exit("make gpu needs a GPU, and torch.cuda.is_available() is False in this environment")
    failed = []
    for stage in stages:
        outcome = STAGES[stage]()
        failed += [f"{stage} {name}" for name, one in outcome.items() if one["status"]]
        # After each stage: the next may be cut off.
        results.add(todays_file("cuda"), results.Results(environment("cuda"), checks={stage: outcome}))
    print(f"\nwritten to {todays_file('cuda')}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
