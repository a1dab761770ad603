"""A noisy quadratic of the claims pages, and what the demo shows of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import matplotlib.pyplot as plt
import numpy as np

from .claims.quadratics import METHODS, RATE, SEEDS, Problem, Runs, runs_of

__all__ = ["RATE", "SEEDS", "SHOWN", "draw", "run"]

PROBLEM = Problem(20, 100, 0.2)
SHOWN = {
    "Newton": "#000000",
    "gradient descent": "#009E73",
    "L-BFGS": "#D55E00",
    "L-BFGS, T = 10": "#D55E00",
    "mL-BFGS": "#0072B2",
}
"""Methods and their colours."""
CEILING = 1e9  # replaces the losses of stopped runs, so that percentiles stay defined


def run(steps: int, tracked: Callable[[str], AbstractContextManager[None]]) -> dict[str, Runs]:
    """Run every method with every seed, within `tracked` of the method's description."""
    outcomes = {}
    for method in SHOWN:
        with tracked(f"quadratic · {method}"):
            outcomes[method] = runs_of(PROBLEM, method, METHODS[method], steps)
    return outcomes


def draw(outcomes: dict[str, Runs]) -> plt.Figure:
    """Draw a panel for each method, with Newton's median in all of them."""
    others = [method for method in outcomes if method != "Newton"]
    figure, axes = plt.subplots(
        1, len(others), figsize=(3.4 * len(others), 3.9), sharey=True, layout="constrained"
    )
    newton = np.median(outcomes["Newton"].losses, axis=0)
    for axis, method in zip(axes, others, strict=True):
        losses, colour = np.minimum(outcomes[method].losses, CEILING), SHOWN[method]
        low, first, middle, third, high = np.percentile(losses, [0, 25, 50, 75, 100], axis=0)
        axis.fill_between(
            range(len(middle)), first, third, color=colour, alpha=0.3, linewidth=0, label="middle half"
        )
        axis.plot(low, color=colour, linewidth=0.6, label="best and worst")
        axis.plot(high, color=colour, linewidth=0.6)
        axis.plot(middle, color=colour, linewidth=2, label="median")
        axis.plot(newton, color=SHOWN["Newton"], linewidth=1.2, linestyle="--", label="exact Newton, median")
        axis.set(
            title=f"{method}\n{outcomes[method].diverged} of {SEEDS} runs diverged",
            xlabel="step",
            yscale="log",
        )
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("loss")
    axes[0].set_ylim(1e-2, 1e4)
    axes[-1].legend(frameon=False)
    title = (
        f"Quadratic in {PROBLEM.dim} dimensions, condition {PROBLEM.condition:g}, "
        f"gradient noise {PROBLEM.noise}, learning rate {RATE}"
    )
    figure.suptitle(f"{title}: {SEEDS} seeds, the same noise for all methods")
    return figure
