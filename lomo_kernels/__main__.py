"""``python -m lomo_kernels``: ``info`` says which kernels are in force, ``demo`` trains a model with them, ``plan``
says what memory a training run needs."""

from __future__ import annotations

import argparse
import sys

import torch

from . import __version__, backends, ops


def info() -> int:
    """Prints operator x device: backend, instruction set or device code, and why."""
    print(f"lomo_kernels {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print("CPU library: torch 2.11 or newer (stable ABI)")
    built = backends.CUDA_LIBRARY.exists()
    print(f"CUDA library: {'torch 2.11 or newer (stable ABI)' if built else 'not built'}")
    print(f"torch's CUDA: {torch.version.cuda or 'none'}, ROCm: {torch.version.hip or 'none'}")
    print()
    rows = [("operator", "tensors", "backend", "detail", "why")]
    for choice in backends.choices():
        serving = {name: choice.of(name) for name in ops.OPERATORS}
        rows += [(name, serves.key, serves.backend, serves.detail, serves.reason) for name, serves in serving.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lomo_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | plan")
    commands.add_parser("info", help="which kernels are in force, and why")
    demo = commands.add_parser("demo", help="fine-tune a small language model with Lomo, SGD and AdamW, and compare")
    plan = commands.add_parser("plan", help="will it fit? peak memory of every method, and the largest batch that fits")
    from .demo import run  # the commands' own imports stay out of `import lomo_kernels`
    from .plan import command, options

    run.add_arguments(demo)
    options.add_arguments(plan)
    arguments = parser.parse_args()
    if arguments.command == "info":
        return info()
    return run.main(arguments) if arguments.command == "demo" else command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
