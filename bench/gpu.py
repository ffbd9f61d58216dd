"""``make gpu``: tests and measures on a GPU, in stages, the most valuable first, within a budget of seconds.

    make gpu PYTHON=python3 BUDGET=540 RESULTS=folder ARGS="stage …"

ARGS names stages. Without it, all stages run that have not passed according to RESULTS: a second call continues the
first. The build always runs; it is short if nothing has changed. RESULTS gets the results of each stage when it ends:
its measurements in ``<device>/<stage>.json`` and its outcome in ``<device>/stages.json`` (copy the folder into
bench/results, where `python -m bench.report` reads it), each test in ``tests.jsonl``, the stages' output in
``log.txt``, the summary in ``summary.txt``. Only this package is installed (editable, without its dependencies).
LOMO_COMMIT names the commit if there is no git repository.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import budget, results
from .budget import Outcome, Stage
from .stages import stages

RESERVE = 4.0  # seconds of the budget for the summary
NEEDED = ("torch", "pytest", "pytest_timeout", "pytest_benchmark", "xdist", "hypothesis")
PRINTED = 300_000  # bytes of what a stage printed that the log has


def ends(file: Path) -> str:
    """A file's text; if it is long, its beginning and its end."""
    with file.open("rb") as content:
        head = content.read(PRINTED // 2)
        size = content.seek(0, os.SEEK_END)
        content.seek(max(size - PRINTED // 2, len(head)))
        cut = f"\n[… {size - PRINTED} bytes …]\n" if size > PRINTED else ""
        return head.decode(errors="replace") + cut + content.read().decode(errors="replace")


class Run:
    """The results so far, and the files that hold them."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device, self.scratch = device, Path(tempfile.mkdtemp(prefix="lomo-gpu-"))
        self.folder = folder / results.slug(device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stages, self.tests = self.folder / "stages.json", folder / "tests.jsonl"
        self.checks = json.loads(self.stages.read_text()) if self.stages.exists() else {}
        self.passed = {name for name, check in self.checks.items() if check["status"] == 0}
        self.log = (folder / "log.txt").open("a")
        self.begin = time.monotonic()

    def say(self, words: str) -> None:
        line = f"[{time.monotonic() - self.begin:3.0f} s] {words}"
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def ready(self, stage: Stage) -> Stage:
        """The stage with the files for its results added."""
        command = stage.command
        if "--benchmark-enable" in command:
            command = [*command, f"--benchmark-json={self.scratch / stage.name}.json"]
        paths = {"LOMO_STAGE": stage.name, "LOMO_OUTCOMES": str(self.tests)}
        return stage._replace(command=command, environment={**stage.environment, **paths})

    def take_in(self) -> None:
        """Keeps what stages have measured. One that is killed while it writes leaves a part of a file."""
        for file in self.scratch.glob("*.json"):
            with contextlib.suppress(ValueError):
                results.write(self.folder / file.name, results.pooled([results.read(file)]))
                file.unlink()

    def end(self, outcome: Outcome) -> None:
        """Writes a stage's outcome and its output."""
        self.take_in()
        printed = ends(outcome.output) if outcome.output.exists() else ""
        self.log.write(f"===== {outcome.stage.name}: {outcome.status}\n{printed}\n")
        self.say(f"{outcome.stage.name}: {outcome.status}, {outcome.seconds:.0f} s")
        if outcome.started:
            check = {"status": int(not outcome.passed), "said": outcome.status, "seconds": round(outcome.seconds, 1)}
            for folder in (self.scratch, results.ROOT, sys.prefix):  # this machine's own
                printed = printed.replace(f"{folder}/", "")
            self.checks[outcome.stage.name] = check | {"commit": results.commit(), "output": printed.splitlines()[-15:]}
            self.stages.write_text(json.dumps(self.checks, indent=1))

    def measured(self) -> list[dict[str, Any]]:
        return [results.read(file) for file in sorted(self.folder.glob("*.json")) if file != self.stages]

    def outcomes(self) -> list[dict[str, str]]:
        """The last outcome of each test of each stage. Skips half a line, which a killed process may have left."""
        told = {}
        for line in self.tests.read_text().splitlines() if self.tests.exists() else []:
            with contextlib.suppress(ValueError):
                outcome = json.loads(line)
                told[outcome["stage"], outcome["test"]] = outcome
        return list(told.values())


def figures(benchmarks: list[dict[str, Any]]) -> Iterator[str]:
    """The headlines among the measurements."""
    rows: dict[str, list[str]] = {}
    for benchmark in benchmarks:
        case, extra = benchmark["params"], benchmark["extra_info"]
        name, question = case["implementation"], benchmark["group"]
        if question == "ceilings":
            work, unit, size = ("moved", "GB/s", 1e9) if "moved" in extra else ("operations", "TFLOP/s", 1e12)
            reached = extra[work] / benchmark["stats"]["median"] / size
            rows.setdefault("ceilings", []).append(f"{name} {reached:.4g} {unit}")
        if not (results.ratios(benchmark) and (results.ours(name) or name in ("add_", "addmm_"))):
            continue
        ratio = statistics.median(results.ratios(benchmark))
        if case.get("elements") == 2**28:
            row = rows.setdefault(f"{extra['backend']}, {case['dtype']}, 2^28 elements, of a copy", [])
            row.append(f"{name.removeprefix('sgd_ ')} {1 / ratio:.2f}")
        elif question in ("step", "linear", "captured"):
            about = f"{question}, {case.get('model', case.get('dtype'))}, {case['tokens']} tokens"
            rows.setdefault(f"{about}, time over {extra['baseline']}", []).append(f"{name} {ratio:.2f}")
    yield from (f"{case}: {'; '.join(row)}" for case, row in rows.items())


def summary(run: Run, outcomes: list[Outcome], named: list[Stage]) -> list[str]:
    """About thirty lines: how each stage ended, what failed, the headlines, what is left."""
    measured, tests = run.measured(), run.outcomes()
    lines = [f"{run.device}, commit {results.commit()}: {run.folder}"]
    passed = [f"{outcome.stage.name} {outcome.seconds:.0f} s" for outcome in outcomes if outcome.passed]
    lines.append(f"passed: {', '.join(passed) or 'nothing'}")
    lines += [f"NOT PASSED {outcome.stage.name}: {outcome.status}" for outcome in outcomes if not outcome.passed]
    words = []
    for stage in dict.fromkeys(test["stage"] for test in tests):
        counts = Counter(test["outcome"] for test in tests if test["stage"] == stage)
        words.append(f"{stage} {', '.join(f'{number} {how}' for how, number in sorted(counts.items()))}")
    lines.append(f"tests: {'; '.join(words)}")
    failed = [f"FAILED {test['stage']}: {test['test']}" for test in tests if test["outcome"] == "failed"]
    lines += failed[:8]
    if len(failed) > 8:
        lines.append(f"and {len(failed) - 8} more failed tests, in {run.tests.name}")
    lines += figures([benchmark for content in measured for benchmark in content["benchmarks"]])
    if missing := sorted({reason for content in measured for reason in content["missing"]}):
        lines.append(f"missing: {'; '.join(missing)}")
    done = run.passed | {outcome.stage.name for outcome in outcomes if outcome.passed}
    left = [stage.name for stage in named if stage.name not in done]
    lines.append(f'left: make gpu ARGS="{" ".join(left)}"' if left else "every stage has passed")
    return [line[:240] for line in lines]


def main(
    arguments: list[str] | None = None,
    known: Callable[[str, int], list[Stage]] = stages,
    start: Callable[[Stage, Path], budget.Process] = budget.spawn,
) -> int:
    """Returns 1 if a stage did not pass."""
    begin = time.monotonic()
    names = [stage.name for stage in known("", 1)]
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("stage", nargs="*", help=f"{', '.join(names)} (default: all that have not passed yet)")
    parser.add_argument("--budget", type=float, default=540, help="seconds that it all may take")
    parser.add_argument(
        "--results", type=Path, default=results.ROOT / "build" / "gpu", help="the folder of the results"
    )
    asked = parser.parse_args(arguments)
    if unknown := set(asked.stage) - set(names):
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}; expected some of {', '.join(names)}")
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        parser.error(f"PYTHON={sys.executable} lacks {', '.join(lacking)}: install them, or name another Python")
    os.environ["PATH"] += os.pathsep + "/usr/local/cuda/bin"
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        parser.error(f"make gpu needs a GPU: {error}")
    device, capability = found.splitlines()[0].rsplit(", ", 1)
    folder = asked.results.resolve()
    os.chdir(results.ROOT)
    settings = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NCCL_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    os.environ.update(settings, TRITON_CACHE_DIR=str(results.ROOT / "build" / "triton"), LOMO_KERNELS_BACKEND="")
    run = Run(folder, device)
    every = known(capability, os.cpu_count() or 1)
    named = [stage for stage in every if stage.name in asked.stage] if asked.stage else every
    wanted = named if asked.stage else [stage for stage in every if stage.name not in run.passed]
    build, *others = [every[0], *(stage for stage in wanted if stage is not every[0])]
    outcomes: list[Outcome] = []

    def go(chosen: list[Stage]) -> None:
        ready = [run.ready(stage) for stage in chosen]
        end = begin + asked.budget - RESERVE
        with contextlib.closing(budget.run(ready, end, run.scratch, start)) as ended:
            for outcome in ended:
                outcomes.append(outcome)
                run.end(outcome)

    try:
        go([build])
        if not outcomes[0].passed:  # Triton's kernels can run without it
            go([build._replace(name="build-without-cuda", environment={"LOMO_CUDA": "0"})])
            others = [stage for stage in others if stage.environment.get("LOMO_KERNELS_BACKEND") != "cuda"]
        go(others)
    finally:  # also when this is stopped
        run.take_in()
        lines = summary(run, outcomes, named)
        (folder / "summary.txt").write_text("\n".join(lines) + "\n")
        print("\n==== SUMMARY", *lines, sep="\n", flush=True)
        shutil.rmtree(run.scratch, ignore_errors=True)
    return int(not outcomes or not all(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
