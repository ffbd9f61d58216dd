"""The format of measured results, and its one reader.

A file ``bench/results/<device>-<date>.json`` holds what one device gave on one day. Those of a device add up.

- ``environment``: device, driver, versions, commit, threads.
- ``missing``: contestants that could not run, by name, with the reason.
- ``measurements``: a list of `Measurement`, raw samples included.
- ``checks``: on a GPU, how each stage of bench/gpu.py ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SHORT = "-short"  # at the end of a file's name: it has less than every case
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DTYPES = ("bfloat16", "float16", "float32")  # of kernels, in the order in which they are measured and shown
BASE = "SGD, clip_grad_norm_"  # what training steps are compared with
FORWARD = "forward alone"  # no rival: a part of every step
OURS = ("Lomo", "AdaLomo", "sgd_", "sq_norm_", "linear_", "embedding_", "product, s", "dense gradient, s")


def ours(contestant: str) -> bool:
    return contestant.startswith(OURS)


def clips(contestant: str) -> bool:
    """Whether a training step does, by the global norm."""
    return "clip_grad_norm_" in contestant or "clipping" in contestant


class Spread(NamedTuple):
    """Median, and the range of nineteen samples of twenty: percentiles 2.5 and 97.5.

    Of 1367 comparisons between four runs of one commit the ranges were apart in 1, those of four samples of five in 8.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        fortieths = statistics.quantiles(samples, n=40, method="inclusive")
        return cls(statistics.median(samples), fortieths[0], fortieths[-1])

    def apart(self, other: Spread) -> bool:
        """Whether the two ranges have nothing in common."""
        return self.high < other.low or other.high < self.low


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One contestant in one case of one question (`bench/bench_<question>.py`).

    `seconds` are the raw samples, each of one call, step or backward. `beside` names what was run next to it in every
    round, and `beside_seconds` are its samples: the limit, the rival or the bare run that a sample is compared with.
    `memory` holds bytes: a peak by category, or the "weights", the "peak" above and the "states" in it. `most` holds
    each category's own maximum, at whatever time. `error` is relative to float64.
    """

    question: str
    contestant: str
    case: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: list[float] = dataclasses.field(default_factory=list)
    beside: str = ""
    beside_seconds: list[float] = dataclasses.field(default_factory=list)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    most: dict[str, int] = dataclasses.field(default_factory=dict)
    error: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same measurement in two files."""
        return self.question, self.contestant, *sorted(self.case.items())

    @property
    def time(self) -> Spread:
        """Seconds."""
        return Spread.of(self.seconds)

    def by_round(self, of: Callable[[float, float], float]) -> Spread:
        """Of each round's sample and that of what ran beside it."""
        return Spread.of([of(mine, other) for mine, other in zip(self.seconds, self.beside_seconds, strict=True)])

    @property
    def ratio(self) -> Spread:
        """Its time over that of what ran beside it."""
        return self.by_round(lambda mine, other: mine / other)

    @property
    def fraction(self) -> Spread:
        """Its speed as a fraction of that of what ran beside it."""
        return self.by_round(lambda mine, other: other / mine)

    @property
    def above(self) -> Spread:
        """Seconds above what ran beside it."""
        return self.by_round(lambda mine, other: mine - other)

    @property
    def peak(self) -> int:
        """Bytes: the weights and the peak above them, or all categories of a peak together."""
        return sum(size for name, size in self.memory.items() if name != "states" or "peak" not in self.memory)

    @property
    def reached(self) -> str:
        """Of a ceiling: bytes per second, or operations of a product of square matrices."""
        if side := self.case.get("side"):
            return f"{2 * side**3 / self.time.median / 1e12:.3g} TFLOP/s"
        return f"{self.case['moved'] / self.time.median / 1e9:.4g} GB/s"


@dataclasses.dataclass(frozen=True)
class Results:
    """What one file holds."""

    environment: dict[str, Any]
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    checks: dict[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, question: str, **case: Any) -> list[Measurement]:
        """The measurements of a question whose case has these values."""
        return [
            one
            for one in self.measurements
            if one.question == question and all(one.case.get(name) == value for name, value in case.items())
        ]

    def pooled(self, other: Results) -> Results:
        """The samples of both: the same contestants in two processes."""
        pooled = {one.key: one for one in self.measurements}
        for new in other.measurements:
            if old := pooled.get(new.key):
                both = old.seconds + new.seconds, old.beside_seconds + new.beside_seconds
                new = dataclasses.replace(old, seconds=both[0], beside_seconds=both[1])
            pooled[new.key] = new
        return Results(self.environment, self.missing | other.missing, list(pooled.values()))

    def questions(self) -> set[str]:
        return {one.question for one in self.measurements}


def read(file: Path) -> Results:
    """
    Raises:
        OSError: it cannot be read.
        ValueError: it is no file of results, or one of another version of this format.
    """
    try:
        content = json.loads(file.read_text())
        measurements = [Measurement(**one) for one in content["measurements"]]
        return Results(content["environment"], content["missing"], measurements, content.get("checks", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected results as bench/results.py describes them, got {type(error).__name__}: {error}; "
            "move it away and measure anew"
        ) from error


def writable(file: Path) -> None:
    """
    Raises:
        OSError: the file cannot be written.
        ValueError: it is there and holds something else than results.
    """
    if file.exists():
        read(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=file.parent):
        pass


def write(file: Path, results: Results) -> None:
    """One line per measurement: a readable difference, and a file that is not mostly line breaks. Without what is
    empty, and samples with four digits: the clock has no more."""
    lines = []
    for one in results.measurements:
        row = {name: value for name, value in dataclasses.asdict(one).items() if value not in (None, "", [], {})}
        for name in row.keys() & {"seconds", "beside_seconds"}:
            row[name] = [float(f"{sample:.4g}") for sample in row[name]]
        lines.append("  " + json.dumps(row))
    head = {"environment": results.environment, "missing": results.missing, "checks": results.checks}
    text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "measurements": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f".{file.name}.{os.getpid()}")  # nobody sees half a file
    whole.write_text(text)
    whole.replace(file)


def merged(old: Results, new: Results) -> Results:
    """Merges results of a device: two files, or an older and a newer state of one. A new measurement or check replaces
    the same old one. If a question was measured at another commit, its old measurements are dropped.
    ``environment["commits"]`` has the commit of each question and check."""
    before = old.environment.get("commits", {})
    commits = {name: new.environment["commit"] for name in sorted(new.questions() | new.checks.keys())}
    commits |= {name: commit for name, commit in new.environment.get("commits", {}).items() if name in commits}
    keys = {one.key for one in new.measurements}
    changed = {name for name in commits if commits[name] != before.get(name)}
    kept = [one for one in old.measurements if one.question not in changed and one.key not in keys]
    about = old.environment | new.environment | {"commits": before | commits}
    return Results(about, old.missing | new.missing, kept + new.measurements, old.checks | new.checks)


def add(file: Path, new: Results) -> None:
    """Merges `new` into a file."""
    write(file, merged(read(file) if file.exists() else Results({}), new))


def commit() -> str:
    """The commit checked out, with "+" where files differ from it; LOMO_COMMIT where that is given."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results", ":!*.md")
    return os.environ.get("LOMO_COMMIT") or git("rev-parse", "HEAD") + ("+" if changed else "") or "unknown"


def newest() -> Iterator[tuple[Path, ...]]:
    """The files of each device, the oldest first: those with every case if there is one, else the short ones."""
    files: dict[str, list[Path]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        files.setdefault(device_and_date(file)[0], []).append(file)
    for of_device in files.values():
        yield tuple([file for file in of_device if not is_short(file)] or of_device)


def device_and_date(file: Path) -> tuple[str, str]:
    """As its name says: ``<device>-<date>``, or ``<device>-<date>-<time>`` from `make gpu`."""
    found = re.fullmatch(r"(.*)-(\d{4}-\d\d-\d\d)(-\d{4})?", file.stem.removesuffix(SHORT))
    if not found:
        raise ValueError(f"{file}: expected a name like <device>-2026-01-31.json or <device>-2026-01-31-1200.json")
    return found[1], found[2]


def is_short(file: Path) -> bool:
    return file.stem.endswith(SHORT)
