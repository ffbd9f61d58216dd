"""``python -m bench [QUESTION …] [--full] [--device …]``: measures, and prints the tables of what was measured.

Each question is a test of `results.QUESTIONS`, which pytest runs alone, too. What only a fresh process can be set to
(the allocator) is set here: `settings` says which ones a question is asked with. The results of ``--full`` go to
``bench/results/<device>/<question>.json``, others to ``build/bench``; ``pytest-benchmark compare`` reads both.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import results
from .results import QUESTIONS, RESULTS, ROOT

# Other pages of memory, another minute: two processes differ by more than two rounds of one. So in full each question
# is asked by three, some minutes apart, and their samples are pooled.
PROCESSES = 3
ONCE = ("step", "clipping", "head", "memory")  # whole steps take longest, and what is simulated is the same in all
ALLOCATING = "lomo_optim or (vector_norm and float32)"  # float32 copies of 16-bit gradients and parameters
TESTING = ROOT / "build" / "testing"  # from which pytest takes lomo_kernels_testing
OPTIONS = ["-q", "-p", "no:cacheprovider", "--benchmark-enable", "--benchmark-columns=median,iqr,rounds"]
# Freed memory stays with the process: no page is given back to the system and faulted in again.
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

Setting = tuple[dict[str, str], str]  # environment, and which of the tests (pytest's -k)


def settings(question: str, device: str) -> list[Setting]:
    if device == "cuda":  # LOMO_KERNELS_BACKEND says which backend, as on a CPU LOMO_KERNELS_ISA which instruction set
        return [({}, "")]
    if question in ("update", "norm"):
        return [({}, ""), (TUNED, ALLOCATING)]
    if question in ("step", "clipping"):
        return [({}, ""), (TUNED, "")]
    # The bare backward that hooks are compared with leaves all gradients: with 291 of 64 x 64 in float32, new pages for
    # them took it longer than hooks take. Nor do the buckets of DistributedDataParallel, which it keeps, need new ones.
    return [(TUNED if question in ("hooks", "data_parallel") else {}, "")]


def folder_of(device: str) -> str:
    """A processor is named with its best instruction set."""
    from lomo_kernels import backends  # not at import: bench/gpu.py builds it first

    name = results.machine_info(device)["device"]
    return results.slug(f"{name} {backends.choice('CPU').detail}" if device == "cpu" else name)


def main() -> int:
    """Returns 1 if a measurement failed, or none was selected."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("question", nargs="*", help=f"{', '.join(QUESTIONS)} (default: all)")
    parser.add_argument("--full", action="store_true", help="every size and case: more than an hour, not minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    questions = arguments.question or list(QUESTIONS)
    if unknown := set(questions) - set(QUESTIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(QUESTIONS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU: torch.cuda.is_available() is False in this environment")
    if {"update", "norm"} & {*questions} and arguments.device == "cpu" and not any(TESTING.glob("*_testing.*.so")):
        parser.error("the probes of memory bandwidth are not built: run `make testing` first, then .venv/bin/python")
    folder = (RESULTS if arguments.full else ROOT / "build" / "bench") / folder_of(arguments.device)
    folder.mkdir(parents=True, exist_ok=True)  # before the measuring, which may take an hour
    answers: dict[str, dict[str, Any]] = {}
    failed = []
    processes = PROCESSES if arguments.full else 1
    for turn, question in itertools.product(range(processes), questions):
        for environment, select in [] if turn and question in ONCE else settings(question, arguments.device):
            options = [f"--device={arguments.device}", f"--processes={1 if question in ONCE else processes}"]
            options += (["-k", select] if select else []) + (["--full"] if arguments.full else [])
            run, status = measure(question, environment, options)
            if run:
                answers[question] = results.pooled([answers[question], run] if question in answers else [run])
                results.write(folder / f"{question}.json", answers[question])
            if status:
                failed.append(f"{question} {environment or ''}")
    if answers:
        from . import report

        device = report.Device.of(folder)
        print(*(text for question in answers for text in report.tables(question, device)), sep="\n")
    print(f"written to {folder}" if answers else "nothing was measured, nothing written")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return bool(failed) or not answers


def measure(question: str, environment: dict[str, str], options: list[str]) -> tuple[dict[str, Any] | None, int]:
    """What one process measured, and its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "pytest", *OPTIONS, f"--benchmark-json={file}", QUESTIONS[question]]
        print("+", *map("=".join, environment.items()), question, *options, flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        status = subprocess.run([*command, *options], cwd=ROOT, env=environment).returncode
        return (results.read(file) if file.exists() else None), status


if __name__ == "__main__":
    sys.exit(main())
