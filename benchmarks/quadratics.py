"""A noisy quadratic: exact Newton, gradient descent, L-BFGS and mL-BFGS under the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np

import mlbfgs_core as core

__all__ = ["METHODS", "SEEDS", "Outcome", "draw", "run"]

DIMENSION, NOISE, RATE, SEEDS = 20, 0.2, 0.1, 20
CURVATURE = np.logspace(-1, 1, DIMENSION)
DIVERGED = 10.0  # times the loss at the start
CEILING = 1e9  # stands in for what overflows, so that percentiles stay defined
CONFIGS: dict[str, core.Settings] = {
    "L-BFGS, a pair every step": {"preset": "lbfgs"},
    "L-BFGS, a pair every 10 steps": {"preset": "lbfgs", "update_every": 10},
    "mL-BFGS": {"preset": "fit"},
}
METHODS = {"Newton": "#000000", "SGD": "#009E73", **dict.fromkeys(CONFIGS, "#D55E00"), "mL-BFGS": "#0072B2"}

Array = np.ndarray[Any, Any]
Direction = Callable[[Array, Array], Array]


class Outcome(NamedTuple):
    """Losses of one method, one row for each seed."""

    losses: Array
    diverged: int

    @property
    def floor(self) -> float:
        """Median over the seeds of the mean loss in the last quarter."""
        return float(np.median(self.losses[:, -self.losses.shape[1] // 4 :].mean(axis=1)))

    @property
    def steps_to_hundredth(self) -> float:
        """Median over the seeds of the steps to 1 % of the loss at the start; infinite if never."""
        there = self.losses <= 0.01 * self.losses[:, :1]
        return float(np.median(np.where(there.any(axis=1), there.argmax(axis=1), np.inf)))


def run(steps: int, tracked: Callable[[str], AbstractContextManager[None]]) -> dict[str, Outcome]:
    """Run every method with every seed, within `tracked` of the method's description."""
    outcomes = {}
    for method in METHODS:
        with tracked(f"quadratic · {method}"):
            losses = np.array([list(_descend(method, seed, steps)) for seed in range(SEEDS)])
        gone = (losses > DIVERGED * losses[:, :1]).any(axis=1)
        outcomes[method] = Outcome(losses, int(gone.sum()))
    return outcomes


def _descend(method: str, seed: int, steps: int) -> Iterator[float]:
    """Losses along one run; start and noise depend on the seed alone."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(DIMENSION)
    noise = NOISE * random.standard_normal((steps, DIMENSION))
    direction = _direction(method, x)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(steps):
            yield _loss(x)
            x = x - RATE * direction(x, CURVATURE * x + noise[step])
        yield _loss(x)


def _loss(x: Array) -> float:
    loss = 0.5 * float(x @ (CURVATURE * x))
    return min(loss, CEILING) if np.isfinite(loss) else CEILING


def _direction(method: str, start: Array) -> Direction:
    if method == "Newton":
        return lambda x, grad: grad / CURVATURE
    if method == "SGD":
        return lambda x, grad: grad
    config = core.Config(**CONFIGS[method])
    state = core.init(config, [start])

    def direction(x: Array, grad: Array) -> Array:
        nonlocal state
        check, due = core.upcoming(config, state)
        update, state = core.step(config, state, [x], [grad], when_check=bool(check), when_due=bool(due))
        return update[0]

    return direction


def draw(outcomes: dict[str, Outcome]) -> plt.Figure:
    """A panel for each method, with Newton's median in all of them."""
    others = [method for method in outcomes if method != "Newton"]
    figure, axes = plt.subplots(
        1, len(others), figsize=(3.4 * len(others), 3.9), sharey=True, layout="constrained"
    )
    newton = np.median(outcomes["Newton"].losses, axis=0)
    for axis, method in zip(axes, others, strict=True):
        losses, colour = outcomes[method].losses, METHODS[method]
        low, first, middle, third, high = np.percentile(losses, [0, 25, 50, 75, 100], axis=0)
        axis.fill_between(
            range(len(middle)), first, third, color=colour, alpha=0.3, linewidth=0, label="middle half"
        )
        axis.plot(low, color=colour, linewidth=0.6, label="best and worst")
        axis.plot(high, color=colour, linewidth=0.6)
        axis.plot(middle, color=colour, linewidth=2, label="median")
        axis.plot(
            newton, color=METHODS["Newton"], linewidth=1.2, linestyle="--", label="exact Newton, median"
        )
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
        f"Quadratic in {DIMENSION} dimensions, condition 100, gradient noise {NOISE}, learning rate {RATE}"
    )
    figure.suptitle(f"{title}: {SEEDS} seeds, the same noise for all methods")
    return figure
