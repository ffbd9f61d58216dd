"""The `plan` command: will it fit? Peak memory per GPU by category for every method, and the largest batch and
sequence that fit, simulated."""

from __future__ import annotations

import argparse
import sys

from .models import FUSED
from .options import GIB, check
from .printing import print_table
from .recorder import CATEGORIES
from .rows import budget_rows, rows_of, rows_of_table_1, rows_of_table_2, setting_of

BUDGET_HEAD = ["", "clip_memory", "kept", "peak", "modelled time", "fits"]


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
    if args.chunk:
        how += ", loss by blocks of logits" if args.chunk == FUSED else f", loss by {args.chunk} tokens"
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


def print_paper() -> None:
    """The memory columns of the paper's tables, and what they are here."""
    print_table("Table 1, LLaMA-7B, sequence 512, batch 8: paper / simulated, GiB", *rows_of_table_1())
    title = "Table 2, sequence 1024, batch 1: peak per GPU; ours with checkpoints and FSDP2, GiB"
    print_table(title, *rows_of_table_2())
