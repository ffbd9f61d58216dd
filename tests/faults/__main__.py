"""``python -m faults [PART ...] [--stride N]``: puts faults into every point, and prints a table of what was left."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from . import calls, kills, lines, long_run, memory, ranks, scenes, threads

Faults = Iterable[tuple[str, str, str]]
#: Whose numbers, groups and hooks a call of these changes: of modes that keep something of each kind.
CALLED = ("hook", "clip_tensor", "split, fused adalomo", "dynamic")


def tally(title: str, faults: Faults) -> int:
    """Prints one row of a table, and what is wrong. Returns how much that is."""
    outcomes: Counter[str] = Counter()
    wrong = 0
    for point, outcome, said in faults:
        outcomes[outcome] += 1
        if said:
            wrong += 1
            print(f"WRONG: {title}, {point}: {said}", flush=True)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"| {title} | {sum(outcomes.values())} | {counts} | {wrong} |", flush=True)
    return wrong


def of_steps(faults: Callable[[scenes.Scene, int, int], Faults], stride: int, offset: int = 0) -> int:
    wrong = 0
    with scenes.small_tiles():
        for call, kind in calls.CALLS.items():
            for name in scenes.MODES if call == "step" else CALLED:
                scene = kind(name)
                wrong += tally(name if call == "step" else f"{call}, {name}", faults(scene, stride, offset))
                scene.optimizer.remove()
                scene.twin_optimizer.remove()
    return wrong


def of_kills(stride: int) -> int:
    wrong = 0
    for way in kills.WAYS:
        with tempfile.TemporaryDirectory() as folder:
            name = "split, fused adalomo"
            wrong += tally(f"kill -9, {way}", kills.faults(name, way, Path(folder), max(100 // stride, 1)))
    with tempfile.TemporaryDirectory() as folder:
        wrong += tally("torn checkpoint", kills.torn("split, fused adalomo", Path(folder), max(200 // stride, 4)))
    return wrong


def of_ranks(stride: int) -> int:
    wrong = 0
    for engine in ranks.SPREADS:
        for settings in ranks.SETTINGS:
            for way in ("dies", "raises"):
                points = max((24 if way == "dies" else 4) // stride, 1)
                title = f"rank {way}, {engine}, {settings}"
                wrong += tally(title, ranks.faults(engine, settings, points, way))
    return wrong


def of_long_runs(stride: int) -> int:
    steps = max(long_run.STEPS // stride, 200)
    one, again = long_run.run(steps=steps), long_run.run(steps=steps)
    print(one)
    two = long_run.on_two_ranks(steps), long_run.on_two_ranks(steps)
    print(two[0][0])
    rows = {
        "counters at 2^24, 2^31, 2^32, 2^53, 2^62": long_run.counters(),
        f"{steps} steps": long_run.wrong_with(one, again),
        f"{steps} steps, two ranks": long_run.wrong_with(two[0][0], two[1][0]),
        f"{steps} steps, both ranks": long_run.wrong_with(*two[0]),
    }
    return sum(tally(title, [("", "ended", said)]) for title, said in rows.items())


PARTS: dict[str, Callable[[int], int]] = {
    "memory": lambda stride: of_steps(memory.faults, stride),
    "lines": lambda stride: of_steps(lines.faults, stride),
    "kills": of_kills,
    "threads": lambda stride: tally("threads and forks", threads.faults()),
    "ranks": of_ranks,
    "long": of_long_runs,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m faults")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--stride", type=int, default=1, help="every N-th point only")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    raise SystemExit(min(sum(PARTS[part](given.stride) for part in given.parts or PARTS), 1))
