"""Plots of measured results: an SVG for each of `PLOTS` and of the memory, the same whenever the results are.

Colours are Okabe and Ito's, which the colour-blind tell apart. Blue is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import report
from .results import BASE, FORWARD, clips, ours

if TYPE_CHECKING:
    import pandas as pd

    from .report import Device

BLUE, RED, GREY, PALE = "#0072B2", "#D55E00", "#6E6E6E", "#C9C9C9"
OTHERS = ["#E69F00", "#222222", "#CC79A7", RED, "#009E73", "#56B4E9", "#F0E442"]
MARKS = "oD^vsPX*"
CATEGORIES = {
    "parameters": PALE,
    "gradients": RED,
    "optimizer states": "#E69F00",
    "activations": "#56B4E9",
    "kept factors": "#009E73",
    "temporaries": "#CC79A7",
    "workspace": "#F0E442",
    "gathered parameters": BLUE,
    "not named": GREY,
}
STYLE = {
    "svg.hashsalt": "lomo_kernels",  # no random identifiers
    "svg.fonttype": "path",  # the same on every reader's machine
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "savefig.facecolor": "white",  # opaque: readable in dark mode
    "figure.constrained_layout.use": True,
}


class Plot(NamedTuple):
    """One panel for each case of `each`, and in it a line of `y` over `x` for each label. `axes` are their settings;
    its values of `x` stand on a logarithmic axis with `ticks`."""

    x: str
    y: str
    each: Sequence[str]
    title: str
    axes: dict[str, Any]
    ticks: bool = True
    select: Callable[[pd.DataFrame], pd.DataFrame] = lambda rows: rows

    def __call__(self, device: Device, question: str) -> Figure | None:
        rows = self.select(device.of_question(question))
        each = [key for key in self.each if key in rows]
        panels = list(rows.groupby(each, sort=False)) if self.y in rows else []
        if not panels:
            return None
        figure, column = plt.subplots(len(panels), 1, figsize=(10, 3.7 * len(panels)), squeeze=False)
        for axes, (case, group) in zip(column[:, 0], panels, strict=True):
            lines(axes, group.dropna(subset=[self.y]), self.x, self.y)
            if self.ticks:
                values = sorted(group[self.x].unique())
                axes.set_xscale("log", base=2)
                axes.set_xticks(values, map(report.count, values))
            said = report.words(dict(zip(each, case, strict=True)))
            axes.set(**self.axes, title=self.title.format(case=said, beside=group["beside"].iloc[0]))
        return figure


def lines(axes: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    """One line for each label, with the range of nineteen samples of twenty as bars."""
    seen = {True: 0, False: 0}
    for label, group in rows.groupby("label", sort=False):
        number, mine = seen[ours(label)], ours(label)
        seen[mine] += 1
        group = group.sort_values(x)
        bars = zip(*((of.median - of.low, of.high - of.median) for of in group[y]), strict=True)
        axes.errorbar(
            group[x],
            [of.median for of in group[y]],
            list(bars),
            color=BLUE if mine else OTHERS[number % len(OTHERS)],
            marker=MARKS[number % len(MARKS)],
            linewidth=1.3 + mine,
            elinewidth=0.7,
            label=label,
        )
    if y in ("fraction", "ratio"):
        axes.axhline(1, color=GREY, linewidth=1.2)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


def first_cases(rows: pd.DataFrame) -> pd.DataFrame:
    """The first case measured without and with checkpointing."""
    keys = [key for key in ("model", "tokens", "malloc") if key in rows]
    rows = rows[(rows[keys] == rows.groupby("checkpointing")[keys].transform("first")).all(axis="columns")]
    clipping = rows["contestant"].map(lambda name: "clipped" if clips(name) else "no clipping")
    rows = rows.assign(label=rows["contestant"], clipping=clipping, MiB=rows["peak"] / 2**20)
    return rows[rows["contestant"] != FORWARD]


PROBED = "{case}: fraction of the speed of the probe “{beside}”"
ABOVE = "{case}: µs per parameter above a bare backward"
AXES = {"xlabel": "peak memory above the weights, MiB", "ylabel": f"time, {BASE} = 1", "xlim": (0, None)}
CASE = [*report.STEP, "malloc", "clipping"]
PLOTS = {
    # A bar may leave the axes: one sample beside a stalled probe would press all together.
    "update": Plot(
        "elements",
        "fraction",
        ["dtype"],
        PROBED,
        {"xlabel": "elements of the parameter", "ylim": (0, 1.3)},
        select=report.usual,
    ),
    "hooks": Plot("parameters", "cost", ["shape", "dtype"], ABOVE, {"xlabel": "number of parameters", "yscale": "log"}),
    "step": Plot("MiB", "ratio", CASE, "{case}", AXES, ticks=False, select=first_cases),
}


def memory(device: Device, question: str) -> Figure | None:
    """Stacked bars by category of the paper's case at its peak, beside the paper's own."""
    rows = report.papers_case(device.of_question(question))
    panels = list(rows.groupby("checkpointing", sort=False))
    if not panels:
        return None
    figure, row = plt.subplots(1, len(panels), figsize=(12, 2 + 0.15 * len(rows)), squeeze=False)
    for axes, (saved, group) in zip(row[0], panels, strict=True):
        bars = group.set_index("label")[::-1].filter(like=", at peak").rename(columns=lambda name: name.split(",")[0])
        bars = bars.fillna(0) / 2**30
        bars.loc[:, bars.max() >= 0.005].plot.barh(stacked=True, ax=axes, width=0.75, color=CATEGORIES, legend=saved)
        axes.set(title=report.words({"checkpointing": saved}), xlabel="GiB", ylabel="")
        axes.grid(axis="y", visible=False)
    return figure


def draw(device: Device, folder: Path) -> Iterator[Path]:
    """Draws what was measured on the device."""
    for question, plot in {**PLOTS, "memory": memory}.items():
        with plt.rc_context(STYLE):
            figure = plot(device, question) if len(device.of_question(question)) else None
            if figure is not None:
                file = folder / f"{device.name}-{question}.svg"
                figure.savefig(file, metadata={"Date": None})
                plt.close(figure)
                yield file
