"""``python -m bench.report``: writes the tables and plots of measured results into the documents.

A table stands between ``<!-- bench: NAME -->`` and ``<!-- end bench -->`` in README.md, docs/ and
bench/results/README.md, where NAME is a key of `TABLES`. What was not measured is left out. tests/test_report.py checks
that the documents say what the committed results say.
"""

from __future__ import annotations

import functools
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
HEADLINE = 2**24  # elements: neither a parameter nor its gradient fits in a cache
GIB, MIB = 2**30, 2**20
STEP = ("model", "tokens", "checkpointing")
#: In the order of tables and bars. "not named" is what the paper's totals have beyond its categories.
CATEGORIES = (
    *("parameters", "gradients", "optimizer states", "activations", "kept factors", "temporaries", "workspace"),
    "not named",
)


class Device(NamedTuple):
    """What was measured on one device: the contents of its files by name, and a row for each benchmark."""

    name: str
    files: dict[str, dict[str, Any]]
    rows: pd.DataFrame

    @classmethod
    def of(cls, folder: Path) -> Device:
        files = {file.name: results.read(file) for file in sorted(folder.glob("*.json")) if file.name != "stages.json"}
        return cls(folder.name, files, frame([one for run in files.values() for one in run["benchmarks"]]))

    @property
    def about(self) -> dict[str, Any]:
        """The machine, as the newest file has it."""
        return dict(max(self.files.values(), key=lambda run: run["datetime"])["machine_info"])

    @property
    def title(self) -> str:
        detail = [] if "capability" in self.about else [str(self.rows["detail"].iloc[0])]
        return ", ".join([self.about["device"], *detail])

    def of_question(self, question: str) -> pd.DataFrame:
        """The rows of a question, without columns that it does not have."""
        return self.rows[self.rows["question"] == question].dropna(axis="columns", how="all")


def devices() -> list[Device]:
    return [Device.of(folder) for folder in sorted(results.RESULTS.iterdir()) if folder.is_dir()]


def frame(benchmarks: list[dict[str, Any]]) -> pd.DataFrame:
    """A row for each benchmark: its case and setting, what is shown of it, and a label that names what differs from the
    first setting, which forces nothing. On a CPU without forced instruction sets."""
    rows, first = [], {}
    for benchmark in benchmarks:
        row = {"question": benchmark["group"], **benchmark["params"], **benchmark["extra_info"]}
        usual = first.setdefault(row["question"], row)
        if row["backend"] == "cpu" and row["detail"] != usual["detail"]:
            continue
        other = [row[key] for key in ("backend", "detail") if row[key] != usual[key]]
        other += [f"{row['malloc']} malloc"] if row.get("malloc") != usual.get("malloc") else []
        row["label"] = ", ".join([row["implementation"], *other])
        if seconds := benchmark["stats"]["data"]:
            row["seconds"] = np.median(seconds)
        if ratios := results.ratios(benchmark):
            row |= {"ratio": np.array(ratios), "fraction": 1 / np.array(ratios)}
            if "parameters" in row:
                above = np.subtract(seconds, row["baseline_seconds"])
                row["cost"] = 1e6 * above / row["parameters"]
        rows.append(row)
    return pd.DataFrame(rows)


# --- words -----------------------------------------------------------------------------------------------------------


def percentiles(samples: Any) -> tuple[float, float, float]:
    """Median, and the range of nineteen samples of twenty.

    Of 1367 comparisons between four runs of one commit the ranges were apart in 1, those of four samples of five in 8.
    """
    median, low, high = np.percentile(samples, (50, 2.5, 97.5))
    return float(median), float(low), float(high)


def spread(samples: Any, digits: int = 2, more: int = 2) -> str:
    """Small ones have more digits."""
    if not isinstance(samples, np.ndarray):
        return "-"
    median, low, high = percentiles(samples)
    digits += more * (median < 0.1)
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


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
    lines = [
        [head, *cells.columns],
        *([f"**{row[0]}**" if ours(row[0]) else row[0], *row[1:]] for row in cells.itertuples()),
    ]
    text = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join([text[0], "|---|" + "---:|" * len(cells.columns), *text[1:]]) + "\n"


def cases(rows: pd.DataFrame, *keys: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each case of these columns, in words, and its rows."""
    present = [key for key in keys if key in rows]
    for case, group in rows.groupby(present, sort=False):
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


def norm(rows: pd.DataFrame) -> Iterator[str]:
    yield from bandwidth(rows)
    rows = rows[(rows["elements"] == min(HEADLINE, rows["elements"].max())) & (rows["label"] == rows["implementation"])]
    for elements, group in cases(rows, "elements"):
        yield pivot(f"{elements}, error relative to float64", group, "error", number("{:.0e}"), "dtype")


def update_short(rows: pd.DataFrame) -> Iterator[str]:
    shown = ("sgd_ nearest", "sgd_ stochastic", "add_", "SGD foreach", "lomo_optim")
    yield from bandwidth(rows[rows["implementation"].isin(shown) & (rows["dtype"] == "bfloat16")])


def relative(rows: pd.DataFrame) -> Iterator[str]:
    for baseline, group in cases(rows, "baseline"):
        yield pivot(f"time, {baseline} = 1", group, "ratio", spread, "dtype", "model", "tokens", "tensors", "elements")


def hooks(rows: pd.DataFrame) -> Iterator[str]:
    for case, group in cases(rows, "shape", "dtype", "malloc"):
        yield pivot(f"µs per parameter of {case}", group, "cost", lambda of: spread(of, 1), "parameters")


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
        if unit == "GiB":
            columns["peak above the weights, GiB"] = memory["peak"].map(number("{:.3f}", GIB))
        else:
            columns["peak above the weights, MiB"] = memory["peak"].map(number("{:.0f}", MIB))
            columns["kept between steps, MiB"] = memory["states"].map(number("{:.0f}", MIB))
        relative = f", time relative to {group['baseline'].iloc[0]}" if "ratio" in group else ""
        yield markdown(case + relative, pd.DataFrame(columns, first.index).fillna("-"))


def step_short(rows: pd.DataFrame) -> Iterator[str]:
    """Of the first case five methods."""
    fused = (f"Lomo, clipping, {passes}, fused" for passes in ("two passes", "one pass"))
    shown = rows["implementation"].isin([BASE, "lomo_optim, clipping", "Lomo", *fused])
    first = (rows[list(STEP)] == rows.iloc[0][list(STEP)]).all(axis="columns")
    yield from steps(rows[shown & first], short=True)


def table_1(rows: pd.DataFrame) -> pd.DataFrame:
    """LLaMA-7B as the paper's Table 1 has it, the loss not in chunks, after the paper's own rows."""
    rows = rows[rows["model"] == paper.MODEL]
    if "chunk" in rows:
        rows = rows[rows["chunk"].isna()]
    if rows.empty:
        return rows
    old = rows["kernels"].notna() if "kernels" in rows else pd.Series(False, rows.index)
    rows = rows.assign(label=rows["implementation"] + ", simulated" + old.map({True: ", kernels of 2023", False: ""}))
    papers = []
    for checkpointing, totals in paper.TOTALS.items():
        for method, total in totals.items():
            parts = {**paper.TABLE_1[method], "activations": paper.ACTIVATIONS[checkpointing]}
            parts["not named"] = round(total - sum(parts.values()), 2)
            memory = {name: size * GIB for name, size in parts.items()}
            row = {"label": f"{method}, the paper", "checkpointing": checkpointing, "memory": memory, "most": memory}
            papers.append(row)
    rows = pd.concat([pd.DataFrame(papers), rows], ignore_index=True)
    return rows.assign(peak=rows["memory"].map(lambda memory: sum(memory.values())))


PAPERS = f"LLaMA-7B, sequence {paper.SEQUENCE}, batch {paper.BATCH}"


def memory(rows: pd.DataFrame) -> Iterator[str]:
    for case, group in cases(table_1(rows), "checkpointing"):
        most = pd.DataFrame(group["most"].tolist(), group["label"]).reindex(columns=CATEGORIES)
        cells = most.assign(peak=group["peak"].to_numpy()).map(number("{:.2f}", GIB))
        yield markdown(f"{PAPERS}, {case}; GiB", cells)
    if "measured" in rows:
        rows = rows.dropna(subset="measured")
        kept = rows["checkpointing"].map(lambda saved: words({"checkpointing": saved}))
        cells = pd.DataFrame(
            {"measured": rows["measured"], "simulated": rows["memory"].map(lambda of: sum(of.values()))}
        )
        ratio = (cells["simulated"] / cells["measured"]).map(number("{:.3f}"))
        cells = cells.map(number("{:.1f}", MIB)).assign(**{"simulated / measured": ratio})
        yield markdown("really run on this machine: peak, MiB", cells.set_index(rows["implementation"] + ", " + kept))


def memory_short(rows: pd.DataFrame) -> Iterator[str]:
    if len(rows := table_1(rows)):
        yield pivot(f"{PAPERS}: peak, GiB", rows, "peak", number("{:.2f}", GIB), "checkpointing")


def environment(device: Device) -> Iterator[str]:
    about = {key.replace("_", " "): value for key, value in device.about.items() if key != "capability"}
    about["peers"] = ", ".join(map(" ".join, about["peers"].items()))
    yield markdown("", pd.Series(about).astype(str).to_frame(""))
    files = {
        f"[{name}]({device.name}/{name})": {
            "date": run["datetime"][:10],
            "torch": run["machine_info"]["torch"],
            "commit": run["commit_info"]["id"][:7] + "+" * run["commit_info"]["id"].endswith("+"),
        }
        for name, run in device.files.items()
    }
    yield markdown("file", pd.DataFrame(files).T)
    stages = results.RESULTS / device.name / "stages.json"
    if stages.exists():
        checks = json.loads(stages.read_text()).items()
        yield "".join(f"- {stage}: {check['said']}, {check['seconds']:.0f} s\n" for stage, check in checks)
    if missing := sorted({reason for run in device.files.values() for reason in run["missing"]}):
        yield "Missing:\n\n" + "".join(f"- {reason}\n" for reason in missing)


def source(device: Device) -> Iterator[str]:
    """One line: what gave the figures."""
    dates = sorted({run["datetime"][:10] for run in device.files.values()})
    threads = "" if "capability" in device.about else f"{device.about['threads']} thread, "
    yield f"{device.title}, {threads}torch {device.about['torch']}, {' and '.join(dates)}.\n"


#: By name in a document's mark; the first word is the question.
TABLES: dict[str, Callable[[pd.DataFrame], Iterator[str]]] = {
    "ceilings": ceilings,
    "update": bandwidth,
    "update short": update_short,
    "norm": norm,
    **dict.fromkeys(("lists", "linear", "embedding", "captured"), relative),
    "hooks": hooks,
    "step": steps,
    "step short": step_short,
    "clipping": functools.partial(steps, short=True),
    **dict.fromkeys(("data_parallel", "sharded"), functools.partial(steps, unit="MiB")),
    "memory": memory,
    "memory short": memory_short,
}


def tables(name: str, device: Device) -> list[str]:
    """
    Raises:
        KeyError: there is no such table.
    """
    if about := {"environment": environment, "source": source}.get(name):
        return list(about(device))
    table, rows = TABLES[name], device.of_question(name.split()[0])
    return list(table(rows)) if len(rows) else []


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
    for device in measured:
        for file in plots.draw(device, results.RESULTS):
            print(f"drew {file.name}")


if __name__ == "__main__":
    main()
