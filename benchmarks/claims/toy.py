"""Claim A: on noisy quadratics mL-BFGS is stable where L-BFGS is not, and nearly as fast as exact Newton."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import style
from .quadratics import DIVERGED, METHODS, PROBLEMS, RATE, SEEDS, STEPS, Array, Problem, Runs, descend, runs

__all__ = ["write"]

COLOURS = {
    "Newton": style.BLACK,
    "gradient descent": style.GREY,
    "mL-BFGS": style.BLUE,
    "L-BFGS": style.ORANGE,
    "L-BFGS, T = 10": style.ORANGE,
    "published": style.PURPLE,
}
TITLES = {
    "Newton": "exact Newton",
    "gradient descent": "gradient descent",
    "mL-BFGS": "mL-BFGS (fit)",
    "L-BFGS": "L-BFGS, a pair every step",
    "L-BFGS, T = 10": "L-BFGS, a pair every 10 steps",
    "published": "published formulas, T = 10",
}
"""Titles of the pictures."""
PLANE, HALF_WIDTH, HALF_HEIGHT = Problem(2, 10, 0.2), 3.2, 1.9
CALM = tuple(dict.fromkeys(problem._replace(noise=0.0) for problem in PROBLEMS if problem.dim <= 200))
"""The problems without noise, except the largest, which has no spectrum of its own."""
FRACTIONS = (1e-2, 1e-3)
SHOWN = ("gradient descent", "L-BFGS", "published", "Newton", "mL-BFGS")
"""Methods in the figure of the losses, the most important drawn last."""


def write() -> None:
    """Write all figures and tables of the page."""
    noisy = runs(METHODS)
    calm = runs(
        {name: METHODS[name] for name in ("Newton", "gradient descent", "published", "recipe", "mL-BFGS")},
        CALM,
    )
    style.save(paths(noisy), "toy_paths")
    style.save(curves(noisy), "toy_losses")
    stability(noisy)
    speed(calm)
    floors(noisy)
    verdict(noisy, calm)


def telling_seed() -> int:
    """The first seed on which L-BFGS diverges with both periods, or, if there is none, with one of them."""
    gone = np.zeros(SEEDS)
    for method in ("L-BFGS", "L-BFGS, T = 10"):
        for seed in range(SEEDS):
            losses = np.array([PLANE.loss(x) for x in descend(PLANE, method, seed, METHODS[method])])
            gone[seed] += len(losses) <= STEPS or bool(np.any(losses > DIVERGED * losses[0]))
    return int(np.argmax(gone))


def paths(noisy: dict[str, dict[Problem, Runs]]) -> Figure:
    """One run of each method in the plane."""
    seed = telling_seed()
    figure, grid = plt.subplots(2, 3, figsize=(10, 4.9), sharex=True, sharey=True, layout="constrained")
    for axes, (method, title) in zip(grid.flat, TITLES.items(), strict=True):
        path = np.array(list(descend(PLANE, method, seed, METHODS[method])))
        _path(axes, path, COLOURS[method])
        axes.set_title(title, color=COLOURS[method], fontweight="bold")
        diverged = noisy[method][PLANE].diverged
        words = f"{diverged} of {SEEDS} runs diverge" if diverged else f"none of {SEEDS} runs diverges"
        style.mark(axes, -HALF_WIDTH + 0.12, -HALF_HEIGHT + 0.12, words, "#444444", va="bottom")
    figure.suptitle(
        f"{STEPS} steps on a quadratic with curvatures 1 and 10 and gradient noise {PLANE.noise:g}, "
        f"learning rate {RATE:g} (seed {seed})",
        x=0.01,
        ha="left",
        fontsize=10.5,
    )
    return figure


def _path(axes: Axes, path: Array, colour: str) -> None:
    """Draw contours and a path, and say how the path leaves the picture."""
    x, y = np.meshgrid(np.linspace(-HALF_WIDTH, HALF_WIDTH, 161), np.linspace(-HALF_HEIGHT, HALF_HEIGHT, 121))
    values = 0.5 * (PLANE.curvature[0] * x**2 + PLANE.curvature[1] * y**2)
    levels = np.geomspace(0.1, 20, 9)
    axes.contour(x, y, values, levels=levels, colors="#D9D9D9", linewidths=0.7)
    axes.plot(0, 0, marker="+", color=style.BLACK, markersize=8, markeredgewidth=1.2, zorder=2)
    axes.plot(*path.T, color=colour, linewidth=0.9, alpha=0.8, zorder=3)
    axes.plot(*path[1:].T, ".", color=colour, markersize=2.6, alpha=0.8, zorder=3)
    axes.plot(
        *path[0], "o", color="white", markeredgecolor=colour, markersize=6.5, markeredgewidth=1.4, zorder=4
    )
    outside = np.any(np.abs(path) > (HALF_WIDTH, HALF_HEIGHT), axis=1)
    if outside.any():
        words = f"first leaves the picture at step {int(np.argmax(outside))}"
        style.mark(
            axes, -HALF_WIDTH + 0.12, HALF_HEIGHT - 0.12, words, colour, va="top", fontsize=8.5, zorder=5
        )
    axes.set(
        xlim=(-HALF_WIDTH, HALF_WIDTH), ylim=(-HALF_HEIGHT, HALF_HEIGHT), xticks=[-2, 0, 2], yticks=[-1, 0, 1]
    )
    axes.set_aspect("equal")
    axes.grid(False)


def curves(noisy: dict[str, dict[Problem, Runs]]) -> Figure:
    """Draw median losses of the methods, with a panel for each problem."""
    figure, grid = plt.subplots(2, 4, figsize=(11, 5.4), sharex=True, sharey=True, layout="constrained")
    for axes, problem in zip(grid.flat, PROBLEMS, strict=True):
        for method in SHOWN:
            losses = noisy[method][problem].losses
            middle = np.median(losses / losses[:, :1], axis=0)
            dashes = {"linestyle": (0, (4, 2))} if method == "Newton" else {}
            axes.plot(
                np.clip(middle, 0, 1e6),
                color=COLOURS[method],
                linewidth=2.2 if method == "mL-BFGS" else 1.4,
                **dashes,
            )
        axes.set_title(
            f"{problem.dim} dim., condition {problem.condition:,}, noise {problem.noise:g}", fontsize=9
        )
        axes.set(yscale="log", ylim=(1e-5, 2e2), xlim=(0, STEPS))
    for axes in grid[1]:
        axes.set_xlabel("step")
    for axes in grid[:, 0]:
        axes.set_ylabel("loss / first loss")
    _legend(grid[0, 0])
    return figure


def _legend(axes: Axes) -> None:
    """Write names in the colours of the lines, in the free corner of one panel."""
    for number, method in enumerate(reversed(SHOWN)):
        name = TITLES[method].removesuffix(", a pair every step")
        style.mark(
            axes,
            0.97,
            0.97 - 0.085 * number,
            name,
            COLOURS[method],
            ha="right",
            va="top",
            transform=axes.transAxes,
        )


def stability(noisy: dict[str, dict[Problem, Runs]]) -> None:
    """Write the table of how many runs diverge."""
    order = ("L-BFGS", "L-BFGS, T = 10", "published", "recipe", "mL-BFGS", "gradient descent", "Newton")
    rows = [
        (
            f"{p.dim} dimensions, condition {p.condition:,}, noise {p.noise:g}",
            *(noisy[m][p].diverged for m in order),
        )
        for p in PROBLEMS
    ]
    total = [sum(run.diverged for run in noisy[method].values()) for method in order]
    rows.append((f"**all {SEEDS * len(PROBLEMS)} runs**", *(f"**{number}**" for number in total)))
    heading = (
        f"diverged of {SEEDS}",
        "L-BFGS, T = 1",
        "L-BFGS, T = 10",
        "formulas, T = 10",
        "published recipe",
        "mL-BFGS (fit)",
        "gradient descent",
        "exact Newton",
    )
    style.table("toy_stability", heading, rows)


def speed(calm: dict[str, dict[Problem, Runs]]) -> None:
    """Write the tables of the steps to a hundredth and to a thousandth of the first loss without noise."""
    order = ("Newton", "mL-BFGS", "published", "recipe", "gradient descent")
    for fraction, name in zip(FRACTIONS, ("toy_newton", "toy_newton_far"), strict=True):
        rows = [
            (
                f"{problem.dim} dimensions, condition {problem.condition:,}",
                *(_steps(float(np.median(calm[method][problem].steps_to(fraction)))) for method in order),
                f"**{_times(ratio(calm, problem, fraction))}**",
            )
            for problem in CALM
        ]
        heading = (
            f"steps to {100 * fraction:g} % of the first loss",
            "exact Newton",
            "mL-BFGS (fit)",
            "formulas, T = 10",
            "published recipe",
            "gradient descent",
            "mL-BFGS / Newton",
        )
        style.table(name, heading, rows)


def ratio(calm: dict[str, dict[Problem, Runs]], problem: Problem, fraction: float = 1e-2) -> float:
    """Steps of mL-BFGS to a fraction of the first loss relative to Newton's, median of the seeds."""
    ours, newton = (calm[name][problem].steps_to(fraction) for name in ("mL-BFGS", "Newton"))
    return float(np.median(ours / newton))


def _times(value: float) -> str:
    return f"{value:.1f}" if np.isfinite(value) else "never"


def _steps(number: float) -> str:
    return f"{number:.0f}" if np.isfinite(number) else f"> {STEPS}"


def floor_ratio(noisy: dict[str, dict[Problem, Runs]], method: str, problem: Problem) -> float:
    """Loss in the last quarter relative to exact Newton's, median of the seeds."""
    return float(np.median(noisy[method][problem].floor / noisy["Newton"][problem].floor))


def floors(noisy: dict[str, dict[Problem, Runs]]) -> None:
    """Write the table of the loss that noise leaves, relative to Newton's."""
    order = ("mL-BFGS", "gradient descent", "L-BFGS", "L-BFGS, T = 10", "published", "recipe")
    rows = []
    for problem in PROBLEMS:
        if problem.noise:
            words = f"{problem.dim} dimensions, condition {problem.condition:,}, noise {problem.noise:g}"
            values = (floor_ratio(noisy, method, problem) for method in order)
            rows.append(
                (words, *(f"{v:.2f}" if v < 10 else f"{v:.0f}" if v < 1e4 else "lost" for v in values))
            )
    heading = (
        "loss in the last quarter / Newton's",
        "mL-BFGS (fit)",
        "gradient descent",
        "L-BFGS, T = 1",
        "L-BFGS, T = 10",
        "formulas, T = 10",
        "published recipe",
    )
    style.table("toy_floor", heading, rows)


def verdict(noisy: dict[str, dict[Problem, Runs]], calm: dict[str, dict[Problem, Runs]]) -> None:
    """Write the sentence for the first page."""
    total = {method: sum(run.diverged for run in own.values()) for method, own in noisy.items()}
    near, far = ([ratio(calm, problem, fraction) for problem in CALM] for fraction in FRACTIONS)
    words = (
        f"Of {SEEDS * len(PROBLEMS)} runs on noisy quadratics {total['mL-BFGS'] or 'none'} diverge"
        f'{"" if total["mL-BFGS"] else "s"} with mL-BFGS as it is here (`preset="fit"`), '
        f"{total['L-BFGS']} do with L-BFGS at every step, {total['published']} with the published formulas "
        f"alone and {total['recipe'] or 'none'} with the published recipe, whose steps have a fixed length. "
        f"Without noise mL-BFGS takes {min(near):.1f} to {max(near):.1f} times exact Newton's "
        f"steps to 1 % of the first loss, and {min(far):.1f} to {_times(max(far))} times to 0.1 %."
    )
    style.text("toy_verdict", words)
