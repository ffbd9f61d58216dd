"""Draws gradient_life.svg: how long one weight's gradient is in memory, in SGD and in three modes of `Lomo`.

python docs/figures/gradient_life.py    (needs matplotlib)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

FILE = Path(__file__).with_suffix(".svg")
FORWARD, BACKWARD, GRADIENT, FACTORS = "#d9e2ec", "#bcccdc", "#d64545", "#e9a23b"
LATE = 0.35  # how far into a backward pass the weight's gradient comes


class Mode(NamedTuple):
    """Phases as (text, start, end); the life of the gradient or its factors; what is done with it, and when."""

    title: str
    phases: list[tuple[str, float, float]]
    lives: list[tuple[str, float, float]]
    events: list[tuple[str, float]]


MODES = [
    Mode(
        "SGD: backward(), clip, step(), zero_grad()",
        [("forward", 0, 2), ("backward", 2, 6), ("norm, update", 6, 7.2)],
        [("gradient", 2 + 4 * LATE, 7.2)],
        [("update", 7.2)],
    ),
    Mode(
        "Lomo, no clipping by norm: the hook",
        [("forward", 0, 2), ("backward", 2, 6)],
        [("gradient", 2 + 4 * LATE, 3.7)],
        [("update", 3.7)],
    ),
    Mode(
        "Lomo, two passes: the norm first, then the update",
        [("forward", 0, 2), ("backward for the norm", 2, 6), ("backward for the update", 6, 10)],
        [("gradient", 2 + 4 * LATE, 3.7), ("gradient", 6 + 4 * LATE, 7.7)],
        [("add its squared norm", 3.7), ("coefficient", 6), ("update", 7.7)],
    ),
    Mode(
        "Lomo, one pass, fused layer: factors in place of the gradient",
        [("forward", 0, 2), ("backward", 2, 6), ("updates", 6, 8)],
        [("factors x, gy", 2 + 4 * LATE, 7.4)],
        [("add its squared norm", 3.7), ("coefficient", 6), ("update", 7.4)],
    ),
]


def draw_mode(axes: Axes, mode: Mode) -> None:
    for text, start, end in mode.phases:
        axes.barh(0, end - start, left=start, height=0.5, color=FORWARD if text == "forward" else BACKWARD, ec="white")
        axes.text((start + end) / 2, 0, text, ha="center", va="center", fontsize=8)
    for text, start, end in mode.lives:
        color = GRADIENT if text == "gradient" else FACTORS
        axes.barh(-0.62, end - start, left=start, height=0.38, color=color)
        axes.text(start - 0.08, -0.62, text, ha="right", va="center", fontsize=8, color=color)
    for text, at in mode.events:
        axes.plot([at, at], [-0.85, -0.25], color="#243b53", lw=1)
        axes.text(at, -1.05, text, ha="center", va="center", fontsize=8, color="#243b53")
    axes.set_title(mode.title, loc="left", fontsize=9, fontweight="bold", pad=2)
    axes.set_xlim(0, 10.2)
    axes.set_ylim(-1.25, 0.35)
    axes.axis("off")


def draw(file: Path) -> None:
    """Writes the figure. Text stays text, and the same input gives the same bytes."""
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gradient_life"}):
        figure, rows = plt.subplots(len(MODES), 1, figsize=(8, 6), layout="constrained")
        for axes, mode in zip(rows, MODES, strict=True):
            draw_mode(axes, mode)
        figure.supxlabel(
            "time of one training step, not to scale; coloured: one weight's gradient, or its factors, in memory",
            size=8,
        )
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
