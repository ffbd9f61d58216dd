"""One picture for each task: what was learnt, and how it depends on the learning rate."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .methods import METHODS, PRECISIONS
from .report import UNITS, YARDSTICK, Study

#: Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#222222", "#F0E442", "#999999"]
MARKS = "oD^vsPX*<"
STYLE = {
    "svg.hashsalt": "lomo_kernels",  # no random identifiers
    "svg.fonttype": "path",  # the same on every reader's machine
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "savefig.facecolor": "white",  # opaque: readable in dark mode
    "figure.constrained_layout.use": True,
}


def spreads(axes: Axes, study: Study, *, against: bool) -> None:
    """A row for each method: mean and range over the seeds in each precision, if `against` of the difference to the
    yardstick, taken seed by seed."""
    base = study.by_seed(study.of(*YARDSTICK)) if against else 0.0
    for number, precision in enumerate(study.precisions):
        for row, method in enumerate(study.methods):
            values = (study.by_seed(study.of(method, precision)) - base).dropna()
            if len(values):
                mean = values.mean()
                axes.errorbar(
                    mean,
                    row + 0.17 * (number - (len(study.precisions) - 1) / 2),
                    xerr=[[mean - values.min()], [values.max() - mean]],
                    color=COLOURS[number],
                    marker=MARKS[number],
                    markersize=4,
                    label="_" if precision in axes.get_legend_handles_labels()[1] else precision,
                )
    axes.set_yticks(range(len(study.methods)), study.methods)
    axes.invert_yaxis()
    title = f"minus {YARDSTICK[0]}, {YARDSTICK[1]}, same seed" if against else "held-out part, mean and range of seeds"
    axes.set(title=title, xlabel=UNITS[study.metric])


def curves(axes: Axes, study: Study) -> None:
    """The loss on the validation part in float32 over the learning rate."""
    rows = study.tuning[study.tuning["precision"] == "float32"]
    best = rows["loss"].min()
    for number, method in enumerate(METHODS):
        if METHODS[method].like or method not in study.methods:
            continue
        curve = rows[rows["method"] == method].sort_values("lr")
        axes.plot(curve["lr"], curve["loss"], color=COLOURS[number], marker=MARKS[number], markersize=4, label=method)
    axes.set_xscale("log")
    # A rate that is far too large would press all other points together.
    axes.set_ylim(best - 0.02 * best, min(rows["loss"].max(), 1.6 * best))
    axes.set(title="validation part, float32, one seed", xlabel="learning rate", ylabel="loss, nats")


def draw(study: Study, file: Path) -> Path:
    assert len(study.precisions) <= len(PRECISIONS) <= len(COLOURS)
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5))
        spreads(left, study, against=False)
        spreads(middle, study, against=True)
        middle.set_yticklabels([])
        curves(right, study)
        for axes in (left, right):
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False, fontsize=9)
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
    return file
