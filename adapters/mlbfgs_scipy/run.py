"""The two kinds of runs: with line searches for exact values, and with given step lengths for noisy ones."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mlbfgs_core import adapter

from .curvature import Curvature
from .objective import Evaluation, Objective, Vector
from .options import Options
from .outcome import Outcome
from .search import search
from .textbook import Textbook

__all__ = ["Halts", "Report", "descend", "follow"]

PATIENCE, SHARE = 100, 0.5
"""Largest number of iterations in a row without progress, or this share of the run if that is more."""

LOWER = 0.5
"""The gradient's norm makes progress when it falls below this fraction of its smallest value so far."""

STRETCH, LESS, LEAST = 50, 0.2, sys.float_info.min
"""A stretch is this many iterations. It makes progress if the mean logarithm of its predicted decreases is
lower than that of every earlier stretch by `LESS`; `LEAST` keeps the logarithm finite."""

Halts = Callable[[Evaluation], bool]
"""Takes the point of each iteration, and says whether the run should end there."""


class Report(NamedTuple):
    """Where and why a run ended."""

    point: Evaluation
    outcome: Outcome
    iterations: int


class _Progress:
    """How long ago the value, the gradient's norm or the predicted decrease reached a significant new low.

    A low is compared with the last significant one, so decreases smaller than rounding add up. Predicted
    decreases track the distance to the minimum where values cannot, and where the norm goes up and down for a
    long time; single predictions are unreliable, hence the means.
    """

    def __init__(self, objective: Objective, point: Evaluation) -> None:
        self.objective, self.lowest, self.norm = objective, point, point.norm
        self.promises: list[float] = []
        self.promised: float | None = None
        self.pause = 0

    def note(self, point: Evaluation, promise: float) -> None:
        """Take the next iteration's point, and the decrease that the direction to it had predicted."""
        self.pause += 1
        if self.lowest.value - point.value > self.objective.rounding(self.lowest, point):
            self.lowest, self.pause = point, 0
        if point.norm < LOWER * self.norm:
            self.norm, self.pause = point.norm, 0
        self.promises.append(math.log(max(promise, LEAST)))
        if len(self.promises) == STRETCH:
            mean = sum(self.promises) / STRETCH
            if self.promised is not None and mean < self.promised - LESS:
                self.pause = 0
            self.promised = mean if self.promised is None else min(mean, self.promised)
            self.promises.clear()


def descend(
    objective: Objective, x: Vector, curvature: Curvature | Textbook, options: Options, halts: Halts
) -> Report:
    """Minimize an exact objective by line searches along the core's directions.

    If a search fails, curvature is forgotten, and the next search goes along the negative gradient. Where
    values differ only by rounding, the run goes on as long as gradients become smaller.
    """
    point, iterations = objective.at(x), 0
    if not point.is_finite_with_grad:
        return Report(point, Outcome.START_NOT_FINITE, 0)
    outcome, progress = None, _Progress(objective, point)
    while True:
        direction = curvature.direction(point)
        if outcome is None and point.norm <= options.gradient_tolerance:
            outcome = Outcome.GRADIENT_SMALL
        if outcome is not None:
            return Report(point, outcome, iterations)
        if iterations >= options.most_iterations:
            return Report(_lowest(objective, point), Outcome.ITERATIONS_USED, iterations)
        found, promise = None, float(point.grad @ direction)
        if progress.pause < max(PATIENCE, SHARE * iterations):
            found = search(objective, point, direction, options)
            if found is None and curvature.has_pairs:
                found = _search_afresh(objective, point, curvature, options)
        if found is None:
            return Report(_lowest(objective, point), Outcome.SEARCH_FAILED, iterations)
        scale = max(abs(point.value), abs(found.value), 1.0)
        if options.ftol > 0 and point.value - found.value <= options.ftol * scale:
            outcome = Outcome.DECREASE_SMALL
        point, iterations = found, iterations + 1
        progress.note(point, promise)
        if halts(point):
            outcome = Outcome.CALLBACK_STOPPED


def follow(objective: Objective, x: Vector, curvature: Curvature, options: Options, halts: Halts) -> Report:
    """Take steps of given lengths on an objective that may be noisy."""
    momentum = adapter.preset_momentum(options.preset) if options.momentum is None else options.momentum
    nesterov = adapter.preset_nesterov(options.preset)
    point, velocity = objective.anew(x), np.zeros_like(x)
    finite = point
    for iteration in range(options.most_iterations):
        direction = curvature.direction(point)
        if point.norm <= options.gradient_tolerance:
            return Report(point, Outcome.GRADIENT_SMALL, iteration)
        if curvature.state.accepted:
            velocity = momentum * velocity + direction
            change = direction + momentum * velocity if nesterov else velocity
            x = x - options.rate(iteration) * change
        point = objective.anew(x)
        if point.is_finite_with_grad:
            finite = point
        if halts(point):
            return Report(finite, Outcome.CALLBACK_STOPPED, iteration + 1)
    outcome = Outcome.STEPS_TAKEN if finite is point else Outcome.END_NOT_FINITE
    return Report(finite, outcome, options.most_iterations)


def _search_afresh(
    objective: Objective, point: Evaluation, curvature: Curvature | Textbook, options: Options
) -> Evaluation | None:
    """Search along the negative gradient; if this fails too, the old curvature is kept."""
    known = curvature.memory
    curvature.forget()
    found = search(objective, point, curvature.direction(point), options)
    if found is None:
        curvature.memory = known
    return found


def _lowest(objective: Objective, point: Evaluation) -> Evaluation:
    """The lowest point seen, which a search that failed may have visited."""
    best = objective.best
    if best is None or not best.is_finite_with_grad:
        return point
    return best if point.value - best.value > objective.rounding(point, best) else point
