"""The `plan` command: will it fit? Peak memory per GPU by category for every method, and the largest batch and
sequence that fit, simulated."""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from ..demo.model import Config
from ..numbers import bytes_of
from . import paper
from .extrapolate import Parts, largest, peak_of
from .methods import LOMO_OPTIM_NEEDS, METHODS, SHARDED, lacking
from .models import SHAPES, Model, of_shape, of_transformers
from .recorder import CATEGORIES, Peak
from .simulate import step_of_blocks

if TYPE_CHECKING:
    from .budgets import BudgetStep

GIB = 2**30
#: Tensors of more bytes than a 64-bit integer holds cannot be simulated.
MOST_MEMORY, MOST_TOKENS = 2**50, 2**36
MOST_GPUS = 1024  # FSDP2 makes a view of each gathered weight for each of them
_UNITS = {"MB": 2**20, "MIB": 2**20, "GB": GIB, "GIB": GIB, "": GIB}
#: What FSDP2 gathers, and reduces, together: whole blocks; a block's attention and MLP apart; every linear layer apart.
#: Smaller groups take less memory, and more and shorter collectives.
GROUPS = ("block", "attention-mlp", "linear")
#: Sequences are tried in steps of so many tokens.
STEP = 128
BUDGET_HEAD = ["", "clip_memory", "kept", "peak", "modelled time", "fits"]
#: Of the bytes that all gradients take: budgets between none and all.
SHARES = (0.25, 0.5, 0.75)
#: Whether layers are fused, and `clip_memory`.
Budget = tuple[bool, int | None]
_SIZES = ("layers", "d_model", "heads", "kv_heads", "ffn", "vocab")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to the parser that `python -m lomo_kernels` makes for it."""
    shapes = ", ".join(SHAPES)
    parser.add_argument("--model", metavar="MODEL", help=f"{shapes}; or a Hugging Face config: folder, file or name")
    for name, what in zip(
        _SIZES,
        ("blocks", "width", "attention heads", "heads of keys and values", "width of the MLP", "vocabulary"),
        strict=True,
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"in place of --model: {what}")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="FSDP2 over so many (default: 1, no FSDP2)")
    parser.add_argument("--memory", default="24GB", help="of one GPU; GB are 2**30 bytes (default: %(default)s)")
    parser.add_argument("--seq", type=int, default=1024, metavar="N", help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences per GPU (default: %(default)s)")
    again = "compute each block's activations again in backward instead of keeping them"
    parser.add_argument("--checkpointing", action="store_true", help=again)
    chunk = "so many tokens' logits exist at a time, and are computed again in backward (default: all)"
    parser.add_argument("--chunk", type=int, metavar="TOKENS", help=chunk)
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="those whose names begin so: adamw, sgd, lomo, ...; may be repeated (default: all)",
    )
    group = "with several GPUs, what FSDP2 gathers at a time (default: linear, the least memory)"
    parser.add_argument("--group", choices=GROUPS, help=group)
    line = "what Lomo's clip_memory buys instead: bytes kept, peak and modelled time, from two passes to one; one GPU"
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--budgets", action="store_true", help=line)
    instead.add_argument(
        "--paper", action="store_true", help="the memory columns of the paper's Tables 1 and 2 instead"
    )


@dataclass(frozen=True)
class Setting:
    """What all methods have in common."""

    model: Model
    gpus: int
    checkpointing: bool
    chunk: int | None
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


def chosen(names: Sequence[str] | None, gpus: int) -> list[str]:
    """The methods whose names begin with one of `names`; those that can be sharded where there are several GPUs.

    Raises:
        ValueError: a name is the beginning of none.
    """
    possible = [name for name in METHODS if gpus == 1 or name in SHARDED]
    possible = [name for name in possible if not (name.startswith("lomo_optim") and lacking(LOMO_OPTIM_NEEDS))]
    if not names:
        return possible
    found = []
    for begin in names:
        those = [name for name in possible if name.lower().startswith(begin.lower())]
        if not those:
            raise ValueError(f"--method {begin} is none of: {'; '.join(possible)}")
        found += those
    return list(dict.fromkeys(found))


def check(args: argparse.Namespace) -> tuple[Model, int, list[str]]:
    """The model, the memory of one GPU in bytes, and the methods.

    Raises:
        ValueError: in words of the command line.
    """
    for name in ("gpus", "seq", "batch", "chunk", *_SIZES):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.batch * args.seq > MOST_TOKENS:
        raise ValueError(f"--batch {args.batch} of --seq {args.seq} are more than {MOST_TOKENS} tokens")
    if args.gpus > MOST_GPUS:
        raise ValueError(f"--gpus {args.gpus} are more than the {MOST_GPUS} that can be simulated")
    if args.group and args.gpus == 1:
        raise ValueError(f"--group {args.group} is of FSDP2: it needs --gpus of 2 or more")
    if args.budgets and args.gpus > 1:
        raise ValueError("--budgets is of one GPU: over several ranks all gradients are kept or none")
    if args.budgets and args.method:
        raise ValueError("--budgets is of Lomo with clipping, fused layers and plain ones: leave --method out")
    nbytes = bytes_of(args.memory, _UNITS)
    if nbytes is None:
        raise ValueError(f"--memory {args.memory} is not like 24GB, 24GiB or 500MB")
    memory = int(nbytes)
    if not memory:
        raise ValueError(f"--memory {args.memory} is none")
    if memory > MOST_MEMORY:
        raise ValueError(f"--memory {args.memory} is more than {MOST_MEMORY // GIB}GB")
    sizes = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    if (args.model is None) == (not sizes):
        raise ValueError("give --model, or --layers, --d-model, --heads, --ffn and --vocab")
    if sizes:
        absent = [name for name in _SIZES if name not in sizes and name != "kv_heads"]
        if absent:
            raise ValueError(f"--{absent[0].replace('_', '-')} is missing")
        model = of_shape(Config(**({"kv_heads": sizes["heads"]} | sizes)))
    elif args.model in SHAPES:
        model = of_shape(SHAPES[args.model])
    else:
        try:
            model = of_transformers(args.model)
        except ImportError:
            raise ValueError(
                f"--model {args.model}: none of {', '.join(SHAPES)}; for others: pip install transformers"
            ) from None
        except (OSError, ValueError) as error:
            raise ValueError(f"--model {args.model}: {str(error).splitlines()[0]}") from None
    if args.seq > model.longest:
        raise ValueError(f"--seq {args.seq} is more than the {model.longest} tokens of the model's config")
    return model, memory, chosen(args.method, args.gpus)


def main(args: argparse.Namespace) -> int:
    """Runs the command. Returns 0, or 2 after one sentence on stderr about an option that cannot be, or a model that
    cannot be simulated."""
    if args.paper:
        print_paper()
        return 0
    try:
        model, memory, names = check(args)
        setting = setting_of(args, model)
        rows = budget_rows(setting, args, memory) if args.budgets else rows_of(setting, args, memory, names)
    except (ValueError, NotImplementedError) as error:
        print(f"python -m lomo_kernels plan: {error}", file=sys.stderr)
        return 2
    where = f"{args.gpus} GPUs, FSDP2 by {setting.group}" if args.gpus > 1 else "1 GPU"
    how = ", checkpoints" if args.checkpointing else ""
    how += f", loss by {args.chunk} tokens" if args.chunk else ""
    at = f"at sequence {args.seq}, batch {args.batch}{how}, on {where}"
    if args.budgets:
        title = f"Lomo with clipping {at} of {memory / GIB:g} GiB; in GiB, time relative to keeping all"
        print_table(title, BUDGET_HEAD, rows)
        print("The time is modelled: operations of matrix products and attention, no memory traffic.")
        return 0
    head = ["", *CATEGORIES, "peak", "fits", f"batch at {args.seq}", f"sequence at batch {args.batch}"]
    print_table(f"Peak per GPU {at} of {memory / GIB:g} GiB; in GiB", head, rows)
    print("Beside it a GPU holds the CUDA context, cuBLAS's and NCCL's buffers and what fragmentation wastes.")
    return 0


def setting_of(args: argparse.Namespace, model: Model) -> Setting:
    return Setting(model, args.gpus, args.checkpointing, args.chunk, args.group or GROUPS[-1])


def rows_of(setting: Setting, args: argparse.Namespace, memory: int, names: list[str]) -> list[list[str]]:
    """The table's cells."""
    return side_by_side(lambda name: row(setting, args, memory, name), _row, names, args)


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
        with ProcessPoolExecutor(workers, get_context("spawn"), _start, (args,)) as pool:
            return [result for _, result in zip(shown, pool.map(there, items), strict=True)]


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


def step_of_budget(setting: Setting, args: argparse.Namespace, budget: Budget) -> BudgetStep:
    from .budgets import simulate_budget  # only here: torch's counter of operations takes a third of a second to import

    model = setting.model
    build, loss = model.build(model.blocks, setting.checkpointing), model.loss(args.batch, args.seq, setting.chunk)
    return simulate_budget(build, loss, budget[1], fused=budget[0])


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


def print_paper() -> None:
    """The memory columns of the paper's tables, and what they are here."""
    rows = []
    for name, theirs in progress(list(paper.TABLE_1.items()), "Table 1"):
        model, seq, batch = paper.MODEL, paper.SEQUENCE, paper.BATCH
        kept, again = (_of_paper(model, name, 1, checkpointing, batch, seq) for checkpointing in (False, True))
        pairs = [(theirs[category], kept.most[category]) for category in theirs]
        pairs += [(paper.ACTIVATIONS[one], peak.most["activations"]) for one, peak in ((False, kept), (True, again))]
        pairs += [(paper.TOTALS[one][name], peak.peak) for one, peak in ((False, kept), (True, again))]
        rows.append([name, *(f"{a:.2f} / {b / GIB:.2f}" for a, b in pairs)])
    head = ["", *theirs, "activations", "with checkpoints", "peak", "with checkpoints"]
    print_table("Table 1, LLaMA-7B, sequence 512, batch 8: paper / simulated, GiB", head, rows)
    rows = []
    for (model, name), (gpus, peak) in progress(list(paper.TABLE_2.items()), "Table 2"):
        found = (
            _of_paper(model, name, gpus, True, 1, 1024, group).peak for group in (GROUPS if gpus > 1 else GROUPS[:1])
        )
        cells = [f"{one / GIB:.2f}" for one in found]
        rows.append([f"{model}, {name}", f"{gpus}", f"{peak:.2f}", *cells, *[""] * (len(GROUPS) - len(cells))])
    head = ["", "GPUs", "paper", *(f"by {group}" for group in GROUPS)]
    print_table("Table 2, sequence 1024, batch 1: peak per GPU; ours with checkpoints and FSDP2, GiB", head, rows)


def _of_paper(
    model: str, name: str, gpus: int, checkpointing: bool, batch: int, seq: int, group: str = "block"
) -> Peak:
    setting = Setting(of_shape(SHAPES[model]), gpus, checkpointing, None, group)
    return peak_of(setting.step(paper.OURS[name], batch, seq))


def progress(items: list[Any], what: str) -> Generator[Any, None, None]:
    """The items, with a bar where rich is installed, else a line on stderr for each."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        for number, item in enumerate(items, start=1):
            print(f"{what} {number} of {len(items)}: {item}", file=sys.stderr)
            yield item
    else:
        console = Console(stderr=True)
        # Where there is no terminal it would print an empty line.
        yield from track(items, what, console=console, transient=True, disable=not console.is_terminal)


def print_table(title: str, head: list[str], rows: Iterable[list[str]]) -> None:
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    print(f"\n{title}\n")
    for name, *cells in table:
        line = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        print("  ".join(line).rstrip())
