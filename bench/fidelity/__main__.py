"""Do rules and roundings learn as well as AdamW in float32? Fine-tunes two pre-trained models by every method, chooses
learning rates on a validation part, and reports three seeds on a test part. A stopped run continues where it was."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import report
from .methods import METHODS
from .study import COST, ROUNDS, RUN, SEEDS, Comparison, Results, about, cost
from .tasks import BUILD, TASKS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__)
    parser.add_argument("task", nargs="*", help="llama, minilm, or report: only tables and pictures (default: all)")
    parser.add_argument("--quick", action="store_true", help="small models, no tuning, one seed: 2 minutes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, which runs larger models (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--only", nargs="*", metavar="METHOD", help=f"of: {', '.join(METHODS)}")
    parser.add_argument("--output", type=Path, help="folder of the results (default: bench/results/fidelity)")
    given = parser.parse_args(arguments)
    asked = given.task or [*TASKS, *([] if given.quick or given.output else ["report"])]
    if unknown := set(asked) - {*TASKS, "report"} | set(given.only or ()) - set(METHODS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU: torch.cuda.is_available() is False in this environment")
    torch.set_num_threads(given.threads)
    size = "quick" if given.quick else given.device
    folder = given.output or (BUILD / "quick" if given.quick else report.RESULTS)
    methods = tuple(given.only or METHODS)
    costs = []
    for name in (name for name in asked if name in TASKS):
        stem = name if given.device == "cpu" else f"{name}_{given.device}"
        try:
            task = TASKS[name](TASKS[name].SIZES[size], given.device)
            runs = Results(folder / f"{stem}.csv", RUN, 5, about(task))
            costs.append((stem, task, Results(folder / f"{stem}_cost.csv", COST, 3, about(task))))
        except ValueError as error:
            print(f"python -m bench.fidelity: {error}", file=sys.stderr)
            return 2
        Comparison(task, runs, tune=not given.quick).run(methods, SEEDS[:1] if given.quick else SEEDS)
    for stem, task, results in costs:  # last, so that they can be had again while the machine is quiet
        cost(task, results, methods, rounds=3 if given.quick else ROUNDS)
        print(report.page(stem, folder))
    if "report" in asked:
        report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
