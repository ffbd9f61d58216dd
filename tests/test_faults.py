"""A sample of the faults that `make faults` puts into every point: `docs/faults.md` says what is tried, and its result.

The sample starts at another point of each mode, so the modes together see most of the code that they share.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from faults import calls, kills, lines, long_run, memory, scenes, threads

pytestmark = pytest.mark.filterwarnings("ignore")

Faults = Iterable[tuple[str, str, str]]


def nothing_lost(faults: Faults) -> dict[str, int]:
    """The number of points by outcome."""
    outcomes: dict[str, int] = {}
    for point, outcome, wrong in faults:
        assert not wrong, f"{point}: {wrong}"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def sample(kind: str, name: str, faults: Callable[[Any, int, int], Faults], stride: int) -> dict[str, int]:
    with scenes.small_tiles():
        scene = calls.CALLS[kind](name)
        outcomes = nothing_lost(faults(scene, stride, zlib.crc32(f"{kind} {name}".encode())))
        scene.optimizer.remove()
        scene.twin_optimizer.remove()
    return outcomes


@pytest.mark.parametrize(
    "faults", [memory.faults, pytest.param(lines.faults, marks=pytest.mark.slow)], ids=["memory", "lines"]
)
def test_a_step_that_breaks_off(faults: Any) -> None:
    """8 s each: 34 modes, of which three need 101 steps before, with some six points in each."""
    total: dict[str, int] = {}
    for name in scenes.MODES:
        for outcome, count in sample("step", name, faults, 61 if faults is memory.faults else 311).items():
            total[outcome] = total.get(outcome, 0) + count
    assert total.keys() >= {"unchanged", "partial", "complete"} and sum(total.values()) > 150, total


@pytest.mark.parametrize("kind", ["load_state_dict", "add_param_group", "Lomo()"])
def test_a_call_that_breaks_off(kind: str) -> None:
    for faults, stride in ((memory.faults, 11), (lines.faults, 97)):
        assert sum(sample(kind, "split, fused adalomo", faults, stride).values()) >= 3


@pytest.mark.parametrize("way", kills.WAYS)
def test_a_kill_while_a_run_is_saved(tmp_path: Path, way: str) -> None:
    assert nothing_lost(kills.faults("split, fused adalomo", way, tmp_path, kills=2)) == {"killed": 2}


def test_a_torn_checkpoint_is_refused(tmp_path: Path) -> None:
    assert nothing_lost(kills.torn("split, fused adalomo", tmp_path, points=8)) == {"refused": 8}


@pytest.mark.parametrize("case", threads.CASES)
def test_threads_and_forks(case: str) -> None:
    assert threads.CASES[case]("split, fused adalomo") == ""


def test_counters_and_a_short_long_run() -> None:
    assert long_run.counters() == ""
    one, again = long_run.run(steps=100), long_run.run(steps=100)
    assert long_run.wrong_with(one, again) == ""
