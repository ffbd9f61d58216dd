"""``python -m bench``: every bench in interleaved rounds, one table per question, and a file in bench/results/."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def table(title: str, rows: Iterable[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> None:
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}\n")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def spread(value: dict[str, float], form: str) -> str:
    return f"{value['median']:{form}} ({value['q1']:{form}} to {value['q3']:{form}})"


BANDWIDTH: dict[str, Callable[[dict[str, Any]], str]] = {
    "dtype": lambda row: row["dtype"],
    "what": lambda row: row["name"],
    "ms": lambda row: f"{row['ms']['median']:.2f}",
    "GB/s": lambda row: f"{row['gb_per_s']:.1f}",
    "of probe (quartiles)": lambda row: spread(row["of_probe"], ".2f"),
}
ACCURACY: dict[str, Callable[[dict[str, Any]], str]] = {
    "dtype": lambda row: row["dtype"],
    "what": lambda row: row["name"],
    "relative error": lambda row: f"{row['relative_error']:.1e}",
}
HOOKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "parameters": lambda row: str(row["parameters"]),
    "dtype": lambda row: row["dtype"],
    "what": lambda row: row["name"],
    "us per parameter (quartiles)": lambda row: spread(row["us_per_parameter"], ".2f"),
    "of minima": lambda row: f"{row['us_per_parameter_of_minima']:.2f}",
    "bare backward": lambda row: f"{row['bare_us_per_parameter']:.2f}",
}


def main() -> int:
    # The benches import one another's helpers as pytest lets them, and the probes from where `make testing` puts them.
    sys.path[:0] = [str(HERE), str(HERE.parent / "build" / "testing")]
    import bench_hooks
    import bench_norm
    import bench_update
    import measure

    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=measure.ROUNDS, help="at least 2, default %(default)s")
    today = datetime.date.today()
    parser.add_argument("--date", type=datetime.date.fromisoformat, default=today, help="in the file's name")
    arguments = parser.parse_args()

    about = measure.device()
    print("\n".join(f"{key}: {value}" for key, value in about.items()))

    update = bench_update.run(arguments.rounds)
    table("Update of a 4096 x 4096 parameter: is it as fast as memory?", update, BANDWIDTH)
    norm = bench_norm.run(arguments.rounds)
    table("Norm of a 4096 x 4096 gradient: is it as fast as memory?", norm, BANDWIDTH)
    accuracy = bench_norm.run_accuracy()
    table(f"Norm of {bench_norm.LARGE:,} elements: is it right?", accuracy, ACCURACY)
    hooks, missing = bench_hooks.run(arguments.rounds)
    table("Backward with update, beyond a bare backward: what does a small parameter cost?", hooks, HOOKS)
    for name, reason in missing.items():
        print(f"missing: {name} ({reason})")

    sections = {
        "rounds": arguments.rounds,
        "update": update,
        "norm": norm,
        "norm_accuracy": accuracy,
        "hooks": hooks,
        "hooks_missing": missing,
    }
    path = measure.write(about, sections, arguments.date)
    print(f"\nwritten: {path.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
