"""``python -m bench.compare OLD NEW``: what became faster or slower between two files of results.

Compared is the speed as a fraction of what ran beside it (the probe of memory bandwidth, a plain product, the rival's
step), which a busier or a slower machine changes little. A measurement counts as changed where the ranges that hold
nineteen of twenty samples of either have nothing in common.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from .results import Measurement, Results, Spread, read


def changes(old: Results, new: Results) -> Iterator[tuple[str, Measurement, Spread, Spread]]:
    """The verdict, the measurement, its fractions before and now: of all that both files time beside something. On a
    small GPU what steps are held to may not fit."""
    before = {one.key: one for one in old.measurements if one.beside_seconds}
    for one in new.measurements:
        if one.beside_seconds and one.key in before:
            was, now = before[one.key].fraction, one.fraction
            changed = "slower" if now.median < was.median else "faster"
            yield changed if was.apart(now) else "same", one, was, now


def main(old: Path, new: Path) -> int:
    """Prints them; returns 1 where something became slower.

    Raises:
        OSError, ValueError: a file cannot be read, or there is nothing to compare.
    """
    found = list(changes(read(old), read(new)))
    if not found:
        raise ValueError(f"{old} and {new} have no measurement in common")
    for verdict, one, *spreads in found:
        if verdict != "same":
            case = ", ".join(str(value) for value in one.case.values())
            was, now = (f"{of.median:.3f} ({of.low:.3f}-{of.high:.3f})" for of in spreads)
            print(f"{verdict}: {one.question}, {one.contestant}, {case}: {was} of {one.beside}, now {now}")
    verdicts = [verdict for verdict, *_ in found]
    print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("same", "faster", "slower")))
    return int("slower" in verdicts)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)  # 1: something became slower
