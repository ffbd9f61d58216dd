"""``python -m bench [QUESTION …] [--full] [--device …]``: measures, and writes ``bench/results/<device>-<date>.json``,
``…-short.json`` where it is not every case.

Each question is a file ``bench_<question>.py``, which pytest runs alone, too. What only a fresh process can be set to
(instruction set, allocator, backend) is set here: `runs` says which questions run in which settings. A question's
measurements take the place of those that the file has of it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from . import results
from .measure import todays_file
from .results import ROOT

# Other pages of memory, another minute: two processes differ by more than two rounds of one. So each question is asked
# by three, some minutes apart, and their samples are pooled. But whole steps in full, which take longest.
PROCESSES = 3
QUESTIONS = (
    *("ceilings", "update", "norm", "lists", "linear", "embedding"),
    *("captured", "hooks", "step", "clipping", "data_parallel", "sharded", "memory"),
)
ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
OURS = "sgd_ or sq_norm_"
ALLOCATING = "lomo_optim or (vector_norm and float32)"  # float32 copies of 16-bit gradients and parameters
TESTING = ROOT / "build" / "testing"  # whence pytest takes lomo_kernels_testing
# Freed memory stays with the process: no page is given back to the system and faulted in again.
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class Run(NamedTuple):
    """One process: a question, its environment, and which of its tests (pytest's -k)."""

    question: str
    environment: Mapping[str, str] = MappingProxyType({})
    select: str = ""


def runs(question: str, device: str) -> list[Run]:
    """The settings that a question is asked in. What the first one measured of rivals is not measured again."""
    if device == "cuda":
        if question not in ("update", "norm", "lists"):
            return [Run(question)]
        cuda, triton = ({"LOMO_KERNELS_BACKEND": backend} for backend in ("cuda", "triton"))
        return [Run(question, cuda), Run(question, triton, OURS)]
    if question in ("update", "norm"):
        isas = [Run(question, {"LOMO_KERNELS_ISA": isa}, OURS) for isa in ISAS if lower(isa)]
        return [Run(question), *isas, Run(question, TUNED, ALLOCATING)]
    if question == "step":  # with the tuned malloc only in full, where weights weigh most
        return [Run(question), Run(question, TUNED, "107M and 256 and not checkpointing")]
    if question == "clipping":
        return [Run(question), Run(question, TUNED)]
    # The bare backward that hooks are held to leaves all gradients: with 291 of 64 x 64 in float32, new pages for them
    # took it longer than hooks take. Nor do the buckets of DistributedDataParallel, which it keeps, need new ones.
    return [Run(question, TUNED if question in ("hooks", "data_parallel") else {})]


def asked(question: str, full: bool) -> int:
    """By how many processes. What is simulated is the same in all."""
    return 1 if question == "memory" or (question in ("step", "clipping") and full) else PROCESSES


def lower(isa: str) -> bool:
    """Whether this is not the instruction set in force without being asked for, and this processor has it."""
    from lomo_kernels import backends  # not at import: bench/gpu.py builds it first

    best = backends.choice("CPU").detail
    return best in ISAS and ISAS.index(isa) < ISAS.index(best)


def main() -> int:
    """Returns 1 where a measurement failed, or none was selected."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("question", nargs="*", help=f"{', '.join(QUESTIONS)} (default: all)")
    parser.add_argument("--full", action="store_true", help="every size and case: more than an hour, not minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write (default: bench/results/…)")
    parser.add_argument("-k", dest="select", default="", help="only these tests, as pytest's -k selects them")
    arguments = parser.parse_args()
    if unknown := set(arguments.question) - set(QUESTIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU: torch.cuda.is_available() is False in this environment")
    probed = {"update", "norm"} & set(arguments.question or QUESTIONS) and arguments.device == "cpu"
    if probed and not any(TESTING.glob("lomo_kernels_testing.*")):
        parser.error("the probes of memory bandwidth are not built: run `make testing` first, then .venv/bin/python")
    file = arguments.output or todays_file(arguments.device, short=bool(arguments.select) or not arguments.full)
    try:  # before the measuring, which may take an hour
        results.writable(file)
    except (OSError, ValueError) as error:
        parser.error(f"cannot add to {file}: {error}")
    failed = {}
    answers: dict[str, results.Results] = {}
    for turn, question in itertools.product(range(PROCESSES), arguments.question or QUESTIONS):
        processes = asked(question, arguments.full)
        for run in runs(question, arguments.device) if turn < processes else []:
            select = " and ".join(f"({part})" for part in (run.select, arguments.select) if part)
            options = [f"--device={arguments.device}", f"--processes={processes}", *(["-k", select] if select else [])]
            measured, status = measure(run, options + ["--full"] * arguments.full)
            if measured and (measured.measurements or measured.missing):
                answers[question] = answers[question].pooled(measured) if question in answers else measured
            if status not in (0, 5):  # 5: -k left nothing
                failed[f"{question} {dict(run.environment) or ''}".strip()] = status
        if question in answers:  # after each question: the next may be cut off
            results.add(file, answers[question])
    print(f"\nwritten to {file}" if answers else "\nnothing was measured, nothing written")
    if not (answers or failed):
        print(f"-k {arguments.select!r} selects no test of {', '.join(arguments.question or QUESTIONS)}")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return bool(failed) or not answers


def measure(run: Run, options: list[str]) -> tuple[results.Results | None, int]:
    """What one process measured, and its exit status."""
    print("+", *map("=".join, run.environment.items()), f"bench_{run.question}", *options, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-enable"]
        table = ["--benchmark-columns=median,iqr,rounds", "--benchmark-sort=fullname", f"--record={file}"]
        command = [*pytest, *table, f"bench/bench_{run.question}.py", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **run.environment}
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        return (results.read(file) if file.exists() else None), status


if __name__ == "__main__":
    sys.exit(main())
