"""Claim B: momentum pairs lead to the same Hessian approximation as standard L-BFGS pairs."""

from __future__ import annotations

from functools import cache

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import mlbfgs_core as core

from . import network, style
from .pairs import CONTROL, KINDS, Array, Watched, secant_errors, watch
from .quadratics import Problem, descend

__all__ = ["write"]

CURVED, PERIOD, STEPS, NOISE = Problem(20, 100, 0), 10, 120, 0.2
EVERY, BATCH, TRAINED, LEADING = 20, 64, 240, 10
"""For the network: T, the batch size, the number of steps, and how many eigenvectors are examined."""
COLOURS = dict(zip(KINDS, (style.ORANGE, style.SKY, style.BLUE, style.PURPLE), strict=True))
FLOORED = "window means, floored"
COLOURS[FLOORED] = style.GREEN


def write() -> None:
    """Write all figures and tables of the page."""
    style.save(quadratic_spectra(), "hessian_quadratic")
    style.save(network_spectra(), "hessian_network")
    secant_table()
    verdict()


@cache
def quadratic_states(noise: float) -> dict[str, Watched]:
    """What each kind of pair sees on the path of noisy gradient descent, given gradients with this noise."""
    problem = CURVED._replace(noise=NOISE)
    path = list(descend(problem, "gradient descent", 0, steps=STEPS))[:-1]
    random = np.random.default_rng(1)
    gradients = [problem.curvature * x + noise * random.standard_normal(problem.dim) for x in path]
    kinds = {name: {**kind, "update_every": PERIOD} for name, kind in KINDS.items()}
    kinds[FLOORED] = {**kinds["window means"], "min_cosine": 0.3}
    return {name: watch(kind, path, gradients, control=name == CONTROL) for name, kind in kinds.items()}


def quadratic_spectra() -> Figure:
    """Eigenvalues of the Hessian approximation, a column for each kind of pair."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    kinds = list(KINDS)
    _columns(left, quadratic_states(0.0), kinds)
    left.set_title("exact gradients")
    _columns(right, quadratic_states(NOISE), [*kinds[:3], FLOORED])
    right.set_title(f"noise {NOISE:g} in the gradients")
    left.set(yscale="log", ylim=(8e-3, 5e2), ylabel="eigenvalues of the Hessian approximation")
    lines = "grey lines: the true eigenvalues"
    style.mark(left, 0.02, 0.97, lines, style.GREY, transform=left.transAxes, va="top")
    return figure


def _columns(axes: Axes, states: dict[str, Watched], kinds: list[str]) -> None:
    for value in CURVED.curvature:
        axes.axhline(value, color="#C4C4C4", linewidth=0.8, zorder=1)
    for place, name in enumerate(kinds):
        values = core.curvatures(states[name].state)[0]
        axes.plot(
            np.full(len(values), place), values, "o", color=COLOURS[name], markersize=6, alpha=0.75,
            markeredgecolor="white", markeredgewidth=0.5, zorder=3,
        )  # fmt: skip
        lost, kept = int(states[name].state.rejected[0]), int(states[name].state.pairs[0])
        if lost:
            words = f"{lost} of {lost + kept} pairs with\n$s\\cdot y \\leq 0$"
            style.mark(axes, place, 0.01, words, COLOURS[name], ha="center", va="bottom", fontsize=8)
    labels = [
        "window means,\ncosine floor" if name == FLOORED else name.replace(" ", "\n", 1) for name in kinds
    ]
    axes.set(xticks=range(len(kinds)), xlim=(-0.6, len(kinds) - 0.4))
    axes.set_xticklabels(labels)
    for label, name in zip(axes.get_xticklabels(), kinds, strict=True):
        label.set_color(COLOURS[name])
    axes.tick_params(axis="x", length=0)
    axes.grid(False)


@cache
def network_path() -> network.Path:
    """One training run of the small network, which all kinds of pairs observe."""
    return network.train(network.sgd, BATCH, TRAINED)


@cache
def network_states(source: str) -> dict[str, Watched]:
    """What each kind of pair sees on the path; `source` is "full" or "gradients" (of mini-batches)."""
    path = network_path()
    kinds = {name: {**kind, "update_every": EVERY} for name, kind in KINDS.items()}
    gradients = getattr(path, source)
    return {
        name: watch(kind, path.params, gradients, control=name == CONTROL) for name, kind in kinds.items()
    }


@cache
def leading() -> tuple[Array, Array]:
    """The largest eigenvalues of the exact Hessian at the position of the last pair, and their vectors."""
    values, vectors = np.linalg.eigh(network.hessian(np.mean(network_path().params[-2 * EVERY :], axis=0)))
    return values[::-1][:LEADING], vectors[:, ::-1][:, :LEADING]


def seen(state: core.State) -> Array:
    """``v.B v`` of the Hessian approximation for each leading eigenvector `v` of the exact one."""
    rows = state.history[0].reshape(-1, state.history[0].shape[-1])
    inverse = state.gamma[0] * np.eye(rows.shape[1]) + rows.T @ state.middle_matrix[0] @ rows
    vectors = leading()[1]
    return np.sum(vectors * np.linalg.solve(inverse, vectors), axis=0)


def network_spectra() -> Figure:
    """Curvature along the leading eigenvectors, exact and as each kind of pair sees it."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    ranks = np.arange(1, LEADING + 1)
    ends: list[list[tuple[str, float, str]]] = []
    for panel, source, title in (
        (axes[0], "full", "gradients of all images"),
        (axes[1], "gradients", f"gradients of {BATCH} images"),
    ):
        panel.plot(ranks, leading()[0], "-", color=style.BLACK, linewidth=1.6, zorder=2)
        labels = [("exact Hessian", leading()[0][-1], style.BLACK)]
        for name in KINDS:
            values = seen(network_states(source)[name].state)
            panel.plot(
                ranks, values, "o-", color=COLOURS[name], linewidth=0.8, markersize=5, alpha=0.9, zorder=3
            )
            labels.append((name, values[-1], COLOURS[name]))
        panel.set(
            yscale="log",
            xlim=(0.6, LEADING + 4.6),
            xticks=ranks,
            xlabel="eigenvector of the exact Hessian, by rank",
            title=title,
        )
        ends.append(labels)
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    for panel, labels in zip(axes, ends, strict=True):
        style.label_ends(panel, LEADING + 0.35, labels, 0.055)
    axes[0].set_ylabel(r"curvature along it, $v \cdot B\,v$")
    return figure


def quadratic_errors(noise: float, name: str) -> Array:
    """``|y - A s| / |A s|`` of each pair on the quadratic."""
    pairs = quadratic_states(noise)[name].pairs
    return secant_errors(pairs, [CURVED.curvature * s for s, _ in pairs])


def network_errors(source: str, name: str) -> Array:
    """The same with the exact Hessian at the mean of the parameters over the two windows of a pair."""
    path, pairs = network_path().params, network_states(source)[name].pairs
    middles = [np.mean(path[EVERY * i : EVERY * (i + 2)], axis=0) for i in range(len(pairs))]
    images = [network.hessian_product(middle, s) for middle, (s, _) in zip(middles, pairs, strict=True)]
    return secant_errors(pairs, images)


def secant_table() -> None:
    """How far the pairs are from the secant equation: medians, on the quadratic and on the network."""
    rows = []
    for name in KINDS:
        columns = [quadratic_errors(noise, name) for noise in (0.0, NOISE)]
        columns += [network_errors(source, name) for source in ("full", "gradients")]
        rows.append((name, *(f"{np.median(errors):.2g}" for errors in columns)))
    heading = (
        "median of \\|y - A s\\| / \\|A s\\|",
        "quadratic, exact",
        f"quadratic, noise {NOISE:g}",
        "network, all images",
        f"network, {BATCH} images",
    )
    style.table("hessian_secant", heading, rows)


def deviation(watched: Watched) -> float:
    """Median factor between an observer's curvature along the leading eigenvectors and the exact one."""
    return float(np.exp(np.median(np.abs(np.log(seen(watched.state) / leading()[0])))))


def verdict() -> None:
    """Write the sentence for the first page."""
    exact = max(quadratic_errors(0.0, name).max() for name in KINDS if name != CONTROL)
    control = float(np.median(quadratic_errors(0.0, CONTROL)))
    full, noisy = network_states("full"), network_states("gradients")
    words = (
        f"On a quadratic, with exact gradients, all three kinds of pairs obey y = A s to {exact:.0e}; "
        f"restarting the average of the gradient alone, as the authors' code does, leaves an error of "
        f"{control:.2g} (median). "
        f"On a network's {LEADING} leading eigenvectors the curvature is off by a median factor of "
        f"{deviation(full['L-BFGS pairs']):.1f} with L-BFGS pairs, "
        f"{deviation(full['momentum pairs']):.1f} with momentum pairs and "
        f"{deviation(full['window means']):.1f} with window means from full gradients, and of "
        f"{deviation(noisy['L-BFGS pairs']):.1f}, {deviation(noisy['momentum pairs']):.1f} and "
        f"{deviation(noisy['window means']):.1f} from gradients of {BATCH} images."
    )
    style.text("hessian_verdict", words)
