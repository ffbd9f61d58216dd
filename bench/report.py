"""``python -m bench.report``: writes the tables and plots of measured results into the documents.

A table stands between ``<!-- bench: NAME -->`` and ``<!-- end bench -->`` in README.md, docs/ and
bench/results/README.md, where NAME is a key of `TABLES`. What was not measured is left out. tests/test_report.py checks
that the documents say what the committed results say.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import paper, results
from .results import BASE, ROOT, Measurement, Results, Spread, device_and_date, ours

try:
    import pandas as pd
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"tables and plots need {error.name}: pip install '.[bench]'", name=error.name) from error

MARK = re.compile(r"(<!-- bench: ([\w ]+) -->\n).*?(<!-- end bench -->)", re.DOTALL)
SETTING = ["backend", "detail", "malloc"]  # what a process was set to
HEADLINE = 2**24  # elements: neither a parameter nor its gradient fits in a cache


class Device(NamedTuple):
    """What was measured on one device: the files, the newest last, and a row for each measurement."""

    files: tuple[Path, ...]
    results: Results
    rows: pd.DataFrame

    @classmethod
    def of(cls, files: tuple[Path, ...], measured: Results) -> Device:
        """With the paper's own rows, where its case was simulated."""
        papers = paper.measurements() if measured.of("memory", model=paper.MODEL) else []
        return cls(files, measured, frame(papers + measured.measurements))

    @property
    def name(self) -> str:
        return device_and_date(self.files[-1])[0]

    @property
    def is_cpu(self) -> bool:
        return "capability" not in self.results.environment

    @property
    def title(self) -> str:
        detail = self.rows["detail"].dropna().iloc[0] if self.is_cpu and len(self.rows) else ""
        return ", ".join(filter(None, (str(self.results.environment["device"]), detail)))

    def of_question(self, question: str) -> pd.DataFrame:
        """The rows of a question, without columns that it does not have."""
        found = self.rows[self.rows["question"] == question] if len(self.rows) else self.rows
        return found.dropna(axis="columns", how="all")


def devices() -> list[Device]:
    """Every device, with all of its files that count."""
    return [Device.of(files, functools.reduce(results.merged, map(results.read, files))) for files in results.newest()]


def frame(measurements: list[Measurement]) -> pd.DataFrame:
    """A row for each measurement: its case, what is shown of it, and a label that names what differs from the setting
    of a process that forces nothing, which is measured first."""
    normal: dict[str, dict[str, Any]] = {}
    rows = []
    for one in measurements:
        usual = normal.setdefault(one.question, one.case)
        other = {key: one.case[key] for key in SETTING if one.case.get(key) != usual.get(key)}
        row: dict[str, Any] = {"question": one.question, "contestant": one.contestant, **one.case}
        row["label"] = ", ".join(filter(None, [one.contestant, words(other)]))
        row |= {"usual": not other.keys() - {"malloc"}, "beside": one.beside, "error": one.error}
        row |= {"peak": one.memory.get("peak"), "states": one.memory.get("states"), "bytes": one.peak or None}
        for moment, sizes in {"at peak": one.memory, "most": one.most or one.memory}.items():
            row |= {f"{name}, {moment}": size for name, size in sizes.items()}
        if one.seconds:
            row |= {
                "seconds": one.time.median,
                "reached": one.reached if one.question == "ceilings" else None,
                "tokens/s": one.case.get("tokens", 0) / one.time.median,
            }
        if one.beside_seconds:
            row |= {"ratio": one.ratio, "fraction": one.fraction}
            if number := one.case.get("parameters"):
                row["cost"] = Spread(*(1e6 * value / number for value in one.above))
        rows.append(row)
    return pd.DataFrame(rows)


# --- words -----------------------------------------------------------------------------------------------------------


def spread(of: Any, digits: int = 2) -> str:
    """Median, and the range of nineteen samples of twenty. Small ones have two digits more."""
    if not isinstance(of, Spread):
        return "-"
    digits += 2 * (of.median < 0.1)
    return f"{of.median:.{digits}f} ({of.low:.{digits}f}-{of.high:.{digits}f})"


def median(of: Any) -> str:
    return f"{of.median:.2f}" if isinstance(of, Spread) else "-"


def seconds(value: float) -> str:
    """With three digits, in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def count(number: float) -> str:
    """1024 is 1 Ki."""
    for unit, size in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if number >= size and number % size == 0:
            return f"{int(number) // size} {unit}"
    return str(int(number))


def number(form: str, unit: float = 1.0) -> Callable[[float], str]:
    return lambda value: form.format(value / unit) if value == value else "-"


def words(case: dict[str, Any]) -> str:
    """A case in words."""

    def word(key: str, value: Any) -> str:
        if key == "checkpointing":
            return "checkpointing" if value else "no checkpointing"
        if isinstance(value, (int, float)):
            return f"{count(value)} {key}"
        return {"model": f"Llama {value}", "malloc": f"{value} malloc"}.get(key, str(value))

    return ", ".join(word(key, value) for key, value in case.items())


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(head: str, cells: pd.DataFrame) -> str:
    """Numbers stand to the right; ours is bold."""
    lines = [[head, *cells.columns]]
    lines += [[f"**{row[0]}**" if ours(row[0]) else row[0], *row[1:]] for row in cells.itertuples()]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|---|" + "---:|" * len(cells.columns), *text[1:]]) + "\n"


class Table(NamedTuple):
    """A row for each label, and a column for each of `columns`, names in `COLUMNS`. With `across` there is one value, a
    column for each case, and ours comes first. Each case of `each` has a table of its own. Heads may name the "{case}"
    and what ran "{beside}"."""

    head: str
    columns: Sequence[str]
    each: Sequence[str] = ()
    across: Sequence[str] = ()
    label: str = "label"
    select: Callable[[pd.DataFrame], pd.DataFrame] = lambda rows: rows

    def __call__(self, device: Device, question: str) -> Iterator[str]:
        rows = self.select(device.of_question(question))
        each, across = ([key for key in keys if key in rows] for keys in (self.each, self.across))
        columns = {head: COLUMNS[head] for head in self.columns if COLUMNS[head][0] in rows}
        for case, group in rows.groupby(each or (lambda _: ""), sort=False) if columns else []:
            said = {"case": words(dict(zip(each, case, strict=False))), "beside": group["beside"].iloc[0]}
            if across:
                ((value, show),) = columns.values()
                cells = group.pivot_table(value, self.label, across, aggfunc="first", sort=False).map(show)
                cells = cells.sort_index(axis="columns").sort_index(key=lambda labels: ~labels.map(ours), kind="stable")
                cells.columns = [words(case) for case in cells.columns.to_frame().to_dict("records")]
            else:
                values = group.groupby(self.label, sort=False).first()
                cells = pd.DataFrame(
                    {head.format(**said): values[of].map(show) for head, (of, show) in columns.items()}
                )
            yield markdown(self.head.format(**said), cells)


def usual(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["usual"]]


def at_headline(rows: pd.DataFrame) -> pd.DataFrame:
    """The largest size up to `HEADLINE`, or the smallest there is."""
    sizes = rows["elements"].unique()
    return rows[rows["elements"] == max((size for size in sizes if size <= HEADLINE), default=min(sizes))]


def headline(rows: pd.DataFrame) -> pd.DataFrame:
    return at_headline(usual(rows))


def by_backend(rows: pd.DataFrame) -> pd.DataFrame:
    """Ours with every instruction set or backend, if there are several."""
    mine = rows["contestant"].isin(["sgd_ nearest", "sgd_ stochastic", "sq_norm_"])
    rows = at_headline(rows[mine & ~rows["label"].str.endswith("malloc")])
    several = max(rows["detail"].nunique(), rows["backend"].nunique()) > 1
    return rows.assign(label=rows["contestant"] + ", " + rows["detail"]) if several else rows.iloc[:0]


def update_short(rows: pd.DataFrame) -> pd.DataFrame:
    """bfloat16, rivals with both mallocs."""
    shown = ("sgd_ nearest", "sgd_ stochastic", "add_", "SGD foreach", "lomo_optim")
    return rows[rows["usual"] & rows["contestant"].isin(shown) & (rows["dtype"] == "bfloat16")]


def step_short(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the first case five methods, with each malloc."""
    fused = (f"Lomo, clipping, {passes}, fused" for passes in ("two passes", "one pass"))
    shown = rows["contestant"].isin([BASE, "lomo_optim, clipping", "Lomo", *fused])
    return both_mallocs(rows[shown & (rows[STEP] == rows.iloc[0][STEP]).all(axis="columns")])


def both_mallocs(rows: pd.DataFrame) -> pd.DataFrame:
    """A column of times for each malloc."""
    if "malloc" not in rows or "ratio" not in rows:
        return rows
    times = {name: rows["ratio"].where(rows["malloc"] == name) for name in rows["malloc"].unique()}
    return rows.drop(columns="ratio").assign(**times)


def really_run(rows: pd.DataFrame) -> pd.DataFrame:
    """The model that ran on the device, and its simulation."""
    rows = rows[rows["model"] != paper.MODEL]
    kept = rows["checkpointing"].map(lambda saved: words({"checkpointing": saved}))
    rows = rows.assign(label=rows["contestant"] + ", " + kept)
    real, simulated = (rows[rows["how"] == how].set_index("label") for how in ("measured", "simulated"))
    real = real.assign(measured=real["bytes"], simulated=simulated["bytes"]).reset_index()
    return real.assign(**{"simulated / measured": real["simulated"] / real["measured"]})


def papers_case(rows: pd.DataFrame) -> pd.DataFrame:
    """LLaMA-7B as the paper's Table 1 has it, loss not in chunks."""
    asked = {"model": paper.MODEL, "sequence": paper.SEQUENCE, "batch": paper.BATCH}
    rows = rows[(rows[list(asked)] == list(asked.values())).all(axis="columns")]
    rows = rows[rows["chunk"].isna()] if "chunk" in rows else rows
    old = rows["kernels"].notna() if "kernels" in rows else pd.Series(False, rows.index)
    return rows.assign(label=rows["contestant"] + ", " + rows["how"] + old.map({True: ", kernels of 2023", False: ""}))


def environment(device: Device, _: str) -> Iterator[str]:
    about = device.results.environment
    commits = about.get("commits", {"everything": about["commit"]}).items()
    rows = {
        key.replace("_", " "): about[key] for key in about if key not in ("peers", "commits", "commit", "capability")
    }
    rows["peers"] = ", ".join(map(" ".join, about.get("peers", {}).items()))
    rows["commit"] = "; ".join(f"{commit[:7]}{'+' * commit.endswith('+')} ({question})" for question, commit in commits)
    rows["date"] = device_and_date(device.files[-1])[1]
    rows["file"] = ", ".join(f"[{file.name}]({file.name})" for file in device.files)
    yield markdown("", pd.Series(rows).astype(str).to_frame(""))
    checks, missing = device.results.checks.items(), device.results.missing.items()
    if checks:
        yield "".join(f"- {stage}: {check['said']}, {check['seconds']:.0f} s\n" for stage, check in checks)
    if missing:
        yield "Missing:\n\n" + "".join(f"- {what}: {why}\n" for what, why in missing)


def source(device: Device, _: str) -> Iterator[str]:
    """One line: what gave the figures."""
    about, dates = device.results.environment, [device_and_date(file)[1] for file in device.files]
    threads = f"{about['threads']} thread, " if device.is_cpu else ""
    yield f"{device.title}, {threads}torch {about['torch']}, {' and '.join(dates)}.\n"


#: By head: what of `frame` stands in a column, and how. Where a column stands for a case, the head is the case's.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "fraction": ("fraction", spread),
    "median": ("fraction", median),
    "ratio": ("ratio", spread),
    "error": ("error", number("{:.0e}")),
    "µs": ("cost", functools.partial(spread, digits=1)),
    "step": ("seconds", seconds),
    "time": ("seconds", seconds),
    "time, {beside} = 1": ("ratio", spread),
    "time, stock malloc": ("stock", spread),
    "time, tuned malloc": ("tuned", spread),
    "reached": ("reached", str),
    "tokens/s": ("tokens/s", number("{:.0f}")),
    "peak above the weights, GiB": ("peak", number("{:.3f}", 2**30)),
    "peak above the weights, MiB": ("peak", number("{:.0f}", 2**20)),
    "kept between steps": ("states", number("{:.0f}", 2**20)),
    **{name: (f"{name}, most", number("{:.2f}", 2**30)) for name in paper.CATEGORIES},
    "peak": ("bytes", number("{:.2f}", 2**30)),
    "measured": ("measured", number("{:.1f}", 2**20)),
    "simulated": ("simulated", number("{:.1f}", 2**20)),
    "simulated / measured": ("simulated / measured", number("{:.3f}")),
}
STEP = ["model", "tokens", "checkpointing"]
PROBED = "{case}, fraction of the probe “{beside}”"
BANDWIDTH = [
    Table(PROBED, ["fraction"], ["elements"], ["dtype"], select=headline),
    Table("{case}, error relative to float64", ["error"], ["elements"], ["dtype"], select=headline),
    Table("fraction of the probe, {case}", ["median"], ["dtype"], ["elements"], select=usual),
    Table("{case}, by instruction set or backend", ["fraction"], ["elements"], ["dtype"], select=by_backend),
]
RELATIVE = [Table("time, {beside} = 1", ["ratio"], ["beside"], ["dtype", "model", "tokens", "tensors", "elements"])]
BESIDE, GIB, MIB = "time, {beside} = 1", "peak above the weights, GiB", "peak above the weights, MiB"
MALLOCS = ["time, stock malloc", "time, tuned malloc"]
RANKS = ["model", "tokens", "ranks", "group", "malloc"]
RANKED = [Table("{case}", ["step", BESIDE, MIB, "kept between steps"], RANKS, label="contestant")]
PAPERS = f"LLaMA-7B, sequence {paper.SEQUENCE}, batch {paper.BATCH}"
RUN = ["measured", "simulated", "simulated / measured"]

#: By name in a document's mark.
TABLES: dict[str, list[Callable[[Device, str], Iterable[str]]]] = {
    "environment": [environment],
    "source": [source],
    "ceilings": [Table("", ["time", "reached"], label="contestant")],
    "update": BANDWIDTH,
    "update short": [Table(PROBED, ["median"], ["dtype"], ["elements"], select=update_short)],
    "norm": BANDWIDTH,
    "lists": RELATIVE,
    "linear": RELATIVE,
    "embedding": RELATIVE,
    "captured": RELATIVE,
    "hooks": [Table("µs per parameter of {case}", ["µs"], ["shape", "dtype", "malloc"], ["parameters"])],
    "step": [Table("{case}", ["step", "tokens/s", BESIDE, GIB], [*STEP, "malloc"], label="contestant")],
    "step short": [Table("{case}", [BESIDE, *MALLOCS, GIB], STEP, label="contestant", select=step_short)],
    "clipping": [Table("{case}", [*MALLOCS, GIB], STEP, label="contestant", select=both_mallocs)],
    "data_parallel": RANKED,
    "sharded": RANKED,
    "memory": [
        Table(f"{PAPERS}, {{case}}; GiB", [*paper.CATEGORIES, "peak"], ["checkpointing"], select=papers_case),
        Table("really run on this machine: peak, MiB", RUN, select=really_run),
    ],
    "memory short": [Table(f"{PAPERS}: peak, GiB", ["peak"], across=["checkpointing"], select=papers_case)],
}


def tables(name: str, device: Device) -> list[str]:
    """
    Raises:
        KeyError: there is no such table.
    """
    made, question = TABLES[name], name.split()[0]
    if made not in ([environment], [source]) and device.of_question(question).empty:
        return []
    return [text for table in made for text in table(device, question)]


def filled(text: str, measured: list[Device]) -> str:
    """A document with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        parts = []
        for device in measured:
            found = tables(match[2], device)
            parts += [f"{device.title}:\n"] * (len(measured) > 1 and len(found) > 0) + found
        return match[1] + "\n" + "\n".join(parts or ["Not measured yet.\n"]) + "\n" + match[3]

    return MARK.sub(table, text)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), results.RESULTS / "README.md"]


def main() -> None:
    from . import plots

    measured = devices()
    for document in documents():
        text = document.read_text()
        if (new := filled(text, measured)) != text:
            document.write_text(new)
            print(f"wrote {document.relative_to(ROOT)}")
    for old in results.RESULTS.glob("*.svg"):
        old.unlink()
    for device in measured:
        for file in plots.draw(device, results.RESULTS):
            print(f"drew {file.name}")


if __name__ == "__main__":
    main()
