"""The cells of the `plan` command's tables, simulated."""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING, Any

from . import paper
from .extrapolate import Parts, largest, peak_of
from .methods import METHODS
from .models import SHAPES, Chunk, Model, of_shape
from .options import GIB, GROUPS, check
from .printing import progress
from .recorder import CATEGORIES, Peak
from .simulate import step_of_blocks

if TYPE_CHECKING:
    from .budgets import BudgetStep

#: Sequences are tried in steps of so many tokens.
STEP = 128
#: Of the bytes that all gradients take: budgets between none and all.
SHARES = (0.25, 0.5, 0.75)
#: Whether layers are fused, and `clip_memory`.
Budget = tuple[bool, int | None]


@dataclass(frozen=True)
class Setting:
    """What all methods have in common."""

    model: Model
    gpus: int
    checkpointing: bool
    chunk: Chunk
    group: str

    def step(self, method: str, batch: int, seq: int) -> Parts:
        """Of one GPU."""
        loss = self.model.loss(batch, seq, self.chunk)

        def build(blocks: int) -> Any:
            return self.model.build(blocks, self.checkpointing)

        blocks, way = self.model.blocks, METHODS[method]
        if self.gpus == 1:
            return step_of_blocks(build, blocks, loss, way, edge=1)
        from . import sharded

        edge = 2 if self.group == "block" else 1
        with sharded.ranks(self.gpus) as mesh:
            return step_of_blocks(lambda n: sharded.shard(build(n), mesh, self.group), blocks, loss, way, edge)


def setting_of(args: argparse.Namespace, model: Model) -> Setting:
    return Setting(model, args.gpus, args.checkpointing, args.chunk, args.group or GROUPS[-1])


def rows_of(setting: Setting, args: argparse.Namespace, memory: int, names: list[str]) -> list[list[str]]:
    """The table's cells."""
    return side_by_side(lambda name: row(setting, args, memory, name), _row, names, args)


def row(setting: Setting, args: argparse.Namespace, memory: int, name: str) -> list[str]:
    """The table's cells for one method."""
    batch, seq = args.batch, args.seq

    @functools.cache
    def step(batch: int, seq: int) -> Parts:
        return setting.step(name, batch, seq)

    most_batch = largest(lambda n: step(n, seq), batch, memory)
    longest = setting.model.longest
    most = longest // STEP if longest < math.inf else math.inf
    most_seq = largest(lambda n: step(batch, n * STEP), max(1, seq // STEP), memory, most) * STEP
    here = peak_of(step(batch, seq))
    if here.peak <= memory:  # between two steps
        most_seq = max(most_seq, seq)
    cells = [f"{here.at_peak[category] / GIB:.2f}" for category in CATEGORIES]
    fits = "yes" if here.peak <= memory else "no"
    return [name, *cells, f"{here.peak / GIB:.2f}", fits, f"{most_batch:,}", f"{most_seq:,}"]


def budget_rows(setting: Setting, args: argparse.Namespace, memory: int) -> list[list[str]]:
    """The cells of the table of budgets: for fused layers, then for plain ones, from two passes to one."""

    def steps_of(budgets: list[Budget]) -> dict[Budget, BudgetStep]:
        steps = side_by_side(lambda budget: step_of_budget(setting, args, budget), _step_of_budget, budgets, args)
        return dict(zip(budgets, steps, strict=True))

    steps = steps_of([(fused, clip_memory) for fused in (True, False) for clip_memory in (0, None)])
    steps |= steps_of([(fused, int(share * steps[fused, None].kept)) for fused in (True, False) for share in SHARES])
    rows = []
    for fused, clip_memory in sorted(steps, key=lambda budget: (not budget[0], budget[1] is None, budget[1])):
        step, everything = steps[fused, clip_memory], steps[fused, None]
        cells = ["all" if clip_memory is None else f"{clip_memory / GIB:.2f}"]
        cells += [f"{step.kept / GIB:.2f}", f"{step.peak.peak / GIB:.2f}", f"{step.flops / everything.flops:.2f}"]
        cells.append("yes" if step.peak.peak <= memory else "no")
        rows.append(["fused layers" if fused else "plain layers", *cells])
    return rows


def step_of_budget(setting: Setting, args: argparse.Namespace, budget: Budget) -> BudgetStep:
    from .budgets import simulate_budget  # only here: torch's counter of operations takes a third of a second to import

    model = setting.model
    build, loss = model.build(model.blocks, setting.checkpointing), model.loss(args.batch, args.seq, setting.chunk)
    return simulate_budget(build, loss, budget[1], fused=budget[0])


def side_by_side(
    here: Callable[[Any], Any], there: Callable[[Any], Any], items: list[Any], args: argparse.Namespace
) -> list[Any]:
    """`here` of each item, or `there` by as many processes as there are cores, each of at least two items: until it has
    imported torch one has passed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, len(items) // 2)
    with closing(progress(items, "simulating")) as shown:  # an error is printed when the bar has gone
        if workers < 2:
            return [here(item) for item in shown]
        with ProcessPoolExecutor(workers, _context(), _start, (args,)) as pool:
            return [result for _, result in zip(shown, pool.map(there, items), strict=True)]


def _context() -> BaseContext:
    """Processes are forked from one that imports torch once for all of them, and for a later call. Otherwise each
    imports it itself, which takes 2 s."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


#: What a process of `side_by_side` calls `row` and `step_of_budget` with.
_asked: tuple[Setting, argparse.Namespace, int]


def _start(args: argparse.Namespace) -> None:
    """A process of `side_by_side` makes the model itself: one of transformers cannot be sent."""
    global _asked
    model, memory, _ = check(args)
    _asked = setting_of(args, model), args, memory


def _row(name: str) -> list[str]:
    return row(*_asked, name)


def _step_of_budget(budget: Budget) -> BudgetStep:
    setting, args, _ = _asked
    return step_of_budget(setting, args, budget)


def rows_of_table_1() -> tuple[list[str], list[list[str]]]:
    """Head and cells: what the paper's Table 1 has, and what is simulated."""
    rows = []
    for name, theirs in progress(list(paper.TABLE_1.items()), "Table 1"):
        model, seq, batch = paper.MODEL, paper.SEQUENCE, paper.BATCH
        kept, again = (_of_paper(model, name, 1, checkpointing, batch, seq) for checkpointing in (False, True))
        pairs = [(theirs[category], kept.most[category]) for category in theirs]
        pairs += [
            (paper.ACTIVATIONS[checkpointing], peak.most["activations"])
            for checkpointing, peak in ((False, kept), (True, again))
        ]
        pairs += [
            (paper.TOTALS[checkpointing][name], peak.peak) for checkpointing, peak in ((False, kept), (True, again))
        ]
        rows.append([name, *(f"{a:.2f} / {b / GIB:.2f}" for a, b in pairs)])
    return ["", *theirs, "activations", "with checkpoints", "peak", "with checkpoints"], rows


def rows_of_table_2() -> tuple[list[str], list[list[str]]]:
    """The same of Table 2."""
    rows = []
    for (model, name), (gpus, peak) in progress(list(paper.TABLE_2.items()), "Table 2"):
        peaks = (
            _of_paper(model, name, gpus, True, 1, 1024, group).peak for group in (GROUPS if gpus > 1 else GROUPS[:1])
        )
        cells = [f"{peak_bytes / GIB:.2f}" for peak_bytes in peaks]
        rows.append([f"{model}, {name}", f"{gpus}", f"{peak:.2f}", *cells, *[""] * (len(GROUPS) - len(cells))])
    return ["", "GPUs", "paper", *(f"by {group}" for group in GROUPS)], rows


def _of_paper(
    model: str, name: str, gpus: int, checkpointing: bool, batch: int, seq: int, group: str = "block"
) -> Peak:
    setting = Setting(of_shape(SHAPES[model]), gpus, checkpointing, None, group)
    return peak_of(setting.step(paper.OURS[name], batch, seq))
