"""The two kinds of runs: with line searches for exact values, with given step lengths for noisy ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import mlbfgs_core as core

from .curvature import Curvature
from .objective import Evaluation, Objective, Vector
from .options import Options
from .outcome import Outcome
from .search import ROUNDING, search
from .textbook import Textbook

__all__ = ["Halts", "Report", "descend", "follow"]

LOWER = 0.5
PATIENCE = 100
"""Most iterations in a row without a new least value, by more than rounding, or a new least gradient."""
Halts = Callable[[Evaluation], bool]
"""Takes the point of each iteration, and says whether the run is to end there."""


class Report(NamedTuple):
    """Where and why a run ended."""

    point: Evaluation
    outcome: Outcome
    iterations: int


class _Progress:
    """How long ago value or gradient had a new low, by more than rounding."""

    def __init__(self, point: Evaluation) -> None:
        self.value, self.norm, self.promise, self.pause = point.value, point.norm, np.inf, 0

    def note(self, point: Evaluation, promise: float) -> None:
        """The next iteration's point; falls too small to count add up until they do."""
        self.pause += 1
        if self.value - point.value > ROUNDING * max(abs(self.value), abs(point.value)):
            self.value, self.pause = point.value, 0
        if point.norm < 0.5 * self.norm:
            self.norm, self.pause = point.norm, 0
        if promise < 0.7 * self.promise:
            self.promise, self.pause = promise, 0


def descend(
    objective: Objective, x: Vector, curvature: Curvature | Textbook, options: Options, halts: Halts
) -> Report:
    """Minimize an exact objective by line searches along the core's directions.

    Where a search fails, curvature is forgotten, and the next one goes along the negative gradient. Where
    values differ by rounding alone, the run goes on for as long as gradients become smaller.
    """
    point, iterations = objective.at(x), 0
    if not point.is_finite_with_grad:
        return Report(point, Outcome.START_NOT_FINITE, 0)
    outcome, progress = None, _Progress(point)
    while True:
        direction = curvature.direction(point)
        if outcome is None and point.norm <= options.gradient_tolerance:
            outcome = Outcome.GRADIENT_SMALL
        if outcome is not None:
            return Report(point, outcome, iterations)
        if iterations >= options.most_iterations:
            return Report(_lowest(objective, point), Outcome.ITERATIONS_USED, iterations)
        found, promise = None, float(point.grad @ direction)
        if progress.pause < PATIENCE:
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
    momentum = core.preset_momentum(options.config.preset) if options.momentum is None else options.momentum
    nesterov = core.preset_nesterov(options.config.preset)
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
    """Search along the negative gradient; if this fails too, the curvature stays as it was."""
    known = curvature.memory
    curvature.forget()
    found = search(objective, point, curvature.direction(point), options)
    if found is None:
        curvature.memory = known
    return found


def _lowest(objective: Objective, point: Evaluation) -> Evaluation:
    """The lowest point that was seen, which a failed search may have left behind."""
    best = objective.best
    if best is None or not best.is_finite_with_grad:
        return point
    higher = point.value - best.value > ROUNDING * max(abs(point.value), abs(best.value))
    return best if higher else point
