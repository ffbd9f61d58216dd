"""Tables and progress bars of the `plan` command."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from typing import Any


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
