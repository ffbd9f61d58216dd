"""Few simulations tell many: what is alive at a given operator grows along a straight line, with the number of blocks
as with the number of sequences or tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

from .recorder import CATEGORIES, Peak, Sample

#: Of one simulation: the bytes of every category after each allocation, by the part of the step that it is in.
Parts = dict[Any, list[Sample]]


def peak_of(parts: Parts) -> Peak:
    return Peak.of(sample for samples in parts.values() for sample in samples)


def extrapolate(less: Parts, more: Parts, steps: int) -> Parts:
    """On the lines through both: what comes `steps` after `less`, where `more` comes one after it."""
    parts: Parts = {}
    for key, *pair in _aligned(less, more):
        parts.setdefault(key, []).append(tuple(a + (b - a) * steps for a, b in zip(*pair, strict=True)))
    return parts


def max_steps_below(less: Parts, more: Parts, steps: int, limit: int) -> float:
    """The last step after `less`, on the lines through both, where no sample is more than `limit`; `more` comes `steps`
    steps after it."""
    totals = ((sum(lower), sum(upper)) for _, lower, upper in _aligned(less, more))
    return min((limit - a) * steps // (b - a) if b > a else math.copysign(math.inf, limit - a) for a, b in totals)


def _aligned(less: Parts, more: Parts) -> Iterator[tuple[Any, Sample, Sample]]:
    """The same samples in both. Where a part has more of them in one than in the other, one for each weight of the
    model or each chunk of the loss, only the largest."""
    for key, ours in less.items():
        theirs = more[key]
        if len(ours) == len(theirs):
            yield from ((key, *pair) for pair in zip(ours, theirs, strict=True))
        else:
            by: list[Callable[[Sample], int]] = [sum, *map(itemgetter, range(len(CATEGORIES)))]
            yield from ((key, max(ours, key=value), max(theirs, key=value)) for value in by)


def largest(parts_at: Callable[[int], Parts], start: int, limit: int, most: float = math.inf) -> int:
    """The largest n >= 1 whose peak is at most `limit`: of n and n + 1, which were both simulated, one fits and the
    other does not. 0 where 1 does not fit; `most` where that fits.

    The lines through two n tell the next; at first through neighbours. Where the loss has another number of chunks, or
    a gradient takes the place of its factors, they bend, so only what was simulated is believed.

    Args:
        parts_at: simulates n; is asked again for some.
        start: the first guess, at most `most`.
        most: no more is asked for.
    """

    def fits(parts: Parts) -> bool:
        return max(sum(sample) for samples in parts.values() for sample in samples) <= limit

    low: int = 0  # fits
    high = most + 1  # does not
    n, before = start, start + 1 if start < most else start - 1
    for turn in itertools.count():
        if high == low + 1:
            break
        if turn:
            left, right = min(n, before), max(n, before)
            guess = left + max_steps_below(parts_at(left), parts_at(right), right - left, limit)
            if turn % 4 == 0 or guess == math.inf:  # the lines do not lead there
                guess = (low + high) // 2 if high < math.inf else 2 * low
            n, before = int(max(low, 1, min(guess, high - 1))), n
        if not fits(parts_at(n)):
            high = n
        elif n == most or not fits(parts_at(n + 1)):
            return n
        else:
            low = n + 1
    return low
