"""Tables of what the study measured, and the documents that show them.

A document has a table between ``<!-- fidelity: llama test -->`` and ``<!-- end fidelity -->``. Its name is that of a
file and one of `TABLES` or "sparse", or "short".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from .methods import METHODS, PRECISIONS, ours
from .study import BEFORE, ROOT, SMALLER

RESULTS = ROOT / "bench" / "results" / "fidelity"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "choosing.md", RESULTS / "README.md")
MARK = re.compile(r"(<!-- fidelity: ([\w ]+?) -->\n).*?(<!-- end fidelity -->)", re.S)
YARDSTICK = ("AdamW + clip", "float32")
UNITS = {"loss": "nats per byte", "accuracy": "accuracy, %"}

Cells = dict[tuple[str, str], str]  # by method and precision


class Study:
    """The results of one task on one device: `runs` and `costs`, lines of its two files."""

    def __init__(self, stem: str, folder: Path = RESULTS) -> None:
        self.runs = pd.read_csv(folder / f"{stem}.csv")
        costs = folder / f"{stem}_cost.csv"
        self.costs = pd.read_csv(costs) if costs.exists() else pd.DataFrame(columns=["method", "precision"])
        before = self.runs["method"] == BEFORE
        self.before = self.runs[before]
        self.metric = "loss" if self.before["accuracy"].isna().all() else "accuracy"
        of_methods = self.runs[~before]
        self.tests = of_methods[of_methods["part"] == "test"]
        self.tuning = of_methods[of_methods["part"] == "validation"]
        self.smaller = of_methods[of_methods["part"].str.startswith("rate/")]
        present = set(zip(self.tests["method"], self.tests["precision"], strict=True))
        self.methods = [name for name in METHODS if any((name, each) in present for each in PRECISIONS)]
        self.precisions = [name for name in PRECISIONS if any((each, name) in present for each in METHODS)]

    def of(self, method: str, precision: str, rows: pd.DataFrame | None = None) -> pd.DataFrame:
        """Lines of one configuration, of the test part unless others are given."""
        rows = self.tests if rows is None else rows
        return rows[(rows["method"] == method) & (rows["precision"] == precision)]

    def by_seed(self, rows: pd.DataFrame) -> pd.Series:
        """The metric: a loss, or an accuracy in percent."""
        return rows.set_index("seed")[self.metric] * (100 if self.metric == "accuracy" else 1)

    def spread(self, values: pd.Series, sign: str = "") -> str:
        """Mean and range."""
        digits = 1 if self.metric == "accuracy" else 3
        mean, low, high = (f"{value:{sign}.{digits}f}" for value in (values.mean(), values.min(), values.max()))
        return f"{mean} ({low} to {high})" if len(values) > 1 else mean

    # ---- Cells of tables, from the lines of one configuration -------------------------------------------------------

    def measured(self, rows: pd.DataFrame) -> str:
        return self.spread(self.by_seed(rows))

    def difference(self, rows: pd.DataFrame) -> str:
        """To the yardstick, seed by seed: the batches of a seed are the same for every method."""
        return self.spread((self.by_seed(rows) - self.by_seed(self.of(*YARDSTICK))).dropna(), sign="+")

    def rate(self, rows: pd.DataFrame) -> str:
        """Chosen, and the range of those tried."""
        tried = self.of(*rows[["method", "precision"]].iloc[0], rows=self.tuning)["lr"]
        chosen = f"{rows['lr'].iloc[0]:.3g}"
        return f"{chosen} ({tried.min():.3g} to {tried.max():.3g})" if len(tried) else chosen

    def changed(self, rows: pd.DataFrame) -> str:
        return f"{100 * rows['changed'].mean():.0f}%"

    def peak(self, rows: pd.DataFrame) -> str:
        return f"{rows['peak'].iloc[0] / 2**20:.1f}"

    def time(self, rows: pd.DataFrame) -> str:
        """Median and quartiles of the rounds."""
        ratios = rows["seconds"] / rows["base_seconds"]
        return f"{ratios.median():.2f} ({ratios.quantile(0.25):.2f} to {ratios.quantile(0.75):.2f})"


#: By name: the heading, the lines it is made of, and how a cell is made.
TABLES: dict[str, tuple[str, str, Callable[[Study, pd.DataFrame], str]]] = {
    "test": ("held-out {unit}", "tests", Study.measured),
    "differences": ("minus AdamW + clip in float32, {unit}", "tests", Study.difference),
    "rates": ("learning rate chosen (tried)", "tests", Study.rate),
    "changed": ("weights that a step changes", "tests", Study.changed),
    "peak": ("peak above the weights, MiB", "costs", Study.peak),
    "time": ("time of a step over SGD + clip", "costs", Study.time),
}


def markdown(columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    named = {f"**{name}**" if ours(name) else name: row for name, row in rows.items()}
    return "\n".join([*lines, *(f"| {' | '.join([name, *row])} |" for name, row in named.items())])


def table(study: Study, name: str) -> str:
    """One row for each method, one column for each precision."""
    heading, lines, cell = TABLES[name]
    groups = getattr(study, lines).groupby(["method", "precision"], sort=False)
    cells = {key: cell(study, rows) for key, rows in groups}
    rows = {each: [cells.get((each, precision), "-") for precision in study.precisions] for each in study.methods}
    return markdown([heading.format(unit=UNITS[study.metric]), *study.precisions], rows)


def sparse(study: Study) -> str:
    """The share of weights that a step changes and what is learnt at smaller learning rates, of the first seed: one row
    for each method and precision."""
    chosen = study.tests[study.tests["seed"] == study.tests["seed"].min()].assign(part="rate/1")
    rows = {}
    for key, group in study.smaller.groupby(["method", "precision"], sort=False):
        lines = pd.concat([study.of(*key, rows=chosen), group]).set_index("part")
        cells = [lines.loc[f"rate/{divisor}"] for divisor in (1, *SMALLER)]
        rows[", ".join(key)] = [f"{100 * cell['changed']:.2g}%, {cell[study.metric]:.3f}" for cell in cells]
    columns = [f"changed weights, {UNITS[study.metric]}", "chosen rate", *(f"1/{divisor} of it" for divisor in SMALLER)]
    return markdown(columns, rows)


def short(folder: Path = RESULTS) -> str:
    """Both tasks on a CPU beside each other, in float32: what most people choose between."""
    studies = [Study(stem, folder) for stem in ("llama", "minilm")]
    rows = {}
    for name in ("SGD + clip", "sign", "AdaLomo", "AdamW + clip"):
        rows[name] = []
        for study in studies:
            tests = study.of(name, "float32")
            rows[name] += [f"{tests['lr'].iloc[0]:.3g}", study.measured(tests)] if len(tests) else ["-", "-"]
    columns = [part for study in studies for part in ("learning rate", UNITS[study.metric])]
    return markdown(["rule", *columns], rows)


def page(stem: str, folder: Path = RESULTS) -> str:
    """All tables of a task."""
    study = Study(stem, folder)
    before = f"Before fine-tuning: {study.spread(study.by_seed(study.before))}."
    return "\n\n".join(
        [before, *(table(study, name) for name in TABLES), *([sparse(study)] if len(study.smaller) else [])]
    )


def filled(text: str, folder: Path = RESULTS) -> str:
    """A document with its tables as the results are."""

    def made(match: re.Match[str]) -> str:
        stem, _, name = match[2].partition(" ")
        if stem == "short":
            body = short(folder)
        elif not name:
            body = page(stem, folder)
        else:
            study = Study(stem, folder)
            body = sparse(study) if name == "sparse" else table(study, name)
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return MARK.sub(made, text)


def write() -> None:
    """Brings the documents and pictures up to date."""
    from . import plots

    for document in DOCUMENTS:
        text = document.read_text()
        if (new := filled(text)) != text:
            document.write_text(new)
            print(f"wrote {document.relative_to(ROOT)}")
    for file in sorted(RESULTS.glob("*.csv")):
        if not file.stem.endswith("_cost"):
            print(f"drew {plots.draw(Study(file.stem), file.with_suffix('.svg')).relative_to(ROOT)}")
