"""``python -m bench.report``: writes the tables and plots of measured results into the documents.

A table stands between ``<!-- bench: NAME -->`` and ``<!-- end bench -->`` in README.md, docs/ and
bench/results/README.md, where NAME is a function of `TABLES`. What was not measured is left out.
tests/test_report.py checks that the documents say what the committed results say.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import paper, results
from .results import BASE, DTYPES, FORWARD, ROOT, Results, Spread, clips, device_and_date, ours

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
        return cls(files, measured, frame(measured))

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

    def of_question(self, question: str, **case: Any) -> pd.DataFrame:
        """The rows of a question whose case has these values, without columns that it does not have."""
        found = self.rows[self.rows["question"] == question] if len(self.rows) else self.rows
        for key, value in case.items():
            found = found[found[key] == value] if key in found else found.iloc[:0]
        return found.dropna(axis="columns", how="all")


def devices() -> list[Device]:
    """Every device, with all of its files that count."""
    return [Device.of(files, functools.reduce(results.merged, map(results.read, files))) for files in results.newest()]


def frame(measured: Results) -> pd.DataFrame:
    """A row for each measurement: its case, medians and ranges (`Spread`), and a label that names what differs from the
    setting of a process that forces nothing, which is measured first."""
    usual: dict[str, dict[str, Any]] = {}
    rows = []
    for one in measured.measurements:
        setting = {key: one.case.get(key) for key in SETTING}
        normal = usual.setdefault(one.question, setting)
        other = [f"{v} malloc" if k == "malloc" else v for k, v in setting.items() if v is not None and v != normal[k]]
        row = {"question": one.question, "contestant": one.contestant, "label": ", ".join([one.contestant, *other])}
        row |= {"usual": all(setting[key] == normal[key] for key in ("backend", "detail")), **one.case}
        row |= {"beside": one.beside, "error": one.error, "memory": one.memory or None}
        if one.seconds:
            row["seconds"] = one.time.median
        if one.beside_seconds:
            row |= {"ratio": one.ratio, "fraction": one.fraction, "above": one.above}
        rows.append({**row, "most": one.most or None, "peak": one.peak if one.memory else None})
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


def gib(number: float) -> str:
    return f"{number / 2**30:.{2 if number >= 2**30 else 3}f}"


def words(case: dict[str, Any]) -> str:
    """A case in words."""

    def word(key: str, value: Any) -> str:
        if key == "checkpointing":
            return "checkpointing" if value else "no checkpointing"
        if isinstance(value, (int, float)):
            return f"{count(value)} {key}"
        return f"Llama {value}" if key == "model" else str(value)

    return ", ".join(word(key, value) for key, value in case.items())


def malloc(rows: pd.DataFrame) -> str:
    """The malloc that the rows' processes had; nothing of a GPU."""
    return f", {rows['malloc'].iloc[0]} malloc" if "malloc" in rows else ""


def short_commits(about: dict[str, Any]) -> str:
    """Seven digits, with "+" if files differed; with the questions if they were asked of several commits."""
    asked: dict[str, list[str]] = {}
    for question, commit in about.get("commits", {}).items():
        asked.setdefault(commit[:7] + "+" * commit.endswith("+"), []).append(question)
    if len(asked) < 2:
        return next(iter(asked), about["commit"][:7])
    return "; ".join(f"{commit} ({', '.join(questions)})" for commit, questions in asked.items())


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Numbers stand to the right; ours is bold."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|---|" + "---:|" * (lines[0].count(" | ")))
    for label, *cells in rows:
        lines.append("| " + " | ".join([f"**{label}**" if ours(label) else label, *cells]) + " |")
    return "\n".join(lines) + "\n"


def pivot(rows: pd.DataFrame, head: str, columns: list[str], value: str, show: Callable[[Any], str]) -> str:
    """A row for each label, a column for each case; cases stand in order."""
    if rows.empty:
        return ""
    table = rows.pivot_table(index="label", columns=columns, values=value, aggfunc="first", sort=False)
    table = table.sort_index(axis="columns").reindex(sorted(table.index, key=lambda label: not ours(label)))
    names = [dict(zip(columns, case if isinstance(case, tuple) else (case,), strict=True)) for case in table.columns]
    return markdown(
        [head, *map(words, names)],
        ([label, *map(show, cells)] for label, cells in zip(table.index, table.to_numpy(), strict=True)),
    )


def headline_size(rows: pd.DataFrame) -> int:
    """The largest size up to `HEADLINE`, or the smallest there is."""
    sizes = sorted(rows["elements"].unique())
    return int(max((size for size in sizes if size <= HEADLINE), default=sizes[0]))


def bandwidth(device: Device, question: str) -> Iterator[str]:
    """Fractions of the probe at one size by dtype, and over every size."""
    rows = device.of_question(question)
    rows = rows[rows["usual"]]
    size = headline_size(rows)
    head = f"{count(size)} elements, fraction of the probe “{rows['beside'].iloc[0]}”"
    yield pivot(rows[rows["elements"] == size], head, ["dtype"], "fraction", spread)
    if "error" in rows:
        at_size = rows[(rows["elements"] == size) & rows["error"].notna()]
        yield pivot(
            at_size,
            f"{count(size)} elements, error relative to float64",
            ["dtype"],
            "error",
            lambda error: f"{error:.0e}" if error == error else "-",
        )
    for dtype in DTYPES:
        yield pivot(rows[rows["dtype"] == dtype], f"fraction of the probe, {dtype}", ["elements"], "fraction", median)
    mine = device.of_question(question, elements=size)
    mine = mine[
        mine["contestant"].isin(["sgd_ nearest", "sgd_ stochastic", "sq_norm_"]) & ~mine["label"].str.endswith("malloc")
    ]
    mine = mine.assign(label=mine["contestant"] + ", " + mine["detail"].fillna("").astype(str))
    if mine["detail"].nunique() > 1 or mine["backend"].nunique() > 1:
        yield pivot(mine, f"{count(size)} elements, by instruction set or backend", ["dtype"], "fraction", spread)


def relative(device: Device, question: str) -> Iterator[str]:
    """Time over that of what ran beside it, by case."""
    for beside, rows in device.of_question(question).groupby("beside", sort=False):
        case = [key for key in ("dtype", "model", "tokens", "tensors", "elements") if key in rows.dropna(axis=1)]
        yield pivot(rows, f"time, {beside} = 1", case, "ratio", spread)


def ceilings(device: Device) -> Iterator[str]:
    found = device.results.of("ceilings")
    yield markdown(["", "time", "reached"], ([o.contestant, seconds(o.time.median), o.reached] for o in found))


def per_parameter(rows: pd.DataFrame) -> pd.Series:
    """Microseconds above a bare backward, of each parameter."""
    pairs = zip(rows["above"], rows["parameters"], strict=True)
    return pd.Series([Spread(*(1e6 * value / number for value in above)) for above, number in pairs], index=rows.index)


def hooks(device: Device) -> Iterator[str]:
    rows = device.of_question("hooks")
    rows = rows.assign(cost=per_parameter(rows))
    for (shape, dtype), group in rows.groupby(["shape", "dtype"], sort=False):
        head = f"µs per parameter of {shape}, {dtype}{malloc(rows)}"
        yield pivot(group, head, ["parameters"], "cost", functools.partial(spread, digits=1))


STEP = ["model", "tokens", "checkpointing"]


def steps(device: Device) -> Iterator[str]:
    """A table for each case; whoever the times are held to is named in its head."""
    measured = device.of_question("step")
    for case, rows in measured.groupby([*STEP, *(["malloc"] if "malloc" in measured else [])], sort=False):
        head = f"{words(dict(zip(STEP, case, strict=False)))}{malloc(rows)}"
        rates = rows["tokens"] / rows["seconds"]
        yield markdown(
            [head, "step", "tokens/s", f"time, {BASE} = 1", "peak above the weights, GiB"],
            (
                [
                    row.contestant,
                    seconds(row.seconds),
                    f"{rate:.0f}",
                    spread(getattr(row, "ratio", None)),
                    gib(row.memory["peak"]),
                ]
                for row, rate in zip(rows.itertuples(), rates, strict=True)
            ),
        )


def ranks(device: Device, question: str) -> Iterator[str]:
    """Whole steps over several processes."""
    rows = device.of_question(question)
    case = [key for key in ("model", "tokens", "ranks", "group") if key in rows]
    for found, group in rows.groupby(case, sort=False):
        head = f"{words(dict(zip(case, found, strict=True)))}{malloc(group)}"
        yield markdown(
            [head, "step", f"time, {group['beside'].iloc[0]} = 1", "peak above the weights, MiB", "kept between steps"],
            (
                [row.contestant, seconds(row.seconds), spread(row.ratio)]
                + [f"{row.memory[part] / 2**20:.0f}" for part in ("peak", "states")]
                for row in group.itertuples()
            ),
        )


PAPERS = {"model": paper.MODEL, "sequence": paper.SEQUENCE, "batch": paper.BATCH}


def memory_rows(device: Device, checkpointing: bool, most: bool = False) -> pd.DataFrame:
    """GiB by category of the paper's case, the paper's own first; loss not in chunks."""
    found = device.of_question("memory", **PAPERS, checkpointing=checkpointing)
    rows = {f"{name}, the paper": row for name, row in paper.rows(checkpointing).items()} if len(found) else {}
    for one in found.itertuples():
        if pd.isna(getattr(one, "chunk", None)):
            old = ", kernels of 2023" if not pd.isna(getattr(one, "kernels", None)) else ""
            sizes = one.most if most and one.most else one.memory
            rows[f"{one.contestant}, {one.how}{old}"] = {key: size / 2**30 for key, size in sizes.items()}
    return pd.DataFrame.from_dict(rows, orient="index").fillna(0.0)


def memory(device: Device) -> Iterator[str]:
    """By category, each at its own maximum, and the peak of all; then everything that was simulated or run."""
    for checkpointing in (False, True):
        rows, peaks = memory_rows(device, checkpointing, most=True), memory_rows(device, checkpointing)
        if len(rows):
            rows = rows.loc[:, rows.max() >= 0.005]
            rows = rows[sorted(rows, key=lambda category: category == "not named")]
            head = (
                f"LLaMA-7B, sequence {paper.SEQUENCE}, batch {paper.BATCH}, {words({'checkpointing': checkpointing})}"
            )
            yield markdown(
                [f"{head}; GiB", *rows.columns, "peak"],
                (
                    [label, *(f"{size:.2f}" for size in row), f"{peaks.loc[label].sum():.2f}"]
                    for label, row in rows.iterrows()
                ),
            )
    yield from memory_short(device)
    rows = device.of_question("memory")
    keys = [key for key in ("model", "sequence", "batch", "checkpointing", "contestant") if key in rows]
    both = rows[rows["how"] == "measured"].merge(rows[rows["how"] == "simulated"], on=keys, suffixes=("", " simulated"))
    if len(both):
        yield markdown(
            ["really run on this machine: peak, MiB", "measured", "simulated", "ratio"],
            (
                [f"{one['contestant']}, {words({'checkpointing': one['checkpointing']})}"]
                + [f"{one[key] / 2**20:.1f}" for key in ("peak", "peak simulated")]
                + [f"{one['peak simulated'] / one['peak']:.3f}"]
                for _, one in both.iterrows()
            ),
        )


def memory_short(device: Device) -> Iterator[str]:
    """Peaks of the paper's case."""
    peaks = pd.DataFrame({saved: memory_rows(device, saved).sum(axis=1) for saved in (False, True)})
    if len(peaks):
        yield markdown(
            [
                f"LLaMA-7B, sequence {paper.SEQUENCE}, batch {paper.BATCH}: peak, GiB",
                "no checkpointing",
                "checkpointing",
            ],
            ([label, *(f"{size:.2f}" if size == size else "-" for size in row)] for label, row in peaks.iterrows()),
        )


#: What of ours a rival is held against: the call that does at least as much.
COUNTERPARTS = {
    "update": {"mul_, add_": "sgd_ nearest, every scalar", "optimi SGD": "sgd_ stochastic", "": "sgd_ nearest"},
    "norm": {"": "sq_norm_"},
    "lists": {"_foreach_add_": "sgd_list_", "_foreach_norm": "sq_norm_list_"},
    "linear": {"addmm_": "linear_sgd_ nearest"},
    "embedding": {"index_add_": "embedding_sgd_"},
}


def comparisons(device: Device, question: str) -> pd.DataFrame:
    """Every rival with each of ours that does the same in the same case. "faster": how many times as fast the rival is;
    "smaller": how many times its peak ours is. If ours was measured with one malloc only, with that.

    Raises:
        KeyError: `COUNTERPARTS` does not say what a rival is held against.
    """
    rows = device.of_question(question)
    rows = rows[rows["contestant"] != FORWARD]
    if question in COUNTERPARTS:
        known = COUNTERPARTS[question]
        held = rows["contestant"].map(lambda who: who if ours(who) else known[who] if who in known else known[""])
    else:
        held = rows["contestant"].map(lambda who: "clipping" if clips(who) else "no clipping")
    measures = ["contestant", "label", "fraction", "peak"]
    fixed = {"question", "usual", "beside", "error", "memory", "most", "seconds", "ratio", "above", *measures}
    case = [key for key in rows if key not in fixed]
    rows = rows.assign(held=held).astype({key: object for key in case})
    rows[case] = rows[case].where(rows[case].notna(), "")
    is_ours = rows["contestant"].map(ours)
    both = rows[~is_ours].merge(rows[is_ours], on=["held", *(set(case) - {"malloc"})], suffixes=("", " ours"))
    if "malloc" in case:
        same = both["malloc"] == both["malloc ours"]
        key = ["label", *(set(case) - {"malloc"})]
        both = both[same | ~both.assign(same=same).groupby(key)["same"].transform("any")]
    if "fraction" in both:
        both["faster"] = [
            theirs.median / mine.median if isinstance(theirs, Spread) and isinstance(mine, Spread) else float("nan")
            for theirs, mine in zip(both["fraction"], both["fraction ours"], strict=True)
        ]
    if "peak" in both:
        both["smaller"] = both["peak ours"] / both["peak"]
    return both.assign(
        case=[
            words({k: v for k, v in zip(case, values, strict=True) if v != "" and k not in SETTING})
            for values in both[case].to_numpy()
        ]
    )


def lost(device: Device, question: str) -> Iterator[str]:
    """Every case in which a rival is faster (by 2% in the median, whatever the spreads) or smaller (by 1%)."""
    both = comparisons(device, question)
    for what, least in (("faster", 1.02), ("smaller", 1.01)):
        if what not in both or both[what].notna().sum() == 0:
            continue
        found = both[both[what] > least].sort_values("case", kind="stable")
        share = f"A rival is {what} in {len(found)} of {both[what].notna().sum()} comparisons"
        lines = [
            f"| {rival} | {mine} | "
            + "; ".join(f"{case}: {times:.2f}" for case, times in zip(of["case"], of[what], strict=True))
            + " |"
            for (rival, mine), of in found.groupby(["label", "label ours"], sort=False)
        ]
        table = [f"| rival | ours | times {what} |", "|---|---|---|", *lines, ""] if lines else []
        yield "\n".join([f"{share}{'.' if not lines else ':'}", "", *table])


def environment(device: Device) -> Iterator[str]:
    about = device.results.environment
    known = {key: value for key, value in about.items() if key not in ("peers", "commits", "commit", "capability")}
    rows = [[key.replace("_", " "), str(value)] for key, value in known.items() if value != "none"]
    rows += [["peers", ", ".join(f"{key} {value}" for key, value in about.get("peers", {}).items())]]
    rows += [["commit", short_commits(about)], ["date", device_and_date(device.files[-1])[1]]]
    rows += [["file", f"[{file.name}]({file.name})"] for file in device.files]
    yield markdown(["", ""], rows)
    checks = device.results.checks.items()
    if checks:
        yield "\n".join(f"- {stage}: {check['said']}, {check['seconds']:.0f} s" for stage, check in checks) + "\n"
    if device.results.missing:
        yield "Missing:\n\n" + "\n".join(f"- {what}: {why}" for what, why in device.results.missing.items()) + "\n"


def source(device: Device) -> Iterator[str]:
    """One line: what gave the figures."""
    about, date = device.results.environment, device_and_date(device.files[-1])[1]
    threads = f"{about['threads']} thread, " if device.is_cpu else ""
    yield f"{device.title}, {threads}torch {about['torch']}, {date}.\n"


def update_short(device: Device) -> Iterator[str]:
    """bfloat16 at several sizes, rivals with both mallocs."""
    rows = device.of_question("update", dtype="bfloat16")
    shown = ("sgd_ nearest", "sgd_ stochastic", "add_", "SGD foreach", "lomo_optim")
    rows = rows[rows["usual"] & rows["contestant"].isin(shown)]
    yield pivot(rows, f"bfloat16, fraction of the probe “{rows['beside'].iloc[0]}”", ["elements"], "fraction", median)


def step_short(device: Device) -> Iterator[str]:
    """Of the first case five methods, with each malloc."""
    shown = (
        BASE,
        "lomo_optim, clipping",
        "Lomo, clipping, two passes, fused",
        "Lomo, clipping, one pass, fused",
        "Lomo",
    )
    rows = device.of_question("step")
    first = rows.iloc[0]
    rows = rows[rows["contestant"].isin(shown)]
    rows = rows[(rows[STEP] == first[STEP]).all(axis=1)]
    rows = rows if "malloc" in rows else rows.assign(malloc="any")
    mallocs = list(rows["malloc"].unique())
    head = [words(first[STEP].to_dict()), *(f"time, {malloc} malloc" for malloc in mallocs)]
    lines = []
    for who in shown:
        of_one = rows[rows["contestant"] == who].set_index("malloc")
        if len(of_one):
            ratios = [spread(of_one["ratio"].get(malloc)) for malloc in mallocs]
            lines.append([who, *ratios, gib(of_one["memory"].iloc[0]["peak"])])
    yield markdown([*head, "peak above the weights, GiB"], lines)


Table = Callable[[Device], Iterable[str]]
#: By name in a document's mark: the question it needs, and the function.
TABLES: dict[str, tuple[str, Table]] = {
    "environment": ("", environment),
    "source": ("", source),
    "ceilings": ("ceilings", ceilings),
    **{name: (name, functools.partial(bandwidth, question=name)) for name in ("update", "norm")},
    **{
        name: (name, functools.partial(relative, question=name))
        for name in ("lists", "linear", "embedding", "captured")
    },
    "hooks": ("hooks", hooks),
    "step": ("step", steps),
    **{name: (name, functools.partial(ranks, question=name)) for name in ("data_parallel", "sharded")},
    "memory": ("memory", memory),
    "update short": ("update", update_short),
    "step short": ("step", step_short),
    "memory short": ("memory", memory_short),
}
COMPARED = {*COUNTERPARTS, "hooks", "step", "data_parallel", "sharded", "memory"}
TABLES |= {f"{name} lost": (name, functools.partial(lost, question=name)) for name in COMPARED}


def filled(text: str, measured: list[Device]) -> str:
    """A document with its tables written anew.

    Raises:
        KeyError: it asks for a table that `TABLES` does not have.
    """

    def table(match: re.Match[str]) -> str:
        question, make = TABLES[match[2]]
        parts = []
        for device in measured:
            if not question or len(device.of_question(question)):
                parts += [f"{device.title}:\n"] * (len(measured) > 1) + list(filter(None, make(device)))
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
