"""``python -m bench.compare OLD NEW``: what became faster or slower between two files of results.

Compared is the speed as a fraction of what ran beside it (the probe of memory bandwidth, a plain product, the rival's
step), which a busier or a slower machine changes little. A measurement counts as changed where the ranges that hold
nineteen of twenty samples of either have nothing in common.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .results import Measurement, Results, Spread, read


class Change(NamedTuple):
    """A measurement in two files: fractions of the speed of what ran beside it."""

    measurement: Measurement
    old: Spread
    new: Spread

    @property
    def verdict(self) -> str:
        if not self.old.apart(self.new):
            return "same"
        return "slower" if self.new.median < self.old.median else "faster"


def changes(old: Results, new: Results) -> Iterator[Change]:
    """Of all timed measurements that both have, beside something: on a small GPU what steps are held to may not fit."""
    before = {one.key: one for one in old.measurements if one.beside_seconds}
    for one in new.measurements:
        if one.beside_seconds and one.key in before:
            yield Change(one, before[one.key].fraction, one.fraction)


def main(old: Path, new: Path) -> int:
    """Prints them; returns 1 where something became slower.

    Raises:
        OSError, ValueError: a file cannot be read, or there is nothing to compare.
    """
    found = list(changes(read(old), read(new)))
    if not found:
        raise ValueError(f"{old} and {new} have no measurement in common")
    for change in found:
        if change.verdict != "same":
            one = change.measurement
            case = ", ".join(str(value) for value in one.case.values())
            was, now = (f"{s.median:.3f} ({s.low:.3f}-{s.high:.3f})" for s in (change.old, change.new))
            print(f"{change.verdict}: {one.question}, {one.contestant}, {case}: {was} of {one.beside}, now {now}")
    count = {verdict: sum(change.verdict == verdict for change in found) for verdict in ("same", "faster", "slower")}
    print(", ".join(f"{number} {verdict}" for verdict, number in count.items()))
    return bool(count["slower"])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)  # 1: something became slower
