"""How the figures and tables of the claims look, and where they are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "SKY",
    "label_ends",
    "mark",
    "save",
    "setup",
    "table",
    "text",
]

DOCS = Path(__file__).parents[2] / "docs"
# Okabe and Ito's colours, which the colour-blind can tell apart, with a darker purple.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#B4629A", "#56B4E9"
BLACK, GREY = "#222222", "#8A8A8A"


def setup() -> None:
    """Matplotlib's settings for all figures."""
    mpl.use("Agg")
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#666666",
            "axes.labelcolor": "#333333",
            "xtick.color": "#666666",
            "ytick.color": "#666666",
            "axes.grid": True,
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "lines.solid_capstyle": "round",
            "legend.frameon": False,
        }
    )


def mark(axes: Axes, x: float, y: float, words: str, colour: str, **keywords: Any) -> None:
    """Draw a label in the colour of what it names, with a white halo."""
    halo = withStroke(linewidth=2.5, foreground="white")
    axes.text(x, y, words, **{"color": colour, "fontsize": 9, "path_effects": [halo], **keywords})


def label_ends(axes: Axes, x: float, labels: Iterable[tuple[str, float, str]], gap: float) -> None:
    """Write names at the ends of lines, at least `gap` of the axis apart; the limits must be final."""
    to_axes = axes.transScale + axes.transLimits
    last = -np.inf
    for name, value, colour in sorted(labels, key=lambda label: label[1]):
        across, up = to_axes.transform((x, value))
        last = max(up, last + gap)
        mark(axes, across, last, name, colour, va="center", fontsize=8.5, transform=axes.transAxes)


def save(figure: Figure, name: str) -> None:
    """Write a figure at twice its size in pixels."""
    path = DOCS / "_static" / f"claims_{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=200)
    plt.close(figure)
    print(f"wrote {path.relative_to(DOCS.parent)}", flush=True)


def table(name: str, heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table whose first column is words and whose others are numbers."""
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    text(name, "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines))


def text(name: str, words: str) -> None:
    """Write a fragment of text that a page includes."""
    path = DOCS / "_generated" / f"claims_{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(words + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(DOCS.parent)}", flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return f"{value:.2g}" if np.isfinite(value) else "-"
    return str(value)
