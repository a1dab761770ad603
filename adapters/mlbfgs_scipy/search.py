"""A line search for the strong Wolfe conditions, which uses slopes where values are only rounding."""

from __future__ import annotations

import math
from typing import NamedTuple

from .objective import Evaluation, Objective, Vector
from .options import Options

__all__ = ["search"]

REACH, FARTHEST = 4.0, 4.0**32
"""After a trial that is too short the next one may be this many times longer; then the square of that, and so
on, up to a limit."""

EDGE = 0.1
"""Fraction of an interval at either end in which no minimum is looked for."""

DOUBTFUL = 1e3
"""A value is noisy if it contradicts the slopes by this many times the decrease that they predict."""

LOUDEST = 1e-6
"""Largest noise that is assumed, relative to the values at the start of the run and of the search."""


class _Trial(NamedTuple):
    """How far the objective has risen after a step, and its slope there (NaN if it is not needed)."""

    step: float
    rise: float
    slope: float


def search(objective: Objective, start: Evaluation, direction: Vector, options: Options) -> Evaluation | None:
    """The point that a line search from `start` against `direction` finds; None if it finds no lower one.

    Parameters
    ----------
    objective : Objective
    start : Evaluation
        Its value and gradient must be finite.
    direction : (n,) array
        A direction in which the objective rises. The first trial subtracts all of it.
    options : Options
        Its `c1`, `c2` and `maxls` are used.

    Returns
    -------
    Evaluation or None
        A point that satisfies the conditions; if the search fails, the lowest of the points whose gradient it
        has seen, provided that it is lower than the start by more than rounding.

    Notes
    -----
    The search works with differences from the value at the start, so that an offset in the objective does not
    matter. A difference that may be only rounding is replaced by an estimate from the two gradients, so that
    a minimum with a large value can be approached as closely as gradients allow.

    The search first looks for a minimum farther and farther ahead, then between a trial that is too short and
    one that is too long, where the cubic or the parabola through the known values has its minimum. No scale
    of the variables is assumed: the factor by which a trial may be longer than the last one is squared each
    time, within what the change of the slope predicts, and an interval that keeps being cut at the same end
    is halved in orders of magnitude.

    If the value that rejected the shortest trial contradicts the slopes by far more than the decrease that
    they predict, values are noisier than their size suggests, like a difference of large numbers: the search
    is repeated with this noise as the limit of what counts as rounding, which holds for the rest of the run.

    References
    ----------
    Nocedal & Wright, Numerical Optimization, 2nd ed., algorithms 3.5 and 3.6; eq. 3.57 for the parabola and
    3.59 for the cubic.
    Hager & Zhang, SIAM Journal on Optimization 16(1), 2005, section 4.1, for conditions without values.
    """
    line = _Line(objective, start, direction)
    found = line.search(options)
    if found is None and line.hears_noise():
        found = line.search(options)
    return line.lowest if found is None else found


class _Line:
    """The objective along a direction."""

    def __init__(self, objective: Objective, start: Evaluation, direction: Vector) -> None:
        self.objective, self.start, self.direction = objective, start, direction
        self.slope = -float(start.grad @ direction)
        self.lowest: Evaluation | None = None
        self.told: tuple[float, Evaluation] | None = None  # the shortest trial that was judged by its value

    def search(self, options: Options) -> Evaluation | None:
        """The first trial that satisfies the conditions."""
        before = short = _Trial(0.0, 0.0, self.slope)
        long: _Trial | None = None
        step, reach, ahead, between, cuts = 1.0, REACH, 0, 0, 0
        while self.slope < 0 and max(ahead, between) < options.maxls and math.isfinite(step):
            x = self.start.x - step * self.direction
            if (x == self.start.x).all():
                if long is not None:
                    break
                ahead, step, reach = ahead + 1, step * reach, min(reach**2, FARTHEST)
                continue
            point = self.objective.at(x)
            trial = self._try(step, point, options.c1)
            if abs(trial.slope) <= -options.c2 * self.slope:
                return point
            if trial.slope < 0:
                before, short, cuts = short, trial, 0
            else:
                long, cuts = trial, cuts + 1
            if long is None:
                ahead, step, reach = ahead + 1, _beyond(before, short, reach), min(reach**2, FARTHEST)
            else:
                between, step = between + 1, _between(short, long, cuts)
                if not short.step < step < long.step:
                    break
        return None

    def _try(self, step: float, point: Evaluation, c1: float) -> _Trial:
        """A trial; the gradient is computed only if the value has fallen enough."""
        rise = self._rise(step, point)
        if not rise <= c1 * step * self.slope:
            return _Trial(step, rise, math.nan)
        if not point.has_finite_grad:
            return _Trial(step, math.inf, math.nan)
        best = self.start if self.lowest is None else self.lowest
        if best.value - point.value > self.objective.rounding(best, point):
            self.lowest = point
        return _Trial(step, rise, -float(point.grad @ self.direction))

    def _rise(self, step: float, point: Evaluation) -> float:
        """The rise by values, or by slopes where values cannot decide."""
        if not point.is_finite:
            return math.inf
        rise = point.value - self.start.value
        if abs(rise) > self.objective.rounding(self.start, point):
            if self.told is None or step < self.told[0]:
                self.told = step, point
            return rise
        return self._rise_by_slopes(point) if point.has_finite_grad else math.inf

    def _rise_by_slopes(self, point: Evaluation) -> float:
        return float((self.start.grad + point.grad) @ (point.x - self.start.x)) / 2.0

    def hears_noise(self) -> bool:
        """Whether values have turned out to be noisier than known so far."""
        if self.told is None:
            return False
        step, point = self.told
        by_slopes = self._rise_by_slopes(point)
        noise = abs(point.value - self.start.value - by_slopes)
        doubtful = noise > DOUBTFUL * max(-step * self.slope, abs(by_slopes))
        heard = doubtful and noise <= LOUDEST * max(self.objective.first, abs(self.start.value))
        if heard:
            self.objective.noise = 10.0 * noise
        return heard


def _beyond(before: _Trial, short: _Trial, reach: float) -> float:
    """The step where the slope would be zero if it kept changing at this rate, within the allowed range."""
    bend, ahead = short.slope - before.slope, math.inf
    if bend > 0:
        ahead = short.step - (short.step - before.step) * short.slope / bend
    return min(max(ahead, (1.0 + EDGE) * short.step), reach * short.step)


def _between(short: _Trial, long: _Trial, cuts: int) -> float:
    """A step inside an interval whose far end has moved in the last `cuts` cuts."""
    width, start, end = long.step - short.step, short.slope, long.slope
    if short.step > 0:
        edge, middle = EDGE, math.sqrt(short.step) * math.sqrt(long.step)
    else:
        edge = EDGE**cuts
        middle = edge * width
    if not math.isfinite(long.rise):
        return middle
    chord = (long.rise - short.rise) / width
    if math.isnan(end):
        bend = 2.0 * (chord - start)
        part = -start / bend if bend > 0 else 0.0
    else:
        half = start + end - 3.0 * chord
        root = math.sqrt(max(half * half - start * end, 0.0))
        part = 1.0 - (end + root - half) / (end - start + 2.0 * root)
    least = min(short.step + edge * width, middle)
    most = short.step + (1.0 - EDGE) * width if cuts < 3 else middle
    return min(max(short.step + part * width, least), most)
