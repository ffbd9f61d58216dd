"""``python -m bench.report``: writes the tables and plots of measured results into the documents.

A table stands between ``<!-- bench: NAME -->`` and ``<!-- end bench -->`` in README.md, docs/ and
bench/results/README.md, where NAME is a key of `TABLES` or "environment". What was not measured is left out.
tests/test_report.py checks that the documents say what the committed results say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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
GIB = 2**30
#: What cases differ in. A table is of one case, except for what its columns are.
CASE = ("model", "shape", "dtype", "tokens", "checkpointing", "chunk", "kernels", "ranks", "group", "baseline")
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
        return cls(folder, files, frame([benchmark for run in files.values() for benchmark in run["benchmarks"]]))

    def of_question(self, question: str) -> pd.DataFrame:
        """The rows of a question, without columns that it does not have. Of memory the paper's come first."""
        rows = self.rows[self.rows["question"] == question]
        if question == "memory" and len(rows):
            rows = pd.concat([pd.DataFrame(papers()), rows], ignore_index=True)
        return rows.dropna(axis="columns", how="all")


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
        differs = [key for key in ("backend", "malloc") if row.get(key) != usual.get(key)]
        row["label"] = ", ".join([row["implementation"], *(words({key: row[key]}) for key in differs)])
        rows.append(row | figures(benchmark))
    return pd.DataFrame(rows)


def figures(benchmark: dict[str, Any]) -> dict[str, Any]:
    """What tables show of a benchmark, by the heading. Samples stay samples."""
    extra, seconds = benchmark["extra_info"], np.array(benchmark["stats"]["data"])
    shown = {"step, s": np.median(seconds)} if len(seconds) else {}
    for unit, work, size in (("GB/s", "moved", 1e9), ("TFLOP/s", "operations", 1e12)):
        if work in extra:
            shown[unit] = extra[work] / np.median(seconds) / size
    if len(ratios := np.array(results.ratios(benchmark))):
        above = (seconds - extra["baseline_seconds"]) / benchmark["params"].get("parameters", 1)
        shown |= {"time": ratios, "speed": 1 / ratios, "µs more": 1e6 * above}
    if "most" in extra:  # a simulation; each category has its own maximum
        peak = sum(extra["memory"].values())
        shown |= {name: size / GIB for name, size in extra["most"].items()} | {"GiB at the peak": peak / GIB}
        if "measured" in extra:
            shown["simulated / measured"] = peak / extra["measured"]
    elif "memory" in extra:
        shown["GiB above the weights"] = extra["memory"]["peak"] / GIB
        shown["GiB between steps"] = extra["memory"]["states"] / GIB
    return shown


def papers() -> Iterator[dict[str, Any]]:
    """The paper's Table 1, as rows."""
    for checkpointing, totals in paper.TOTALS.items():
        for method, total in totals.items():
            most = {**paper.TABLE_1[method], "activations": paper.ACTIVATIONS[checkpointing]}
            most["not named"] = round(total - sum(most.values()), 2)
            memory = {name: size * GIB for name, size in most.items()}
            case = {"model": paper.MODEL, "checkpointing": checkpointing, "label": f"{method}, the paper"}
            yield case | most | {"GiB at the peak": total, "memory": memory}


# --- words -----------------------------------------------------------------------------------------------------------


def percentiles(samples: Any) -> Any:
    """Median, and the range of nineteen samples of twenty.

    Of 1367 comparisons between four runs of one commit the ranges were apart in 1, those of four samples of five in 8.
    """
    return np.percentile(samples, (50, 2.5, 97.5))


def cell(value: Any, form: str) -> str:
    if isinstance(value, np.ndarray):
        return "{0:{form}} ({1:{form}}-{2:{form}})".format(*percentiles(value), form=form)
    return "-" if pd.isna(value) else format(value, form)


def count(value: float) -> str:
    """1024 is 1 Ki."""
    for unit, size in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if value >= size and value % size == 0:
            return f"{int(value) // size} {unit}"
    return str(int(value))


def words(case: dict[str, Any]) -> str:
    """A case in words, without what does not apply to it."""
    named = {"model": "Llama {}", "shape": "shape {}", "malloc": "{} malloc", "baseline": "relative to “{}”"}
    named |= {"chunk": "loss in chunks of {}", "kernels": "kernels {}"}
    parts = []
    for key, value in case.items():
        if key == "checkpointing":
            parts.append("checkpointing" if value else "no checkpointing")
        elif isinstance(value, str):
            parts.append(named.get(key, "{}").format(value.removeprefix("llama-")))
        elif not pd.isna(value):
            parts.append(named.get(key, "{} " + key).format(count(value)))
    return ", ".join(parts)


# --- tables ----------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table for each case that has the first value: a row for each implementation, and a column for each value and
    each case of `over`."""

    values: dict[str, str]  # each with its format
    over: Sequence[str] = ()
    only: Mapping[str, Sequence[Any]] = MappingProxyType({})  # rows that have one of these values in this column
    cases: Sequence[str] = CASE


STEP = Table({"step, s": ".3g", "time": ".2f", "GiB above the weights": ".3f"}, ["malloc"])
RANKS = Table({**STEP.values, "GiB between steps": ".3f"})
SPEED = Table({"speed": ".2f"}, ["elements"])
ERROR = Table({"error": ".0e"}, ["dtype"], {"elements": [2**24], "malloc": ["stock"]}, ["elements"])
LAYER = Table({"time": ".3f"}, ["tokens", "tensors", "elements"])
TABLE_1 = Table(dict.fromkeys([*CATEGORIES, "GiB at the peak"], ".2f"), only={"model": [paper.MODEL]})
SHORT_TABLE_1 = {"model": [paper.MODEL], "chunk": [np.nan], "kernels": [np.nan]}
SHORT_UPDATES = ["sgd_ nearest", "sgd_ stochastic", "add_", "SGD foreach", "lomo_optim"]
SHORT_STEPS = [BASE, "lomo_optim, clipping", "Lomo"]
SHORT_STEPS += ["Lomo, clipping, two passes, fused", "Lomo, clipping, one pass, fused"]
SHORT_STEP = {"model": ["107M"], "tokens": [256], "checkpointing": [False], "implementation": SHORT_STEPS}

#: By name in a document's mark; the first word is the question.
TABLES = {
    "ceilings": [Table({"GB/s": ".4g", "TFLOP/s": ".4g"})],
    "update": [SPEED],
    "update short": [SPEED._replace(only={"dtype": ["bfloat16"], "implementation": SHORT_UPDATES})],
    "norm": [SPEED, ERROR],
    **{question: [LAYER] for question in ("lists", "linear", "embedding", "captured")},
    "hooks": [Table({"µs more": ".1f"}, ["parameters"])],
    **{question: [STEP] for question in ("step", "clipping", "head")},
    "step short": [Table({"time": ".2f", "GiB above the weights": ".3f"}, ["malloc"], SHORT_STEP)],
    **{question: [RANKS] for question in ("data_parallel", "sharded")},
    "memory": [TABLE_1, Table({"simulated / measured": ".3f", "GiB at the peak": ".3f"})],
    "memory short": [Table({"GiB at the peak": ".2f"}, ["checkpointing"], SHORT_TABLE_1)],
}


def chosen(rows: pd.DataFrame, only: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    for key, values in only.items():
        rows = rows[rows[key].isin(values)] if key in rows else rows
    return rows


def cases(rows: pd.DataFrame, keys: Sequence[str] = CASE) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each case of these columns, in words, and its rows without columns that it does not have."""
    present = [key for key in keys if key in rows]
    for case, group in rows.groupby(present or (lambda _: ""), sort=False, dropna=False):
        yield words(dict(zip(present, case, strict=False))), group.dropna(axis="columns", how="all")


def written(table: Table, rows: pd.DataFrame) -> Iterator[str]:
    """In Markdown."""
    rows = chosen(rows, table.only)
    over = [key for key in table.over if key in rows]
    rows = rows.sort_values(over, kind="stable") if over else rows
    for case, group in cases(rows, [key for key in table.cases if key not in over]):
        values = [value for value in table.values if value in group]
        if next(iter(table.values)) not in values:
            continue
        index = "implementation" if "malloc" in over else "label"
        cells = group.pivot_table(values, index, over, aggfunc="first", sort=False)
        texts = pd.DataFrame(index=cells.index)
        for column in cells:
            value, *place = column if over else [column]
            heading = ", ".join(filter(None, [value, words(dict(zip(over, place, strict=True)))]))
            texts[heading] = [cell(sample, table.values[value]) for sample in cells[column]]
        yield markdown(case, texts)


def markdown(head: str, cells: pd.DataFrame) -> str:
    """Numbers stand to the right; ours is bold."""
    labels = [f"**{label}**" if ours(label) else label for label in cells.index]
    lines = [[head, *cells.columns], *([label, *row] for label, row in zip(labels, cells.to_numpy(), strict=True))]
    text = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join([text[0], "|---|" + "---:|" * len(cells.columns), *text[1:]]) + "\n"


def environment(device: Device) -> Iterator[str]:
    """What each file was measured on, and what is missing; of a GPU how the stages of `make gpu` ended."""
    about = []
    for name, run in device.files.items():
        commit = run["commit_info"]["id"]
        when = {"date": run["datetime"][:10], "commit": commit[:7] + "+" * commit.endswith("+")}
        about.append({"file": f"[{name}]({device.folder.name}/{name})", **when, **run["machine_info"]})
    yield markdown("", pd.json_normalize(about).set_index("file"))
    if (stages := device.folder / "stages.json").exists():
        checks = json.loads(stages.read_text()).items()
        yield "".join(f"- {stage}: {check['said']}, {check['seconds']:.0f} s\n" for stage, check in checks)
    if missing := sorted({reason for run in device.files.values() for reason in run["missing"]}):
        yield "Missing:\n\n" + "".join(f"- {reason}\n" for reason in missing)


def tables(name: str, device: Device) -> list[str]:
    """
    Raises:
        KeyError: there is no such table.
    """
    if name == "environment":
        return list(environment(device))
    rows = device.of_question(name.split()[0])
    return [text for table in TABLES[name] for text in written(table, rows)]


def filled(text: str, measured: list[Device]) -> str:
    """A document with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        shown = [(f"{device.folder.name}:\n", texts) for device in measured if (texts := tables(match[2], device))]
        parts = [part for name, texts in shown for part in ([name, *texts] if len(shown) > 1 else texts)]
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
