"""Why momentum: the noise in a pair with and without averages, on a real network with mini-batches."""

from __future__ import annotations

from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import network, style
from .pairs import Array

__all__ = ["write"]

PERIODS, BATCHES, STEPS, FIRST = (1, 2, 5, 10, 20, 50), (16, 64, 256), 400, 100
"""Pairs of the first `FIRST` steps, in which the loss falls fastest, are left out."""
SHADES = dict(zip(BATCHES, ("#7FB8DA", "#2C8CC4", "#00507F"), strict=True))
WARM = dict(zip(BATCHES, ("#F3B48A", "#E07B3C", "#A84300"), strict=True))


def write() -> None:
    """Write the figure and the table of the page."""
    style.save(draw(), "noise")
    numbers()
    verdict()


@cache
def samples() -> tuple[Array, Array, dict[int, Array]]:
    """Parameters of a path, full gradients there, and for each batch size gradients of independent draws."""
    path = network.train(network.sgd, 64, STEPS)
    drawn = {}
    for size in BATCHES:
        draw = network.batches(size, size)
        drawn[size] = np.array([network.gradient(torch.as_tensor(x), draw()) for x in path.params])
    return np.array(path.params), np.array(path.full), drawn


def differences(values: Array, period: int, *, averaged: bool) -> Array:
    """Differences between consecutive windows: of their means, or of their last values.

    The windows begin at every step, so that a path gives many pairs of each period.
    """
    if averaged:
        sums = np.cumsum(np.concatenate([np.zeros((1, values.shape[1])), values]), axis=0)
        values = (sums[period:] - sums[:-period]) / period
    else:
        values = values[period - 1 :]
    return values[FIRST + period :] - values[FIRST:-period]


def root_mean_square(vectors: Array) -> float:
    """Root of the mean squared length."""
    return float(np.sqrt(np.mean(np.sum(vectors**2, axis=1))))


def noise_ratio(size: int, period: int, *, averaged: bool) -> float:
    """Noise in `y` relative to that in one gradient."""
    _, full, drawn = samples()
    error = drawn[size] - full
    return root_mean_square(differences(error, period, averaged=averaged)) / root_mean_square(error[FIRST:])


def relative_error(size: int, period: int, *, averaged: bool) -> float:
    """``|y - y_full| / |y_full|``, median over the pairs."""
    _, full, drawn = samples()
    own, true = (differences(g, period, averaged=averaged) for g in (drawn[size], full))
    return float(np.median(np.linalg.norm(own - true, axis=1) / np.linalg.norm(true, axis=1)))


def cosines(size: int | None, period: int, *, averaged: bool) -> Array:
    """Cosines of the angles between `s` and `y`; without a size, `y` is that of full gradients."""
    params, full, drawn = samples()
    s = differences(params, period, averaged=averaged)
    y = differences(full if size is None else drawn[size], period, averaged=averaged)
    return np.sum(s * y, axis=1) / np.linalg.norm(s, axis=1) / np.linalg.norm(y, axis=1)


def draw() -> Figure:
    """Draw the noise compared with theory, the relative error, and the cosine between `s` and `y`."""
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.1), layout="constrained")
    _theory(axes[0])
    ends: dict[Axes, list[tuple[str, float, str]]] = {axes[1]: [], axes[2]: []}
    for panel, measure in ((axes[1], relative_error), (axes[2], _median_cosine)):
        for averaged, shades in ((False, WARM), (True, SHADES)):
            for size in BATCHES:
                values = [measure(size, period, averaged=averaged) for period in PERIODS]
                panel.plot(PERIODS, values, "o-", color=shades[size], linewidth=1.3, markersize=4)
                ends[panel].append((str(size), values[-1], shades[size]))
    axes[1].axhline(1, color=style.BLACK, linewidth=0.8, linestyle=(0, (4, 2)))
    style.mark(axes[1], 1, 0.93, "as much noise as signal", style.BLACK, va="top", fontsize=8.5)
    axes[1].set(yscale="log", title=r"relative error of $y$, $|y - y_\mathrm{full}| / |y_\mathrm{full}|$")
    clean = [_median_cosine(None, period, averaged=True) for period in PERIODS]
    axes[2].plot(PERIODS, clean, color=style.BLACK, linewidth=1.4, linestyle=(0, (4, 2)))
    style.mark(axes[2], PERIODS[0], clean[0] + 0.015, "all images", style.BLACK, va="bottom", fontsize=8.5)
    axes[2].set(title=r"cosine between $s$ and $y$, median", ylim=(-0.05, 1.0))
    for panel in axes:
        panel.set(xscale="log", xlabel="steps between pairs, $T$", xticks=PERIODS, xlim=(0.85, 95))
        panel.set_xticklabels([str(period) for period in PERIODS])
        panel.minorticks_off()
    for panel, labels in ends.items():
        style.label_ends(panel, PERIODS[-1] * 1.15, labels, 0.045)
    for height, words, colour in (
        (0.97, "window means", SHADES[64]),
        (0.91, "plain differences", WARM[64]),
        (0.85, "numbers: batch size", style.GREY),
    ):
        style.mark(axes[1], 0.97, height, words, colour, transform=axes[1].transAxes, ha="right", va="top")
    return figure


def _median_cosine(size: int | None, period: int, *, averaged: bool) -> float:
    return float(np.median(cosines(size, period, averaged=averaged)))


def _theory(axes: Axes) -> None:
    """Draw the measured noise over the lines that the variance of a difference predicts."""
    dense = np.geomspace(1, PERIODS[-1], 50)
    axes.plot(dense, np.sqrt(2 / dense), color=style.BLUE, linewidth=1.2)
    axes.axhline(np.sqrt(2), color=style.ORANGE, linewidth=1.2)
    for size in BATCHES:
        for averaged, shades in ((False, WARM), (True, SHADES)):
            values = [noise_ratio(size, period, averaged=averaged) for period in PERIODS]
            axes.plot(PERIODS, values, "o", color=shades[size], markersize=5, alpha=0.85)
    axes.set(
        yscale="log",
        title=r"noise in $y$ / noise in one gradient",
        ylim=(0.14, 2.2),
        yticks=[0.2, 0.5, 1, 1.5],
    )
    axes.set_yticklabels(["0.2", "0.5", "1", "1.5"])
    style.mark(axes, 3, np.sqrt(2) * 1.07, r"plain differences: $\sqrt{2}$", style.ORANGE, va="bottom")
    style.mark(axes, 1.1, 0.25, "window means:\n" r"$\sqrt{1/n + 1/n_P}$", style.BLUE, va="center")


def numbers() -> None:
    """Relative errors for each batch size and period."""
    rows = [
        (
            f"batch {size}, {'window means' if averaged else 'plain differences'}",
            *(f"{relative_error(size, period, averaged=averaged):.2f}" for period in PERIODS),
        )
        for size in BATCHES
        for averaged in (False, True)
    ]
    style.table("noise", ("relative error of y", *(f"T = {period}" for period in PERIODS)), rows)


def verdict() -> None:
    """Write the sentence for the first page."""
    plain, averaged = (relative_error(64, 20, averaged=yes) for yes in (False, True))
    period = next((p for p in PERIODS if relative_error(64, p, averaged=True) < 0.5), None)
    first = f"; below one half from T = {period} on" if period else ""
    words = (
        f"On a small network with 64 images a batch and T = 20 the noise in y is {plain:.2g} times the "
        f"signal with plain differences and {averaged:.2g} times with means over the interval{first}. "
        "The noise falls as the theory says, with the root of 1/n + 1/n_P."
    )
    style.text("noise_verdict", words)
