"""Plots of measured results: an SVG for each of `PLOTS`, the same whenever the results are.

Colours are Okabe and Ito's, which the colour-blind tell apart. Blue is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from . import report
from .report import Device, cases
from .results import BASE, FORWARD, clips, ours

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


def lines(rows: pd.DataFrame, x: str, y: str, title: str, keys: list[str], **settings: Any) -> Figure | None:
    """One panel for each case of `keys`, and in it a line of `y` over `x` for each label, with the range of nineteen
    samples of twenty as bars. `settings` are of the axes."""
    panels = list(cases(rows.dropna(subset=y), *keys)) if y in rows else []
    if not panels:
        return None
    figure, column = plt.subplots(len(panels), 1, figsize=(10, 3.7 * len(panels)), squeeze=False)
    for axes, (case, group) in zip(column[:, 0], panels, strict=True):
        seen = {True: 0, False: 0}
        for label, line in group.groupby("label", sort=False):
            line = line.sort_values(x)
            median, low, high = np.array([report.percentiles(samples) for samples in line[y]]).T
            number, mine = seen[ours(label)], ours(label)
            style = {"color": BLUE if mine else OTHERS[number % len(OTHERS)], "marker": MARKS[number % len(MARKS)]}
            style |= {"linewidth": 1.3 + mine, "elinewidth": 0.7, "label": label}
            axes.errorbar(line[x], median, (median - low, high - median), **style)
            seen[mine] += 1
        if x in ("elements", "parameters"):
            axes.set_xscale("log", base=2)
            axes.set_xticks(values := sorted(group[x].unique()), map(report.count, values))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
        axes.set(title=title.format(case=case, baseline=group["baseline"].iloc[0]), **{"xlabel": x} | settings)
        if y != "cost":
            axes.axhline(1, color=GREY, linewidth=1.2)
    return figure


def step(rows: pd.DataFrame) -> Figure | None:
    """The first case measured without and with checkpointing."""
    keys = [key for key in ("model", "tokens", "malloc") if key in rows]
    rows = rows[(rows[keys] == rows.groupby("checkpointing")[keys].transform("first")).all(axis="columns")]
    rows = rows[rows["implementation"] != FORWARD]
    clipping = rows["implementation"].map(lambda name: "clipped" if clips(name) else "no clipping")
    peak = rows["memory"].map(lambda memory: memory["peak"] / report.MIB)
    rows = rows.assign(label=rows["implementation"], clipping=clipping, MiB=peak)
    axes = {"xlabel": "peak memory above the weights, MiB", "ylabel": f"time, {BASE} = 1", "xlim": (0, None)}
    return lines(rows, "MiB", "ratio", "{case}", [*report.STEP, "malloc", "clipping"], **axes)


def memory(rows: pd.DataFrame) -> Figure | None:
    """Stacked bars by category of the paper's case at its peak, next to the paper's own."""
    rows = report.table_1(rows)
    panels = list(cases(rows, "checkpointing"))
    if not panels:
        return None
    figure, row = plt.subplots(1, len(panels), figsize=(12, 2 + 0.15 * len(rows)), squeeze=False)
    for axes, (case, group) in zip(row[0], panels, strict=True):
        bars = pd.DataFrame(group["memory"].tolist(), group["label"], report.CATEGORIES)[::-1].fillna(0) / report.GIB
        bars.plot.barh(stacked=True, ax=axes, width=0.75, color=CATEGORIES, legend=axes is row[0, -1])
        axes.set(title=case, xlabel="GiB", ylabel="")
        axes.grid(axis="y", visible=False)
    return figure


FRACTION = "{case}: fraction of the speed of the probe “{baseline}”"
COST = "{case}: µs per parameter above a bare backward"
PLOTS = {
    # A bar may leave the axes: one sample next to a stalled probe would press all together.
    "update": partial(lines, x="elements", y="fraction", title=FRACTION, keys=["dtype"], ylim=(0, 1.3)),
    "hooks": partial(lines, x="parameters", y="cost", title=COST, keys=["shape", "dtype"], yscale="log"),
    "step": step,
    "memory": memory,
}


def draw(device: Device, folder: Path) -> Iterator[Path]:
    """Draws what was measured on the device."""
    for question, plot in PLOTS.items():
        rows = device.of_question(question)
        with plt.rc_context(STYLE):
            if len(rows) and (figure := plot(rows)):
                file = folder / f"{device.folder.name}-{question}.svg"
                figure.savefig(file, metadata={"Date": None})
                plt.close(figure)
                yield file
