"""``python -m bench.report``: writes the tables and plots of measured results into the documents.

A table stands between ``<!-- bench: NAME -->`` and ``<!-- end bench -->`` in README.md, docs/ and
bench/results/README.md, where NAME is a key of `TABLES`. What was not measured is left out. tests/test_report.py checks
that the documents say what the committed results say.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lomo_kernels.plan import paper

from . import results
from .results import BASE, ROOT, ours

try:
    import pandas as pd
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"tables and plots need {error.name}: pip install '.[bench]'", name=error.name) from error

MARK = re.compile(r"(<!-- bench: ([\w ]+) -->\n).*?(<!-- end bench -->)", re.DOTALL)
GIB, MIB = 2**30, 2**20
STEP = ("model", "tokens", "checkpointing")
PAPERS = f"LLaMA-7B, sequence {paper.SEQUENCE}, batch {paper.BATCH}"
#: In the order of tables and bars. "not named" is what the paper's totals have beyond its categories.
CATEGORIES = ["parameters", "gradients", "optimizer states", "activations", "kept factors", "temporaries", "workspace"]
CATEGORIES += ["not named"]


class Device(NamedTuple):
    """What was measured on one device: the contents of its files by name, and a row for each benchmark."""

    folder: Path
    files: dict[str, dict[str, Any]]
    rows: pd.DataFrame

    @classmethod
    def of(cls, folder: Path) -> Device:
        files = {file.name: results.read(file) for file in sorted(folder.glob("*.json")) if file.name != "stages.json"}
        return cls(folder, files, frame([one for run in files.values() for one in run["benchmarks"]]))

    def of_question(self, question: str) -> pd.DataFrame:
        """The rows of a question, without columns that it does not have."""
        return self.rows[self.rows["question"] == question].dropna(axis="columns", how="all")


def devices() -> list[Device]:
    return [Device.of(folder) for folder in sorted({file.parent for file in results.RESULTS.glob("*/*.json")})]


def frame(benchmarks: list[dict[str, Any]]) -> pd.DataFrame:
    """A row for each benchmark: its case and setting, what is shown of it, and a label that names what differs from the
    first setting, which forces nothing. On a CPU without forced instruction sets."""
    rows, first = [], {}
    for benchmark in benchmarks:
        row = {"question": benchmark["group"], **benchmark["params"], **benchmark["extra_info"]}
        usual = first.setdefault(row["question"], row)
        if row["backend"] == "cpu" and row["detail"] != usual["detail"]:
            continue
        backend = [] if row["backend"] == usual["backend"] else [row["backend"]]
        malloc = [] if row.get("malloc") == usual.get("malloc") else [f"{row['malloc']} malloc"]
        row["label"] = ", ".join([row["implementation"], *backend, *malloc])
        if seconds := benchmark["stats"]["data"]:
            row["seconds"] = np.median(seconds)
        if ratios := results.ratios(benchmark):
            above = np.subtract(seconds, row["baseline_seconds"]) / row.get("parameters", 1)
            row |= {"ratio": np.array(ratios), "fraction": 1 / np.array(ratios), "cost": 1e6 * above}
        rows.append(row)
    return pd.DataFrame(rows)


# --- words -----------------------------------------------------------------------------------------------------------


def percentiles(samples: Any) -> Any:
    """Median, and the range of nineteen samples of twenty.

    Of 1367 comparisons between four runs of one commit the ranges were apart in 1, those of four samples of five in 8.
    """
    return np.percentile(samples, (50, 2.5, 97.5))


def spread(samples: Any, digits: int = 2, more: int = 2) -> str:
    """Small ones have more digits."""
    if not isinstance(samples, np.ndarray):
        return "-"
    digits += more * (np.median(samples) < 0.1)
    return "{:.{digits}f} ({:.{digits}f}-{:.{digits}f})".format(*percentiles(samples), digits=digits)


def number(form: str, unit: float = 1.0) -> Callable[[Any], str]:
    return lambda value: "-" if pd.isna(value) else form.format(value / unit)


def count(value: float) -> str:
    """1024 is 1 Ki."""
    for unit, size in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if value >= size and value % size == 0:
            return f"{int(value) // size} {unit}"
    return str(int(value))


def words(case: dict[str, Any]) -> str:
    """A case in words."""
    forms = {"checkpointing": lambda saved: "checkpointing" if saved else "no checkpointing"}
    forms |= {"model": "Llama {}".format, "malloc": "{} malloc".format}
    forms |= {key: str for key in ("dtype", "shape", "group", "baseline", "clipping")}
    return ", ".join(forms[key](value) if key in forms else f"{count(value)} {key}" for key, value in case.items())


def markdown(head: str, cells: pd.DataFrame) -> str:
    """Numbers stand to the right; ours is bold."""
    labels = [f"**{label}**" if ours(label) else label for label in cells.index]
    lines = [[head, *cells.columns], *([label, *row] for label, row in zip(labels, cells.to_numpy(), strict=True))]
    text = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join([text[0], "|---|" + "---:|" * len(cells.columns), *text[1:]]) + "\n"


# --- tables ----------------------------------------------------------------------------------------------------------


def cases(rows: pd.DataFrame, *keys: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each case of these columns, in words, and its rows."""
    present = [key for key in keys if key in rows]
    for case, group in rows.groupby(present, sort=False) if len(rows) else []:
        yield words(dict(zip(present, case, strict=True))), group


def pivot(head: str, rows: pd.DataFrame, value: str, show: Callable[[Any], str], *keys: str) -> str:
    """One value of each label, with a column for each case; ours come first."""
    cells = rows.pivot_table(value, "label", [key for key in keys if key in rows], aggfunc="first", sort=False).map(
        show
    )
    cells = cells.sort_index(axis="columns").sort_index(key=lambda labels: ~labels.map(ours), kind="stable")
    cells.columns = [words(case) for case in cells.columns.to_frame().to_dict("records")]
    return markdown(head, cells)


def bandwidth(rows: pd.DataFrame) -> Iterator[str]:
    for dtype, group in cases(rows, "dtype"):
        head = f"{dtype}, fraction of the probe “{group['baseline'].iloc[0]}”"
        yield pivot(head, group, "fraction", functools.partial(spread, more=0), "elements")
    if "error" in rows:  # of one size, which no cache holds
        rows = rows[
            (rows["elements"] == min(2**24, rows["elements"].max())) & (rows["label"] == rows["implementation"])
        ]
        yield pivot("error relative to float64", rows, "error", number("{:.0e}"), "elements", "dtype")


def relative(rows: pd.DataFrame) -> Iterator[str]:
    for baseline, group in cases(rows, "baseline"):
        yield pivot(f"time, {baseline} = 1", group, "ratio", spread, "dtype", "model", "tokens", "tensors", "elements")


def hooks(rows: pd.DataFrame) -> Iterator[str]:
    for case, group in cases(rows, "shape", "dtype", "malloc"):
        yield pivot(f"µs per parameter of {case}", group, "cost", functools.partial(spread, digits=1), "parameters")


def ceilings(rows: pd.DataFrame) -> Iterator[str]:
    rows = rows.set_index("implementation")
    reached = {"GB/s": rows["moved"] / rows["seconds"] / 1e9, "TFLOP/s": rows["operations"] / rows["seconds"] / 1e12}
    yield markdown("", pd.DataFrame(reached).map(number("{:.4g}")))


def steps(rows: pd.DataFrame, unit: str = "GiB", short: bool = False) -> Iterator[str]:
    """A column of times for each malloc. A baseline that does not fit in memory leaves no ratios."""
    for case, group in cases(rows.assign(malloc=rows.get("malloc", "")), *STEP, "ranks", "group"):
        first = group.groupby("implementation", sort=False).first()
        columns = {"step, s": first["seconds"].map(number("{:.3g}"))}
        columns["tokens/s"] = (first["tokens"] / first["seconds"]).map(number("{:.0f}"))
        columns = {} if short else columns
        for malloc, timed in group.groupby("malloc", sort=False) if "ratio" in group else []:
            head = f"time, {malloc} malloc" if malloc else "time"
            columns[head] = timed.set_index("implementation")["ratio"].map(spread)
        memory = pd.DataFrame(first["memory"].tolist(), first.index)
        show = number("{:.3f}", GIB) if unit == "GiB" else number("{:.0f}", MIB)
        columns[f"peak above the weights, {unit}"] = memory["peak"].map(show)
        if "ranks" in group:
            columns[f"kept between steps, {unit}"] = memory["states"].map(show)
        baseline = f", time relative to {group['baseline'].iloc[0]}" if "ratio" in group else ""
        yield markdown(case + baseline, pd.DataFrame(columns, first.index).fillna("-"))


def table_1(rows: pd.DataFrame) -> pd.DataFrame:
    """LLaMA-7B as the paper's Table 1 has it, the loss not in chunks, after the paper's own rows."""
    rows = rows.reindex(columns=[*rows.columns.union(["chunk", "kernels"])])
    rows = rows[(rows["model"] == paper.MODEL) & rows["chunk"].isna()]
    old = rows["kernels"].map({"of 2023": ", kernels of 2023"}).fillna("")
    rows = rows.assign(label=rows["implementation"] + ", simulated" + old)
    papers = []
    for checkpointing, method in itertools.product(paper.TOTALS, paper.TABLE_1):
        parts = {**paper.TABLE_1[method], "activations": paper.ACTIVATIONS[checkpointing]}
        parts["not named"] = round(paper.TOTALS[checkpointing][method] - sum(parts.values()), 2)
        memory = {name: size * GIB for name, size in parts.items()}
        papers.append([f"{method}, the paper", checkpointing, memory, memory])
    columns = ["label", "checkpointing", "memory", "most"]
    rows = pd.concat([pd.DataFrame(papers, columns=columns), rows[columns]]) if len(rows) else rows
    return rows.assign(peak=rows["memory"].map(lambda memory: sum(memory.values())))


def memory(rows: pd.DataFrame) -> Iterator[str]:
    for case, group in cases(table_1(rows), "checkpointing"):
        most = pd.DataFrame(group["most"].tolist(), group["label"]).reindex(columns=CATEGORIES)
        cells = most.assign(peak=group["peak"].to_numpy()).map(number("{:.2f}", GIB))
        yield markdown(f"{PAPERS}, {case}; GiB", cells)
    rows = rows.reindex(columns=[*rows.columns.union(["measured"])]).dropna(subset="measured")
    for case, group in cases(rows, "checkpointing"):
        simulated = group["memory"].map(lambda of: sum(of.values()))
        cells = pd.DataFrame({"measured": group["measured"], "simulated": simulated}).map(number("{:.1f}", MIB))
        cells["simulated / measured"] = (simulated / group["measured"]).map(number("{:.3f}"))
        yield markdown(f"really run on this machine, {case}: peak, MiB", cells.set_index(group["implementation"]))


def memory_short(rows: pd.DataFrame) -> Iterator[str]:
    if len(rows := table_1(rows)):
        yield pivot(f"{PAPERS}: peak, GiB", rows, "peak", number("{:.2f}", GIB), "checkpointing")


def environment(device: Device) -> Iterator[str]:
    files = {}
    for name, run in device.files.items():
        about = run["machine_info"] | {"peers": ", ".join(map(" ".join, run["machine_info"]["peers"].items()))}
        commit = re.sub(r"^(.{7})[^+]*", r"\1", run["commit_info"]["id"])
        files[f"[{name}]({device.folder.name}/{name})"] = {"date": run["datetime"][:10], "commit": commit, **about}
    yield markdown("", pd.DataFrame(files).T)
    if (stages := device.folder / "stages.json").exists():
        checks = json.loads(stages.read_text()).items()
        yield "".join(f"- {stage}: {check['said']}, {check['seconds']:.0f} s\n" for stage, check in checks)
    if missing := sorted({reason for run in device.files.values() for reason in run["missing"]}):
        yield "Missing:\n\n" + "".join(f"- {reason}\n" for reason in missing)


def source(device: Device) -> Iterator[str]:
    """One line: what gave the figures."""
    runs = sorted(device.files.values(), key=lambda run: run["datetime"])
    about, dates = runs[-1]["machine_info"], " and ".join(sorted({run["datetime"][:10] for run in runs}))
    torch = " and ".join(sorted({run["machine_info"]["torch"] for run in runs}))
    yield f"{about['device']}, {device.rows['detail'].iloc[0]}, {about['threads']} thread, torch {torch}, {dates}.\n"


#: By name in a document's mark; the first word is the question.
TABLES: dict[str, Callable[[pd.DataFrame], Iterator[str]]] = {
    "ceilings": ceilings,
    **dict.fromkeys(("update", "update short", "norm"), bandwidth),
    **dict.fromkeys(("lists", "linear", "embedding", "captured"), relative),
    "hooks": hooks,
    "step": steps,
    **dict.fromkeys(("step short", "clipping", "head"), functools.partial(steps, short=True)),
    **dict.fromkeys(("data_parallel", "sharded"), functools.partial(steps, unit="MiB")),
    "memory": memory,
    "memory short": memory_short,
}
#: What short tables show: of a case these implementations.
SHORT: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "update short": ({"dtype": "bfloat16"}, ("sgd_ nearest", "sgd_ stochastic", "add_", "SGD foreach", "lomo_optim")),
    "step short": (
        {"model": "107M", "tokens": 256, "checkpointing": False},
        (BASE, "lomo_optim, clipping", "Lomo", *(f"Lomo, clipping, {n}, fused" for n in ("two passes", "one pass"))),
    ),
}


def tables(name: str, device: Device) -> list[str]:
    """
    Raises:
        KeyError: there is no such table.
    """
    if about := {"environment": environment, "source": source}.get(name):
        return list(about(device))
    table, rows = TABLES[name], device.of_question(name.split()[0])
    if name in SHORT and len(rows):
        case, shown = SHORT[name]
        rows = rows[(rows[[*case]] == pd.Series(case)).all(axis="columns") & rows["implementation"].isin(shown)]
    return list(table(rows)) if len(rows) else []


def filled(text: str, measured: list[Device]) -> str:
    """A document with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        parts = []
        for device in measured:
            found = tables(match[2], device)
            parts += [f"{device.folder.name}:\n"] * (len(measured) > 1 and len(found) > 0) + found
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
    for device in measured:
        for file in plots.draw(device, results.RESULTS):
            print(f"drew {file.name}")


if __name__ == "__main__":
    main()
