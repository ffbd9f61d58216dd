"""Plots of measured results: an SVG for each of `PLOTS`, the same whenever the results are.

Colours are Okabe and Ito's, which the colour-blind tell apart. Blue is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from . import report
from .results import FORWARD, clips, ours

BLUE, RED, GREY, PALE = "#0072B2", "#D55E00", "#6E6E6E", "#C9C9C9"
OTHERS = ["#E69F00", "#222222", "#CC79A7", RED, "#009E73", "#56B4E9", "#F0E442"]
MARKS = "oD^vsPX*"
CATEGORIES = [PALE, RED, "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", GREY]
STYLE = {
    "svg.hashsalt": "lomo_kernels",  # no random identifiers
    "svg.fonttype": "path",  # the same on every reader's machine
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#E6E6E6"},
    "savefig.facecolor": "white",  # opaque: readable in dark mode
    "figure.constrained_layout.use": True,
}


def lines(axes: Axes, rows: pd.DataFrame, x: str, y: str, **settings: Any) -> None:
    """A line of `y` over `x` for each label, with the range of nineteen samples of twenty as bars. `settings` are of
    the axes."""
    styles = {True: cycle(zip(repeat(BLUE), MARKS)), False: cycle(zip(OTHERS, MARKS))}  # noqa: B905
    for label, line in rows.groupby("label", sort=False):
        line = line.sort_values(x)
        median, low, high = np.array([report.percentiles(samples) for samples in line[y]]).T
        color, marker = next(styles[ours(label)])
        bars_of = {"yerr": (median - low, high - median), "elinewidth": 0.7}
        axes.errorbar(line[x], median, color=color, marker=marker, label=label, **bars_of)
    if x in ("elements", "parameters"):
        axes.set_xscale("log", base=2)
        axes.set_xticks(values := sorted(rows[x].unique()), map(report.count, values))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    axes.set(**{"xlabel": x, "ylabel": y} | settings)


def bars(axes: Axes, rows: pd.DataFrame) -> None:
    """Stacked by category: what the peak of each method is made of."""
    sizes = pd.DataFrame(rows["memory"].tolist(), rows["label"], report.CATEGORIES)[::-1].fillna(0) / report.GIB
    sizes.plot.barh(stacked=True, ax=axes, width=0.75, color=CATEGORIES)
    axes.set(xlabel="GiB", ylabel="")
    axes.grid(axis="y", visible=False)


def first_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """The first model measured, without and with checkpointing, in the usual setting; those that clip apart. None if
    the baseline did not fit in memory."""
    if "time" not in rows:
        return rows[:0]
    first = (rows[["model", "tokens"]] == rows[["model", "tokens"]].iloc[0]).all(axis="columns")
    rows = rows[first & (rows["label"] == rows["implementation"]) & (rows["implementation"] != FORWARD)]
    return rows.assign(group=rows["implementation"].map(lambda name: "clipped" if clips(name) else "no clipping"))


PLOTS = {
    # A bar may leave the axes: one sample next to a stalled probe would press all together.
    "update": partial(lines, x="elements", y="speed", ylim=(0, 1.3)),
    "hooks": partial(lines, x="parameters", y="µs more", ylabel="µs more per parameter", yscale="log"),
    "step": partial(lines, x="GiB above the weights", y="time", xlim=(0, None)),
    "memory": bars,
}


def draw(device: report.Device, folder: Path) -> Iterator[Path]:
    """Draws what was measured on the device, a panel for each case."""
    for question, plot in PLOTS.items():
        rows = device.of_question(question)
        if question == "step":
            rows = first_steps(rows)
        if question == "memory":
            rows = report.chosen(rows, report.SHORT_TABLE_1)
        panels = list(report.cases(rows))
        if not panels:
            continue
        with plt.rc_context(STYLE):
            figure, column = plt.subplots(len(panels), 1, figsize=(10, 4 * len(panels)), squeeze=False)
            for axes, (case, rows) in zip(column[:, 0], panels, strict=True):
                plot(axes, rows)
                axes.set_title(case)
            file = folder / f"{device.folder.name}-{question}.svg"
            figure.savefig(file, metadata={"Date": None})
            plt.close(figure)
            yield file
