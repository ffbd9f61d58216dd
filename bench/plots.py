"""Plots of measured results: a figure for each `Picture` of bench/page.py, named as its function here.

Files are the same whenever the results are: no date, no random identifier. Colours are Okabe and Ito's, which the
colour-blind tell apart; lines and points are named where they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from . import tables
from .results import Measurement, Results, Spread
from .rivals import BASE, FORWARD, clips, ours

BLUE, GREEN, SKY = "#0072B2", "#009E73", "#56B4E9"
ORANGE, RED, PINK, BLACK = "#E69F00", "#D55E00", "#CC79A7", "#222222"
GREY, PALE = "#6E6E6E", "#C9C9C9"

STYLE = {
    "svg.hashsalt": "lomo_kernels",
    "svg.fonttype": "path",  # the same on every reader's machine
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",  # opaque: readable in dark mode
}

#: Colour and dashes, the same in every plot.
LINES = {
    "sgd_ nearest": (BLUE, "-"),
    "sgd_ nearest, every scalar": (SKY, "-"),
    "sgd_ nearest, with its norm": (SKY, "--"),
    "sgd_ stochastic": (GREEN, "-"),
    "add_": (ORANGE, "-"),
    "mul_, add_": (ORANGE, "--"),
    "SGD foreach": (RED, "-"),
    "SGD fused": (RED, "--"),
    "lomo_optim": (BLACK, "-"),
    "lomo_optim, tuned malloc": (BLACK, "--"),
    "optimi SGD, no Kahan": (PINK, "-"),
    "optimi SGD": (PINK, "--"),
    "optimi": (PINK, "-"),
    "Lomo": (BLUE, "-"),
    "hook, add_": (ORANGE, "-"),
}
CATEGORIES = {
    "parameters": "#BBBBBB",
    "gradients": RED,
    "optimizer states": ORANGE,
    "activations": SKY,
    "kept factors": GREEN,
    "temporaries": PINK,
    "workspace": "#F0E442",
    "not named": GREY,
}


def line(label: str) -> tuple[str, str]:
    """Colour and dashes of a contestant; of a variant, its family's colour."""
    if label in LINES:
        return LINES[label]
    family = next((shade for name, (shade, _) in LINES.items() if label.startswith(name)), GREY)
    return family, "--"


def error_bars(of: Spread) -> list[list[float]]:
    """As matplotlib wants them: below and above."""
    return [[of.median - of.low], [of.high - of.median]]


# --- bars of one size ------------------------------------------------------------------------------------------------


def bars(results: Results, question: str, title: str) -> Figure:
    """Fraction of the probe's speed by contestant, one panel per dtype."""
    measured = results.of(question)
    usual = tables.default(measured)
    size = tables.headline_size(measured)
    shown = [one for one in results.of(question, elements=size) if tables.setting(one)[:2] == usual[:2]]
    labels = list(dict.fromkeys(_label(one, usual) for one in tables.ordered(shown)))
    dtypes = [dtype for dtype in tables.DTYPES if any(one.case["dtype"] == dtype for one in shown)]
    figure, row = plt.subplots(
        1, len(dtypes), figsize=(10, 1.3 + 0.31 * len(labels)), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, dtype in zip(row[0], dtypes, strict=True):
        found = {_label(one, usual): one for one in shown if one.case["dtype"] == dtype}
        for place, label in enumerate(labels):
            if label not in found:
                absent = any(what.startswith(f"{label}, {dtype}") for what in results.missing)
                why = "missing, see the page" if absent else "not measured"
                axes.text(0.03, place, why, va="center", color=GREY, fontsize=8.5)
                continue
            one = found[label]
            mine = ours(one.contestant)
            axes.barh(
                place,
                one.fraction.median,
                0.72,
                color=BLUE if mine else PALE,
                xerr=error_bars(one.fraction),
                ecolor=BLACK,
                error_kw={"elinewidth": 0.9},
            )
            text = f"{one.fraction.median:.2f}" + (f"   error {one.error:.0e}" if one.error is not None else "")
            inside = one.fraction.high > 0.5
            axes.text(
                0.03 if inside else one.fraction.high + 0.03,
                place,
                text,
                va="center",
                fontsize=9,
                color="white" if inside and mine else BLACK,
            )
        axes.axvline(1, color=RED, linewidth=1.2, zorder=3)
        axes.set_title(dtype)
        axes.set_xlim(0, max(1.12, *(one.fraction.high * 1.05 for one in found.values())))
        axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    figure.supxlabel(f"fraction of the speed of the probe “{measured[0].beside}”", fontsize=10)
    row[0][0].set_yticks(range(len(labels)), labels)
    for tick, label in zip(row[0][0].get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if ours(label) else "normal")
    row[0][0].invert_yaxis()
    figure.suptitle(f"{title} ({tables.count(size)} elements; red: the limit)")
    return figure


def _label(one: Measurement, usual: tuple[object, ...]) -> str:
    return tables.name(one, usual).replace("`", "")


def update(results: Results) -> Figure:
    return bars(results, "update", "How much of the memory's speed an update reaches")


def norm(results: Results) -> Figure:
    return bars(results, "norm", "Speed, and error against float64, of the sum of squares")


# --- lines over sizes ------------------------------------------------------------------------------------------------


def lines(axes: Axes, series: dict[str, list[tuple[int, Spread]]], pick: Callable[[str], tuple[str, str]]) -> None:
    """One line for each, with the range as a band, named at its right end."""
    ends = []
    for label, points in series.items():
        points.sort(key=lambda point: point[0])
        x = [size for size, _ in points]
        y = [of.median for _, of in points]
        shade, dashes = pick(label)
        width = 2.2 if ours(label) else 1.3
        axes.plot(
            x,
            y,
            dashes,
            color=shade,
            linewidth=width,
            marker="o",
            markersize=3.5,
            zorder=3 if ours(label) else 2,
            clip_on=False,
        )
        axes.fill_between(
            x, [of.low for _, of in points], [of.high for _, of in points], color=shade, alpha=0.1, linewidth=0
        )
        ends.append((y[-1], label, shade))
    name_ends(axes, ends)


def name_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names right of the axes, as near to their line's end as they can be without overlapping."""
    figure = axes.get_figure()
    figure.canvas.draw()
    height = axes.get_window_extent().height
    gap = 12.5 / 72 * figure.dpi / height  # a line of text, of the axes' height
    ends = sorted(ends, key=lambda end: end[0])
    wanted = [axes.transAxes.inverted().transform(axes.transData.transform((1, value)))[1] for value, *_ in ends]
    places = apart(wanted, gap)
    for place, at, (_, label, shade) in zip(places, wanted, ends, strict=True):
        axes.annotate(
            label,
            (1.0, at),
            (1.045, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=shade,
            fontweight="bold" if ours(label) else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": shade,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def apart(wanted: list[float], gap: float) -> list[float]:
    """Ascending places as near to those wanted as they can be with a gap between: groups that touch are spread about
    their mean."""
    groups: list[list[float]] = []
    for place in wanted:
        groups.append([place])
        while (
            len(groups) > 1
            and _middle(groups[-1]) - _middle(groups[-2]) < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_middle(group) + gap * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]


def _middle(group: list[float]) -> float:
    return sum(group) / len(group)


def size_axis(axes: Axes, sizes: list[int]) -> None:
    """Logarithmic, with a tick at every size measured, or every second."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 1.3, sizes[-1])
    axes.xaxis.set_major_locator(FixedLocator([float(size) for size in sizes]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: tables.count(int(size))))


def over_sizes(
    results: Results,
    question: str,
    chosen: list[Measurement],
    pick: Callable[[str], tuple[str, str]],
    label: Callable[[Measurement], str],
) -> Figure:
    """Fraction of the probe's speed over the number of elements, one panel per dtype."""
    sizes = tables.distinct(chosen, "elements")
    dtypes = [dtype for dtype in tables.DTYPES if any(one.case["dtype"] == dtype for one in chosen)]
    figure, column = plt.subplots(len(dtypes), 1, figsize=(10, 3.6 * len(dtypes)), sharex=True, squeeze=False)
    figure.subplots_adjust(left=0.07, right=0.76, top=1 - 0.21 / len(dtypes), bottom=0.16 / len(dtypes), hspace=0.2)
    for axes, dtype in zip(column[:, 0], dtypes, strict=True):
        series: dict[str, list[tuple[int, Spread]]] = {}
        for one in chosen:
            if one.case["dtype"] == dtype:
                series.setdefault(label(one), []).append((one.case["elements"], one.fraction))
        size_axis(axes, sizes)
        # A band may leave the axes: one sample taken beside a stalled probe would press all lines together.
        axes.set_ylim(0, 1.08 * max(1.0, *(of.median for points in series.values() for _, of in points)))
        axes.axhline(1, color=GREY, linewidth=1.2)
        axes.text(sizes[0] / 1.25, 1.015, f"the probe “{results.of(question)[0].beside}”", fontsize=8.5, color=GREY)
        axes.set_title(dtype)
        axes.set_ylabel("fraction of the probe's speed")
        lines(axes, series, pick)
    column[-1, 0].set_xlabel("elements of the parameter")
    return figure


def update_sizes(results: Results) -> Figure:
    """Ours in the usual setting, and rivals."""
    measured = results.of("update")
    usual = tables.default(measured)
    chosen = [one for one in measured if tables.setting(one)[:2] == usual[:2]]
    figure = over_sizes(results, "update", chosen, line, lambda one: _label(one, usual))
    figure.suptitle("One update over sizes (bands: 19 samples of 20)")
    return figure


def update_settings(results: Results) -> Figure:
    """Ours in every setting."""
    chosen = [one for one in results.of("update") if one.contestant in ("sgd_ nearest", "sgd_ stochastic")]
    served = dict.fromkeys(tables.setting(one) for one in chosen)
    shades = dict(zip(served, itertools.cycle((BLUE, ORANGE, GREEN, PINK, BLACK))))

    def pick(label: str) -> tuple[str, str]:
        shade = next(shades[which] for which in served if label.endswith(f", {tables.serving(which)}"))
        return shade, "--" if "stochastic" in label else "-"

    figure = over_sizes(
        results, "update", chosen, pick, lambda one: f"{one.contestant}, {tables.serving(tables.setting(one))}"
    )
    figure.suptitle("One update by instruction set or backend (bands: 19 samples of 20)")
    return figure


def hooks(results: Results) -> Figure:
    """Microseconds per parameter over their number, both logarithmic, one panel per shape and dtype."""
    measured = results.of("hooks")
    usual = tables.default(measured)
    panels = list(dict.fromkeys((str(one.case["shape"]), one.case["dtype"]) for one in measured))
    figure, column = plt.subplots(len(panels), 1, figsize=(10, 3.6 * len(panels)), sharex=True, squeeze=False)
    figure.subplots_adjust(left=0.09, right=0.74, top=1 - 0.21 / len(panels), bottom=0.17 / len(panels), hspace=0.22)
    for axes, panel in zip(column[:, 0], panels, strict=True):
        series: dict[str, list[tuple[int, Spread]]] = {}
        for one in measured:
            if (str(one.case["shape"]), one.case["dtype"]) == panel:
                cost = Spread(*(value * 1e6 for value in tables.per_parameter(one)))
                series.setdefault(_label(one, usual), []).append((one.case["parameters"], cost))
        counts = tables.distinct(measured, "parameters")
        size_axis(axes, counts)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.0f}"))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(f"each parameter: {panel[0]}, {panel[1]}")
        axes.set_ylabel("µs per parameter")
        lines(axes, series, line)
    column[-1, 0].set_xlabel("number of parameters")
    figure.suptitle("An optimizer inside backward: time per parameter above a bare backward")
    return figure


# --- steps -----------------------------------------------------------------------------------------------------------


def step(results: Results) -> Figure:
    """Time against peak memory above the weights, without and with checkpointing: the first case measured of each.
    Who clips by the global norm and who does not have a panel each."""
    cases = tables.compared_cases(results)
    first = [next((case for case in cases if case["checkpointing"] is saved), None) for saved in (False, True)]
    panels = []
    for case, clipping in itertools.product(filter(None, first), (True, False)):
        measured = [one for one in results.of("step", **case) if one.beside_seconds and one.contestant != FORWARD]
        if points := [one for one in measured if clips(one.contestant) is clipping]:
            panels.append((case, clipping, points))
    figure, column = plt.subplots(len(panels), 1, figsize=(10, 3.9 * len(panels)), squeeze=False)
    figure.subplots_adjust(left=0.07, right=0.98, top=1 - 0.19 / len(panels), bottom=0.14 / len(panels), hspace=0.3)
    for axes, (case, clipping, points) in zip(column[:, 0], panels, strict=True):
        unit, size = ("GiB", 2**30) if max(one.memory["peak"] for one in points) >= 2**30 else ("MiB", 2**20)
        for one in points:
            axes.errorbar(
                one.memory["peak"] / size,
                one.ratio.median,
                yerr=error_bars(one.ratio),
                elinewidth=0.9,
                fmt="o" if ours(one.contestant) else "s",
                markersize=7,
                color=BLUE if ours(one.contestant) else RED,
                zorder=3,
            )
        axes.set_xlim(0, max(one.memory["peak"] for one in points) / size * 1.1)
        low, high = min(one.ratio.low for one in points), max(one.ratio.high for one in points)
        margin = 0.3 * (high - low) + 0.05
        axes.set_ylim(max(low - margin, 0), high + margin)
        axes.axhline(1, color=GREY, linewidth=1, zorder=1)
        axes.set_title(f"{tables.step_words(case)}; {'clipping by the global norm' if clipping else 'no clipping'}")
        axes.set_xlabel(f"peak memory above the weights, {unit}")
        axes.set_ylabel(f"time, {BASE} = 1", fontsize=9)
        axes.annotate(
            "better",
            (0.01, 0.03),
            (0.06, 0.12),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=GREY,
            arrowprops={"arrowstyle": "->", "color": GREY},
        )
        name_points(axes, [(one.memory["peak"] / size, one.ratio.median, one.contestant) for one in points])
    figure.suptitle("Time of a training step against its memory (blue: ours)")
    return figure


def name_points(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Names to the right of their points, in columns: those whose names would run into each other share one, in the
    order of their height, and lines lead there. The axes are widened until the names fit."""
    figure = axes.get_figure()
    renderer = figure.canvas.get_renderer()
    widths = {}
    for *_, label in points:
        sample = axes.text(0, 0, label, fontsize=8.5)
        widths[label] = 1.1 * sample.get_window_extent(renderer).width + 35
        sample.remove()
    inside = axes.get_window_extent()
    while True:
        columns: list[list[tuple[float, float, str]]] = []
        for point in sorted(points):
            across = axes.transData.transform(point[:2])[0]
            if not columns or across > _right(axes, columns[-1], widths):
                columns.append([])
            columns[-1].append(point)
        if _right(axes, columns[-1], widths) <= inside.x1:
            break
        axes.set_xlim(0, axes.get_xlim()[1] * 1.05)
    gap = 12.5 / 72 * figure.dpi
    for column in columns:
        column.sort(key=lambda point: point[1])
        heights = [axes.transData.transform(point[:2])[1] for point in column]
        left = max(axes.transData.transform(point[:2])[0] for point in column) + 22
        for (x, y, label), height in zip(column, apart(heights, gap), strict=True):
            at = axes.transAxes.inverted().transform((left, height))
            axes.annotate(
                label,
                (x, y),
                at,
                textcoords="axes fraction",
                fontsize=8.5,
                va="center",
                color=BLUE if ours(label) else RED,
                fontweight="bold" if ours(label) else "normal",
                bbox={"boxstyle": "square,pad=0.1", "color": "white"},
                arrowprops={
                    "arrowstyle": "-",
                    "color": GREY,
                    "linewidth": 0.6,
                    "shrinkA": 0,
                    "shrinkB": 4,
                    "relpos": (0, 0.5),
                },
            )


def _right(axes: Axes, column: list[tuple[float, float, str]], widths: dict[str, float]) -> float:
    """Where its names end, in pixels."""
    return max(axes.transData.transform(point[:2])[0] for point in column) + max(widths[point[2]] for point in column)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(results: Results) -> Figure:
    """Stacked bars by category: the paper's case where it was asked, else the first."""
    cases = tables.memory_cases(results)
    case = next((one for one in cases if tables.is_papers(one)), cases[0])
    panels = {saved: tables.memory_rows(results, case, saved) for saved in (False, True)}
    panels = {saved: rows for saved, rows in panels.items() if rows}
    most = max(len(rows) for rows in panels.values())
    figure, row = plt.subplots(
        1, len(panels), figsize=(11, 1.9 + 0.3 * most), sharey=True, squeeze=False, layout="constrained"
    )
    shown = tables.categories(of for rows in panels.values() for of in rows.values())
    labels = list(dict.fromkeys(label for rows in panels.values() for label in rows))
    for axes, (saved, rows) in zip(row[0], panels.items(), strict=True):
        for place, label in enumerate(labels):
            left = 0.0
            for category in shown:
                width = rows.get(label, {}).get(category, 0.0)
                axes.barh(
                    place,
                    width,
                    0.74,
                    left=left,
                    color=CATEGORIES[category],
                    hatch="///" if label.endswith("the paper") else None,
                    edgecolor="white",
                    linewidth=0.5,
                )
                left += width
            if label in rows:
                axes.text(left, place, f" {left:.1f}", va="center", fontsize=9)
        axes.set_title("with checkpointing" if saved else "without checkpointing")
        axes.set_xlabel("GiB")
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    row[0][0].set_yticks(range(len(labels)), labels)
    for tick, label in zip(row[0][0].get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if ours(label) else "normal")
    row[0][0].invert_yaxis()
    handles = [Patch(color=CATEGORIES[category], label=category) for category in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(shown), frameon=False)
    figure.suptitle(
        f"{case[0]}, sequence {case[1]}, batch {case[2]}: what the peak is made of (hatched: the paper's own numbers)"
    )
    return figure


def save(name: str, results: Results, file: Path) -> None:
    """Draws the picture of this name. The format is the file's: SVG for the page."""
    with plt.rc_context(STYLE):
        figure = globals()[name](results)
        figure.suptitle(figure.get_suptitle(), x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=110)
        plt.close(figure)
