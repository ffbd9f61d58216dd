"""Plots of measured results: an SVG for each function of `PLOTS`, the same whenever the results are.

Colours are Okabe and Ito's, which the colour-blind tell apart. Blue is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import report
from .results import BASE, DTYPES, FORWARD, clips, ours

if TYPE_CHECKING:
    from .report import Device

BLUE, RED, GREY, PALE = "#0072B2", "#D55E00", "#6E6E6E", "#C9C9C9"
OTHERS = ["#E69F00", "#222222", "#CC79A7", RED, "#009E73", "#56B4E9", "#F0E442"]
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


def update(device: Device) -> Figure:
    """Fraction of the probe's speed over the number of elements, one panel per dtype: ours and rivals."""
    rows = device.of_question("update")
    rows = rows[rows["usual"]]
    dtypes = [dtype for dtype in DTYPES if (rows["dtype"] == dtype).any()]
    figure, column = plt.subplots(len(dtypes), 1, figsize=(10, 3.6 * len(dtypes)), sharex=True, squeeze=False)
    for axes, dtype in zip(column[:, 0], dtypes, strict=True):
        lines(axes, rows[rows["dtype"] == dtype], "elements", "fraction")
        axes.axhline(1, color=GREY, linewidth=1.2)
        axes.set_title(f"{dtype}: fraction of the speed of the probe “{rows['beside'].iloc[0]}”")
        axes.set_ylim(0, 1.3)  # a band may leave the axes: one sample beside a stalled probe would press all together
        axes.set_xscale("log", base=2)
        sizes = sorted(rows["elements"].unique())
        axes.set_xticks(sizes, [report.count(size) for size in sizes])
    column[-1, 0].set_xlabel("elements of the parameter")
    return figure


def hooks(device: Device) -> Figure:
    """Microseconds per parameter over their number, one panel per shape and dtype."""
    rows = device.of_question("hooks")
    panels = list(rows.groupby(["shape", "dtype"], sort=False))
    figure, column = plt.subplots(len(panels), 1, figsize=(10, 3.4 * len(panels)), sharex=True, squeeze=False)
    for axes, ((shape, dtype), group) in zip(column[:, 0], panels, strict=True):
        lines(axes, group, "parameters", "cost")
        axes.set(xscale="log", yscale="log", title=f"{shape}, {dtype}: µs per parameter above a bare backward")
    column[-1, 0].set_xlabel("number of parameters")
    return figure


def lines(axes: Axes, rows, x: str, y: str) -> None:
    """One line for each label, with the range of nineteen samples of twenty as a band."""
    seen = {True: 0, False: 0}
    for label, group in rows.groupby("label", sort=False):
        group = group.sort_values(x)
        mine = ours(label)
        number = seen[mine]
        seen[mine] += 1
        shade = BLUE if mine else OTHERS[number % len(OTHERS)]
        dashes = ["-", "--", ":", "-."][(number if mine else number // len(OTHERS)) % 4]
        values = [tuple(spread) for spread in group[y]]
        middle, low, high = zip(*values, strict=True)
        axes.plot(group[x], middle, dashes, color=shade, marker="o", markersize=3.5, linewidth=1.3 + mine, label=label)
        axes.fill_between(group[x], low, high, color=shade, alpha=0.1, linewidth=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


def step(device: Device) -> Figure | None:
    """Time against peak memory above the weights, without and with checkpointing: the first case measured of each.
    Methods that clip by the global norm and methods that do not have a panel each."""
    rows = device.of_question("step")
    if "ratio" not in rows:  # on a small GPU what steps are held to may not fit
        return None
    rows = rows[rows["ratio"].notna() & (rows["contestant"] != FORWARD)]
    panels = []
    keys = [key for key in (*report.STEP, "malloc") if key in rows]
    for _, of_one in rows.groupby("checkpointing", sort=False):
        first = of_one[(of_one[keys] == of_one.iloc[0][keys]).all(axis=1)]
        clipping = first["contestant"].map(clips)
        panels += [(words, group) for words, group in (("clipped", first[clipping]), ("no clipping", first[~clipping]))]
    panels = [(words, group) for words, group in panels if len(group)]
    figure, column = plt.subplots(len(panels), 1, figsize=(10, 3.9 * len(panels)), squeeze=False)
    for axes, (how, group) in zip(column[:, 0], panels, strict=True):
        case = group[keys].iloc[0].to_dict()
        for number, one in enumerate(group.itertuples()):
            shade = BLUE if ours(one.contestant) else OTHERS[number % len(OTHERS)]
            mark = "oD^vsP"[number % 6]
            errors = [[one.ratio.median - one.ratio.low], [one.ratio.high - one.ratio.median]]
            axes.errorbar(
                one.peak / 2**20,
                one.ratio.median,
                yerr=errors,
                fmt=mark,
                color=shade,
                markersize=7,
                elinewidth=0.9,
                label=one.contestant,
            )
        axes.axhline(1, color=GREY, linewidth=1)
        axes.set(xlabel="peak memory above the weights, MiB", ylabel=f"time, {BASE} = 1")
        axes.set_xlim(left=0)
        axes.set_title(f"{report.words(case)}; {how}")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return figure


def memory(device: Device) -> Figure | None:
    """Stacked bars by category of the paper's case, beside the paper's own."""
    panels = {saved: report.memory_rows(device, saved) for saved in (False, True)}
    panels = {saved: rows for saved, rows in panels.items() if len(rows)}
    if not panels:
        return None
    figure, row = plt.subplots(1, len(panels), figsize=(12, 2 + 0.3 * max(map(len, panels.values()))), squeeze=False)
    for axes, (saved, rows) in zip(row[0], panels.items(), strict=True):
        rows = rows.loc[::-1, rows.max() >= 0.005]
        rows.plot.barh(stacked=True, ax=axes, width=0.75, color=CATEGORIES, legend=saved)
        axes.set(title=report.words({"checkpointing": saved}), xlabel="GiB")
        axes.grid(axis="y", visible=False)
    return figure


PLOTS = {"update": update, "hooks": hooks, "step": step, "memory": memory}


def draw(device: Device, folder: Path) -> Iterator[Path]:
    """Draws what was measured on the device."""
    for name, plot in PLOTS.items():
        with plt.rc_context(STYLE):
            figure = plot(device) if len(device.of_question(name)) else None
            if figure is not None:
                file = folder / f"{device.name}-{name}.svg"
                figure.savefig(file, metadata={"Date": None})
                plt.close(figure)
                yield file
