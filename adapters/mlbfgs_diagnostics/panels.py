"""What the figure of a run shows: its curvature spectrum at the top, and the quantities behind it below."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .recorder import Recorder
from .rules import NOISY

__all__ = ["draw", "draw_spectrum", "spectrum_handles"]

# Okabe and Ito's colours, which can be told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GRID, SHADE = "#333333", "#dddddd", "#eef1f5"


class _Panel(NamedTuple):
    title: str
    field: str
    logarithmic: bool = False
    line: float | None = None
    """A level to be marked by a line."""
    words: str = ""
    """What that level means."""


_LOSS = _Panel("loss", "loss", logarithmic=True)
_PANELS = (
    _Panel("cosine of direction and gradient", "cosine", False, 0.0, "at right angles"),
    _Panel("signal to noise of the last check", "signal_to_noise", True, NOISY, "above: enough for a pair"),
    _Panel("steps from pair to pair", "interval"),
    _Panel("scale gamma of the inverse Hessian", "gamma", logarithmic=True),
    _Panel("gradient RMS", "gradient_rms", logarithmic=True),
)
_PAIRS = _Panel("pairs stored", "pairs")


def draw(recorder: Recorder, block: int) -> Figure:
    """The figure of `mlbfgs_diagnostics.figure`."""
    _check(recorder, block)
    losses = recorder.series("loss")
    panels = (_LOSS, *_PANELS) if np.isfinite(losses).any() else (*_PANELS, _PAIRS)
    drawn = Figure(figsize=(9.5, 9.0), layout="constrained")
    drawn.get_layout_engine().set(hspace=0.06, wspace=0.05)
    grid = drawn.add_gridspec(4, 2, height_ratios=(2.3, 1, 1, 1))
    top = drawn.add_subplot(grid[0, :])
    draw_spectrum(top, recorder, block)
    top.set_ylabel("eigenvalue", color=INK)
    top.legend(handles=spectrum_handles(), loc="lower left", bbox_to_anchor=(0.0, 0.0), frameon=False)
    for place, panel in enumerate(panels):
        axes = drawn.add_subplot(grid[1 + place // 2, place % 2], sharex=top)
        _draw_panel(axes, recorder, panel)
        if place >= 4:
            axes.set_xlabel("step")
    if 1 < len(recorder.names) <= len(COLOURS):
        handles = drawn.axes[2].get_lines()[: len(recorder.names)]
        drawn.legend(handles, recorder.names, loc="outside lower center", ncols=6, frameon=False)
    return drawn


def draw_spectrum(axes: Axes, recorder: Recorder, block: int = 0, title: str | None = None) -> None:
    """The eigenvalues of a block's Hessian approximation over the steps, on axes of matplotlib.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    recorder : Recorder
    block : int
    title : str, optional
    """
    steps, spectra = recorder.calls(), recorder.spectra(block)
    edges = np.append(steps, steps[-1] + recorder.every)
    there = np.isfinite(spectra)
    begun = there.any(axis=1)
    if begun.any():
        low = np.where(begun, np.where(there, spectra, np.inf).min(axis=1), np.nan)
        high = np.where(begun, np.where(there, spectra, -np.inf).max(axis=1), np.nan)
        axes.fill_between(edges, _held(low), _held(high), step="post", color=SHADE, lw=0, zorder=0.5)
    rows, ranks = np.nonzero(there)
    place = ranks / np.maximum(there.sum(axis=1) - 1, 1)[rows]
    colours = colormaps["viridis"](0.9 - 0.9 * place)
    axes.hlines(spectra[there], edges[rows], edges[rows + 1], colors=colours, lw=1.6)
    outside = np.where(begun, 1.0 / recorder.series("gamma")[:, block], np.nan)
    axes.step(edges, _held(outside), where="post", color=COLOURS[1], lw=1.2, ls=(0, (4, 2)))
    _style(axes, logarithmic=bool(begun.any()))
    margin = 0.02 * (edges[-1] - edges[0])
    axes.set_xlim(edges[0] - margin, edges[-1] + margin)
    name = "" if len(recorder.names) == 1 else f", block {recorder.names[block]}"
    axes.set_title(title or f"live curvature spectrum{name}", loc="left", fontsize=11, color=INK)


def spectrum_handles() -> list[Line2D]:
    """The meaning of the lines of `draw_spectrum`, for a legend."""
    dark, light = colormaps["viridis"]((0.0, 0.9))
    return [
        Line2D([], [], color=dark, lw=1.6, label="largest curvature found"),
        Line2D([], [], color=light, lw=1.6, label="smallest"),
        Line2D([], [], color=COLOURS[1], lw=1.2, ls=(0, (4, 2)), label="in all other directions (1 / gamma)"),
    ]


def _held(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The values with the last one repeated, which holds until the last record ends."""
    return np.append(values, values[-1])


def _check(recorder: Recorder, block: int) -> None:
    if not any(reading.figures for reading in recorder.readings()):
        msg = "`recorder` must hold a record of a step, got none"
        raise ValueError(msg)
    if not 0 <= block < len(recorder.names):
        msg = f"`block` must be in [0, {len(recorder.names)}), got {block}"
        raise ValueError(msg)


def _draw_panel(axes: Axes, recorder: Recorder, panel: _Panel) -> None:
    steps, values = recorder.calls(), recorder.series(panel.field)
    positive = np.isfinite(values) & (values > 0)
    logarithmic = panel.logarithmic and bool(positive.any())
    if logarithmic:
        values = np.where(positive, values, np.nan)
    plot: Callable[..., Any] = partial(axes.plot, steps, lw=1.4)
    if values.ndim == 1 or values.shape[1] == 1:
        plot(values.reshape(-1), color=COLOURS[0])
    elif values.shape[1] <= len(COLOURS):
        for column, colour in zip(values.T, COLOURS, strict=False):
            plot(column, color=colour)
    else:
        low, middle, high = _quantiles(values)
        axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.2, lw=0)
        plot(middle, color=COLOURS[0])
    _style(axes, logarithmic=logarithmic)
    if panel.line is not None:
        axes.axhline(panel.line, color=INK, lw=1, ls=(0, (1, 2)))
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(panel.words, (0.995, panel.line), (0, 3), ha="right", fontsize=8, color=INK, **place)
    axes.set_title(panel.title, loc="left", fontsize=10, color=INK)


def _quantiles(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    rows = [row[np.isfinite(row)] for row in values]
    return np.asarray([np.quantile(row, (0, 0.5, 1)) if row.size else (np.nan,) * 3 for row in rows]).T


def _style(axes: Axes, *, logarithmic: bool) -> None:
    if logarithmic:
        axes.set_yscale("log")
        if np.ptp(np.log10(axes.get_ylim())) > 1.6:
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
        else:  # a narrow range has too few powers of ten
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5), numticks=12))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(which="both", colors=INK, labelsize=9)
