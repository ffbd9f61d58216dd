"""Who is compared with whom, and where a rival is faster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .results import Measurement, Results

BASE = "SGD, clip_grad_norm_"  # what training steps are compared with
FORWARD = "forward alone"  # no rival, but a part of every step
OURS = ("Lomo", "sgd_", "sq_norm_", "linear_", "embedding_", "product, s", "dense gradient, s")

#: What of ours a rival is held against, where there is a choice: the call that does at least as much.
COUNTERPARTS = {
    "update": {"mul_, add_": "sgd_ nearest, every scalar", "optimi SGD": "sgd_ stochastic", "": "sgd_ nearest"},
    "norm": {"": "sq_norm_"},
    "lists": {"_foreach_add_": "sgd_list_", "_foreach_norm": "sq_norm_list_"},
    "linear": {"addmm_": "linear_sgd_ nearest"},
    "embedding": {"index_add_": "embedding_sgd_"},
}


class Pair(NamedTuple):
    """A rival and what of ours is held against it."""

    rival: Measurement
    ours: Measurement

    @property
    def faster(self) -> bool:
        """Whether the rival is, by more than 2% in the median, whatever the spreads: against us in doubt."""
        return self.times > 1.02

    @property
    def times(self) -> float:
        """How many times as fast it is. Both ran in rounds of their own, so each is held to what ran beside it."""
        return self.rival.fraction.median / self.ours.fraction.median

    @property
    def smaller(self) -> bool:
        """Whether the rival takes less memory, by more than 1%."""
        return self.bytes > 1.01

    @property
    def bytes(self) -> float:
        """How many times the rival's peak ours is."""
        return self.ours.peak / self.rival.peak


def ours(contestant: str) -> bool:
    return contestant.startswith(OURS)


def clips(contestant: str) -> bool:
    """Whether a training step does, by the global norm."""
    return "clip" in contestant


def pairs(results: Results, question: str) -> Iterator[Pair]:
    """Every rival with each of ours that does the same in the same case. Where ours has one setting of malloc only, for
    it allocates nothing, that one.

    Raises:
        KeyError: `COUNTERPARTS` does not say what a rival is held against.
    """
    measured = [one for one in results.of(question) if one.contestant != FORWARD]
    for rival in (one for one in measured if not ours(one.contestant)):
        cases = [one for one in measured if ours(one.contestant) and _case(one) == _case(rival)]
        same_malloc = [one for one in cases if one.case.get("malloc") == rival.case.get("malloc")]
        for mine in same_malloc or cases:
            if _comparable(question, rival.contestant, mine.contestant):
                yield Pair(rival, mine)


def _comparable(question: str, rival: str, mine: str) -> bool:
    if question in ("hooks", "step", "data_parallel", "sharded", "memory"):
        return clips(rival) == clips(mine)
    known = COUNTERPARTS[question]
    return mine == (known[rival] if rival in known else known[""])


def _case(one: Measurement) -> dict[str, object]:
    return {name: value for name, value in one.case.items() if name != "malloc"}
